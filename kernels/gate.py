"""After a convolution with stacked weights: bias, ReLU, denominators and gates, in one pass.

    first = stacked[:, :C] + bias[:C]      second = stacked[:, C:] + bias[C:]            (BN is folded into both)
    value = ReLU(first)                    gate_g = numerator · mask_g / stab(z_g)
    maximum[n] = factor · max over image n of z_1                  (a zero-guard's limit, if the factor is its threshold)

stacked rows × S · C → value rows × C, gates rows × G · C, maximum (N,) float32; ``z_g`` as in :mod:`common`.
With a ``group_width`` the stacks of a grouped convolution lie group by group: W columns of the first, W of the second,
and so on, W = C / groups; the bias lies (first, second) as ever.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    Denominators,
    cdiv,
    check_one_denominator,
    divisible,
    rectified,
    store_gates,
    tile,
    tile_at,
)


@triton.jit
def load_one(
    stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C,
    PLACE: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of the stack at that place of a raw convolution output, plus its bias; stacks may lie group by group."""
    if GROUP_WIDTH == 0:
        place = rows * (STACKS * C) + PLACE * C + columns
    else:
        place = (
            rows * (STACKS * C) + columns + columns // GROUP_WIDTH * ((STACKS - 1) * GROUP_WIDTH) + PLACE * GROUP_WIDTH
        )
    value = tl.load(stacked_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + PLACE * C + columns, mask=column_inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _gate_kernel(
    stacked_ptr, bias_ptr, limit_ptr, fixed_ptr, value_ptr, gate_ptr, row_count, rows_per_image, C, epsilon, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    FIXED: tl.constexpr,
    RELU: tl.constexpr, OVER_VALUE: tl.constexpr, GROUP_WIDTH: tl.constexpr, EIGHTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    column_inside = columns < C
    inside = (rows < row_count) & column_inside
    first = load_one(stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, 0, STACKS, HAS_BIAS, GROUP_WIDTH)
    second = first
    if STACKS > 1:
        second = load_one(
            stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, 1, STACKS, HAS_BIAS, GROUP_WIDTH
        )
    value = rectified(first) if RELU else first
    tl.store(value_ptr + rows * C + columns, value, mask=inside)
    limit = 0.0
    if STABILIZER == "guard":
        limit = tl.load(limit_ptr + rows.to(tl.int32) // rows_per_image, mask=rows < row_count, other=0.0)
    numerator = value if OVER_VALUE else tl.full(value.shape, 1.0, tl.float32)
    if FIXED:
        of_image = rows.to(tl.int32) % rows_per_image
        fixed = tl.load(fixed_ptr + of_image * C + columns, mask=inside, other=1.0).to(tl.float32)
        first = fixed
        second += fixed
    if KIND == "apart":
        first = second
        second = load_one(
            stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, 2, STACKS, HAS_BIAS, GROUP_WIDTH
        )
    store_gates(
        gate_ptr, first, second, numerator, rows, columns, inside, C, epsilon, limit, gamma,
        KIND, STABILIZER,
    )  # fmt: skip


@triton.jit
def _maximum_kernel(
    stacked_ptr, bias_ptr, maximum_ptr, rows_per_image, C, programs, factor,
    STACKS: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP_WIDTH: tl.constexpr,
    EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    # One dimension of programs: a GPU's second has 65,535 at most, and a batch of small images may have more.
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    rows, columns = tile_at(program, C, BLOCK_ROWS, BLOCK_COLUMNS)  # rows of that image
    column_inside = columns < C
    inside = (rows < rows_per_image) & column_inside
    rows += image.to(tl.int64) * rows_per_image
    z = load_one(
        stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, STACKS - 1, STACKS, HAS_BIAS, GROUP_WIDTH
    )
    z = tl.where(inside, z, float("-inf"))
    tl.store(maximum_ptr + tl.program_id(0), factor * tl.max(z))


def gate(
    stacked: Tensor, bias: Tensor | None, denominators: Denominators, *, relu: bool, over_value: bool,
    limit: Tensor | None = None, fixed: Tensor | None = None, group_width: int = 0,
    block: tuple[int, int] | None = None, num_warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value (…, C) and gates (…, G · C) from a raw convolution output (N, H, W, S · C), contiguous.

    ``over_value``: the gate's numerator is the value, else one. ``limit``: (N,) float32, for a zero-guard.
    ``fixed``: (H, W, C), what of the denominators is the same for every image: of kind "own" all there is to them, of
    kind "stacked" added to the second stack. ``group_width``: not 0 if the stacks lie group by group.
    """
    if fixed is not None and denominators.groups != 1:
        raise ValueError(
            f"denominators that are fixed go with the kinds 'own' and 'stacked', got {denominators.kind!r}"
        )
    channels = stacked.shape[-1] // denominators.stacks
    rows = stacked.numel() // stacked.shape[-1]
    value = stacked.new_empty(*stacked.shape[:-1], channels)
    gates = stacked.new_empty(*stacked.shape[:-1], channels * denominators.groups)
    block = block or tile(channels)
    grid = (cdiv(rows, block[0]) * cdiv(channels, block[1]),)
    _gate_kernel[grid](
        stacked, stacked if bias is None else bias, stacked if limit is None else limit,
        stacked if fixed is None else fixed, value, gates, rows, rows // stacked.shape[0], channels, **denominators.arguments(),
        STACKS=denominators.stacks, HAS_BIAS=bias is not None, FIXED=fixed is not None, RELU=relu, OVER_VALUE=over_value,
        GROUP_WIDTH=group_width, EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1],
        num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return value, gates


def image_maximum(
    stacked: Tensor, bias: Tensor | None, denominators: Denominators, *, factor: float = 1.0, group_width: int = 0,
    block: tuple[int, int] | None = None, num_warps: int = 4,
) -> Tensor:  # fmt: skip
    """The largest denominator of each image times ``factor`` ≥ 0, (N,) float32.

    Of a raw convolution output (N, …, S · C), contiguous. ValueError for rules of two denominators.
    """
    check_one_denominator(denominators)
    images, channels = stacked.shape[0], stacked.shape[-1] // denominators.stacks
    rows = stacked.numel() // stacked.shape[-1] // images
    block = block or tile(channels, 4096)
    programs = cdiv(rows, block[0]) * cdiv(channels, block[1])
    maximum = stacked.new_empty(images, programs, dtype=torch.float32)
    _maximum_kernel[(images * programs,)](
        stacked, stacked if bias is None else bias, maximum, rows, channels, programs, factor,
        STACKS=denominators.stacks, HAS_BIAS=bias is not None,
        GROUP_WIDTH=group_width, EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1],
        num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return maximum.amax(1)
