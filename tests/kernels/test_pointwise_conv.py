"""1×1 convolutions with fused epilogues against their equations in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lrp_fast.kernels.common import Arrival, Branch, Denominators, Divisor, End
from lrp_fast.kernels.merge import arrive
from lrp_fast.kernels.pointwise_conv import Blocks, Precision, backward, candidates, gated, image_maximum, merged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(16, 16, 16, 4, 2)
WIDE = Blocks(32, 32, 32, 4, 2)
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

OWN = Denominators("own", 0.25)
POSITIVE = Denominators("stacked", 1e-5, "vanishing")
PLAIN = Denominators("stacked", 1e-5, "plain")
ALPHA_BETA = Denominators("signs", 0.25)
GAMMA = Denominators("gamma", 0.25, gamma=0.75)
GUARDED = Denominators("stacked", stabilizer="guard")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN before its kernel runs."""

    def poisoned(like: Tensor, *shape: object, **options: object) -> Tensor:
        return fresh(like, *shape, **options).fill_(torch.nan)  # type: ignore[arg-type]

    fresh = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def agree(got: Tensor | None, wanted: Tensor, bound: float) -> None:
    assert got is not None
    assert got.shape == wanted.shape
    error, size = float((got.double() - wanted).norm()), float(wanted.norm())
    assert error <= bound * size, (error, size)


# The equations, in float64 --------------------------------------------------------------------------------------------


def drawn(
    denominators: Denominators, inner: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A stacked weight and bias whose denominators have no pole near them, for inputs that are not negative."""
    weight, bias = normal(channels, inner), normal(channels)
    if denominators.kind == "stacked":
        weight, bias = torch.cat([weight, weight.clamp(min=0)]), torch.cat([bias, bias.abs()])
    elif denominators.kind in ("gamma", "signs"):
        negative = 0.25 if denominators.kind == "signs" else 0.0
        weight, bias = torch.cat([weight, weight.clamp(min=0)]), torch.cat([bias, bias.clamp(min=0) + negative])
    return (weight / inner**0.5).to(dtype), bias


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """N × H × W × K and C × K to N × Ho × Wo × C."""
    image, kernel = x.double().permute(0, 3, 1, 2), weight.double()[:, :, None, None]
    out = torch.nn.functional.conv2d(image, kernel, None if bias is None else bias.double(), stride)
    return out.permute(0, 2, 3, 1)


def understood(raw: Tensor, denominators: Denominators) -> tuple[Tensor, list[Tensor]]:
    """The layer's own output and 1 / stab(z) of its groups, zero where masked, from its stacked output with bias."""
    first, *rest = raw.chunk(denominators.stacks, -1)
    own, z = first, [first]
    if denominators.kind == "stacked":
        z = rest
    elif denominators.kind == "signs":
        z = [*rest, first - rest[0]]
    elif denominators.kind == "gamma":
        gamma = denominators.gamma
        z = [first + gamma * rest[0], (1 + gamma) * first - gamma * rest[0]]
    if denominators.stabilizer == "signed":
        shares = [1 / (z_g + torch.where(z_g < 0, -1.0, 1.0) * denominators.epsilon) for z_g in z]
    else:
        shares = [1 / (z_g + denominators.epsilon) for z_g in z]
    if denominators.kind == "gamma":
        shares = [share * there for share, there in zip(shares, (own > 0, own < 0), strict=True)]
    return own, shares


def weights_of(residual: Tensor, skip: Tensor, split: str) -> tuple[Tensor, Tensor]:
    if split == "ratio":
        share = residual.abs() / (residual.abs() + skip.abs())
    elif split == "signed":
        total = residual + skip
        total = total + torch.where(total < 0, -1e-6, 1e-6)
        return residual / total, skip / total
    else:
        share = torch.full_like(residual, 0.5 if split == "symmetric" else 1.0)
    return share, 1 - share


# Forward --------------------------------------------------------------------------------------------------------------


def check_gated(
    denominators: Denominators, shape: tuple[int, int, int, int], channels: int, *, stride: int = 1, relu: bool = True,
    over_value: bool = True, has_bias: bool = True, dtype: torch.dtype = torch.float32,
    precision: Precision = "ieee", blocks: Blocks | None = None,
) -> None:  # fmt: skip
    x = normal(*shape, dtype=dtype).relu()
    weight, bias = drawn(denominators, shape[-1], channels, dtype)
    given = bias if has_bias else None
    value, gates = gated(
        x, weight, given, denominators, stride=stride, relu=relu, over_value=over_value,
        precision=precision, blocks=blocks,
    )  # fmt: skip
    own, shares = understood(convolved(x, weight, given, stride), denominators)
    wanted = own.relu() if relu else own
    assert value.dtype == gates.dtype == dtype
    bound = BOUND[dtype] if precision == "ieee" else 1e-2
    agree(value, wanted, bound)
    agree(gates, torch.cat([share * wanted if over_value else share for share in shares], -1), bound)


@pytest.mark.parametrize("blocks", [SMALL, WIDE, None])
@pytest.mark.parametrize("denominators", [OWN, POSITIVE, PLAIN, ALPHA_BETA, GAMMA])
def test_gated(denominators: Denominators, blocks: Blocks | None) -> None:
    check_gated(denominators, (2, 3, 7, 24), 40, blocks=blocks)


@pytest.mark.parametrize("columns", [128, 256])
def test_an_epilogue_in_more_parts(columns: int) -> None:
    blocks = Blocks(16, columns, 32, 4, 2)
    check_gated(POSITIVE, (1, 3, 5, 40), 200, blocks=blocks)
    check_backward((1, 3, 5, 40), 200, Arrival((End(normal(1, 3, 5, 200)),)), blocks=blocks)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("size", [(5, 7), (4, 6), (1, 1)])
def test_gated_reads_the_strided_rows(size: tuple[int, int], stride: int) -> None:
    check_gated(POSITIVE, (3, *size, 32), 24, stride=stride, blocks=SMALL)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("over_value", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gated_as_asked(relu: bool, over_value: bool, has_bias: bool) -> None:
    for denominators in (OWN, GAMMA):
        check_gated(
            denominators, (2, 3, 5, 40), 24, relu=relu, over_value=over_value, has_bias=has_bias, blocks=WIDE
        )  # fmt: skip


@pytest.mark.parametrize("denominators", [OWN, POSITIVE, GAMMA])
def test_gated_in_half_precision(denominators: Denominators) -> None:
    check_gated(denominators, (2, 3, 7, 24), 40, dtype=torch.float16, blocks=WIDE)


def check_merged(
    denominators: Denominators, shape: tuple[int, int, int, int], channels: int, split: str, *, stride: int = 1,
    relu: bool = True, is_residual: bool = True, linear: bool = False, product: int = 0, has_bias: bool = True,
    dtype: torch.dtype = torch.float32, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """``linear``: the other branch is one too; ``product``: and the kernel multiplies for it, at that stride."""
    x = normal(*shape, dtype=dtype).relu()
    weight, bias = drawn(denominators, shape[-1], channels, dtype)
    given = bias if has_bias else None
    own, shares = understood(convolved(x, weight, given, stride), denominators)
    if product:
        other_weight, other_bias = drawn(denominators, 48, channels, dtype)
        images, height, width, _ = own.shape
        y = normal(images, height * product, width * product - product // 2, 48, dtype=dtype).relu()
        given_too = other_bias if has_bias else None
        branch = Branch(y, True, given_too, weight=other_weight, stride=product)
        other, other_shares = understood(convolved(y, other_weight, given_too, product), denominators)
        linear = True
    elif linear:
        other_weight, other_bias = drawn(denominators, 48, channels, dtype)
        raw = convolved(normal(*own.shape[:-1], 48).relu(), other_weight, None, 1).to(dtype)
        branch = Branch(raw, True, other_bias if has_bias else None)
        other, other_shares = understood(raw.double() + (other_bias.double() if has_bias else 0), denominators)
    else:
        value = normal(*own.shape, dtype=dtype)
        if split == "signed":  # away from the pole at a sum of zero
            value = torch.where(own < 0, -value.abs() - 0.1, value.abs() + 0.1)
        branch, other, other_shares = Branch(value), value.double(), []
    meet = partial(
        merged, x, weight, given, branch, denominators, split, stride=stride, relu=relu, is_residual=is_residual,
        precision=precision, blocks=blocks,
    )  # fmt: skip
    result, gates, other_end = meet()
    total = own + other
    if is_residual:
        share, other_share = weights_of(own, other, split)
    else:
        other_share, share = weights_of(other, own, split)
    bound = BOUND[dtype] if precision == "ieee" else 1e-2
    agree(result, total.relu() if relu else total, bound)
    agree(gates, torch.cat([share * s for s in shares], -1), bound)
    if linear:
        agree(other_end, torch.cat([other_share * s for s in other_shares], -1), bound)
    elif split in ("ratio", "signed"):
        agree(other_end, other_share, bound)
        assert meet(keeps_weight=False)[2] is None
    else:
        assert other_end is None


@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("split", ["ratio", "symmetric", "residual-only", "signed"])
def test_merged_with_a_value(split: str, is_residual: bool) -> None:
    check_merged(POSITIVE, (2, 3, 7, 24), 40, split, is_residual=is_residual, blocks=SMALL)


@pytest.mark.parametrize("denominators", [OWN, POSITIVE, GAMMA])
@pytest.mark.parametrize("split", ["ratio", "symmetric", "residual-only"])
def test_merged_with_another_linear_branch(denominators: Denominators, split: str) -> None:
    check_merged(denominators, (2, 5, 3, 24), 40, split, linear=True, blocks=WIDE)


@pytest.mark.parametrize("denominators", [OWN, POSITIVE, ALPHA_BETA, GAMMA])
@pytest.mark.parametrize("split", ["ratio", "symmetric", "residual-only"])
def test_merged_multiplies_for_both_branches(denominators: Denominators, split: str) -> None:
    check_merged(denominators, (2, 5, 3, 24), 40, split, product=1, blocks=WIDE)


@pytest.mark.parametrize(("stride", "product"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("is_residual", [True, False])
def test_merged_multiplies_at_two_strides(stride: int, product: int, is_residual: bool) -> None:
    has_bias = stride > 1
    check_merged(
        POSITIVE, (3, 5, 4, 40), 24, "ratio", stride=stride, product=product, is_residual=is_residual,
        has_bias=has_bias, relu=not has_bias, blocks=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("denominators", [POSITIVE, ALPHA_BETA])
def test_products_of_both_branches_in_half_precision_with_default_blocks(denominators: Denominators) -> None:
    check_merged(denominators, (2, 3, 7, 24), 40, "ratio", product=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_merged_at_a_stride(linear: bool, has_bias: bool) -> None:
    check_merged(
        POSITIVE, (3, 5, 4, 40), 24, "ratio", stride=2, relu=False, is_residual=False, linear=linear,
        has_bias=has_bias, blocks=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("linear", [True, False])
def test_merged_in_half_precision_with_default_blocks(linear: bool) -> None:
    check_merged(ALPHA_BETA, (2, 3, 7, 24), 40, "ratio", linear=linear, dtype=torch.float16)


def test_a_zero_split_of_nothing_is_even() -> None:
    x, weight, other = torch.zeros(1, 2, 2, 16), torch.ones(48, 16), torch.zeros(1, 2, 2, 24)
    _, gates, rest = merged(
        x.to(DEVICE), weight.to(DEVICE), None, Branch(other.to(DEVICE)), POSITIVE, "ratio", relu=True, is_residual=True
    )
    assert torch.allclose(gates, torch.tensor(0.5e5, device=DEVICE))
    assert rest is not None
    assert torch.equal(rest, torch.full_like(rest, 0.5))


def guarded(raw: Tensor, numerator: Tensor, limit: Tensor) -> Tensor:
    """Gates coded by sign, from a stacked output (N, …, 2 · C) in float64."""
    z = raw.chunk(2, -1)[1]
    dead = z <= limit.double().view(-1, 1, 1, 1)
    return torch.where(dead, -numerator, numerator / z)


def limits_of(raw: Tensor) -> Tensor:
    """In each image, what about half of all denominators are below, but none nearly; (N,) float32."""
    z = raw.chunk(2, -1)[1].flatten(1).sort(1).values
    middle = z.shape[1] // 2
    gaps = z[:, middle - 9 : middle + 10].diff(dim=1)
    at = middle - 9 + gaps.argmax(1, keepdim=True)
    return ((z.gather(1, at) + z.gather(1, at + 1)) / 2).flatten().float()


@pytest.mark.parametrize("stride", [1, 2])
def test_gated_under_a_zero_guard(stride: int) -> None:
    x = normal(3, 5, 4, 40).relu()
    weight, _ = drawn(GUARDED, 40, 24)
    raw = convolved(x, weight, None, stride)
    limit = limits_of(raw)
    value, gates = gated(x, weight, None, GUARDED, stride=stride, relu=True, over_value=True, limit=limit, blocks=SMALL)
    own = raw.chunk(2, -1)[0].relu()
    agree(value, own, 1e-5)
    agree(gates, guarded(raw, own, limit), 1e-5)
    assert bool((gates < 0).any())
    assert bool((gates > 0).any())


@pytest.mark.parametrize("other", ["value", "raw", "product"])
@pytest.mark.parametrize("split", ["ratio", "symmetric"])
def test_merged_under_a_zero_guard(other: str, split: str) -> None:
    x = normal(3, 5, 4, 40).relu()
    weight, _ = drawn(GUARDED, 40, 24)
    raw = convolved(x, weight, None, 1)
    y, other_weight = normal(3, 9, 7, 48).relu(), drawn(GUARDED, 48, 24)[0]
    other_raw = convolved(y, other_weight, None, 2)
    limit, other_limit = limits_of(raw), limits_of(other_raw)
    branch = {
        "value": Branch(other_raw.chunk(2, -1)[0].float().contiguous()),
        "raw": Branch(other_raw.float(), True, limit=other_limit),
        "product": Branch(y, True, limit=other_limit, weight=other_weight, stride=2),
    }[other]
    result, gates, end = merged(
        x, weight, None, branch, GUARDED, split, relu=True, is_residual=True, limit=limit, blocks=SMALL
    )
    own, beside = raw.chunk(2, -1)[0], other_raw.chunk(2, -1)[0]
    share, other_share = weights_of(own, beside, split)
    agree(result, (own + beside).relu(), 1e-5)
    agree(gates, guarded(raw, share, limit), 1e-5)
    if other != "value":
        agree(end, guarded(other_raw, other_share, other_limit), 1e-5)
    elif split == "ratio":
        agree(end, other_share, 1e-5)


@pytest.mark.parametrize("denominators", [OWN, POSITIVE, GUARDED])
@pytest.mark.parametrize(("stride", "channels"), [(1, 24), (2, 40), (1, 13)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_largest_denominator_of_each_image(
    denominators: Denominators, stride: int, channels: int, has_bias: bool
) -> None:
    x = normal(4, 5, 3, 40).relu() * torch.tensor([1.0, 3.0, 0.0, 2.0], device=DEVICE)[:, None, None, None]
    weight, bias = drawn(denominators, 40, channels)
    given = bias - 20 if has_bias else None  # all below zero
    z = convolved(x, weight, given, stride).chunk(denominators.stacks, -1)[-1]
    got = image_maximum(x, weight, given, denominators, stride=stride, factor=0.5, blocks=SMALL)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), 0.5 * z.flatten(1).amax(1), rtol=1e-5, atol=1e-5)


def test_two_groups_have_no_one_maximum() -> None:
    weight, bias = drawn(ALPHA_BETA, 16, 24)
    with pytest.raises(ValueError, match="of two groups, and expected 'own' or 'stacked'"):
        image_maximum(normal(1, 2, 2, 16), weight, bias, ALPHA_BETA)


# Backward -------------------------------------------------------------------------------------------------------------


def settled(acc: Tensor, arrival: Arrival) -> list[Tensor]:
    """What leaves at each end; ``acc`` (M · N, H, W, C) float64."""

    def of_maps(x: Tensor) -> Tensor:
        return x.double().repeat(acc.shape[0] // x.shape[0], 1, 1, 1)

    total = acc.clone()
    if arrival.previous is not None:
        step = arrival.previous_stride
        total[:, ::step, ::step] += arrival.previous.double()
    if arrival.value is not None:
        total = total * of_maps(arrival.value)
    if arrival.dense is not None:
        total = total + arrival.dense.double()
    if arrival.even is not None:
        total = total + arrival.even.double().view(*total.shape[:-1], 1)
    leaving = []
    for end in arrival.ends:
        share = divided_by(end.divisor)
        if end.gate is None:
            leaving.append(total * end.scale * of_maps(share))
            continue
        gate = of_maps(end.gate)
        if end.part == "guarded":
            dead = total * (-gate).clamp(min=0)
            leaving += [total * gate.clamp(min=0), torch.stack([part.sum(-1) for part in dead.split(8, -1)], -1)]
            continue
        if end.splits:
            split, *rest = end.part.split()
            gate = weights_of(gate, of_maps(arrival.value) - gate, split)[len(rest)]
        else:
            gate = {"whole": gate, "alive": gate.clamp(min=0), "dead": (-gate).clamp(min=0)}[end.part]
        leaving.append(total.repeat(1, 1, 1, end.groups) * gate * of_maps(share))
    return leaving


def divided_by(divisor: Divisor | None) -> Tensor:
    """1 / stab(z), (N, H, W, C)."""
    if divisor is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.float64, device=DEVICE)
    z = convolved(divisor.x, divisor.weight, divisor.bias, 1)
    if divisor.stabilizer == "vanishing":
        return 1 / torch.where(z + divisor.epsilon == 0, divisor.epsilon, z + divisor.epsilon)
    below = (z < 0) & (divisor.stabilizer == "signed")
    return 1 / (z + torch.where(below, -divisor.epsilon, divisor.epsilon))


def check_backward(
    shape: tuple[int, int, int, int], channels: int, arrival: Arrival, *, second: int | None = None,
    dtype: torch.dtype = torch.float32, precision: Precision = "ieee", blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """``shape``: M · N × H × W × K; ``second``: the K of another message."""
    s, weight = normal(*shape, dtype=dtype), normal(channels, shape[-1], dtype=dtype)
    acc = s.double() @ weight.double().T
    pair = None
    if second is not None:
        pair = normal(*shape[:-1], second, dtype=dtype), normal(channels, second, dtype=dtype)
        acc += pair[0].double() @ pair[1].double().T
    outputs = backward(s, weight, arrival, second=pair, precision=precision, blocks=blocks)
    for out, wanted in zip(outputs, settled(acc, arrival), strict=True):
        assert out.dtype == (dtype if out.shape[-1] % channels == 0 else torch.float32)
        agree(out, wanted, BOUND[dtype] if precision == "ieee" else 1e-2)


@pytest.mark.parametrize("blocks", [SMALL, WIDE, None])
def test_backward_plain(blocks: Blocks | None) -> None:
    check_backward((2, 5, 7, 24), 40, Arrival((End(),)), blocks=blocks)
    check_backward((2, 5, 7, 64), 24, Arrival((End(scale=0.5), End(scale=-2.0))), blocks=blocks)


@pytest.mark.parametrize("maps", [1, 3])
def test_backward_through_a_gate(maps: int) -> None:
    gate = normal(2, 5, 3, 40)
    check_backward((2 * maps, 5, 3, 24), 40, Arrival((End(gate),)), blocks=SMALL)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_backward_with_everything(maps: int, stride: int) -> None:
    rows = 2 * maps
    arrival = Arrival(
        (End(normal(2, 5, 7, 80), groups=2), End(normal(2, 5, 7, 40))),
        value=normal(2, 5, 7, 40),
        previous=normal(rows, -(-5 // stride), -(-7 // stride), 40),
        previous_stride=stride,
        dense=normal(rows, 5, 7, 40),
        even=normal(rows, 5, 7),
    )
    check_backward((rows, 5, 7, 24), 40, arrival, blocks=WIDE)


def test_backward_to_what_is_alive_and_what_is_dead() -> None:
    gate = normal(2, 3, 5, 24)
    check_backward((4, 3, 5, 40), 24, Arrival((End(gate, part="alive"), End(gate, part="dead"))), blocks=SMALL)


@pytest.mark.parametrize("channels", [24, 40, 13])
@pytest.mark.parametrize("blocks", [SMALL, WIDE, None])
def test_backward_through_zero_guards(channels: int, blocks: Blocks | None) -> None:
    gates = normal(2, 3, 5, channels), normal(2, 3, 5, channels)
    ends = End(gates[0], part="guarded"), End(gates[1], part="guarded")
    arrival = Arrival(ends, value=normal(2, 3, 5, channels), even=normal(4, 3, 5))
    check_backward((4, 3, 5, 40), channels, arrival, blocks=blocks)


def test_backward_through_a_merge_whose_weight_is_found_again() -> None:
    gate, plain, value = (normal(2, 3, 5, 40) for _ in range(3))
    arrival = Arrival((End(gate), End(plain, part="ratio")), value=value, dense=normal(4, 3, 5, 40))
    for blocks in (SMALL, None):
        check_backward((4, 3, 5, 24), 40, arrival, blocks=blocks)


def drawn_divisor(
    images: int, size: tuple[int, int], channels: int, stabilizer: Any = "plain", has_bias: bool = True,
    dtype: torch.dtype = torch.float32, inner: int = 40,
) -> Divisor:  # fmt: skip
    """Of positive products, or signed ones without a pole nearby."""
    x, weight = normal(images, *size, inner, dtype=dtype).relu(), normal(channels, inner, dtype=dtype).abs()
    sign = 1.0 if stabilizer == "plain" else torch.where(torch.arange(channels, device=DEVICE) % 2 == 0, 1.0, -1.0)
    bias = (normal(channels).abs() + 0.5) * sign if has_bias else None
    return Divisor(x, (weight.T * sign).T.to(dtype).contiguous(), bias, 0.25, stabilizer)


@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("stabilizer", ["plain", "signed", "vanishing"])
@pytest.mark.parametrize("split", ["ratio", "signed"])
def test_backward_through_a_denominator_multiplied_again(split: Any, stabilizer: str, maps: int) -> None:
    """The weight of a merge's linear branch and its denominator, neither of which was kept."""
    plain, own = normal(2, 3, 5, 24).relu(), normal(2, 3, 5, 24)
    own = torch.where((plain + own).abs() < 0.3, own + 1, own)  # away from the pole of "signed"
    divisor = drawn_divisor(2, (3, 5), 24, stabilizer, has_bias=maps == 1)
    rest: Any = f"{split} rest"
    arrival = Arrival(
        (End(plain, part=rest, divisor=divisor), End(plain, part=split)), value=plain + own,
        previous=normal(2 * maps, 2, 3, 24), previous_stride=2, dense=normal(2 * maps, 3, 5, 24),
    )  # fmt: skip
    for blocks in (SMALL, WIDE, None):
        check_backward((2 * maps, 3, 5, 24), 24, arrival, second=16, blocks=blocks)


def test_backward_through_a_denominator_under_a_constant_split() -> None:
    arrival = Arrival((End(scale=0.5, divisor=drawn_divisor(2, (3, 5), 13)), End(scale=0.5)), value=normal(2, 3, 5, 13))
    check_backward((4, 3, 5, 40), 13, arrival, blocks=SMALL)
    check_backward((2, 3, 5, 40), 13, Arrival((End(scale=-2.0, divisor=drawn_divisor(2, (3, 5), 13)),)), blocks=WIDE)


def test_a_merge_of_which_gates_are_not_kept() -> None:
    x, weight, bias, plain = normal(2, 3, 5, 24), normal(40, 24), normal(40), normal(2, 3, 5, 40)
    result, *rest = merged(
        x, weight, bias, Branch(plain), OWN, "ratio", relu=True, is_residual=True, keeps_weight=False, keeps_gates=False
    )
    assert rest == [None, None]
    agree(result, (convolved(x, weight, bias, 1) + plain).relu(), 1e-5)


def test_a_divisor_that_no_kernel_multiplies_is_refused() -> None:
    divided, s, weight = End(divisor=drawn_divisor(1, (2, 2), 24)), normal(1, 2, 2, 24), normal(24, 24)
    with pytest.raises(ValueError, match="expected one at the first end of pointwise_conv.backward alone"):
        backward(s, weight, Arrival((End(), divided)))
    with pytest.raises(ValueError, match="expected one at the first end of pointwise_conv.backward alone"):
        arrive(s, Arrival((divided,)))


@pytest.mark.parametrize(("inner", "second"), [(40, 16), (32, 40)])
def test_backward_of_two_messages(inner: int, second: int) -> None:
    arrival = Arrival((End(normal(2, 5, 3, 24)), End()), value=normal(2, 5, 3, 24))
    check_backward((2, 5, 3, inner), 24, arrival, second=second, blocks=SMALL)


# Block shapes, and the same on a GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_size_has_block_shapes(dtype: torch.dtype, precision: Precision) -> None:
    for rows, columns, inner in ((49, 2048, 512), (3136, 64, 64), (802816, 64, 256), (802816, 256, 64), (70, 24, 24)):
        for stacks in (1, 2, 3):
            found = candidates(rows, columns, inner, stacks, dtype, precision)
            assert len(found) > 1
            assert all(min(blocks.rows, blocks.columns, blocks.inner) >= 16 for blocks in found)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]
)
@pytest.mark.parametrize("images", [1, 32])
def test_on_a_gpu(images: int, dtype: torch.dtype, precision: Precision) -> None:
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA device")
    shape, options = (images, 28, 28, 128), {"dtype": dtype, "precision": precision}
    rows = images * 28 * 28
    for blocks in candidates(rows, 512, 128, 4, dtype, precision):
        check_merged(POSITIVE, shape, 512, "ratio", product=2, blocks=blocks, **options)  # type: ignore[arg-type]
    check_merged(ALPHA_BETA, shape, 512, "ratio", product=1, **options)  # type: ignore[arg-type]
    for blocks in candidates(rows, 512, 128, 2, dtype, precision):
        check_gated(POSITIVE, shape, 512, blocks=blocks, **options)  # type: ignore[arg-type]
        for linear in (True, False):
            check_merged(POSITIVE, shape, 512, "ratio", linear=linear, blocks=blocks, **options)  # type: ignore[arg-type]
    check_gated(POSITIVE, (images, 55, 56, 128), 512, stride=2, **options)  # type: ignore[arg-type]
    gates = normal(images, 28, 28, 512, dtype=dtype), normal(images, 28, 28, 512, dtype=dtype)
    arrival = Arrival(
        (End(gates[0]), End(gates[1])), value=normal(images, 28, 28, 512, dtype=dtype),
        previous=normal(images, 14, 14, 512, dtype=dtype), previous_stride=2, dense=normal(images, 28, 28, 512, dtype=dtype),
    )  # fmt: skip
    for blocks in candidates(rows, 512, 128, 1, dtype, precision):
        check_backward(shape, 512, arrival, second=256, blocks=blocks, **options)  # type: ignore[arg-type]
    divisor = drawn_divisor(images, (28, 28), 512, dtype=dtype, inner=128)
    ends = End(gates[0], part="ratio rest", divisor=divisor), End(gates[0], part="ratio")
    for blocks in candidates(rows, 512, 128, 3, dtype, precision):
        check_backward(shape, 512, replace(arrival, ends=ends), blocks=blocks, **options)  # type: ignore[arg-type]
