"""Heat quantization against a value-by-value definition, and what the drawn colours say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lrp_fast.heatmap import (
    color_scale,
    colorize,
    default_smoothing,
    heat_quantize,
    heat_quantize_signed,
    is_signed,
    overlay,
    smooth,
)


def quantize_one_by_one(heatmap: Tensor, levels: int) -> Tensor:
    """The definition for one [H, W] map, one value at a time."""
    exact = np.linspace(float(heatmap.min()), float(heatmap.max()), levels)
    ladder = torch.from_numpy(exact).to(heatmap.dtype).tolist()
    out = heatmap.clone()
    for row in range(heatmap.shape[0]):
        for column in range(heatmap.shape[1]):
            value = float(heatmap[row, column])
            out[row, column] = max(level for level in ladder if level <= value)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [2, 3, 8, 17])
def test_quantize_is_the_definition(dtype: torch.dtype, levels: int) -> None:
    maps = (torch.randn(3, 2, 9, 11, dtype=torch.float64) ** 3).to(dtype)
    got = heat_quantize(maps, levels)
    assert got.dtype == dtype
    for outer in range(3):
        for inner in range(2):
            expected = quantize_one_by_one(maps[outer, inner], levels)
            if dtype == torch.float64:  # its linspace may be rounded otherwise in the last place
                assert torch.allclose(got[outer, inner], expected, rtol=0, atol=1e-14 * float(maps.abs().max()))
            else:
                assert torch.equal(got[outer, inner], expected)


def test_quantize_values_that_are_levels_stay() -> None:
    for _ in range(200):
        low, high = sorted(torch.randn(2).tolist())
        ladder = heat_quantize(torch.linspace(low, high, 500).view(20, 25)).unique()
        assert len(ladder) == 8
        assert torch.equal(heat_quantize(ladder.view(2, 4)), ladder.view(2, 4))
        just_below = torch.nextafter(ladder[1:], torch.tensor(-torch.inf))
        pushed = heat_quantize(torch.cat([ladder, just_below]).view(3, 5)).flatten()[8:]
        assert torch.equal(pushed, ladder[:-1])


def test_quantize_signed_takes_for_and_against_one_by_one() -> None:
    maps = 3 * torch.randn(4, 7, 9, dtype=torch.float64)
    maps[:, 2:4] = 0.0
    maps[3] = -maps[3].abs()  # nothing speaks for
    got = heat_quantize_signed(maps, levels=5)
    for one, of in zip(got, maps, strict=True):
        expected = quantize_one_by_one(of.relu(), 5) - quantize_one_by_one((-of).relu(), 5)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(heat_quantize_signed(-maps, 5), -got, rtol=0, atol=0)
    low = maps.abs()  # whose minimum is 0
    assert torch.equal(heat_quantize_signed(low), heat_quantize(low))


def test_quantize_keeps_extremes_and_never_raises_a_value() -> None:
    maps = torch.rand(5, 31, 17) ** 4
    got = heat_quantize(maps)
    assert torch.equal(got.amax((1, 2)), maps.amax((1, 2)))
    assert torch.equal(got.amin((1, 2)), maps.amin((1, 2)))
    assert bool((got <= maps).all())
    steps = (maps.amax((1, 2)) - maps.amin((1, 2))) / 7
    assert bool((maps - got <= steps[:, None, None] * (1 + 1e-5)).all())
    assert torch.equal(heat_quantize(got), got)


def test_quantize_each_map_alone_and_leaves_its_argument() -> None:
    maps = torch.randn(4, 8, 8) * torch.tensor([1e-6, 1.0, 1e3, 1e6])[:, None, None]
    before = maps.clone()
    together = heat_quantize(maps)
    assert torch.equal(maps, before)
    for one, alone in zip(together, maps, strict=True):
        assert torch.equal(one, heat_quantize(alone))


def test_quantize_constant_strided_and_extreme_maps() -> None:
    constant = torch.full((2, 5, 5), torch.randn(()).item())
    assert torch.equal(heat_quantize(constant), constant)
    strided = torch.randn(6, 14, 10).transpose(0, 2)[::2]
    assert torch.equal(heat_quantize(strided), heat_quantize(strided.contiguous()))
    largest = torch.finfo(torch.float64).max
    wide = torch.tensor([[-largest, 0.0], [1.0, largest]], dtype=torch.float64)
    assert heat_quantize(wide, 3).flatten().tolist() == [-largest, 0.0, 0.0, largest]
    one = torch.ones(())
    tight = torch.stack([one, torch.nextafter(one, 2 * one)]).view(1, 2)
    assert torch.equal(heat_quantize(tight, 8), tight)


def test_quantize_maps_that_span_a_few_units_in_the_last_place() -> None:
    low = torch.randn(2000, dtype=torch.float64)
    ladder = [low]
    for _ in range(3):
        ladder.append(torch.nextafter(ladder[-1], torch.tensor(torch.inf, dtype=torch.float64)))
    maps = torch.stack(ladder, 1).view(2000, 2, 2)
    for levels in (3, 8, 10, 11):
        got = heat_quantize(maps, levels)
        assert bool((got <= maps).all())
        assert torch.equal(got.amin((1, 2)), maps.amin((1, 2)))
        assert torch.equal(got.amax((1, 2)), maps.amax((1, 2)))
        assert torch.equal(heat_quantize(got, levels), got)


@pytest.mark.parametrize(
    ("heatmap", "levels", "error", "message"),
    [
        (torch.rand(4, 4), 1, ValueError, "levels are 2 .* to 65536, got 1"),
        (torch.rand(4, 4), 10**9, ValueError, "to 65536, got 1000000000"),
        (torch.rand(4, 4), 2.5, TypeError, "integer"),
        (torch.rand(4, 4), True, TypeError, "integer"),
        (torch.ones(4, 4, dtype=torch.int64), 8, TypeError, "int64"),
        (np.ones((4, 4)), 8, TypeError, "ndarray"),
        (torch.rand(4), 8, ValueError, r"\[4\]"),
        (torch.rand(2, 0, 4), 8, ValueError, "at least one pixel"),
        (torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]), 8, ValueError, "2 values"),
    ],
)
def test_quantize_refuses(heatmap: Tensor, levels: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        heat_quantize(heatmap, levels)


def test_smooth_spreads_evenly_and_keeps_constants() -> None:
    constant = torch.full((2, 12, 9), 0.7)
    assert torch.allclose(smooth(constant, 2.5), constant)
    point = torch.zeros(41, 41, dtype=torch.float64)
    point[20, 20] = 3.0
    blurred = smooth(point, 2.0)
    assert blurred.sum().item() == pytest.approx(3.0)
    assert torch.allclose(blurred, blurred.T)
    # Its second moment is the radius squared, along each axis.
    offsets = torch.arange(41, dtype=torch.float64) - 20
    assert (blurred.sum(0) @ offsets**2 / 3).item() == pytest.approx(4.0, rel=0.05)
    sharp = torch.randn(7, 7)
    assert torch.equal(smooth(sharp, 0), sharp)
    with pytest.raises(ValueError, match="0 or more"):
        smooth(sharp, -1.0)


def test_colorize_positive_is_dark_at_zero_and_brightens() -> None:
    ramp = torch.linspace(0, 5, 64).view(1, 64)
    brightness = colorize(ramp)[0].astype(int).sum(-1)
    assert brightness[0] < 10
    assert bool((np.diff(brightness) >= 0).all())
    assert np.array_equal(colorize(ramp), colorize(ramp * 1e-9))


def test_colorize_signed_is_white_at_zero_red_above_blue_below() -> None:
    negative, zero, positive = colorize(torch.tensor([[-1.0, 0.0, 2.0]]))[0].astype(int)
    assert zero.min() >= 245
    assert positive[0] > positive[2] + 50
    assert negative[2] > negative[0] + 50
    # Symmetric about zero: -1 is half as strong as 2, so it is paler.
    assert negative.sum() > positive.sum()


def test_colorize_zeros_and_rounding_noise() -> None:
    zeros = torch.zeros(3, 3)
    assert colorize(zeros, signed=True).min() >= 245
    assert colorize(zeros, signed=False).max() < 10
    noisy = torch.rand(8, 8)
    noisy[0, 0] = -1e-7
    assert not is_signed(noisy)
    assert is_signed(torch.tensor([[1.0, -0.1]]))


@pytest.mark.parametrize("signed", [False, True])
def test_overlay_points_at_the_relevant_region(signed: bool) -> None:
    noise = np.random.default_rng().integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    heatmap = torch.rand(48, 64) * 0.01
    heatmap[10:20, 30:40] = 1.0
    drawn = np.asarray(overlay(heatmap, picture, smoothing=0, signed=signed)).astype(int)
    saturation = drawn.max(-1) - drawn.min(-1)
    inside = np.zeros((48, 64), dtype=bool)
    inside[10:20, 30:40] = True
    assert saturation[inside].min() > 60
    assert np.median(saturation[~inside]) < 30
    assert drawn.shape == (48, 64, 3)


def test_overlay_of_nothing_is_the_dimmed_picture() -> None:
    noise = np.random.default_rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    drawn = np.asarray(overlay(torch.zeros(20, 30), picture)).astype(int)
    assert np.abs(drawn - 0.7 * np.asarray(picture.convert("L"))[..., None]).max() <= 1


def test_overlay_of_what_is_not_signed_passes_over_what_is_below_zero() -> None:
    heatmap, picture = torch.randn(20, 30), Image.new("RGB", (30, 20), "grey")
    drawn = overlay(heatmap, picture, signed=False, smoothing=0.0)
    assert np.array_equal(drawn, overlay(heatmap.clamp(min=0), picture, signed=False, smoothing=0.0))


def test_overlay_smoothing_joins_dots() -> None:
    dots = torch.zeros(64, 64)
    dots[8:56:16, 8:56:16] = 1.0
    picture = Image.new("RGB", (64, 64), "grey")

    def lit(smoothing: float | None) -> int:
        drawn = np.asarray(overlay(dots, picture, smoothing=smoothing)).astype(int)
        return int(((drawn.max(-1) - drawn.min(-1)) > 60).sum())

    assert lit(0) == 9
    assert lit(None) > 9 * 9
    assert default_smoothing(64, 128) == 2.0


def test_drawing_refuses() -> None:
    picture = Image.new("RGB", (8, 6))
    with pytest.raises(ValueError, match=r"8 x 6 .*\[8, 6\]"):
        overlay(torch.rand(8, 6), picture)
    with pytest.raises(ValueError, match="one map"):
        colorize(torch.rand(2, 6, 8))
    with pytest.raises(ValueError, match="finite"):
        colorize(torch.full((2, 2), torch.nan))


def test_color_scale_ends() -> None:
    assert color_scale(False, 5)[0] == "#000004"
    assert len(set(color_scale(False, 5))) == 5
    assert color_scale(True, 3)[1] == "#f7f6f6"


def test_importing_loads_no_drawing_library() -> None:
    unwanted = "('matplotlib', 'torchvision', 'triton')"
    program = f"import sys, lrp_fast.heatmap; print([name for name in {unwanted} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
