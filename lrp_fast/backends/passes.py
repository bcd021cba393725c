"""How relevance travels between units, and what the engine asks of a backend that runs units in passes of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp_fast.layers import Shape


def times(relevance: Tensor, gate: Tensor | float) -> Tensor:
    """``relevance · gate`` where relevance may hold several maps of each of the gate's rows, one after another."""
    if isinstance(gate, (int, float)) or gate.shape[0] in (1, relevance.shape[0]):
        return relevance * gate
    return (relevance.unflatten(0, (-1, gate.shape[0])) * gate).flatten(0, 1)


def times_plus(relevance: Tensor, gate: Tensor, dense: Tensor) -> Tensor:
    """``relevance · gate + dense``, rows as in :func:`times`."""
    if gate.shape[0] == relevance.shape[0]:
        return torch.addcmul(dense, relevance, gate)
    return times(relevance, gate) + dense


@dataclass
class Arrived:
    """Relevance that has arrived at a unit with output x, in parts: ``R = x · (acc + product + strided) + dense + even``.

    ``product``: s (N × H × W × K) and a weight (C × K), not multiplied yet. ``strided``: a tensor and a stride s: it
    belongs to every s-th row and column. ``even``: N × H × W, equal in all channels. ``leaving``: a pass has settled it
    all already, and this is what leaves the unit.
    """

    acc: Tensor | None = None
    product: tuple[Tensor, Tensor] | None = None
    strided: tuple[Tensor, int] | None = None
    dense: Tensor | None = None
    even: Tensor | None = None
    leaving: Sequence[Any] | None = None

    @property
    def empty(self) -> bool:
        """Nothing has arrived."""
        parts = (self.acc, self.product, self.strided, self.dense, self.even, self.leaving)
        return all(part is None for part in parts)

    def add(self, other: Arrived, shape: Shape) -> None:
        """Another message to the same unit, whose output has ``shape`` (without batch)."""
        twice = (self.strided is not None and other.strided is not None) or None not in (self.product, other.product)
        if twice:
            self.acc, self.product, self.strided = self.factored(shape), None, None
        self.acc = _plus(self.acc, other.acc)
        self.product = self.product or other.product
        self.strided = self.strided or other.strided
        self.dense = _plus(self.dense, other.dense)
        self.even = _plus(self.even, other.even)

    def factored(self, shape: Shape) -> Tensor | None:
        """``acc + product + strided``."""
        acc = self.acc
        if self.product is not None:
            s, weight = self.product
            acc = _plus(acc, (s @ weight.t()).movedim(-1, 1))
        if self.strided is None:
            return acc
        small, stride = self.strided
        whole = small.new_zeros(small.shape[0], *shape).contiguous(memory_format=torch.channels_last)
        whole[:, :, ::stride, ::stride] = small
        return _plus(acc, whole)

    def added(self, shape: Shape) -> Tensor | None:
        """``dense + even``."""
        if self.even is None:
            return self.dense
        even = self.even.unsqueeze(1)
        return even.expand(-1, shape[0], -1, -1) if self.dense is None else self.dense + even.to(self.dense.dtype)

    def total(self, value: Tensor | None, shape: Shape) -> Tensor | None:
        """R, given x."""
        acc, dense = self.factored(shape), self.added(shape)
        if acc is None:
            return dense
        assert value is not None
        return times(acc, value) if dense is None else times_plus(acc, value, dense.to(acc.dtype))


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


class Passes(ABC):
    """A unit as a backend's own passes, bound to shapes, dtype and device; ``service`` says for people what runs it.

    What arrives here can be settled in the last pass of the unit that sends it, if that has passes too. ``takes``: at a
    merge, for each branch whether its last layer is part of it: forward, the branch then gives that layer's input, and
    backward what leaves the merge for it has gone through that layer's gates.
    """

    service: str
    takes: Sequence[bool] = ()

    @abstractmethod
    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, object]:
        """The unit's value and what its other passes need."""

    @abstractmethod
    def settle(self, arrived: Arrived, value: Tensor | None, saved: object) -> Sequence[Any]:
        """What leaves the unit, from what has arrived; at a merge, for each branch or None."""

    @abstractmethod
    def send(self, leaving: Sequence[Any], x: Tensor | None, heatmap: bool) -> Arrived:
        """The message to the unit's input x; with ``heatmap`` its channels may come summed."""

    @abstractmethod
    def send_into(
        self, leaving: Sequence[Any], receiver: Passes, arrived: Arrived, value: Tensor | None, saved: object
    ) -> Sequence[Any]:
        """Send, and settle at the receiver, with what it saved, in the same pass: what leaves the receiver."""
