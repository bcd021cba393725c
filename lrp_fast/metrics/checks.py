"""What the metrics ask of their arguments alike."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

from torch import Tensor

Progress = Callable[[float, int], None]
"""Called with how much is done, and of how much in all."""


def check_heatmaps(heatmaps: Tensor) -> None:
    """Raise unless these are heatmaps: floating [N, H, W], at least one of at least one pixel, finite."""
    if not isinstance(heatmaps, Tensor) or not heatmaps.is_floating_point():
        got = heatmaps.dtype if isinstance(heatmaps, Tensor) else type(heatmaps).__name__
        raise TypeError(f"expected heatmaps as a floating-point tensor N x H x W, got {got}")
    if heatmaps.ndim != 3 or heatmaps.numel() == 0:
        raise ValueError(f"expected heatmaps N x H x W, none of them empty, got shape {list(heatmaps.shape)}")
    check_finite("heatmaps", heatmaps)


def check_finite(what: str, samples: Tensor) -> None:
    """Raise ``ValueError`` naming the samples (first dimension) that hold NaN or infinity."""
    bad = (~samples.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the {what} are not finite (NaN or infinity) in sample {', '.join(map(str, bad[:10]))}")


def check_count(name: str, value: int, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
