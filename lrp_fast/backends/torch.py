"""The torch backend: stacked weights and gates.

A linear layer's forward pass runs one convolution with the weights its rule needs stacked on top of its own, and turns
the denominators into *gates* at once: ``gate_g = numerator · mask_g / stab(z_g)``. Its backward pass multiplies what
comes in by the gates and runs one transposed convolution. Relevance travels between layers as two tensors,
``R = x · acc + dense``: whoever multiplies by its input hands over ``acc`` alone, and if nobody else reads x, the product
with x is in the gate of the layer that made x, so that R itself is never formed.

Every operation is bound once to its weights, dtype, device and input shape. On a CPU the maps of a convolution are not stacked but
packed one by one for oneDNN (:mod:`lrp_fast.backends.packed`). Tensors keep the channels last in memory.
Where several maps are wanted of one image, they lie in front of the batch: a relevance tensor has (maps · N) rows where
its gate has N.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.backends.packed import PackedConvolution, pack_forward, pack_transposed, packs
from lrp_fast.backends.passes import times, times_plus
from lrp_fast.composites import PoolRule
from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    Average,
    AveragePool,
    Convolution,
    Dense,
    Layer,
    Linear,
    MaxPool,
    Mean,
    Merge,
    Pad,
    Parameters,
    Shape,
    Slice,
    fill_sizes,
)
from lrp_fast.rules import (
    FIXED_PARTS,
    NEGATIVE,
    POSITIVE,
    WHOLE,
    InputPart,
    Part,
    Rule,
    Stabilizer,
    WeightPart,
    ZeroGuard,
)
from lrp_fast.scopes import watched
from lrp_fast.splits import Split

Message = tuple[Tensor | None, Tensor | None]
"""``(acc, dense)``: relevance ``x · acc + dense`` of a layer's input x."""


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels last in memory, if it is an image or a volume."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.ndim == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous()


# Gates --------------------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """Per group, what turns incoming relevance into ``s = R / stab(z)``; ``dead`` what a zero-guard spreads evenly."""

    groups: tuple[Tensor, ...]
    dead: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype ratios are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stabilized(z: Tensor, stabilizer: Stabilizer, may_vanish: bool) -> Tensor:
    """``stab(z)``; ``may_vanish``: z may be negative, so that an unsigned ``z + ε`` could be zero."""
    z = stabilizer(z)
    return z.masked_fill(z == 0, stabilizer.epsilon) if may_vanish and not stabilizer.signed else z


def guarded(z: Tensor, guard: ZeroGuard, numerator: Tensor | float) -> tuple[Tensor, Tensor | None]:
    """The gate of a zero-guarded denominator, and the mask (times the numerator) of what counts as zero.

    None for a mask that is known to be empty, as most are: then nothing needs to be spread.
    """
    rest = tuple(range(1, z.ndim))
    limit = guard.threshold * z.amax(rest, keepdim=True)
    if may_look(z) and bool((z.amin(rest, keepdim=True) > limit).all()):
        return numerator / z, None
    dead = z <= limit
    return (numerator / z).masked_fill_(dead, 0.0), dead * numerator


def stored(alive: Tensor, dead: Tensor | None, dtype: torch.dtype) -> Gates:
    """A zero-guard's gates in the compute dtype."""
    return Gates((alive.to(dtype),), None if dead is None else dead.to(dtype))


def may_look(x: Tensor) -> bool:
    """Whether a decision may depend on a tensor: not in a graph that is being made, nor where it means to wait for a device."""
    return x.device.type == "cpu" and not watched()


# Linear layers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One affine map of one part of the input: ``A(input, weight) + bias``, of the layer's own or the rule's weights."""

    input: InputPart
    own: bool
    weight: WeightPart
    bias: WeightPart | None


def part_of(value: Tensor, part: WeightPart) -> Tensor:
    """A part of a weight or bias; float64 where it takes arithmetic."""
    if part == "square":
        return value.double().square()
    if part == "ones":
        return torch.ones_like(value)
    assert isinstance(part, Part)
    if part == WHOLE:
        return value
    if part in (POSITIVE, NEGATIVE):
        return value.clamp(min=0) if part == POSITIVE else value.clamp(max=0)
    value = value.double()
    whole = value if part.negative == 1.0 else value * part.negative
    return whole.add(value.clamp(min=0), alpha=part.positive - part.negative)


class LinearOperation:
    """A convolution or linear layer under a rule, bound to its weights.

    ``factored``: its message to its input is ``(acc, …)``, to be multiplied by the input; otherwise it is dense.
    ``sums_channels``: the channel sum of its message can be had at once, for the heatmap alone. ``live``: None, or zero
    where the input is zero by structure and one elsewhere (1 × …). ``packed``: its maps on a CPU, for one input shape.
    """

    def __init__(
        self,
        layer: Linear,
        rule: Rule,
        fold: bool,
        parameters: Parameters,
        nonnegative: bool,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.layer, self.rule, self.dtype, self.nonnegative = layer, rule, dtype, nonnegative
        self.guard = rule.stabilizer if isinstance(rule.stabilizer, ZeroGuard) else None
        self._parameters = _of_layer(layer, parameters)
        weight = parameters[layer.weight]
        self.weight_shape, self.device = tuple(weight.shape), weight.device
        self.shared = fold or layer.norm is None
        self._biased = layer.bias is not None or (fold and layer.norm is not None)
        self.may_vanish = any(group.bias is not None for group in rule.groups) and self._biased
        self._check_bounds(name)
        bounds = {
            part: value for part in ("low", "high") if (value := dict(self.rule.parameters).get(part)) is not None
        }
        self.bounds = {
            part: torch.tensor(value, dtype=dtype, device=self.device).reshape(-1) for part, value in bounds.items()
        }
        self.groups = [self._terms(index, nonnegative) for index in range(len(rule.groups))]
        self.masked = any(group.mask for group in rule.groups)
        self.own = self._whole(own=True)
        self.output = self._whole(own=self.shared)
        self.axis = 1 if isinstance(layer, Convolution) else -1
        self.inputs = sorted({term.input for terms in self.groups for term, _ in terms})
        self.factored = self.inputs == ["x"]
        self.grouped = isinstance(layer, Convolution) and layer.groups > 1
        self.sums_channels = self.inputs == ["one"] and isinstance(layer, Convolution) and not self.grouped
        self.recipes = self._recipes()
        self.evaluated = dict.fromkeys(term for recipe in self.recipes.values() for _, term in recipe)
        self.sent = {part: self._sent(part) for part in self.inputs}
        self.flat = [part for part in self.inputs if all(term.weight == "ones" for _, term, _ in self.sent[part])]
        self.live: Tensor | None = None
        self.packed: PackedMaps | None = None
        self._constants: dict[Shape, dict[Term, Tensor]] = {}
        self._kept: dict[str, Any] | None = None

    def without(self, zeros: Tensor) -> LinearOperation:
        """This operation for inputs where ``zeros`` (bool, 1 × …) are padding: to its zero-guard no valid inputs."""
        assert self.guard is not None
        bound = copy.copy(self)
        bound.live = (~zeros).to(self.dtype)
        bound.sums_channels = False
        bound._constants = {}
        return bound

    def placed(self, shape: Shape, message: Shape, relu: bool, pack: bool) -> LinearOperation:
        """This operation with all ready that can be made before inputs of ``shape`` come, and messages to its outputs.

        ``relu``: one follows it; ``pack``: where weights can be packed, they are.
        """
        self._kept = {}
        placed = self
        if pack and isinstance(self.layer, Convolution) and packs(self.layer, self.device, self.dtype):
            placed = copy.copy(self)
            placed.packed = PackedMaps.of(self, shape, message, relu)
        else:
            _ = self.stacks, self.transposes, self.summed
        _ = placed.window
        for part in {term.input for term in self.evaluated} & set(FIXED_PARTS):
            placed._constant(torch.zeros(1, *shape[1:], dtype=self.dtype, device=self.device), part)
        self._kept = placed._kept = None
        return placed

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once as long as the operation is being placed."""
        kept = self._kept  # another thread may place the same operation
        if kept is None:
            return make()
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def _check_bounds(self, name: str) -> None:
        channels = self.weight_shape[1] * (self.layer.groups if isinstance(self.layer, Convolution) else 1)
        for bound in ("low", "high"):
            values = dict(self.rule.parameters).get(bound, ())
            if isinstance(values, tuple) and len(values) not in (0, 1, channels):
                raise ValueError(
                    f"{name}: the rule {self.rule.name} has {len(values)} values for {bound!r} but the layer has "
                    f"{channels} input channels; give one value, or one for each channel: ZBox(low=..., high=...)"
                )

    # Terms and their weights.

    def _terms(self, index: int, nonnegative: bool) -> list[tuple[Term, float]]:
        group = self.rule.groups[index]
        bias = group.bias if self._biased else None
        terms = []
        for product in group.products:
            if nonnegative and product.input == "x-":
                continue
            part: InputPart = "x" if nonnegative and product.input == "x+" else product.input
            terms.append((Term(part, self.shared, product.weight, bias), product.coefficient))
            bias = None
        return terms

    def _whole(self, own: bool) -> Term:
        biased = self._biased or (own and self.layer.norm is not None)
        return Term("x", own, WHOLE, WHOLE if biased else None)

    def _recipes(self) -> dict[Term, tuple[tuple[float, Term], ...]]:
        """How each affine map that is wanted is summed from those that are evaluated."""
        wanted = [self.own, *(term for terms in self.groups for term, _ in terms)]
        wanted += [self.output] if self.masked else []
        recipes: dict[Term, tuple[tuple[float, Term], ...]] = {}
        for term in dict.fromkeys(wanted):
            relatives = {t.weight for t in wanted if (t.input, t.own) == (term.input, term.own)}
            whole_maps = all(t.bias in (t.weight, None) for t in wanted if (t.input, t.own) == (term.input, term.own))
            if len(relatives) > 2 and NEGATIVE not in relatives and whole_maps and isinstance(term.weight, Part):
                # γ: all are W and W⁺ combined, with one sign where the mask lets them count. Never W⁺ + W⁻ for the
                # layer's own output: what the two cancel costs float32 one to two digits of every layer behind.
                whole = Term(term.input, term.own, WHOLE, WHOLE if term.bias is not None else None)
                plus = Term(term.input, term.own, POSITIVE, POSITIVE if term.bias is not None else None)
                factors = ((term.weight.negative, whole), (term.weight.positive - term.weight.negative, plus))
                recipes[term] = tuple((factor, basis) for factor, basis in factors if factor)
            else:
                recipes[term] = ((1.0, term),)
        return recipes

    def _sent(self, part: InputPart) -> list[tuple[int, Term, float]]:
        """What sends relevance to a part of the input: the group, its term and the coefficient of both."""
        return [
            (index, term, group.coefficient * coefficient)
            for index, (group, terms) in enumerate(zip(self.rule.groups, self.groups, strict=True))
            for term, coefficient in terms
            if term.input == part
        ]

    def weights(self, own: bool) -> tuple[Tensor, Tensor | None]:
        """The layer's own weight and bias, with its batch norm, or those that the rule looks at; float64 where it takes
        arithmetic."""
        if self.layer.norm is None or not (own or self.shared):
            return self.layer.raw(self._parameters)
        folded: tuple[Tensor, Tensor | None] = self._keep(
            "folded", lambda: self.layer.folded({path: value.double() for path, value in self._parameters.items()})
        )
        return folded

    def affine(self, term: Term) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a term, as precise as :meth:`weights`."""
        return self.weight(term), self.bias(term)

    def weight(self, term: Term) -> Tensor:
        """The weight of a term alone."""
        return part_of(self.weights(term.own)[0], term.weight)

    def bias(self, term: Term) -> Tensor | None:
        """The bias of a term alone."""
        _, bias = self.weights(term.own)
        return None if bias is None or term.bias is None else part_of(bias, term.bias)

    def rounded(self, term: Term, factor: float = 1.0) -> Tensor:
        """``factor`` times the weight of a term, in the compute dtype, rounded once."""
        if term.weight not in (WHOLE, POSITIVE, NEGATIVE) or abs(math.frexp(factor)[0]) != 0.5:
            weight = self.weight(term)
            return (weight if factor == 1.0 else weight.double() * factor).to(self.dtype)
        # Rounding keeps signs and powers of two: half the memory is moved where it comes first.
        whole = self._keep(f"rounded {term.own}", lambda: self.weights(term.own)[0].to(self.dtype))
        weight = part_of(whole, term.weight)
        return weight if factor == 1.0 else weight * factor

    def returned(self, part: InputPart) -> list[Tensor]:
        """The weights that send relevance to a part, with their coefficients, all groups stacked: one transposed map.

        Those of a grouped convolution stay apart, one for each entry of ``sent``; the flat rule has none.
        """
        if part in self.flat:
            return []
        weights = [self.rounded(term, factor) for _, term, factor in self.sent[part]]
        return weights if self.grouped else [torch.cat(weights)]

    @cached_property
    def stacks(self) -> dict[InputPart, list[tuple[list[Term], Tensor, Tensor | None]]]:
        """The affine maps of each input part, in batches with stacked weight and bias."""
        stacks: dict[InputPart, list[tuple[list[Term], Tensor, Tensor | None]]] = {}
        for part in dict.fromkeys(term.input for term in self.evaluated):
            terms = [term for term in self.evaluated if term.input == part]
            # Stacked outputs of a grouped convolution would lie interleaved.
            batches = [[term] for term in terms] if self.grouped or part != "x" else [terms]
            stacks[part] = [(batch, *self._stack(batch)) for batch in batches]
        return stacks

    def _stack(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor | None]:
        weights, biases = [self.rounded(term) for term in terms], [self.bias(term) for term in terms]
        bias = None
        if any(b is not None for b in biases):
            rows = [w.new_zeros(w.shape[0]) if b is None else b for b, w in zip(biases, weights, strict=True)]
            bias = torch.cat(rows).to(self.dtype)
        return channels_last(torch.cat(weights)), bias

    @cached_property
    def transposes(self) -> dict[InputPart, list[Tensor]]:
        """For each input part the weights that send relevance to it (``returned``), in the compute dtype."""
        return {part: [channels_last(weight) for weight in self.returned(part)] for part in self.inputs}

    @cached_property
    def window(self) -> Tensor:
        """All-one weights from one channel to one, for each group."""
        groups = self.layer.groups if isinstance(self.layer, Convolution) else 1
        return torch.ones(groups, 1, *self.weight_shape[2:], dtype=self.dtype, device=self.device)

    @cached_property
    def summed(self) -> Tensor | None:
        """The stacked weights of ``transposes`` summed over input channels, for the heatmap alone."""
        if not self.sums_channels or "one" in self.flat:
            return None
        sums = [
            factor * self.weight(term).sum(1, keepdim=True, dtype=torch.float64) for _, term, factor in self.sent["one"]
        ]
        return channels_last(torch.cat(sums).to(self.dtype))

    # Forward.

    def forward(self, x: Tensor, relu: bool = False) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The layer's own output (``relu`` of it if so), the z of its groups, and the output that masks look at."""
        x = x.to(self.dtype)
        found: dict[Term, Tensor] = {}
        for part in dict.fromkeys(term.input for term in self.evaluated):
            if part in FIXED_PARTS:
                found |= self._constant(x, part)
                continue
            source = x if part == "x" else x.clamp(min=0) if part == "x+" else x.clamp(max=0)
            if self.packed is not None:
                found |= {term: apply(source) for term, apply in self.packed.forward.items() if term.input == part}
                continue
            for terms, weight, bias in self.stacks[part]:
                y = self.layer.apply(source, weight, bias)
                found |= zip(terms, y.chunk(len(terms), self.axis), strict=True)
        if self.packed is not None:
            for term, (whole, rest, most) in self.packed.derived.items():
                found[term] = (found[whole] - found[rest]).clamp_(max=most)
        z = [_combine([(c, self._evaluate(term, found)) for term, c in terms]) for terms in self.groups]
        output = self._evaluate(self.output, found) if self.masked else None
        own = self._evaluate(self.own, found)
        rectified = self.packed is not None and self.packed.relu
        return own.relu() if relu and not rectified else own, z, output

    def _evaluate(self, term: Term, found: dict[Term, Tensor]) -> Tensor:
        return _combine([(factor, found[basis]) for factor, basis in self.recipes[term]])

    def _constant(self, x: Tensor, part: InputPart) -> dict[Term, Tensor]:
        """Maps of what does not depend on the image, of batch size 1, computed once for each shape."""
        known = self._constants.setdefault(tuple(x.shape[1:]), {})
        if not any(term.input == part for term in known):
            source = self.constant_input(part, x[:1])
            for term in self.evaluated:
                if term.input == part:
                    known[term] = self.layer.apply(source, *self._stack([term]))
        return {term: z for term, z in known.items() if term.input == part}

    def constant_input(self, part: InputPart, like: Tensor) -> Tensor:
        """Ones (where the input is live), or a pixel bound, shaped like the input."""
        if part == "one":
            return torch.ones_like(like) if self.live is None else self.live
        return self.bounds[part].view(1, -1, *(1,) * (like.ndim - 2)).expand_as(like).contiguous()

    def gates(self, z: Sequence[Tensor], output: Tensor | None, numerator: Tensor | float) -> Gates:
        """The gates of all groups: ``numerator · mask / stab(z)``, computed in float32, stored in the compute dtype."""
        wide = accumulation_dtype(self.dtype)
        if self.packed is not None and self.packed.stabilized:
            return Gates(tuple(quotient(numerator, z_g) for z_g in z))
        above = numerator.to(wide) if isinstance(numerator, Tensor) else numerator
        if self.guard is not None:
            return stored(*guarded(z[0].to(wide), self.guard, above), self.dtype)
        assert isinstance(self.rule.stabilizer, Stabilizer)
        gates = []
        for group, z_g in zip(self.rule.groups, z, strict=True):
            gate = above / stabilized(z_g.to(wide), self.rule.stabilizer, self.may_vanish)
            if group.mask is not None:
                assert output is not None
                gate = gate * ((output > 0) if group.mask == "positive" else (output < 0))
            gates.append(gate.to(self.dtype))
        return Gates(tuple(gates))

    # Backward.

    def backward(
        self, relevance: Tensor, gates: Gates, x: Tensor | None, shape: Shape, heatmap: bool = False
    ) -> Message:
        """The message to the input, of ``shape`` (without batch); x is needed unless the operation is ``factored``.

        With ``heatmap`` (where ``sums_channels``) the message has one channel, their sum.
        """
        relevance = relevance.to(self.dtype)
        dead = None if gates.dead is None else times(relevance, gates.dead)
        return self.send([times(relevance, gate) for gate in gates.groups], dead, x, shape, heatmap)

    def send(
        self, s: Sequence[Tensor], dead: Tensor | None, x: Tensor | None, shape: Shape, heatmap: bool = False
    ) -> Message:
        """The message, from ``s = R · gate`` of every group and what a zero-guard spreads evenly."""
        acc: Tensor | None = None
        dense: Tensor | None = None
        for part, sent in self.sent.items():
            share = self._transpose(part, [s[index] for index, _, _ in sent], shape, heatmap)
            if part == "x":
                acc = share
            else:
                unscaled = part == "one" and self.live is None
                share = share if unscaled else times(share, self._factor(part, x, share))
                dense = share if dense is None else dense + share
        if dead is not None:
            spread = self._spread(dead, shape, heatmap)
            dense = spread if dense is None else dense + spread
        if acc is not None and not self.factored:
            assert x is not None
            return None, times(acc, x) if dense is None else times_plus(acc, x, dense)
        return acc, dense

    def _factor(self, part: InputPart, x: Tensor | None, like: Tensor) -> Tensor:
        if part in FIXED_PARTS:
            return self.constant_input(part, like[:1])
        assert x is not None
        return x.clamp(min=0) if part == "x+" else x.clamp(max=0)

    def _transpose(self, part: InputPart, s: list[Tensor], shape: Shape, heatmap: bool) -> Tensor:
        if part in self.flat:
            return self._box(torch.stack(s).sum(0) if len(s) > 1 else s[0], shape, heatmap)
        if not self.grouped:
            s = [torch.cat(s, self.axis)] if len(s) > 1 else s
        if self.packed is not None:
            back = [self.packed.heatmap] if heatmap and self.packed.heatmap else self.packed.back[part]
            shares = [apply(a) for a, apply in zip(s, back, strict=True)]
        else:
            weights, size = self.transposes[part], shape
            if heatmap:
                assert self.summed is not None
                weights, size = [self.summed], (1, *shape[1:])
            shares = [self._map_back(a, w, size) for a, w in zip(s, weights, strict=True)]
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)

    def _map_back(self, s: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        if isinstance(self.layer, Dense):
            return s @ weight
        layer = self.layer
        assert isinstance(layer, Convolution)
        return transposed_convolution(s, weight, layer, shape, layer.groups)

    def _spread(self, dead: Tensor, shape: Shape, heatmap: bool) -> Tensor:
        """Dead relevance divided equally over the valid inputs of its window; what has none is lost."""
        if isinstance(self.layer, Dense):
            members = shape[-1] if self.live is None else self.live.sum(-1, keepdim=True).clamp(min=1)
            share = (dead.sum(-1, keepdim=True) / members).expand(*dead.shape[:-1], shape[-1])
        else:
            share = self._box(dead, shape, heatmap, self._members(shape))
        return share if self.live is None else share * self.live

    def _members(self, shape: Shape) -> Tensor:
        """How many valid inputs each window has, 1 × groups × …."""
        layer, groups = self.layer, self.window.shape[0]
        assert isinstance(layer, Convolution)
        if self.live is None:
            present = torch.ones(1, groups, *shape[1:], dtype=self.dtype, device=self.window.device)
        else:
            present = self.live.unflatten(1, (groups, -1)).mean(2)
        geometry = (layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), groups)
        return torch.convolution(present, self.window, None, *geometry) * (shape[0] // groups)

    def _box(self, s: Tensor, shape: Shape, heatmap: bool, count: Tensor | None = None) -> Tensor:
        """The transposed map of all-one weights: one channel for each group, repeated."""
        if isinstance(self.layer, Dense):
            return s.sum(-1, keepdim=True).expand(*s.shape[:-1], shape[-1])
        layer = self.layer
        assert isinstance(layer, Convolution)
        groups = self.window.shape[0]
        summed = s.unflatten(1, (groups, -1)).sum(2)
        summed = summed if count is None else summed / count.clamp(min=1)  # 0 where a window lies in the padding
        box = transposed_convolution(summed, self.window, layer, (groups, *shape[1:]), groups)
        channels = shape[0] // groups
        if heatmap:
            return box.sum(1, keepdim=True) * channels
        return box.repeat_interleave(channels, 1) if groups > 1 else box.expand(-1, channels, *box.shape[2:])


@dataclass(frozen=True)
class PackedMaps:
    """The maps of an operation on a CPU, weights packed for one input shape: each term forward, each input part back.

    ``derived``: terms that are the difference of two others, at most some number. ``heatmap``: back to the channel sum.
    ``relu``: the layer's own output comes rectified. ``stabilized``: its denominators come with their ε, which went into
    the bias, each in a tensor of its own.
    """

    forward: dict[Term, PackedConvolution]
    derived: dict[Term, tuple[Term, Term, float]]
    back: dict[InputPart, list[Callable[[Tensor], Tensor]]]
    heatmap: Callable[[Tensor], Tensor] | None
    relu: bool
    stabilized: bool

    @staticmethod
    def of(operation: LinearOperation, shape: Shape, message: Shape, relu: bool) -> PackedMaps:
        """Pack an operation for inputs of ``shape`` (N, C, H, W) and messages (maps · N, M, Ho, Wo)."""
        layer, dtype = operation.layer, operation.dtype
        assert isinstance(layer, Convolution)
        own, stabilizer = operation.own, operation.rule.stabilizer
        bases = [basis for term, recipe in operation.recipes.items() if term != own for _, basis in recipe]
        wanted = [term for terms in operation.groups for term, _ in terms]
        alone = own not in (*bases, *wanted) and not operation.masked
        # One product to a group, read as it is and by nobody else: then its ε can be part of its bias.
        plain = all(len(terms) == 1 and terms[0][1] == 1.0 for terms in operation.groups)
        plain = plain and bases == wanted and len(set(wanted)) == len(wanted)
        signs = [_sign(term, stabilizer, operation) for term in wanted]
        stabilized = alone and plain and all(signs)
        derived = _derived(operation, stabilizer.epsilon if stabilized and isinstance(stabilizer, Stabilizer) else 0.0)
        relu = relu and alone and not derived
        forward = {}
        for term in operation.evaluated:
            if term.input in FIXED_PARTS or term in derived:
                continue
            weight, bias = operation.rounded(term), operation.bias(term)
            if stabilized and term != own:
                assert isinstance(stabilizer, Stabilizer)
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                bias = bias.double() + signs[wanted.index(term)] * stabilizer.epsilon
            bias = None if bias is None else bias.to(dtype)
            forward[term] = pack_forward(layer, weight, bias, shape, relu and term == own)

        def back(weight: Tensor, channels: int) -> Callable[[Tensor], Tensor]:
            sent = (message[0], weight.shape[0], *message[2:])
            return pack_transposed(layer, weight, (message[0], channels, *shape[2:]), sent)

        backward = {part: [back(weight, shape[1]) for weight in operation.returned(part)] for part in operation.inputs}
        heatmap = None if operation.summed is None else back(operation.summed, 1)
        return PackedMaps(forward, derived, backward, heatmap, relu, stabilized)


def _derived(operation: LinearOperation, epsilon: float) -> dict[Term, tuple[Term, Term, float]]:
    """αβ's negative products as the layer's own output less the positive ones, instead of a third convolution.

    ``epsilon``: what the positive ones hold of it, and with it the difference, of which more than −ε is rounding: rounding
    in float32 of the larger two, which costs the β share of units whose negative products are small beside their positive
    ones some digits, and nobody else. In bfloat16 it would cost all of them.
    """
    own = operation.own
    bias = (None, None) if own.bias is None else (POSITIVE, NEGATIVE)
    plus, minus = (Term(own.input, own.own, part, b) for part, b in zip((POSITIVE, NEGATIVE), bias, strict=True))
    there = {own, plus, minus} <= set(operation.evaluated)
    return {minus: (own, plus, -epsilon)} if there and operation.dtype == torch.float32 else {}


def _sign(term: Term, stabilizer: Stabilizer | ZeroGuard, operation: LinearOperation) -> int:
    """The sign of ε in a term's denominator, if it is known beforehand, else 0.

    Where a product of parts is never above zero, ε has its sign: at zero itself every product is zero, whatever divides it.
    """
    if isinstance(stabilizer, ZeroGuard) or term.input in FIXED_PARTS:
        return 0
    if not stabilizer.signed:
        return 0 if operation.may_vanish else 1
    input_sign = {"x": int(operation.nonnegative), "x+": 1, "x-": -1}[term.input]
    weight_sign = 1 if term.weight == POSITIVE else -1 if term.weight == NEGATIVE else 0
    sign = input_sign * weight_sign
    return sign if term.bias in (None, {1: POSITIVE, -1: NEGATIVE}.get(sign)) else 0


def quotient(numerator: Tensor | float, z: Tensor) -> Tensor:
    """``numerator / z``, in the memory of z."""
    if torch.compiler.is_compiling():
        # torch 2.11 does not compile ``out=`` memory with the channels last; without the copy bfloat16 takes 16 % longer.
        return z.copy_(numerator / z)
    above = numerator if isinstance(numerator, Tensor) else torch.tensor(numerator, dtype=z.dtype)
    return torch.div(above, z, out=z)


def _of_layer(layer: Linear, parameters: Parameters) -> dict[str, Tensor]:
    norm = layer.norm
    of_norm = (norm.mean, norm.variance, norm.weight, norm.bias) if norm is not None else ()
    return {path: parameters[path] for path in (layer.weight, layer.bias, *of_norm) if path is not None}


def _combine(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    factor, total = terms[0]
    total = total if factor == 1.0 else total * factor
    for factor, value in terms[1:]:
        total = total + value if factor == 1.0 else total + value * factor
    return total


def transposed_convolution(s: Tensor, weight: Tensor, layer: Convolution, shape: Shape, groups: int) -> Tensor:
    """``Aᵀ(s, weight)`` onto an input of ``shape`` (channels, *spatial), for a convolution's geometry."""
    geometry = zip(shape[1:], s.shape[2:], layer.stride, layer.padding, layer.dilation, weight.shape[2:], strict=True)
    rest = tuple(n - ((m - 1) * st - 2 * p + d * (k - 1) + 1) for n, m, st, p, d, k in geometry)
    return torch.convolution(s, weight, None, layer.stride, layer.padding, layer.dilation, True, rest, groups)


# Pools --------------------------------------------------------------------------------------------------------------


class AverageMap:
    """A mean over windows and its transpose, as one small matrix for each spatial axis, bound to an input shape.

    Where windows tile an axis evenly the matrix is not needed: its transpose repeats.
    """

    def __init__(self, matrices: Sequence[Tensor], forward: Callable[[Tensor], Tensor] | None = None) -> None:
        self.matrices = list(matrices)  # out × in
        self.native = forward
        self.tiles = [_tile(matrix) for matrix in self.matrices]

    def forward(self, x: Tensor) -> Tensor:
        """N × C × *in → N × C × *out."""
        if self.native is not None:
            return self.native(x)
        return self._contract(x, [matrix.t() for matrix in self.matrices])

    def transpose(self, s: Tensor) -> Tensor:
        """N × C × *out → N × C × *in."""
        if any(tile is None for tile in self.tiles):
            return self._contract(s, self.matrices)
        axes = len(self.matrices)
        s = s / float(torch.Size(tile or 1 for tile in self.tiles).numel())
        last = s.movedim(1, -1)  # N × *out × C: repeats are whole rows of channels
        sizes = [last.shape[0]]
        for axis, tile in enumerate(self.tiles):
            last = last.unsqueeze(2 * axis + 2)
            sizes += [last.shape[2 * axis + 1], tile or 1]
        last = last.expand(*sizes, last.shape[-1])
        shape = [matrix.shape[1] for matrix in self.matrices]
        return last.reshape(last.shape[0], *shape, last.shape[-1]).movedim(-1, 1) if axes else s

    def _contract(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(matrices):
            x = torch.tensordot(x, matrix.to(x.dtype), ([axis + 2], [0])).movedim(-1, axis + 2)
        return channels_last(x)


def _tile(matrix: Tensor) -> int | None:
    """How many elements each output averages, if they tile the axis without rest."""
    outputs, inputs = matrix.shape
    if inputs % outputs:
        return None
    tile = inputs // outputs
    even = torch.eye(outputs, dtype=matrix.dtype, device=matrix.device).repeat_interleave(tile, 1) / tile
    return tile if torch.equal(even, matrix) else None


def average_map(layer: Average, shape: Shape, like: Tensor) -> AverageMap:
    """The map of an average pool on inputs of ``shape`` (channels, *spatial)."""
    if isinstance(layer, AveragePool):
        geometry = zip(shape[1:], layer.kernel, layer.stride, layer.padding, strict=True)
        matrices = [_pool_matrix(layer, n, k, s, p) for n, k, s, p in geometry]
        if layer.divisor is not None:
            matrices = [(matrix != 0).double() for matrix in matrices]
            matrices[0] = matrices[0] / layer.divisor
    elif isinstance(layer, AdaptiveAveragePool):
        probe = torch.empty(1, 1, *shape[1:], device="meta")
        sizes = fill_sizes(layer.size, probe)
        matrices = [
            F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[:, None], m)[:, 0].t()
            for n, m in zip(shape[1:], sizes, strict=True)
        ]
    else:
        assert isinstance(layer, Mean)
        gone = {dimension % (len(shape) + 1) for dimension in layer.dimensions}
        matrices = [
            torch.full((1, n), 1 / n, dtype=torch.float64) if axis + 2 in gone else torch.eye(n, dtype=torch.float64)
            for axis, n in enumerate(shape[1:])
        ]
    placed = [matrix.to(like.device, accumulation_dtype(like.dtype)).contiguous() for matrix in matrices]
    return AverageMap(placed, lambda x: layer.forward((x,), {}))


def _pool_matrix(layer: AveragePool, n: int, k: int, s: int, p: int) -> Tensor:
    """What 1-D pooling makes of unit vectors: out × in."""
    rows = F.avg_pool1d(torch.eye(n, dtype=torch.float64)[:, None], k, s, p, layer.ceil_mode, layer.count_include_pad)
    return rows[:, 0].t()


class BlockMap:
    """The average that stands in for a max-pool under *blocks*, and its transpose, bound to an input shape.

    Output o answers for the block starting at o · stride, clipped to the input, or for the pool's own window where that
    is empty (or has nothing ``live``, 1 × channels × …); the two kinds are kept apart by a mask.
    """

    def __init__(
        self, layer: MaxPool | AdaptiveMaxPool, shape: Shape, outputs: Shape, like: Tensor, live: Tensor | None = None
    ) -> None:
        def placed(rows: list[list[int]], n: int) -> Tensor:
            matrix = torch.zeros(len(rows), n, dtype=torch.float64)
            for row, members in enumerate(rows):
                matrix[row, members] = 1 / len(members) if members else 0.0
            return matrix.to(like.device, accumulation_dtype(like.dtype))

        sizes = shape[1:]
        windows = _own_windows(layer, sizes, outputs)
        blocks = windows
        if isinstance(layer, MaxPool):
            geometry = zip(sizes, outputs, layer.stride, strict=True)
            blocks = [[list(range(o * s, min((o + 1) * s, n))) for o in range(m)] for n, m, s in geometry]
        self.blocks = AverageMap([placed(rows, n) for rows, n in zip(blocks, sizes, strict=True)])
        if all(tile is not None for tile in self.blocks.tiles):
            tiles = tuple(tile or 1 for tile in self.blocks.tiles)
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(tiles) - 1]
            # On a CPU torch has no three-dimensional one in bfloat16.
            self.blocks.native = None if len(tiles) == 3 else lambda x: pool(x, tiles)
        present = torch.ones(1, 1, *sizes, dtype=like.dtype, device=like.device) if live is None else live
        filled = (self.blocks.forward(present) > 0).to(like.dtype)
        self.windows: AverageMap | None = None
        if not bool(filled.all()):
            self.filled = filled
            self.windows = AverageMap([placed(rows, n) for rows, n in zip(windows, sizes, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """N × C × *in → N × C × *out."""
        z = self.blocks.forward(x)
        return z if self.windows is None else z * self.filled + self.windows.forward(x) * (1 - self.filled)

    def transpose(self, s: Tensor) -> Tensor:
        """N × C × *out → N × C × *in."""
        if self.windows is None:
            return self.blocks.transpose(s)
        return self.blocks.transpose(s * self.filled) + self.windows.transpose(s * (1 - self.filled))


def _own_windows(layer: MaxPool | AdaptiveMaxPool, sizes: Shape, outputs: Shape) -> list[list[list[int]]]:
    if isinstance(layer, AdaptiveMaxPool):
        return [
            [list(range(o * n // m, -((o + 1) * n // -m))) for o in range(m)]
            for n, m in zip(sizes, outputs, strict=True)
        ]
    geometry = zip(sizes, outputs, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
    return [
        [[i for j in range(k) if 0 <= (i := o * s - p + j * d) < n] for o in range(m)] for n, m, k, s, p, d in geometry
    ]


class ProportionalPool:
    """A pool that shares relevance in proportion to its (non-negative) inputs, bound to an input shape.

    ``zeros`` (bool, 1 × …): what is zero by structure in its input, and to a zero-guard not valid.
    """

    def __init__(
        self, layer: MaxPool | AdaptiveMaxPool | Average, rule: PoolRule, shape: Shape, outputs: Shape,
        nonnegative: bool, like: Tensor, zeros: Tensor | None = None,
    ) -> None:  # fmt: skip
        assert rule.stabilizer is not None
        self.layer, self.stabilizer, self.dtype = layer, rule.stabilizer, like.dtype
        self.is_average = isinstance(layer, Average)
        self.live = None if zeros is None else (~zeros).to(like.dtype)
        self.map: AverageMap | BlockMap = (
            average_map(layer, shape, like)
            if isinstance(layer, Average)
            else BlockMap(layer, shape, outputs[1:], like, self.live)
        )
        signed = isinstance(self.stabilizer, Stabilizer) and self.stabilizer.signed
        self.clamps = not signed and not nonnegative
        self.factored = not self.clamps
        self.drops_axes = isinstance(layer, Mean) and not layer.keepdim
        self.valid: Tensor | None = None
        if isinstance(self.stabilizer, ZeroGuard):
            ones = torch.ones(1, 1, *shape[1:], dtype=like.dtype, device=like.device)
            valid = self._with_axes(self.map.forward(ones if self.live is None else self.live), shape)
            self.valid = valid.masked_fill(valid == 0, 1.0)  # a window of padding, whose relevance is lost

    def forward(self, x: Tensor) -> tuple[Tensor, Gates]:
        """The pool's own output, and its gates."""
        y = self.layer.forward((x,), {})
        z = y
        if self.clamps:
            z = self.map.forward(x.clamp(min=0))
        elif not self.is_average:
            z = self.map.forward(x)
        z = z.to(accumulation_dtype(self.dtype))
        if isinstance(self.stabilizer, ZeroGuard):
            return y, stored(*guarded(z, self.stabilizer, 1.0), self.dtype)
        return y, Gates(((1.0 / stabilized(z, self.stabilizer, False)).to(self.dtype),))

    def backward(self, relevance: Tensor, gates: Gates, x: Tensor | None, shape: Shape) -> Message:
        """The message to the input, of ``shape`` (without batch)."""
        acc = self.map.transpose(self._with_axes(times(relevance, gates.groups[0]), shape))
        dense = None
        if gates.dead is not None:
            assert self.valid is not None
            dense = self.map.transpose(self._with_axes(times(relevance, gates.dead), shape) / self.valid)
            dense = dense if self.live is None else dense * self.live
        if self.factored:
            return acc, dense
        assert x is not None
        share = times(acc, x.clamp(min=0))
        return None, share if dense is None else share + dense

    def _with_axes(self, s: Tensor, shape: Shape) -> Tensor:
        if not self.drops_axes:
            return s
        assert isinstance(self.layer, Mean)
        for axis in sorted(dimension % (len(shape) + 1) for dimension in self.layer.dimensions):
            s = s.unsqueeze(axis)
        return s


class WinnerPool:
    """A max-pool that hands relevance to the maximum of each window."""

    factored = False

    def __init__(self, layer: MaxPool | AdaptiveMaxPool) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima and where each lies in its flattened plane (int64)."""
        y, indices = self.layer.with_indices(x)
        assert indices is not None
        return y, indices

    def backward(self, relevance: Tensor, indices: Tensor, shape: Shape) -> Message:
        """The message to the input, of ``shape`` (without batch)."""
        if len(shape) == 3 and isinstance(self.layer, MaxPool):
            indices = indices.repeat(relevance.shape[0] // indices.shape[0], 1, 1, 1)
            like = channels_last(relevance.new_empty(relevance.shape[0], *shape))
            layer = self.layer
            geometry = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
            r = torch.ops.aten.max_pool2d_with_indices_backward(relevance, like, *geometry, indices)
            return None, r
        flat = relevance.flatten(2)
        indices = indices.flatten(2).repeat(flat.shape[0] // indices.shape[0], 1, 1)
        planes = flat.new_zeros(flat.shape[0], shape[0], torch.Size(shape[1:]).numel())
        return None, planes.scatter_add(2, indices, flat).unflatten(2, shape[1:])


# Merges and rearrangements --------------------------------------------------------------------------------------------


class MergeOperation:
    """A merge under a split, bound to what is constant in its branches."""

    def __init__(self, layer: Merge, split: Split, zeros: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        self.skip, self.split, self.dtype = layer.skip, split, dtype
        self.zeros = zeros if split.complementary else (None, None)
        self.proportional = split.proportional and all(zeros is None for zeros in self.zeros)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, list[Tensor | float]]:
        """The sum and the weights of both branches, in float32."""
        wide = accumulation_dtype(self.dtype)
        branches = (first.to(wide), second.to(wide))
        residual, skip = 1 - self.skip, self.skip
        weights: list[Tensor | float] = [0.0, 0.0]
        weights[residual], weights[skip] = self.split.weights(branches[residual], branches[skip])
        for one, other in ((0, 1), (1, 0)):
            zeros = self.zeros[one]
            if zeros is not None:
                weights[one] = torch.where(zeros, 0.0, weights[one])
                weights[other] = torch.where(zeros, 1.0, weights[other])
        return first + second, weights


def move_back(layer: Layer, relevance: Tensor | None, shape: Shape) -> Tensor | None:
    """The transpose of a rearrangement of elements, onto an input of ``shape`` (without batch)."""
    if relevance is None:
        return None
    if isinstance(layer, Pad):
        return F.pad(relevance, tuple(-amount for amount in layer.amounts))
    if isinstance(layer, Slice):
        whole = relevance.new_zeros(relevance.shape[0], *shape)
        whole[layer.index] = relevance
        return whole
    return relevance.reshape(relevance.shape[0], *shape)
