"""How each launch is built: its tensors, the launch itself, and the same work in plain torch on the same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eager import (
    Maker,
    convolve,
    gated,
    kept,
    merged,
    moved,
    settled,
    transposed,
    understood,
)
from lrp_fast.heatmap import from_heat_levels, heat_levels
from lrp_fast.kernels import gate, heatmap, merge, pointwise_conv, pool, spatial_conv
from lrp_fast.kernels.common import Arrival, Branch, Denominators, Divisor, End
from lrp_fast.kernels.pointwise_conv import Precision
from predict import distinct

POSITIVE = Denominators("stacked", 1e-5, "plain")  # otsuki2024
Z_PLUS = Denominators("stacked", 1e-6)
EPSILON = Denominators("own", 1e-6)
DIVIDED = Denominators("own")  # of a merge that multiplies its denominator backward
STEM = Denominators("own", 1e-5, "plain")  # otsuki2024's sees ones instead of pixels
ALPHA_BETA = Denominators("signs", 1e-6)
GAMMA = Denominators("gamma", 1e-6, gamma=0.25)
APART = Denominators("apart", 1e-6)  # αβ of pixels, behind a library's convolution
GUARD = Denominators("stacked", stabilizer="guard")
THREE = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}


@dataclass(frozen=True)
class Prepared:
    """A case on a device. ``bytes``: each tensor moved once; ``flops``: of the matrix products, multiply-adds times two."""

    run: Callable[[], Sequence[Tensor]]
    eager: Callable[[], Sequence[Tensor]]
    bytes: int
    flops: int = 0


Build = Callable[[torch.device, torch.dtype, int, Precision], Prepared]


# Forward cases --------------------------------------------------------------------------------------------------------


def build_gate(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    size: int, channels: int, rule: Denominators = POSITIVE, group_width: int = 0, fixed: bool = False,
) -> Prepared:  # fmt: skip
    """gate.gate behind a library convolution; ``fixed``: its denominators do not depend on the image, or a part of them."""
    make = Maker(device, dtype)
    stacked = make.stacked(rule, batch, size, size, channels)
    bias = None if rule.stabilizer == "guard" else make.bias(rule, channels)
    limit = make.limit(rule, batch)
    same = make.positive(size, size, channels).float() if fixed else None

    def eager() -> list[Tensor]:
        beside = stacked
        if group_width:
            beside = stacked.unflatten(-1, (-1, 2, group_width)).transpose(-3, -2).flatten(-3)
        return gated(beside, bias, rule, limit, same)

    run = partial(gate.gate, stacked, bias, rule, relu=True, over_value=True, limit=limit, fixed=same)
    written = batch * size * size * channels * (1 + rule.groups) * dtype.itemsize
    return Prepared(partial(run, group_width=group_width), eager, moved(stacked, bias, limit, same) + written)


def build_image_maximum(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int, channels: int
) -> Prepared:
    """gate.image_maximum, for a zero-guard."""
    make = Maker(device, dtype)
    stacked, bias = make.stacked(GUARD, batch, size, size, channels), make.bias(GUARD, channels)

    def eager() -> list[Tensor]:
        _, (z,) = understood(stacked, bias, GUARD)
        return [z.flatten(1).amax(1)]

    half = moved(stacked, bias) // 2  # the second stack is all it reads
    return Prepared(lambda: [gate.image_maximum(stacked, bias, GUARD)], eager, half + 4 * batch)


@dataclass(frozen=True)
class Convolution:
    """A convolution of size × size inputs: ``taps`` 1 is pointwise_conv's, and without padding; else spatial_conv's."""

    size: int
    inputs: int
    outputs: int
    stride: int = 1
    taps: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Height and width of the result."""
        return (self.size - 1) // self.stride + 1

    @property
    def geometry(self) -> dict[str, Any]:
        """For :func:`convolve`."""
        return {"stride": (self.stride,) * 2, "padding": (self.taps // 2,) * 2}

    def arguments(self) -> dict[str, Any]:
        """For the launchers of a forward pass."""
        return {"stride": self.stride} if self.taps == 1 else {**self.geometry, "groups": self.groups}

    @property
    def inner(self) -> tuple[int, ...]:
        """Of a weight, beside the output channels."""
        return (self.inputs,) if self.taps == 1 else (self.taps, self.taps, self.inputs // self.groups)

    def flops(self, batch: int, stacks: int) -> int:
        """Of ``stacks`` weights stacked."""
        return 2 * batch * self.out**2 * stacks * self.outputs * math.prod(self.inner)

    def read(self, x: Tensor) -> int:
        """Bytes of x that are read: at stride 2 a 1×1 convolution needs a quarter."""
        return moved(x) if self.taps > 1 else moved(x[:, :: self.stride, :: self.stride])

    def raw(self, x: Tensor, weight: Tensor, stacks: int) -> Tensor:
        """The library's convolution, the stacks of groups one after another."""
        weight = weight[:, None, None] if self.taps == 1 else weight
        parts = weight.chunk(stacks if self.groups > 1 else 1)
        found = [convolve(x, part, **self.geometry, groups=self.groups) for part in parts]
        return torch.cat(found, -1) if len(found) > 1 else found[0]


def build_gated(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    shape: Convolution, rule: Denominators = POSITIVE,
) -> Prepared:  # fmt: skip
    """pointwise_conv.gated or spatial_conv.gated."""
    make = Maker(device, dtype)
    x = make.positive(batch, shape.size, shape.size, shape.inputs)
    weight, bias = make.weights(rule, shape.outputs, *shape.inner)
    limit = make.limit(rule, batch)
    limited = {} if limit is None else {"limit": limit}
    module: Any = pointwise_conv if shape.taps == 1 else spatial_conv
    run = partial(
        module.gated,
        x,
        weight,
        bias,
        rule,
        relu=True,
        over_value=True,
        precision=precision,
        **shape.arguments(),
        **limited,
    )
    written = batch * shape.out**2 * shape.outputs * (1 + rule.groups) * dtype.itemsize
    return Prepared(
        run, lambda: gated(shape.raw(x, weight, rule.stacks), bias, rule, limit),
        shape.read(x) + moved(weight, bias, limit) + written, shape.flops(batch, rule.stacks),
    )  # fmt: skip


def build_product_maximum(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, shape: Convolution
) -> Prepared:
    """pointwise_conv.image_maximum, for a zero-guard: of the second of two stacked weights."""
    make = Maker(device, dtype)
    x = make.positive(batch, shape.size, shape.size, shape.inputs)
    weight, bias = make.weights(GUARD, shape.outputs, *shape.inner)
    half, rest = weight[shape.outputs :], bias[shape.outputs :]

    def eager() -> list[Tensor]:
        return [(shape.raw(x, half, 1).float() + rest).flatten(1).amax(1)]

    run = partial(pointwise_conv.image_maximum, x, weight, bias, GUARD, stride=shape.stride, precision=precision)
    return Prepared(
        lambda: [run()], eager, shape.read(x) + moved(half, rest) + 4 * batch, shape.flops(batch, 1)
    )  # fmt: skip


def other_branch(
    make: Maker, batch: int, size: int, channels: int, rule: Denominators, linear: bool, rising: bool
) -> Branch:
    """A branch of a merge: a value, or the raw output of its last layer."""
    if not linear:
        return Branch(make.positive(batch, size, size, channels))
    tensor, bias = make.stacked(rule, batch, size, size, channels), make.bias(rule, channels)
    if rising:
        tensor[..., :channels].abs_()
        if rule.kind == "signs":
            tensor[..., channels:] += tensor[..., :channels]
    return Branch(tensor, True, bias, make.limit(rule, batch))


def build_merged(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    shape: Convolution, rule: Denominators = POSITIVE, split: str = "ratio", linear: bool = False,
    beside: Convolution | None = None, divided: bool = False,
) -> Prepared:  # fmt: skip
    """pointwise_conv.merged or spatial_conv.merged; with ``linear`` the other branch is one too, and the residual one.

    ``beside``: the 1×1 convolution the other branch ends in, which the kernel multiplies too. ``divided``: gates are not kept.
    """
    make, rising = Maker(device, dtype), split == "signed"
    x = make.positive(batch, shape.size, shape.size, shape.inputs)
    weight, bias = make.weights(rule, shape.outputs, *shape.inner, rising=rising)
    if beside is None:
        other = other_branch(make, batch, shape.out, shape.outputs, rule, linear, rising)
    else:
        other_weight, other_bias = make.weights(rule, beside.outputs, *beside.inner, rising=rising)
        y, linear = make.positive(batch, beside.size, beside.size, beside.inputs), True
        other = Branch(y, True, other_bias, make.limit(rule, batch), other_weight, beside.stride)
    limit = make.limit(rule, batch)
    options: dict[str, Any] = {} if limit is None else {"limit": limit}
    options |= {"keeps_gates": False} if divided else {}
    module: Any = pointwise_conv if shape.taps == 1 else spatial_conv
    run = partial(
        module.merged, x, weight, bias, other, rule, split, relu=True, is_residual=not linear, precision=precision,
        keeps_weight=kept(rule, split), **shape.arguments(), **options,
    )  # fmt: skip

    def eager() -> list[Tensor]:
        met = other
        if beside is not None and other.weight is not None:
            met = Branch(beside.raw(other.tensor, other.weight, rule.stacks), True, other.bias, other.limit)
        return merged(shape.raw(x, weight, rule.stacks), bias, met, rule, split, not linear, limit, divided)

    return Prepared(
        lambda: [result for result in run() if result is not None],
        eager,
        shape.read(x) + moved(weight, bias, limit, other.weight, other.bias, other.limit)
        + (moved(other.tensor) if beside is None else beside.read(other.tensor))
        + batch * shape.out**2 * shape.outputs * (1 if divided else written_by_merge(rule, split, linear)) * dtype.itemsize,
        shape.flops(batch, rule.stacks) + (0 if beside is None else beside.flops(batch, rule.stacks)),
    )  # fmt: skip


def written_by_merge(rule: Denominators, split: str, linear: bool) -> int:
    """Tensors of the merge's size that are written: what is merged, gates, and the other branch's gates or weight."""
    return 1 + rule.groups + (rule.groups if linear else kept(rule, split))


def build_merge(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    size: int, channels: int, rule: Denominators = POSITIVE, split: str = "ratio", linear: bool = False,
) -> Prepared:  # fmt: skip
    """merge.merge behind library convolutions."""
    make, rising = Maker(device, dtype), split == "signed"
    branch = other_branch(make, batch, size, channels, rule, True, rising)
    other = other_branch(make, batch, size, channels, rule, linear, rising)
    run = partial(
        merge.merge, branch, other, rule, split, relu=True, is_residual=True, keeps_weight=kept(rule, split)
    )  # fmt: skip
    return Prepared(
        lambda: [result for result in run() if result is not None],
        lambda: merged(branch.tensor, branch.bias, other, rule, split, True, branch.limit),
        moved(branch.tensor, branch.bias, branch.limit, other.tensor, other.bias, other.limit)
        + batch * size * size * channels * written_by_merge(rule, split, linear) * dtype.itemsize,
    )  # fmt: skip


# Backward cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arriving:
    """Which parts an :class:`Arrival` has, and the groups of each end's gate, 0 for none.

    ``guard``: the first is guarded. ``split``: the last is a plain branch under it, whose weight is found again. ``divisor``:
    the first leaves its rest, divided by a product of so many channels.
    """

    ends: tuple[int, ...] = (1,)
    value: bool = False
    previous_stride: int = 0
    dense: bool = False
    even: bool = False
    guard: bool = False
    split: str = ""
    divisor: int = 0

    def arrival(self, make: Maker, batch: int, size: int, channels: int) -> Arrival:
        """For relevance of N × size × size × channels."""
        plane = (batch, size, size)
        ends = tuple(
            End(make.positive(*plane, groups * channels), groups) if groups else End(scale=0.5) for groups in self.ends
        )
        if self.guard:
            ends = (End(make.normal(*plane, channels), part="guarded"), *ends[1:])
        if self.split:
            ends = (*ends[:-1], replace(ends[-1], part=self.split))
        if self.divisor:
            weight, bias = make.positive(channels, self.divisor) / math.sqrt(self.divisor), make.positive(channels)
            divisor = Divisor(make.positive(*plane, self.divisor), weight, bias, POSITIVE.epsilon, "plain")
            rest: Any = f"{self.split} rest" if self.split else "whole"
            ends = (End(ends[-1].gate if self.split else None, scale=0.5, part=rest, divisor=divisor), *ends[1:])
        step = self.previous_stride
        small = 0 if step == 0 else (size - 1) // step + 1
        return Arrival(
            ends,
            make.positive(*plane, channels) if self.value else None,
            make.positive(batch, small, small, channels) if step else None,
            max(step, 1),
            make.positive(*plane, channels) if self.dense else None,
            torch.rand(plane, device=make.device) if self.even else None,
        )


def moved_by_arrival(arrival: Arrival, elements: int, dtype: torch.dtype) -> int:
    """Bytes read and written by settling ``elements`` of relevance."""
    gates, divisor = [end.gate for end in arrival.ends], arrival.divisor
    product = () if divisor is None else (divisor.x, divisor.weight, divisor.bias)
    # Ends under a split name one branch.
    read = moved(*distinct([arrival.value, arrival.previous, arrival.dense, arrival.even, *gates, *product]))
    dead = sum(4 * gate.numel() // gate.shape[-1] * -(-gate.shape[-1] // 8)
               for end, gate in zip(arrival.ends, gates, strict=True) if gate is not None and end.part == "guarded")  # fmt: skip
    return read + dead + elements * sum(end.groups for end in arrival.ends) * dtype.itemsize


def build_arrive(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    size: int, channels: int, arriving: Arriving, message: bool = True,
) -> Prepared:  # fmt: skip
    """merge.arrive behind a library convolution; without a ``message`` dense relevance alone arrives."""
    make = Maker(device, dtype)
    acc = make.positive(batch, size, size, channels) if message else None
    arrival = arriving.arrival(make, batch, size, channels)
    like = arrival.dense if acc is None else acc
    assert like is not None
    return Prepared(
        lambda: merge.arrive(acc, arrival),
        lambda: settled(acc, arrival, like),
        moved(acc) + moved_by_arrival(arrival, like.numel(), dtype),
    )


def build_pointwise_backward(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    size: int, inner: int, channels: int, arriving: Arriving, second: int = 0,
) -> Prepared:  # fmt: skip
    """pointwise_conv.backward from K = ``inner`` channels, and from ``second`` channels of another message."""
    make = Maker(device, dtype)
    messages = [
        (make.positive(batch, size, size, k), make.positive(channels, k) / math.sqrt(k)) for k in (inner, second) if k
    ]
    (s, weight), *rest = messages
    arrival = arriving.arrival(make, batch, size, channels)

    def eager() -> list[Tensor]:
        found = [transposed(one, by.t()[:, None, None], size) for one, by in messages]
        return settled(sum(found[1:], found[0]), arrival, s)

    rows = batch * size * size
    return Prepared(
        partial(pointwise_conv.backward, s, weight, arrival, second=rest[0] if rest else None, precision=precision),
        eager,
        moved(*(x for message in messages for x in message)) + moved_by_arrival(arrival, rows * channels, dtype),
        2 * rows * channels * (inner + second + arriving.divisor),
    )  # fmt: skip


def build_spatial_backward(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    precision: Precision,
    *,
    shape: Convolution,
    arriving: Arriving,
) -> Prepared:
    """spatial_conv.backward, from the outputs of ``shape`` to its inputs."""
    make = Maker(device, dtype)
    s = make.positive(batch, shape.out, shape.out, shape.outputs)
    weight = make.positive(shape.outputs, *shape.inner) / math.sqrt(shape.outputs * shape.taps**2)
    arrival = arriving.arrival(make, batch, shape.size, shape.inputs)
    packed = spatial_conv.pack_backward(weight)
    run = partial(
        spatial_conv.backward, s, packed, arrival, height=shape.size, width=shape.size, precision=precision,
        **shape.arguments(),
    )  # fmt: skip
    return Prepared(
        run,
        lambda: settled(transposed(s, weight, shape.size, **shape.geometry), arrival, s),
        moved(s, weight) + moved_by_arrival(arrival, batch * shape.size**2 * shape.inputs, dtype),
        shape.flops(batch, 1),
    )


def build_stem_heatmap(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int, channels: int
) -> Prepared:
    """spatial_conv.stem_heatmap, 7×7 at stride 2, onto a map of size × size."""
    make, shape = Maker(device, dtype), Convolution(size, 1, channels, 2, 7)
    s = make.positive(batch, shape.out, shape.out, channels)
    weight = (make.positive(7, 7, channels) / 7).float()
    by = weight.permute(2, 0, 1)[..., None].to(dtype)
    run = partial(spatial_conv.stem_heatmap, s, weight, height=size, width=size, precision=precision, **shape.geometry)
    return Prepared(
        lambda: [run()],
        lambda: [transposed(s, by, size, **shape.geometry)[..., 0].float()],
        moved(s, weight) + 4 * batch * size * size,
        shape.flops(batch, 1),
    )


# Pools and heatmaps -----------------------------------------------------------------------------------------------------


def build_max_pool(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int, channels: int, kind: str
) -> Prepared:
    """pool.max_pool_gated, .max_pool_average or .winner_pool, 3×3 at stride 2 with padding 1."""
    x = Maker(device, dtype).positive(batch, size, size, channels)
    out = (size - 1) // 2 + 1
    images = x.permute(0, 3, 1, 2)
    launcher: Any = getattr(pool, kind)
    given: dict[str, Any] = THREE | {"out_size": (out, out)}
    given |= {"epsilon": 1e-5} if kind == "max_pool_gated" else {}

    def eager() -> list[Tensor]:
        if kind == "winner_pool":
            maxima, places = F.max_pool2d(images, 3, 2, 1, return_indices=True)
            beside = window_places(places, size)
        else:
            maxima = F.max_pool2d(images, 3, 2, 1)
            beside = F.avg_pool2d(images.float(), 2, ceil_mode=True)
            beside = (1 / (beside + 1e-5)).to(dtype) if kind == "max_pool_gated" else beside
        return [maxima.permute(0, 2, 3, 1), beside.permute(0, 2, 3, 1)]

    itemsize = {"max_pool_gated": 2 * dtype.itemsize, "max_pool_average": dtype.itemsize + 4}
    written = batch * out * out * channels * itemsize.get(kind, dtype.itemsize + 1)
    return Prepared(partial(launcher, x, **given), eager, moved(x) + written)


def window_places(places: Tensor, size: int) -> Tensor:
    """Where in its 3×3 window each maximum (N × C × Ho × Wo, its place in the plane of size × size) lies, uint8."""
    rows, columns = (torch.arange(n, device=places.device) * 2 - 1 for n in places.shape[2:])
    return ((places // size - rows[:, None]) * 3 + places % size - columns).to(torch.uint8)


def build_winner_backward(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    precision: Precision,
    *,
    size: int,
    channels: int,
    arriving: Arriving,
) -> Prepared:
    """pool.winner_backward, 3×3 at stride 2 with padding 1; eager has the winners' places in the plane (int64)."""
    make = Maker(device, dtype)
    like = make.positive(batch, size, size, channels).permute(0, 3, 1, 2)
    maxima, places = F.max_pool2d(like, 3, 2, 1, return_indices=True)
    winner = window_places(places, size).permute(0, 2, 3, 1).contiguous()
    relevance = maxima.permute(0, 2, 3, 1).contiguous()
    images = relevance.permute(0, 3, 1, 2)
    arrival = arriving.arrival(make, batch, size, channels)

    def eager() -> list[Tensor]:
        acc = torch.ops.aten.max_pool2d_with_indices_backward(
            images, like, [3, 3], [2, 2], [1, 1], [1, 1], False, places
        )
        return settled(acc.permute(0, 2, 3, 1), arrival, relevance)

    return Prepared(
        partial(pool.winner_backward, relevance, winner, arrival, **THREE, height=size, width=size),  # type: ignore[arg-type]
        eager,
        moved(relevance, winner) + moved_by_arrival(arrival, like.numel(), dtype),
    )


def build_block_backward(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *,
    size: int, channels: int, stride: int, arriving: Arriving,
) -> Prepared:  # fmt: skip
    """pool.block_backward: of a max-pool, or with ``stride`` as large as the plane of a global average."""
    make, out = Maker(device, dtype), (size - 1) // stride + 1
    s = make.positive(batch, out, out, channels)
    arrival = arriving.arrival(make, batch, size, channels)
    present = torch.full((size,), stride, device=device)
    present[out * stride - stride :] = size - (out - 1) * stride

    def eager() -> list[Tensor]:
        repeated = s.repeat_interleave(stride, 1, output_size=out * stride)[:, :size]
        repeated = repeated.repeat_interleave(stride, 2, output_size=out * stride)[:, :, :size]
        return settled(repeated / (present[:, None] * present)[..., None], arrival, s)

    return Prepared(
        partial(pool.block_backward, s, arrival, stride=(stride, stride), height=size, width=size),
        eager,
        moved(s) + moved_by_arrival(arrival, batch * size * size * channels, dtype),
    )


def build_spread(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int, channels: int
) -> Prepared:
    """pool.spread over the windows of a 3×3 convolution, and the channel sum it begins with."""
    dead = Maker(device, dtype).positive(batch, size, size, channels)
    window = torch.ones(1, 1, 3, 3, device=device)
    inputs = F.conv2d(torch.ones(1, 1, size, size, device=device), window, padding=1)

    def eager() -> list[Tensor]:
        share = dead.float().sum(-1).unsqueeze(1) / (inputs * channels)
        return [F.conv_transpose2d(share, window, padding=1).squeeze(1)]

    given: dict[str, Any] = THREE | {"stride": (1, 1)}
    run = partial(pool.spread, dead, **given, height=size, width=size, channels=channels)
    return Prepared(lambda: [run()], eager, moved(dead) + 4 * batch * size * size)


def build_channel_sum(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int, channels: int
) -> Prepared:
    """heatmap.channel_sum."""
    relevance = Maker(device, dtype).positive(batch, size, size, channels)
    return Prepared(
        lambda: [heatmap.channel_sum(relevance)],
        lambda: [relevance.sum(-1, dtype=torch.float32)],
        moved(relevance) + 4 * batch * size * size,
    )


def build_quantize(
    device: torch.device, dtype: torch.dtype, batch: int, precision: Precision, *, size: int
) -> Prepared:
    """heatmap.quantize; a map is float32 whatever the network computes in."""
    heat = torch.randn(batch, size, size, device=device)
    return Prepared(lambda: [heatmap.quantize(heat)], lambda: [from_heat_levels(*heat_levels(heat))], 2 * moved(heat))
