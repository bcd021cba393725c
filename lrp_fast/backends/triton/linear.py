"""Linear layers as fused kernels: forward with gates, backward with what arrives settled behind the last product."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lrp_fast.backends.passes import Arrived, times
from lrp_fast.backends.torch import LinearOperation, Term, channels_last, transposed_convolution
from lrp_fast.backends.triton.choice import Choice
from lrp_fast.backends.triton.launch import configuration, launch
from lrp_fast.backends.triton.passes import TritonPasses, all_gates, arrive, gate_ends
from lrp_fast.kernels.common import Arrival, Denominators, End, pack, unpack
from lrp_fast.kernels.spatial_conv import pack_backward, settles
from lrp_fast.layers import Convolution, Shape
from lrp_fast.rules import FIXED_PARTS, InputPart, Stabilizer


class SettledLinear(TritonPasses):
    """A linear layer that the torch backend runs; its relevance is settled by a kernel."""

    def __init__(self, operation: LinearOperation, relu: bool, over_value: bool, x_shape: Shape, shape: Shape) -> None:
        self.operation, self.relu, self.over_value = operation, relu, over_value
        self.x_shape, self.shape, self.dtype = x_shape, shape, operation.dtype
        self.service, self.epilogue = "torch, gates by triton", f"{len(operation.groups)}"

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        value, z, output = self.operation.forward(sources[0])
        value = value.relu() if self.relu else value
        gates = self.operation.gates(z, output, value if self.over_value else 1.0)
        # A kernel counts the rows of value and gates alike, also where z is the same for every image.
        return value, tuple(End(pack(gate.expand(len(value), *gate.shape[1:]))) for gate in all_gates(gates))

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        tensors = [unpack(s) for s in leaving]
        groups = len(self.operation.groups)
        dead = tensors[groups] if len(tensors) > groups else None
        acc, dense = self.operation.send(tensors[:groups], dead, x, self.x_shape, heatmap)
        return Arrived(acc=acc, dense=dense)

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        return None


class PartedLinear(SettledLinear):
    """A layer whose rule looks at parts of its input, or at none of it, as first layers' do.

    The parts lie side by side as channels, so that one convolution gives the layer's own output and all its denominators,
    and one pass behind it their gates; what of a denominator is the same for every image is found once. Backward one
    transposed convolution sends to all parts; where it may, straight to the map.
    """

    def __init__(self, operation: LinearOperation, relu: bool, over_value: bool, x_shape: Shape, shape: Shape) -> None:
        super().__init__(operation, relu, over_value, x_shape, shape)
        layer, stabilizer = operation.layer, operation.rule.stabilizer
        assert isinstance(layer, Convolution)
        assert isinstance(stabilizer, Stabilizer)
        terms = [[(operation.own, 1.0)], *operation.groups]
        varying = {term.input for group in operation.groups for term, _ in group} - set(FIXED_PARTS)
        self.parts: list[InputPart] = ["x+", "x-"] if varying & {"x+", "x-"} else ["x"]
        stacked = [self._stacked(group) for group in (terms if varying else terms[:1])]
        self.weight = channels_last(torch.cat([weight for weight, _ in stacked]).to(self.dtype))
        self.bias = torch.cat([bias for _, bias in stacked]).float()
        self.fixed = self._fixed(terms[1])
        kind: Literal["own", "stacked", "apart"] = "own" if not varying else "apart" if len(terms) > 2 else "stacked"
        self.denominators = Denominators(kind, stabilizer.epsilon, stabilizer_form(operation))
        self.gate = configuration(denominators=self.denominators, relu=relu, over_value=over_value)
        self.service, self.epilogue = "triton: library + gate / torch", epilogue_of(self.denominators)
        self.direct = operation.summed is not None and layer.dilation == (1, 1)
        if operation.summed is not None and self.direct:
            self.summed = operation.summed[:, 0].permute(1, 2, 0).contiguous()  # kh × kw × C
            height, width = x_shape[1:]
            self.heatmap = configuration(stride=layer.stride, padding=layer.padding, height=height, width=width)
            self.service = "triton: library + gate / heatmap"
        elif varying:
            returned = [self._returned(part) for part in operation.inputs]
            self.returned = channels_last(torch.cat(returned, 1).to(self.dtype))  # G · C × parts · Cin × kh × kw
            self.service = "triton: library + gate / library"

    def _stacked(self, terms: Sequence[tuple[Term, float]]) -> tuple[Tensor, Tensor]:
        """The weight on all parts and the bias that terms share, float64."""
        shape = (self.shape[0], len(self.parts), *self.operation.weight_shape[1:])
        device = self.operation.device
        weight = torch.zeros(shape, dtype=torch.float64, device=device)
        bias = torch.zeros(shape[0], dtype=torch.float64, device=device)
        for term, factor in terms:
            if term.input in FIXED_PARTS:
                continue
            own, added = self.operation.affine(term)
            places = [self.parts.index(term.input)] if term.input in self.parts else range(len(self.parts))
            for place in places:  # all of x is the sum of its parts
                weight[:, place] += factor * own
            bias += 0 if added is None else factor * added
        return weight.flatten(1, 2), bias

    def _fixed(self, terms: Sequence[tuple[Term, float]]) -> Tensor | None:
        """What of a denominator does not depend on the image, H × W × C float32."""
        layer, found = self.operation.layer, None
        like = torch.empty(1, *self.x_shape, dtype=torch.float64, device=self.operation.device)
        for term, factor in terms:
            if term.input in FIXED_PARTS:
                weight, bias = self.operation.affine(term)
                bias = None if bias is None else bias.double()
                z = factor * layer.apply(
                    self.operation.constant_input(term.input, like).double(), weight.double(), bias
                )
                found = z if found is None else found + z
        return None if found is None else pack(found)[0].float()

    def _returned(self, part: InputPart) -> Tensor:
        """What sends the messages of all groups to a part: G · C × Cin × kh × kw, float64."""
        groups = len(self.operation.groups)
        weight = torch.zeros(groups, *self.operation.weight_shape, dtype=torch.float64, device=self.operation.device)
        for index, term, factor in self.operation.sent[part]:
            weight[index] += factor * self.operation.weight(term)
        return weight.flatten(0, 1)

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        x = sources[0].to(self.dtype)
        if len(self.parts) > 1:
            x = channels_last(torch.cat([x.clamp(min=0), x.clamp(max=0)], 1))
        stacked = pack(self.operation.layer.apply(x, self.weight))
        value, gates = launch("gate", [stacked, self.bias, None, self.fixed], self.gate)
        return unpack(value), gate_ends(gates, self.denominators)

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        if heatmap and self.direct:
            (even,) = launch("stem_heatmap", [leaving[0], self.summed], self.heatmap)
            return Arrived(dense=even.unsqueeze(1))
        inputs, layer = self.operation.inputs, self.operation.layer
        if set(inputs) <= {"one"}:
            return super().send(leaving, x, heatmap)
        assert isinstance(layer, Convolution)
        size = (len(inputs) * self.x_shape[0], *self.x_shape[1:])
        shares = transposed_convolution(unpack(leaving[0]), self.returned, layer, size, 1).chunk(len(inputs), 1)
        if self.operation.factored:
            return Arrived(acc=shares[0])
        messages = [times(share, self._part(part, x, share)) for part, share in zip(inputs, shares, strict=True)]
        return Arrived(dense=sum(messages[1:], messages[0]))

    def _part(self, part: InputPart, x: Tensor | None, like: Tensor) -> Tensor:
        if part in FIXED_PARTS:
            return self.operation.constant_input(part, like[:1])
        assert x is not None
        return x if part == "x" else x.clamp(min=0) if part == "x+" else x.clamp(max=0)


def stabilizer_form(operation: LinearOperation) -> Literal["signed", "plain", "vanishing", "guard"]:
    """The stabilizer of a rule in the kernels' terms."""
    stabilizer = operation.rule.stabilizer
    if not isinstance(stabilizer, Stabilizer):
        return "guard"
    return "signed" if stabilizer.signed else "vanishing" if operation.may_vanish else "plain"


class Weights(NamedTuple):
    """A convolution's weights in the layouts of the kernels and of the library, for all shapes of its input.

    ``forward``: S · C × Cin, or S · C × kh × kw × Cin / groups; ``backward``: Cin × G · C, or as ``pack_backward`` has it;
    ``library`` and ``transposed``: the same in the library's layout, (S · C or G · C) × Cin / groups × kh × kw.
    """

    forward: Tensor
    backward: Tensor
    library: Tensor
    transposed: Tensor
    bias: Tensor | None

    def halves(self) -> tuple[Weights, Weights]:
        """Of two stacks forward, each alone."""
        forward, library = self.forward.chunk(2), self.library.chunk(2)
        bias = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = (
            self._replace(forward=own, library=other, bias=added)
            for own, other, added in zip(forward, library, bias, strict=True)
        )
        return first, second


_PACKED: weakref.WeakKeyDictionary[LinearOperation, Weights] = weakref.WeakKeyDictionary()


def packed_weights(operation: LinearOperation, denominators: Denominators) -> Weights:
    """The weights of an operation, packed once: an operation is bound to its weights, and outlives the shapes."""
    if operation not in _PACKED:
        _PACKED[operation] = _pack(operation, denominators)
    return _PACKED[operation]


def _pack(operation: LinearOperation, denominators: Denominators) -> Weights:
    layer, stacks = operation.layer, operation.stacks["x"]
    assert isinstance(layer, Convolution)
    # αβ's are W, W⁺ and W⁻, of which the kernels leave out the last: in float32 it is what the others differ by.
    kept = denominators.stacks * operation.weight_shape[0]
    bias = None
    if any(found is not None for _, _, found in stacks):
        biases = [w.new_zeros(w.shape[0]) if found is None else found for _, w, found in stacks]
        bias = torch.cat(biases)[:kept]
    weight = torch.cat([weight for _, weight, _ in stacks])[:kept]
    library = weight
    if layer.groups > 1 and denominators.stacks > 1:
        # One convolution serves both stacks if the outputs of a group lie side by side.
        beside = weight.unflatten(0, (denominators.stacks, layer.groups, -1)).transpose(0, 1)
        library = beside.flatten(0, 2).contiguous(memory_format=torch.channels_last)
    transposed = torch.cat(operation.transposes["x"])
    if is_pointwise(layer, operation):
        forward, backward = weight.flatten(1).contiguous(), transposed.flatten(1).t().contiguous()
    else:
        forward = pack(weight)
        backward = pack_backward(pack(transposed), groups=layer.groups, gates=denominators.groups)
    return Weights(forward, backward, library, transposed, bias)


class FusedLinear(TritonPasses):
    """A convolution under a rule: stacked weights forward, with gates, and one transposed map backward.

    For each direction a :class:`Choice`: a kernel with the pass in its epilogue, or the library's convolution with the
    pass behind it. ``onward`` is None for the last layer of a branch, whose forward pass is its merge's.
    """

    def __init__(
        self, operation: LinearOperation, denominators: Denominators, relu: bool, over_value: bool,
        x_shape: Shape, shape: Shape, precision: str, onward: Choice | None, back: Choice,
    ) -> None:  # fmt: skip
        layer = operation.layer
        assert isinstance(layer, Convolution)
        self.operation, self.layer, self.denominators, self.guard = operation, layer, denominators, operation.guard
        self.relu, self.over_value, self.x_shape, self.shape = relu, over_value, x_shape, shape
        self.dtype = operation.dtype
        self.precision, self.onward, self.back = precision, onward, back
        self.pointwise = is_pointwise(layer, operation)
        self.kernel = "pointwise" if self.pointwise else "spatial"
        self.adds = self.pointwise and back.way == "fused" and layer.stride[0] == 1
        self.fuses = onward is not None and onward.way == "fused" and fuses(self)
        self._configure()
        self.weights, self.epilogue = packed_weights(operation, denominators), epilogue_of(denominators)
        first = "in its merge" if onward is None else f"{self.kernel}_conv" if self.fuses else "library + gate"
        ways = (first, _way(self.kernel, back))
        self.service = "triton: " + " / ".join(dict.fromkeys(ways))

    def _configure(self) -> None:
        layer = self.layer
        self.geometry: dict[str, Any] = {"stride": layer.stride[0]}
        if not self.pointwise:
            geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.geometry = geometry | {"groups": layer.groups}
        own = {"denominators": self.denominators, "relu": self.relu, "over_value": self.over_value}
        tile = {"precision": self.precision, "blocks": None if self.onward is None else self.onward.blocks}
        self.gated = configuration(**self.geometry, **own, **tile)
        width = self.shape[0] // layer.groups if layer.groups > 1 and self.denominators.stacks > 1 else 0
        self.gate = configuration(**own, group_width=width)
        backward: dict[str, Any] = {"precision": self.precision, "blocks": self.back.blocks}
        (channels, height, width) = self.x_shape
        if not self.pointwise:
            backward |= {**self.geometry, "height": height, "width": width}
        self.backward = configuration(**backward)
        limit = {"denominators": self.denominators, "factor": 1.0 if self.guard is None else self.guard.threshold}
        self.maximum = configuration(**limit)
        self.product_maximum = configuration(**limit, **self.geometry, precision=self.precision)
        kernel = self.operation.weight_shape[2:]
        window = {"kernel": tuple(kernel), "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.spread = configuration(**window, height=height, width=width, channels=channels)

    # Forward.

    def raw(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The library's convolution with stacked weights, or with one of its own, without bias: N × H × W × S · C."""
        layer = self.layer
        geometry = (layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), layer.groups)
        weight = self.weights.library if weight is None else weight
        return pack(torch.convolution(x.to(self.operation.dtype), weight, None, *geometry))

    def limit(self, stacked: Tensor) -> Tensor | None:
        """What counts as a zero denominator in each image, under a zero-guard: N."""
        if self.guard is None:
            return None
        return launch("image_maximum", [stacked, self.weights.bias], self.maximum)[0]

    def product_limit(self, x: Tensor) -> Tensor | None:
        """The same, before the layer has been multiplied out; ``x``: its input, NHWC."""
        if self.guard is None:
            return None
        return launch("pointwise_maximum", [x, self.weights.forward, self.weights.bias], self.product_maximum)[0]

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        x = sources[0].to(self.dtype)
        if self.fuses:
            x = pack(x)
            tensors = [x, self.weights.forward, self.weights.bias, self.product_limit(x)]
            value, gates = launch(f"{self.kernel}_gated", tensors, self.gated)
        else:
            stacked = self.raw(x)
            value, gates = launch("gate", [stacked, self.weights.bias, self.limit(stacked), None], self.gate)
        return unpack(value), gate_ends(gates, self.denominators)

    # Backward.

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        s, even = leaving[0], self._even(leaving)
        if self.back.way == "library":
            return Arrived(acc=self._library(s), even=even)
        if self.adds:
            return Arrived(product=(s, self.weights.backward), even=even)
        (acc,) = self._launch(s, Arrival((End(),)))
        if self.pointwise and self.layer.stride[0] > 1:
            return Arrived(strided=(unpack(acc), self.layer.stride[0]), even=even)
        return Arrived(acc=unpack(acc), even=even)

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        if self.pointwise and self.back.way == "fused" and self.layer.stride[0] > 1:
            return None
        s, arrival = leaving[0], self._with_even(leaving, arrival)
        if self.back.way == "library" or not settles(arrival, self.layer.groups, self.x_shape[0]):
            return arrive(pack(self._library(s)), arrival)
        return self._launch(s, arrival)

    def send_added(
        self, leaving: Sequence[Any], product: tuple[Tensor, Tensor], arrival: Arrival
    ) -> list[Tensor] | None:
        return self._launch(leaving[0], self._with_even(leaving, arrival), product)

    def _even(self, leaving: Sequence[Any]) -> Tensor | None:
        """What a zero-guard spreads, in each pixel of the input: N × H × W."""
        return launch("spread", [leaving[1]], self.spread)[0] if len(leaving) > 1 else None

    def _with_even(self, leaving: Sequence[Any], arrival: Arrival) -> Arrival:
        even = self._even(leaving)
        if even is None:
            return arrival
        return replace(arrival, even=even if arrival.even is None else arrival.even + even)

    def _launch(self, s: Tensor, arrival: Arrival, product: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        second = [*(product or (None, None))] if self.pointwise else []
        return launch(f"{self.kernel}_backward", [s, self.weights.backward, *second], self.backward, arrival)

    def _library(self, s: Tensor) -> Tensor:
        layer, groups = self.layer, self.denominators.groups
        if layer.groups == 1 or groups == 1:
            return transposed_convolution(unpack(s), self.weights.transposed, layer, self.x_shape, layer.groups)
        halves = zip(unpack(s).chunk(groups, 1), self.weights.transposed.chunk(groups), strict=True)
        first, second = (transposed_convolution(a, w, layer, self.x_shape, layer.groups) for a, w in halves)
        return first + second


def fuses(layer: FusedLinear) -> bool:
    """Whether the kernel of a layer can do its gates: a zero-guard looks at a whole image before the first of them."""
    return layer.guard is None or layer.pointwise


def epilogue_of(denominators: Denominators) -> str:
    """What tells kernels apart that are as fast for all else, such as ε."""
    return denominators.kind + ("guard" if denominators.stabilizer == "guard" else "")


def is_pointwise(layer: Convolution, operation: LinearOperation) -> bool:
    """A 1×1 convolution without padding or groups: a matrix product."""
    kernel = operation.weight_shape[2:]
    square = len(set(layer.stride)) == 1
    return tuple(kernel) == (1, 1) and layer.groups == 1 and not any(layer.padding) and square


def _way(kernel: str, choice: Choice) -> str:
    return f"{kernel}_conv" if choice.way == "fused" else "library + arrive"
