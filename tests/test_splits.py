"""Splits: the registry, what they conserve, and what they promise of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrp_fast.splits import Split, Splits, as_splits, get_split, list_splits

SPLITS = [get_split(name) for name in list_splits()]


def as_tensor(weight: Tensor | float, like: Tensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else torch.full_like(like, weight)


def branches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values over 25 orders of magnitude, zeros among them."""
    F, S = torch.randn(2, 4, 500, dtype=torch.float64) * 10 ** (torch.rand(2, 4, 500, dtype=torch.float64) * 25 - 20)
    F[0, :10], S[0, 5:15] = 0.0, 0.0
    return F.to(dtype), S.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", [split for split in SPLITS if split.complementary], ids=lambda split: split.name)
def test_complementary_splits_conserve_every_element(split: Split, dtype: torch.dtype) -> None:
    F, S = branches(dtype)
    to_F, to_S = (as_tensor(weight, F) for weight in split.weights(F, S))
    assert torch.equal(to_F + to_S, torch.ones_like(F))
    assert bool((to_F >= 0).all())
    assert bool((to_S >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signed_conserves_up_to_its_stabilizer(dtype: torch.dtype) -> None:
    F, S = torch.randn(2, 1000, dtype=dtype)
    to_F, to_S = (as_tensor(weight, F) for weight in get_split("signed").weights(F, S))
    expected = (F + S).abs() / ((F + S).abs() + 1e-6)
    scale = 1 + to_F.abs() + to_S.abs()
    assert float(((to_F + to_S - expected).abs() / scale).max()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_symmetric_splits_do_not_care_which_is_the_skip(split: Split) -> None:
    F, S = branches(torch.float64)
    forth = [as_tensor(weight, F) for weight in split.weights(F, S)]
    back = [as_tensor(weight, F) for weight in split.weights(S, F)]
    same = all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(forth, reversed(back), strict=True))
    assert same == split.symmetric


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_proportional_splits_give_nothing_to_a_branch_of_zeros(split: Split) -> None:
    values = torch.randn(100, dtype=torch.float64)
    zeros = torch.zeros_like(values)
    to_F, to_S = split.weights(zeros, values)[0], split.weights(values, zeros)[1]
    nothing = all(bool((as_tensor(weight, zeros).abs() <= 1e-20).all()) for weight in (to_F, to_S))
    assert nothing == split.proportional


def test_ratio_is_one_half_exactly_where_both_are_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(3, dtype=dtype)
        for weight in get_split("ratio").weights(zero, -zero):
            assert torch.equal(as_tensor(weight, zero), torch.full_like(zero, 0.5))


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_weights_are_finite_whatever_the_branches(split: Split) -> None:
    F, S = branches(torch.float32)
    for residual, skip in ((F, S), (F, -F), (F * 1e18, S), (torch.zeros_like(F), torch.zeros_like(F))):
        for weight in split.weights(residual, skip):
            assert bool(as_tensor(weight, F).isfinite().all())


def test_names_are_known_with_hyphens_and_underscores() -> None:
    assert get_split("residual_only") is get_split("residual-only")
    assert set(list_splits()) == {"ratio", "symmetric", "residual-only", "signed"}
    assert all(list_splits().values())


def test_an_unknown_split_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown split 'ratoi'; known: ratio, symmetric, residual-only, signed"):
        get_split("ratoi")
    with pytest.raises(TypeError, match="a split is a name"):
        get_split(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown split"):
        Splits("ratio", "nonsense")


def test_splits_hold_one_for_each_kind_of_merge() -> None:
    splits = Splits(identity="residual-only", projection=get_split("ratio"))
    assert splits.of("identity").name == "residual-only"
    assert splits.of("projection").name == "ratio"
    assert str(splits) == "identity=residual-only, projection=ratio"
    assert str(as_splits("symmetric")) == "symmetric"
    assert as_splits(splits) is splits
    assert as_splits("ratio") == Splits("ratio", "ratio")
