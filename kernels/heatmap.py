"""Relevance maps: channel sums, their range, heat quantization.

    sum[m, y, x] = Σ_c relevance[m, y, x, c]                range[m] = (min, max) over map m
    levels = linspace(min, max, L) of map m, computed in float64, rounded to float32, never falling
    quantized[m, y, x] = the largest level ≤ heatmap[m, y, x]              (the maximum stays)

relevance M × H × W × C → sum M × H × W float32 → range M × 2 and quantized M × H × W float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, cdiv, divisible, tile

EXACT = OPTIONS | {"enable_fp_fusion": False}
"""Options of the kernel whose levels are to be equal, bit by bit, to a plain evaluation."""


@triton.jit
def _channel_sum_kernel(
    relevance_ptr, sum_ptr, row_count, C,
    EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, C, BLOCK_COLUMNS):
        columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        inside = (rows < row_count)[:, None] & (columns < C)
        total += tl.load(relevance_ptr + rows[:, None] * C + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + rows, tl.sum(total, 1), mask=rows < row_count)


@triton.jit
def _range_kernel(heatmap_ptr, range_ptr, size, BLOCK: tl.constexpr):
    first = heatmap_ptr + tl.program_id(0).to(tl.int64) * size
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        pixels = start + tl.arange(0, BLOCK)
        low = tl.minimum(low, tl.load(first + pixels, mask=pixels < size, other=float("inf")))
        high = tl.maximum(high, tl.load(first + pixels, mask=pixels < size, other=float("-inf")))
    tl.store(range_ptr + 2 * tl.program_id(0), tl.min(low))
    tl.store(range_ptr + 2 * tl.program_id(0) + 1, tl.max(high))


@triton.jit
def _quantize_kernel(heatmap_ptr, range_ptr, quantized_ptr, size, levels, BLOCK: tl.constexpr):
    blocks = tl.cdiv(size, BLOCK)
    image = tl.program_id(0) // blocks  # one grid dimension for both: only the first may be larger than 65,535
    first = image.to(tl.int64) * size
    pixels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(heatmap_ptr + first + pixels, mask=pixels < size, other=0.0)
    one = tl.arange(0, 1)
    low = tl.load(range_ptr + 2 * image + one)  # [1]
    high = tl.load(range_ptr + 2 * image + 1 + one)
    zero = tl.zeros((1,), tl.float64)
    floor = low
    result = tl.zeros((BLOCK,), tl.float32) + low
    for index in range(1, levels):
        share = (zero + index) / (zero + (levels - 1))
        level = (low.to(tl.float64) * (1 - share) + high.to(tl.float64) * share).to(tl.float32)
        floor = tl.maximum(floor, tl.minimum(tl.maximum(level, low), high))
        result = tl.where(value >= floor, floor, result)
    tl.store(quantized_ptr + first + pixels, result, mask=pixels < size)


def channel_sum(relevance: Tensor, *, block: tuple[int, int] | None = None, num_warps: int = 4) -> Tensor:
    """The sum over the channels of relevance (M, H, W, C), contiguous: (M, H, W) float32."""
    channels = relevance.shape[-1]
    rows = relevance.numel() // channels
    total = relevance.new_empty(relevance.shape[:-1], dtype=torch.float32)
    block = block or tile(channels, 2048)
    _channel_sum_kernel[(cdiv(rows, block[0]),)](
        relevance, total, rows, channels,
        EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return total


def image_range(heatmap: Tensor, *, block: int = 4096, num_warps: int = 8) -> Tensor:
    """Minimum and maximum of each map (M, H, W) float32, contiguous: (M, 2) float32."""
    size = heatmap.shape[1] * heatmap.shape[2]
    ends = heatmap.new_empty(heatmap.shape[0], 2)
    _range_kernel[(heatmap.shape[0],)](heatmap, ends, size, BLOCK=block, num_warps=num_warps, **OPTIONS)
    return ends


def quantize(heatmap: Tensor, levels: int = 8, *, block: int = 1024, num_warps: int = 4) -> Tensor:
    """Heat quantization of each map (M, H, W) float32, contiguous and finite, to one of its ``levels`` (at least 2)."""
    size = heatmap.shape[1] * heatmap.shape[2]
    quantized = heatmap.new_empty(heatmap.shape)
    _quantize_kernel[(heatmap.shape[0] * cdiv(size, block),)](
        heatmap, image_range(heatmap), quantized, size, levels, BLOCK=block, num_warps=num_warps, **EXACT
    )
    return quantized
