"""Localisation against plain definitions, one pixel at a time; ties against the average over random orders."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lrp_fast.metrics import pointing_game, relevance_mass, relevance_rank

METRICS = (pointing_game, relevance_mass, relevance_rank)


def ranked(values: list[float], inside: list[bool]) -> list[bool]:
    """Which pixels are inside, by falling relevance, ties in a random order."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], random.random()))
    return [inside[index] for index in order]


def slow_pointing(values: list[float], inside: list[bool]) -> float:
    return float(ranked(values, inside)[0])


def slow_rank(values: list[float], inside: list[bool]) -> float:
    return sum(ranked(values, inside)[: sum(inside)]) / sum(inside)


def slow_mass(values: list[float], inside: list[bool]) -> float:
    positive = [(value, held) for value, held in zip(values, inside, strict=True) if value > 0]
    return sum(value for value, held in positive if held) / sum(value for value, _ in positive)


SLOW: dict[Callable[[Tensor, Tensor], Tensor], Callable[[list[float], list[bool]], float]] = {
    pointing_game: slow_pointing,
    relevance_mass: slow_mass,
    relevance_rank: slow_rank,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_distinct_maps_equal_the_definition(metric: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    maps = torch.stack([torch.randperm(7 * 9) - 30 for _ in range(40)]).view(40, 7, 9).to(dtype)
    masks = torch.rand(40, 7, 9) < torch.rand(40, 1, 1)
    masks[:, 3, 4] = True
    got = metric(maps, masks)
    assert got.dtype == torch.float64
    for one, values, inside in zip(got.tolist(), maps.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        assert one == pytest.approx(SLOW[metric](values, inside), abs=1e-12)
    assert len(got.unique()) > 1


@pytest.mark.parametrize("metric", [pointing_game, relevance_rank])
def test_ties_count_by_their_average(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    random.seed(int(torch.randint(1 << 30, ())))
    maps = torch.randint(3, (6, 5, 4)).float()
    masks = torch.rand(6, 5, 4) < 0.4
    masks[:, 0, 0] = True
    for one, values, inside in zip(
        metric(maps, masks).tolist(), maps.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True
    ):
        drawn = [SLOW[metric](values, inside) for _ in range(4000)]
        assert abs(one - np.mean(drawn)) <= 5 * np.std(drawn) / 4000**0.5 + 1e-12


@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_map_scores_the_share_of_the_mask(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    masks = torch.rand(5, 11, 6) < 0.3
    masks[:, 0, 0] = True
    expected = masks.double().mean((1, 2))
    assert torch.allclose(metric(torch.full((5, 11, 6), 0.3), masks), expected, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_ends_of_the_scale(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[:, 1:3, 2:5] = True
    maps = torch.rand(3, 6, 6) + 0.1
    assert metric(maps * masks, masks).tolist() == [1.0] * 3
    assert metric(maps * ~masks, masks).tolist() == [0.0] * 3
    assert metric(maps, torch.ones_like(masks)).tolist() == pytest.approx([1.0] * 3)
    assert metric(maps, torch.zeros_like(masks)).isnan().all()


def test_mass_without_positive_relevance_is_zero() -> None:
    masks = torch.ones(2, 3, 3, dtype=torch.bool)
    maps = torch.stack([torch.zeros(3, 3), -torch.rand(3, 3)])
    assert relevance_mass(maps, masks).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("maps", "masks", "error", "message"),
    [
        (torch.rand(2, 4, 4), torch.ones(2, 4, 5, dtype=torch.bool), ValueError, r"\[2, 4, 4\], got \[2, 4, 5\]"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 4), TypeError, "bool tensor, got torch.float32"),
        (torch.rand(2, 4, 4), np.ones((2, 4, 4), dtype=bool), TypeError, "ndarray"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool, device="meta"), ValueError, "masks are on meta"),
        (torch.ones(2, 4, 4, dtype=torch.int64), torch.ones(2, 4, 4, dtype=torch.bool), TypeError, "int64"),
        (torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool), ValueError, "N x H x W"),
        (torch.rand(0, 4, 4), torch.ones(0, 4, 4, dtype=torch.bool), ValueError, "empty"),
        (torch.tensor([[[1.0]], [[torch.nan]]]), torch.ones(2, 1, 1, dtype=torch.bool), ValueError, "in sample 1"),
    ],
)
def test_refuses(
    metric: Callable[[Tensor, Tensor], Tensor], maps: Tensor, masks: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metric(maps, masks)
