"""1×1 convolutions as matrix products of NHWC activations, with the passes that follow them as epilogues.

Forward, S weights stacked (S = 1 or 2), row (n, oy, ox) of the result reading x at (n, s·oy, s·ox)::

    first = x @ weight[:C]ᵀ + bias[:C]      second = x @ weight[C:]ᵀ + bias[C:]

    gated     value = ReLU(first)           gate_g = numerator · mask_g / stab(z_g)
    merged    merged = ReLU(first + other)  gate_g = ρ · mask_g / stab(z_g), ρ the branch's weight under the split
    maximum   maximum[n] = factor · max over image n of z_1

x rows × K, weight S · C × K → value rows × C, gates rows × G · C; ``z_g`` as in :mod:`common`. ``other`` is
read, or, as a projection, one more product of the same program, whose stacked output then never leaves it.
Backward, an :class:`Arrival` settling what one or two messages s (rows × K) bring::

    acc = s @ weightᵀ [+ s₂ @ weight₂ᵀ]     R = value · (acc + previous) + dense + even     out_e = R · gate_e

    [z = x @ weightᵀ + bias     out_1 = R · gate_1 / stab(z), by a :class:`Divisor`]

**All weights are C × K, with what is summed over (K) last in memory**, as a tensor core wants it in every dtype (TF32
``wgmma`` takes nothing else; any other layout would be transposed through registers at every step). So backward the
weight is the forward one transposed, Cin × G · Cout: packed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    Arrival,
    Branch,
    Denominators,
    Divisor,
    cdiv,
    check_one_denominator,
    check_two_stacks,
    gate_of,
    load_stack,
    merge_outputs,
    next_power_of_2,
    pixel_of,
    rectified,
    settle,
    store_gates,
    store_merge,
)

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Blocks:
    """A program's tile of the result (rows × columns), its step along K, and what the compiler is told."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


#        rows columns inner warps stages
TABLE: dict[tuple[str, str, int], list[tuple[int, int, int, int, int]]] = {
    ("half", "few", 1): [(64, 32, 128, 4, 3), (64, 32, 64, 4, 3), (32, 32, 128, 4, 3), (16, 64, 128, 4, 3)],
    ("half", "few", 2): [(64, 32, 64, 4, 3), (64, 64, 64, 4, 3), (32, 32, 128, 4, 3), (16, 32, 128, 4, 3)],
    ("half", "narrow", 1): [(128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (256, 64, 64, 8, 3)],
    ("half", "narrow", 2): [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (128, 32, 64, 4, 3)],
    ("half", "big", 1): [(128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (128, 256, 64, 8, 3)],
    ("half", "big", 2): [(128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3)],
    ("tf32", "few", 1): [(64, 64, 32, 4, 3), (64, 32, 64, 4, 3), (32, 32, 64, 4, 3), (16, 64, 64, 4, 3)],
    ("tf32", "few", 2): [(32, 32, 64, 4, 3), (64, 32, 64, 4, 3), (64, 64, 32, 4, 3), (16, 32, 64, 4, 3)],
    ("tf32", "narrow", 1): [(64, 64, 32, 4, 3), (128, 64, 16, 8, 3)],
    ("tf32", "narrow", 2): [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("tf32", "big", 1): [(128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (128, 64, 16, 8, 3)],
    ("tf32", "big", 2): [(128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("ieee", "few", 1): [(32, 32, 32, 4, 3), (32, 64, 32, 4, 3), (64, 64, 32, 8, 3)],
    ("ieee", "few", 2): [(32, 32, 32, 4, 3), (16, 32, 32, 4, 3), (64, 64, 16, 8, 3)],
    ("ieee", "narrow", 1): [(128, 64, 16, 8, 3), (64, 64, 32, 8, 3)],
    ("ieee", "narrow", 2): [(64, 64, 16, 8, 3), (64, 64, 32, 8, 3), (128, 32, 16, 4, 3)],
    ("ieee", "big", 1): [(64, 128, 16, 8, 3), (128, 128, 16, 8, 3)],
    ("ieee", "big", 2): [(64, 64, 16, 8, 3), (64, 64, 32, 8, 3), (128, 64, 16, 8, 3)],
    ("half", "few", 3): [(64, 32, 64, 4, 3), (64, 64, 64, 4, 3), (32, 32, 128, 4, 3), (16, 32, 128, 4, 3)],
    ("half", "narrow", 3): [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 32, 64, 4, 3)],
    ("half", "big", 3): [(64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 8, 3)],
    ("tf32", "few", 3): [(64, 64, 32, 4, 3), (32, 32, 64, 4, 3), (64, 32, 32, 4, 3), (16, 32, 64, 4, 3)],
    ("tf32", "narrow", 3): [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3)],
    ("tf32", "big", 3): [(64, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("ieee", "few", 3): [(32, 32, 32, 4, 3), (16, 32, 32, 4, 3), (64, 64, 16, 8, 3)],
    ("ieee", "narrow", 3): [(64, 64, 16, 8, 3), (64, 64, 32, 8, 3)],
    ("ieee", "big", 3): [(64, 64, 16, 8, 3), (64, 64, 32, 8, 3)],
    ("half", "few", 4): [(64, 32, 64, 4, 3), (32, 32, 128, 4, 3)],
    ("half", "narrow", 4): [(128, 64, 64, 8, 3), (128, 32, 64, 8, 3)],
    ("half", "big", 4): [(128, 64, 64, 8, 3), (128, 32, 64, 8, 3), (64, 32, 64, 4, 3)],
    ("tf32", "few", 4): [(64, 32, 64, 4, 3), (32, 32, 64, 4, 3)],
    ("tf32", "narrow", 4): [(128, 32, 32, 8, 3), (64, 32, 32, 4, 3)],
    ("tf32", "big", 4): [(128, 32, 32, 8, 3), (64, 128, 32, 8, 3)],
    ("ieee", "few", 4): [(32, 32, 32, 4, 3), (16, 32, 32, 4, 3)],
    ("ieee", "narrow", 4): [(64, 64, 16, 8, 3)],
    ("ieee", "big", 4): [(64, 64, 16, 8, 3)],
    ("half", "few", 8): [(32, 64, 64, 4, 3), (128, 32, 64, 8, 3)],
    ("half", "narrow", 8): [(128, 32, 64, 8, 3), (32, 64, 64, 4, 3)],
    ("half", "big", 8): [(128, 32, 64, 8, 3), (32, 64, 64, 4, 3)],
    ("tf32", "few", 8): [(64, 32, 32, 4, 3), (32, 32, 64, 4, 3)],
    ("tf32", "narrow", 8): [(64, 64, 32, 8, 3)],
    ("tf32", "big", 8): [(64, 64, 32, 8, 3), (64, 128, 32, 8, 3)],
    ("ieee", "few", 8): [(32, 32, 32, 4, 3), (16, 32, 32, 4, 3)],
    ("ieee", "narrow", 8): [(64, 64, 16, 8, 3)],
    ("ieee", "big", 8): [(64, 64, 16, 8, 3)],
}
FROM_HOPPER_ON = {
    ("half", "big", 2): [(128, 128, 64, 8, 3)],
    ("half", "big", 8): [(64, 64, 64, 8, 3)],
    ("ieee", "big", 1): [(64, 64, 32, 8, 3)],
}
"""Tiles that spill on what is older: half, since without wgmma operands go through registers."""


@lru_cache(maxsize=1024)
def candidates(
    rows: int, columns: int, inner: int, stacks: int, dtype: torch.dtype, precision: Precision, capability: int = 80
) -> tuple[Blocks, ...]:  # fmt: skip
    """What is worth trying for a rows × columns result, K = ``inner``; the first is the default.

    ``stacks``: how many tiles of the result a program holds at once, before registers spill: 1 backward and 3 with a divisor,
    S forward, and :func:`held` where two branches meet. ``capability``: 10 · major + minor of the device.
    """
    kind = "half" if dtype.itemsize == 2 else precision
    few = cdiv(rows, 128) * cdiv(columns, 64) < 264  # not two tiles for each of an H100's 132 processors
    key = kind, "few" if few else "narrow" if columns <= 64 else "big", stacks
    widest, deepest = (max(16, next_power_of_2(size)) for size in (columns, inner))
    fitting = []
    for high, wide, deep, warps, stages in TABLE[key] + (FROM_HOPPER_ON.get(key, []) if capability >= 90 else []):
        step = min(deep, deepest)
        fitting.append(Blocks(high, min(wide, widest), step, warps, min(stages, 1 + cdiv(inner, step))))
    return tuple(dict.fromkeys(fitting))


def held(denominators: Denominators, linear: bool, product: bool) -> int:
    """What a program of :func:`merged` holds at once, for :func:`candidates`.

    S, twice that where it multiplies for both branches (``product``), and again where it writes two gates for each.
    """
    if not linear:
        return denominators.stacks
    both = denominators.stacks * (2 if product else 1)
    return 2 * both if denominators.groups == 2 else both


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows [BM, 1] int64 and its first column; programs of the same rows run one after another."""
    program = tl.program_id(0)
    across = tl.cdiv(C, COLUMNS)
    rows = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    return rows, program % across * COLUMNS


@triton.jit
def part_of(tile, part: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile [BM, BN] that an epilogue does next: its ``part``-th of PARTS, 2 at least.

    A part at a time needs fewer registers. And what comes out of a split is in no layout of a tensor core: the compiler
    changes it once to the one of loads and stores, instead of every load and store to the one of the product, each
    through shared memory and waiting for the one before.
    """
    left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    if PARTS == 2:
        return right if part else left
    else:
        return part_of(right if part >= PARTS // 2 else left, part % (PARTS // 2), PARTS // 2, ROWS, COLUMNS // 2)


@triton.jit
def strided(rows, height, width, out_height, out_width, STRIDE: tl.constexpr):
    """The rows of an N · height · width input that the rows of an N · out_height · out_width result read."""
    if STRIDE == 1:
        return rows
    else:
        image, y, x = pixel_of(rows.to(tl.int32), out_height, out_width)
        return (image * height + y * STRIDE).to(tl.int64) * width + x * STRIDE


@triton.jit
def product(
    first, second, x_ptr, weight_ptr, rows, columns, C, K,
    INNER: tl.constexpr, EVEN_K: tl.constexpr, STACKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``first + x @ weight[:C]ᵀ`` and, with two stacks, ``second + x @ weight[C:]ᵀ``.

    first, second [BM, BN] float32; ``rows`` [BM, 1] int64 of x and ``columns`` [1, BN], all of which must exist.
    """
    inner = tl.arange(0, INNER)
    x_pointers = x_ptr + rows * K + inner[None, :]  # [BM, BK]
    first_pointers = weight_ptr + columns * K + inner[:, None]  # [BK, BN]
    second_pointers = first_pointers + C * K
    for start in range(0, K, INNER):
        if EVEN_K:
            x = tl.load(x_pointers)
            first_weight = tl.load(first_pointers)
        else:
            x = tl.load(x_pointers, mask=inner[None, :] < K - start, other=0.0)
            first_weight = tl.load(first_pointers, mask=inner[:, None] < K - start, other=0.0)
        first = tl.dot(x, first_weight, first, input_precision=PRECISION)
        if STACKS == 2:
            if EVEN_K:
                second_weight = tl.load(second_pointers)
            else:
                second_weight = tl.load(second_pointers, mask=inner[:, None] < K - start, other=0.0)
            second = tl.dot(x, second_weight, second, input_precision=PRECISION)
            second_pointers += INNER
        x_pointers += INNER
        first_pointers += INNER
    return first, second


@triton.jit
def stacked_product(
    x_ptr, weight_ptr, rows, first_column, row_count, height, width, out_height, out_width, C, K,
    STRIDE: tl.constexpr, STACKS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of the forward convolution without its bias: first and second (zero where S is 1), [BM, BN] float32."""
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = first
    rows = strided(tl.minimum(rows, row_count - 1), height, width, out_height, out_width, STRIDE)
    columns = tl.minimum(first_column + tl.arange(0, COLUMNS), C - 1)[None, :]
    return product(first, second, x_ptr, weight_ptr, rows, columns, C, K, INNER, EVEN_K, STACKS, PRECISION)


@triton.jit
def limits(limit_ptr, rows, row_count, rows_per_image, STABILIZER: tl.constexpr):
    """What counts as zero in the image of each row, [BM, 1], under a zero-guard."""
    if STABILIZER == "guard":
        return tl.load(limit_ptr + rows.to(tl.int32) // rows_per_image, mask=rows < row_count, other=0.0)
    else:
        return 0.0


@triton.jit
def add_bias(first, second, bias_ptr, columns, C, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """first and second (the same where S is 1), each plus its bias."""
    if HAS_BIAS:
        first += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    if STACKS == 1:
        return first, first
    else:
        if HAS_BIAS:
            second += tl.load(bias_ptr + C + columns, mask=columns < C, other=0.0).to(tl.float32)
        return first, second


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _gated_kernel(
    x_ptr, weight_ptr, bias_ptr, limit_ptr, value_ptr, gate_ptr,
    row_count, height, width, out_height, out_width, C, K, epsilon, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    STRIDE: tl.constexpr, RELU: tl.constexpr, OVER_VALUE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows, first_column = tile_of(C, ROWS, COLUMNS)
    whole_first, whole_second = stacked_product(
        x_ptr, weight_ptr, rows, first_column, row_count, height, width, out_height, out_width, C, K,
        STRIDE, STACKS, EVEN_K, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    limit = limits(limit_ptr, rows, row_count, out_height * out_width, STABILIZER)
    for part in tl.static_range(PARTS):
        columns = (first_column + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS))[None, :]
        inside = (rows < row_count) & (columns < C)
        first, second = add_bias(
            part_of(whole_first, part, PARTS, ROWS, COLUMNS), part_of(whole_second, part, PARTS, ROWS, COLUMNS),
            bias_ptr, columns, C, STACKS, HAS_BIAS,
        )  # fmt: skip
        value = rectified(first) if RELU else first
        tl.store(value_ptr + rows * C + columns, value, mask=inside)
        numerator = value if OVER_VALUE else tl.full(value.shape, 1.0, tl.float32)
        store_gates(
            gate_ptr, first, second, numerator, rows, columns, inside, C, epsilon, limit, gamma,
            KIND, STABILIZER,
        )  # fmt: skip


@triton.jit
def _merged_kernel(
    x_ptr, weight_ptr, bias_ptr, limit_ptr, branch_ptr, branch_weight_ptr, branch_bias_ptr, branch_limit_ptr,
    merged_ptr, gate_ptr, other_ptr,
    row_count, height, width, out_height, out_width, branch_height, branch_width, C, K, BRANCH_K, epsilon, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    STRIDE: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, IS_RESIDUAL: tl.constexpr,
    OTHER_LINEAR: tl.constexpr, OTHER_BIAS: tl.constexpr, HAS_GATES: tl.constexpr, HAS_OTHER_END: tl.constexpr,
    OTHER_PRODUCT: tl.constexpr, BRANCH_STRIDE: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_BRANCH_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows, first_column = tile_of(C, ROWS, COLUMNS)
    whole_first, whole_second = stacked_product(
        x_ptr, weight_ptr, rows, first_column, row_count, height, width, out_height, out_width, C, K,
        STRIDE, STACKS, EVEN_K, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    if OTHER_PRODUCT:
        branch_first, branch_second = stacked_product(
            branch_ptr, branch_weight_ptr, rows, first_column, row_count, branch_height, branch_width,
            out_height, out_width, C, BRANCH_K,
            BRANCH_STRIDE, STACKS, EVEN_BRANCH_K, PRECISION, ROWS, COLUMNS, INNER,
        )  # fmt: skip
    limit = limits(limit_ptr, rows, row_count, out_height * out_width, STABILIZER)
    branch_limit = limits(branch_limit_ptr, rows, row_count, out_height * out_width, STABILIZER)
    for part in tl.static_range(PARTS):
        columns = (first_column + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS))[None, :]
        column_inside = columns < C
        inside = (rows < row_count) & column_inside
        first, second = add_bias(
            part_of(whole_first, part, PARTS, ROWS, COLUMNS), part_of(whole_second, part, PARTS, ROWS, COLUMNS),
            bias_ptr, columns, C, STACKS, HAS_BIAS,
        )  # fmt: skip
        if OTHER_PRODUCT:
            other_first, other_second = add_bias(
                part_of(branch_first, part, PARTS, ROWS, COLUMNS), part_of(branch_second, part, PARTS, ROWS, COLUMNS),
                branch_bias_ptr, columns, C, STACKS, OTHER_BIAS,
            )  # fmt: skip
        else:
            other_first, other_second = load_stack(
                branch_ptr, branch_bias_ptr, rows, columns, inside, column_inside, C,
                STACKS if OTHER_LINEAR else 1, OTHER_BIAS,
            )  # fmt: skip
        store_merge(
            first, second, other_first, other_second, merged_ptr, gate_ptr, other_ptr, rows, columns, inside, C,
            epsilon, limit, branch_limit, gamma, KIND, STABILIZER, SPLIT, RELU, IS_RESIDUAL, OTHER_LINEAR,
            HAS_GATES, HAS_OTHER_END,
        )  # fmt: skip


@triton.jit
def _maximum_kernel(
    x_ptr, weight_ptr, bias_ptr, maximum_ptr, row_count, height, width, out_height, out_width, C, K, factor,
    STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows, first_column = tile_of(C, ROWS, COLUMNS)
    z, _ = stacked_product(
        x_ptr, weight_ptr, rows, first_column, row_count, height, width, out_height, out_width, C, K,
        STRIDE, 1, EVEN_K, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    columns = (first_column + tl.arange(0, COLUMNS))[None, :]
    z, _ = add_bias(z, z, bias_ptr, columns, C, 1, HAS_BIAS)
    highest = tl.max(tl.where(columns < C, z, float("-inf")), 1)[:, None]
    place = rows * tl.cdiv(C, COLUMNS) + first_column // COLUMNS
    tl.store(maximum_ptr + place, factor * highest, mask=rows < row_count)


def image_maximum(
    x: Tensor, weight: Tensor, bias: Tensor | None, denominators: Denominators, *, stride: int = 1,
    factor: float = 1.0, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """The largest denominator of each image times ``factor`` ≥ 0, (N,) float32, of what :func:`gated` would divide by.

    x, weight and bias as there. The denominators are multiplied out, and only their maxima leave the kernel. ValueError
    for rules of two denominators.
    """
    check_one_denominator(denominators)
    channels = weight.shape[0] // denominators.stacks
    plain = Denominators("own")
    weight, bias = weight[-channels:], None if bias is None else bias[-channels:]
    blocks, (images, *_), arguments = _forward(x, weight, plain, stride, precision, blocks, 1)
    grid = _grid(blocks, arguments["row_count"], channels)
    maximum = x.new_empty(arguments["row_count"], cdiv(channels, blocks.columns), dtype=torch.float32)
    used = {name: arguments[name] for name in _maximum_kernel.arg_names if name in arguments}
    _maximum_kernel[grid](
        x, weight, x if bias is None else bias, maximum, factor=factor, HAS_BIAS=bias is not None, **used,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return maximum.view(images, -1).amax(1)


def gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, denominators: Denominators, *, stride: int = 1,
    relu: bool, over_value: bool, limit: Tensor | None = None, precision: Precision = "ieee",
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value (N, Ho, Wo, C) and gates (N, Ho, Wo, G · C) from x (N, H, W, K) and weight (S · C, K), contiguous.

    ``over_value``: the gate's numerator is the value, else one. Ho = ⌈H/stride⌉. ``limit``: (N,) float32, for a zero-guard,
    which :func:`image_maximum` computes.
    """
    blocks, shape, arguments = _forward(
        x, weight, denominators, stride, precision, blocks, denominators.stacks
    )  # fmt: skip
    value = x.new_empty(*shape)
    gates = x.new_empty(*shape[:-1], shape[-1] * denominators.groups)
    _gated_kernel[_grid(blocks, arguments["row_count"], shape[-1])](
        x, weight, x if bias is None else bias, x if limit is None else limit, value, gates, **arguments,
        HAS_BIAS=bias is not None, RELU=relu, OVER_VALUE=over_value,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return value, gates


def merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Branch, denominators: Denominators, split: str, *,
    stride: int = 1, relu: bool, is_residual: bool, limit: Tensor | None = None, keeps_weight: bool = True,
    keeps_gates: bool = True, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Merged (N, Ho, Wo, C), this branch's gates (N, Ho, Wo, G · C), and how relevance leaves for the ``other``.

    That is its gates (…, G · C) if it is linear, else its weight (…, C), or None where the split is constant. Weight and
    gates need not be kept (see ``merge.merge``). With a weight of the other's its last layer is multiplied here too, and
    its stacked output is never written, nor rounded.
    """
    blocks, shape, arguments = _forward(
        x, weight, denominators, stride, precision, blocks, held(denominators, other.linear, other.weight is not None)
    )
    result, gates, other_end = merge_outputs(x, shape, denominators, split, other.linear, keeps_weight, keeps_gates)
    _merged_kernel[_grid(blocks, arguments["row_count"], shape[-1])](
        x, weight, x if bias is None else bias, x if limit is None else limit,
        other.tensor, weight if other.weight is None else other.weight, x if other.bias is None else other.bias,
        x if other.limit is None else other.limit,
        result, result if gates is None else gates, result if other_end is None else other_end, **arguments,
        branch_height=other.tensor.shape[1], branch_width=other.tensor.shape[2], BRANCH_K=other.tensor.shape[3],
        HAS_BIAS=bias is not None, RELU=relu, SPLIT=split, IS_RESIDUAL=is_residual,
        OTHER_LINEAR=other.linear, OTHER_BIAS=other.linear and other.bias is not None,
        HAS_GATES=keeps_gates, HAS_OTHER_END=other_end is not None,
        OTHER_PRODUCT=other.weight is not None, BRANCH_STRIDE=other.stride,
        EVEN_BRANCH_K=other.tensor.shape[3] % blocks.inner == 0,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return result, gates, other_end


def _forward(
    x: Tensor, weight: Tensor, denominators: Denominators, stride: int, precision: Precision, blocks: Blocks | None,
    stacks: int,
) -> tuple[Blocks, tuple[int, int, int, int], dict[str, Any]]:  # fmt: skip
    """The blocks, the result's shape (N, Ho, Wo, C) and the arguments that both forward kernels take."""
    check_two_stacks(denominators)
    images, height, width, inner = x.shape
    columns = weight.shape[0] // denominators.stacks
    shape = (images, (height - 1) // stride + 1, (width - 1) // stride + 1, columns)
    rows = images * shape[1] * shape[2]
    if blocks is None:
        blocks = candidates(rows, columns, inner, stacks, x.dtype, precision)[0]
    sizes = {"row_count": rows, "height": height, "width": width, "out_height": shape[1], "out_width": shape[2]}
    return blocks, shape, {
        **sizes, "C": columns, "K": inner, "STRIDE": stride, "STACKS": denominators.stacks, **denominators.arguments(),
        **_tile(blocks, precision), "EVEN_K": inner % blocks.inner == 0,
    }  # fmt: skip


def _tile(blocks: Blocks, precision: Precision) -> dict[str, Any]:
    parts = max(2, blocks.columns // 32)
    return {
        "PRECISION": precision,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "INNER": blocks.inner,
        "PARTS": parts,
    }


def _grid(blocks: Blocks, rows: int, columns: int) -> tuple[int]:
    return (cdiv(rows, blocks.rows) * cdiv(columns, blocks.columns),)


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_kernel(
    s_ptr, weight_ptr, other_s_ptr, other_weight_ptr, x_ptr, x_weight_ptr, x_bias_ptr, row_count, C, K, OTHER_K, X_K,
    epsilon,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_DIVISOR: tl.constexpr, HAS_BIAS: tl.constexpr, STABILIZER: tl.constexpr,
    EVEN_K: tl.constexpr, OTHER_EVEN_K: tl.constexpr, EVEN_X_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows, first_column = tile_of(C, ROWS, COLUMNS)
    row = tl.minimum(rows, row_count - 1)
    column = tl.minimum(first_column + tl.arange(0, COLUMNS), C - 1)[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc, _ = product(acc, acc, s_ptr, weight_ptr, row, column, C, K, INNER, EVEN_K, 1, PRECISION)
    if HAS_OTHER:
        acc, _ = product(
            acc, acc, other_s_ptr, other_weight_ptr, row, column, C, OTHER_K, INNER, OTHER_EVEN_K, 1, PRECISION
        )
    z = acc
    if HAS_DIVISOR:
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        of_image = (row.to(tl.int32) % gate_rows).to(tl.int64)
        z, _ = product(z, z, x_ptr, x_weight_ptr, of_image, column, C, X_K, INNER, EVEN_X_K, 1, PRECISION)
    for part in tl.static_range(PARTS):
        columns = (first_column + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS))[None, :]
        share = 1.0
        if HAS_DIVISOR:
            divisor, _ = add_bias(
                part_of(z, part, PARTS, ROWS, COLUMNS), 0.0, x_bias_ptr, columns, C, 1, HAS_BIAS
            )  # fmt: skip
            share = gate_of(divisor, 1.0, epsilon, 0.0, STABILIZER)
        settle(
            part_of(acc, part, PARTS, ROWS, COLUMNS), share, rows, columns, (rows < row_count) & (columns < C), C,
            value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
            scale_a, scale_b, gate_rows, height, width,
            HAS_VALUE, HAS_PREVIOUS, PREVIOUS_STRIDE, HAS_DENSE, HAS_EVEN,
            GATE_A, GROUPS_A, PART_A, END_B, GATE_B, GROUPS_B, PART_B,
        )  # fmt: skip


def backward(
    s: Tensor, weight: Tensor, arrival: Arrival, *, second: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "ieee", blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What leaves at each end of ``arrival``, (M · N, H, W, groups · C), from s (M · N, H, W, K), M maps of each image.

    ``weight`` (C, K): the forward weight transposed. ``second``: another message of the same rows and its weight,
    (M · N, H, W, K₂) and (C, K₂), such as a projection's. Everything contiguous. The first end may have a divisor.
    """
    maps, height, width, inner = s.shape
    rows, columns = maps * height * width, weight.shape[0]
    other_s, other_weight = (s, weight) if second is None else second
    other_inner = other_s.shape[-1]
    if blocks is None:
        tiles, deepest = (1, 0) if arrival.divisor is None else (3, arrival.divisor.x.shape[-1])
        blocks = candidates(rows, columns, max(inner, other_inner, deepest), tiles, s.dtype, precision)[0]
    arrival = arrival.prepared(s, (maps, height, width, columns), divides=True)
    divisor = arrival.divisor or Divisor(s, weight, None, 0.0, "plain")
    divisor_inner = divisor.x.shape[-1]
    _backward_kernel[_grid(blocks, rows, columns)](
        s, weight, other_s, other_weight, divisor.x, divisor.weight, s if divisor.bias is None else divisor.bias,
        rows, columns, inner, other_inner, divisor_inner, divisor.epsilon,
        HAS_DIVISOR=arrival.divisor is not None, HAS_BIAS=divisor.bias is not None, STABILIZER=divisor.stabilizer,
        EVEN_X_K=divisor_inner % blocks.inner == 0,
        **arrival.arguments(rows, height, width), **_tile(blocks, precision), HAS_OTHER=second is not None,
        EVEN_K=inner % blocks.inner == 0, OTHER_EVEN_K=other_inner % blocks.inner == 0,
        num_warps=blocks.warps, num_stages=blocks.stages, **OPTIONS,
    )  # fmt: skip
    return arrival.outputs
