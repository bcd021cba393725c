"""Gates after a convolution, and the largest denominator of each image."""

from __future__ import annotations

import pytest
import torch
from test_common import (
    ALPHA_BETA,
    BOUND,
    DEVICE,
    GUARDED,
    OWN,
    POSITIVE,
    RULES,
    SMALL,
    TYPES,
    agree,
    defined_gates,
    defined_stack,
    drawn_stack,
    gpu,
    normal,
    poisoned_outputs,
)
from torch import Tensor

import strict_interpreter
from lrp_fast.kernels import pointwise_conv
from lrp_fast.kernels.common import Branch, Denominators
from lrp_fast.kernels.gate import gate, image_maximum
from lrp_fast.kernels.merge import merge

__all__ = ["poisoned_outputs"]


def by_group(stacked: Tensor, groups: int) -> Tensor:
    """From first, second to first and second of each group side by side."""
    return stacked.unflatten(-1, (2, groups, -1)).transpose(-3, -2).flatten(-3).contiguous()


def check_gate(
    denominators: Denominators, shape: tuple[int, ...], dtype: torch.dtype,
    relu: bool, over_value: bool, with_bias: bool = True, block: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    raw, bias = drawn_stack(denominators, *shape, dtype=dtype)
    own, z = defined_stack(raw, bias if with_bias else None, denominators)
    value = own.clamp(min=0) if relu else own
    limit = torch.rand(shape[0], device=DEVICE) + 0.5
    numerator = value if over_value else torch.ones_like(value)
    got, gates = gate(
        raw, bias if with_bias else None, denominators, relu=relu, over_value=over_value, limit=limit, block=block
    )
    assert got.dtype == gates.dtype == dtype
    agree(got, value, BOUND[dtype])
    agree(gates, defined_gates(own, z, numerator, denominators, limit), BOUND[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of what a mask keeps from being stored
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("over_value", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_value_and_gates(rule: str, over_value: bool, dtype: torch.dtype) -> None:
    check_gate(RULES[rule], (2, 3, 5, 40), dtype, relu=True, over_value=over_value, block=SMALL)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("channels", [1, 7, 24])
def test_channels_of_any_number(channels: int, with_bias: bool) -> None:
    for denominators in (OWN, POSITIVE, ALPHA_BETA):
        check_gate(denominators, (3, 2, 3, channels), torch.float32, True, True, with_bias)


def test_a_bias_of_the_compute_dtype() -> None:
    raw, bias = drawn_stack(POSITIVE, 2, 3, 3, 24, dtype=torch.float16)
    own, z = defined_stack(raw, bias.half(), POSITIVE)
    value, gates = gate(raw, bias.half(), POSITIVE, relu=False, over_value=True)
    agree(value, own, 2e-3)
    agree(gates, defined_gates(own, z, own, POSITIVE), 2e-3)


@pytest.mark.parametrize("block", [SMALL, None])
def test_denominators_that_are_the_same_for_every_image(block: tuple[int, int] | None) -> None:
    denominators = Denominators("own", 1e-2, "plain")
    raw, bias = drawn_stack(denominators, 3, 5, 7, 24, dtype=torch.float32)
    fixed = torch.rand(5, 7, 24, device=DEVICE) + 0.1
    own, _ = defined_stack(raw, bias, denominators)
    value = own.clamp(min=0)
    got, gates = gate(raw, bias, denominators, relu=True, over_value=True, fixed=fixed, block=block)
    agree(got, value, BOUND[torch.float32])
    agree(gates, value / (fixed.double() + 1e-2), BOUND[torch.float32])
    with pytest.raises(ValueError, match="go with the kinds 'own' and 'stacked', got 'signs'"):
        gate(raw, None, ALPHA_BETA, relu=True, over_value=True, fixed=fixed)


@pytest.mark.parametrize("block", [SMALL, None])
def test_denominators_that_are_partly_the_same_for_every_image(block: tuple[int, int] | None) -> None:
    raw, bias = drawn_stack(POSITIVE, 3, 5, 7, 24)
    fixed = torch.rand(5, 7, 24, device=DEVICE) + 0.5
    own, (z,) = defined_stack(raw, bias, POSITIVE)
    got, gates = gate(raw, bias, POSITIVE, relu=True, over_value=False, fixed=fixed, block=block)
    agree(got, own.clamp(min=0), 1e-5)
    agree(gates, 1 / (z + fixed.double() + POSITIVE.epsilon), 1e-5)


@pytest.mark.parametrize("group_width", [0, 8])
def test_two_denominators_apart_from_the_own_output(group_width: int) -> None:
    """Which is not their sum here, so that neither can stand in for it."""
    apart = Denominators("apart", 0.25)
    own, plus, minus = normal(2, 3, 5, 24), normal(2, 3, 5, 24).abs(), -normal(2, 3, 5, 24).abs()
    bias = torch.cat([normal(24), normal(24).abs(), -normal(24).abs()])
    stacks = [x.unflatten(-1, (-1, group_width or 24)) for x in (own, plus, minus)]
    raw = torch.cat(stacks, -1).flatten(-2).contiguous()
    value, gates = gate(raw, bias, apart, relu=True, over_value=True, group_width=group_width, block=SMALL)
    own, plus, minus = (x.double() + b.double() for x, b in zip((own, plus, minus), bias.split(24), strict=True))
    agree(value, own.clamp(min=0), 1e-5)
    agree(gates, torch.cat([own.clamp(min=0) / (plus + 0.25), own.clamp(min=0) / (minus - 0.25)], -1), 1e-5)


def test_three_stacks_are_for_the_gate_pass_alone() -> None:
    apart, x, weight = Denominators("apart"), normal(1, 2, 2, 16), normal(48, 16)
    with pytest.raises(ValueError, match="'apart', of three stacks, which only gate.gate takes"):
        pointwise_conv.gated(x, weight, None, apart, relu=True, over_value=True)
    with pytest.raises(ValueError, match="'apart', of three stacks"):
        merge(Branch(normal(1, 2, 2, 48), True), Branch(x), apart, "ratio", relu=True, is_residual=True)


def test_negative_products_are_what_the_output_lacks_of_the_positive_ones() -> None:
    """Above zero by rounding alone, where they count as zero, and ε has their sign; the output is never summed from parts."""
    plus = 1e4 + normal(2, 3, 5, 24).abs()
    own = plus - torch.tensor([2.0, 0.0, -1e-3], device=DEVICE).repeat(8)
    value, gates = gate(torch.cat([own, plus], -1), None, ALPHA_BETA, relu=True, over_value=False, block=SMALL)
    assert torch.equal(value, own)
    lacking = (own - plus).clamp(max=0).double()  # a difference of near numbers is exact
    epsilon = ALPHA_BETA.epsilon
    agree(gates, torch.cat([1 / (plus.double() + epsilon), 1 / (lacking - epsilon)], -1), 1e-5)


def test_stacks_of_a_grouped_convolution() -> None:
    raw, bias = drawn_stack(ALPHA_BETA, 2, 3, 3, 24)
    own, z = defined_stack(raw, bias, ALPHA_BETA)
    value, gates = gate(by_group(raw, 6), bias, ALPHA_BETA, relu=False, over_value=True, group_width=4, block=SMALL)
    agree(value, own, 1e-5)
    agree(gates, defined_gates(own, z, own, ALPHA_BETA), 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", ["epsilon", "positive", "guarded"])
def test_the_largest_denominator_of_each_image(rule: str, dtype: torch.dtype) -> None:
    raw, bias = drawn_stack(RULES[rule], 3, 3, 5, 24, dtype=dtype)
    raw[1] -= 20  # all below zero
    _, (z,) = defined_stack(raw, bias, RULES[rule])
    got = image_maximum(raw, bias, RULES[rule], factor=0.25, block=SMALL)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), 0.25 * z.flatten(1).amax(1), rtol=1e-6, atol=1e-6)


def test_the_largest_denominator_wherever_it_lies() -> None:
    raw = torch.zeros(2, 4, 3, 2 * 20, device=DEVICE)
    for place in range(0, 4 * 3 * 20, 17):
        raw.zero_()[1].view(-1, 40)[place // 20, 20 + place % 20] = 3.0
        raw[..., :20] = 9.0  # the layer's own output does not count
        assert image_maximum(raw, None, GUARDED, block=SMALL).tolist() == [0.0, 3.0]


def test_the_largest_denominator_without_bias_and_of_grouped_stacks() -> None:
    raw, bias = drawn_stack(GUARDED, 2, 3, 3, 24)
    plain = image_maximum(raw, bias, GUARDED, block=SMALL)
    assert torch.equal(image_maximum(by_group(raw, 3), bias, GUARDED, group_width=8, block=SMALL), plain)
    assert torch.equal(image_maximum(raw, None, GUARDED), raw[..., 24:].flatten(1).amax(1))


def test_the_largest_denominator_of_more_images_than_a_grid_is_deep() -> None:
    raw = torch.rand(65_600, 1, 2, 8, device=DEVICE)
    with strict_interpreter.only(0, -1):
        got = image_maximum(raw, None, OWN)
    assert torch.equal(got[[0, -1]], raw[[0, -1]].flatten(1).amax(1))


def test_a_denominator_too_small_for_a_reciprocal_is_dead() -> None:
    """Where even an image's largest is no normal number, its limit is zero: 1 / z would not be finite."""
    raw = torch.tensor([[0.0, 2.0**-130], [0.0, 2.0**-125]], device=DEVICE).view(2, 1, 1, 2)
    limit = torch.zeros(2, device=DEVICE)
    _, gates = gate(raw, None, GUARDED, relu=True, over_value=False, limit=limit)
    assert gates.flatten().tolist() == [-1.0, 2.0**125]


@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_nan_behind_a_relu(rule: str) -> None:
    """An image that overflows does not come out as if it was in order."""
    denominators = RULES[rule]
    raw = normal(2, 3, 5, denominators.stacks * 24)
    raw[1, 2, 3, 7 :: 24] = torch.nan
    value, gates = gate(raw, None, denominators, relu=True, over_value=False, limit=torch.zeros(2, device=DEVICE))
    for got in (value, *gates.chunk(denominators.groups, -1)):
        assert got.isnan().nonzero().tolist() == [[1, 2, 3, 7]]


def test_quotients_of_any_size() -> None:
    """A GPU's are approximations, each within two units in the last place."""
    raw = torch.exp2(normal(1, 64, 64, 32).clamp(-3, 3) * 40)
    _, gates = gate(raw, None, Denominators("own", 0.0, "plain"), relu=True, over_value=False)
    assert float((gates.double() * raw.double() - 1).abs().max()) <= 2.0**-22


def test_two_groups_have_no_one_maximum() -> None:
    raw, bias = drawn_stack(ALPHA_BETA, 1, 1, 1, 8)
    with pytest.raises(ValueError, match="two groups"):
        image_maximum(raw, bias, ALPHA_BETA)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_gates_at_full_size(rule: str, dtype: torch.dtype) -> None:
    check_gate(RULES[rule], (16, 56, 56, 256), dtype, relu=True, over_value=True)
    if RULES[rule].groups == 1:
        raw, bias = drawn_stack(RULES[rule], 16, 56, 56, 256, dtype=dtype)
        _, (z,) = defined_stack(raw, bias, RULES[rule])
        got = image_maximum(raw, bias, RULES[rule])
        torch.testing.assert_close(got.double(), z.flatten(1).amax(1), rtol=1e-5, atol=1e-5)
