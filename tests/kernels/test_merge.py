"""Merges forward, and arrivals backward, as element-wise passes."""

from __future__ import annotations

import pytest
import torch
from test_common import (
    BOUND,
    DEVICE,
    GAMMA,
    IMAGES,
    OWN,
    POSITIVE,
    RULES,
    SHAPE,
    SMALL,
    TYPES,
    agree,
    agree_all,
    arrivals,
    defined_gates,
    defined_split,
    defined_stack,
    drawn_stack,
    gpu,
    normal,
    poisoned_outputs,
    settled,
)

from lrp_fast.kernels.common import SPLITS, Arrival, Branch, Denominators, End
from lrp_fast.kernels.merge import arrive, merge

__all__ = ["poisoned_outputs"]


def check_merge(
    denominators: Denominators, shape: tuple[int, ...], split: str, dtype: torch.dtype, is_residual: bool,
    projection: bool, relu: bool = True, with_bias: bool = True, block: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    raw, bias = drawn_stack(denominators, *shape, dtype=dtype)
    other_raw, other_bias = drawn_stack(denominators, *shape, dtype=dtype)
    if split == "signed":  # away from its pole
        raw, other_raw = raw.abs() + 1, other_raw.abs() + 1
        if denominators.kind == "signs":
            raw[..., shape[-1] :] += raw[..., : shape[-1]]
            other_raw[..., shape[-1] :] += other_raw[..., : shape[-1]]
    if not projection:
        other_raw, other_bias = other_raw[..., : shape[-1]].contiguous(), other_bias[: shape[-1]]
    limits = torch.rand(2, shape[0], device=DEVICE) + 0.5
    guarded = denominators.stabilizer == "guard"
    branch = Branch(raw, True, bias if with_bias else None, limits[0] if guarded else None)
    other = Branch(other_raw, projection, other_bias if with_bias and projection else None, limits[1])
    own, z = defined_stack(raw, branch.bias, denominators)
    if projection:
        other_own, other_z = defined_stack(other_raw, other.bias, denominators)
    else:
        other_own, other_z = other_raw.double(), []
    weights = defined_split(*((own, other_own) if is_residual else (other_own, own)), split)
    weight, other_weight = weights if is_residual else weights[::-1]
    merged, gates, end = merge(branch, other, denominators, split, relu=relu, is_residual=is_residual, block=block)
    assert merged.dtype == gates.dtype == dtype
    total = own + other_own
    agree(merged, total.clamp(min=0) if relu else total, BOUND[dtype])
    if weight.any():
        agree(gates, defined_gates(own, z, weight, denominators, limits[0]), BOUND[dtype])
    else:
        assert not gates.any()
    if projection and other_weight.any():
        agree(end, defined_gates(other_own, other_z, other_weight, denominators, limits[1]), BOUND[dtype])
    elif projection:
        assert end is not None
        assert not end.any()
    elif split in ("ratio", "signed"):
        agree(end, other_weight, BOUND[dtype])
    else:
        assert end is None


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
@pytest.mark.parametrize("rule", RULES)
def test_merges(rule: str, projection: bool, split: str) -> None:
    check_merge(RULES[rule], (2, 3, 3, 24), split, torch.float32, True, projection, block=SMALL)


@pytest.mark.parametrize("rule", ["positive", "guarded", "alpha beta"])
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
def test_merges_of_half_precision_seen_from_the_skip(rule: str, projection: bool) -> None:
    check_merge(RULES[rule], (2, 3, 3, 40), "ratio", torch.float16, False, projection, block=SMALL)


@pytest.mark.parametrize("channels", [1, 7, 24])
def test_merges_of_any_number_of_channels_without_bias_or_relu(channels: int) -> None:
    for denominators in (OWN, POSITIVE, GAMMA):
        check_merge(denominators, (3, 2, 3, channels), "ratio", torch.float32, True, True, relu=False, with_bias=False)


def test_the_signed_split_is_stabilized_by_the_sign_of_the_sum() -> None:
    """Where sums are as small as the stabilizer, of branches that do not cancel."""
    sign = normal(2, 3, 3, 24).sign()
    residual, skip = (sign * 10 ** (normal(*sign.shape) - 6) for _ in range(2))
    _, _, weight = merge(Branch(residual, True), Branch(skip), OWN, "signed", relu=False, is_residual=True, block=SMALL)
    agree(weight, defined_split(residual.double(), skip.double(), "signed")[1], 1e-5)


def test_a_merge_wants_its_linear_branch_first() -> None:
    x = normal(1, 2, 2, 8)
    with pytest.raises(ValueError, match="linear one first"):
        merge(Branch(x), Branch(x, True), OWN, "ratio", relu=True, is_residual=True)
    with pytest.raises(ValueError, match="got the split 'even'"):
        merge(Branch(x, True), Branch(x), OWN, "even", relu=True, is_residual=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", ["strided", "groups", "parts", "guarded"])
def test_arrivals_with_whole_tiles_and_of_half_precision(case: str, dtype: torch.dtype) -> None:
    arrival, acc = arrivals()[case], normal(*SHAPE, dtype=dtype)
    agree_all(arrive(acc, arrival), settled(acc, arrival, SHAPE), BOUND[dtype])


@pytest.mark.parametrize("case", ["dense", "parts"])
def test_arrivals_without_a_message(case: str) -> None:
    arrival = arrivals()[case]
    agree_all(arrive(None, arrival, block=SMALL), settled(None, arrival, SHAPE), 1e-5)
    with pytest.raises(ValueError, match="neither acc nor"):
        arrive(None, Arrival((End(),), value=arrival.value))


def test_arrivals_of_rows_without_a_plane() -> None:
    acc, value, gate = normal(6, 10), normal(3, 10), normal(3, 10)
    (got,) = arrive(acc, Arrival((End(gate),), value=value), block=SMALL)
    agree(got, acc.double() * torch.cat([(value.double() * gate.double())] * 2), 1e-5)


def test_three_maps_of_each_image_meet_the_same_gates() -> None:
    gate = normal(*IMAGES)
    acc = normal(6, *IMAGES[1:])
    (got,) = arrive(acc, Arrival((End(gate),)), block=SMALL)
    for start in (0, 2, 4):
        agree(got[start : start + 2], acc[start : start + 2].double() * gate.double(), 1e-5)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_merges_at_full_size(rule: str, dtype: torch.dtype) -> None:
    for projection in (True, False):
        check_merge(RULES[rule], (16, 28, 28, 512), "ratio", dtype, True, projection)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrivals_at_full_size(dtype: torch.dtype) -> None:
    shape, images = (16, 28, 28, 512), (8, 28, 28, 512)
    pair = normal(8, 28, 28, 1024, dtype=dtype)
    arrival = Arrival(
        (End(pair, groups=2), End(normal(*images, dtype=dtype), part="dead")), value=normal(*images, dtype=dtype),
        previous=normal(16, 14, 14, 512, dtype=dtype), previous_stride=2, dense=normal(*shape, dtype=dtype),
        even=normal(*shape[:-1]),
    )  # fmt: skip
    acc = normal(*shape, dtype=dtype)
    agree_all(arrive(acc, arrival), settled(acc, arrival, shape), BOUND[dtype])
