"""Measuring which way and which tiles serve each convolution, on the device at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from lrp_fast.backends.passes import Arrived, Passes
from lrp_fast.backends.triton.binding import (
    LIBRARY,
    has_wide_groups,
    merge_task,
    receiver_of,
    rounds_parts,
    settled_with,
    task_of,
)
from lrp_fast.backends.triton.choice import Choice, Choices, Task, Way
from lrp_fast.backends.triton.linear import FusedLinear, fuses
from lrp_fast.backends.triton.merges import FusedMerge
from lrp_fast.backends.triton.passes import TritonPasses
from lrp_fast.kernels import pointwise_conv, spatial_conv
from lrp_fast.kernels.common import Arrival, End
from lrp_fast.kernels.pointwise_conv import Blocks
from lrp_fast.layers import Shape
from lrp_fast.memory import is_out_of_memory, out_of_memory_suppressed
from lrp_fast.plan import Unit, readers_of

REPEATS, CALLS = 5, 4
BUSY_CYCLES = 2_000_000
"""About a millisecond."""


def tune(
    units: Sequence[Unit], passes: Sequence[Passes | None], batch: int, choices: Choices,
    timed: Callable[..., float] | None = None,
) -> str:  # fmt: skip
    """Measure every convolution and merge that has no measured choice yet, keep the best, and say what was chosen."""
    rows = []
    for task, candidates in _tasks(units, passes, batch, choices):
        if task.key not in choices.measured:
            times = _times(candidates, timed or milliseconds)
            if times:
                choices.keep(task, min(times, key=lambda choice: times[choice]))
        found = choices.of(task)
        rows.append(f"{task.key}: {found.way} {'' if found.blocks is None else found.blocks}")
    return "\n".join(dict.fromkeys(rows))


Candidates = Iterator[tuple[Choice, Callable[[], object]]]
"""Each choice worth trying, and one pass under it."""


def _times(candidates: Candidates, timed: Callable[..., float]) -> dict[Choice, float]:
    """What each choice takes that runs; none where memory runs out before there is anything to run."""
    times = {}
    with out_of_memory_suppressed():
        for choice, work in candidates:
            times[choice] = timed(work)
    return {choice: time for choice, time in times.items() if time < math.inf}


def _tasks(
    units: Sequence[Unit], passes: Sequence[Passes | None], batch: int, choices: Choices
) -> Iterator[tuple[Task, Candidates]]:
    readers = readers_of(units)
    for place, one in enumerate(passes):
        if isinstance(one, FusedMerge) and _wide(one.last):
            for merge in _ways(one):
                yield _merge_task(merge, batch), _of_merge(merge, batch)
        elif isinstance(one, FusedLinear) and _wide(one):
            task = task_of(one.operation, one.denominators, (batch, *one.x_shape), one.shape, one.precision)
            if one.onward is not None:
                yield task("forward", one.epilogue), _of_forward(one, batch)
            (source,) = units[place].inputs
            receiver = receiver_of(place, passes[source], readers[source])
            more, keep, ways = len(readers[source]) > 1, units[source].keep, _ways(receiver)
            settled = [settled_with(None if way is None else way.epilogue, readers[source]) for way in ways]
            for way, epilogue in zip(ways, settled, strict=True):
                yield (
                    task("backward", epilogue),
                    _of_backward(one, batch, partial(_arrival, way, more, keep, one, batch)),
                )
            if len(ways) > 1:
                merges = [way.chosen(choices.of(_merge_task(way, batch))) for way in ways]
                senders = [_variant(one, one.onward, choices.of(task("backward", epilogue))) for epilogue in settled]
                yield task("gates", settled[0]), _of_gates(merges, senders, more, keep, batch)


def _ways(passes: Any) -> list[Any]:
    """A merge that divides, and as it is with its gates kept; other passes alone."""
    return [passes, passes.kept()] if isinstance(passes, FusedMerge) and passes.divides else [passes]


def _merge_task(merge: FusedMerge, batch: int) -> Task:
    linears = [branch for branch in merge.branches if branch is not None]
    return merge_task(linears, batch, merge.operation.split.name, merge.divides)


def _wide(layer: FusedLinear) -> bool:
    return has_wide_groups(layer.layer, layer.x_shape[0], layer.shape[0])


def _choices(
    layer: FusedLinear, blocks: Iterable[Blocks], forward: bool = True, library: bool = True
) -> Iterator[Choice]:
    """The library's convolution, where it would do, and the kernel with each of its blocks."""
    if library and not (forward and rounds_parts(layer.operation, layer.denominators)):
        yield LIBRARY
    if fuses(layer) or not forward:
        yield from (Choice("fused", one) for one in blocks)


def _of_forward(layer: FusedLinear, batch: int) -> Candidates:
    (inputs, *_), (outputs, height, width) = layer.x_shape, layer.shape
    dtype, groups, denominators = layer.dtype, layer.layer.groups, layer.denominators
    precision: Any = layer.precision
    if layer.pointwise:
        rows, capability = batch * height * width, _capability(layer.weights.backward.device)
        blocks = pointwise_conv.candidates(rows, outputs, inputs, denominators.stacks, dtype, precision, capability)
    else:
        tiles = spatial_conv.tiles_of(denominators)
        blocks = spatial_conv.candidates(outputs // groups, inputs // groups, tiles, dtype, precision)
    sources = _inputs(layer, batch, layer)
    for choice in _choices(layer, blocks):
        yield choice, partial(_variant(layer, choice, layer.back).forward, sources)


def _arrival(receiver: TritonPasses | None, more: bool, keep: bool, layer: FusedLinear, batch: int) -> Arrival | None:
    """What a message of ``layer`` is settled with: its receiver's gates, beside what else has arrived there; None if with nothing.

    ``more``: others send there too. ``keep``: the receiver's output is kept.
    """
    if receiver is None:
        return None
    return _settled_at(receiver, _inputs(receiver, batch, layer), _before(receiver, more, layer, batch), keep)


def _before(receiver: TritonPasses, more: bool, layer: FusedLinear, batch: int) -> Arrived:
    """What others have sent there."""
    if not more:
        return Arrived()
    other = _image(layer, batch, receiver.shape)
    return Arrived(acc=other) if receiver.over_value else Arrived(dense=other)


def _settled_at(receiver: TritonPasses, sources: list[Tensor], before: Arrived, keep: bool) -> Arrival:
    value, saved = receiver.forward(sources)
    return receiver.arrival(before, value if keep else None, receiver.ends(saved))


def _of_backward(layer: FusedLinear, batch: int, arrival_of: Callable[[], Arrival | None]) -> Candidates:
    (inputs, *_), (outputs, height, width) = layer.x_shape, layer.shape
    dtype, groups, inner = layer.dtype, layer.layer.groups, outputs * layer.denominators.groups
    precision: Any = layer.precision
    s, arrival = _random(layer, batch, height, width, inner), arrival_of() or Arrival((End(),))
    tiles = 1 if arrival.divisor is None else 3  # with a divisor, no library
    if layer.pointwise:
        rows, capability = batch * height * width, _capability(layer.weights.backward.device)
        blocks = pointwise_conv.candidates(rows, inputs, inner, tiles, dtype, precision, capability)
    else:
        blocks = spatial_conv.candidates(inputs // groups, inner // groups, len(arrival.ends), dtype, precision)
        blocks = blocks if spatial_conv.settles(arrival, groups, inputs) else ()
    for choice in _choices(layer, blocks, forward=False, library=tiles == 1):
        variant = _variant(layer, layer.onward, choice)
        if layer.pointwise and layer.layer.stride[0] > 1:  # whose message is settled with another's
            yield choice, partial(variant.send, [s], None, False)
        else:
            yield choice, partial(variant.send_settled, [s], arrival)


def _of_gates(
    merges: Sequence[FusedMerge], senders: Sequence[FusedLinear], more: bool, keep: bool, batch: int
) -> Candidates:
    """A merge that divides, and as it is with its gates kept: forward, and backward with what is sent there."""
    layer = senders[0]
    outputs, height, width = layer.shape
    s = _random(layer, batch, height, width, outputs * layer.denominators.groups)
    sources, before = _inputs(merges[0], batch, layer), _before(merges[0], more, layer, batch)
    ways: tuple[Way, ...] = ("divided", "kept")
    for way, merge, sender in zip(ways, merges, senders, strict=True):

        def work(merge: FusedMerge = merge, sender: FusedLinear = sender) -> object:
            return sender.send_settled([s], _settled_at(merge, sources, before, keep))

        yield Choice(way), work


def _of_merge(merge: FusedMerge, batch: int) -> Candidates:
    last, beside = merge.last, merge.beside
    outputs, height, width = merge.shape
    (inputs, *_), groups, denominators = last.x_shape, last.layer.groups, merge.denominators
    precision: Any = last.precision
    if last.pointwise:
        held = pointwise_conv.held(denominators, beside is not None, beside is not None and beside.pointwise)
        rows, capability = batch * height * width, _capability(last.weights.backward.device)
        blocks = pointwise_conv.candidates(rows, outputs, inputs, held, last.dtype, precision, capability)
    else:
        tiles = spatial_conv.tiles_of_merge(denominators, beside is not None)
        blocks = spatial_conv.candidates(outputs // groups, inputs // groups, tiles, last.dtype, precision)
    sources = _inputs(merge, batch, last)
    for choice in _choices(last, blocks):
        yield choice, partial(merge.chosen(choice).forward, sources)


def _variant(layer: FusedLinear, onward: Choice | None, back: Choice) -> FusedLinear:
    return FusedLinear(
        layer.operation, layer.denominators, layer.relu, layer.over_value, layer.x_shape, layer.shape,
        layer.precision, onward, back,
    )  # fmt: skip


def _random(layer: FusedLinear, *shape: int) -> Tensor:
    return torch.rand(shape, device=layer.weights.backward.device, dtype=layer.dtype)


def _inputs(passes: TritonPasses, batch: int, layer: FusedLinear) -> list[Tensor]:
    """What passes take, where ``layer`` is."""
    return [_image(layer, batch, shape) for shape in passes.reads]


def _image(layer: FusedLinear, batch: int, shape: Shape) -> Tensor:
    channels, height, width = shape
    return _random(layer, batch, height, width, channels).permute(0, 3, 1, 2)


def _capability(device: torch.device) -> int:
    """Such as 90; of a CPU, whose kernels are interpreted, that of the oldest GPU served."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of a call on the GPU, after a first one that compiles; infinite where memory runs out, the device's
    or that of a multiprocessor, or the assembler gives up."""
    try:
        work()
        times = []
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)  # while the GPU is busy Python gets ahead, so that its own time is not in it
            start.record()
            for _ in range(CALLS):
                work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / CALLS)
        return statistics.median(times)
    except Exception as error:
        if not (isinstance(error, (OutOfResources, PTXASError)) or is_out_of_memory(error)):
            raise
        return math.inf
