"""How sure a mean over images is: the percentile bootstrap (Efron & Tibshirani 1993, §13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lrp_fast.metrics.checks import check_count

Values = Sequence[float] | npt.NDArray[np.floating] | Tensor
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """The mean of ``count`` values and where it would lie in other samples of as many; ``missing`` values were NaN.

    ``mean`` is NaN without values, ``low`` and ``high`` are NaN with fewer than two: one value shows no spread.
    """

    mean: float
    low: float
    high: float
    count: int
    missing: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap(values: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of one value for each image, and the percentile bootstrap interval of it.

    From n values n are drawn with replacement, ``resamples`` times; the interval leaves (1 − confidence)/2 of their means
    on either side. NaN (an image without a score) is left out and counted. The same seed gives the same interval.

    Raises ``ValueError`` for values that are infinite or not one-dimensional, a confidence outside (0, 1), fewer than one
    resample or a negative seed, ``TypeError`` for resamples or a seed that are no integers.
    """
    given = _numbers(values)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    check_count("resamples", resamples, 1)
    check_count("seed", seed, 0)
    known = given[~np.isnan(given)]
    count, missing = len(known), len(given) - len(known)
    if count < 2:
        return Interval(float(known[0]) if count else np.nan, np.nan, np.nan, count, missing)
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // count)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([known[generator.integers(count, size=(size, count))].mean(1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(known.mean()), float(low), float(high), count, missing)


def bootstrap_difference(
    a: Values, b: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of a − b over the same images, and its interval: how easy an image is for both cancels.

    An image counts where both values are known. Arguments and errors as in :func:`bootstrap`; also ``ValueError`` for
    different numbers of values.
    """
    first, second = _numbers(a), _numbers(b)
    if len(first) != len(second):
        raise ValueError(f"expected values of the same images, got {len(first)} and {len(second)}")
    return bootstrap(first - second, confidence, resamples, seed)


def _numbers(values: Values) -> npt.NDArray[np.float64]:
    given = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if given.ndim != 1:
        raise ValueError(f"expected one value for each image, got shape {list(given.shape)}")
    if np.isinf(given).any():
        raise ValueError(
            f"the values are infinite in sample {', '.join(map(str, np.flatnonzero(np.isinf(given))[:10]))}"
        )
    return given
