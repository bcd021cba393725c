"""Growth curves: laws, resumption, where they stop, and one point measured."""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import growth
import records

HEAD = {"device": {"name": "test"}, "versions": {"torch": "0"}, "date": "2026-11-23"}
SETTINGS = {"dtype": "float32", "code": "abc"}
NO_LIMITS = growth.Limits(math.inf, math.inf)


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where results go."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


class Fake:
    """Measures by a law; keeps what it was asked for."""

    def __init__(self, fails_at: int = 0, error: BaseException | None = None) -> None:
        self.asked: list[tuple[growth.Point, bool]] = []
        self.fails_at, self.error = fails_at, error

    def __call__(self, point: growth.Point, dtype: str, seconds: float, check: bool) -> dict[str, float]:
        if point.value == self.fails_at and self.error is not None:
            raise self.error
        self.asked.append((point, check))
        work = point.batch * (point.side / 224) ** 2
        found = {
            "seconds": 0.01 + 0.09 * work,
            "forward_seconds": 0.002 + 0.02 * work,
            "peak_bytes": 1e8 + 1.5e8 * work,
        }
        return found | {"parameter_bytes": 1e8} | ({"relative_error": 1e-7} if check else {})


def grown(fresh: bool = False, **settings: str) -> growth.Growth:
    """As a new process would begin."""
    return growth.Growth("growth-test", HEAD, SETTINGS | settings, fresh)


def run(
    to: growth.Growth, curve: str, values: list[int], measured: Fake, limits: growth.Limits = NO_LIMITS
) -> dict[str, Any]:
    """Measure a curve; its entry."""
    to.run(curve, values, limits, "float32", 0.0, measured)
    entry: dict[str, Any] = to.result["curves"][curve]
    return entry


def test_a_line_is_recovered() -> None:
    a, b, xs = random.uniform(1, 5), random.uniform(0.1, 9), [1, 2, 4, 8, 64]
    found = growth.line(xs, [a + b * x for x in xs])
    assert found["intercept"] == pytest.approx(a)
    assert found["slope"] == pytest.approx(b)
    assert found["worst_residual"] <= 1e-9


def test_a_line_weighs_points_by_their_size() -> None:
    noisy = growth.line([1, 2, 4, 1000], [3.0, 5.0, 9.0, 2200.0])  # 1 + 2x, the last off by a tenth
    assert noisy["intercept"] == pytest.approx(1, abs=0.35)
    assert noisy["worst_residual"] < 0.1


def test_an_exponent_is_recovered() -> None:
    factor, exponent, xs = random.uniform(1e-6, 1e-3), random.uniform(0.5, 3), [1024, 64, 96, 512]
    found = growth.power(xs, [factor * x**exponent for x in xs])
    assert found["exponent"] == pytest.approx(exponent)
    assert found["last_exponent"] == pytest.approx(exponent)
    assert found["factor"] == pytest.approx(factor)


@pytest.mark.parametrize("points", [([1], [1]), ([1, 2], [1, 0]), ([1, 2], [1, math.nan]), ([1, 2, 3], [1, 2])])
@pytest.mark.parametrize("fit", [growth.line, growth.power])
def test_no_law_of_what_is_none(fit: Any, points: Any) -> None:
    with pytest.raises(ValueError, match="at least two points"):
        fit(*points)


def test_curves_are_what_the_names_say() -> None:
    values = {name: [curve.point(value) for value in curve.values] for name, curve in growth.CURVES.items()}
    assert [point.batch for point in values["batch"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert (values["side"][0].side, values["side"][-1].side) == (64, 1024)
    assert [point.network for point in values["depth"]] == [f"resnet{n}" for n in (18, 34, 50, 101, 152)]
    assert [point.network for point in values["width"]] == [f"resnet50:{n}" for n in (32, 64, 128, 192)]
    assert [point.targets for point in values["targets"]] == [1, 2, 4, 8, 16]
    for name, curve in growth.CURVES.items():
        assert set(curve.quick) <= set(curve.values), name


def test_a_point_is_measured_once() -> None:
    first, second, third = Fake(), Fake(), Fake()
    run(grown(), "batch", [1, 2], first)
    entry = run(grown(), "batch", [1, 2, 4], second)
    assert [point.value for point, _ in first.asked] == [1, 2]
    assert [point.value for point, _ in second.asked] == [4]
    assert [point["value"] for point in entry["points"]] == [1, 2, 4]
    run(grown(fresh=True), "batch", [1], third)
    assert [point.value for point, _ in third.asked] == [1]


def test_measurements_of_other_code_are_not_mixed_in() -> None:
    run(grown(), "batch", [1, 2], Fake())
    other = grown(code="def")
    assert other.begun_anew
    assert other.points("batch") == []


def test_a_network_is_checked_once() -> None:
    fake, to = Fake(), grown()
    run(to, "batch", [1, 2], fake)
    run(to, "depth", [18, 34], fake)
    run(to, "side", [64], fake)
    assert [check for _, check in fake.asked] == [True, False, True, True, False]


def test_an_interruption_keeps_what_is_there() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(grown(), "side", [64, 128, 256], Fake(256, KeyboardInterrupt()))
    rest = Fake()
    run(grown(), "side", [64, 128, 256], rest)
    assert [point.value for point, _ in rest.asked] == [256]


def test_a_failure_is_no_point() -> None:
    with pytest.raises(RuntimeError, match="the map is off"):
        run(grown(), "batch", [1, 2], Fake(2, RuntimeError("the map is off by 1")))
    assert [point["value"] for point in grown().points("batch")] == [1]


def test_a_curve_stops_where_a_call_would_take_too_much() -> None:
    values = list(growth.CURVES["batch"].values)
    slow = run(grown(), "batch", values, Fake(), growth.Limits(1.0, math.inf))
    assert [point["value"] for point in slow["points"]] == [1, 2, 4, 8]
    assert slow["stopped"] == {"before": 16, "why": "a call would take about 1 s, more than 1 s"}
    large = run(grown(fresh=True), "side", [224, 448, 896], Fake(), growth.Limits(math.inf, 1.1e9))
    assert large["stopped"]["before"] == 896
    assert "GB, more than 1.1 GB" in large["stopped"]["why"]
    full = run(grown(fresh=True), "batch", [1, 2], Fake(2, growth.DoesNotFitError("did not fit")))
    assert full["stopped"] == {"before": 2, "why": "did not fit"}


def test_saved_results_say_what_slopes_mean_and_where_cards_stop(results: Path) -> None:
    to = grown()
    run(to, "batch", [1, 2, 4, 8], Fake())
    run(to, "side", [64, 128, 256, 512], Fake())
    saved = json.loads(to.save().read_text())
    assert saved["curves"]["batch"]["meaning"] == (
        "A call takes 10.0 ms and 90.00 ms for each image, and 100 MB and 150.0 MB for each image."
    )
    assert 1 < saved["curves"]["side"]["fits"]["seconds"]["exponent"] < 2
    assert saved["cards"]["24 GB"]["largest_batch"] == int((24e9 - 2e8) // 1.5e8)
    assert saved["cards"]["80 GB"]["largest_batch"] == int((80e9 - 2e8) // 1.5e8)
    assert saved["cards"]["24 GB"]["estimate"] is True


def test_one_point_with_several_targets() -> None:
    found = growth.measure(growth.Point(3, "cifar", 16, 2, 3), "float32", 0.05, check=True)
    assert found["relative_error"] <= 1e-5
    assert 0 < found["forward_seconds"] < 5
    assert 0 < found["seconds"] < 20
    assert 0 <= found["peak_bytes"] < 1e9
    model = growth.network("cifar", torch.device("cpu"))
    assert found["parameter_bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_what_a_process_fails_with_is_said() -> None:
    with pytest.raises(RuntimeError, match="unknown network 'nothing'"):
        growth.measure_apart(growth.Point(1, "nothing"), "float32", 0.0, False)


def test_the_peak_is_that_of_the_run() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.append(torch.ones(2**26))

    ctypes.CDLL(None).malloc_trim(0)  # else they may lie where what other tests have freed was kept
    peak = growth.peak_bytes(run, torch.device("cpu"))
    assert 1.9 * 2**28 <= peak <= 3 * 2**28


def test_unknown_curves_are_named() -> None:
    assert growth.chosen("side, batch") == ["side", "batch"]
    ran = CliRunner().invoke(growth.application, ["--what", "batch,hight"])
    assert ran.exit_code == 2
    assert "unknown curve hight" in " ".join(ran.output.replace("│", " ").split())


def test_networks_by_name() -> None:
    wide = growth.network("resnet18:64", torch.device("cpu"))
    assert wide.layer1[0].conv2.weight.shape[0] == 64
    with pytest.raises(ValueError, match="unknown network 'resnet-50'"):
        growth.network("resnet-50", torch.device("cpu"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One curve of one small point."""
    curve = replace(growth.CURVES["side"], quick=(16,), point=lambda n: growth.Point(n, "cifar", side=n))
    monkeypatch.setattr(growth, "CURVES", {"side": curve})


def test_the_command_measures_and_says_what_it_found(tiny: None, results: Path) -> None:
    ran = CliRunner().invoke(growth.application, ["--what", "side", "--quick"])
    assert ran.exit_code == 0, ran.output
    assert "too few points for a slope" in ran.output
    (file,) = results.iterdir()
    assert file.name.startswith("quick-growth-")
    (point,) = json.loads(file.read_text())["curves"]["side"]["points"]
    assert point["value"] == 16
    assert point["relative_error"] <= 1e-5


def test_ctrl_c_ends_the_command_quietly(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(growth.Growth, "run", interrupted)
    ran = CliRunner().invoke(growth.application, ["--what", "side", "--quick"])
    assert ran.exit_code == growth.INTERRUPTED
    assert "goes on with the rest" in ran.output
