"""The bootstrap against a loop, against theory, and in how often it holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrp_fast.metrics import Interval, bootstrap, bootstrap_difference


def test_is_the_percentile_bootstrap() -> None:
    values = torch.randn(37).double() ** 3
    got = bootstrap(values, confidence=0.9, resamples=501, seed=7)
    generator = np.random.default_rng(7)
    means = sorted(
        sum(values[index] for index in generator.integers(37, size=37).tolist()).item() / 37 for _ in range(501)
    )
    assert got.mean == pytest.approx(values.mean().item(), rel=1e-12)
    # 501 means: the 5 % and 95 % quantiles are the 26th and the 476th.
    assert (got.low, got.high) == pytest.approx((means[25], means[475]), rel=1e-9)
    assert (got.count, got.missing) == (37, 0)


def test_holds_the_truth_about_as_often_as_it_says() -> None:
    for confidence in (0.5, 0.9):
        held = [
            (found := bootstrap(torch.randn(60), confidence, 400, seed)).low <= 0 <= found.high for seed in range(300)
        ]
        assert abs(np.mean(held) - confidence) <= 0.02 + 4 * (confidence * (1 - confidence) / 300) ** 0.5


def test_shrinks_with_the_root_of_the_count() -> None:
    widths = [(found := bootstrap(torch.randn(count))).high - found.low for count in (100, 10000)]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.4)
    assert widths[1] == pytest.approx(2 * 1.96 / 100, rel=0.15)


def test_many_values_in_parts_of_the_resamples() -> None:
    values = np.random.default_rng(int(torch.randint(1000, ()))).normal(size=300_000)
    got = bootstrap(values, resamples=40)  # fourteen at a time
    assert got.low < got.mean < got.high
    assert got.high - got.low < 6 / 300_000**0.5


def test_the_seed_decides() -> None:
    values = torch.randn(20)
    assert bootstrap(values) == bootstrap(values.tolist()) == bootstrap(values.numpy()) == bootstrap(values, seed=0)
    assert bootstrap(values, seed=1) != bootstrap(values)


def test_nan_is_left_out_and_counted() -> None:
    values = torch.randn(12)
    with_gaps = torch.full((15,), torch.nan)
    with_gaps[[0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14]] = values
    whole, got = bootstrap(values), bootstrap(with_gaps)
    assert (got.mean, got.low, got.high, got.count, got.missing) == (whole.mean, whole.low, whole.high, 12, 3)


def test_nothing_and_a_single_value_show_no_spread() -> None:
    nothing = bootstrap([math.nan, math.nan])
    assert all(math.isnan(x) for x in (nothing.mean, nothing.low, nothing.high))
    assert (nothing.count, nothing.missing) == (0, 2)
    assert bootstrap([]).count == 0
    single = bootstrap([2.5])
    assert single.mean == 2.5
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert bootstrap([3.0, 3.0]) == Interval(3.0, 3.0, 3.0, 2)


def test_differences_are_paired() -> None:
    shared, noise = torch.randn(200) * 10, torch.randn(200) * 0.1
    a, b = shared + 0.2, shared + noise
    b[3], a[7] = torch.nan, torch.nan
    got = bootstrap_difference(a, b, seed=4)
    assert got.low > 0.1  # unpaired, the interval would be forty times wider
    assert got.high < 0.3
    assert (got.count, got.missing) == (198, 2)
    assert got == bootstrap(a.double() - b.double(), seed=4)


def test_refuses() -> None:
    for confidence in (0, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            bootstrap([1.0, 2.0], confidence)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        bootstrap([1.0, 2.0], resamples=0)
    with pytest.raises(ValueError, match="seed"):
        bootstrap([1.0, 2.0], seed=-1)
    with pytest.raises(ValueError, match=r"shape \[2, 2\]"):
        bootstrap(torch.ones(2, 2))
    with pytest.raises(ValueError, match="infinite in sample 1, 2"):
        bootstrap([0.0, math.inf, -math.inf])
    with pytest.raises(ValueError, match="same images, got 2 and 3"):
        bootstrap_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_reads_as_text() -> None:
    assert str(Interval(0.12344, 0.1, 0.2, 9)) == "0.1234 [0.1000, 0.2000]"
