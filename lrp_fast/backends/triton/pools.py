"""Pools as fused kernels: in proportion over blocks, or to the winner of each window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrp_fast.backends.passes import Arrived
from lrp_fast.backends.torch import ProportionalPool, WinnerPool
from lrp_fast.backends.triton.launch import configuration, launch
from lrp_fast.backends.triton.passes import Ends, TritonPasses, all_gates
from lrp_fast.kernels.common import Arrival, Denominators, End, pack, unpack
from lrp_fast.layers import MaxPool, Shape
from lrp_fast.rules import Stabilizer, ZeroGuard

GUARDED = Denominators("own", stabilizer="guard")
"""Of a pool under a zero-guard, whose one denominator is its average."""


class FusedPool(TritonPasses):
    """A pool that shares relevance in proportion, over blocks: a max-pool's, or windows that do not overlap."""

    def __init__(self, operation: ProportionalPool, block: tuple[int, ...], x_shape: Shape, shape: Shape) -> None:
        self.operation, self.x_shape, self.dtype = operation, x_shape, operation.dtype
        self.shape = (*shape, 1, 1)[:3] if len(shape) < 3 else shape
        self.guard = operation.stabilizer if isinstance(operation.stabilizer, ZeroGuard) else None
        height, width = x_shape[1:]
        self.backward = configuration(stride=block, height=height, width=width)
        self.gate = configuration(denominators=GUARDED, relu=False, over_value=False)
        self.service, self.epilogue = "triton: pool", "pool" if self.guard is None else "poolguard"
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
        self.service, self.epilogue = "triton: pool", "winner"

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
