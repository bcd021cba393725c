"""The reference: LRP in float64, written from the definitions, to check the fast backends against.

It shares the :class:`~lrp_fast.plan.Plan` and what each step was assigned with the fast backends, and nothing else: no
table of terms, no gates, no stacked weights, no hand-written transposes (a transposed map is the vector-Jacobian
product of the map itself). Each rule is evaluated from what it says of the contributions ``c_ij = x_i w_ij`` of input i
to output j; ``tests/test_reference.py`` compares these equations with loops over all contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, SupportsFloat

import torch
from torch import Tensor

from lrp_fast.composites import Assignment, PoolRule
from lrp_fast.layers import AdaptiveMaxPool, Average, Convolution, Input, Linear, MaxPool, Merge, Pad, Parameters, Slice
from lrp_fast.plan import Plan, Step
from lrp_fast.rules import Rule, Stabilizer, ZeroGuard

Map = Callable[[Tensor], Tensor]
"""A linear map of one tensor."""

CAUSES = ("bias", "stabilizer", "dead windows", "constants")
"""Where relevance is lost: to a bias and a stabilizer in a denominator, at outputs that no input contributed to, and at
elements that are constant by structure (padding, and what a zero-guarded layer made of padding alone) or cut away."""


@dataclass
class Shares:
    """The relevance of a step's inputs, and what was lost on the way, by cause, per image."""

    inputs: list[Tensor]
    lost: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceResult:
    """``values`` and ``relevance`` at every step's output (float64, N×…), and ``shares``: what each step passed on."""

    values: tuple[Tensor, ...]
    relevance: tuple[Tensor, ...]
    shares: tuple[Shares | None, ...]


def forward(plan: Plan, parameters: Parameters, inputs: Tensor) -> tuple[Tensor, ...]:
    """Every step's output, in the dtype of inputs and parameters: float64, or another to measure its rounding."""
    values: list[Tensor] = []
    for step in plan.steps:
        sources = [inputs] if isinstance(step.layer, Input) else [values[i] for i in step.inputs]
        layer = step.layer.resolved([tuple(value.shape) for value in values])
        values.append(layer.forward(sources, parameters))
    return tuple(values)


def backward(
    plan: Plan,
    parameters: Parameters,
    assignments: Sequence[Assignment],
    batch_norm: Literal["fold", "pass"],
    values: Sequence[Tensor],
    start: Tensor,
) -> ReferenceResult:
    """The relevance at every step's output, given ``start`` (N × classes, float64) at the plan's output."""
    shapes = tuple(tuple(value.shape) for value in values)
    relevance: list[Tensor] = [torch.zeros_like(value) for value in values]
    shares: list[Shares | None] = [None] * len(values)
    relevance[plan.output] = start
    for index in range(len(values) - 1, 0, -1):
        step = plan.steps[index]
        sources = [values[i] for i in step.inputs]
        zeros = [plan.structural_zeros(i, shapes, start.device) for i in step.inputs]
        at = _Site(step, sources, values[index], relevance[index], parameters, batch_norm, shapes, zeros)
        shared = _share(at, assignments[index])
        shares[index] = shared
        for i, r in zip(step.inputs, shared.inputs, strict=True):
            relevance[i] = relevance[i] + r
    return ReferenceResult(tuple(values), tuple(relevance), tuple(shares))


@dataclass(frozen=True)
class _Site:
    """One step with everything its equation needs."""

    step: Step
    inputs: list[Tensor]
    output: Tensor
    relevance: Tensor
    parameters: Parameters
    batch_norm: str
    shapes: tuple[tuple[int, ...], ...]
    zeros: list[Tensor | None]


def _share(at: _Site, assignment: Assignment) -> Shares:
    layer = at.step.layer
    if isinstance(layer, Linear):
        assert assignment.rule is not None
        W, b = weights(layer, at.parameters, at.batch_norm)
        return share_linear(layer, assignment.rule, at.inputs[0], at.relevance, W, b, at.zeros[0])
    if isinstance(layer, Merge):
        assert assignment.split is not None
        return share_merge(layer, assignment.split.name, at.inputs, at.relevance, at.zeros)
    if isinstance(layer, (MaxPool, AdaptiveMaxPool, Average)):
        assert assignment.pool is not None
        pool = layer.resolved(at.shapes)
        assert isinstance(pool, (MaxPool, AdaptiveMaxPool, Average))
        return share_pool(pool, assignment.pool, at.inputs[0], at.relevance, at.zeros[0])
    resolved = layer.resolved(at.shapes)
    if isinstance(layer, (Pad, Slice)) or at.output.shape != at.inputs[0].shape:
        _, transpose = applied(lambda x: resolved.forward((x,), {}), at.inputs[0])
        r = transpose(at.relevance)
    else:
        r = at.relevance
    return Shares([r], {"constants": per_image(at.relevance) - per_image(r)})


def per_image(x: Tensor) -> Tensor:
    """Sums over all but the first dimension."""
    return x.flatten(1).sum(1)


def applied(linear: Map, x: Tensor) -> tuple[Tensor, Map]:
    """``A x`` for a linear map A, and its transpose ``s ↦ Aᵀ s``, to be taken once: the vector-Jacobian product."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = linear(leaf)

    def transpose(s: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(result, leaf, s)
        return back

    return result.detach(), transpose


def stabilize(z: Tensor, stabilizer: Stabilizer) -> Tensor:
    """``z + ε · sign(z)`` with sign(0) = +1; unsigned: ``z + ε``, and ε where that is zero."""
    if stabilizer.signed:
        return torch.where(z < 0, z - stabilizer.epsilon, z + stabilizer.epsilon)
    total = z + stabilizer.epsilon
    return torch.where(total == 0, stabilizer.epsilon, total)


# Linear layers ------------------------------------------------------------------------------------------------------


def weights(layer: Linear, parameters: Parameters, batch_norm: str) -> tuple[Tensor, Tensor]:
    """The weight and bias that rules see."""
    weight, bias = parameters[layer.weight], parameters[layer.bias] if layer.bias is not None else None
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if batch_norm == "pass" or layer.norm is None:
        return weight, bias
    norm = layer.norm
    gamma = 1.0 if norm.weight is None else parameters[norm.weight]
    beta = 0.0 if norm.bias is None else parameters[norm.bias]
    factor = gamma / torch.sqrt(parameters[norm.variance] + norm.eps)
    return weight * factor.reshape(-1, *(1,) * (weight.ndim - 1)), (bias - parameters[norm.mean]) * factor + beta


@dataclass(frozen=True)
class _Linear:
    """A linear layer's numbers while its relevance is shared out."""

    layer: Linear
    rule: Rule
    x: Tensor
    R: Tensor
    W: Tensor
    b: Tensor
    zeros: Tensor | None

    def product(self, x: Tensor, W: Tensor) -> Tensor:
        return self.layer.apply(x, W)

    def bias(self, b: Tensor) -> Tensor:
        return b if not isinstance(self.layer, Convolution) else b.reshape(-1, *(1,) * (self.x.ndim - 2))

    def number(self, name: str) -> float:
        value = self.rule.parameter(name)
        assert isinstance(value, SupportsFloat)
        return float(value)

    @property
    def stabilizer(self) -> Stabilizer:
        value = self.rule.parameter("epsilon" if self.rule.name == "epsilon" else "stabilizer")
        return value if isinstance(value, Stabilizer) else Stabilizer(float(value))  # type: ignore[arg-type]


def share_linear(
    layer: Linear, rule: Rule, x: Tensor, R: Tensor, W: Tensor, b: Tensor, zeros: Tensor | None = None
) -> Shares:
    """The relevance of a linear layer's input x from that of its output R, all float64; b has one entry per output.

    ``zeros`` (bool, 1 × …) marks the elements of x that are zero by structure: to a zero-guard no valid inputs.
    """
    equation = EQUATIONS.get(rule.name)
    if equation is None:
        raise ValueError(f"the reference has no equation for the rule {rule.name!r}; it has: {', '.join(EQUATIONS)}")
    return equation(_Linear(layer, rule, x, R, W, b, zeros))


def _pos(v: Tensor) -> Tensor:
    return v.clamp(min=0)


def _neg(v: Tensor) -> Tensor:
    return v.clamp(max=0)


def _divide(at: _Linear, pairs: Sequence[tuple[Tensor, Tensor]], b: Tensor | None, R: Tensor) -> Shares:
    """``Σ_p x_p · Aᵀ(R / stab(z), W_p)`` with ``z = Σ_p A(x_p, W_p) + b``."""
    bias = torch.zeros_like(R) if b is None else at.bias(b).expand_as(R)
    contributed, contributing = torch.zeros_like(R), []
    for x, W in pairs:
        if bool(x.any()):  # behind a ReLU negative parts contribute nothing
            z, transpose = applied(partial(at.product, W=W), x)
            contributed = contributed + z
            contributing.append((x, transpose))
    denominator = stabilize(contributed + bias, at.stabilizer)
    s = R / denominator
    r = torch.zeros_like(at.x)
    for x, transpose in contributing:
        r = r + x * transpose(s)
    dead = contributed == 0
    alive = ~dead
    lost = {
        "dead windows": per_image(R * dead),
        "bias": per_image(s * bias * alive),
        "stabilizer": per_image(s * (denominator - contributed - bias) * alive),
    }
    return Shares([r], lost)


def _sum(*terms: tuple[float, Shares]) -> Shares:
    r = torch.stack([factor * shares.inputs[0] for factor, shares in terms]).sum(0)
    lost = {
        cause: torch.stack([factor * shares.lost[cause] for factor, shares in terms]).sum(0)
        for cause in terms[0][1].lost
    }
    return Shares([r], lost)


def _epsilon(at: _Linear) -> Shares:
    return _divide(at, [(at.x, at.W)], at.b, at.R)


def _raising(at: _Linear) -> Shares:
    # c_ij > 0 where x and w have one sign
    return _divide(at, [(_pos(at.x), _pos(at.W)), (_neg(at.x), _neg(at.W))], _pos(at.b), at.R)


def _lowering(at: _Linear) -> Shares:
    return _divide(at, [(_pos(at.x), _neg(at.W)), (_neg(at.x), _pos(at.W))], _neg(at.b), at.R)


def _alpha_beta(at: _Linear) -> Shares:
    alpha, beta = at.number("alpha"), at.number("beta")
    return _sum((alpha, _raising(at)), (-beta, _lowering(at)))


def _gamma(at: _Linear) -> Shares:
    gamma, x, W, b = at.number("gamma"), at.x, at.W, at.b
    output = at.product(x, W) + at.bias(b)
    up, down = W + gamma * _pos(W), W + gamma * _neg(W)
    above = _divide(at, [(_pos(x), up), (_neg(x), down)], b + gamma * _pos(b), at.R * (output > 0))
    below = _divide(at, [(_pos(x), down), (_neg(x), up)], b + gamma * _neg(b), at.R * (output < 0))
    shares = _sum((1.0, above), (1.0, below))
    shares.lost["dead windows"] = shares.lost["dead windows"] + per_image(at.R * (output == 0))
    return shares


def _z_box(at: _Linear) -> Shares:
    low, high = _bound(at, "low"), _bound(at, "high")
    return _divide(at, [(at.x, at.W), (-low, _pos(at.W)), (-high, _neg(at.W))], None, at.R)


def _bound(at: _Linear, name: str) -> Tensor:
    bound = torch.as_tensor(at.rule.parameter(name), dtype=at.x.dtype, device=at.x.device)
    channels = at.x.shape[1]
    if len(bound) not in (1, channels):
        raise ValueError(f"z-box has {len(bound)} values for {name!r} but the layer has {channels} input channels")
    return bound.reshape(-1, *(1,) * (at.x.ndim - 2)).expand_as(at.x)


def _w_square(at: _Linear) -> Shares:
    return _divide(at, [(torch.ones_like(at.x), at.W**2)], at.b**2, at.R)


def _flat(at: _Linear) -> Shares:
    return _divide(at, [(torch.ones_like(at.x), torch.ones_like(at.W))], None, at.R)


def _positive_products(at: _Linear) -> Shares:
    guard = at.rule.parameter("stabilizer")
    valid = _valid(at.x, at.zeros if isinstance(guard, ZeroGuard) else None)
    x = _pos(at.x) if at.rule.parameter("pixels") else valid
    bias = at.b if at.rule.parameter("bias") else None
    if isinstance(guard, ZeroGuard):
        ones = torch.ones_like(at.W)

        def window(u: Tensor) -> Tensor:
            return at.product(u, ones)

        return _guarded(x, valid, at.R, lambda u: at.product(u, _pos(at.W)), window, guard)
    return _divide(at, [(x, _pos(at.W))], bias, at.R)


def _valid(x: Tensor, zeros: Tensor | None) -> Tensor:
    """Ones, and zeros where x is zero by structure: such an element is padding to a zero-guard."""
    return torch.ones_like(x) if zeros is None else (~zeros).to(x).expand_as(x)


def _guarded(x: Tensor, valid: Tensor, R: Tensor, linear: Map, window: Map, guard: ZeroGuard) -> Shares:
    """In proportion to x · weight, and evenly over the window's valid inputs where the sum counts as zero.

    A window without valid inputs saw nothing but padding: its output is constant, and the relevance there is lost.
    """
    z, transpose = applied(linear, x)
    largest = z.flatten(1).amax(1).reshape(-1, *(1,) * (z.ndim - 1))
    dead = z <= guard.threshold * largest
    alive = torch.where(dead, 0.0, R / torch.where(dead, 1.0, z))
    members, spread = applied(window, valid)
    empty = members == 0
    evenly = torch.where(dead & ~empty, R, 0.0) / torch.where(empty, 1.0, members)
    lost = {"constants": per_image(R * empty)}
    return Shares([x * transpose(alive) + valid * spread(evenly)], lost)


EQUATIONS: Mapping[str, Callable[[_Linear], Shares]] = {
    "epsilon": _epsilon,
    "alpha-beta": _alpha_beta,
    "z-plus": _raising,
    "gamma": _gamma,
    "z-box": _z_box,
    "w-square": _w_square,
    "flat": _flat,
    "positive-products": _positive_products,
}


# Pools --------------------------------------------------------------------------------------------------------------


def share_pool(
    layer: MaxPool | AdaptiveMaxPool | Average, rule: PoolRule, x: Tensor, R: Tensor, zeros: Tensor | None = None
) -> Shares:
    """The relevance of a pool's input from that of its output; ``zeros`` as for :func:`share_linear`."""
    if rule.kind == "winner":
        if isinstance(layer, Average):
            raise ValueError("an average pool has no winner")
        return Shares([_to_winner(layer, x, R)])
    assert rule.stabilizer is not None
    stabilizer = rule.stabilizer
    valid = _valid(x, zeros if isinstance(stabilizer, ZeroGuard) else None)
    average: Map = (
        (lambda u: layer.forward((u,), {})) if isinstance(layer, Average) else _block_average(layer, valid, R)
    )
    if isinstance(stabilizer, ZeroGuard):
        # Even weights: the valid elements of the window share alike.
        return _guarded(_pos(x), valid, R, average, average, stabilizer)
    x = x if stabilizer.signed else _pos(x)
    z, transpose = applied(average, x)
    denominator = stabilize(z, stabilizer)
    s = R / denominator
    lost = {"dead windows": per_image(R * (z == 0)), "stabilizer": per_image(s * (denominator - z) * (z != 0))}
    return Shares([x * transpose(s)], lost)


def _to_winner(layer: MaxPool | AdaptiveMaxPool, x: Tensor, R: Tensor) -> Tensor:
    _, transpose = applied(lambda u: layer.forward((u,), {}), x)  # linear as long as the same inputs win
    return transpose(R)


def _block_average(layer: MaxPool | AdaptiveMaxPool, valid: Tensor, R: Tensor) -> Map:
    """The mean over the block that each output of a max-pool answers for, or its own window if no input there is valid."""
    blocks: list[Tensor] = []
    own: list[Tensor] = []
    for axis, (inputs, outputs) in enumerate(zip(valid.shape[2:], R.shape[2:], strict=True)):
        for means, windows in zip((blocks, own), _windows(layer, axis, inputs, outputs), strict=True):
            means.append(_means(windows, inputs, R))
    filled = _along_axes(valid[:1], blocks) > 0
    return lambda u: torch.where(filled, _along_axes(u, blocks), _along_axes(u, own))


def _windows(layer: MaxPool | AdaptiveMaxPool, axis: int, inputs: int, outputs: int) -> tuple[list[slice], list[slice]]:
    """Along one axis: the block (which may be empty) and the own window of every output, in order."""
    if isinstance(layer, AdaptiveMaxPool):
        own = [slice(o * inputs // outputs, -((o + 1) * inputs // -outputs)) for o in range(outputs)]
        return own, own
    kernel, step, padding, dilation = (of[axis] for of in (layer.kernel, layer.stride, layer.padding, layer.dilation))
    blocks = [slice(o * step, min((o + 1) * step, inputs)) for o in range(outputs)]
    first = [o * step - padding for o in range(outputs)]
    own = [
        slice(at + dilation * max(0, -(at // dilation)), min(at + (kernel - 1) * dilation + 1, inputs), dilation)
        for at in first
    ]
    return blocks, own


def _means(windows: Sequence[slice], inputs: int, like: Tensor) -> Tensor:
    """The means over windows along one axis, as a matrix (outputs × inputs); of nothing, zero."""
    members = like.new_zeros(len(windows), inputs)
    for row, window in zip(members, windows, strict=True):
        row[window] = 1
    return members / members.sum(1, keepdim=True).clamp(min=1)


def _along_axes(u: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """One matrix applied along each axis in space: a mean over a box is a mean of means."""
    for matrix in matrices:
        u = torch.tensordot(u, matrix, ([2], [1]))  # the axis goes last, and the next comes to its place
    return u


# Merges -------------------------------------------------------------------------------------------------------------


def _ratio(F: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    total = F.abs() + S.abs()
    both_zero = total == 0
    safe = torch.where(both_zero, 1.0, total)
    return torch.where(both_zero, 0.5, F.abs() / safe), torch.where(both_zero, 0.5, S.abs() / safe)


def _signed(F: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    total = stabilize(F + S, Stabilizer(1e-6))
    return F / total, S / total


SPLIT_EQUATIONS: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ratio": _ratio,
    "symmetric": lambda F, S: (torch.full_like(F, 0.5), torch.full_like(S, 0.5)),
    "residual-only": lambda F, S: (torch.ones_like(F), torch.zeros_like(S)),
    "signed": _signed,
}


def share_merge(
    layer: Merge, split: str, branches: Sequence[Tensor], R: Tensor, zeros: Sequence[Tensor | None] = (None, None)
) -> Shares:
    """The relevance of both branches of a merge; ``zeros`` marks the elements of each constant by structure."""
    equation = SPLIT_EQUATIONS.get(split)
    if equation is None:
        raise ValueError(f"the reference has no equation for the split {split!r}; it has: {', '.join(SPLIT_EQUATIONS)}")
    residual, skip = 1 - layer.skip, layer.skip
    weight: list[Tensor] = [R, R]
    weight[residual], weight[skip] = equation(branches[residual], branches[skip])
    if split != "signed":
        for one, other in ((0, 1), (1, 0)):
            constant = zeros[one]
            if constant is not None:
                weight[one] = torch.where(constant, 0.0, weight[one])
                weight[other] = torch.where(constant, 1.0, weight[other])
    shares = [weight[0] * R, weight[1] * R]
    total = branches[0] + branches[1]
    missing = R - shares[0] - shares[1]
    lost = {"dead windows": per_image(missing * (total == 0)), "stabilizer": per_image(missing * (total != 0))}
    return Shares(shares, lost if split == "signed" else {})
