"""Measuring which way and which tiles serve each convolution, on the device at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lrp_fast.backends.passes import Passes
from lrp_fast.backends.triton.binding import LIBRARY, Direction, has_wide_groups, task_of
from lrp_fast.backends.triton.choice import Choice, Choices
from lrp_fast.backends.triton.passes import FusedLinear
from lrp_fast.kernels import pointwise_conv, spatial_conv
from lrp_fast.kernels.common import Arrival, End

REPEATS, CALLS = 5, 4
BUSY_CYCLES = 2_000_000
"""About a millisecond."""


def tune(
    passes: Sequence[Passes | None], batch: int, choices: Choices, timed: Callable[..., float] | None = None
) -> str:
    """Measure every convolution that has no measured choice yet, keep the best, and say what was chosen."""
    rows = []
    for layer in passes:
        if not isinstance(layer, FusedLinear) or not has_wide_groups(layer.layer, layer.x_shape[0], layer.shape[0]):
            continue
        task = task_of(layer.operation, layer.denominators, (batch, *layer.x_shape), layer.shape, layer.precision)
        for direction in ("forward", "backward"):
            one = task(direction)
            if one.key not in choices.measured:
                best = _best(layer, direction, batch, timed or milliseconds)
                choices.keep(one, best)
            found = choices.of(one)
            rows.append(f"{one.key}: {found.way} {'' if found.blocks is None else found.blocks}")
    return "\n".join(dict.fromkeys(rows))


def _best(layer: FusedLinear, direction: Direction, batch: int, timed: Callable[..., float]) -> Choice:
    times: dict[Choice, float] = {}
    for choice in _candidates(layer, direction, batch):
        onward, back = (choice, layer.back) if direction == "forward" else (layer.onward, choice)
        variant = FusedLinear(
            layer.operation, layer.denominators, layer.relu, layer.over_value, layer.x_shape, layer.shape,
            layer.precision, onward, back,
        )  # fmt: skip
        times[choice] = timed(_work(variant, direction, batch))
    return min(times, key=lambda choice: times[choice])


def _candidates(layer: FusedLinear, direction: Direction, batch: int) -> Iterator[Choice]:
    yield LIBRARY
    (inputs, *_), (outputs, height, width) = layer.x_shape, layer.shape
    dtype, groups = layer.operation.dtype, layer.layer.groups
    forward = direction == "forward"
    if layer.guard is not None and forward:
        return
    stacks = layer.denominators.stacks if forward else 1
    columns, inner = (outputs, inputs) if forward else (inputs, outputs * layer.denominators.groups)
    precision: Any = layer.precision
    if layer.pointwise:
        capability = _capability(layer.weights.backward.device)
        rows = batch * height * width
        blocks = pointwise_conv.candidates(rows, columns, inner, stacks, dtype, precision, capability)
    else:
        tiles = spatial_conv.tiles_of(layer.denominators) if forward else 1
        blocks = spatial_conv.candidates(columns // groups, inner // groups, tiles, dtype, precision)
    yield from (Choice("fused", one) for one in blocks)


def _capability(device: torch.device) -> int:
    """Such as 90; of a CPU, whose kernels are interpreted, that of the oldest GPU served."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _work(layer: FusedLinear, direction: Direction, batch: int) -> Callable[[], object]:
    """One pass of a layer on random tensors, with a plain gate at the other end."""
    device, dtype = layer.weights.backward.device, layer.operation.dtype

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, dtype=dtype)

    if direction == "forward":
        x = random(batch, *layer.x_shape[1:], layer.x_shape[0]).permute(0, 3, 1, 2)
        return lambda: layer.forward([x])
    height, width = layer.shape[1:]
    s = random(batch, height, width, layer.shape[0] * layer.denominators.groups)
    if layer.pointwise and not layer.adds:
        return lambda: layer.send([s], None, False)
    gate = random(batch, *layer.x_shape[1:], layer.x_shape[0])
    return lambda: layer.send_settled([s], Arrival((End(gate),)))


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of a call on the GPU, after a first one that compiles; infinite where memory runs out, the device's
    or that of a multiprocessor."""
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
    except (torch.cuda.OutOfMemoryError, OutOfResources):
        return math.inf
