"""Where two branches meet, as one element-wise pass: forward the sum and how relevance leaves, backward what arrives.

    forward     h = ReLU(F + S)      gate_g = ρ · mask_g / stab(z_g) of a linear branch, ρ itself of a plain one
    backward    R = value · (acc + previous) + dense + even        out_e = R · gate_e

F the residual branch, S the skip, ρ a branch's weight under the split; rows × C, a linear branch rows × S · C raw.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    SPLITS,
    Arrival,
    Branch,
    Denominators,
    cdiv,
    check_two_stacks,
    divisible,
    load_stack,
    merge_outputs,
    settle,
    store_merge,
    tile,
    tile_at,
)


@triton.jit
def _merge_kernel(
    stacked_ptr, bias_ptr, limit_ptr, branch_ptr, branch_bias_ptr, branch_limit_ptr, merged_ptr, gate_ptr, other_ptr,
    row_count, rows_per_image, C, epsilon, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, RELU: tl.constexpr, IS_RESIDUAL: tl.constexpr,
    OTHER_LINEAR: tl.constexpr, OTHER_BIAS: tl.constexpr, HAS_GATES: tl.constexpr, HAS_OTHER_END: tl.constexpr,
    EIGHTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    column_inside = columns < C
    inside = (rows < row_count) & column_inside
    first, second = load_stack(stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, STACKS, HAS_BIAS)
    other_first, other_second = load_stack(
        branch_ptr, branch_bias_ptr, rows, columns, inside, column_inside, C,
        STACKS if OTHER_LINEAR else 1, OTHER_BIAS,
    )  # fmt: skip
    limit = 0.0
    other_limit = 0.0
    if STABILIZER == "guard":
        image = rows.to(tl.int32) // rows_per_image
        limit = tl.load(limit_ptr + image, mask=rows < row_count, other=0.0)
        if OTHER_LINEAR:
            other_limit = tl.load(branch_limit_ptr + image, mask=rows < row_count, other=0.0)
    store_merge(
        first, second, other_first, other_second, merged_ptr, gate_ptr, other_ptr, rows, columns, inside, C,
        epsilon, limit, other_limit, gamma, KIND, STABILIZER, SPLIT, RELU, IS_RESIDUAL, OTHER_LINEAR, HAS_GATES, HAS_OTHER_END,
    )  # fmt: skip


@triton.jit
def _arrive_kernel(
    acc_ptr, row_count, C,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
    HAS_ACC: tl.constexpr, EIGHTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    C = divisible(C, EIGHTH)
    rows, columns = tile_at(tl.program_id(0), C, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (rows < row_count) & (columns < C)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if HAS_ACC:
        acc = tl.load(acc_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
    settle(
        acc, 1.0, rows, columns, inside, C,
        value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
        scale_a, scale_b, gate_rows, height, width,
        HAS_VALUE, HAS_PREVIOUS, PREVIOUS_STRIDE, HAS_DENSE, HAS_EVEN,
        GATE_A, GROUPS_A, PART_A, END_B, GATE_B, GROUPS_B, PART_B,
    )  # fmt: skip


def merge(
    branch: Branch, other: Branch, denominators: Denominators, split: str, *, relu: bool, is_residual: bool,
    keeps_weight: bool = True, keeps_gates: bool = True, block: tuple[int, int] | None = None, num_warps: int = 4,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Merged (…, C), the gates (…, G · C) of ``branch``, which is linear, and how relevance leaves for the ``other``.

    That is its gates (…, G · C) if it is linear, else its weight (…, C), or None where the split is constant or the weight
    is not kept: an :class:`~lrp_fast.kernels.common.End` of part "ratio" or "signed" finds it again. Nor are the gates, where
    one of part "ratio rest" or "signed rest" with a :class:`~lrp_fast.kernels.common.Divisor` does.
    ``is_residual``: ``branch`` is the residual one. Both have the same denominators and, under a zero-guard, limits of
    their own. Tensors (N, …, S · C) or (N, …, C), contiguous. ValueError for a ``branch`` that is not linear, or three stacks.
    """
    if not branch.linear:
        raise ValueError("got two plain branches or the linear one second, and expected the linear one first")
    check_two_stacks(denominators)
    if split not in SPLITS:
        raise ValueError(f"got the split {split!r}, and expected one of {', '.join(SPLITS)}")
    stacked = branch.tensor
    channels = stacked.shape[-1] // denominators.stacks
    rows = stacked.numel() // stacked.shape[-1]
    merged, gates, other_end = merge_outputs(
        stacked, (*stacked.shape[:-1], channels), denominators, split, other.linear, keeps_weight, keeps_gates
    )
    block = block or tile(channels)
    grid = (cdiv(rows, block[0]) * cdiv(channels, block[1]),)
    _merge_kernel[grid](
        stacked, stacked if branch.bias is None else branch.bias, stacked if branch.limit is None else branch.limit,
        other.tensor, stacked if other.bias is None else other.bias, stacked if other.limit is None else other.limit,
        merged, merged if gates is None else gates, merged if other_end is None else other_end,
        rows, rows // stacked.shape[0], channels,
        **denominators.arguments(), STACKS=denominators.stacks, HAS_BIAS=branch.bias is not None,
        SPLIT=split, RELU=relu, IS_RESIDUAL=is_residual,
        OTHER_LINEAR=other.linear, OTHER_BIAS=other.linear and other.bias is not None,
        HAS_GATES=keeps_gates, HAS_OTHER_END=other_end is not None, EIGHTH=channels % 8 == 0,
        BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return merged, gates, other_end


def arrive(
    acc: Tensor | None, arrival: Arrival, *, block: tuple[int, int] | None = None, num_warps: int = 4
) -> tuple[Tensor, ...]:
    """What leaves at each end of ``arrival``, (…, groups · C), from a message (M · N, H, W, C), M maps of each image.

    Without ``acc`` it counts as zero, and ``arrival.dense`` gives the shape. Tensors (rows, C) will do where no
    ``previous_stride`` needs the plane. Everything contiguous.
    """
    like = arrival.dense if acc is None else acc
    if like is None:
        raise ValueError("got neither acc nor arrival.dense, and expected one of them")
    channels = like.shape[-1]
    rows = like.numel() // channels
    height, width = like.shape[1:3] if like.ndim == 4 else (1, 1)
    arrival = arrival.prepared(like, like.shape)
    block = block or arrival.tile(channels)
    grid = (cdiv(rows, block[0]) * cdiv(channels, block[1]),)
    _arrive_kernel[grid](
        like, rows, channels, **arrival.arguments(rows, height, width), HAS_ACC=acc is not None,
        EIGHTH=channels % 8 == 0, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    return arrival.outputs
