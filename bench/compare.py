"""This tree and another revision, explaining the same images in turn.

    python bench/compare.py BASE [--network resnet50] [--batch 8] [--side 224] [--contender "otsuki2024 eager"] [--turns 9]

BASE, anything git knows as a revision, is unpacked into a temporary folder. Each of the two trees has a process of its own, which
imports lrp_fast from it, explains once when it is told to, and says what that took. Prints medians, their ratio with its spread
over the turns, and how far the two maps are apart. Exit code 1: this tree is slower by more than ``--tolerance`` (default 0.10),
or its map is another one; 2: no comparison. What is unpacked and started is gone at the end, also after Ctrl-C.
"""

from __future__ import annotations

import io
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from workers import ROOT, Task, Worker, WorkerError, uninterrupted

MAP_BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
"""The largest relative L2 difference between the two maps that rounding may make; its keys are what can be computed in."""


class CompareError(Exception):
    """There is nothing to compare."""


# Comparing --------------------------------------------------------------------------------------------------------------


@contextmanager
def unpacked(base: str) -> Iterator[Path]:
    """A revision's files in a temporary folder. Nothing is written into the repository."""
    found = subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", base], capture_output=True)
    if found.returncode != 0:
        raise CompareError(f"git cannot unpack {base!r}: {found.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="lrp_fast-compare-") as folder:
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


def compare(base: str, task: Task, turns: int) -> dict[str, Any]:
    """Seconds of both by turns, their ratio (this tree over the base), and the relative difference of the maps."""
    import numpy as np

    with ExitStack() as stack:
        trees = {"this tree": ROOT, "base": stack.enter_context(unpacked(base))}
        workers: dict[str, Worker] = {}
        maps = {}
        for name, tree in trees.items():  # one after the other: they would take each other's processor
            with uninterrupted():  # between its start and the note that it is to be ended
                workers[name] = Worker(tree)
                stack.callback(workers[name].end)
            built = workers[name].build(task)
            if not built.imported.is_relative_to(tree):
                raise CompareError(f"the process of {tree} has imported {built.imported}")
            maps[name] = built.results.astype("float64")
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(turns):
            for name in list(trees) if turn % 2 == 0 else reversed(trees):
                seconds[name].append(workers[name].explain(task))
    own, theirs = maps.values()
    return {
        "seconds": seconds,
        "ratios": [one / other for one, other in zip(seconds["this tree"], seconds["base"], strict=True)],
        "difference": float(np.linalg.norm(own - theirs) / np.linalg.norm(theirs)),
    }


def main(
    base: Annotated[str, typer.Argument(help="a revision")],
    network: Annotated[str, typer.Option(help="of torchvision, or cifar")] = "resnet50",
    batch: int = 8, side: int = 224, dtype: str = "float32",
    contender: Annotated[str, typer.Option(help="one of ours, by its name in contenders.py")] = "otsuki2024 eager",
    turns: Annotated[int, typer.Option(min=1)] = 9,
    tolerance: Annotated[float, typer.Option(help="how much longer than the base is too long")] = 0.10,
) -> None:  # fmt: skip
    """Compare and print."""
    from report import table

    if dtype not in MAP_BOUNDS:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(MAP_BOUNDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by Ctrl-C: what was started is ended
    task = Task(contender, network, batch, side, dtype)
    try:
        found = compare(base, task, turns)
    except (CompareError, WorkerError) as error:
        print(f"compare: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    medians = {name: statistics.median(taken) for name, taken in found["seconds"].items()}
    rows = [
        (
            name,
            f"{1000 * medians[name] / batch:.4g}",
            f"{1000 * min(taken) / batch:.4g} to {1000 * max(taken) / batch:.4g}",
        )
        for name, taken in found["seconds"].items()
    ]
    print(table((", ".join(map(str, vars(task).values())), "ms / image", "lowest to highest"), rows))
    ratio = medians["this tree"] / medians["base"]
    print(f"\nthis tree / {base}: {ratio:.3f} (turns: {min(found['ratios']):.3f} to {max(found['ratios']):.3f})")
    same = found["difference"] <= MAP_BOUNDS[dtype]
    print(
        f"maps: relative difference {found['difference']:.1e}"
        + ("" if same else f", more than {MAP_BOUNDS[dtype]:.0e}")
    )
    if not same or not ratio <= 1 + tolerance:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
