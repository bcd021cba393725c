"""Our maps beside zennit's and a plain forward pass, interleaved in one run, parity first.

    python bench/speed.py [--batch 8] [--side 224] [--repeats 5] [--compile]

Writes ``bench/results/<device>-<dtype>-<versions>.json`` and prints a table. Speeds are ratios of medians: absolute
times of a shared machine mean little.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import records
from lrp_fast import LRP
from peers import zennit_explainer


def attribute(explainer: LRP, images: Tensor) -> Tensor:
    """The relevance of the predicted classes."""
    relevance = explainer.attribute(images)
    assert isinstance(relevance, Tensor)
    return relevance


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of any image."""
    difference = (got.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


def measure(batch: int = 8, side: int = 224, repeats: int = 5, compile_too: bool = False) -> dict[str, Any]:
    """Medians in ms per image of interleaved calls, and the errors checked before them.

    Raises ``AssertionError`` if a map is not within 1e-5 of the reference (ours) or 1e-3 of zennit's.
    """
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    images = torch.randn(batch, 3, side, side)
    zennit = zennit_explainer(model)
    ours, same_rules = LRP(model), LRP(model, "epsilon_plus_flat")
    reference = LRP(model, backend="reference")
    errors = {
        "otsuki2024 against the float64 reference": relative_error(
            attribute(ours, images[:1]), attribute(reference, images[:1])
        ),
        "epsilon_plus_flat against zennit": relative_error(attribute(same_rules, images), zennit(images)),
    }
    assert errors["otsuki2024 against the float64 reference"] <= 1e-5, errors
    assert errors["epsilon_plus_flat against zennit"] <= 1e-3, errors
    last = images.contiguous(memory_format=torch.channels_last)
    plain = torchvision.models.resnet50().eval().to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Any]] = {
        "forward": torch.no_grad()(lambda: plain(last)),
        "otsuki2024": lambda: ours.explain(images),
        "epsilon_plus_flat": lambda: same_rules.explain(images),
        "zennit EpsilonPlusFlat": lambda: zennit(images),
    }
    if compile_too:
        compiled = LRP(model, compile=True)
        runs["otsuki2024 compiled"] = lambda: compiled.explain(images)
    times = interleaved(runs, repeats)
    return {"errors": errors, "ms_per_image": {name: 1000 * t / batch for name, t in times.items()}}


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, all of them taken in turn after one warm-up."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def main(
    batch: int = 8, side: int = 224, repeats: int = 5,
    compile_too: Annotated[bool, typer.Option("--compile", help="time the compiled explainer too")] = False,
) -> None:  # fmt: skip
    """Measure, print and write the results."""
    found = measure(batch, side, repeats, compile_too)
    processor = platform.machine()
    found |= {
        "network": "resnet50",
        "batch": batch,
        "side": side,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    records.save(f"cpu-{processor}-float32", found)
    milliseconds = found["ms_per_image"]
    table = Table("run", "ms / image", "forward passes", "speed against zennit")
    for run, value in milliseconds.items():
        ratio = milliseconds["zennit EpsilonPlusFlat"] / value
        table.add_row(run, f"{value:.1f}", f"{value / milliseconds['forward']:.2f}", f"{ratio:.2f}x")
    Console().print(table)
    for what, error in found["errors"].items():
        Console().print(f"parity: {what}: {error:.1e}")


if __name__ == "__main__":
    typer.run(main)
