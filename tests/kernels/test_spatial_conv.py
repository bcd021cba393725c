"""The k×k convolution kernels against their equations, evaluated by torch in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.kernels.common import Arrival, Branch, Denominators, End
from lrp_fast.kernels.pointwise_conv import Blocks
from lrp_fast.kernels.spatial_conv import (
    backward,
    candidates,
    gated,
    merged,
    pack_backward,
    stem_candidates,
    stem_heatmap,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(64, 32, 32, 4, 2)
SMALLEST = Blocks(32, 16, 16, 4, 2)
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
KINDS = {
    "own": Denominators("own", 1e-2, "signed"),
    "stacked": Denominators("stacked", 1e-2, "vanishing"),
    "plain": Denominators("stacked", 1e-2, "plain"),
    "alpha-beta": Denominators("signs", 1e-2, "signed"),
    "gamma": Denominators("gamma", 1e-2, "signed", gamma=0.75),
}

# input channels, channels, groups, height, width, kernel, stride, padding, dilation
Shape = tuple[int, int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
SHAPES: dict[str, Shape] = {
    "3x3": (24, 40, 1, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2 odd": (40, 24, 1, 7, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride 2 even": (24, 24, 1, 8, 6, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 unpadded": (24, 24, 1, 8, 7, (3, 3), (2, 2), (0, 0), (1, 1)),
    "5x5": (16, 24, 1, 6, 5, (5, 5), (1, 1), (2, 2), (1, 1)),
    "1x3 stride 2": (24, 40, 1, 5, 7, (1, 3), (2, 2), (0, 1), (1, 1)),
    "stride along one axis": (24, 24, 1, 5, 7, (3, 1), (1, 2), (1, 0), (1, 1)),
    "dilation": (24, 24, 1, 7, 8, (3, 3), (1, 1), (2, 2), (2, 2)),
    "dilation 2 stride 2": (24, 24, 1, 8, 9, (3, 3), (2, 2), (2, 2), (2, 2)),
    "dilation 3 stride 2": (16, 24, 1, 9, 8, (3, 3), (2, 2), (3, 3), (3, 3)),
    "stride 3 leaves rows": (24, 24, 1, 9, 8, (2, 2), (3, 3), (0, 0), (1, 1)),
    "groups": (64, 64, 2, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "uneven groups stride 2": (48, 80, 2, 6, 5, (3, 3), (2, 2), (1, 1), (1, 1)),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN."""
    allocate = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return allocate(self, *size, **options).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert got.shape == expected.shape
    expected = expected.to(torch.float64)
    return float((got.to(torch.float64) - expected).norm() / expected.norm())


def close(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return error(got, expected) <= BOUNDS[dtype]


def geometry(shape: Shape) -> dict[str, Any]:
    return {"stride": shape[6], "padding": shape[7], "dilation": shape[8], "groups": shape[2]}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stacks: int, where: dict[str, Any]) -> list[Tensor]:
    """Each stack's convolution of NHWC x plus its bias, NHWC float64."""
    images = x.double().permute(0, 3, 1, 2)
    weights = weight.double().permute(0, 3, 1, 2).chunk(stacks)
    biases = [None] * stacks if bias is None else bias.double().chunk(stacks)
    return [F.conv2d(images, w, b, **where).permute(0, 2, 3, 1) for w, b in zip(weights, biases, strict=True)]


def stabilized(z: Tensor, denominators: Denominators) -> Tensor:
    if denominators.stabilizer == "signed":
        return z + denominators.epsilon * torch.where(z < 0, -1.0, 1.0)
    shifted = z + denominators.epsilon
    if denominators.stabilizer == "vanishing":
        return torch.where(shifted == 0, denominators.epsilon, shifted)
    return shifted


def own_and_gates(stacks: list[Tensor], denominators: Denominators) -> tuple[Tensor, list[Tensor]]:
    """The layer's own output, and each gate for a numerator of one."""
    if denominators.kind == "own":
        return stacks[0], [1 / stabilized(stacks[0], denominators)]
    if denominators.kind == "stacked":
        return stacks[0], [1 / stabilized(stacks[1], denominators)]
    if denominators.kind == "gamma":
        own, gamma = stacks[0], denominators.gamma
        gates = [
            1 / stabilized(own + gamma * stacks[1], denominators) * (own > 0),
            1 / stabilized((1 + gamma) * own - gamma * stacks[1], denominators) * (own < 0),
        ]
        return own, gates
    return stacks[0], [1 / stabilized(z, denominators) for z in (stacks[1], stacks[0] - stacks[1])]


def layer(
    shape: Shape, denominators: Denominators, dtype: torch.dtype = torch.float32, images: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """A non-negative x, stacked weights and a bias that keep every denominator away from its poles.

    One stack: positive. Two: one of any sign before a positive one, of αβ its positive part.
    """
    inputs, channels, groups, height, width, kernel = shape[:6]
    x = torch.rand(images, height, width, inputs) + 0.1
    fan = kernel[0] * kernel[1] * inputs // groups
    weights = [torch.rand(channels, *kernel, inputs // groups) / fan for _ in range(denominators.stacks)]
    biases = [torch.rand(channels) + 0.2 for _ in range(denominators.stacks)]
    if denominators.stacks == 2:
        weights[0] = torch.randn(channels, *kernel, inputs // groups) / fan**0.5
        biases[0] = torch.randn(channels)
    if denominators.kind == "signs":
        weights[1], biases[1] = weights[0].clamp(min=0), biases[0].clamp(min=0) + biases[1]
    return x.to(DEVICE, dtype), torch.cat(weights).to(DEVICE, dtype), torch.cat(biases).to(DEVICE)


def check_gated(
    shape: Shape, denominators: Denominators, dtype: torch.dtype = torch.float32, biased: bool = True, images: int = 2,
    relu: bool = True, over_value: bool = True, **options: Any,
) -> None:  # fmt: skip
    x, weight, bias = layer(shape, denominators, dtype, images)
    where = geometry(shape)
    value, gates = gated(
        x, weight, bias if biased else None, denominators, relu=relu, over_value=over_value, **where, **options
    )
    stacks = convolution(x, weight, bias if biased else None, denominators.stacks, where)
    own, expected = own_and_gates(stacks, denominators)
    own = own.relu() if relu else own
    assert value.dtype == gates.dtype == dtype
    assert close(value, own, dtype)
    assert close(gates, torch.cat([gate * own if over_value else gate for gate in expected], -1), dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_gated_shapes(name: str) -> None:
    check_gated(SHAPES[name], KINDS["stacked"], blocks=SMALL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("relu", "over_value"), [(True, True), (False, False), (True, False)])
def test_gated_kinds(kind: str, relu: bool, over_value: bool) -> None:
    shape = SHAPES["1x3 stride 2"]
    check_gated(shape, KINDS[kind], relu=relu, over_value=over_value, biased=over_value, images=3, blocks=SMALLEST)


@pytest.mark.parametrize("kind", ["own", "stacked", "alpha-beta"])
def test_gated_default_blocks_and_half_precision(kind: str) -> None:
    check_gated(SHAPES["1x3 stride 2"], KINDS[kind])
    check_gated(SHAPES["groups"], KINDS[kind], torch.float16, images=1, blocks=SMALL)


def check_merged(
    shape: Shape, denominators: Denominators, split: str, *, linear: bool, is_residual: bool = True,
    dtype: torch.dtype = torch.float32, relu: bool = True, biased: bool = True, images: int = 2, **options: Any,
) -> None:  # fmt: skip
    x, weight, bias = layer(shape, denominators, dtype, images)
    where = geometry(shape)
    stacks = convolution(x, weight, bias, denominators.stacks, where)
    own, gates = own_and_gates(stacks, denominators)
    raw = [torch.rand_like(stack) + 0.2 for stack in stacks]
    other_biases = [0.3 * torch.rand(shape[1]) for _ in stacks]
    if denominators.stacks == 2:
        raw = [torch.randn_like(raw[0]), torch.rand_like(raw[0])]
    if denominators.kind == "signs":
        raw[1] += raw[0].clamp(min=0) + 0.2
        other_biases[1] += other_biases[0]
    raw = raw if linear else raw[:1]
    tensor = torch.cat(raw, -1).to(dtype)
    other_bias = torch.cat(other_biases).to(DEVICE) if linear and biased else None
    meet = partial(
        merged, x, weight, bias, Branch(tensor, linear, other_bias), denominators, split,
        relu=relu, is_residual=is_residual, **where, **options,
    )  # fmt: skip
    result, got, other_end = meet()
    arrived = [*tensor.double().chunk(len(raw), -1)]
    if other_bias is not None:
        arrived = [a + b for a, b in zip(arrived, other_bias.double().chunk(len(raw)), strict=True)]
    other, other_gates = own_and_gates(arrived, denominators) if linear else (arrived[0], [])
    first, second = (own, other) if is_residual else (other, own)
    shares = {
        "ratio": lambda: first.abs() / (first.abs() + second.abs()),
        "signed": lambda: first / stabilized(first + second, Denominators("own", 1e-6)),
        "symmetric": lambda: torch.full_like(first, 0.5),
        "residual-only": lambda: torch.ones_like(first),
    }
    share = shares[split]()
    weights = (share, 1 - share) if is_residual else (1 - share, share)
    total = own + other
    assert close(result, total.relu() if relu else total, dtype)
    assert close(got, torch.cat([weights[0] * gate for gate in gates], -1), dtype)
    if linear and split == "residual-only" and is_residual:
        assert other_end is not None
        assert not other_end.any()
    elif linear:
        assert other_end is not None
        assert close(other_end, torch.cat([weights[1] * gate for gate in other_gates], -1), dtype)
    elif split in ("ratio", "signed"):
        assert other_end is not None
        assert close(other_end, weights[1], dtype)
        assert meet(keeps_weight=False)[2] is None
    else:
        assert other_end is None


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_kinds(kind: str, linear: bool) -> None:
    check_merged(SHAPES["1x3 stride 2"], KINDS[kind], "ratio", linear=linear, biased=kind != "plain", blocks=SMALL)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("split", "is_residual"),
    [("ratio", False), ("symmetric", True), ("residual-only", True), ("signed", True), ("signed", False)],
)
def test_merged_splits(split: str, is_residual: bool, linear: bool) -> None:
    shape = SHAPES["3x3 stride 2 even"]
    check_merged(shape, KINDS["own"], split, linear=linear, is_residual=is_residual, relu=linear, blocks=SMALL)


@pytest.mark.parametrize("name", ["dilation 3 stride 2", "uneven groups stride 2", "1x3 stride 2"])
def test_merged_shapes(name: str) -> None:
    check_merged(SHAPES[name], KINDS["stacked"], "ratio", linear=True, blocks=SMALL)


def test_merged_default_blocks_and_half_precision() -> None:
    for linear in (False, True):
        check_merged(SHAPES["1x3 stride 2"], KINDS["own"], "ratio", linear=linear, dtype=torch.float16)


def transposed(s: Tensor, weight: Tensor, shape: Shape, gates: int) -> Tensor:
    """The transposed convolution of s (M · N, Ho, Wo, G · C) by the weight (G · C, kh, kw, Cin / groups), NHWC float64."""
    total = torch.zeros((), dtype=torch.float64)
    size = (s.shape[0], shape[0], shape[3], shape[4])
    for message, w in zip(s.double().chunk(gates, -1), weight.double().chunk(gates), strict=True):
        back = torch.nn.grad.conv2d_input(
            size, w.permute(0, 3, 1, 2).contiguous(), message.permute(0, 3, 1, 2).contiguous(), **geometry(shape)
        )
        total = total.to(back.device) + back
    return total.permute(0, 2, 3, 1)


def messages(shape: Shape, gates: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Messages s of so many maps and images, and the weight (G · C, kh, kw, Cin / groups)."""
    inputs, channels, groups, height, width, kernel, stride, padding, dilation = shape
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    s = torch.randn(rows, *out, gates * channels)
    weight = torch.rand(gates * channels, *kernel, inputs // groups)
    return s.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def check_backward(shape: Shape, gates: int, dtype: torch.dtype = torch.float32, maps: int = 1, images: int = 2,
                   **options: Any) -> None:  # fmt: skip
    s, weight = messages(shape, gates, maps * images, dtype)
    gate = torch.rand(images, shape[3], shape[4], shape[0], device=DEVICE).to(dtype)
    packed = pack_backward(weight, groups=shape[2], gates=gates)
    (out,) = backward(s, packed, Arrival((End(gate),)), height=shape[3], width=shape[4], **geometry(shape), **options)
    expected = transposed(s, weight, shape, gates) * gate.double().repeat(maps, 1, 1, 1)
    assert out.dtype == dtype
    assert close(out, expected, dtype)


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_backward_shapes(name: str, gates: int) -> None:
    check_backward(SHAPES[name], gates, maps=3 - gates, images=gates, blocks=SMALL)


def test_backward_smallest_and_default_blocks() -> None:
    check_backward(SHAPES["1x3 stride 2"], 1, blocks=SMALLEST)
    check_backward(SHAPES["1x3 stride 2"], 2)


@pytest.mark.parametrize("name", ["1x3 stride 2", "stride 3 leaves rows"])
def test_backward_through_a_zero_guard(name: str) -> None:
    shape = SHAPES[name]
    channels, height, width = shape[0], shape[3], shape[4]
    s, weight = messages(shape, 1, 2)
    gate = torch.randn(2, height, width, channels, device=DEVICE)
    arrival = Arrival((End(gate, part="guarded"),))
    alive, dead = backward(
        s, pack_backward(weight), arrival, height=height, width=width, blocks=SMALL, **geometry(shape)
    )
    acc = transposed(s, weight, shape, 1)
    assert close(alive, acc * gate.double().clamp(min=0))
    lost = acc * (-gate.double()).clamp(min=0)
    assert close(dead, torch.stack([part.sum(-1) for part in lost.split(8, -1)], -1))


def test_groups_that_share_a_guarded_sum_are_refused() -> None:
    s, weight = torch.randn(1, 3, 3, 40), pack_backward(torch.randn(40, 1, 1, 20), groups=2)
    arrival = Arrival((End(torch.randn(1, 3, 3, 40), part="guarded"),))
    with pytest.raises(ValueError, match=r"groups of 20 channels .* multiples of 8"):
        backward(s, weight, arrival, height=3, width=3, stride=(1, 1), padding=(0, 0), groups=2)


@pytest.mark.parametrize(("previous_stride", "part"), [(1, "whole"), (2, "alive"), (2, "dead")])
@pytest.mark.parametrize("name", ["1x3 stride 2", "stride 3 leaves rows"])
def test_backward_arrives_beside_everything_else(name: str, previous_stride: int, part: str) -> None:
    """Two ends, two maps of each of two images; a previous message of every pixel or of every second one."""
    shape = SHAPES[name]
    channels, height, width = shape[0], shape[3], shape[4]
    s, weight = messages(shape, 1, 4)
    small = [-(-size // previous_stride) for size in (height, width)]
    previous = torch.randn(4, *small, channels, device=DEVICE)
    value = torch.rand(2, height, width, channels, device=DEVICE)
    dense = torch.randn(4, height, width, channels, device=DEVICE)
    even = torch.randn(4, height, width, device=DEVICE)
    gate = torch.randn(2, height, width, 2 * channels, device=DEVICE)
    ends = (End(gate, 2, part=part), End(value - 1, part="ratio"))  # type: ignore[arg-type]
    arrival = Arrival(ends, value, previous, previous_stride, dense, even)
    out = backward(s, pack_backward(weight), arrival, height=height, width=width, blocks=SMALL, **geometry(shape))
    acc = transposed(s, weight, shape, 1)
    acc[:, ::previous_stride, ::previous_stride] += previous.double()
    relevance = acc * value.double().repeat(2, 1, 1, 1) + dense.double() + even.double()[..., None]
    parts = {"whole": gate, "alive": gate.clamp(min=0), "dead": (-gate).clamp(min=0)}
    assert close(out[0], relevance.repeat(1, 1, 1, 2) * parts[part].double().repeat(2, 1, 1, 1))
    share = (1 - value.double()) / (2 - value.double())  # value < 1, of which the other branch is 1
    assert close(out[1], relevance * share.repeat(2, 1, 1, 1))


def test_pack_backward_is_the_transpose() -> None:
    weight = torch.randn(2 * 32, 3, 5, 24)  # two gates, two groups of 16 output channels
    packed = pack_backward(weight, groups=2, gates=2)
    assert packed.shape == (48, 3, 5, 2, 16)
    assert packed.is_contiguous()
    for group, gate in itertools.product(range(2), range(2)):
        rows = slice(32 * gate + 16 * group, 32 * gate + 16 * group + 16)
        assert torch.equal(packed[24 * group : 24 * group + 24, :, :, gate], weight[rows].permute(3, 1, 2, 0))
    assert torch.equal(pack_backward(weight, gates=2), weight.permute(3, 1, 2, 0)[:, :, :, None])


# kernel, stride, padding, height, width
STEMS = {
    "ResNet": ((7, 7), (2, 2), (3, 3), 13, 18),
    "CIFAR": ((3, 3), (1, 1), (1, 1), 9, 10),
    "patches": ((4, 4), (4, 4), (0, 0), 12, 11),
    "stride 3": ((5, 3), (3, 3), (2, 1), 14, 10),
    "one axis": ((1, 7), (1, 2), (0, 3), 5, 17),
    "rows unread": ((2, 2), (3, 3), (0, 0), 11, 9),
}


def check_stem(name: str, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    kernel, stride, padding, height, width = STEMS[name]
    shape: Shape = (1, channels, 1, height, width, kernel, stride, padding, (1, 1))
    s, weight = messages(shape, 1, 2, dtype)
    weight = (torch.randn(*kernel, channels, device=DEVICE) + 0.5).to(dtype).float()
    result = stem_heatmap(s, weight, stride=stride, padding=padding, height=height, width=width, **options)
    expected = transposed(s, weight.permute(2, 0, 1)[..., None], shape, 1)[..., 0]
    assert result.dtype == torch.float32
    assert error(result, expected) <= 1e-5  # the sums stay float32 in every dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", STEMS)
def test_stem_heatmap(name: str, dtype: torch.dtype) -> None:
    check_stem(name, 24, dtype, blocks=Blocks(16, 64 if name == "ResNet" else 16, 16, 4, 2))


def test_stem_heatmap_default_blocks() -> None:
    check_stem("ResNet", 40, torch.float16)
    check_stem("CIFAR", 40)


def test_what_is_refused() -> None:
    shape = SHAPES["3x3"]
    x, weight, bias = layer(shape, KINDS["stacked"])
    guard = Denominators("stacked", stabilizer="guard")
    with pytest.raises(ValueError, match="zero-guard"):
        gated(x, weight, bias, guard, relu=True, over_value=True, **geometry(shape))
    with pytest.raises(ValueError, match="zero-guard"):
        merged(x, weight, bias, Branch(x), guard, "ratio", relu=True, is_residual=True, **geometry(shape))
    narrow: Shape = (24, 40, 2, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1))
    x, weight, bias = layer(narrow, KINDS["own"])
    with pytest.raises(ValueError, match="2 groups of 12 input and 20 output channels"):
        gated(x, weight, bias, KINDS["own"], relu=True, over_value=True, **geometry(narrow))
    s, weight = messages(narrow, 1, 2)
    with pytest.raises(ValueError, match="2 groups of 12 input and 20 output channels"):
        backward(s, pack_backward(weight, groups=2), Arrival((End(),)), height=5, width=5, **geometry(narrow))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "stride"), [(56, 64, 1), (56, 128, 2), (14, 256, 1), (7, 512, 1)])
def test_every_candidate_at_real_sizes(size: int, channels: int, stride: int, dtype: torch.dtype) -> None:
    shape: Shape = (channels, channels, 1, size, size, (3, 3), (stride, stride), (1, 1), (1, 1))
    for blocks in candidates(channels, channels, 2, dtype, "ieee"):
        check_gated(shape, KINDS["stacked"], dtype, images=8, blocks=blocks)
    for blocks in candidates(channels, channels, 4, dtype, "ieee"):
        check_merged(shape, KINDS["stacked"], "ratio", linear=True, dtype=dtype, images=8, blocks=blocks)
    for blocks in candidates(channels, channels, 1, dtype, "ieee"):
        check_backward(shape, 1, dtype, maps=2, images=4, blocks=blocks)
    for blocks in stem_candidates(dtype):
        check_stem("ResNet", 64, dtype, blocks=blocks)
