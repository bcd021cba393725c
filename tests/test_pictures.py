"""The benchmarks' pictures: what they show of results, that the same results give the same bytes, and what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import growth
import limits
import pictures

HEAD = {
    "device": {"name": "cpu-x86_64", "processor": "AMD EPYC", "threads": 2}, "versions": {"torch": "2.15.0+cpu"},
    "date": "2026-11-23 18:00 UTC",
}  # fmt: skip
OURS, ZENNIT = 11.0, 44.0
"""Milliseconds per image."""


def row(contender: str, composite: str | None, ms: float | None, verdict: str = "ok") -> dict[str, Any]:
    """As the harness writes one."""
    kind = "forward" if "forward" in contender else "ours" if contender[:7] in ("otsuki2", "epsilon") else "peer"
    found = {
        "kind": kind, "network": "resnet50", "side": 224, "batch": 8, "dtype": "float32", "contender": contender,
        "composite": composite, "parity": {"verdict": verdict, "relative_error": 1e-7},
    }  # fmt: skip
    return found | {"ms_per_image": ms, "images_per_second": ms and 1000 / ms}


def peers_result() -> dict[str, Any]:
    """Ours, a forward pass, peers right and wrong, and one that failed."""
    rows = [
        row("forward eager", None, 3.8), row("forward compiled", None, 3.3), row("otsuki2024 eager", "otsuki2024", 12.0),
        row("otsuki2024 compiled", "otsuki2024", OURS), row("epsilon_plus_flat eager", "epsilon_plus_flat", 13.0),
        row("epsilon_alpha2_beta1_flat eager", "epsilon_alpha2_beta1_flat", 16.0),
        row("zennit EpsilonPlusFlat", "epsilon_plus_flat", ZENNIT),
        row("zennit EpsilonAlpha2Beta1Flat", "epsilon_alpha2_beta1_flat", 80.0), row("grad-cam", None, 8.0, "no reference"),
        row("gradient x input", None, 9.5, "no reference"), row("captum LRP", "epsilon", 38.0, "wrong"),
        row("zennit EpsilonGammaBox", "epsilon_gamma_box", None, "error: RuntimeError: no"),
        row("otsuki2024 eager", "otsuki2024", 1.0) | {"batch": 1},
    ]  # fmt: skip
    return HEAD | {"rows": rows}


def limits_result() -> dict[str, Any]:
    """Units by the dozen around a ResNet-50's sizes."""
    found = limits.Ceilings(4e10, {"float32": 4.2e11, "bfloat16": 9e11}, {"float32": 3.6e11, "bfloat16": 8e11})
    units = []
    for direction, maps in (("forward", 2), ("backward", 1)):
        for number in range(12):
            flops, moved = int(maps * 1.6e9), int(2e7 * (1 + number)) // (4 if number % 3 else 1)
            best = found.seconds(moved, flops, "float32")
            kind = ("1x1", "3x3", "1x1")[number % 3]
            units.append((f"layer.{number}", direction, kind, flops, moved, best, best * (1.15 + 0.08 * number)))
        units.append(("add", direction, "merge", 0, 10**8, 10**8 / 4e10, 10**8 / 3e10))
        units.append(("maxpool", direction, "pool", 0, 5 * 10**7, 5e7 / 4e10, 5e7 / 2e10))
        units.append(("flatten", direction, "other", 0, 0, 0.0, 1e-6))
    names = ("unit", "direction", "kind", "flops", "bytes", "roofline_seconds", "seconds")
    rows = [dict(zip(names, values, strict=True)) for values in units]
    medians = {"explanation": 1.05 * sum(one["seconds"] for one in rows), "forward": 0.03}
    whole = limits.whole(rows, medians, 0.02)
    ceilings = {"bandwidth": found.bandwidth, "products": found.products, "convolutions": found.convolutions}
    return HEAD | {
        "network": "resnet50", "batch": 8, "side": 224, "dtype": "float32", "composite": "otsuki2024", "ceilings": ceilings,
        "units": rows, "whole": whole,
    }  # fmt: skip


def growth_result() -> dict[str, Any]:
    """All curves, the batch's cut short."""
    curves: dict[str, Any] = {}
    for name, curve in growth.CURVES.items():
        points = []
        for value in curve.values[:6]:
            point = curve.point(value)
            plain = point.batch * (point.side / 224) ** 2
            plain *= value / 50 if name == "depth" else (value / 64) ** 1.4 if name == "width" else 1
            work = plain * (1 + 0.6 * (point.targets - 1))
            measured = {
                "seconds": 0.005 + 0.085 * work,
                "forward_seconds": 0.002 + 0.022 * plain,
                "peak_bytes": 8e7 + 1.1e8 * work,
            }
            points.append(vars(point) | measured | {"parameter_bytes": 102_000_000})
        curves[name] = {"axis": curve.axis, "points": points, "stopped": None, "fits": growth.fits(curve.fit, points)}
    curves["batch"]["stopped"] = {"before": 64, "why": "a call would take about 7 GB"}
    return HEAD | {"settings": {"dtype": "float32"}, "curves": curves, "cards": growth.cards(curves["batch"], True)}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one result of each kind, and an older one that no picture is made of."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name, result in (
        ("cpu-x86_64-float32-torch2.15.0", peers_result()),
        ("cpu-x86_64-float32-torch2.14.0", {"ms_per_image": {}}),
        ("limits-resnet50-cpu-x86_64-float32-torch2.15.0", limits_result()),
        ("growth-cpu-x86_64-float32-torch2.15.0", growth_result()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def drawn(results: Path, output: Path) -> tuple[list[Path], list[str]]:
    """Everything of that machine."""
    return pictures.draw(results, output, "cpu-x86_64", "resnet50", 8, "float32")


def texts(figure: Any) -> list[str]:
    """All that is written in a figure."""
    return [found.get_text() for found in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def test_the_same_results_give_the_same_files(results: Path, tmp_path: Path) -> None:
    written, missing = drawn(results, tmp_path / "first")
    again, _ = drawn(results, tmp_path / "second")
    assert missing == []
    names = [f"{stem}.{kind}" for stem in ("peers", "roofline", "growth") for kind in ("svg", "png")]
    assert [path.name for path in written] == names
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written if path.suffix == ".png")


def test_peers_are_told_by_their_bars() -> None:
    figure = pictures.peers_figure(peers_result(), "resnet50", 8, "float32")
    said = texts(figure)
    assert f"{1000 / ZENNIT:.3g}   ours {ZENNIT / 13.0:.1f}×" in said  # against the same rules
    assert f"{1000 / 38:.3g}   ours {38 / OURS:.1f}×   map is wrong" in said  # ours of that composite was not timed
    assert f"125   ours {8 / OURS:.2f}×" in said
    assert "error: RuntimeError: no" in said
    assert "Our maps: 4.0 times as fast as zennit's, each in the time of 3.3 forward passes" in said
    hatched = [bar for bar in figure.axes[0].patches if bar.get_hatch()]
    assert [bar.get_width() for bar in hatched] == [pytest.approx(1000 / 38)]
    assert len(figure.axes[0].patches) == 11


def test_other_settings_are_no_bars() -> None:
    figure = pictures.peers_figure(peers_result(), "resnet50", 1, "float32")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1000.0]


def test_roofline_shows_every_unit_that_moves_something() -> None:
    figure = pictures.roofline_figure(limits_result())
    memory, axes = figure.axes
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 24
    assert sum(len(dots.get_offsets()) for dots in memory.collections) == 4
    said = texts(figure)
    assert {"matrix products: 420 GFLOP/s", "3×3 convolutions: 360 GFLOP/s"} <= set(said)
    assert "copy: 40 GB/s" in said


def test_growth_names_slopes_and_where_cards_stop() -> None:
    result = growth_result()
    figure = pictures.growth_figure(result)
    said = texts(figure)
    assert "batch: time of a call 5 ms + 85 ms × images\npeak memory 80 MB + 110 MB × images; stopped before 64" in said
    assert any(text.startswith("side: time of a call ∝ side^1.") for text in said)
    stops = result["cards"]["24 GB"]["largest_batch"]
    assert any(f"24 GB hold {stops}" in text and "estimated from a CPU" in text for text in said)


def test_what_is_missing_is_named_and_the_rest_drawn(results: Path, tmp_path: Path) -> None:
    next(results.glob("limits-*")).unlink()
    (results / "cpu-x86_64-float32-torch2.15.0.json").unlink()
    options = ["--results", str(results), "--output", str(tmp_path / "out"), "--device", "cpu-x86_64"]
    ran = CliRunner().invoke(pictures.application, options)
    assert ran.exit_code == 1
    assert "`make bench`" in ran.output
    assert "`python bench/limits.py --network resnet50 --dtype float32`" in ran.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["growth.png", "growth.svg"]


def test_the_newest_result_is_drawn(results: Path) -> None:
    newer = growth_result() | {"date": "2026-12-01"}
    (results / "growth-cpu-x86_64-float32-torch2.10.0.json").write_text(json.dumps(newer))
    found = pictures.newest(results, "growth-cpu-x86_64-float32-*.json", "curves", "")
    assert found["date"] == "2026-12-01"


def test_a_broken_file_is_named(results: Path) -> None:
    (results / "growth-cpu-x86_64-float32-torch2.15.0.json").write_text("{")
    with pytest.raises(ValueError, match="growth-cpu-x86_64-float32-torch2.15.0.json is no JSON"):
        pictures.newest(results, "growth-*.json", "curves", "")
