"""Merges as fused kernels: forward in the epilogue of a branch, and the split settled with the message to its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lrp_fast.backends.passes import Arrived
from lrp_fast.backends.torch import MergeOperation
from lrp_fast.backends.triton.choice import Choice
from lrp_fast.backends.triton.launch import configuration, launch
from lrp_fast.backends.triton.linear import FusedLinear, Weights, fuses
from lrp_fast.backends.triton.passes import Ends, TritonPasses, gate_ends
from lrp_fast.kernels.common import CONSTANT_SPLITS, Arrival, Denominators, Divisor, End, pack, unpack
from lrp_fast.layers import Shape


def merge_epilogue(last: FusedLinear, split: str, divides: bool) -> str:
    """The epilogue of a merge behind the last layer of one of its branches; divided, with how many channels are multiplied."""
    return f"{last.epilogue}+{split}{f'+divided{last.x_shape[0]}' if divides else ''}"


def may_divide(branches: Sequence[FusedLinear | None], split: str, vanishes: bool) -> bool:
    """Whether a merge need not keep its linear branch's gates.

    Its weight is known or found again (``vanishes``), and its one denominator, of positive products, is one more product of
    a 1×1 convolution's input, which is no wider than they are.
    """
    last = [branch for branch in branches if branch is not None]
    if len(last) != 1 or not (vanishes or split in CONSTANT_SPLITS):
        return False
    (branch,) = last
    narrow = branch.pointwise and branch.layer.stride == (1, 1) and branch.x_shape[0] <= branch.shape[0]
    return narrow and branch.denominators.kind == "stacked" and branch.guard is None


class FusedMerge(TritonPasses):
    """``h = ReLU(F + S)`` in the epilogue of a branch's last layer; relevance goes on through both branches' gates.

    ``branches``: each branch's last layer, where that is linear and the merge alone reads it. ``choice``: that layer's
    kernel with the merge in its epilogue, which multiplies for both branches where both end in 1×1 convolutions; or the
    library's convolutions, the merge behind them. ``vanishes``: where the merge's output is zero, so is its relevance; then
    a plain branch's weight is not kept, but found again backward from that output and the branch's, which are kept anyway.
    ``divides``: the linear branch's gates are not kept either: its weight is found again likewise, and its denominator
    multiplied from that layer's input (:class:`~lrp_fast.kernels.common.Divisor`).
    """

    def __init__(
        self, operation: MergeOperation, relu: bool, branches: Sequence[FusedLinear | None], shape: Shape,
        choice: Choice, vanishes: bool, divides: bool = False,
    ) -> None:  # fmt: skip
        self.operation, self.relu, self.shape, self.branches = operation, relu, shape, tuple(branches)
        self.choice = choice
        self.takes = [branch is not None for branch in branches]
        self.this = max(place for place, branch in enumerate(branches) if branch is not None)
        self.other = 1 - self.this
        last = self.branches[self.this]
        assert last is not None
        self.last, self.beside, self.dtype = last, self.branches[self.other], last.dtype
        self.fuses = choice.way == "fused" and fuses(last)
        self.multiplies = self.fuses and self.beside is not None and last.pointwise and self.beside.pointwise
        split: Any = operation.split.name
        self.vanishes, self.divides = vanishes, divides
        self.denominators = Denominators("own") if divides else last.denominators  # of the forward pass
        self.epilogue = merge_epilogue(last, split, divides) + ("" if self.beside is None else "+linear")
        self.again = End(part=split) if vanishes and self.beside is None and split not in CONSTANT_SPLITS else None
        values = {
            "denominators": self.denominators, "split": split, "relu": relu, "keeps_weight": not vanishes,
            "is_residual": self.this != operation.skip, "other_linear": self.beside is not None,
        }  # fmt: skip
        if divides:
            values["keeps_gates"] = False
        self.merge = configuration(**values)
        stride = self.beside.layer.stride[0] if self.beside is not None and self.multiplies else 1
        tile = {"precision": last.precision, "blocks": choice.blocks, "other_stride": stride}
        self.merged = configuration(**values, **last.geometry, **tile)
        constant = CONSTANT_SPLITS.get(split, (1.0, 1.0))
        self.weights = (constant[1], constant[0]) if operation.skip == 0 else constant
        beside = "" if self.beside is None else ", for both branches" if self.multiplies else ", beside the library"
        self.service = f"triton: {last.kernel}_conv{beside}" if self.fuses else "triton: library + merge"
        self.alone = configuration(precision=last.precision)
        self.whole: Weights = last.weights
        self.positive: Weights | None = None
        if divides:
            self.whole, self.positive = last.weights.halves()

    def chosen(self, choice: Choice) -> FusedMerge:
        """The same under another choice."""
        return FusedMerge(self.operation, self.relu, self.branches, self.shape, choice, self.vanishes, self.divides)

    def kept(self) -> FusedMerge:
        """The same with gates that are kept, by default blocks: those of a kernel without them need not fit."""
        choice = Choice(self.choice.way)
        return FusedMerge(self.operation, self.relu, self.branches, self.shape, choice, self.vanishes)

    @property
    def reads(self) -> list[Shape]:
        return [self.shape if branch is None else branch.x_shape for branch in self.branches]

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        x, y = pack(sources[self.this].to(self.dtype)), sources[self.other]
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
            limits = [last.product_limit(x), other_limit]
            tensors = [x, self.whole.forward, self.whole.bias, other, bias, weight, *limits]
            merged, *gates = launch(f"{last.kernel}_merged", tensors, self.merged)
        else:
            stacked = last.raw(unpack(x), self.whole.library)
            tensors = [stacked, self.whole.bias, last.limit(stacked), other, bias, other_limit]
            merged, *gates = launch("merge", tensors, self.merge)
        saved: list[Ends] = [(End(scale=weight),) for weight in self.weights]
        if self.positive is None:
            saved[self.this] = gate_ends(gates[0], self.last.denominators)
        else:
            saved[self.this] = (self._divided(x, other, self.positive),)
        if self.again is not None:
            saved[self.other] = (replace(self.again, gate=other),)
        elif len(gates) > 1:
            saved[self.other] = (End(gates[1]),) if beside is None else gate_ends(gates[1], beside.denominators)
        return unpack(merged), [ends if weight else () for ends, weight in zip(saved, self.weights, strict=True)]

    def _divided(self, x: Tensor, other: Tensor, positive: Weights) -> End:
        """How relevance leaves for the linear branch, whose last layer's input is ``x``, beside the value ``other``."""
        epsilon, stabilizer = self.last.denominators.epsilon, self.last.denominators.stabilizer
        assert stabilizer != "guard"
        divisor = Divisor(x, positive.forward, positive.bias, epsilon, stabilizer)
        if self.again is None:
            return End(scale=self.weights[self.this], divisor=divisor)
        rest: Any = f"{self.again.part} rest"
        return End(other, part=rest, divisor=divisor)

    def settled(self, arrived: Arrived, value: Tensor | None, ends: Ends) -> list[Tensor]:
        if not self.divides:
            return super().settled(arrived, value, ends)
        # A divisor is multiplied behind a product; here there is none, and one of nothing stands in for it.
        whole = replace(arrived, acc=arrived.factored(self.shape), product=None, strided=None)
        arrival = self.arrival(whole, value, ends)
        like = next(x for x in (arrival.previous, arrival.dense, arrival.even) if x is not None)
        nothing = like.new_zeros(*like.shape[:3], 16, dtype=self.dtype)
        tensors = [nothing, nothing.new_zeros(self.shape[0], 16), None, None]
        return launch("pointwise_backward", tensors, self.alone, arrival)

    def ends(self, saved: object) -> Ends:
        """The linear branch's first, which alone may have a divisor."""
        assert isinstance(saved, list)
        return (*saved[self.this], *saved[self.other])

    def left(self, outputs: list[Tensor], saved: object) -> Sequence[Any]:
        assert isinstance(saved, list)
        count = sum(2 if end.part == "guarded" else 1 for end in saved[self.this])
        left = [outputs[:count] or None, outputs[count:] or None]
        return left if self.this == 0 else left[::-1]

    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        raise NotImplementedError("what leaves a merge is at its branches already")

    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        raise NotImplementedError("what leaves a merge is at its branches already")
