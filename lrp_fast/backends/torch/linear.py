"""Linear layers: their affine maps with stacked or packed weights, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lrp_fast.backends.passes import times, times_plus
from lrp_fast.backends.torch.gates import (
    Gates,
    Message,
    accumulation_dtype,
    channels_last,
    guarded,
    stabilized,
    stored,
)
from lrp_fast.backends.torch.packed import PackedConvolution, pack_forward, pack_transposed, packs
from lrp_fast.layers import Convolution, Dense, Linear, Parameters, Shape
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

FAINT = 0.01
"""Negative weights of so small a share of a channel's positive ones are no difference of sums."""


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
        products = [product for product in group.products if not (nonnegative and product.input == "x-")]
        whole = next((product for product in products if product.coefficient == 1.0), None)
        if group.bias is not None and self._biased and whole is None:
            raise ValueError(f"the rule {self.rule.name} has a bias, so it needs a product with the coefficient 1 beside it")
        terms = []
        for product in products:
            part: InputPart = "x" if nonnegative and product.input == "x+" else product.input
            bias = group.bias if self._biased and product is whole else None
            terms.append((Term(part, self.shared, product.weight, bias), product.coefficient))
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
        return torch.convolution(layer.padded(present), self.window, None, *geometry) * (shape[0] // groups)

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
    ones some digits, and nobody else; not done where the weights of a channel alone make them so. In bfloat16 it would cost all
    digits.
    """
    own = operation.own
    bias = (None, None) if own.bias is None else (POSITIVE, NEGATIVE)
    plus, minus = (Term(own.input, own.own, part, b) for part, b in zip((POSITIVE, NEGATIVE), bias, strict=True))
    if operation.dtype != torch.float32 or not {own, plus, minus} <= set(operation.evaluated):
        return {}
    positive, negative = (operation.weight(term).abs().flatten(1).sum(1) for term in (plus, minus))
    faint = (negative > 0) & (negative < FAINT * positive)
    return {} if bool(faint.any()) else {minus: (own, plus, -epsilon)}


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
    sizes = [n + extra for n, extra in zip(shape[1:], layer.extra or (0,) * (len(shape) - 1), strict=True)]
    geometry = zip(sizes, s.shape[2:], layer.stride, layer.padding, layer.dilation, weight.shape[2:], strict=True)
    rest = tuple(n - ((m - 1) * st - 2 * p + d * (k - 1) + 1) for n, m, st, p, d, k in geometry)
    r = torch.convolution(s, weight, None, layer.stride, layer.padding, layer.dilation, True, rest, groups)
    for axis, extra in enumerate(layer.extra, 2):
        r = r.narrow(axis, 0, r.shape[axis] - extra) if extra else r  # without what fell on the extra zeros
    return r
