"""Units as fused kernels: forward with gates, and relevance settled in the kernel that computes its last message."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lrp_fast.backends.passes import Arrived, Passes, times
from lrp_fast.backends.torch import (
    Gates,
    LinearOperation,
    MergeOperation,
    ProportionalPool,
    Term,
    WinnerPool,
    channels_last,
    part_of,
    transposed_convolution,
)
from lrp_fast.backends.triton.choice import Choice
from lrp_fast.backends.triton.launch import configuration, launch
from lrp_fast.kernels.common import CONSTANT_SPLITS, Arrival, Denominators, End, pack, unpack
from lrp_fast.kernels.spatial_conv import pack_backward
from lrp_fast.layers import Convolution, MaxPool, Shape
from lrp_fast.rules import FIXED_PARTS, InputPart, Stabilizer, ZeroGuard
from lrp_fast.scopes import current_device

Ends = tuple[End, ...]
GUARDED = Denominators("own", stabilizer="guard")
"""Of a pool under a zero-guard, whose one denominator is its average."""


def arrive(acc: Tensor | None, arrival: Arrival) -> list[Tensor]:
    """Settle what has arrived in a pass of its own (NHWC)."""
    return launch("arrive", [acc], arrival=arrival)


def channel_sum(relevance: Tensor) -> Tensor:
    """The sum over channels, N × H × W float32, of relevance N × C × H × W."""
    return launch("channel_sum", [pack(relevance)])[0]


def quantize(heatmap: Tensor, levels: int) -> Tensor:
    """Heat quantization of maps … × H × W, float32 and finite, to one of ``levels`` levels each."""
    maps = heatmap.reshape(-1, *heatmap.shape[-2:]).contiguous()
    with current_device(maps.device):
        return launch("quantize", [maps], configuration(levels=levels))[0].reshape(heatmap.shape)


def gate_ends(gates: Tensor, denominators: Denominators) -> Ends:
    """Through the gates of a linear layer, whose dead relevance, under a zero-guard, all channels of a window share."""
    if denominators.stabilizer == "guard":
        return (End(gates, part="guarded"),)
    return (End(gates, denominators.groups),)


def all_gates(gates: Gates) -> tuple[Tensor, ...]:
    """The torch backend's gates, and after them what its zero-guard spreads."""
    return gates.groups if gates.dead is None else (*gates.groups, gates.dead)


class TritonPasses(Passes):
    """Passes whose relevance is settled by a kernel. ``shape``: of the unit's output, without batch.

    ``over_value``: the unit's own output is in its gates already, and relevance arrives without it. What leaves is NHWC.
    """

    settles = True
    over_value = False
    adds = False
    shape: Shape
    dtype: torch.dtype

    def ends(self, saved: object) -> Ends:
        """Where relevance that arrives goes on to: what the forward pass saved."""
        assert isinstance(saved, tuple)
        return saved

    def left(self, outputs: list[Tensor], saved: object) -> Sequence[Any]:
        """What leaves, from the outputs of all :meth:`ends`."""
        return outputs

    def arrival(self, arrived: Arrived, value: Tensor | None, ends: Ends) -> Arrival:
        """For the kernel that computes the last message to this unit: what arrived before, and where all goes on to."""
        previous, stride = arrived.strided or (arrived.acc, 1)
        if [arrived.acc, arrived.product, arrived.strided].count(None) < 2 or arrived.product is not None:
            previous, stride = arrived.factored(self.shape), 1
        return Arrival(
            ends,
            None if self.over_value or value is None else pack(value),
            None if previous is None else pack(previous.to(self.dtype)),
            stride,
            None if arrived.dense is None else pack(arrived.dense.to(self.dtype).expand(-1, *self.shape)),
            arrived.even,
        )

    def settle(self, arrived: Arrived, value: Tensor | None, saved: object) -> Sequence[Any]:
        return self.left(self.settled(arrived, value, self.ends(saved)), saved)

    def settled(self, arrived: Arrived, value: Tensor | None, ends: Ends) -> list[Tensor]:
        """One output for each end, by a pass of its own."""
        if arrived.product is not None or (arrived.acc is None and arrived.dense is None):
            arrived = Arrived(arrived.factored(self.shape), dense=arrived.added(self.shape))
        acc = None if arrived.acc is None else pack(arrived.acc.to(self.dtype))
        return arrive(acc, self.arrival(replace(arrived, acc=None), value, ends))

    def send_into(
        self, leaving: Sequence[Any], receiver: Passes, arrived: Arrived, value: Tensor | None, saved: object
    ) -> Sequence[Any]:
        assert isinstance(receiver, TritonPasses)
        product = arrived.product if self.adds else None
        before = arrived if product is None else replace(arrived, product=None)
        arrival = receiver.arrival(before, value, receiver.ends(saved))
        outputs = self.send_settled(leaving, arrival) if product is None else self.send_added(leaving, product, arrival)
        if outputs is not None:
            return receiver.left(outputs, saved)
        arrived.add(self.send(leaving, None, False), receiver.shape)
        return receiver.settle(arrived, value, saved)

    @abstractmethod
    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        """Send and settle, one output for each end; None where that does not go in one piece."""

    def send_added(
        self, leaving: Sequence[Any], product: tuple[Tensor, Tensor], arrival: Arrival
    ) -> list[Tensor] | None:
        """:meth:`send_settled` with a product added to what is sent, where the passes can (``adds``)."""
        raise NotImplementedError


# Linear layers ----------------------------------------------------------------------------------------------------------


class SettledLinear(TritonPasses):
    """A linear layer that the torch backend runs; its relevance is settled by a kernel."""

    def __init__(self, operation: LinearOperation, relu: bool, over_value: bool, x_shape: Shape, shape: Shape) -> None:
        self.operation, self.relu, self.over_value = operation, relu, over_value
        self.x_shape, self.shape, self.dtype = x_shape, shape, operation.dtype
        self.service = "torch, gates by triton"

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
        self.service = "triton: library + gate / torch"
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
            weight[index] += factor * part_of(self.operation.weights(term.own)[0], term.weight)
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


_PACKED: weakref.WeakKeyDictionary[LinearOperation, Weights] = weakref.WeakKeyDictionary()


def packed_weights(operation: LinearOperation, denominators: Denominators) -> Weights:
    """The weights of an operation, packed once: an operation is bound to its weights, and outlives the shapes."""
    if operation not in _PACKED:
        _PACKED[operation] = _pack(operation, denominators)
    return _PACKED[operation]


def _pack(operation: LinearOperation, denominators: Denominators) -> Weights:
    layer, stacks = operation.layer, operation.stacks["x"]
    assert isinstance(layer, Convolution)
    # The kernels sum W⁺ and W⁻ in float32, where the torch backend evaluates W beside them.
    skipped = operation.weight_shape[0] if denominators.kind == "signs" else 0
    bias = None
    if any(found is not None for _, _, found in stacks):
        biases = [w.new_zeros(w.shape[0]) if found is None else found for _, w, found in stacks]
        bias = torch.cat(biases)[skipped:]
    weight = torch.cat([weight for _, weight, _ in stacks])[skipped:]
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
        self.weights = packed_weights(operation, denominators)
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

    def raw(self, x: Tensor) -> Tensor:
        """The library's convolution with stacked weights, without bias: N × H × W × S · C."""
        layer = self.layer
        geometry = (layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), layer.groups)
        return pack(torch.convolution(x.to(self.operation.dtype), self.weights.library, None, *geometry))

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
        return arrive(pack(self._library(s)), arrival) if self.back.way == "library" else self._launch(s, arrival)

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


def is_pointwise(layer: Convolution, operation: LinearOperation) -> bool:
    """A 1×1 convolution without padding or groups: a matrix product."""
    kernel = operation.weight_shape[2:]
    square = len(set(layer.stride)) == 1
    return tuple(kernel) == (1, 1) and layer.groups == 1 and not any(layer.padding) and square


def _way(kernel: str, choice: Choice) -> str:
    return f"{kernel}_conv" if choice.way == "fused" else "library + arrive"


# Merges -----------------------------------------------------------------------------------------------------------------


class FusedMerge(TritonPasses):
    """``h = ReLU(F + S)`` in the epilogue of a branch's last layer; relevance goes on through both branches' gates.

    ``branches``: each branch's last layer, where that is linear and the merge alone reads it. ``choice``: that layer's
    kernel with the merge in its epilogue, which multiplies for both branches where both end in 1×1 convolutions; or the
    library's convolutions, the merge behind them.
    """

    def __init__(
        self, operation: MergeOperation, relu: bool, branches: Sequence[FusedLinear | None], shape: Shape,
        choice: Choice,
    ) -> None:  # fmt: skip
        self.operation, self.relu, self.shape, self.branches = operation, relu, shape, tuple(branches)
        self.takes = [branch is not None for branch in branches]
        self.this = max(place for place, branch in enumerate(branches) if branch is not None)
        self.other = 1 - self.this
        last = self.branches[self.this]
        assert last is not None
        self.last, self.beside, self.dtype = last, self.branches[self.other], last.dtype
        self.fuses = choice.way == "fused" and fuses(last)
        self.multiplies = self.fuses and self.beside is not None and last.pointwise and self.beside.pointwise
        split = operation.split.name
        values = {
            "denominators": last.denominators, "split": split, "relu": relu,
            "is_residual": self.this != operation.skip, "other_linear": self.beside is not None,
        }  # fmt: skip
        self.merge = configuration(**values)
        stride = self.beside.layer.stride[0] if self.beside is not None and self.multiplies else 1
        tile = {"precision": last.precision, "blocks": choice.blocks, "other_stride": stride}
        self.merged = configuration(**values, **last.geometry, **tile)
        constant = CONSTANT_SPLITS.get(split, (1.0, 1.0))
        self.weights = (constant[1], constant[0]) if operation.skip == 0 else constant
        beside = "" if self.beside is None else ", for both branches" if self.multiplies else ", beside the library"
        self.service = f"triton: {last.kernel}_conv{beside}" if self.fuses else "triton: library + merge"

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        x, y = sources[self.this], sources[self.other]
        beside, last = self.beside, self.last
        weight = bias = other_limit = None
        if beside is None or self.multiplies:
            other = pack(y.to(self.dtype))
        else:
            other = beside.raw(y)
            other_limit = beside.limit(other)
        if beside is not None:
            bias = beside.weights.bias
        if beside is not None and self.multiplies:
            weight, other_limit = beside.weights.forward, beside.product_limit(other)
        if self.fuses:
            x = pack(x.to(self.dtype))
            limits = [last.product_limit(x), other_limit]
            tensors = [x, last.weights.forward, last.weights.bias, other, bias, weight, *limits]
            merged, *gates = launch(f"{last.kernel}_merged", tensors, self.merged)
        else:
            stacked = last.raw(x)
            tensors = [stacked, last.weights.bias, last.limit(stacked), other, bias, other_limit]
            merged, *gates = launch("merge", tensors, self.merge)
        saved: list[Ends] = [(End(scale=weight),) for weight in self.weights]
        saved[self.this] = gate_ends(gates[0], self.last.denominators)
        if len(gates) > 1:
            saved[self.other] = (End(gates[1]),) if beside is None else gate_ends(gates[1], beside.denominators)
        return unpack(merged), [ends if weight else () for ends, weight in zip(saved, self.weights, strict=True)]

    def ends(self, saved: object) -> Ends:
        assert isinstance(saved, list)
        return tuple(end for ends in saved for end in ends)

    def left(self, outputs: list[Tensor], saved: object) -> Sequence[Any]:
        assert isinstance(saved, list)
        given = iter(outputs)
        counts = [sum(2 if end.part == "guarded" else 1 for end in ends) for ends in saved]
        return [[next(given) for _ in range(count)] or None for count in counts]

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        raise NotImplementedError("what leaves a merge is at its branches already")

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        raise NotImplementedError("what leaves a merge is at its branches already")


# Pools ------------------------------------------------------------------------------------------------------------------


class FusedPool(TritonPasses):
    """A pool that shares relevance in proportion, over blocks: a max-pool's, or windows that do not overlap."""

    def __init__(self, operation: ProportionalPool, block: tuple[int, ...], x_shape: Shape, shape: Shape) -> None:
        self.operation, self.x_shape, self.dtype = operation, x_shape, operation.dtype
        self.shape = (*shape, 1, 1)[:3] if len(shape) < 3 else shape
        self.guard = operation.stabilizer if isinstance(operation.stabilizer, ZeroGuard) else None
        height, width = x_shape[1:]
        self.backward = configuration(stride=block, height=height, width=width)
        self.gate = configuration(denominators=GUARDED, relu=False, over_value=False)
        self.service = "triton: pool"
        layer = operation.layer
        self.maximum: str | None = None
        if isinstance(layer, MaxPool):
            geometry: dict[str, Any] = {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            geometry |= {"dilation": layer.dilation, "out_size": shape[1:]}
            if isinstance(operation.stabilizer, Stabilizer):
                geometry |= {"epsilon": operation.stabilizer.epsilon, "signed": operation.stabilizer.signed}
            self.maximum = configuration(**geometry)
        else:
            self.service = "torch, then triton: pool"

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        x = sources[0].to(self.dtype)
        if self.maximum is None:
            value, gates = self.operation.forward(x)
            return value, tuple(End(pack(gate.reshape(len(value), *self.shape))) for gate in all_gates(gates))
        if self.guard is None:
            value, gate = launch("max_pool", [pack(x)], self.maximum)
            return unpack(value), (End(gate),)
        value, z = launch("max_pool_average", [pack(x)], self.maximum)
        limit = z.flatten(1).amax(1) * self.guard.threshold
        _, gate = launch("gate", [z, None, limit, None], self.gate)
        gate = gate.to(self.dtype)
        return unpack(value), (End(gate, part="alive"), End(gate, part="dead"))  # of which each channel has its own

    def settle(self, arrived: Arrived, value: Tensor | None, saved: object) -> Sequence[Any]:
        whole = [x if x is None else x.reshape(x.shape[0], *self.shape) for x in (arrived.acc, arrived.dense, value)]
        return super().settle(replace(arrived, acc=whole[0], dense=whole[1]), whole[2], saved)

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        acc, *dead = (self._launch(tensor, Arrival((End(),)))[0] for tensor in leaving)
        return Arrived(acc=unpack(acc), dense=unpack(dead[0]) if dead else None)

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        s, *dead = leaving
        if dead:
            (dense,) = self._launch(dead[0], Arrival((End(),)))
            arrival = replace(arrival, dense=dense if arrival.dense is None else arrival.dense + dense)
        return self._launch(s, arrival)

    def _launch(self, s: Tensor, arrival: Arrival) -> list[Tensor]:
        return launch("block_backward", [s], self.backward, arrival)


class FusedWinnerPool(TritonPasses):
    """A max-pool that hands relevance to the first maximum of each window."""

    def __init__(self, operation: WinnerPool, dtype: torch.dtype, x_shape: Shape, shape: Shape) -> None:
        layer = operation.layer
        assert isinstance(layer, MaxPool)
        self.dtype, self.x_shape, self.shape = dtype, x_shape, shape
        geometry = {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
        geometry |= {"dilation": layer.dilation}
        self.onward = configuration(**geometry, out_size=shape[1:])
        self.backward = configuration(**geometry, height=x_shape[1], width=x_shape[2])
        self.service = "triton: pool"

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        value, winner = launch("winner_pool", [pack(sources[0].to(self.dtype))], self.onward)
        return unpack(value), winner

    def ends(self, saved: object) -> Ends:
        return (End(),)

    def left(self, outputs: list[Tensor], saved: object) -> Sequence[Any]:
        return [*outputs, saved]

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        return Arrived(dense=unpack(self._launch(leaving, Arrival((End(),)))[0]))

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        # What it sends is relevance already, and not to be multiplied by the receiver's value.
        return self._launch(leaving, arrival) if arrival.value is None else None

    def _launch(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor]:
        return launch("winner_backward", leaving, self.backward, arrival)
