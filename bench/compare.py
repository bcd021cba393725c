"""This tree and another revision, explaining the same images in turn.

    python bench/compare.py BASE [--network resnet50] [--batch 8] [--side 224] [--contender "otsuki2024 eager"] [--turns 9]

BASE, anything git knows as a revision, is unpacked into a temporary folder. Each of the two trees has a process of its own, which
imports lrp_fast from it, explains once when it is told to, and says what that took. Prints medians, their ratio with its spread
over the turns, and how far the two maps are apart. Exit code 1: this tree is slower by more than ``--tolerance`` (default 0.10),
or its map is another one; 2: no comparison. What is unpacked and started is gone at the end, also after Ctrl-C.
"""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
MAP_BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
"""The largest relative L2 difference between the two maps that rounding may make; its keys are what can be computed in."""
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


class CompareError(Exception):
    """There is nothing to compare."""


# One tree's process -----------------------------------------------------------------------------------------------------


class Worker:
    """A tree's process; it answers one line of JSON to each line."""

    def __init__(self, tree: Path, what: dict[str, Any]) -> None:
        self.tree = tree
        path = [str(tree), os.environ.get("PYTHONPATH", "")]  # it comes before an editable install
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tree, text=True
        )
        self._send(what)

    def _send(self, line: object) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(line), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise CompareError(f"the process of {self.tree} is gone") from None

    def ready(self) -> None:
        """Wait until it has explained twice; raises :class:`CompareError` if it could not, or has imported another tree."""
        imported = Path(self._answer()["imported"])
        if not imported.is_relative_to(self.tree):
            raise CompareError(f"the process of {self.tree} has imported {imported}")

    def explain(self) -> float:
        """Seconds of one explanation."""
        self._send("explain")
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CompareError(f"the process of {self.tree} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill it, if need be."""
        self.process.kill()
        self.process.communicate()


def work() -> None:
    """Be such a process: build what is asked for, save its map, explain once a line until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that compares ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no answer
    what = json.loads(sys.stdin.readline())

    import numpy as np
    import torch

    import lrp_fast
    from contenders import find, network, noise
    from records import torch_device

    def timed() -> tuple[torch.Tensor, float]:
        begin = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - begin

    device = torch_device()
    images = noise(what["batch"], what["side"], getattr(torch, what["dtype"]), device)
    run = find(what["contender"]).build(network(what["network"], device), images)
    timed()
    np.save(what["map"], timed()[0].float().cpu().numpy(), allow_pickle=False)
    print(json.dumps({"imported": str(Path(lrp_fast.__file__).resolve())}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": timed()[1]}), file=answers, flush=True)


# Comparing --------------------------------------------------------------------------------------------------------------


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def compare(base: str, what: dict[str, Any], turns: int) -> dict[str, Any]:
    """Seconds of both by turns, their ratio (this tree over the base), and the relative difference of the maps."""
    import numpy as np

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrp_fast-maps-")))
        trees = {"this tree": ROOT, "base": stack.enter_context(unpacked(base))}
        workers: dict[str, Worker] = {}
        for name, tree in trees.items():  # one after the other: they would take each other's processor
            with uninterrupted():  # between its start and the note that it is to be ended
                workers[name] = Worker(tree, what | {"map": str(folder / f"{name}.npy")})
                stack.callback(workers[name].end)
            workers[name].ready()
        own, theirs = (np.load(folder / f"{name}.npy", allow_pickle=False).astype("float64") for name in trees)
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(turns):
            for name in list(trees) if turn % 2 == 0 else reversed(trees):
                seconds[name].append(workers[name].explain())
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
    what = {"network": network, "batch": batch, "side": side, "dtype": dtype, "contender": contender}
    try:
        found = compare(base, what, turns)
    except CompareError as error:
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
    print(table((", ".join(map(str, what.values())), "ms / image", "lowest to highest"), rows))
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
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        typer.run(main)
