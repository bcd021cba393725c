"""Channel sums, ranges and heat quantization."""

from __future__ import annotations

import pytest
import torch
from test_common import BOUND, DEVICE, SMALL, TYPES, agree, gpu, normal, poisoned_outputs
from torch import Tensor

from lrp_fast.heatmap import heat_quantize
from lrp_fast.kernels.heatmap import channel_sum, image_range, quantize

__all__ = ["poisoned_outputs"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 3, 24, 40])
def test_channel_sums(channels: int, dtype: torch.dtype) -> None:
    relevance = normal(2, 3, 5, channels, dtype=dtype)
    for block in (SMALL, None):
        got = channel_sum(relevance, block=block)
        assert got.dtype == torch.float32
        agree(got, relevance.double().sum(-1), 1e-5)


def test_the_range_of_each_map() -> None:
    maps = normal(3, 7, 5)
    maps[1] -= 10
    maps[2] += 10
    wanted = torch.stack([maps.flatten(1).amin(1), maps.flatten(1).amax(1)], 1)
    assert torch.equal(image_range(maps, block=16), wanted)
    assert torch.equal(image_range(maps), wanted)


def defined_quantized(heatmap: Tensor, levels: int) -> Tensor:
    """One map, value by value, from the definition."""
    low, high = float(heatmap.min()), float(heatmap.max())
    ladder = [low + (high - low) * i / (levels - 1) for i in range(levels)]
    ladder[-1] = high
    below = [max(level for level in ladder if level <= value) for value in heatmap.flatten().tolist()]
    return torch.tensor(below, dtype=torch.float64, device=DEVICE).view(heatmap.shape)


def test_values_become_the_level_below_them() -> None:
    heatmap = normal(2, 7, 9)
    wanted = torch.stack([defined_quantized(one, 8) for one in heatmap])
    agree(quantize(heatmap, 8, block=16), wanted, 1e-6)


@pytest.mark.parametrize("levels", [2, 3, 8, 50])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
def test_quantized_maps_equal_those_of_the_package(levels: int, scale: float) -> None:
    heatmap = torch.cat([normal(2, 9, 7), normal(2, 9, 7).exp(), torch.rand(1, 9, 7, device=DEVICE).round()]) * scale
    assert torch.equal(quantize(heatmap, levels, block=32).cpu(), heat_quantize(heatmap.cpu(), levels))


def test_a_value_equal_to_a_level_stays() -> None:
    heatmap = torch.arange(15.0, device=DEVICE).view(1, 3, 5)
    got = quantize(heatmap, 8, block=16)
    assert got.flatten().tolist() == [float(i // 2 * 2) for i in range(15)]
    assert torch.equal(quantize(got, 8), got)


def test_constant_maps_stay() -> None:
    heatmap = torch.tensor([0.0, -2.5, 1e-30, 0.1], device=DEVICE).view(4, 1, 1).expand(4, 3, 5).contiguous()
    assert torch.equal(quantize(heatmap, 8), heatmap)


def test_maps_of_few_units_in_the_last_place() -> None:
    steps = torch.randint(0, 4, (3, 5, 5), device=DEVICE)
    heatmap = (torch.ones_like(steps).float().view(torch.int32) + steps.int()).view(torch.float32)
    assert torch.equal(quantize(heatmap, 8).cpu(), heat_quantize(heatmap.cpu(), 8))


@gpu
def test_more_maps_than_a_grid_has_rows() -> None:
    heatmap = normal(70_000, 3, 3)
    assert torch.equal(quantize(heatmap).cpu(), heat_quantize(heatmap.cpu()))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_at_full_size(dtype: torch.dtype) -> None:
    relevance = normal(16, 224, 224, 3, dtype=dtype)
    heatmap = channel_sum(relevance)
    agree(heatmap, relevance.double().sum(-1), BOUND[torch.float32])
    assert torch.equal(quantize(heatmap).cpu(), heat_quantize(heatmap.cpu()))
    deep = normal(16, 7, 7, 2048, dtype=dtype)
    agree(channel_sum(deep), deep.double().sum(-1), BOUND[torch.float32])
