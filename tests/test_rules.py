"""Rules: what their factories accept and refuse, and what their tables say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_reference import FACTORIES

from lrp_fast.rules import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    PositiveProducts,
    Rule,
    Stabilizer,
    WSquare,
    ZBox,
    ZeroGuard,
    ZPlus,
)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(2.0, 0.5), (0.5, -0.5), (1.0, 0.1), (-1.0, -2.0), (math.nan, 1.0), (math.inf, math.inf)]
)
def test_alpha_and_beta_must_add_up(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="alpha - beta = 1") as error:
        AlphaBeta(alpha, beta)
    assert str(alpha) in str(error.value)


@pytest.mark.parametrize(("alpha", "beta"), [(2.2, 1.2), (1.1, 0.1), (2, 1), (1.0, 0.0), (1.7, 0.7)])
def test_alpha_and_beta_add_up_to_rounding(alpha: float, beta: float) -> None:
    rule = AlphaBeta(alpha, beta)
    assert (rule.parameter("alpha"), rule.parameter("beta")) == (alpha, beta)
    assert [group.coefficient for group in rule.groups] == ([alpha, -beta] if beta else [alpha])


def test_z_plus_is_alpha_one_beta_zero() -> None:
    assert ZPlus().groups == AlphaBeta(1.0, 0.0).groups


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_gamma_must_be_finite_and_not_negative(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be finite and at least 0"):
        Gamma(gamma)


STABILIZED: dict[str, Callable[[float], Rule]] = {
    "Epsilon": Epsilon,
    "AlphaBeta": lambda epsilon: AlphaBeta(2.0, 1.0, epsilon),
    "ZPlus": ZPlus,
    "Gamma": lambda epsilon: Gamma(0.25, epsilon),
    "ZBox": lambda epsilon: ZBox(-1.0, 1.0, epsilon),
    "WSquare": WSquare,
    "Flat": Flat,
    "PositiveProducts": lambda epsilon: PositiveProducts(Stabilizer(epsilon)),
}


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, 1e-40, math.nan, math.inf, "1e-6", None])
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_stabilizer_must_be_above_zero(factory: str, epsilon: float) -> None:
    with pytest.raises(ValueError, match="finite epsilon above zero"):
        STABILIZED[factory](epsilon)


def test_a_stabilizer_takes_any_number() -> None:
    for number in (1, np.float32(0.5), torch.tensor(0.25)):
        assert Stabilizer(number) == Stabilizer(float(number))
        assert isinstance(Stabilizer(number).epsilon, float)


@pytest.mark.parametrize("threshold", [-1e-12, math.nan, 1.0])
def test_a_zero_guard_needs_a_threshold_below_one(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        ZeroGuard(threshold)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 1.0),
        (2.0, -2.0),
        ((-1.0, 0.5, -1.0), (1.0, 0.5, 1.0)),
        (0.5, (1.0, 0.2, 1.0)),
        ((-1.0, 0.3, -1.0), 0.2),
        (None, -3.0),
        (3.0, None),
    ],
)
def test_pixel_bounds_must_be_in_order_in_every_channel(low: object, high: object) -> None:
    with pytest.raises(ValueError, match="low must be below high in every channel"):
        ZBox(low, high)  # type: ignore[arg-type]


def test_pixel_bounds_must_agree_in_number_and_be_finite() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        ZBox((-1.0, -1.0), (1.0, 1.0, 1.0))
    for broken in (math.nan, math.inf, (), (0.0, math.nan)):
        with pytest.raises(ValueError, match="finite numbers"):
            ZBox(low=broken)


def test_pixel_bounds_can_be_tensors() -> None:
    low, high = [-2.0, -1.5, -1.25], [2.0, 1.5, 1.25]
    for shape in ((3,), (3, 1, 1), (1, 3, 1, 1)):
        assert ZBox(torch.tensor(low).view(shape), torch.tensor(high).view(shape)) == ZBox(low, high)
    assert ZBox(torch.tensor(-1.5), 2.0) == ZBox(-1.5, 2.0)
    with pytest.raises(ValueError, match=r"a number for each channel, got a tensor of shape \(1, 3, 4, 4\)"):
        ZBox(torch.zeros(1, 3, 4, 4), 1.0)


def test_pixel_bounds_default_to_black_and_white() -> None:
    rule = ZBox()
    pixels = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    expected = (pixels - torch.tensor(IMAGENET_MEAN, dtype=torch.float64)) / torch.tensor(IMAGENET_STD)
    got = torch.tensor([rule.parameter("low"), rule.parameter("high")], dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=1e-6)
    assert ZBox(-1, [1, 2, 3]).parameter("high") == (1.0, 2.0, 3.0)


def test_parameters_default_to_those_of_zennit() -> None:
    assert str(Epsilon()) == "epsilon(epsilon=1e-06)"
    assert str(Gamma()) == "gamma(gamma=0.25, stabilizer=1e-06)"
    assert str(AlphaBeta()) == "alpha-beta(alpha=2.0, beta=1.0, stabilizer=1e-06)"
    for factory in (ZPlus, ZBox, WSquare, Flat):
        assert factory().parameter("stabilizer") == 1e-6


def test_a_rule_reads_as_it_is_written() -> None:
    assert str(Gamma(0.25)) == "gamma(gamma=0.25, stabilizer=1e-06)"
    assert str(Epsilon(1e-3)) == "epsilon(epsilon=0.001)"


@pytest.mark.parametrize("factory", FACTORIES)
def test_parameters_tell_the_rules_of_a_factory_apart(factory: str) -> None:
    """Equal rules have equal parameters and others do not, so that a rule can stand in a key."""
    made, again = FACTORIES[factory](3), FACTORIES[factory](3)
    assert made == again
    assert len(set(made)) == len({str(rule) for rule in made}) == len(made)
    with pytest.raises(KeyError):
        made[0].parameter("nonsense")


def test_a_zero_guard_takes_no_bias() -> None:
    with pytest.raises(ValueError, match="bias=False"):
        PositiveProducts(ZeroGuard())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_stabilizer_takes_every_zero_as_positive(dtype: torch.dtype, compiled: bool) -> None:
    z = torch.cat([torch.randn(37), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]).to(dtype)
    given = z.clone()
    stabilizer = Stabilizer(2**-7)
    call = torch.compile(stabilizer, dynamic=False) if compiled else stabilizer
    got = call(z)
    assert got.dtype == dtype
    assert torch.equal(got, torch.where(z < 0, z - 2**-7, z + 2**-7))
    assert torch.equal(z, given)
    assert torch.equal(Stabilizer(0.25, signed=False)(z), z + 0.25)
