"""What the kernels are compiled, checked and timed on: every launch of an explanation, and what the others are for.

A case builds, on any device (``meta`` too), its tensors, the launch (``run``) and the same work in plain torch on the
same tensors (``eager``): library convolutions in the storage dtype, everything else in float32, as the torch backend
does it. Random data without poles: inputs, messages and gates are not negative. ``precision`` goes to ``run``; what
``eager`` computes float32 convolutions in is the caller's to set (:func:`lrp_fast.scopes.float32_precision`).

In float32 both agree within 1e-5. In bfloat16 ``eager`` rounds a convolution before its pass and is itself off by 5e-3,
and by 4e-2 where αβ adds two rounded stacks up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.heatmap import from_heat_levels, heat_levels
from lrp_fast.kernels import gate, heatmap, merge, pointwise_conv, pool, spatial_conv
from lrp_fast.kernels.common import CONSTANT_SPLITS, Arrival, Branch, Denominators, Divisor, End
from lrp_fast.kernels.pointwise_conv import Precision
from predict import distinct

Pair = tuple[int, int]

POSITIVE = Denominators("stacked", 1e-5, "plain")  # otsuki2024
Z_PLUS = Denominators("stacked", 1e-6)
EPSILON = Denominators("own", 1e-6)
DIVIDED = Denominators("own")  # of a merge that multiplies its denominator backward
STEM = Denominators("own", 1e-5, "plain")  # otsuki2024's sees ones instead of pixels
ALPHA_BETA = Denominators("signs", 1e-6)
GAMMA = Denominators("gamma", 1e-6, gamma=0.25)
APART = Denominators("apart", 1e-6)  # αβ of pixels, behind a library's convolution
GUARD = Denominators("stacked", stabilizer="guard")
FAINT = 1e-4
"""How small a zero-guard's denominators are in every other channel."""
THREE = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}


@dataclass(frozen=True)
class Prepared:
    """A case on a device. ``bytes``: each tensor moved once; ``flops``: of the matrix products, multiply-adds times two."""

    run: Callable[[], Sequence[Tensor]]
    eager: Callable[[], Sequence[Tensor]]
    bytes: int
    flops: int = 0


Build = Callable[[torch.device, torch.dtype, int, Precision], Prepared]


@dataclass(frozen=True)
class KernelCase:
    """A launch by name, its kernel (``file.launcher``), and how to build it: (device, dtype, batch, precision).

    ``count``: how often one explanation of a ResNet-50 under otsuki2024 launches it by default; 0 for what is an
    alternative there (a k×k kernel in place of library convolution and pass) or serves another composite or network.
    """

    name: str
    kernel: str
    count: int
    build: Build


# Tensors --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maker:
    """Random tensors of one device and dtype."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        """Of both signs."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """As activations after a ReLU, messages and gates of positive products are."""
        return self.normal(*shape).abs_()

    def weights(
        self, denominators: Denominators, channels: int, *inner: int, rising: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Stacked weight (S · C, \\*inner) and bias (S · C); ``rising``: the layer's own output is positive.

        Where gates jump at an output of zero (ε, γ), it is far from that: above in every other channel, else below. So are
        a zero-guard's denominators from its limit.
        """
        plus = self.positive(channels, *inner) / math.sqrt(math.prod(inner))
        minus = -self.positive(channels, *inner) / math.sqrt(math.prod(inner))
        if rising or denominators.kind in ("own", "gamma"):
            own, bias = plus + minus / 8, self.positive(channels)
            if not rising:
                own[1::2] *= -1
                bias[1::2] *= -1
            plus, minus = own.clamp(min=0), own.clamp(max=0)
        elif denominators.stabilizer == "guard":
            plus[::2] *= FAINT
            bias = self.normal(channels) / 8
        else:
            kept = torch.rand(plus.shape, device=self.device) < 0.5
            plus, minus, bias = plus * kept, minus * ~kept, self.normal(channels) / 8
        if denominators.kind == "own":
            return plus + minus, bias
        if denominators.kind == "stacked":
            return torch.cat([plus + minus, plus]), torch.cat([bias, torch.zeros_like(bias)])
        negative = 0.5 if denominators.kind == "signs" else 0.0
        return torch.cat([plus + minus, plus]), torch.cat([bias, bias.clamp(min=0) + negative])

    def stacked(self, denominators: Denominators, *shape: int) -> Tensor:
        """A raw convolution output (…, S · C), shape (…, C), whose denominators have no pole."""
        if denominators.kind == "own":
            return self.normal(*shape)
        if denominators.kind == "stacked":
            return torch.cat([self.normal(*shape), self.positive(*shape)], -1)
        if denominators.kind == "apart":
            return torch.cat([self.normal(*shape), self.positive(*shape), -self.positive(*shape)], -1)
        own = self.normal(*shape)
        return torch.cat([own, own.clamp(min=0) + self.positive(*shape)], -1)

    def bias(self, denominators: Denominators, channels: int) -> Tensor:
        """A bias (S · C) for :meth:`stacked`, with which its denominators have no pole either."""
        bias = self.positive(denominators.stacks * channels)
        if denominators.kind == "apart":
            bias[-channels:] *= -0.5
        if denominators.kind == "signs":
            bias[channels:] += bias[:channels] + 0.5
        return bias

    def limit(self, denominators: Denominators, batch: int) -> Tensor | None:
        """What counts as zero in each image, under a zero-guard: half of all denominators do."""
        limit = torch.full((batch,), math.sqrt(FAINT), device=self.device)
        return limit if denominators.stabilizer == "guard" else None


def moved(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


# The passes in plain torch ----------------------------------------------------------------------------------------------


def convolve(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), groups: int = 1) -> Tensor:
    """N × H × W × Cin by C × kh × kw × Cin / groups to N × Ho × Wo × C."""
    images, kernel = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    return F.conv2d(images, kernel, None, stride, padding, 1, groups).permute(0, 2, 3, 1)


def transposed(s: Tensor, weight: Tensor, size: int, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """The transpose of :func:`convolve`, onto inputs of size × size."""
    geometry = zip(s.shape[1:3], stride, padding, weight.shape[1:3], strict=True)
    rest = tuple(size - ((m - 1) * step - 2 * p + k) for m, step, p, k in geometry)
    images, kernel = s.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    return torch.convolution(images, kernel, None, stride, padding, (1, 1), True, rest, 1).permute(0, 2, 3, 1)


def understood(stacked: Tensor, bias: Tensor | None, denominators: Denominators) -> tuple[Tensor, list[Tensor]]:
    """The layer's own output and its denominators, float32."""
    raw = stacked.float() if bias is None else stacked.float() + bias.float()
    if denominators.kind == "own":
        return raw, [raw]
    first, second, *third = raw.chunk(denominators.stacks, -1)
    if third:
        return first, [second, *third]
    if denominators.kind == "stacked":
        return first, [second]
    if denominators.kind == "gamma":
        return first, [first + denominators.gamma * second, first + denominators.gamma * (first - second)]
    return first, [second, first - second]


def gates_of(
    own: Tensor, denominators: list[Tensor], numerator: Tensor | float, rule: Denominators, limit: Tensor | None
) -> Tensor:
    """The gates side by side, float32; ``limit`` (N,) for a zero-guard."""
    if rule.stabilizer == "guard":
        assert limit is not None
        (z,) = denominators
        dead = z <= limit[:, None, None, None]
        return torch.where(dead, -1.0, 1 / z.masked_fill(dead, 1.0)) * numerator
    gates = []
    for z in denominators:
        epsilon = torch.where(z < 0, -rule.epsilon, rule.epsilon) if rule.stabilizer == "signed" else rule.epsilon
        gates.append(numerator / (z + epsilon))
    if rule.kind == "gamma":
        gates = [torch.where(own > 0, gates[0], 0.0), torch.where(own < 0, gates[1], 0.0)]
    return torch.cat(gates, -1) if len(gates) > 1 else gates[0]


def gated(
    stacked: Tensor, bias: Tensor | None, rule: Denominators, limit: Tensor | None = None, fixed: Tensor | None = None
) -> list[Tensor]:
    """Value and gates over it, in the dtype of ``stacked``; ``fixed``: what of the denominators is so."""
    own, denominators = understood(stacked, bias, rule)
    if fixed is not None:
        denominators = [fixed] if rule.kind == "own" else [denominators[0] + fixed]
    value = own.relu()
    gates = gates_of(own, denominators, value, rule, limit)
    return [value.to(stacked.dtype), gates.to(stacked.dtype)]


def merged(
    stacked: Tensor, bias: Tensor | None, other: Branch, rule: Denominators, split: str, is_residual: bool,
    limit: Tensor | None = None, divided: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Merged, the gates of the branch ``stacked`` unless they are ``divided``, and the other's gates or weight if kept."""
    own, denominators = understood(stacked, bias, rule)
    value = other.tensor.float()
    beside: list[Tensor] = []
    if other.linear:
        value, beside = understood(other.tensor, other.bias, rule)
    total = own + value
    here, there = weights_of(own, value, total, split) if is_residual else weights_of(value, own, total, split)[::-1]
    results = [total.relu()] if divided else [total.relu(), gates_of(own, denominators, here, rule, limit)]
    if other.linear:
        results.append(gates_of(value, beside, there, rule, other.limit))
    elif kept(rule, split):
        assert isinstance(there, Tensor)
        results.append(there)
    return [result.to(stacked.dtype) for result in results]


def kept(rule: Denominators, split: str) -> bool:
    """Whether the weight of a plain branch is: without a zero-guard, it is found again."""
    return rule.stabilizer == "guard" and split not in CONSTANT_SPLITS


def weights_of(
    residual: Tensor, skip: Tensor, total: Tensor, split: str
) -> tuple[Tensor | float, Tensor | float]:  # fmt: skip
    """What the residual branch and the skip get, whose sum is ``total``."""
    if split in CONSTANT_SPLITS:
        return CONSTANT_SPLITS[split]
    if split == "signed":
        total = total + torch.where(total < 0, -1e-6, 1e-6)
        return residual / total, skip / total
    magnitudes = residual.abs() + 1e-30, skip.abs() + 1e-30
    total = magnitudes[0] + magnitudes[1]
    return magnitudes[0] / total, magnitudes[1] / total


def settled(acc: Tensor | None, arrival: Arrival, like: Tensor) -> list[Tensor]:
    """One tensor for each end of an arrival, in the dtype of ``like``."""
    total = None if acc is None else acc.float()
    if arrival.previous is not None and total is not None:
        total = total.clone() if arrival.previous_stride > 1 else total
        step = arrival.previous_stride
        total[:, ::step, ::step] += arrival.previous
    if arrival.value is not None and total is not None:
        total = total * arrival.value
    if arrival.dense is not None:
        total = arrival.dense.float() if total is None else total + arrival.dense
    assert total is not None
    if arrival.even is not None:
        total = total + arrival.even.unsqueeze(-1)
    results = []
    for end in arrival.ends:
        gate: Tensor | float = end.scale if end.gate is None else end.gate
        if end.gate is not None and end.splits:
            assert arrival.value is not None
            branch, both = end.gate.float(), arrival.value.float()
            split, *rest = end.part.split()
            gate = weights_of(branch, both - branch, both, split)[len(rest)]
        if end.divisor is not None:
            gate = gate * divided(end.divisor)
        if end.gate is not None and end.part == "guarded":
            results.append((total * end.gate.clamp(min=0)).to(like.dtype))
            results.append(
                F.pad(total * (-end.gate).clamp(min=0), (0, -total.shape[-1] % 8)).unflatten(-1, (-1, 8)).sum(-1)
            )
            continue
        results.append((torch.cat([total] * end.groups, -1) * gate).to(like.dtype))
    return results


def divided(divisor: Divisor) -> Tensor:
    """1 / stab(z), float32."""
    z = (divisor.x @ divisor.weight.t()).float()
    z = z if divisor.bias is None else z + divisor.bias.float()
    return gates_of(z, [z], 1.0, Denominators("own", divisor.epsilon, divisor.stabilizer), None)


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


# The cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One of a ResNet-50's four, the ``last`` one? Bottlenecks from ``inputs`` channels at before² to 4 · ``width`` at size²."""

    before: int
    size: int
    inputs: int
    width: int
    blocks: int
    last: bool

    @property
    def outputs(self) -> int:
        """Channels at the merges."""
        return 4 * self.width

    @property
    def stride(self) -> int:
        """Of the first block."""
        return 1 if self.before == self.size else 2


@dataclass
class Collected:
    """Cases under names that say their shapes."""

    cases: list[KernelCase] = field(default_factory=list)

    def add(self, kernel: str, count: int, build: Callable[..., Prepared], what: str, **values: Any) -> None:
        """One more; of one name already there the counts add up."""
        name = f"{kernel} {what}"
        for place, case in enumerate(self.cases):
            if case.name == name:
                self.cases[place] = replace(case, count=case.count + count)
                return
        self.cases.append(KernelCase(name, kernel, count, partial(build, **values)))


def stages(side: int, width: int) -> list[Stage]:
    """Of a ResNet-50 whose first stage has ``width`` channels, on images of side × side."""
    size, inputs, found = halved(halved(side)), width, []
    for index, blocks in enumerate((3, 4, 6, 3)):
        out = size if index == 0 else halved(size)
        found.append(Stage(size, out, inputs, width << index, blocks, last=index == 3))
        size, inputs = out, found[-1].outputs
    return found


def halved(size: int) -> int:
    """The output of a 3×3 pool or convolution at stride 2 with padding 1."""
    return (size - 1) // 2 + 1


def projection(stage: Stage) -> tuple[Convolution, Convolution]:
    """The two 1×1 convolutions that meet in a stage's first block: the skip's, and the residual branch's."""
    skip = Convolution(stage.before, stage.inputs, stage.outputs, stage.stride)
    return skip, Convolution(stage.size, stage.width, stage.outputs)


def forward_cases(found: Collected, stage: Stage) -> None:
    """A stage's forward pass."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    for count, at, inputs in ((1, stage.before, stage.inputs), (stage.blocks - 1, size, outputs)):
        shape = Convolution(at, inputs, width)
        found.add("pointwise_conv.gated", count, build_gated, f"{at}² {inputs}→{width}", shape=shape)
    found.add("gate.gate", stage.blocks, build_gate, f"{size}² {width}", size=size, channels=width)
    shape, beside = projection(stage)
    what = f"{stage.before}² {stage.inputs}→{outputs} stride {stage.stride} + {size}² {width}→{outputs}"
    found.add("pointwise_conv.merged", 1, build_merged, what, shape=shape, beside=beside)
    shape = Convolution(size, width, outputs)
    add = partial(found.add, "pointwise_conv.merged", build=build_merged, shape=shape)
    what = f"{size}² {width}→{outputs}"
    add(stage.blocks - 1 - stage.last, what=f"{what}, divided", rule=DIVIDED, divided=True)
    add(int(stage.last), what=what)


def backward_cases(found: Collected, stage: Stage) -> None:
    """A stage's backward pass, as far as its inputs."""
    size, before, width, outputs = stage.size, stage.before, stage.width, stage.outputs
    add = partial(found.add, "pointwise_conv.backward")
    add(
        stage.blocks, build_pointwise_backward, f"{size}² {outputs}→{width}",
        size=size, inner=outputs, channels=width, arriving=Arriving(),
    )  # fmt: skip
    for count, at in ((1, before), (stage.blocks - 1, size)):
        found.add("merge.arrive", count, build_arrive, f"{at}² {width}", size=at, channels=width, arriving=Arriving())
    for count, what, split, divisor in (
        (stage.blocks - 2, "divided merge", "ratio", width),
        (1, "merge of two layers", "", 0),
        (0, "merge", "ratio", 0),
    ):
        arriving = Arriving((1, 1), value=True, dense=True, split=split, divisor=divisor)
        add(
            count, build_pointwise_backward, f"{size}² {width}→{outputs}, {what}",
            size=size, inner=width, channels=outputs, arriving=arriving,
        )  # fmt: skip
    if stage.stride == 1:
        add(
            1, build_pointwise_backward, f"{size}² {width}+{outputs}→{stage.inputs}",
            size=size, inner=width, second=outputs, channels=stage.inputs, arriving=Arriving(value=True),
        )  # fmt: skip
        return
    add(
        1, build_pointwise_backward, f"{size}² {outputs}→{stage.inputs}, projection",
        size=size, inner=outputs, channels=stage.inputs, arriving=Arriving((0,)),
    )  # fmt: skip
    add(
        1, build_pointwise_backward, f"{before}² {width}→{stage.inputs}, divided merge of stride 2",
        size=before, inner=width, channels=stage.inputs,
        arriving=Arriving((1, 1), value=True, previous_stride=stage.stride, split="ratio", divisor=stage.inputs // 4),
    )  # fmt: skip


def end_cases(found: Collected, side: int, first: Stage, last: Stage) -> None:
    """The stem, its pool and the global average."""
    stem, width = halved(side), first.width
    what = f"{stem}² {width}, stem"
    found.add("gate.gate", 1, build_gate, what, size=stem, channels=width, rule=STEM, fixed=True)
    found.add(
        "pool.max_pool_gated", 1, build_max_pool, f"{stem}² {width}", size=stem, channels=width, kind="max_pool_gated"
    )
    found.add(
        "merge.arrive", 1, build_arrive, f"1² {last.outputs}, dense",
        size=1, channels=last.outputs, arriving=Arriving(dense=True), message=False,
    )  # fmt: skip
    found.add(
        "pool.block_backward", 1, build_block_backward, f"{last.size}² {last.outputs}, global average",
        size=last.size, channels=last.outputs, stride=last.size, arriving=Arriving((1, 1), value=True, split="ratio"),
    )  # fmt: skip
    found.add(
        "pool.block_backward", 1, build_block_backward, f"{stem}² {width}, max-pool",
        size=stem, channels=width, stride=2, arriving=Arriving(),
    )  # fmt: skip
    found.add("spatial_conv.stem_heatmap", 1, build_stem_heatmap, f"{side}² {width}", size=side, channels=width)


def alternative_cases(found: Collected, every: Sequence[Stage]) -> None:
    """3×3 convolutions as kernels, where the default is the library's."""
    for stage in every:
        width = stage.width
        first, others = (
            Convolution(stage.before, width, width, stage.stride, 3),
            Convolution(stage.size, width, width, 1, 3),
        )
        for shape in dict.fromkeys((first, others)):
            what = f"{shape.size}² {width}→{width} stride {shape.stride}"
            found.add("spatial_conv.gated", 0, build_gated, what, shape=shape)
            found.add("spatial_conv.backward", 0, build_spatial_backward, what, shape=shape, arriving=Arriving())


def basic_cases(found: Collected, stage: Stage) -> None:
    """Merges of ResNet-18 and 34: behind library convolutions, and in the 3×3 kernel."""
    size, width = stage.size, stage.width
    for split, linear in (("ratio", False), ("ratio", True), ("signed", False), ("symmetric", False)):
        what = f"{size}² {width}, {split}{', projection' if linear else ''}"
        found.add("merge.merge", 0, build_merge, what, size=size, channels=width, split=split, linear=linear)
    shape = Convolution(size, width, width, 1, 3)
    for linear in (False, True):
        what = f"{size}² {width}→{width}{', projection' if linear else ''}"
        found.add("spatial_conv.merged", 0, build_merged, what, shape=shape, linear=linear)
    merging = Arriving((1, 1), value=True, dense=True, split="ratio")
    what = f"{size}² {width}→{width} stride 1, merge"
    found.add("spatial_conv.backward", 0, build_spatial_backward, what, shape=shape, arriving=merging)
    found.add("merge.arrive", 0, build_arrive, f"{size}² {width}, merge", size=size, channels=width, arriving=merging)


def rule_cases(found: Collected, stage: Stage) -> None:
    """The epilogues of the other composites."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    for name, rule in (("ε", EPSILON), ("z⁺", Z_PLUS), ("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add("gate.gate", 0, build_gate, f"{size}² {width}, {name}", size=size, channels=width, rule=rule)
        shape, wide = Convolution(size, outputs, width), Convolution(size, width, outputs)
        found.add("pointwise_conv.gated", 0, build_gated, f"{size}² {outputs}→{width}, {name}", shape=shape, rule=rule)
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, {name}, signed split",
            shape=wide, rule=rule, split="signed",
        )  # fmt: skip
        shape = Convolution(size, width, width, 1, 3)
        found.add("spatial_conv.gated", 0, build_gated, f"{size}² {width}→{width}, {name}", shape=shape, rule=rule)
    skip, beside = projection(stage)
    for name, rule in (("ε", EPSILON), ("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{stage.before}²+{size}²→{outputs}, {name}, projection",
            shape=skip, beside=beside, rule=rule, split="signed",
        )  # fmt: skip
    found.add(
        "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, beside a library's",
        shape=wide, linear=True,
    )  # fmt: skip
    for split in CONSTANT_SPLITS:
        found.add(
            "pointwise_conv.merged",
            0,
            build_merged,
            f"{size}² {width}→{outputs}, {split} split",
            shape=wide,
            split=split,
        )
    for name, rule in (("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, {name}, beside a library's",
            shape=wide, rule=rule, split="signed", linear=True,
        )  # fmt: skip
        found.add(
            "spatial_conv.merged", 0, build_merged, f"{size}² {width}→{width}, {name}, projection",
            shape=Convolution(size, width, width, 1, 3), rule=rule, split="signed", linear=True,
        )  # fmt: skip


def two_gate_cases(found: Collected, stage: Stage) -> None:
    """Backward through αβ and γ, which have two gates."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² 2·{outputs}→{width}, αβ",
        size=size, inner=2 * outputs, channels=width, arriving=Arriving((2,)),
    )  # fmt: skip
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² 2·{width}→{outputs}, αβ, merge",
        size=size, inner=2 * width, channels=outputs, arriving=Arriving((2, 1), value=True, dense=True, split="signed"),
    )  # fmt: skip
    found.add(
        "spatial_conv.backward", 0, build_spatial_backward, f"{size}² 2·{width}→{width}, αβ",
        shape=Convolution(size, width, 2 * width, 1, 3), arriving=Arriving((2,)),
    )  # fmt: skip
    found.add(
        "merge.arrive", 0, build_arrive, f"{size}² {width}, αβ", size=size, channels=width, arriving=Arriving((2,))
    )


def guard_cases(found: Collected, stage: Stage) -> None:
    """The zero-guard of ``conserving``."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    found.add("gate.image_maximum", 0, build_image_maximum, f"{size}² {outputs}", size=size, channels=outputs)
    found.add("gate.gate", 0, build_gate, f"{size}² {width}, guard", size=size, channels=width, rule=GUARD)
    for linear in (False, True):
        what = f"{size}² {outputs}, guard{', projection' if linear else ''}"
        found.add("merge.merge", 0, build_merge, what, size=size, channels=outputs, rule=GUARD, linear=linear)
    wide, (skip, beside) = Convolution(size, width, outputs), projection(stage)
    add = partial(found.add, "pointwise_conv.merged", 0, build_merged)
    add(f"{size}² {width}→{outputs}, guard", shape=wide, rule=GUARD)
    add(f"{stage.before}²+{size}²→{outputs}, guard, projection", shape=skip, beside=beside, rule=GUARD)
    what = f"{size}² {outputs}→{width}, guard"
    found.add("pointwise_conv.gated", 0, build_gated, what, shape=Convolution(size, outputs, width), rule=GUARD)
    for shape in (wide, Convolution(size, outputs, width)):
        what = f"{size}² {shape.inputs}→{shape.outputs}"
        found.add("pointwise_conv.image_maximum", 0, build_product_maximum, what, shape=shape)
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² {width}→{outputs}, guard, merge",
        size=size, inner=width, channels=outputs, arriving=Arriving((1, 1), value=True, dense=True, even=True, guard=True),
    )  # fmt: skip
    arriving = Arriving(value=True, dense=True, even=True, guard=True)
    found.add("merge.arrive", 0, build_arrive, f"{size}² {width}, guard", size=size, channels=width, arriving=arriving)
    found.add("pool.spread", 0, build_spread, f"{size}² {width}", size=size, channels=width)


def rest_cases(found: Collected, side: int, stage: Stage) -> None:
    """Groups, pools of other composites, heatmaps."""
    stem, width, wide = halved(side), stage.width, max(32, 4 * stage.width)
    shape = Convolution(stage.size, wide, wide, 1, 3, wide // 16)
    found.add("spatial_conv.gated", 0, build_gated, f"{stage.size}² {wide}, groups of 16", shape=shape)
    found.add(
        "gate.gate", 0, build_gate, f"{stage.size}² {wide}, groups of 4", size=stage.size, channels=wide, group_width=4
    )
    add = partial(found.add, "gate.gate", 0, build_gate, size=stem, channels=width)
    add(f"{stem}² {width}, αβ of pixels", rule=APART)
    add(f"{stem}² {width}, box of pixels", rule=Z_PLUS, fixed=True)
    for kind in ("max_pool_average", "winner_pool"):
        found.add(f"pool.{kind}", 0, build_max_pool, f"{stem}² {width}", size=stem, channels=width, kind=kind)
    for what, arriving in (("", Arriving()), (", two ends", Arriving((1, 1)))):
        found.add(
            "pool.winner_backward", 0, build_winner_backward, f"{stem}² {width}{what}",
            size=stem, channels=width, arriving=arriving,
        )  # fmt: skip
    found.add("heatmap.channel_sum", 0, build_channel_sum, f"{side}² 3", size=side, channels=3)
    found.add("heatmap.channel_sum", 0, build_channel_sum, f"{stage.size}² {wide}", size=stage.size, channels=wide)
    found.add("heatmap.quantize", 0, build_quantize, f"{side}²", size=side)


def cases_of(side: int, width: int) -> list[KernelCase]:
    """All cases, of a network as wide and images as large as given."""
    found, every = Collected(), stages(side, width)
    for stage in every:
        forward_cases(found, stage)
    for stage in every:
        backward_cases(found, stage)
    end_cases(found, side, every[0], every[-1])
    alternative_cases(found, every)
    basic_cases(found, every[0])
    rule_cases(found, every[1])
    two_gate_cases(found, every[1])
    guard_cases(found, every[1])
    rest_cases(found, side, every[0])
    return found.cases


def kernel_cases() -> list[KernelCase]:
    """Every kernel at the layer shapes of ResNet-50 and 224 × 224 images."""
    return cases_of(224, 64)


def small_cases() -> list[KernelCase]:
    """The same cases, tiny and of odd sizes, for checks on a CPU."""
    return cases_of(34, 8)


def convolutions(network: str, side: int) -> dict[Convolution, int]:
    """A torchvision ResNet's convolutions on images of side × side, and how many it has of each."""
    import torchvision
    from torch import nn

    with torch.device("meta"):
        model = getattr(torchvision.models, network)().eval()
        images = torch.empty(1, 3, side, side)
    found: dict[Convolution, int] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps, stride = layer.kernel_size[0], layer.stride[0]
        shape = Convolution(inputs[0].shape[2], layer.in_channels, layer.out_channels, stride, taps, layer.groups)
        assert (layer.padding, output.shape[2]) == ((taps // 2,) * 2, shape.out), layer
        found[shape] = found.get(shape, 0) + 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    model(images)
    return found
