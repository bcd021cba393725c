"""Pools: the averages behind them as small matrices, and relevance in proportion to inputs or to the winner alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.backends.passes import times
from lrp_fast.backends.torch.gates import (
    Gates,
    Message,
    accumulation_dtype,
    channels_last,
    guarded,
    stabilized,
    stored,
)
from lrp_fast.composites import PoolRule
from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    Average,
    AveragePool,
    MaxPool,
    Mean,
    Shape,
    fill_sizes,
)
from lrp_fast.rules import Stabilizer, ZeroGuard


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
            pool = AveragePool(tiles, tiles, (0,) * len(tiles), False, True, None)
            self.blocks.native = lambda x: pool.forward((x,), {})
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
