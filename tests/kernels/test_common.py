"""The device functions that kernels share, seen through the element-wise kernels; and what those tests share.

Definitions here are in float64 and written from the equations, one group, one split, one end at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lrp_fast.kernels.common import (
    CONSTANT_SPLITS,
    SPLITS,
    Arrival,
    Branch,
    Denominators,
    End,
    interpreted,
    pack,
    tile,
    unpack,
)
from lrp_fast.kernels.gate import gate
from lrp_fast.kernels.merge import arrive, merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = (8, 16)
"""A tile so small that every test has several, and cut ones."""

OWN = Denominators("own", 0.25)
POSITIVE = Denominators("stacked", 1e-5, "vanishing")
GUARDED = Denominators("stacked", stabilizer="guard")
ALPHA_BETA = Denominators("signs", 0.25)
GAMMA = Denominators("gamma", 0.25, gamma=0.75)
RULES = {
    "epsilon": OWN,
    "positive": POSITIVE,
    "plain": Denominators("stacked", 1e-5, "plain"),
    "guarded": GUARDED,
    "alpha beta": ALPHA_BETA,
    "gamma": GAMMA,
}


def gpu(test: Callable[..., None]) -> Any:
    """A test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN (integers: 200) before its kernel runs."""

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        empty = fresh(like, *shape, **options)
        return empty.fill_(torch.nan if empty.is_floating_point() else 200)

    fresh = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)  # the same on every device


def agree(got: Tensor | None, wanted: Tensor, bound: float) -> None:
    assert got is not None
    assert got.shape == wanted.shape
    error, size = float((got.double() - wanted).norm()), float(wanted.norm())
    assert size > 0
    assert error <= bound * size, (error, size)


# The equations, in float64 --------------------------------------------------------------------------------------------


def drawn_stack(denominators: Denominators, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A raw stacked output (…, S · C) and its bias whose denominators have no pole near them."""
    own, bias = normal(*shape), normal(shape[-1]) / 4
    if denominators.kind == "own":
        return own.to(dtype), bias
    if denominators.kind == "stacked":
        return torch.cat([own, normal(*shape).abs() + 0.5], -1).to(dtype), torch.cat([bias, bias / 4])
    plus = torch.cat([own, own.clamp(min=0) + normal(*shape).abs() + 0.1], -1)
    return plus.to(dtype), torch.cat([bias, bias.clamp(min=0)])


def defined_stack(raw: Tensor, bias: Tensor | None, denominators: Denominators) -> tuple[Tensor, list[Tensor]]:
    """The layer's own output and the denominators of its groups."""
    whole = raw.double() if bias is None else raw.double() + bias.double()
    if denominators.kind == "own":
        return whole, [whole]
    first, second = whole.chunk(2, -1)
    if denominators.kind == "stacked":
        return first, [second]
    if denominators.kind == "gamma":
        gamma = denominators.gamma
        return first, [first + gamma * second, (1 + gamma) * first - gamma * second]
    return first, [second, first - second]


def defined_gates(
    own: Tensor, z: list[Tensor], numerator: Tensor, denominators: Denominators, limit: Tensor | None = None
) -> Tensor:
    """The gates of all groups, (…, G · C)."""
    gates = []
    for index, z_g in enumerate(z):
        if denominators.stabilizer == "guard":
            assert limit is not None
            dead = z_g.float() <= limit.view(-1, *(1,) * (z_g.ndim - 1))  # a decision, and so in the kernel's precision
            gates.append(torch.where(dead, -numerator, numerator / z_g))
            continue
        sign = torch.where(z_g < 0, -1.0, 1.0) if denominators.stabilizer == "signed" else 1.0
        stabilized = z_g + denominators.epsilon * sign
        if denominators.stabilizer == "vanishing":
            stabilized = torch.where(stabilized == 0, denominators.epsilon, stabilized)
        mask = (own > 0, own < 0)[index] if denominators.kind == "gamma" else torch.ones_like(own)
        gates.append(mask * numerator / stabilized)
    return torch.cat(gates, -1)


def defined_split(residual: Tensor, skip: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """The weights of the residual branch and of the skip."""
    if split in CONSTANT_SPLITS:
        first, second = {"symmetric": (0.5, 0.5), "residual-only": (1.0, 0.0)}[split]
        return torch.full_like(residual, first), torch.full_like(residual, second)
    if split == "signed":
        total = residual + skip
        total = total + torch.where(total < 0, -1e-6, 1e-6)
        return residual / total, skip / total
    both = residual.abs() + skip.abs()
    share = torch.where(both == 0, 0.5, residual.abs() / both.masked_fill(both == 0, 1.0))
    return share, 1 - share


def settled(acc: Tensor | None, arrival: Arrival, shape: tuple[int, ...]) -> list[Tensor]:
    """What leaves at each end for relevance of ``shape`` (M · N, H, W, C)."""

    def of_maps(x: Tensor) -> Tensor:
        return torch.cat([x.double()] * (shape[0] // x.shape[0]))

    total = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    if acc is not None:
        total += acc.double()
    if arrival.previous is not None:
        step = arrival.previous_stride
        total[:, ::step, ::step] += arrival.previous.double()
    if arrival.value is not None:
        total *= of_maps(arrival.value)
    if arrival.dense is not None:
        total += arrival.dense.double()
    if arrival.even is not None:
        total += arrival.even.double()[..., None]
    results = []
    for end in arrival.ends:
        if end.gate is None:
            results.append(total * end.scale)
            continue
        gates = of_maps(end.gate)
        if end.part == "guarded":
            results += [total * gates.clamp(min=0), summed_by_eight(total * (-gates).clamp(min=0))]
            continue
        if end.splits:
            assert arrival.value is not None
            split, *rest = end.part.split()
            gates = defined_split(gates, of_maps(arrival.value) - gates, split)[len(rest)]
        elif end.part != "whole":
            gates = (gates if end.part == "alive" else -gates).clamp(min=0)
        results.append(torch.cat([total * one for one in gates.chunk(end.groups, -1)], -1))
    return results


def summed_by_eight(x: Tensor) -> Tensor:
    """Sums of every eight channels, the last of what is left."""
    return torch.stack([part.sum(-1) for part in x.split(8, -1)], -1)


def agree_all(got: tuple[Tensor, ...], wanted: list[Tensor], bound: float) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        agree(one, other, bound)


# Denominators and gates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_gates_divide_by_the_stabilized_denominators_of_their_rule(rule: str) -> None:
    denominators = RULES[rule]
    raw, bias = drawn_stack(denominators, 2, 3, 5, 24)
    own, z = defined_stack(raw, bias, denominators)
    limit = torch.tensor([0.75, 1.0], device=DEVICE)
    value, gates = gate(raw, bias, denominators, relu=False, over_value=False, limit=limit, block=SMALL)
    agree(value, own, 1e-5)
    agree(gates, defined_gates(own, z, torch.ones_like(own), denominators, limit), 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_groups_and_stacks_are_what_is_stored(rule: str) -> None:
    denominators = RULES[rule]
    raw, bias = drawn_stack(denominators, 1, 1, 3, 8)
    _, gates = gate(raw, bias, denominators, relu=True, over_value=True, limit=torch.ones(1, device=DEVICE))
    assert raw.shape[-1] == 8 * denominators.stacks
    assert gates.shape[-1] == 8 * denominators.groups


def test_a_signed_stabilizer_takes_zero_for_positive() -> None:
    raw = torch.tensor([[[[0.0, -0.0, -1.0, 1.0]]]], device=DEVICE)
    _, gates = gate(raw, None, OWN, relu=False, over_value=False)
    assert gates.flatten().tolist() == [4.0, 4.0, pytest.approx(-0.8), pytest.approx(0.8)]


def test_a_vanishing_stabilizer_puts_epsilon_in_place_of_zero() -> None:
    denominators = Denominators("own", 0.25, "vanishing")
    raw = torch.tensor([[[[-0.25, 0.0, -0.5, 0.25]]]], device=DEVICE)
    _, gates = gate(raw, None, denominators, relu=False, over_value=False)
    assert gates.flatten().tolist() == [4.0, 4.0, -4.0, 2.0]


def test_a_zero_guard_codes_the_dead_by_sign() -> None:
    raw = torch.tensor([[[[5.0, 5.0, 5.0, -5.0, 0.0, 0.1, 0.5, 0.5]]]], device=DEVICE)
    limit = torch.tensor([0.1], device=DEVICE)
    _, gates = gate(raw, None, GUARDED, relu=True, over_value=True, limit=limit)
    assert gates.flatten().tolist() == [-5.0, -5.0, 10.0, 0.0]


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_splits_weigh_residual_and_skip(split: str, is_residual: bool) -> None:
    denominators = Denominators("own", 1.0, "plain")
    own, skip = normal(2, 3, 5, 24).abs() + 1, normal(2, 3, 5, 24) * 2
    skip = torch.where((own + skip).abs() < 0.3, skip + 1, skip)  # away from the pole of "signed"
    branches = (own.double(), skip.double()) if is_residual else (skip.double(), own.double())
    weights = defined_split(*branches, split)
    weight, other_weight = weights if is_residual else weights[::-1]
    _, gates, end = merge(
        Branch(own, True), Branch(skip), denominators, split, relu=True, is_residual=is_residual, block=SMALL
    )
    if weight.any():
        agree(gates, weight / (own.double() + 1), 1e-5)
    else:
        assert not gates.any()
    if split in CONSTANT_SPLITS:
        assert end is None
        assert CONSTANT_SPLITS[split][is_residual] == float(other_weight.flatten()[0])
    else:
        agree(end, other_weight, 1e-5)


def test_the_ratio_of_two_zeros_is_one_half() -> None:
    raw = torch.tensor([[[[0.0, 0.0, 3.0]]]], device=DEVICE)
    skip = torch.tensor([[[[0.0, 1.0, -1.0]]]], device=DEVICE)
    plain = Denominators("own", 1.0, "plain")
    merged, gates, end = merge(Branch(raw, True), Branch(skip), plain, "ratio", relu=True, is_residual=True)
    assert end is not None
    assert merged.flatten().tolist() == [0.0, 1.0, 2.0]
    torch.testing.assert_close(end.flatten().cpu(), torch.tensor([0.5, 1.0, 0.25]))
    torch.testing.assert_close(gates.flatten().cpu(), torch.tensor([0.5, 0.0, 0.75 / 4]))


# Arrivals -------------------------------------------------------------------------------------------------------------

SHAPE = (4, 5, 3, 24)
IMAGES = (2, *SHAPE[1:])


def arrivals() -> dict[str, Arrival]:
    """Every way in which relevance arrives and leaves: 4 rows of images are 2 maps of 2 images."""
    value, one, other = normal(*IMAGES), normal(*IMAGES), normal(*IMAGES)
    pair = normal(*IMAGES[:-1], 48)
    return {
        "alone": Arrival((End(),)),
        "scaled": Arrival((End(scale=0.5), End(scale=-2.0))),
        "value": Arrival((End(),), value=value),
        "previous": Arrival((End(one),), previous=normal(*SHAPE)),
        "value of both": Arrival((End(),), value=value, previous=normal(*SHAPE)),
        "strided": Arrival((End(one),), value=value, previous=normal(4, 3, 2, 24), previous_stride=2),
        "strided by three": Arrival((End(),), previous=normal(4, 2, 1, 24), previous_stride=3),
        "dense": Arrival((End(one), End(other)), value=value, dense=normal(*SHAPE)),
        "even": Arrival((End(one),), value=value, even=normal(*SHAPE[:-1])),
        "parts": Arrival((End(one, part="alive"), End(one, part="dead")), dense=normal(*SHAPE)),
        "guarded": Arrival((End(one, part="guarded"), End(other)), value=value, dense=normal(*SHAPE)),
        "guarded twice": Arrival((End(one, part="guarded"), End(other, part="guarded")), even=normal(*SHAPE[:-1])),
        "groups": Arrival((End(pair, groups=2), End(one)), value=value),
        "two of two groups": Arrival((End(pair, 2), End(pair.flip(-1), 2)), even=normal(*SHAPE[:-1])),
        "one map": Arrival((End(normal(*SHAPE)),), value=normal(*SHAPE)),
        "ratio": Arrival((End(one), End(other, part="ratio")), value=value, dense=normal(*SHAPE)),
        "signed": Arrival((End(pair, 2), End(other, part="signed")), value=value.abs() + 1),
        "both of a ratio": Arrival((End(other, part="ratio rest"), End(other, part="ratio")), value=value),
        "both signed": Arrival((End(other, part="signed"), End(other, part="signed rest")), value=value.abs() + 1),
    }


@pytest.mark.parametrize("case", list(arrivals()))
def test_relevance_is_totalled_and_sent_on(case: str) -> None:
    arrival, acc = arrivals()[case], normal(*SHAPE)
    agree_all(arrive(acc, arrival, block=SMALL), settled(acc, arrival, SHAPE), 1e-5)


@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("split", ["ratio", "signed"])
def test_a_weight_is_found_again_from_what_met(split: Any, is_residual: bool) -> None:
    own, plain, acc = normal(2, 3, 5, 24), normal(2, 3, 5, 24), normal(2, 3, 5, 24)
    plain = torch.where((own + plain).abs() < 0.3, -own, plain)  # exact zeros, and nothing near them
    meet = partial(
        merge, Branch(own, True), Branch(plain), OWN, split, relu=True, is_residual=is_residual, block=SMALL
    )  # fmt: skip
    merged, gates, weight = meet()
    same, same_gates, none = meet(keeps_weight=False)
    assert none is None
    assert torch.equal(merged, same)
    assert torch.equal(gates, same_gates)
    (kept,) = arrive(acc, Arrival((End(weight),), value=merged))
    (found,) = arrive(acc, Arrival((End(plain, part=split),), value=merged))
    assert found[merged == 0].abs().max() == 0
    agree(found, kept, 1e-5)
    with pytest.raises(ValueError, match="and no value"):
        arrive(acc, Arrival((End(plain, part=split),)))
    with pytest.raises(ValueError, match="with two gates, and expected the value of one branch"):
        arrive(acc, Arrival((End(plain, part=split), End(own, part=split)), value=merged))


@pytest.mark.parametrize("channels", [3, 8, 13, 40])
def test_what_is_dead_is_summed_by_eight_channels(channels: int) -> None:
    shape = (2, 5, 3, channels)
    gates, acc = normal(*shape), normal(*shape)
    arrival = Arrival((End(gates, part="guarded"),))
    agree_all(arrive(acc, arrival), settled(acc, arrival, shape), 1e-5)


def test_outputs_have_the_dtype_of_what_they_are_like() -> None:
    gates = normal(2, 3, 5, 16)
    arrival = Arrival((End(gates, groups=2), End())).prepared(normal(1, dtype=torch.bfloat16), (2, 3, 5, 8))
    assert [(x.shape, x.dtype) for x in arrival.outputs] == [
        ((2, 3, 5, 16), torch.bfloat16), ((2, 3, 5, 8), torch.bfloat16)
    ]  # fmt: skip
    guarded = Arrival((End(gates, part="guarded"),)).prepared(gates.bfloat16(), (2, 3, 5, 17))
    assert [(x.shape, x.dtype) for x in guarded.outputs] == [
        ((2, 3, 5, 17), torch.bfloat16), ((2, 3, 5, 3), torch.float32)
    ]  # fmt: skip
    assert arrival == Arrival((End(gates, groups=2), End()))  # outputs are no part of what an arrival is


# Host -----------------------------------------------------------------------------------------------------------------


def test_packing_is_a_view_of_what_lies_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5)
    packed = pack(x)
    assert packed.shape == (2, 4, 5, 3)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed), x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert pack(last).data_ptr() == last.data_ptr()
    assert unpack(packed).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3, 24, 64, 200, 256, 2048])
def test_tiles_are_powers_of_two_and_cover_whole_rows(channels: int) -> None:
    rows, columns = tile(channels)
    assert rows * columns == 1024
    assert columns == 256 or columns // 2 < channels <= columns


def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    assert interpreted() == (DEVICE == "cpu")
