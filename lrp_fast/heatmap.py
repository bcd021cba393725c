"""Heatmaps as values and as pictures: heat quantization (Otsuki et al. 2024, §3.3), colours, overlays.

Heat quantization: ``levels = linspace(min, max, 8)``; a value in ``[level_i, level_{i+1})`` becomes ``level_i``; the
maximum stays. Neither torchvision nor matplotlib is imported before something is drawn.
"""

from __future__ import annotations

import importlib.util
import math
from numbers import Integral

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

POSITIVE_COLORMAP = "inferno"
SIGNED_COLORMAP = "RdBu_r"
MOST_LEVELS = 65536
"""More than a float16 tells apart; each map has a list of its levels."""
SMOOTHING_SHARE = 1 / 32
"""Default smoothing of an overlay, as a share of the map's shorter side: residual networks with strided 1x1 projections
leave dots on a grid of 8 to 32 pixels, which this joins into regions."""


def heat_quantize(heatmap: Tensor, levels: int = 8) -> Tensor:
    """Round every value of a heatmap down to one of a few evenly spaced levels between its minimum and its maximum.

    ``l = linspace(min, max, levels)``; a value in ``[l_i, l_(i+1))`` becomes ``l_i`` (Otsuki et al. 2024, §3.3).

    ``heatmap``: floating tensor [..., H, W]; each H x W map has its own levels. Returns the same shape, dtype and
    device. The levels are computed in float64 and rounded to the map's dtype before anything is compared with them, so
    a value equal to a level stays, no value rises, and quantizing twice changes nothing. A constant map stays as it is.

    Raises ``TypeError`` for a tensor that is not floating or levels that are not an integer, ``ValueError`` for fewer
    than 2 levels or more than 65536, fewer than 2 dimensions, an empty map, or a value that is not finite.
    """
    if isinstance(levels, bool) or not isinstance(levels, Integral):
        raise TypeError(f"levels must be an integer of at least 2, got {levels!r}")
    if not 2 <= levels <= MOST_LEVELS:
        raise ValueError(f"levels are 2 (the minimum and the maximum) to {MOST_LEVELS}, got {levels}")
    levels = int(levels)
    _check_maps(heatmap)
    if heatmap.shape.numel() == 0:
        return heatmap.clone()
    if heatmap.is_cuda and heatmap.dtype == torch.float32 and importlib.util.find_spec("triton"):
        from lrp_fast.backends.triton import quantize

        return quantize(heatmap, levels)  # the same levels, in two passes over the map
    flat = heatmap.reshape(-1, heatmap.shape[-2] * heatmap.shape[-1])
    ladder, index = _on_ladder(flat, levels)
    return ladder.gather(1, index).reshape(heatmap.shape)


def heat_levels(heatmaps: Tensor, levels: int = 8, check: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Heat quantization as what is worth storing: which level each value has, and each map's ends.

    ``heatmaps``: floating tensor [N, H, W]. Returns the level indices, uint8 [N, H, W], and the minima and maxima, [N] in
    the maps' dtype; :func:`from_heat_levels` makes of them what :func:`heat_quantize` gives, bit for bit. Raises what
    that raises, and ``ValueError`` for more than 256 levels or maps that are not [N, H, W]. ``check=False`` is for maps
    known to be valid: nothing is checked, and a GPU is not waited for.
    """
    if not 2 <= levels <= 256:
        raise ValueError(f"levels that are stored as bytes are 2 to 256, got {levels}")
    if check:
        _check_maps(heatmaps)
    if heatmaps.ndim != 3:
        raise ValueError(f"expected maps [N, H, W], got shape {list(heatmaps.shape)}")
    flat = heatmaps.flatten(1)
    _, index = _on_ladder(flat, levels)
    return index.to(torch.uint8).reshape(heatmaps.shape), flat.amin(1), flat.amax(1)


def from_heat_levels(index: Tensor, low: Tensor, high: Tensor, levels: int = 8) -> Tensor:
    """The maps [N, H, W], in the dtype of ``low`` and ``high`` [N], of level indices uint8 [N, H, W]."""
    ladder = _ladder(low[:, None], high[:, None], levels)
    return ladder.gather(1, index.flatten(1).long()).reshape(index.shape)


def heat_quantize_signed(heatmap: Tensor, levels: int = 8) -> Tensor:
    """Quantize positive and negative relevance separately, so that zero stays zero.

    :func:`heat_quantize` rounds down, which turns the zeros of a signed map into negative relevance; this is for
    drawing such maps. Shapes, dtypes and errors as there; a map whose minimum is 0 gives the same.
    """
    return heat_quantize(heatmap.clamp(min=0), levels) - heat_quantize((-heatmap).clamp(min=0), levels)


def _check_maps(heatmap: Tensor) -> None:
    if not isinstance(heatmap, Tensor) or not heatmap.is_floating_point():
        got = heatmap.dtype if isinstance(heatmap, Tensor) else type(heatmap).__name__
        raise TypeError(f"a heatmap must be a floating-point tensor, got {got}")
    if heatmap.ndim < 2:
        raise ValueError(f"a heatmap has at least two dimensions [..., H, W], got shape {list(heatmap.shape)}")
    if 0 in heatmap.shape[-2:]:
        raise ValueError(f"a heatmap needs at least one pixel, got shape {list(heatmap.shape)}")
    if not bool(torch.isfinite(heatmap).all()):
        count = int((~torch.isfinite(heatmap)).sum())
        raise ValueError(f"a heatmap must be finite, got {count} values that are NaN or infinite")


def _on_ladder(maps: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The levels of each row of maps [N, values], and which of them each value has: [N, levels], int64 [N, values]."""
    ladder = _ladder(maps.amin(1, keepdim=True), maps.amax(1, keepdim=True), levels)
    return ladder, torch.searchsorted(ladder, maps.contiguous(), right=True) - 1


def _ladder(low: Tensor, high: Tensor, levels: int) -> Tensor:
    """``linspace(low, high, levels)`` of each row, [N, levels] in the ends' dtype, never falling, both ends exact."""
    share = torch.arange(levels, dtype=torch.float64, device=low.device) / (levels - 1)
    # Both ends weighted, not low + share * (high - low): the difference of two large floats can overflow.
    ladder = (low.double() * (1 - share) + high.double() * share).to(low.dtype)
    ladder[:, :1], ladder[:, -1:] = low, high
    # Where a map spans only a few units in the last place, rounding could put a level outside its neighbours.
    return ladder.clamp(low, high).cummax(1).values


def smooth(heatmap: Tensor, radius: float) -> Tensor:
    """Blur maps with a Gaussian of standard deviation ``radius`` pixels, reflected at the border; 0 leaves them alone.

    ``heatmap``: floating tensor [..., H, W]. Returns the same shape and dtype. Raises ``ValueError`` for a negative or
    infinite radius and what :func:`heat_quantize` raises for its map.
    """
    _check_maps(heatmap)
    if not 0 <= radius < math.inf:
        raise ValueError(f"the smoothing radius is a number of pixels, 0 or more, got {radius}")
    reach = min(math.ceil(3 * radius), min(heatmap.shape[-2:]) - 1)
    if radius == 0 or reach == 0:
        return heatmap.clone()
    offsets = torch.arange(-reach, reach + 1, dtype=heatmap.dtype, device=heatmap.device)
    kernel = torch.softmax(-(offsets**2) / (2 * radius**2), 0)
    maps = heatmap.reshape(-1, 1, *heatmap.shape[-2:])
    padded = F.pad(maps, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1)).reshape(heatmap.shape)


def default_smoothing(height: int, width: int) -> float:
    """The radius, in pixels, by which an overlay of that size is smoothed unless told otherwise."""
    return SMOOTHING_SHARE * min(height, width)


def is_signed(heatmap: Tensor) -> bool:
    """Whether negative relevance plays a part: below zero by more than a thousandth of the largest magnitude."""
    return bool(-heatmap.min() > 1e-3 * heatmap.abs().max())


def colorize(heatmap: Tensor, signed: bool | None = None) -> npt.NDArray[np.uint8]:
    """A heatmap as colours, uint8 [H, W, 3].

    ``heatmap``: floating tensor [H, W]. A signed map is drawn symmetrically about zero: white there, red above, blue
    below; any other from black at zero to bright yellow at its maximum. ``signed=None`` looks at the map. A map of
    zeros is drawn as zero. Raises ``ValueError`` for more than one map, and what :func:`heat_quantize` raises.
    """
    strength, signed = _strength(heatmap, signed)
    return _to_bytes(_colors(strength, signed))


def overlay(
    heatmap: Tensor, picture: Image.Image, *, smoothing: float | None = None, signed: bool | None = None
) -> Image.Image:
    """A heatmap laid over the picture it explains: the picture in dimmed grey, relevance glowing in colour.

    ``heatmap``: floating tensor [H, W]; ``picture``: an image of W x H pixels. ``smoothing``: the Gaussian radius in
    pixels, for the eye only (``None``: :func:`default_smoothing`; 0: the exact pixels); ``signed`` as in
    :func:`colorize`. Colours are relative to the largest magnitude drawn. Returns an RGB image of the same size.
    Raises ``ValueError`` if the sizes differ, and what :func:`colorize` and :func:`smooth` raise.
    """
    if heatmap.ndim != 2 or picture.size != (heatmap.shape[1], heatmap.shape[0]):
        size = f"{picture.width} x {picture.height}"
        raise ValueError(f"the map must be [H, W] for a picture of {size} (W x H), got shape {list(heatmap.shape)}")
    radius = default_smoothing(*heatmap.shape) if smoothing is None else smoothing
    if signed is None:
        signed = is_signed(heatmap)
    strength, signed = _strength(smooth(heatmap.detach().cpu().double(), radius), signed)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    # Dark under a map that glows, light under one whose zero is white.
    ground = 0.5 + 0.5 * grey if signed else 0.7 * grey
    magnitude = np.abs(strength)
    alpha = np.clip(1.1 * magnitude**0.6, 0, 0.9)[..., None]
    shown = np.sign(strength) * (0.2 + 0.8 * magnitude**0.8)
    return Image.fromarray(_to_bytes(ground * (1 - alpha) + _colors(shown, signed) * alpha))


def color_scale(signed: bool, steps: int = 9) -> list[str]:
    """The colours of the scale as CSS hexadecimal, from zero (signed: from the most negative) to the maximum."""
    values = np.linspace(-1.0 if signed else 0.0, 1.0, steps)
    return ["#{:02x}{:02x}{:02x}".format(*color) for color in _to_bytes(_colors(values, signed)).tolist()]


def _strength(heatmap: Tensor, signed: bool | None) -> tuple[npt.NDArray[np.float64], bool]:
    """The map over its largest magnitude, float64 [H, W] in [-1, 1] (signed) or [0, 1], and whether it is signed."""
    _check_maps(heatmap)
    if heatmap.ndim != 2:
        raise ValueError(f"one map [H, W] is drawn at a time, got shape {list(heatmap.shape)}")
    values = heatmap.detach().cpu().double()
    if signed is None:
        signed = is_signed(values)
    peak = float(values.abs().max()) if signed else float(values.max())
    strength = (values / peak if peak > 0 else torch.zeros_like(values)).numpy()
    return (strength if signed else strength.clip(0, 1)), signed


def _colors(strength: npt.NDArray[np.float64], signed: bool) -> npt.NDArray[np.float64]:
    """Strengths [...] to colours [..., 3] in [0, 1]."""
    import matplotlib

    if signed:
        return matplotlib.colormaps[SIGNED_COLORMAP]((strength + 1) / 2)[..., :3]
    return matplotlib.colormaps[POSITIVE_COLORMAP](strength)[..., :3]


def _to_bytes(colors: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return (colors.clip(0, 1) * 255).round().astype(np.uint8)
