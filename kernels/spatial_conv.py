"""k×k convolutions as implicit matrix products of NHWC activations, with the passes that follow them as epilogues.

Forward, S weights stacked (S = 1 or 2), tap (i, j) of the result at (oy, ox) reading x at (oy·s + i·d − p, ox·s + j·d − p)::

    first = Σ_ij x_ij @ weight[:C, i, j]ᵀ + bias[:C]      second = Σ_ij x_ij @ weight[C:, i, j]ᵀ + bias[C:]

    gated     value = ReLU(first)           gate_g = numerator · mask_g / stab(z_g)
    merged    merged = ReLU(first + other)  gate_g = ρ · mask_g / stab(z_g), ρ the branch's weight under the split

x (N, H, W, Cin), weight (S · C, kh, kw, Cin / groups) → value (N, Ho, Wo, C), gates (N, Ho, Wo, G · C);
``z_g`` as in :mod:`common`. Backward, the transposed convolution of a message s (M · N, Ho, Wo, G · C) and an
:class:`Arrival` settling what it brings, M maps of each image::

    acc[y, x] = Σ_ij s[(y + p − i·d) / s, (x + p − j·d) / s] @ weight[:, i, j], over the taps where both divide

    R = value · (acc + previous) + dense + even           out_e = R · gate_e

**All weights have what is summed over (K) last in memory**, as a tensor core wants it in every dtype (TF32 ``wgmma``
takes nothing else): forward ``(S · C, kh, kw, Cin / groups)``, backward as :func:`pack_backward` lays them out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    Arrival,
    Branch,
    Denominators,
    cdiv,
    check_two_stacks,
    load_stack,
    merge_outputs,
    next_power_of_2,
    pixel_of,
    rectified,
    settle,
    store_gates,
    store_merge,
)  # fmt: skip
from .pointwise_conv import Blocks, Precision

Pair = tuple[int, int]

#         rows columns inner warps stages
TABLE: dict[tuple[str, int], list[tuple[int, int, int, int, int]]] = {
    ("half", 1): [(128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 8, 4), (64, 128, 64, 4, 4)],
    ("half", 2): [(128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4)],
    ("half", 3): [(64, 128, 64, 8, 3), (64, 64, 64, 8, 3), (128, 32, 64, 8, 3)],
    ("half", 4): [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 8, 3)],
    ("half", 6): [(64, 64, 64, 8, 3), (64, 32, 64, 4, 4)],
    ("tf32", 1): [(128, 64, 32, 8, 4), (128, 128, 32, 8, 3), (64, 64, 32, 4, 4)],
    ("tf32", 2): [(128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 4)],
    ("tf32", 3): [(128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("tf32", 4): [(128, 32, 32, 8, 4), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("tf32", 6): [(64, 64, 32, 8, 4), (64, 32, 32, 4, 4)],
    ("ieee", 1): [(64, 64, 16, 4, 3), (64, 64, 32, 8, 3), (128, 32, 16, 4, 3)],
    ("ieee", 2): [(64, 64, 16, 8, 3), (64, 32, 16, 4, 3)],
    ("ieee", 3): [(64, 64, 16, 8, 3), (64, 32, 16, 4, 3)],
    ("ieee", 4): [(64, 64, 16, 8, 3), (64, 32, 16, 4, 3)],
    ("ieee", 6): [(64, 32, 16, 4, 3), (64, 64, 16, 8, 3)],
}


def tiles_of(denominators: Denominators) -> int:
    """What a program of :func:`gated` holds at once, for :func:`candidates`: its stacks, and two gates count as a third."""
    return denominators.stacks if denominators.groups == 1 else 3


def tiles_of_merge(denominators: Denominators, linear: bool) -> int:
    """What a program of :func:`merged` holds at once: both branches' stacks, and more if it writes two gates for each."""
    return 6 if linear and denominators.groups == 2 else 2 * denominators.stacks


@lru_cache(maxsize=1024)
def candidates(columns: int, inner: int, tiles: int, dtype: torch.dtype, precision: Precision) -> tuple[Blocks, ...]:
    """What is worth trying for ``columns`` of the result and K = ``inner`` a tap, both of one group; first the default.

    ``tiles``: how much a program holds at once, which decides how large a tile may be before registers spill: the
    ends of :func:`backward`, :func:`tiles_of` for :func:`gated`, :func:`tiles_of_merge` for :func:`merged`.
    """
    widest, deepest = (max(16, next_power_of_2(size)) for size in (columns, inner))
    found = TABLE["half" if dtype.itemsize == 2 else precision, tiles]
    fitting = [Blocks(rows, min(wide, widest), min(deep, deepest), *rest) for rows, wide, deep, *rest in found]
    return tuple(dict.fromkeys(fitting))


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def convolved(
    x_ptr, weight_ptr, bias_ptr, row_count, height, width, out_height, out_width, channels, K, C, columns_of_group,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    STACKS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """This program's rows [BM, 1] int64, columns [1, BN], inside, and its tile of the convolution plus bias.

    That is first and second (the same where S is 1), [BM, BN] float32. A tile lies within one group of channels.
    """
    across = tl.cdiv(columns_of_group, COLUMNS)  # tiles of one group; programs of the same rows run one after another
    tile = tl.program_id(0) % (C // columns_of_group * across)
    row = tl.program_id(0) // (C // columns_of_group * across) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tile // across
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    columns = group * columns_of_group + column
    stacked = tl.arange(0, STACKS * COLUMNS)[None, :]  # the columns of both stacks are one product's, side by side
    weight_rows = tl.minimum(group * columns_of_group + tile % across * COLUMNS + stacked % COLUMNS, C - 1)
    weight_columns = weight_ptr + (stacked // COLUMNS * C + weight_rows) * (TAPS_Y * TAPS_X * K)  # [1, S · BN]
    image, top, left = pixel_of(row, out_height, out_width)  # [BM, 1]
    top = top * STRIDE_Y - PADDING_Y
    left = left * STRIDE_X - PADDING_X
    inner = tl.arange(0, INNER)
    x_rows = x_ptr + ((image.to(tl.int64) * height + top) * width + left) * channels + group * K  # [BM, 1]
    acc = tl.zeros((ROWS, STACKS * COLUMNS), tl.float32)
    for step in range(TAPS_Y * TAPS_X * tl.cdiv(K, INNER)):
        tap = step % (TAPS_Y * TAPS_X)
        k = step // (TAPS_Y * TAPS_X) * INNER + inner
        down = tap // TAPS_X * DILATION_Y
        right = tap % TAPS_X * DILATION_X
        y = top + down
        x = left + right
        there = (row < row_count) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if not EVEN_K:
            there = there & (k < K)[None, :]
        pixels = tl.load(x_rows + (down * width + right) * channels + k[None, :], mask=there, other=0.0)  # [BM, BK]
        pointers = weight_columns + tap * K + k[:, None]  # [BK, S · BN]
        if EVEN_K:
            weights = tl.load(pointers)
        else:
            weights = tl.load(pointers, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(pixels, weights, acc, input_precision=PRECISION)
    first = acc
    second = acc
    if STACKS == 2:
        first, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS)), (0, 2, 1)))
    if HAS_BIAS:
        first += tl.load(bias_ptr + columns, mask=column < columns_of_group, other=0.0).to(tl.float32)
        if STACKS == 2:
            second += tl.load(bias_ptr + C + columns, mask=column < columns_of_group, other=0.0).to(tl.float32)
    if STACKS == 1:
        second = first
    return row.to(tl.int64), columns, (row < row_count) & (column < columns_of_group), first, second


@triton.jit
def _gated_kernel(
    x_ptr, weight_ptr, bias_ptr, value_ptr, gate_ptr,
    row_count, height, width, out_height, out_width, channels, K, C, columns_of_group, epsilon, gamma,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, OVER_VALUE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, first, second = convolved(
        x_ptr, weight_ptr, bias_ptr, row_count, height, width, out_height, out_width, channels, K, C, columns_of_group,
        TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X,
        STACKS, HAS_BIAS, EVEN_K, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    value = rectified(first) if RELU else first
    tl.store(value_ptr + rows * C + columns, value, mask=inside)
    numerator = value if OVER_VALUE else tl.full(value.shape, 1.0, tl.float32)
    store_gates(gate_ptr, first, second, numerator, rows, columns, inside, C, epsilon, 0.0, gamma, KIND, STABILIZER)


@triton.jit
def _merged_kernel(
    x_ptr, weight_ptr, bias_ptr, branch_ptr, branch_bias_ptr, merged_ptr, gate_ptr, other_ptr,
    row_count, height, width, out_height, out_width, channels, K, C, columns_of_group, epsilon, gamma,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, SPLIT: tl.constexpr, IS_RESIDUAL: tl.constexpr,
    OTHER_LINEAR: tl.constexpr, OTHER_BIAS: tl.constexpr, HAS_OTHER_END: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, first, second = convolved(
        x_ptr, weight_ptr, bias_ptr, row_count, height, width, out_height, out_width, channels, K, C, columns_of_group,
        TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X,
        STACKS, HAS_BIAS, EVEN_K, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    other_first, other_second = load_stack(
        branch_ptr, branch_bias_ptr, rows, columns, inside, columns < C, C, STACKS if OTHER_LINEAR else 1, OTHER_BIAS
    )
    store_merge(
        first, second, other_first, other_second, merged_ptr, gate_ptr, other_ptr, rows, columns, inside, C,
        epsilon, 0.0, 0.0, gamma, KIND, STABILIZER, SPLIT, RELU, IS_RESIDUAL, OTHER_LINEAR,
        True, HAS_OTHER_END,
    )  # fmt: skip


def gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, denominators: Denominators, *, stride: Pair, padding: Pair,
    dilation: Pair = (1, 1), groups: int = 1, relu: bool, over_value: bool,
    precision: Precision = "ieee", blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value (N, Ho, Wo, C) and gates (N, Ho, Wo, G · C) from x (N, H, W, Cin), weight (S · C, kh, kw, Cin / groups).

    All contiguous; each stack of the weight in the ordinary order of groups; bias (S · C,) float32 or of x's dtype.
    ``over_value``: the gate's numerator is the value, else one. ValueError for a zero-guard or narrow groups.
    """
    blocks, shape, arguments = _forward(
        x, weight, denominators, stride, padding, dilation, groups, tiles_of(denominators), precision, blocks
    )
    value = x.new_empty(*shape)
    gates = x.new_empty(*shape[:-1], shape[-1] * denominators.groups)
    _gated_kernel[_grid(blocks, arguments["row_count"], shape[-1], groups)](
        x, weight, x if bias is None else bias, value, gates, **arguments,
        HAS_BIAS=bias is not None, RELU=relu, OVER_VALUE=over_value,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return value, gates


def merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Branch, denominators: Denominators, split: str, *,
    stride: Pair, padding: Pair, dilation: Pair = (1, 1), groups: int = 1, relu: bool, is_residual: bool,
    keeps_weight: bool = True, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Merged (N, Ho, Wo, C), this branch's gates (N, Ho, Wo, G · C), and how relevance leaves for the ``other``.

    That is its gates (…, G · C) if it is linear, else its weight (…, C), or None where the split is constant or the weight
    is not kept (see ``merge.merge``).
    x, weight and bias as for :func:`gated`; ValueError for a zero-guard, narrow groups, or another layer to multiply.
    """
    if other.weight is not None:
        raise ValueError(
            "got a branch with a weight, which pointwise_conv.merged multiplies, and expected a branch's value or its "
            "last layer's raw output"
        )
    tiles = tiles_of_merge(denominators, other.linear)
    blocks, shape, arguments = _forward(
        x, weight, denominators, stride, padding, dilation, groups, tiles, precision, blocks
    )
    result, gates, other_end = merge_outputs(x, shape, denominators, split, other.linear, keeps_weight)
    assert gates is not None
    _merged_kernel[_grid(blocks, arguments["row_count"], shape[-1], groups)](
        x, weight, x if bias is None else bias, other.tensor, x if other.bias is None else other.bias,
        result, gates, gates if other_end is None else other_end, **arguments,
        HAS_BIAS=bias is not None, RELU=relu, SPLIT=split, IS_RESIDUAL=is_residual,
        OTHER_LINEAR=other.linear, OTHER_BIAS=other.linear and other.bias is not None, HAS_OTHER_END=other_end is not None,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return result, gates, other_end


def _forward(
    x: Tensor, weight: Tensor, denominators: Denominators, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    tiles: int, precision: Precision, blocks: Blocks | None,
) -> tuple[Blocks, tuple[int, int, int, int], dict[str, Any]]:  # fmt: skip
    """The blocks, the result's shape (N, Ho, Wo, C) and the arguments that both forward kernels take."""
    check_two_stacks(denominators)
    if denominators.stabilizer == "guard":
        raise ValueError(
            "got a zero-guard, which needs the largest denominator of an image before its gates, and expected a "
            "stabilizer an epilogue can apply: 'signed', 'plain' or 'vanishing'"
        )
    images, height, width, channels = x.shape
    rows, *kernel, inner = weight.shape
    columns = rows // denominators.stacks
    _check_groups(groups, inner, columns // groups)
    out_height, out_width = (
        (x.shape[axis + 1] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    if blocks is None:
        blocks = candidates(columns // groups, inner, tiles, x.dtype, precision)[0]
    return blocks, (images, out_height, out_width, columns), {
        "row_count": images * out_height * out_width, "height": height, "width": width,
        "out_height": out_height, "out_width": out_width, "channels": channels, "K": inner, "C": columns,
        "columns_of_group": columns // groups, **_geometry((kernel[0], kernel[1]), stride, padding, dilation),
        "STACKS": denominators.stacks, **denominators.arguments(),
        **_tile(blocks, precision), "EVEN_K": inner % blocks.inner == 0,
    }  # fmt: skip


def _check_groups(groups: int, inputs: int, outputs: int) -> None:
    if groups > 1 and min(inputs, outputs) < 16:
        raise ValueError(
            f"got {groups} groups of {inputs} input and {outputs} output channels each, and expected at least 16 of "
            "either in a group: narrower ones fill no tile of a matrix product"
        )


def _geometry(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    named = {"TAPS": kernel, "STRIDE": stride, "PADDING": padding, "DILATION": dilation}
    return {f"{name}_{axis}": pair[index] for name, pair in named.items() for index, axis in enumerate("YX")}


def _tile(blocks: Blocks, precision: Precision) -> dict[str, Any]:
    return {"PRECISION": precision, "ROWS": blocks.rows, "COLUMNS": blocks.columns, "INNER": blocks.inner}


def _grid(blocks: Blocks, rows: int, columns: int, groups: int) -> tuple[int]:
    return (cdiv(rows, blocks.rows) * groups * cdiv(columns // groups, blocks.columns),)


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def first_tap(phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap i with ``phase − i · d`` divisible by the stride, or TAPS where none is."""
    first = phase * 0 + TAPS
    for tap in tl.static_range(TAPS):
        first = tl.where((phase - tap * DILATION) % STRIDE == 0, tl.minimum(first, tap), first)
    return first


@triton.jit
def _backward_kernel(
    s_ptr, weight_ptr, image_count, out_height, out_width, channels, segments, K, C, columns_of_group,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    PERIOD_Y: tl.constexpr, PERIOD_X: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs of the same pixels run one after another: tiles of columns, then phases (y % stride, x % stride).
    across = tl.cdiv(columns_of_group, COLUMNS)
    tile = tl.program_id(0) % (C // columns_of_group * across)
    rest = tl.program_id(0) // (C // columns_of_group * across)
    phase_y = rest % (STRIDE_Y * STRIDE_X) // STRIDE_X
    phase_x = rest % STRIDE_X
    group = tile // across
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    columns = group * columns_of_group + column
    phase_height = tl.cdiv(height - phase_y, STRIDE_Y)
    phase_width = tl.cdiv(width - phase_x, STRIDE_X)
    pixel = rest // (STRIDE_Y * STRIDE_X) * ROWS + tl.arange(0, ROWS)[:, None]
    row_inside = pixel < image_count * phase_height * phase_width
    # A stride above the size leaves a phase without any pixel: the maximum is for its divisions alone. Given to pixel_of it is
    # in the products too, and Triton 3.6 spills in float32 on sm_90.
    lines = pixel // tl.maximum(phase_width, 1)
    image = lines // tl.maximum(phase_height, 1)
    line, place = lines - image * phase_height, pixel - lines * phase_width
    # Of these taps the next reads s PERIOD · DILATION / STRIDE rows above: a convolution of stride 1 in each phase.
    tap_y = first_tap(phase_y + PADDING_Y, TAPS_Y, STRIDE_Y, DILATION_Y)
    tap_x = first_tap(phase_x + PADDING_X, TAPS_X, STRIDE_X, DILATION_X)
    taps_x = tl.cdiv(TAPS_X - tap_x, PERIOD_X)
    taps = tl.cdiv(TAPS_Y - tap_y, PERIOD_Y) * taps_x
    bottom = line + (phase_y + PADDING_Y - tap_y * DILATION_Y) // STRIDE_Y
    right = place + (phase_x + PADDING_X - tap_x * DILATION_X) // STRIDE_X
    inner = tl.arange(0, INNER)
    s_rows = s_ptr + ((image * out_height + bottom) * out_width + right).to(tl.int64) * channels + group * K  # [BM, 1]
    weight_columns = weight_ptr + tl.minimum(columns, C - 1) * (TAPS_Y * TAPS_X * segments * K)  # [1, BN]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(taps * segments * tl.cdiv(K, INNER)):
        tap = step % tl.maximum(taps, 1)
        segment = step // tl.maximum(taps, 1) % segments
        k = step // tl.maximum(taps * segments, 1) * INNER + inner
        along_y = tap // tl.maximum(taps_x, 1)
        along_x = tap % tl.maximum(taps_x, 1)
        up = along_y * (PERIOD_Y * DILATION_Y // STRIDE_Y)
        left = along_x * (PERIOD_X * DILATION_X // STRIDE_X)
        there = (bottom >= up) & (bottom - up < out_height) & (right >= left) & (right - left < out_width)
        there = there & row_inside
        if not EVEN_K:
            there = there & (k < K)[None, :]
        offset = segment * (channels // segments) - (up * out_width + left) * channels
        message = tl.load(s_rows + offset + k[None, :], mask=there, other=0.0)  # [BM, BK]
        tap_row = (tap_y + along_y * PERIOD_Y) * TAPS_X + tap_x + along_x * PERIOD_X
        pointers = weight_columns + (tap_row * segments + segment) * K + k[:, None]  # [BK, BN]
        if EVEN_K:
            weights = tl.load(pointers)
        else:
            weights = tl.load(pointers, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(message, weights, acc, input_precision=PRECISION)
    row = (image * height + line * STRIDE_Y + phase_y) * width + place * STRIDE_X + phase_x
    settle(
        acc, 1.0, row.to(tl.int64), columns, row_inside & (column < columns_of_group), C,
        value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
        scale_a, scale_b, gate_rows, height, width,
        HAS_VALUE, HAS_PREVIOUS, PREVIOUS_STRIDE, HAS_DENSE, HAS_EVEN,
        GATE_A, GROUPS_A, PART_A, END_B, GATE_B, GROUPS_B, PART_B,
    )  # fmt: skip


def pack_backward(weight: Tensor, *, groups: int = 1, gates: int = 1) -> Tensor:
    """The weight (G · C, kh, kw, Cin / groups) as :func:`backward` reads it, (Cin, kh, kw, segments, K), contiguous.

    What is summed over lies last: for each input channel and tap the output channels of its group. Those of one gate
    are a segment, K = C / groups, G = ``gates`` segments; without groups they are one segment of G · C.
    """
    segments = gates if groups > 1 else 1
    split = weight.unflatten(0, (segments, groups, -1))  # (segments, groups, K, kh, kw, Cin / groups)
    return split.permute(1, 5, 3, 4, 0, 2).flatten(0, 1).contiguous()


def settles(arrival: Arrival, groups: int, columns: int) -> bool:
    """Whether :func:`backward` can settle an arrival: two groups must not share the eight columns that a sum is of."""
    return groups == 1 or columns // groups % 8 == 0 or all(end.part != "guarded" for end in arrival.ends)


def backward(
    s: Tensor, weight: Tensor, arrival: Arrival, *, height: int, width: int, stride: Pair, padding: Pair,
    dilation: Pair = (1, 1), groups: int = 1, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What leaves at each end of ``arrival``, (M · N, height, width, groups · Cin), from s (M · N, Ho, Wo, G · C).

    ``weight`` (Cin, kh, kw, segments, K) from :func:`pack_backward`. Everything contiguous. ValueError for narrow groups, and
    where :func:`settles` says no.
    """
    maps, out_height, out_width, channels = s.shape
    columns, *kernel, segments, inner = weight.shape
    _check_groups(groups, columns // groups, inner)
    if not settles(arrival, groups, columns):
        raise ValueError(
            f"got groups of {columns // groups} channels and expected multiples of 8: a guarded end sums every eight of them"
        )
    if blocks is None:
        blocks = candidates(columns // groups, inner, len(arrival.ends), s.dtype, precision)[0]
    phases = stride[0] * stride[1]
    largest = maps * cdiv(height, stride[0]) * cdiv(width, stride[1])  # pixels of the first phase
    arrival = arrival.prepared(s, (maps, height, width, columns))
    _backward_kernel[(_grid(blocks, largest, columns, groups)[0] * phases,)](
        s, weight, maps, out_height, out_width, channels, segments, inner, columns, columns // groups,
        **arrival.arguments(maps * height * width, height, width),
        **_geometry((kernel[0], kernel[1]), stride, padding, dilation),
        PERIOD_Y=stride[0] // math.gcd(stride[0], dilation[0]), PERIOD_X=stride[1] // math.gcd(stride[1], dilation[1]),
        **_tile(blocks, precision), EVEN_K=inner % blocks.inner == 0,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return arrival.outputs


# The stem's heatmap ---------------------------------------------------------------------------------------------------


@triton.jit
def _stem_heatmap_kernel(
    s_ptr, weight_ptr, out_ptr, row_count, height, width, out_height, out_width, K,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr, READ_Y: tl.constexpr, READ_X: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # A row is a block of TALL × WIDE pixels of the map, a column one of its pixels, a step one pixel of s it reads.
    blocks_y = tl.cdiv(height, TALL)
    blocks_x = tl.cdiv(width, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    image, block_y, block_x = pixel_of(row, blocks_y, blocks_x)
    top = block_y * (TALL // STRIDE_Y) + FIRST_Y
    left = block_x * (WIDE // STRIDE_X) + FIRST_X
    inner = tl.arange(0, INNER)
    s_rows = s_ptr + ((image * out_height + top) * out_width + left).to(tl.int64) * K  # [BM, 1]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(READ_Y * READ_X * tl.cdiv(K, INNER)):
        down = step % (READ_Y * READ_X) // READ_X
        right = step % READ_X
        k = step // (READ_Y * READ_X) * INNER + inner
        there = (top + down >= 0) & (top + down < out_height) & (left + right >= 0) & (left + right < out_width)
        there = there & (row < row_count)
        tap_y = column // WIDE + PADDING_Y - STRIDE_Y * (FIRST_Y + down)  # [1, BN]
        tap_x = column % WIDE + PADDING_X - STRIDE_X * (FIRST_X + right)
        used = (tap_y >= 0) & (tap_y < TAPS_Y) & (tap_x >= 0) & (tap_x < TAPS_X)
        if not EVEN_K:
            there = there & (k < K)[None, :]
            used = used & (k < K)[:, None]
        message = tl.load(s_rows + (down * out_width + right) * K + k[None, :], mask=there, other=0.0)  # [BM, BK]
        weights = tl.load(weight_ptr + (tap_y * TAPS_X + tap_x) * K + k[:, None], mask=used, other=0.0)  # [BK, BN]
        acc = tl.dot(message, weights, acc, input_precision=PRECISION)
    y = block_y * TALL + column // WIDE
    x = block_x * WIDE + column % WIDE
    inside = (row < row_count) & (column < TALL * WIDE) & (y < height) & (x < width)
    tl.store(out_ptr + (image.to(tl.int64) * height + y) * width + x, acc, mask=inside)


STEM_TABLE: dict[str, list[tuple[int, int, int, int, int]]] = {
    "half": [(128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 16, 64, 4, 4), (64, 64, 64, 8, 3)],
    "tf32": [(128, 64, 32, 4, 4), (64, 64, 32, 4, 4), (128, 16, 32, 4, 4)],
    "ieee": [(64, 16, 32, 4, 3), (128, 16, 32, 4, 2), (64, 64, 16, 8, 3)],
}


def stem_candidates(dtype: torch.dtype, precision: Precision = "ieee") -> list[Blocks]:
    """What is worth trying for :func:`stem_heatmap`; the first is the default. ``columns``: pixels of a row's block."""
    return [Blocks(*numbers) for numbers in STEM_TABLE["half" if dtype.itemsize == 2 else precision]]


def stem_heatmap(
    s: Tensor, weight: Tensor, *, stride: Pair, padding: Pair, height: int, width: int,
    precision: Precision = "ieee", blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """The map (M · N, height, width) float32 that s (M · N, Ho, Wo, K) sends through one input channel::

        H[y, x] = Σ_ij Σ_k s[(y + p − i) / s, (x + p − j) / s, k] · weight[i, j, k], over the taps where both divide

    ``weight`` (kh, kw, K), that of the stem summed over its input channels; it is rounded to the dtype of s. A matrix
    product all the same: the map in blocks of about 8 × 8 pixels, whose 64 sums all read the few pixels of s around a
    block, so that s is read 3 times from L2 at 7×7 and stride 2, where a sum for each pixel would read it 49 times.
    """
    maps, out_height, out_width, inner = s.shape
    blocks = blocks or stem_candidates(s.dtype, precision)[0]
    tall, wide = (max(1, math.isqrt(blocks.columns) // step) * step for step in stride)
    first = [-((taps - 1 - around) // step) for taps, around, step in zip(weight.shape, padding, stride, strict=False)]
    read = [
        (size - 1 + around) // step - begin + 1
        for size, around, step, begin in zip((tall, wide), padding, stride, first, strict=True)
    ]
    rows = maps * cdiv(height, tall) * cdiv(width, wide)
    result = s.new_empty(maps, height, width, dtype=torch.float32)
    geometry = _geometry((weight.shape[0], weight.shape[1]), stride, padding, (1, 1))
    _stem_heatmap_kernel[(cdiv(rows, blocks.rows),)](
        s, weight.to(s.dtype), result, rows, height, width, out_height, out_width, inner,
        **{name: value for name, value in geometry.items() if "DILATION" not in name},
        TALL=tall, WIDE=wide, FIRST_Y=first[0], FIRST_X=first[1], READ_Y=read[0], READ_X=read[1],
        EVEN_K=inner % blocks.inner == 0, PRECISION=precision, ROWS=blocks.rows, INNER=blocks.inner,
        COLUMNS=max(16, next_power_of_2(tall * wide)),
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return result
