"""The reference's equations against plain loops over all contributions of tiny layers.

A layer's matrix ``w_ij`` (output j, input i) is read off its map of unit vectors; everything after that is Python
numbers, written from what each rule says in words, so that neither convolutions nor term tables can hide an error.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lrp_fast import reference, rules
from lrp_fast.composites import PoolRule
from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    Average,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Linear,
    MaxPool,
    Mean,
    Merge,
)
from lrp_fast.rules import Rule, Stabilizer, ZeroGuard
from lrp_fast.splits import list_splits

Vector = list[float]
BOUND = 1e-12


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value (over one, where nothing is expected)."""
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max()) / (float(expected.abs().max()) or 1.0)


# Layers and rules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A linear layer's shapes; ``kernel`` () means a dense layer."""

    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    extra: tuple[int, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.channels[0], *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels[1], self.channels[0] // self.groups, *self.kernel)

    def layer(self, bias: bool = True, norm: BatchNorm | None = None) -> Linear:
        named = "bias" if bias else None
        if not self.kernel:
            return Dense("weight", named, norm)
        stride, padding, dilation = (
            value if isinstance(value, tuple) else (value,) * len(self.kernel)
            for value in (self.stride, self.padding, self.dilation)
        )
        return Convolution("weight", named, norm, stride, padding, dilation, self.groups, self.extra)


GEOMETRIES = {
    "1d": Geometry((3, 4), (9,), (3,), stride=2, padding=1),
    "1d grouped dilated": Geometry((4, 6), (10,), (3,), padding=2, dilation=2, groups=2),
    "2d": Geometry((2, 3), (5, 4), (3, 3), padding=1),
    "2d strided odd": Geometry((3, 2), (7, 6), (3, 2), stride=(2, 3), padding=(1, 0)),
    "2d grouped dilated": Geometry((4, 4), (6, 5), (2, 2), padding=1, dilation=2, groups=2),
    "2d depthwise": Geometry((3, 6), (5, 5), (3, 3), stride=2, padding=1, groups=3),
    "2d pointwise strided": Geometry((4, 3), (5, 4), (1, 1), stride=2),
    "2d padded at the end": Geometry((4, 4), (5, 4), (4, 2), padding=(1, 0), groups=2, extra=(1, 1)),
    "2d windows in the padding": Geometry((2, 3), (3, 4), (1, 1), padding=1),
    "3d grouped": Geometry((2, 4), (3, 4, 3), (2, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0), groups=2),
    "dense": Geometry((7, 5), ()),
}


def bounds(channels: int, scale: float) -> Vector:
    return [scale * (1 + 0.1 * channel) for channel in range(channels)]


FACTORIES: dict[str, Callable[[int], list[Rule]]] = {
    "Epsilon": lambda channels: [rules.Epsilon(), rules.Epsilon(0.3)],
    "AlphaBeta": lambda channels: [
        rules.AlphaBeta(), rules.AlphaBeta(1.0, 0.0), rules.AlphaBeta(1.5, 0.5, 0.2), rules.AlphaBeta(3, 2)
    ],
    "ZPlus": lambda channels: [rules.ZPlus(), rules.ZPlus(0.1)],
    "Gamma": lambda channels: [rules.Gamma(), rules.Gamma(0.0), rules.Gamma(2, 0.1)],
    "ZBox": lambda channels: [rules.ZBox(-3, 3), rules.ZBox(bounds(channels, -3), bounds(channels, 4), 0.1)],
    "WSquare": lambda channels: [rules.WSquare(), rules.WSquare(0.2)],
    "Flat": lambda channels: [rules.Flat(), rules.Flat(0.5)],
    "PositiveProducts": lambda channels: [
        rules.PositiveProducts(stabilizer, bias, pixels)
        for stabilizer in (Stabilizer(1e-5, signed=False), Stabilizer(0.1), ZeroGuard())
        for bias in ((False,) if isinstance(stabilizer, ZeroGuard) else (True, False))
        for pixels in (True, False)
    ],
}  # fmt: skip
"""Every factory of rules.py, with its rules for a layer of so many input channels."""


def parts_inside(x: Tensor) -> Tensor:
    """Values within every z-box of FACTORIES, with no value near zero to divide by."""
    return x.clamp(-2.5, 2.5)


def random_input(geometry: Geometry, signed: bool, count: int = 2) -> Tensor:
    x = parts_inside(torch.randn(count, *geometry.input_shape, dtype=torch.float64))
    return x if signed else x.relu()


def random_zeros(shape: tuple[int, ...], edge: int) -> Tensor:
    """Places that are zero by structure, bool of shape (1, …): some anywhere, and all along one edge."""
    zeros = torch.rand(1, *shape) < 0.4
    zeros[..., :edge] = True
    return zeros


# The rules in words ---------------------------------------------------------------------------------------------------


def stab(z: float, stabilizer: Stabilizer) -> float:
    if stabilizer.signed:
        return z - stabilizer.epsilon if z < 0 else z + stabilizer.epsilon
    return z + stabilizer.epsilon or stabilizer.epsilon


def in_proportion(c: Vector, bias: float, R: float, stabilizer: Stabilizer) -> Vector:
    """Every input's part of one output's relevance, in proportion to its contribution."""
    z = math.fsum(c) + bias
    return [value / stab(z, stabilizer) * R for value in c]


@dataclass(frozen=True)
class Output:
    """One output of a layer: the inputs, their weights, which are valid in its window, its bias and its relevance."""

    x: Vector
    w: Vector
    inside: list[bool]
    low: Vector
    high: Vector
    bias: float
    R: float

    @property
    def c(self) -> Vector:
        return [x * w for x, w in zip(self.x, self.w, strict=True)]


def epsilon(out: Output, epsilon: float) -> Vector:
    return in_proportion(out.c, out.bias, out.R, Stabilizer(epsilon))


def alpha_beta(out: Output, alpha: float, beta: float, stabilizer: float) -> Vector:
    positive = in_proportion([max(c, 0) for c in out.c], max(out.bias, 0), out.R, Stabilizer(stabilizer))
    negative = in_proportion([min(c, 0) for c in out.c], min(out.bias, 0), out.R, Stabilizer(stabilizer))
    return [alpha * p - beta * n for p, n in zip(positive, negative, strict=True)]


def z_plus(out: Output, stabilizer: float) -> Vector:
    return in_proportion([max(c, 0) for c in out.c], max(out.bias, 0), out.R, Stabilizer(stabilizer))


def gamma(out: Output, gamma: float, stabilizer: float) -> Vector:
    own = math.fsum(out.c) + out.bias
    if own == 0:
        return [0.0] * len(out.c)
    favoured = max if own > 0 else min
    c = [value + gamma * favoured(value, 0) for value in out.c]
    return in_proportion(c, out.bias + gamma * favoured(out.bias, 0), out.R, Stabilizer(stabilizer))


def z_box(out: Output, low: object, high: object, stabilizer: float) -> Vector:
    c = [
        x * w - (below if w > 0 else above) * w
        for x, w, below, above in zip(out.x, out.w, out.low, out.high, strict=True)
    ]
    return in_proportion(c, 0, out.R, Stabilizer(stabilizer))


def w_square(out: Output, stabilizer: float) -> Vector:
    return in_proportion([w * w for w in out.w], out.bias**2, out.R, Stabilizer(stabilizer))


def flat(out: Output, stabilizer: float) -> Vector:
    return in_proportion([float(inside) for inside in out.inside], 0, out.R, Stabilizer(stabilizer))


def positive_contributions(out: Output, pixels: bool) -> Vector:
    seen = out.x if pixels else [float(inside) for inside in out.inside]
    return [max(x, 0) * max(w, 0) for x, w in zip(seen, out.w, strict=True)]


def positive_products(out: Output, stabilizer: Stabilizer, bias: bool, pixels: bool) -> Vector:
    return in_proportion(positive_contributions(out, pixels), out.bias if bias else 0, out.R, stabilizer)


IN_WORDS: dict[str, Callable[..., Vector]] = {
    "epsilon": epsilon,
    "alpha-beta": alpha_beta,
    "z-plus": z_plus,
    "gamma": gamma,
    "z-box": z_box,
    "w-square": w_square,
    "flat": flat,
    "positive-products": positive_products,
}


def zero_guarded(outputs: Sequence[Output], guard: ZeroGuard, pixels: bool) -> list[Vector]:
    """Positive products; where they sum to zero, the same for every valid input of the window."""
    contributions = [positive_contributions(out, pixels) for out in outputs]
    largest = max(map(math.fsum, contributions))
    found = []
    for out, c in zip(outputs, contributions, strict=True):
        z, members = math.fsum(c), sum(out.inside)
        if z > guard.threshold * largest:
            found.append([value / z * out.R for value in c])
        else:
            found.append([out.R / members if inside else 0.0 for inside in out.inside])
    return found


def matrix_of(layer: Linear, shape: tuple[int, ...], weight: Tensor) -> list[Vector]:
    """``w_ij`` as a list of outputs."""
    n = math.prod(shape)
    columns = layer.apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape), weight).flatten(1)
    return columns.t().tolist()


def by_loops(
    layer: Linear, rule: Rule, x: Tensor, R: Tensor, weight: Tensor, bias: Tensor, zeros: Tensor | None = None
) -> Tensor:
    """The relevance of x, output by output and input by input; ``zeros`` are no valid inputs."""
    shape = tuple(x.shape[1:])
    matrix = matrix_of(layer, shape, weight)
    window = matrix_of(layer, shape, torch.ones_like(weight))
    live = [1.0] * math.prod(shape) if zeros is None else (~zeros).double().flatten().tolist()
    per_channel = bias.reshape(-1, *(1,) * (R.ndim - 2)).expand(R.shape[1:]).flatten().tolist()
    low, high = (per_input(rule, name, shape) for name in ("low", "high"))
    images = []
    for image, relevance in zip(x.flatten(1).tolist(), R.flatten(1).tolist(), strict=True):
        outputs = [
            Output(image, w, [bool(v * here) for v, here in zip(inside, live, strict=True)], low, high, b, r)
            for w, inside, b, r in zip(matrix, window, per_channel, relevance, strict=True)
        ]
        guard = dict(rule.parameters).get("stabilizer")
        if isinstance(guard, ZeroGuard):
            parts = zero_guarded(outputs, guard, bool(rule.parameter("pixels")))
        else:
            parts = [IN_WORDS[rule.name](out, **dict(rule.parameters)) for out in outputs]
        images.append([math.fsum(column) for column in zip(*parts, strict=True)])
    return torch.tensor(images, dtype=torch.float64).reshape(x.shape)


def per_input(rule: Rule, name: str, shape: tuple[int, ...]) -> Vector:
    """A z-box bound for every input."""
    values = dict(rule.parameters).get(name, (0.0,))
    assert isinstance(values, tuple)
    return [values[i // math.prod(shape[1:])] if len(values) > 1 else values[0] for i in range(math.prod(shape))]


def pole(rule: Rule, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the rule's denominator vanishes with; ones for a rule without poles."""
    z = layer.apply(x, weight, bias)
    if rule.name == "epsilon":
        return z
    if rule.name == "gamma":  # and its denominator jumps where z changes its sign
        raising = layer.apply(x.relu(), weight.relu(), bias.relu()) + layer.apply(x.clamp(max=0), weight.clamp(max=0))
        gamma = rule.parameter("gamma")
        assert isinstance(gamma, (int, float))
        return z * (z + gamma * torch.where(z > 0, raising, z - raising))
    if rule.name == "positive-products" and rule.parameter("bias"):
        return layer.apply(x.relu() if rule.parameter("pixels") else torch.ones_like(x), weight.relu(), bias)
    return torch.ones_like(z)


def random_factor(like: Tensor) -> Tensor:
    """Numbers of both signs in float64, none near zero."""
    return (torch.rand(like.shape, dtype=torch.float64) + 0.1) * (torch.randint(0, 2, like.shape) * 2 - 1)


def without_poles(rule: Rule, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Relevance as a ReLU network sends it: in proportion to what the rule divides by, where that may vanish."""
    z = pole(rule, layer, x, weight, bias)
    return z * random_factor(z)


def test_every_rule_has_an_equation_and_is_tested() -> None:
    written_there = {
        name for name, value in inspect.getmembers(rules, inspect.isfunction) if value.__module__ == rules.__name__
    }
    assert set(FACTORIES) == {name for name in written_there if not name.startswith("_")}
    names = {rule.name for make in FACTORIES.values() for rule in make(3)}
    assert names == set(reference.EQUATIONS) == set(IN_WORDS)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rule_is_its_definition(name: str, factory: str) -> None:
    geometry = GEOMETRIES[name]
    layer = geometry.layer()
    for rule, signed in itertools.product(FACTORIES[factory](geometry.channels[0]), (True, False)):
        weight = torch.randn(geometry.weight_shape, dtype=torch.float64)
        bias = torch.randn(geometry.channels[1], dtype=torch.float64)
        if isinstance(rule.stabilizer, ZeroGuard) and name == "2d windows in the padding":
            continue  # nobody to give dead relevance to: its own test below
        x = random_input(geometry, signed)
        R = without_poles(rule, layer, x, weight, bias)
        shares = reference.share_linear(layer, rule, x, R, weight, bias)
        assert relative_error(shares.inputs[0], by_loops(layer, rule, x, R, weight, bias)) <= BOUND, f"{rule}"


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if "padding" not in name])
def test_zero_guard_spreads_dead_outputs_over_their_window(name: str, pixels: bool) -> None:
    geometry = GEOMETRIES[name]
    layer, rule = geometry.layer(), rules.PositiveProducts(ZeroGuard(), bias=False, pixels=pixels)
    weight = torch.randn(geometry.weight_shape, dtype=torch.float64)
    weight[0] = -weight[0].abs()  # a channel no input adds to
    bias = torch.randn(geometry.channels[1], dtype=torch.float64)
    x = random_input(geometry, signed=False, count=3)
    x[0] = 0.0
    x[1, : geometry.channels[0] // 2 + 1] = 0.0
    R = torch.randn_like(layer.apply(x, weight))
    shares = reference.share_linear(layer, rule, x, R, weight, bias)
    assert relative_error(shares.inputs[0], by_loops(layer, rule, x, R, weight, bias)) <= BOUND
    assert relative_error(reference.per_image(shares.inputs[0]), reference.per_image(R)) <= BOUND


def test_zero_guard_loses_what_has_no_window_and_says_so() -> None:
    geometry = GEOMETRIES["2d windows in the padding"]
    layer, rule = geometry.layer(), rules.PositiveProducts(ZeroGuard(), bias=False)
    weight, bias = torch.rand(geometry.weight_shape, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    x = torch.rand(2, *geometry.input_shape, dtype=torch.float64)
    R = torch.randn_like(layer.apply(x, weight))
    shares = reference.share_linear(layer, rule, x, R, weight, bias)
    inner = R[:, :, 1:-1, 1:-1]
    expected = x * torch.einsum("noyx,oi->niyx", inner / layer.apply(x, weight)[:, :, 1:-1, 1:-1], weight[..., 0, 0])
    assert relative_error(shares.inputs[0], expected) <= BOUND
    assert relative_error(shares.lost["constants"], (R.flatten(1).sum(1) - inner.flatten(1).sum(1))) <= BOUND


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_zero_guard_gives_nothing_to_structural_zeros(name: str, pixels: bool) -> None:
    geometry = GEOMETRIES[name]
    layer, rule = geometry.layer(), rules.PositiveProducts(ZeroGuard(), bias=False, pixels=pixels)
    weight = torch.randn(geometry.weight_shape, dtype=torch.float64)
    weight[0] = -weight[0].abs()  # a channel no input adds to
    bias = torch.randn(geometry.channels[1], dtype=torch.float64)
    zeros = random_zeros(geometry.input_shape, edge=2)
    x = random_input(geometry, signed=False).masked_fill(zeros, 0.0)
    R = torch.randn_like(layer.apply(x, weight))
    shares = reference.share_linear(layer, rule, x, R, weight, bias, zeros)
    assert relative_error(shares.inputs[0], by_loops(layer, rule, x, R, weight, bias, zeros)) <= BOUND
    assert not bool(shares.inputs[0].masked_select(zeros).any())
    reached = layer.apply((~zeros).double(), torch.ones_like(weight)) != 0
    assert relative_error(shares.lost["constants"], reference.per_image(R * ~reached)) <= BOUND
    missing = reference.per_image(R) - reference.per_image(shares.inputs[0]) - sum(shares.lost.values())
    assert float(missing.abs().max()) <= BOUND * float(R.abs().sum())


def test_gamma_sends_nothing_through_an_output_of_zero() -> None:
    layer, rule = Dense("weight", None, None), rules.Gamma()
    weight = torch.randn(3, 4, dtype=torch.float64)
    weight[1] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    x, R = torch.ones(1, 4, dtype=torch.float64), torch.rand(1, 3, dtype=torch.float64)
    shares = reference.share_linear(layer, rule, x, R, weight, torch.zeros(3, dtype=torch.float64))
    assert relative_error(shares.lost["dead windows"], R[:, 1]) <= BOUND


def test_an_unknown_rule_is_an_error_that_lists_the_known() -> None:
    layer = Dense("weight", None, None)
    rule = Rule("nonsense", (), (), Stabilizer(1e-6))
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"nonsense.*epsilon.*positive-products"):
        reference.share_linear(layer, rule, one, one, one, one[0])


def test_bounds_of_the_wrong_number_of_channels_are_an_error() -> None:
    layer, x = Dense("weight", None, None), torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="3 values for 'low' but the layer has 2 input channels"):
        reference.share_linear(layer, rules.ZBox(), x, x, torch.ones(2, 2, dtype=torch.float64), x[0])


def norm_with(channels: int, affine: bool) -> tuple[BatchNorm, dict[str, Tensor]]:
    """A batch norm of random statistics and weights of both signs."""
    values = {"mean": torch.randn(channels), "variance": torch.rand(channels) + 0.2}
    values |= {"gamma": torch.randn(channels), "beta": torch.randn(channels)} if affine else {}
    norm = BatchNorm("mean", "variance", "gamma" if affine else None, "beta" if affine else None, 1e-5)
    return norm, {name: value.double() for name, value in values.items()}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_weights_are_those_of_convolution_and_batch_norm(name: str, bias: bool, affine: bool) -> None:
    geometry = GEOMETRIES[name]
    norm, parameters = norm_with(geometry.channels[1], affine)
    layer = geometry.layer(bias, norm)
    parameters |= {"weight": torch.randn(geometry.weight_shape, dtype=torch.float64)}
    parameters |= {"bias": torch.randn(geometry.channels[1], dtype=torch.float64)} if bias else {}
    x = random_input(geometry, signed=True)
    raw = layer.apply(x, parameters["weight"], parameters.get("bias"))
    normed = nn.functional.batch_norm(
        raw, parameters["mean"], parameters["variance"], parameters.get("gamma"), parameters.get("beta"), eps=1e-5
    )
    assert relative_error(layer.apply(x, *reference.weights(layer, parameters, "fold")), normed) <= BOUND
    assert relative_error(layer.apply(x, *reference.weights(layer, parameters, "pass")), raw) <= BOUND


# Pools ----------------------------------------------------------------------------------------------------------------

Pool = MaxPool | AdaptiveMaxPool | Average
POOLS: dict[str, tuple[Pool, tuple[int, ...]]] = {
    "max 1d": (MaxPool((3,), (2,), (1,), (1,), False), (9,)),
    "max 2d even": (MaxPool((2, 2), (2, 2), (0, 0), (1, 1), False), (6, 4)),
    "max 2d odd": (MaxPool((2, 2), (2, 2), (0, 0), (1, 1), False), (7, 5)),
    "max 2d resnet": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1), False), (7, 6)),
    "max 2d ceil": (MaxPool((3, 2), (2, 2), (0, 0), (1, 1), True), (6, 5)),
    "max 2d empty blocks": (MaxPool((2, 2), (2, 2), (1, 1), (1, 1), False), (4, 5)),
    "max 2d dilated": (MaxPool((2, 3), (2, 1), (1, 1), (2, 1), False), (7, 5)),
    "max 3d": (MaxPool((2, 2, 3), (2, 1, 2), (0, 1, 1), (1, 1, 1), False), (4, 3, 5)),
    "adaptive max 1d": (AdaptiveMaxPool((4,)), (7,)),
    "adaptive max 2d": (AdaptiveMaxPool((3, None)), (7, 4)),
    "adaptive max 3d": (AdaptiveMaxPool((1, 2, 3)), (3, 4, 4)),
    "average 1d": (AveragePool((3,), (2,), (1,), False, True, None), (8,)),
    "average 2d tiles": (AveragePool((2, 3), (2, 3), (0, 0), False, True, None), (6, 6)),
    "average 2d padding counted": (AveragePool((3, 3), (2, 2), (1, 1), False, True, None), (7, 6)),
    "average 2d padding not counted": (AveragePool((3, 3), (2, 2), (1, 1), False, False, None), (7, 6)),
    "average 2d ceil counted": (AveragePool((3, 2), (2, 2), (1, 1), True, True, None), (6, 5)),
    "average 2d ceil not counted": (AveragePool((2, 2), (2, 2), (0, 0), True, False, None), (5, 7)),
    "average 2d divisor": (AveragePool((3, 2), (2, 1), (1, 0), False, True, 5), (6, 5)),
    "average 3d": (AveragePool((2, 2, 2), (2, 1, 2), (0, 1, 0), False, False, None), (4, 3, 5)),
    "adaptive average 1d": (AdaptiveAveragePool((3,)), (7,)),
    "adaptive average 2d": (AdaptiveAveragePool((3, None)), (7, 4)),
    "adaptive average 2d upsampling": (AdaptiveAveragePool((5, 3)), (4, 3)),
    "adaptive average 3d": (AdaptiveAveragePool((1, 2, 3)), (3, 4, 4)),
    "mean 2d": (Mean((2, 3), False), (4, 5)),
    "mean 2d kept": (Mean((-1, -2), True), (4, 5)),
    "mean one axis": (Mean((2,), False), (4, 5)),
}

Member = tuple[tuple[int, ...], float]
Share = Callable[[Vector, Vector, float, float], Vector]


def axis_windows(layer: object, axis: int, n: int, m: int) -> list[list[tuple[int, float]]]:
    """The positions that each of m outputs reads along one axis, and their weights in a mean (for max-pools: 1)."""
    if isinstance(layer, (AdaptiveAveragePool, AdaptiveMaxPool)):
        spans = [range(o * n // m, math.ceil((o + 1) * n / m)) for o in range(m)]
        return [[(i, 1 / len(span)) for i in span] for span in spans]
    if isinstance(layer, Mean):
        gone = axis + 2 in layer.dimensions or axis - 2 in layer.dimensions
        return [[(i, 1 / n) for i in range(n)]] if gone else [[(i, 1.0)] for i in range(n)]
    if isinstance(layer, MaxPool):
        k, s, p, d = (values[axis] for values in (layer.kernel, layer.stride, layer.padding, layer.dilation))
        return [[(i, 1.0) for i in range(o * s - p, o * s - p + k * d, d) if 0 <= i < n] for o in range(m)]
    assert isinstance(layer, AveragePool)
    k, s, p = (values[axis] for values in (layer.kernel, layer.stride, layer.padding))
    found = []
    for o in range(m):
        valid = [i for i in range(o * s - p, o * s - p + k) if 0 <= i < n]
        reach = min(o * s - p + k, n + p) - (o * s - p)
        divisor = 1 if layer.divisor else reach if layer.count_include_pad else len(valid)
        found.append([(i, 1 / divisor) for i in valid])
    return found


def pool_windows(layer: object, size: tuple[int, ...], outputs: tuple[int, ...]) -> list[list[Member]]:
    """For each output, in order, the positions it reads and their weights."""
    axes = [axis_windows(layer, axis, n, m) for axis, (n, m) in enumerate(zip(size, outputs, strict=True))]
    divisor = getattr(layer, "divisor", None) or 1
    return [
        [
            (tuple(i for i, _ in members), math.prod(weight for _, weight in members) / divisor)
            for members in itertools.product(*chosen)
        ]
        for chosen in itertools.product(*axes)
    ]


def block_windows(
    layer: object, size: tuple[int, ...], outputs: tuple[int, ...], zeros: Tensor | None = None
) -> list[list[Member]]:
    """For each output of a max-pool, the block it answers for: stride by stride, else its own window.

    ``zeros`` (bool, of that size) are members of neither.
    """
    own = pool_windows(layer, size, outputs)
    found = []
    for place, window in zip(itertools.product(*map(range, outputs)), own, strict=True):
        members = valid([position for position, _ in window], zeros)
        if isinstance(layer, MaxPool):
            spans = [range(o * s, min((o + 1) * s, n)) for o, s, n in zip(place, layer.stride, size, strict=True)]
            members = valid(itertools.product(*spans), zeros) or members
        found.append([(position, 1 / len(members)) for position in members])
    return found


def valid(positions: Iterable[tuple[int, ...]], zeros: Tensor | None) -> list[tuple[int, ...]]:
    return [position for position in positions if zeros is None or not bool(zeros[position])]


def outputs_of(layer: Pool, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A pool's output, and its lengths with the axes that a mean drops kept as 1."""
    y = layer.forward((x,), {})
    if isinstance(layer, Mean) and not layer.keepdim:
        return y, tuple(Mean(layer.dimensions, True).forward((x,), {}).shape[2:])
    return y, tuple(y.shape[2:])


def means(windows: list[list[Member]], x: Tensor) -> Tensor:
    """N × C × outputs: the weighted sums over the windows."""
    sums = [
        [[math.fsum(w * float(plane[p]) for p, w in window) for window in windows] for plane in image] for image in x
    ]
    return torch.tensor(sums, dtype=torch.float64)


def share_by_loops(windows: list[list[Member]], x: Tensor, R: Tensor, share: Share) -> Tensor:
    """Hand each output's relevance to its window as ``share(values, weights, relevance, largest z)`` says."""
    r = torch.zeros_like(x)
    flat = R.reshape(*R.shape[:2], -1)
    largest = means(windows, x.relu()).flatten(1).amax(1).tolist()
    for image in range(x.shape[0]):
        for channel, (place, window) in itertools.product(range(x.shape[1]), enumerate(windows)):
            values = [float(x[image, channel][position]) for position, _ in window]
            parts = share(values, [weight for _, weight in window], float(flat[image, channel, place]), largest[image])
            for (position, _), part in zip(window, parts, strict=True):
                r[(image, channel, *position)] += part
    return r


def to_winner(values: Vector, weights: Vector, R: float, largest: float) -> Vector:
    winner = values.index(max(values))
    return [R if i == winner else 0.0 for i in range(len(values))]


def pool_in_proportion(stabilizer: Stabilizer) -> Share:
    def share(values: Vector, weights: Vector, R: float, largest: float) -> Vector:
        values = values if stabilizer.signed else [max(value, 0.0) for value in values]
        return in_proportion([v * w for v, w in zip(values, weights, strict=True)], 0.0, R, stabilizer)

    return share


def pool_guarded(guard: ZeroGuard) -> Share:
    def share(values: Vector, weights: Vector, R: float, largest: float) -> Vector:
        c = [max(v, 0.0) * w for v, w in zip(values, weights, strict=True)]
        if math.fsum(c) <= guard.threshold * largest:
            return [R / max(len(c), 1)] * len(c)
        return [value / math.fsum(c) * R for value in c]

    return share


def pool_rules(layer: object) -> list[tuple[PoolRule, bool]]:
    """The pool rules a layer can have, and whether each is answered over blocks."""
    stabilizers = (Stabilizer(1e-6), Stabilizer(1e-5, signed=False), Stabilizer(0.3, signed=False), ZeroGuard())
    if isinstance(layer, Average):
        return [(PoolRule("proportional", stabilizer), False) for stabilizer in stabilizers]
    return [(PoolRule("winner"), False), *((PoolRule("blocks", stabilizer), True) for stabilizer in stabilizers)]


def pool_input(size: tuple[int, ...], signed: bool) -> Tensor:
    """Two images of two channels, one with a dead region."""
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    if signed:
        return x
    x = x.relu()
    x[0, 1] = 0.0
    return x


@pytest.mark.parametrize("name", POOLS)
def test_pool_is_its_definition(name: str) -> None:
    layer, size = POOLS[name]
    for (rule, over_blocks), signed in itertools.product(pool_rules(layer), (True, False)):
        x = pool_input(size, signed)
        y, outputs = outputs_of(layer, x)
        windows = (block_windows if over_blocks else pool_windows)(layer, size, outputs)
        R = torch.randn_like(y)
        share: Share
        if rule.kind == "winner":
            share = to_winner
        elif isinstance(rule.stabilizer, ZeroGuard):
            share = pool_guarded(rule.stabilizer)
        else:
            assert rule.stabilizer is not None
            share = pool_in_proportion(rule.stabilizer)
            R = R * means(windows, x).reshape(y.shape) if rule.stabilizer.signed else R  # no poles
        got = reference.share_pool(layer, rule, x, R).inputs[0]
        assert relative_error(got, share_by_loops(windows, x, R, share)) <= BOUND, f"{rule.stabilizer}"


@pytest.mark.parametrize("name", POOLS)
def test_guarded_pool_gives_nothing_to_structural_zeros(name: str) -> None:
    layer, size = POOLS[name]
    rule = next(rule for rule, _ in pool_rules(layer) if isinstance(rule.stabilizer, ZeroGuard))
    assert isinstance(rule.stabilizer, ZeroGuard)
    zeros = random_zeros((2, *size), edge=2)
    zeros[:, 1] = True
    x = torch.randn(2, 2, *size, dtype=torch.float64).masked_fill(zeros, 0.0)
    x[1, 0] = 0.0
    y, outputs = outputs_of(layer, x)
    if isinstance(layer, Average):
        own = pool_windows(layer, size, outputs)
        windows = [[member for member in window if valid([member[0]], zeros[0, 0])] for window in own]
    else:
        windows = block_windows(layer, size, outputs, zeros[0, 0])
    R = torch.randn_like(y)
    shares = reference.share_pool(layer, rule, x, R, zeros)
    expected = share_by_loops(windows, x, R, pool_guarded(rule.stabilizer)).masked_fill(zeros, 0.0)
    assert relative_error(shares.inputs[0], expected) <= BOUND
    missing = reference.per_image(R) - reference.per_image(shares.inputs[0])
    assert relative_error(shares.lost["constants"], missing) <= BOUND


@pytest.mark.parametrize("name", [name for name, (layer, _) in POOLS.items() if isinstance(layer, Average)])
def test_average_windows_are_the_pools_own(name: str) -> None:
    layer, size = POOLS[name]
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    y, outputs = outputs_of(layer, x)
    assert relative_error(means(pool_windows(layer, size, outputs), x).reshape(y.shape), y) <= BOUND


def test_blocks_are_empty_somewhere_in_the_table() -> None:
    layer, size = POOLS["max 2d empty blocks"]
    _, outputs = outputs_of(layer, torch.rand(1, 1, *size))
    assert isinstance(layer, MaxPool)
    assert (outputs[0] - 1) * layer.stride[0] >= size[0]


def test_an_average_has_no_winner() -> None:
    layer, size = POOLS["average 1d"]
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    with pytest.raises(ValueError, match="no winner"):
        reference.share_pool(layer, PoolRule("winner"), x, layer.forward((x,), {}))


# Merges ---------------------------------------------------------------------------------------------------------------


def weights_in_words(split: str, F: float, S: float) -> tuple[float, float]:
    if split == "ratio":
        return (0.5, 0.5) if F == S == 0 else (abs(F) / (abs(F) + abs(S)), abs(S) / (abs(F) + abs(S)))
    if split == "signed":
        total = F + S
        total = total - 1e-6 if total < 0 else total + 1e-6
        return F / total, S / total
    return {"symmetric": (0.5, 0.5), "residual-only": (1.0, 0.0)}[split]


def merge_branches() -> tuple[Tensor, Tensor]:
    """Branches with every pairing of a value and zero."""
    F, S = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    F[:, 0, :2] = 0.0
    S[:, 0, 1:] = 0.0
    S[:, 1, 2] = -F[:, 1, 2]
    return F, S


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("constant", [None, "residual", "skip"])
@pytest.mark.parametrize("split", reference.SPLIT_EQUATIONS)
def test_split_is_its_definition(split: str, constant: str | None, skip: int) -> None:
    F, S = merge_branches()
    zeros: list[Tensor | None] = [None, None]
    if constant is not None:
        mask = torch.rand(1, *F.shape[1:]) < 0.4
        (S if constant == "skip" else F).masked_fill_(mask, 0.0)
        zeros[skip if constant == "skip" else 1 - skip] = mask
    R = torch.randn_like(F)
    branches = [S, F] if skip == 0 else [F, S]
    shares = reference.share_merge(Merge(skip, "identity", False), split, branches, R, zeros)
    expected = torch.zeros(2, *F.shape, dtype=torch.float64)
    for place in itertools.product(*map(range, F.shape)):
        to_F, to_S = weights_in_words(split, float(F[place]), float(S[place]))
        if constant is not None and split != "signed" and bool(mask[(0, *place[1:])]):
            to_F, to_S = (1.0, 0.0) if constant == "skip" else (0.0, 1.0)
        expected[(1 - skip, *place)], expected[(skip, *place)] = to_F * R[place], to_S * R[place]
    assert relative_error(torch.stack(shares.inputs), expected) <= BOUND


def test_every_split_has_an_equation() -> None:
    assert set(reference.SPLIT_EQUATIONS) == set(list_splits())


def test_an_unknown_split_is_an_error_that_lists_the_known() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"nonsense.*ratio.*signed"):
        reference.share_merge(Merge(1, "identity", False), "nonsense", [one, one], one)


# What is lost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_a_rule_loses_is_accounted_for(name: str, factory: str) -> None:
    geometry = GEOMETRIES[name]
    layer = geometry.layer()
    for rule in FACTORIES[factory](geometry.channels[0]):
        weight = torch.randn(geometry.weight_shape, dtype=torch.float64)
        weight[0] = -weight[0].abs()
        bias = torch.randn(geometry.channels[1], dtype=torch.float64)
        x = random_input(geometry, signed=False)
        R = without_poles(rule, layer, x, weight, bias)
        shares = reference.share_linear(layer, rule, x, R, weight, bias)
        missing = reference.per_image(R) - reference.per_image(shares.inputs[0]) - sum(shares.lost.values())
        assert float(missing.abs().max()) <= BOUND * float(R.abs().sum()), f"{rule}"


@pytest.mark.parametrize("split", reference.SPLIT_EQUATIONS)
def test_what_a_split_loses_is_accounted_for(split: str) -> None:
    F, S = merge_branches()
    R = torch.rand_like(F)
    shares = reference.share_merge(Merge(1, "identity", False), split, [F, S], R)
    passed = reference.per_image(shares.inputs[0] + shares.inputs[1])
    lost = sum(shares.lost.values(), torch.zeros_like(passed))
    size = float(sum(share.abs().sum() for share in shares.inputs))
    assert float((reference.per_image(R) - passed - lost).abs().max()) <= BOUND * size
    assert bool(shares.lost) == (split == "signed")
