"""How far from the machine an explanation is: its ceilings, measured in the run, and every unit's time beside them.

    python bench/limits.py [--network resnet50] [--batch 8] [--dtype float32] [--composite otsuki2024] [--ceilings]

The ceilings are the bandwidth of a copy far larger than the caches and the best rates of matrix products and of 3×3
convolutions. A unit of the engine's program (a layer or merge with the ReLU behind it) has in each direction a time at the
roofline, ``max(bytes / bandwidth, FLOPs / rate)``: each tensor it is handed, saves and hands on is moved once, and FLOPs are
those of its products, multiply-adds times two. Their sum is the *floor* of the explanation as it is cut into units. What
stays in a cache costs less than its bytes say: a unit that only moves memory may pass its roofline on a processor.

Writes ``results/limits-<network>-<device>-<dtype>-<versions>.json``, after checking the map against the float64 reference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import contenders
import records
from contenders import DTYPES
from lrp_fast import LRP
from lrp_fast.backends.torch import LinearOperation, MergeOperation, ProportionalPool, WinnerPool
from lrp_fast.engine import Program
from lrp_fast.layers import Convolution, Linear, Reshape
from lrp_fast.rules import FIXED_PARTS
from lrp_fast.scopes import float32_precision
from lrp_fast.watch import parameter_table

Run = Callable[[], Any]
COMPOSITE = "otsuki2024"


# Runs -------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs: Mapping[str, Run], device: torch.device, seconds: float, fewest: int = 5) -> dict[str, float]:
    """Median seconds of each run on the wall clock, all taken in turn after a warm-up, for about ``seconds`` in all.

    At least ``fewest`` rounds and at most 25.
    """

    def once(run: Run) -> float:
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - begin

    warm = sum(min(once(run), once(run)) for run in runs.values())
    rounds = min(max(int(seconds / warm), fewest), 25)
    taken = [{name: once(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(times[name] for times in taken) for name in runs}


def forward_run(model: nn.Module, images: Tensor) -> Run:
    """A plain forward pass, eager and channels last, of a copy of the model."""
    return contenders.prepare(contenders.find("forward eager"), model, images)


def checked(model: nn.Module, explainer: LRP, images: Tensor) -> float:
    """The relative L2 error of the first image's map against the float64 reference.

    Raises :class:`contenders.ParityError` if it is above its bound: what is wrong has no speed.
    """
    contender = contenders.find(f"{explainer.composite.name} eager")
    got = explainer.attribute(images[: contenders.REFERENCED])
    assert isinstance(got, Tensor)
    found = contenders.parity(contender, images.dtype, got, contenders.expected(contender, model, images))
    error: float = found["relative_error"]
    return error


# Ceilings ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """``bandwidth``: bytes per second of a copy, read and written; ``products`` and ``convolutions``: FLOPs per second of
    matrix products and of 3×3 convolutions, by dtype."""

    bandwidth: float
    products: Mapping[str, float]
    convolutions: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """The best FLOPs per second found."""
        return max(self.products[dtype], self.convolutions[dtype])

    def seconds(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """The time at the roofline."""
        return max(bytes_moved / self.bandwidth, flops / self.rate(dtype))


@dataclass(frozen=True)
class Sizes:
    """What ceilings are measured on: bytes of the tensor copied, sides of matrices, (batch, channels, side) of pictures."""

    copied: int
    matrices: tuple[int, ...]
    pictures: tuple[tuple[int, int, int], ...]


ON_CPU = Sizes(2**28, (512, 1024, 2048), ((8, 64, 56), (8, 128, 56), (8, 256, 28)))
ON_CUDA = Sizes(2**31, (2048, 4096, 8192), ((64, 64, 56), (256, 128, 28), (256, 256, 28)))
SLOW = 0.5
"""Seconds of one call after which no larger size is tried (bf16 on a processor without it, say)."""


def ceilings(device: torch.device, sizes: Sizes | None = None, repeats: int = 7) -> Ceilings:
    """Measure them: for each the best of several calls and sizes."""
    sizes = sizes or (ON_CUDA if device.type == "cuda" else ON_CPU)
    with torch.inference_mode(), float32_precision(False):
        return Ceilings(
            _bandwidth(device, sizes.copied, repeats),
            {name: _products(device, dtype, sizes.matrices, repeats) for name, dtype in DTYPES.items()},
            {name: _convolutions(device, dtype, sizes.pictures, repeats) for name, dtype in DTYPES.items()},
        )


def _bandwidth(device: torch.device, copied: int, repeats: int) -> float:
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _best(lambda: target.copy_(source), device, repeats)


def _products(device: torch.device, dtype: torch.dtype, sides: Sequence[int], repeats: int) -> float:
    found = 0.0
    for side in sides:
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(partial(torch.mm, a, b), device, repeats)
        found = max(found, 2 * side**3 / seconds)
        if seconds > SLOW:
            break
    return found


def _convolutions(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], repeats: int
) -> float:
    found = 0.0
    for batch, channels, side in shapes:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device, dtype)
        layer = layer.to(memory_format=torch.channels_last)
        x = torch.rand(batch, channels, side, side, device=device).to(dtype).to(memory_format=torch.channels_last)
        seconds = _best(partial(layer, x), device, repeats)
        found = max(found, 2 * batch * side**2 * channels**2 * 9 / seconds)
        if seconds > SLOW:
            break
    return found


def _best(run: Run, device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


# What units move and compute --------------------------------------------------------------------------------------------

Direction = Literal["forward", "backward"]
Place = tuple[int, Direction]


@dataclass(frozen=True)
class Work:
    """What a unit does in one direction. ``dtype``: of its products."""

    unit: str
    direction: Direction
    kind: str
    flops: int
    bytes: int
    dtype: str


class Counted:
    """The work of every unit of a program, from the shapes it is bound to.

    Forward a unit reads its inputs and weights, and writes its output and what it saves: gates for a linear layer or pool,
    weights of its branches for a merge. A linear layer in front of a merge hands its denominators on; the merge makes its
    gates of them. Backward a unit reads what its readers have sent (one tensor each), its own output where that is
    multiplied in, what it saved and its weights, and writes one message to each input.
    """

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program = program
        parameters = parameter_table(model, program.plan)
        self.weights = {
            place: tuple(parameters[layer.weight].shape)
            for place, unit in enumerate(program.units)
            if isinstance(layer := program.layers[unit.step], Linear)
        }
        self.elements = [math.prod(program.shapes[unit.output]) for unit in program.units]
        self.readers = Counter(source for unit in program.units for source in unit.inputs)
        self.size = program.dtype.itemsize

    def all(self) -> dict[Place, Work]:
        """By unit and direction; the input has no backward pass."""
        found: dict[Place, Work] = {}
        for place in range(len(self.program.units)):
            found[place, "forward"] = self._work(place, "forward")
            if place > 0:
                found[place, "backward"] = self._work(place, "backward")
        return self._as_served(found)

    def plain_forward(self) -> dict[int, tuple[int, int]]:
        """Bytes and FLOPs of each unit in the model's own forward pass: one map, nothing saved."""
        found = {}
        for place, unit in enumerate(self.program.units):
            moved = sum(self.elements[source] for source in unit.inputs) + self.elements[place]
            flops = 0
            if place in self.weights:
                moved += math.prod(self.weights[place])
                flops = self._flops(place)
            if isinstance(self.program.layers[unit.step], Reshape) or place == 0:
                moved = 0
            found[place] = (moved * self.size, flops)
        return found

    def _work(self, place: int, direction: Direction) -> Work:
        unit = self.program.units[place]
        operation = self.program.operations[unit.step]
        count = self._forward if direction == "forward" else self._backward
        elements, flops, extra = count(place)
        dtype = operation.dtype if isinstance(operation, LinearOperation) else self.program.dtype
        name = self.program.plan.steps[unit.step].name
        bytes_moved = elements * self.size + extra
        return Work(name, direction, self.kind(place), flops, bytes_moved, str(dtype).removeprefix("torch."))

    def kind(self, place: int) -> str:
        """``1x1``, ``3x3``… for convolutions, ``dense``, ``merge``, ``pool``, ``input`` or ``other``."""
        step = self.program.units[place].step
        operation = self.program.operations[step]
        if isinstance(operation, LinearOperation):
            convolution = isinstance(self.program.layers[step], Convolution)
            return "x".join(map(str, self.weights[place][2:])) if convolution else "dense"
        if isinstance(operation, MergeOperation):
            return "merge"
        return "pool" if operation is not None else "other" if place else "input"

    def _forward(self, place: int) -> tuple[int, int, int]:
        """Elements moved, FLOPs, and bytes of what has another dtype."""
        unit = self.program.units[place]
        operation, own = self.program.operations[unit.step], self.elements[place]
        moved = sum(self.elements[source] for source in unit.inputs) + own
        if isinstance(operation, LinearOperation):
            maps = forward_maps(operation)
            moved += maps * math.prod(self.weights[place]) + self._saved(place) * own
            return moved, maps * self._flops(place), 0
        if isinstance(operation, MergeOperation):
            held = [self._saved(source) for source in unit.inputs if self._waits(source)]
            return moved + 2 * sum(held) * own + self._weighed(place) * own, 0, 0
        if isinstance(operation, WinnerPool):
            return moved, 0, own * torch.int64.itemsize
        if isinstance(operation, ProportionalPool):
            return moved + self._saved(place) * own, 0, 0
        return self._rearranged(place, moved), 0, 0

    def _backward(self, place: int) -> tuple[int, int, int]:
        """The same for the way back."""
        unit = self.program.units[place]
        operation, own = self.program.operations[unit.step], self.elements[place]
        arriving = (max(self.readers[place], 1) + unit.keep) * own
        sent = sum(self.elements[source] for source in unit.inputs)
        if isinstance(operation, LinearOperation):
            weights, flops = self._sent_maps(place, operation)
            (source,) = unit.inputs
            messages = self._message(source) + (0 if operation.factored else self.elements[source])
            return arriving + self._saved(place) * own + weights + messages, flops, 0
        if isinstance(operation, MergeOperation):
            through = any(self._waits(source) for source in unit.inputs)  # R itself, for what multiplies by its gates
            written = sum(not self._waits(source) for source in unit.inputs) + through
            return arriving + (self._weighed(place) + written) * own, 0, 0
        if isinstance(operation, WinnerPool):
            return arriving + sent, 0, own * torch.int64.itemsize
        if isinstance(operation, ProportionalPool):
            return arriving + self._saved(place) * own + sent, 0, 0
        return self._rearranged(place, arriving + sent), 0, 0

    def _flops(self, place: int) -> int:
        """Of one map, forward or back: a weight is used once for each pixel of the layer's output."""
        return 2 * self.elements[place] // self.weights[place][0] * math.prod(self.weights[place])

    def _sent_maps(self, place: int, operation: LinearOperation) -> tuple[int, int]:
        """Elements of the weights used backward, and FLOPs."""
        maps, boxes = backward_maps(operation)
        weight, flops = math.prod(self.weights[place]), self._flops(place)
        if self.program.direct_heatmap and 0 in self.program.units[place].inputs:
            weight, flops = weight // self.weights[place][1], flops // self.weights[place][1]
        channels = self.weights[place][0] * self.weights[place][1]
        groups = operation.layer.groups if isinstance(operation.layer, Convolution) else 1
        return maps * weight, maps * flops + boxes * groups * self._flops(place) // channels

    def _message(self, source: int) -> int:
        """Elements of a message; the input's may come summed over channels."""
        summed = source == 0 and self.program.direct_heatmap
        return self.elements[source] // (self.program.shapes[0][1] if summed else 1)

    def _saved(self, place: int) -> int:
        """How many tensors like its output a linear layer or pool saves: a gate for each group, and a zero-guard's mask."""
        operation = self.program.operations[self.program.units[place].step]
        if isinstance(operation, LinearOperation):
            return len(operation.groups) + (operation.guard is not None)
        assert isinstance(operation, ProportionalPool)
        return 1 + (operation.valid is not None)

    def _waits(self, place: int) -> bool:
        """Whether a unit's gates are made at the merge behind it."""
        return self.program.units[place].numerator == "weight"

    def _weighed(self, place: int) -> int:
        """How many weights a merge keeps as tensors."""
        unit = self.program.units[place]
        operation = self.program.operations[unit.step]
        assert isinstance(operation, MergeOperation)
        probe = operation.split.weights(torch.ones(1), torch.ones(1))
        return isinstance(probe[0], Tensor) * sum(not self._waits(source) for source in unit.inputs)

    def _rearranged(self, place: int, moved: int) -> int:
        """A reshape moves nothing."""
        return 0 if isinstance(self.program.layers[self.program.units[place].step], Reshape) else moved

    def _as_served(self, found: dict[Place, Work]) -> dict[Place, Work]:
        """A unit that a backend runs as part of the merge behind it is counted there."""
        for place in self.program.taken:
            (reader,) = (at for at, unit in enumerate(self.program.units) if place in unit.inputs)
            directions: tuple[Direction, ...] = ("forward", "backward")
            for direction in directions:
                part, whole = found.pop((place, direction)), found[reader, direction]
                sums = {"flops": whole.flops + part.flops, "bytes": whole.bytes + part.bytes, "dtype": part.dtype}
                found[reader, direction] = Work(**(asdict(whole) | sums))
        return found


def forward_maps(operation: LinearOperation) -> int:
    """How many maps of the input are stacked in a layer's forward pass; what no image changes is computed once."""
    if operation.packed is not None:
        return len(operation.packed.forward)
    return sum(term.input not in FIXED_PARTS for term in operation.evaluated)


def backward_maps(operation: LinearOperation) -> tuple[int, int]:
    """How many transposed maps with weights there are, and how many of ones (one channel for each group)."""
    weighted = sum(len(sent) for part, sent in operation.sent.items() if part not in operation.flat)
    return (weighted, int(operation.guard is not None)) if weighted else (0, 1)


# How long units take ----------------------------------------------------------------------------------------------------


class UnitClock:
    """Takes the time of every unit of a program while it explains.

    On a CUDA device between two events: what the device waits for its next launch in between counts too, so that small
    batches show that wait.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.seconds: dict[Place, list[float]] = {}
        self._marks: list[tuple[Place, Any, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block every explanation adds one time for each unit and direction."""
        patches: list[tuple[object, str, Callable[..., Any]]] = [
            (self.program, "_forward_unit", partial(self._timed, self.program._forward_unit, "forward")),
            (self.program, "_send", partial(self._timed, self.program._send, "backward")),
            (self.program, "_pass_on", partial(self._timed, self.program._pass_on, "backward")),
        ]
        for place, passes in enumerate(self.program.passes):
            if passes is not None:
                patches.append((passes, "forward", partial(self._timed_pass, passes.forward, place)))
        with ExitStack() as stack:
            for owner, name, timed in patches:
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def _timed(self, call: Callable[..., Any], direction: Direction, place: int, *arguments: Any) -> Any:
        begin = self._now()
        result = call(place, *arguments)
        self._marks.append(((place, direction), begin, self._now()))
        return result

    def _timed_pass(self, call: Callable[..., Any], place: int, *arguments: Any) -> Any:
        return self._timed(lambda _, *rest: call(*rest), "forward", place, *arguments)

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> None:
        """Take the explanations since the last call as measured."""
        synchronize(self.device)
        for place, begin, end in self._marks:
            taken = end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / 1000
            self.seconds.setdefault(place, []).append(taken)
        self._marks.clear()


# The whole --------------------------------------------------------------------------------------------------------------


def measure(
    name: str, batch: int, side: int, dtype: str, device: torch.device, machine_limits: Ceilings,
    backend: str = "auto", composite: str = COMPOSITE, seconds: float = 20.0,
) -> dict[str, object]:  # fmt: skip
    """A network's units and the whole explanation against the ceilings; ``contenders.ParityError`` where the map is wrong."""
    model = contenders.network(name, device)
    images = contenders.noise(batch, side, DTYPES[dtype], device)
    explainer = LRP(model, composite, backend=backend, dtype=DTYPES[dtype])
    error = checked(model, explainer, images)
    runs = {"explanation": lambda: explainer.explain(images), "forward": forward_run(model, images)}
    medians = interleaved(runs, device, seconds / 2)
    program = explainer._program(images, frozenset(), False).program
    clock, counted = UnitClock(program, device), Counted(program, model)
    with clock.watching():
        for _ in range(min(max(int(seconds / 2 / medians["explanation"]), 5), 25)):
            explainer.explain(images)
            clock.read()
    units = unit_rows(counted.all(), clock.seconds, machine_limits)
    plain = [machine_limits.seconds(*counts, dtype) for counts in counted.plain_forward().values()]
    return {
        "network": name, "batch": batch, "side": side, "dtype": dtype, "composite": composite,
        "backend": explainer.backend, "relative_error": error, "ceilings": asdict(machine_limits),
        "whole": whole(units, medians, sum(plain)), "units": units,
    }  # fmt: skip


def unit_rows(
    work: Mapping[Place, Work], taken: Mapping[Place, Sequence[float]], limits: Ceilings
) -> list[dict[str, Any]]:
    """One row for each unit and direction, in the order they run; ValueError where one was not timed."""
    missing = [f"{one.unit} {one.direction}" for place, one in work.items() if place not in taken]
    if missing:
        raise ValueError(f"these units were never timed: {', '.join(missing)}")
    order = sorted(work, key=lambda place: (place[1] == "backward", place[0] if place[1] == "forward" else -place[0]))
    return [
        asdict(work[place])
        | {
            "seconds": statistics.median(taken[place]),
            "roofline_seconds": limits.seconds(work[place].bytes, work[place].flops, work[place].dtype),
        }
        for place in order
    ]


def whole(units: Sequence[Mapping[str, Any]], medians: Mapping[str, float], forward_floor: float) -> dict[str, float]:
    """The explanation as a whole: its floor, the share of it reached, and how many forward passes it takes."""
    floor = sum(row["roofline_seconds"] for row in units)
    return {
        "seconds": medians["explanation"],
        "seconds_in_units": sum(row["seconds"] for row in units),
        "floor_seconds": floor,
        "share_of_floor": floor / medians["explanation"],
        "forward_seconds": medians["forward"],
        "forward_floor_seconds": forward_floor,
        "forward_passes": medians["explanation"] / medians["forward"],
        "forward_passes_at_the_floor": floor / forward_floor,
    }


# Printed ----------------------------------------------------------------------------------------------------------------


def by_kind(units: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Units added up by kind and direction, what takes longest first."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in units:
        total = found.setdefault((row["kind"], row["direction"]), dict.fromkeys(("units", *_SUMMED), 0.0))
        total["units"] += 1
        for column in _SUMMED:
            total[column] += row[column]
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


_SUMMED = ("flops", "bytes", "seconds", "roofline_seconds")


def show(console: Console, result: Mapping[str, Any]) -> None:
    """Units by kind, those that lose most, and the whole."""
    table = Table("units", "", "count", "GFLOP", "MB", "ms", "ms at the roofline", "reached", title=_title(result))
    for (kind, direction), total in by_kind(result["units"]).items():
        table.add_row(kind, direction, f"{total['units']:.0f}", *_cells(total))
    console.print(table)
    lost = sorted(result["units"], key=lambda row: row["roofline_seconds"] - row["seconds"])[:10]
    worst = Table("where most is lost", "", "kind", "GFLOP", "MB", "ms", "ms at the roofline", "reached")
    for row in lost:
        worst.add_row(row["unit"], row["direction"], row["kind"], *_cells(row))
    console.print(worst)
    one = result["whole"]
    console.print(
        f"{1000 * one['seconds']:.1f} ms, {1000 * one['seconds_in_units']:.1f} ms of it in units; floor "
        f"{1000 * one['floor_seconds']:.1f} ms: {one['share_of_floor']:.0%} reached. "
        f"{one['forward_passes']:.2f} forward passes ({one['forward_passes_at_the_floor']:.2f} at the floor). "
        f"Parity {result['relative_error']:.1e}."
    )


def _title(result: Mapping[str, Any]) -> str:
    return (
        f"{result['network']}, {result['side']}², batch {result['batch']}, {result['dtype']}, {result['composite']}, "
        f"{result['backend']}"
    )


def _cells(row: Mapping[str, float]) -> list[str]:
    return [
        f"{row['flops'] / 1e9:.2f}", f"{row['bytes'] / 1e6:.1f}", f"{1000 * row['seconds']:.2f}",
        f"{1000 * row['roofline_seconds']:.2f}", f"{row['roofline_seconds'] / row['seconds']:.0%}",
    ]  # fmt: skip


def show_ceilings(console: Console, found: Ceilings) -> None:
    """One line for each."""
    console.print(f"copy: {found.bandwidth / 1e9:.1f} GB/s (read and written)")
    for dtype in found.products:
        console.print(
            f"{dtype}: matrix products {found.products[dtype] / 1e9:,.0f} GFLOP/s, 3x3 convolutions "
            f"{found.convolutions[dtype] / 1e9:,.0f} GFLOP/s"
        )


def main(
    name: Annotated[str, typer.Option("--network", help="of torchvision, or cifar")] = "resnet50",
    batch: int = 8, side: int = 224,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES))] = "float32",
    composite: str = COMPOSITE,
    backend: Annotated[str, typer.Option(help="auto, torch or triton")] = "auto",
    seconds: Annotated[float, typer.Option(help="for the repeats")] = 20.0,
    only_ceilings: Annotated[bool, typer.Option("--ceilings", help="measure the machine alone, write nothing")] = False,
) -> None:  # fmt: skip
    """Measure the ceilings and a network's units, print them and write the results."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if name != "cifar" and name not in torchvision.models.list_models():
        raise typer.BadParameter(f"unknown network {name!r}; expected cifar or a name of torchvision's")
    console, device = Console(), records.torch_device()
    found = ceilings(device)
    show_ceilings(console, found)
    if only_ceilings:
        return
    result = measure(name, batch, side, dtype, device, found, backend, composite, seconds)
    show(console, result)
    stem = name if composite == COMPOSITE else f"{name}-{composite}"
    console.print(str(records.save(f"limits-{stem}-{records.device_name()}-{dtype}", records.stamp() | result)))


application = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
application.command()(main)

if __name__ == "__main__":
    application()
