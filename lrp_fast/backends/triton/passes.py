"""What all units in fused kernels share: their relevance is settled in the kernel that computes its last message."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrp_fast.backends.passes import Arrived, Passes
from lrp_fast.backends.torch import Gates
from lrp_fast.backends.triton.launch import configuration, launch
from lrp_fast.kernels.common import Arrival, Denominators, End, pack
from lrp_fast.layers import Shape
from lrp_fast.scopes import current_device

Ends = tuple[End, ...]


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
    """Passes whose relevance is settled by a kernel. ``x_shape``, ``shape``: of the unit's input and output, without batch.

    ``over_value``: the unit's own output is in its gates already, and relevance arrives without it. What leaves is NHWC.
    ``epilogue``: how its output becomes gates, as far as the speed of doing so, and of settling at them, depends on it.
    """

    epilogue: str
    over_value = False
    adds = False
    x_shape: Shape
    shape: Shape
    dtype: torch.dtype

    @property
    def reads(self) -> list[Shape]:
        """The shapes of what :meth:`forward` takes, without batch."""
        return [self.x_shape]

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
        arrived.add(self.send(leaving, value, False), receiver.shape)
        return receiver.settle(arrived, value, saved)

    @abstractmethod
    def send_settled(self, leaving: Sequence[Any], arrival: Arrival) -> list[Tensor] | None:
        """Send and settle, one output for each end; None where that does not go in one piece."""

    def send_added(
        self, leaving: Sequence[Any], product: tuple[Tensor, Tensor], arrival: Arrival
    ) -> list[Tensor] | None:
        """:meth:`send_settled` with a product added to what is sent, where the passes can (``adds``)."""
        raise NotImplementedError
