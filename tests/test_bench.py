"""The benchmarks run, and what they compare agrees; the harness in miniature."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def test_throughput_compares_the_maps_it_times(tmp_path: Path) -> None:
    import throughput
    from lrp_fast.data import open_source
    from lrp_fast.pipeline import PipelineOptions

    loaded = throughput._model("embedded")
    source = open_source(throughput._photographs(tmp_path / "in", 6))
    options = PipelineOptions(batch_size=2, workers=0, levels=None)
    result = throughput.compare(tmp_path, loaded, source, torch.device("cpu"), options, 1)
    assert 0.05 < result["pipeline_over_bare"] < 20
    assert sum(result["waited_for"].values()) == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.glob("store-*"))


def test_perturbation_compares_equal_numbers_of_passes() -> None:
    import perturbation

    result = perturbation.measure("resnet18", 1, 30000, 2, 0.1, torch.device("cpu"))
    assert result["forward_passes"] == {"rank": 4, "threshold": 4}
    assert all(0.05 < ratio < 20 for ratio in result["metric_over_forward"].values())


def test_kernels_take_turns_with_eager_torch_and_one_is_built_at_a_time() -> None:
    """On a GPU: every sample would otherwise draw its tensors anew, minutes in all, or those of all kernels be there at once."""
    spec = importlib.util.spec_from_file_location("bench_layers", BENCH / "test_layers.py")
    assert spec is not None
    assert spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    sys.modules["bench_layers"] = layers  # where its dataclasses look their annotations up
    spec.loader.exec_module(layers)
    kernels = layers.cases.small_cases()[:2]
    samples = layers.launch_cases(kernels, 2)
    assert [(kernels.index(each.kernel), each.turn, each.way) for each in samples] == [
        (kernel, turn, way) for kernel in (0, 1) for turn in (0, 1) for way in ("kernel", "eager")
    ]
    built: dict[Any, Any] = {}
    prepared = [layers.prepare_kernel(each.kernel, torch.device("meta"), built) for each in samples]
    assert len(built) == 1
    assert len({id(each) for each in prepared[:4]}) == len({id(each) for each in prepared[4:]}) == 1


# Explanations beside other tools ------------------------------------------------------------------------------------------

BROKEN = """
import contenders, torch

def build(model, images):
    return lambda: torch.full_like(images, float("nan"))

contenders.CONTENDERS.append(contenders.Contender("broken", "ours", "LRP", build, "otsuki2024"))
"""
"""What every Python process imports at its start: a contender of ours whose maps are wrong."""


def test_contenders_take_turns_and_no_speed_without_parity(tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="a peer")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    output = tmp_path / "found.json"
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--benchmark-quiet",
        str(BENCH / "test_networks.py"), str(BENCH / "test_layers.py"), "--network", "cifar", "--side", "16",
        "--batch", "2", "--turns", "2", "--memory-calls", "3", "--output", str(output),
        "--contenders", "forward eager,captum LRP,conserving eager,broken",
        "-k", "not bfloat16 and not (test_memory and forward)",
    ]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 1 failed" in done.stdout, done.stdout
    assert "ParityError: broken: relative error nan" in done.stdout
    assert re.search("written to .*found.json; not the whole: .* deselected, --network, ", done.stdout)

    calls = re.findall(r"test_explanation\[batch 2-turn (\d)-float32-(.*?)\]", done.stdout)
    names = ["forward eager", "captum LRP", "conserving eager", "broken"]
    assert calls[:8] == [(turn, name) for turn in "01" for name in names]
    result = json.loads(output.read_text())
    assert {"device", "versions", "date", "rows", "layers", "ratios", "targets"} == set(result)
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == names
    for name in names[:3]:
        row = rows[name]
        assert len(row["all_ms"]) == 2
        assert min(row["all_ms"]) > 0
        assert row["ms_per_image"] == pytest.approx(sum(row["all_ms"]) / 2)
        assert row["images_per_second"] == pytest.approx(1000 / row["ms_per_image"])
        assert row["forward_passes"] == pytest.approx(row["ms_per_image"] / rows["forward eager"]["ms_per_image"])
    for name in names[1:3]:
        before, peak = rows[name]["memory_before_mb"], rows[name]["peak_memory_mb"]
        assert 50 < before < peak == rows[name]["memory_by_call_mb"][2] < 5000
    verdicts = {name: row["parity"]["verdict"] for name, row in rows.items()}
    assert verdicts.pop("broken").startswith("FAILED: broken: relative error nan")
    assert verdicts == {"forward eager": "ok", "captum LRP": "wrong", "conserving eager": "ok"}
    assert rows["captum LRP"]["parity"]["relative_error"] > 1
    assert rows["broken"]["ms_per_image"] is None
    assert "peak_memory_mb" not in rows["broken"]
    passes = result["ratios"]["batch 2"]["conserving eager / forward eager"]
    assert passes == pytest.approx(rows["conserving eager"]["forward_passes"])

    layers = {(layer["layer"], layer["rule"]): layer for layer in result["layers"]}
    forward, plus = layers["16² 16→16 3x3", "forward"], layers["16² 16→16 3x3", "z+"]
    assert forward["flops"] == 2 * 8 * 16 * 16 * 16 * 16 * 9
    assert plus["flops"] == 3 * forward["flops"]
    assert plus["times_beside"] == pytest.approx(plus["ms_per_image"] / forward["ms_per_image"])
    assert plus["relative_error"] < 1e-5
    table = output.with_suffix(".md").read_text()
    assert re.search(r"\| captum LRP \|.*\| wrong \|", table)


class Straight(torch.nn.Module):
    """No residual addition and no batch norm: all of it captum knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, stride=2), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).flatten(1))


@pytest.mark.parametrize("name", ["captum LRP", "zennit EpsilonPlusFlat", "zennit EpsilonGammaBox"])
def test_a_peer_is_right_where_it_knows_the_network(name: str) -> None:
    """So that a peer called wrong is wrong by itself, not by how it is called."""
    pytest.importorskip(name.split()[0], reason="a peer")
    import contenders

    images = torch.randn(2, 3, 15, 13)
    model: torch.nn.Module = Straight().eval()
    if name.startswith("zennit"):
        model = contenders.network("resnet18", torch.device("cpu"))
        images = torch.randn(1, 3, 48, 33)
    peer = contenders.find(name)
    got = contenders.prepare(peer, model, images)()
    found = contenders.parity(peer, torch.float32, got, contenders.expected(peer, model, images))
    assert found["verdict"] == "ok", found


def test_a_peer_leaves_the_model_as_it_was() -> None:
    pytest.importorskip("pytorch_grad_cam", reason="a peer")
    import contenders

    model = contenders.network("cifar", torch.device("cpu"))
    images = contenders.noise(2, 16, torch.float32, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for peer in (each for each in contenders.CONTENDERS if each.kind == "peer" or each.name == "forward eager"):
        result = contenders.prepare(peer, model, images.bfloat16() if peer.kind == "forward" else images)()
        assert result.shape in ((2, 3, 16, 16), (2, 16, 16), (2, 10)), peer.name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_contenders_by_name() -> None:
    import contenders

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [each.name for each in contenders.choose("epsilon_plus eager", torch.float32, cpu)] == ["epsilon_plus eager"]
    parts = [each.name for each in contenders.choose("forward, captum", torch.float32, cpu)]
    assert parts == ["forward eager", "forward compiled", "captum LRP"]
    half = [each.name for each in contenders.choose(None, torch.bfloat16, cpu)]
    assert half == ["forward eager", "forward compiled", "otsuki2024 eager", "otsuki2024 compiled"]
    assert not [each.name for each in contenders.choose(None, torch.float32, cpu) if "triton" in each.name]
    assert "otsuki2024 triton + graph" in [each.name for each in contenders.choose(None, torch.float32, cuda)]
    with pytest.raises(ValueError, match="no contender is called 'lime'; known: forward eager,"):
        contenders.choose("captum,lime", torch.float32, cpu)


def test_bounds_of_maps() -> None:
    import contenders

    values = torch.randn(1, 3, 9, 7, dtype=torch.float64)
    reference = contenders.Reference(values)
    ours, peer = contenders.find("otsuki2024 eager"), contenders.find("zennit EpsilonPlus")
    near = values * (1 + 5e-6)
    assert contenders.parity(ours, torch.float32, near, reference)["verdict"] == "ok"
    assert contenders.parity(peer, torch.float32, values * 1.005, reference)["verdict"] == "ok"
    assert contenders.parity(peer, torch.float32, values * 1.02, reference)["verdict"] == "wrong"
    assert contenders.parity(peer, torch.float32, values * torch.nan, reference)["relative_error"] is None
    for wrong in (values * 1.001, values * torch.nan):
        with pytest.raises(contenders.ParityError, match="otsuki2024 eager: relative error"):
            contenders.parity(ours, torch.float32, wrong, reference)
    # No error is asked of a map with cancellation that a plain float32 evaluation of the same equations does not keep to.
    cancelling, off = contenders.find("epsilon eager"), values * 1.003
    assert contenders.parity(cancelling, torch.float32, off, contenders.Reference(values, 2e-3))["bound"] == 4e-3
    for known in (contenders.Reference(values), contenders.Reference(values, 1e-3)):
        with pytest.raises(contenders.ParityError, match="epsilon eager: relative error"):
            contenders.parity(cancelling, torch.float32, off, known)
    assert contenders.bound(ours, torch.float32, 2e-3) == 1e-5


def test_a_cancelling_composite_is_judged_by_plain_float32() -> None:
    import contenders

    model = contenders.network("cifar", torch.device("cpu"))
    images = contenders.noise(2, 16, torch.float32, torch.device("cpu"))
    plain = {name: contenders.expected(contenders.find(f"{name} eager"), model, images) for name in contenders.OURS}
    assert all(found is not None and (found.plain > 0) == (name == "epsilon") for name, found in plain.items())
    precise = copy.deepcopy(model).double()
    double = contenders.plain_errors(precise, contenders.LRP(precise, "epsilon"), images.double())
    assert float(double.max()) <= 1e-12
    assert plain["epsilon"] is not None
    assert 1e-9 < plain["epsilon"].plain < 1e-1


def _row(contender: str, ms: float | None, batch: int = 8, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    import contenders

    found = contenders.find(contender)
    given = {"contender": contender, "kind": found.kind, "composite": found.composite, "computes": found.computes}
    return given | {"batch": batch, "dtype": dtype, "ms_per_image": ms} | more


def test_targets_are_ratios_of_medians() -> None:
    import tables

    memory = {"memory_before_mb": 500.0}
    grown = {"memory_by_call_mb": [1500, 2000, 2030], "peak_memory_mb": 2030.0}
    rows = [
        _row("forward eager", 27.0), _row("forward compiled", 22.0), _row("captum LRP", 280.0),
        _row("zennit EpsilonPlusFlat", 320.0, peak_memory_mb=2500.0, **memory),
        _row("zennit EpsilonAlpha2Beta1Flat", 600.0), _row("epsilon_alpha2_beta1_flat eager", 125.0),
        _row("otsuki2024 eager", 90.0, first_call_seconds=1.5, **grown, **memory),
        _row("otsuki2024 compiled", 80.0), _row("otsuki2024 eager", 40.0, dtype="bfloat16"),
        _row("zennit EpsilonPlusFlat", 400.0, batch=1), _row("otsuki2024 eager", 101.0, batch=1),
        _row("captum LRP", None, batch=1), _row("epsilon eager", 70.0), _row("epsilon compiled", 56.0),
    ]  # fmt: skip
    found = [target.found(rows) for target in tables.TARGETS]
    values = [4.0, 4.8, 5.0, 3.5, 80 / 22, 2.0, 400 / 101, None, 1.5, 1530 / 2000, 2030 / 2000]
    assert [target["value"] for target in found] == pytest.approx(values)
    reached = ["yes", "no", "yes", "yes", "yes", "yes", "no", "not measured", "yes", "yes", "yes"]
    assert [target["reached"] for target in found] == reached
    ratios = tables.ratios(rows)
    assert ratios["batch 8"]["zennit EpsilonPlusFlat / otsuki2024 compiled"] == 4
    assert ratios["batch 8"]["otsuki2024 eager / forward compiled"] == pytest.approx(90 / 22)
    assert "zennit EpsilonPlusFlat / epsilon_alpha2_beta1_flat eager" not in ratios["batch 8"]


# Two revisions ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts bench/compare.py on a small network, its temporary files in ``tmp_path / "scratch"``; ends with the test."""
    if subprocess.run(["git", "-C", str(BENCH.parent), "rev-parse", "HEAD"], capture_output=True).returncode != 0:
        pytest.skip("compares revisions of a git repository")
    (tmp_path / "scratch").mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(base: str, *options: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            str(BENCH / "compare.py"),
            base,
            "--network",
            "cifar",
            "--side",
            "16",
            "--batch",
            "2",
        ]
        environment = os.environ | {"TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # the test failed
            process.terminate()
            process.communicate(timeout=60)


def test_two_revisions_are_compared(comparison: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = comparison("HEAD", "--turns", "3", "--tolerance", "20")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    ratio, low, high = map(float, re.findall(r"this tree / HEAD: (\S+) \(turns: (\S+) to (\S+)\)", output)[0])
    assert 0 < low <= high
    assert 0.05 < ratio < 21
    assert float(re.findall(r"maps: relative difference (\S+)", output)[0]) < 1e-3
    assert not list((tmp_path / "scratch").glob("lrp_fast-*"))


@pytest.mark.parametrize(
    ("seconds", "difference", "code"),
    [([1.0, 1.05, 5.0], 0.0, 0), ([1.0, 1.2, 1.3], 0.0, 1), ([0.5, 0.6, 0.5], 0.1, 1), ([0.5, 0.6, 0.5], math.nan, 1)],
)
def test_a_slower_tree_or_another_map_fails(
    seconds: list[float], difference: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compare

    found = {"seconds": {"this tree": seconds, "base": [1.0, 1.0, 1.0]}, "ratios": seconds, "difference": difference}
    monkeypatch.setattr(compare, "compare", lambda *arguments: found)
    monkeypatch.setattr(compare.signal, "signal", lambda *arguments: None)
    application = typer.Typer()
    application.command()(compare.main)
    assert CliRunner().invoke(application, ["HEAD"]).exit_code == code


def test_an_unknown_revision_is_told() -> None:
    import compare

    with (
        pytest.raises(compare.CompareError, match="git cannot unpack 'no-such-revision'"),
        compare.unpacked("no-such-revision"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_nothing(
    comparison: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    process = comparison("HEAD", "--turns", "1000000")
    deadline = time.monotonic() + 240
    while len(workers := _children(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not list((tmp_path / "scratch").glob("lrp_fast-*"))


def _children(parent: int) -> list[int]:
    """The processes that a process has started, by Linux's list of its main thread's."""
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
