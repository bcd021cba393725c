"""The kernels' passes in plain torch, and random tensors to run both on.

Library convolutions in the storage dtype, everything else in float32, as the torch backend does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.kernels.common import CONSTANT_SPLITS, Arrival, Branch, Denominators, Divisor

Pair = tuple[int, int]

FAINT = 1e-4
"""How small a zero-guard's denominators are in every other channel."""


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


# The passes ---------------------------------------------------------------------------------------------------------


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
