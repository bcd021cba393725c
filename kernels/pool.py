"""Pools: maxima, the block averages that answer for them, winners, and how relevance goes back through each.

Window of output o: inputs o · stride − padding + k · dilation, k < kernel, inside the image; block of output o: inputs
o · stride + j, j < stride, inside the image (present), of which there are count(o)::

    maxima[o] = max over o's window of x          z[o] = Σ over o's block of x / count(o)       gate[o] = 1 / stab(z[o])
    winner[o] = ky · kernel_x + kx of the first maximum in o's window
    winner_backward    acc[i] = Σ relevance[o] over the outputs o whose winner i is
    block_backward     acc[i] = s[o] / count(o), o the output whose block holds i
    spread             even[i] = Σ over the outputs o whose window holds i of Σ_c dead[o, c] / (channels · inputs of o)

x N × H × W × C; what belongs to outputs N × Ho × Wo × C; relevance has M · N rows of images, M maps of each. Every
input gathers what it gets, in a fixed order: no atomic additions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, Arrival, cdiv, divisible, gate_of, pixel_of, quotient, settle, tile, tile_at
from .heatmap import channel_sum

Pair = tuple[int, int]

LARGEST_WINDOW = 255
"""Positions of a window: a winner is stored in eight bits."""

UNROLLED = 16
"""Positions of a window that are written out one after another; more are looped over."""


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def input_at(x_ptr, image, y, x, columns, inside, height, width, C):
    """A tile of inputs, −∞ outside the image. ``image``, ``y``, ``x`` [BM, 1]."""
    there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    place = ((image * height + y) * width + x).to(tl.int64) * C + columns
    return tl.load(x_ptr + place, mask=there, other=float("-inf")).to(tl.float32)


@triton.jit
def greater(maxima, winner, value, key):
    """The greater of maxima and value, NaN if one is, and which it was: the earlier if they are equal."""
    return tl.maximum(maxima, value, propagate_nan=tl.PropagateNan.ALL), tl.where(value > maxima, key, winner)


@triton.jit
def finite_sum(total, value):
    return total + tl.where(value == float("-inf"), 0.0, value)


@triton.jit
def _max_pool_kernel(
    x_ptr, maxima_ptr, beside_ptr, row_count, height, width, out_height, out_width, C, epsilon,
    BESIDE: tl.constexpr, UNROLL: tl.constexpr,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (rows < row_count) & (columns < C)
    image, top, left = pixel_of(rows.to(tl.int32), out_height, out_width)  # [BM, 1]
    top *= STRIDE_Y
    left *= STRIDE_X
    maxima = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if UNROLL:  # what window and block share is then loaded once
        for key_y in tl.static_range(KERNEL_Y):
            for key_x in tl.static_range(KERNEL_X):
                y = top + (key_y * DILATION_Y - PADDING_Y)
                x = left + (key_x * DILATION_X - PADDING_X)
                value = input_at(x_ptr, image, y, x, columns, inside, height, width, C)
                maxima, winner = greater(maxima, winner, value, key_y * KERNEL_X + key_x)
        if BESIDE != "winner":
            for offset_y in tl.static_range(STRIDE_Y):
                for offset_x in tl.static_range(STRIDE_X):
                    value = input_at(x_ptr, image, top + offset_y, left + offset_x, columns, inside, height, width, C)
                    total = finite_sum(total, value)
    else:
        for key in range(KERNEL_Y * KERNEL_X):
            y = top + (key // KERNEL_X * DILATION_Y - PADDING_Y)
            x = left + (key % KERNEL_X * DILATION_X - PADDING_X)
            value = input_at(x_ptr, image, y, x, columns, inside, height, width, C)
            maxima, winner = greater(maxima, winner, value, key)
        if BESIDE != "winner":
            for offset in range(STRIDE_Y * STRIDE_X):
                y = top + offset // STRIDE_X
                x = left + offset % STRIDE_X
                total = finite_sum(total, input_at(x_ptr, image, y, x, columns, inside, height, width, C))
    tl.store(maxima_ptr + rows * C + columns, maxima, mask=inside)
    if BESIDE == "winner":
        tl.store(beside_ptr + rows * C + columns, winner.to(tl.uint8), mask=inside)
    else:
        present = tl.minimum(height - top, STRIDE_Y) * tl.minimum(width - left, STRIDE_X)
        z = quotient(total, present.to(tl.float32))
        if BESIDE != "average":
            z = gate_of(z, tl.full(z.shape, 1.0, tl.float32), epsilon, 0.0, BESIDE)
        tl.store(beside_ptr + rows * C + columns, z, mask=inside)


def max_pool_gated(
    x: Tensor, *, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), out_size: Pair,
    epsilon: float, signed: bool = False, block: Pair | None = None, num_warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Maxima and gates 1 / stab(z), both (N, Ho, Wo, C), from x (N, H, W, C), contiguous.

    stab(z) = z + ε, or z ± ε by its sign if ``signed``. ValueError if a block is empty.
    """
    _check_blocks(x, stride, out_size)
    maxima = x.new_empty(x.shape[0], *out_size, x.shape[-1])
    gates = maxima.new_empty(maxima.shape)
    beside: Literal["signed", "plain"] = "signed" if signed else "plain"
    _max_pool(x, maxima, gates, beside, epsilon, kernel, stride, padding, dilation, block, num_warps)
    return maxima, gates


def max_pool_average(
    x: Tensor, *, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), out_size: Pair,
    block: Pair | None = None, num_warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Maxima in the dtype of x (N, H, W, C), contiguous, and z in float32, both (N, Ho, Wo, C).

    ValueError if a block is empty.
    """
    _check_blocks(x, stride, out_size)
    maxima = x.new_empty(x.shape[0], *out_size, x.shape[-1])
    average = maxima.new_empty(maxima.shape, dtype=torch.float32)
    _max_pool(x, maxima, average, "average", 0.0, kernel, stride, padding, dilation, block, num_warps)
    return maxima, average


def winner_pool(
    x: Tensor, *, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), out_size: Pair,
    block: Pair | None = None, num_warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Maxima in the dtype of x (N, H, W, C), contiguous, and winners in uint8, both (N, Ho, Wo, C).

    ValueError if the window is too large for a byte.
    """
    _check_window(kernel)
    maxima = x.new_empty(x.shape[0], *out_size, x.shape[-1])
    winner = maxima.new_empty(maxima.shape, dtype=torch.uint8)
    _max_pool(x, maxima, winner, "winner", 0.0, kernel, stride, padding, dilation, block, num_warps)
    return maxima, winner


def _max_pool(
    x: Tensor, maxima: Tensor, beside: Tensor, kind: Literal["signed", "plain", "average", "winner"], epsilon: float,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, block: Pair | None, num_warps: int,
) -> None:  # fmt: skip
    _, out_height, out_width, channels = maxima.shape
    rows = maxima.numel() // channels
    block = block or tile(channels)
    grid = (cdiv(rows, block[0]) * cdiv(channels, block[1]),)
    _max_pool_kernel[grid](
        x, maxima, beside, rows, x.shape[1], x.shape[2], out_height, out_width, channels, epsilon,
        BESIDE=kind, UNROLL=max(kernel[0] * kernel[1], stride[0] * stride[1]) <= UNROLLED,
        **_window(kernel, stride, padding, dilation),
        EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], num_warps=num_warps, **OPTIONS,
    )  # fmt: skip


def _window(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    return {
        "KERNEL_Y": kernel[0], "KERNEL_X": kernel[1], "STRIDE_Y": stride[0], "STRIDE_X": stride[1],
        "PADDING_Y": padding[0], "PADDING_X": padding[1], "DILATION_Y": dilation[0], "DILATION_X": dilation[1],
    }  # fmt: skip


def _check_blocks(x: Tensor, stride: Pair, out_size: Pair) -> None:
    for size, step, count in zip(x.shape[1:3], stride, out_size, strict=True):
        if (count - 1) * step >= size:
            raise ValueError(
                f"got {count} outputs at stride {step} over {size} inputs, so that the last block is empty, and "
                f"expected at most {(size - 1) // step + 1}"
            )


def _check_window(kernel: Pair) -> None:
    if kernel[0] * kernel[1] > LARGEST_WINDOW:
        raise ValueError(
            f"got a window of {kernel[0]} × {kernel[1]} and expected at most {LARGEST_WINDOW} positions in it"
        )


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def window_back(
    y, x, back, out_height, out_width,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
):  # fmt: skip
    """One of the outputs whose window could hold padded inputs y, x: its place, the input's index, and if it does.

    Last how far it lies behind the nearest of them, which is at y // STRIDE_Y, x // STRIDE_X: the same for all inputs.
    """
    SPAN_X: tl.constexpr = (KERNEL_X - 1) * DILATION_X // STRIDE_X + 1
    back_y = back // SPAN_X
    back_x = back % SPAN_X
    out_y = y // STRIDE_Y - back_y
    out_x = x // STRIDE_X - back_x
    offset_y = y % STRIDE_Y + back_y * STRIDE_Y  # from the window's first input
    offset_x = x % STRIDE_X + back_x * STRIDE_X
    key_y = offset_y // DILATION_Y
    key_x = offset_x // DILATION_X
    holds = (key_y < KERNEL_Y) & (key_x < KERNEL_X) & (offset_y % DILATION_Y == 0) & (offset_x % DILATION_X == 0)
    holds &= (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
    return out_y, out_x, key_y * KERNEL_X + key_x, holds, back_y * out_width + back_x


@triton.jit
def won_from(
    acc, relevance, winners, y, x, back, inside, out_height, out_width, C,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
):  # fmt: skip
    """Add the relevance of one output where its winner is this input; ``relevance``, ``winners``: of the nearest [BM, BN]."""
    _, _, key, holds, behind = window_back(
        y, x, back, out_height, out_width, KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X
    )
    there = inside & holds
    winner = tl.load(winners - behind * C, mask=there, other=255).to(tl.int32)
    share = tl.load(relevance - behind * C, mask=there, other=0.0).to(tl.float32)
    return tl.where(winner == key, acc + share, acc)


@triton.jit
def _winner_backward_kernel(
    relevance_ptr, winner_ptr, row_count, image_count, out_height, out_width, C,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    UNROLL: tl.constexpr, EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (rows < row_count) & (columns < C)
    image, y, x = pixel_of(rows.to(tl.int32), height, width)  # [BM, 1]
    y += PADDING_Y
    x += PADDING_X
    nearest = y // STRIDE_Y * out_width + x // STRIDE_X
    plane = out_height * out_width
    relevance = relevance_ptr + (image * plane + nearest).to(tl.int64) * C + columns  # [BM, BN]
    winners = winner_ptr + (image % image_count * plane + nearest).to(tl.int64) * C + columns
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    OUTPUTS: tl.constexpr = ((KERNEL_Y - 1) * DILATION_Y // STRIDE_Y + 1) * (
        (KERNEL_X - 1) * DILATION_X // STRIDE_X + 1
    )
    if OUTPUTS <= UNROLL:
        for back in tl.static_range(OUTPUTS):
            acc = won_from(
                acc, relevance, winners, y, x, back, inside, out_height, out_width, C,
                KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X,
            )  # fmt: skip
    else:
        for back in range(OUTPUTS):
            acc = won_from(
                acc, relevance, winners, y, x, back, inside, out_height, out_width, C,
                KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X,
            )  # fmt: skip
    settle(
        acc, 1.0, rows, columns, inside, C,
        value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
        scale_a, scale_b, gate_rows, height, width,
        HAS_VALUE, HAS_PREVIOUS, PREVIOUS_STRIDE, HAS_DENSE, HAS_EVEN,
        GATE_A, GROUPS_A, PART_A, END_B, GATE_B, GROUPS_B, PART_B,
    )  # fmt: skip


@triton.jit
def _block_backward_kernel(
    s_ptr, row_count, out_height, out_width, C, scale,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PRESENT: tl.constexpr,
    EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (rows < row_count) & (columns < C)
    image, y, x = pixel_of(rows.to(tl.int32), height, width)  # [BM, 1]
    out_y = y // STRIDE_Y
    out_x = x // STRIDE_X
    place = (image * out_height + out_y) * out_width + out_x
    there = inside & (out_y < out_height) & (out_x < out_width)
    acc = tl.load(s_ptr + place.to(tl.int64) * C + columns, mask=there, other=0.0).to(tl.float32)
    if PRESENT:
        count = tl.minimum(height - out_y * STRIDE_Y, STRIDE_Y) * tl.minimum(width - out_x * STRIDE_X, STRIDE_X)
        acc *= 1.0 / count.to(tl.float32)
    else:
        acc *= scale
    settle(
        acc, 1.0, rows, columns, inside, C,
        value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
        scale_a, scale_b, gate_rows, height, width,
        HAS_VALUE, HAS_PREVIOUS, PREVIOUS_STRIDE, HAS_DENSE, HAS_EVEN,
        GATE_A, GROUPS_A, PART_A, END_B, GATE_B, GROUPS_B, PART_B,
    )  # fmt: skip


@triton.jit
def inputs_of(out, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """How many positions of the window of output ``out`` lie inside ``size`` inputs."""
    start = out * STRIDE - PADDING
    first = (tl.maximum(-start, 0) + DILATION - 1) // DILATION
    end = tl.minimum((tl.maximum(size - start, 0) + DILATION - 1) // DILATION, KERNEL)
    return tl.maximum(end - first, 0)


@triton.jit
def spread_from(
    even, sum_ptr, image, y, x, back, inside, height, width, out_height, out_width, channels,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
):  # fmt: skip
    """Add the share that one output gives to each of its inputs."""
    out_y, out_x, _, holds, _ = window_back(
        y, x, back, out_height, out_width, KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X
    )
    total = tl.load(sum_ptr + (image * out_height + out_y) * out_width + out_x, mask=inside & holds, other=0.0)
    count = inputs_of(out_y, height, KERNEL_Y, STRIDE_Y, PADDING_Y, DILATION_Y)
    count *= inputs_of(out_x, width, KERNEL_X, STRIDE_X, PADDING_X, DILATION_X)
    return even + total / (tl.maximum(count, 1).to(tl.float32) * channels)


@triton.jit
def _spread_kernel(
    sum_ptr, even_ptr, row_count, height, width, out_height, out_width, channels,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < row_count
    image, y, x = pixel_of(rows, height, width)
    y += PADDING_Y
    x += PADDING_X
    even = tl.zeros((BLOCK,), tl.float32)
    OUTPUTS: tl.constexpr = ((KERNEL_Y - 1) * DILATION_Y // STRIDE_Y + 1) * (
        (KERNEL_X - 1) * DILATION_X // STRIDE_X + 1
    )
    if OUTPUTS <= UNROLL:
        for back in tl.static_range(OUTPUTS):
            even = spread_from(
                even, sum_ptr, image, y, x, back, inside, height, width, out_height, out_width, channels,
                KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X,
            )  # fmt: skip
    else:
        for back in range(OUTPUTS):
            even = spread_from(
                even, sum_ptr, image, y, x, back, inside, height, width, out_height, out_width, channels,
                KERNEL_Y, KERNEL_X, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X,
            )  # fmt: skip
    tl.store(even_ptr + rows, even, mask=inside)


def winner_backward(
    relevance: Tensor, winner: Tensor, arrival: Arrival, *, kernel: Pair, stride: Pair, padding: Pair,
    dilation: Pair = (1, 1), height: int, width: int, block: Pair | None = None, num_warps: int = 4,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What leaves at each end of ``arrival``, (M · N, H, W, groups · C), each output's relevance going to its winner.

    ``relevance`` (M · N, Ho, Wo, C), ``winner`` (N, Ho, Wo, C) uint8 of :func:`winner_pool`, contiguous. ValueError if
    the window is too large.
    """
    _check_window(kernel)
    return _backward(
        _winner_backward_kernel, (relevance, winner), arrival, relevance, height, width, block, num_warps,
        image_count=winner.shape[0], **_window(kernel, stride, padding, dilation), UNROLL=UNROLLED,
    )  # fmt: skip


def block_backward(
    s: Tensor, arrival: Arrival, *, stride: Pair, height: int, width: int, divisor: Literal["present"] | int = "present",
    block: Pair | None = None, num_warps: int = 4,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What leaves at each end of ``arrival``, (M · N, H, W, groups · C), each input getting its share of its block's s.

    ``s`` (M · N, Ho, Wo, C), contiguous. ``divisor``: the elements present in the block, or a number. Inputs that no
    output answers for get nothing. The transpose of a global average has the whole plane as ``stride``.
    """
    present = divisor == "present"
    return _backward(
        _block_backward_kernel, (s,), arrival, s, height, width, block, num_warps,
        scale=1.0 if divisor == "present" else 1.0 / divisor, STRIDE_Y=stride[0], STRIDE_X=stride[1], PRESENT=present,
    )  # fmt: skip


def _backward(
    kernel: Any, sources: tuple[Tensor, ...], arrival: Arrival, like: Tensor, height: int, width: int,
    block: Pair | None, num_warps: int, **arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    images, out_height, out_width, channels = like.shape
    rows = images * height * width
    arrival = arrival.prepared(like, (images, height, width, channels))
    block = block or arrival.tile(channels)
    kernel[(cdiv(rows, block[0]) * cdiv(channels, block[1]),)](
        *sources, row_count=rows, out_height=out_height, out_width=out_width, C=channels, **arguments,
        **arrival.arguments(rows, height, width),
        EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return arrival.outputs


def spread(
    dead: Tensor, *, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1),
    height: int, width: int, channels: int, block: int = 256, num_warps: int = 4,
) -> Tensor:  # fmt: skip
    """Dead relevance (M · N, Ho, Wo, C), contiguous, shared equally by the valid inputs of its window: (M · N, H, W).

    In float32, equal in all ``channels`` of the input.
    """
    images, out_height, out_width, _ = dead.shape
    rows = images * height * width
    even = dead.new_empty(images, height, width, dtype=torch.float32)
    _spread_kernel[(cdiv(rows, block),)](
        channel_sum(dead), even, rows, height, width, out_height, out_width, channels,
        **_window(kernel, stride, padding, dilation), UNROLL=UNROLLED, BLOCK=block, num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return even
