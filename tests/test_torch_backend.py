"""The torch backend against the reference: every rule, split and pool on random layers, then whole tiny networks.

The tables of layers and rules are those of ``test_reference.py``, where the reference meets the definitions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from test_reference import (
    FACTORIES,
    GEOMETRIES,
    POOLS,
    Geometry,
    Pool,
    merge_branches,
    norm_with,
    outputs_of,
    pole,
    pool_input,
    pool_rules,
    random_factor,
    random_input,
    random_zeros,
    relative_error,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrp_fast import LRP, Composite, list_composites, reference, rules
from lrp_fast.backends.passes import times, times_plus
from lrp_fast.backends.torch import (
    AverageMap,
    BlockMap,
    Gates,
    LinearOperation,
    MergeOperation,
    Message,
    ProportionalPool,
    WinnerPool,
    move_back,
    transposed_convolution,
)
from lrp_fast.backends.torch.gates import guarded
from lrp_fast.composites import PoolRule
from lrp_fast.layers import (
    Average,
    Convolution,
    Input,
    Layer,
    Linear,
    MaxPool,
    Mean,
    Merge,
    Pad,
    Parameters,
    Reshape,
    Slice,
)
from lrp_fast.plan import Plan, Step
from lrp_fast.rules import Part, Rule, Stabilizer, ZeroGuard
from lrp_fast.splits import get_split, list_splits
from networks import CifarResNet, calibrated

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
PRECISIONS = list(BOUNDS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated without a value holds NaN."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    memory.fill_uninitialized_memory = before[1]


def total(message: Message, x: Tensor) -> Tensor:
    """The relevance that a message stands for."""
    acc, dense = message
    if acc is None:
        assert dense is not None
        return dense
    return times(acc, x) if dense is None else times_plus(acc, x, dense)


# Linear layers --------------------------------------------------------------------------------------------------------


def layer_with(geometry: Geometry, bias: bool, normed: bool) -> tuple[Linear, dict[str, Tensor]]:
    """A layer and its parameters, representable in float32, with an output channel no input adds to."""
    norm, parameters = norm_with(geometry.channels[1], affine=True) if normed else (None, {})
    weight = torch.randn(geometry.weight_shape)
    weight[0] = -weight[0].abs()
    parameters = {name: value.float() for name, value in parameters.items()} | {"weight": weight}
    if bias:
        parameters["bias"] = torch.randn(geometry.channels[1])
    return geometry.layer(bias, norm), parameters


def double(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in parameters.items()}


def own_pole(rule: Rule, z: list[Tensor], output: Tensor | None, value: Tensor) -> Tensor:
    """``pole``, as the operation itself computed it: what the layer behind would send is in proportion to that."""
    if rule.name == "epsilon" or (rule.name == "positive-products" and rule.parameter("bias")):
        return z[0].expand_as(value)
    if rule.name == "gamma":
        assert output is not None
        return output * torch.where(output > 0, z[0], z[1])
    return torch.ones_like(value)


def ways(operation: LinearOperation, x: Tensor, outputs: tuple[int, ...]) -> list[LinearOperation]:
    """The operation as it is and, where there are such, with packed weights, for ``x`` and its outputs' shape."""
    packed = operation.placed(tuple(x.shape), outputs, relu=False, pack=True)
    return [operation] if packed.packed is None else [operation, packed]


CASES = [  # (signed input, input known to be non-negative, bias, batch norm)
    (True, False, True, None),
    (False, True, True, "fold"),
    (False, True, False, "pass"),
    (False, False, True, "pass"),
    (True, False, False, "fold"),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rule_is_the_references(name: str, factory: str, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES[name]
    for rule, (signed, nonnegative, bias, norm) in itertools.product(FACTORIES[factory](geometry.channels[0]), CASES):
        layer, parameters = layer_with(geometry, bias, norm is not None)
        x = random_input(geometry, signed).float()
        x[0, : geometry.channels[0] // 2] = 0.0
        weights = reference.weights(layer, double(parameters), norm or "fold")
        wanted = pole(rule, layer, x.double(), *weights)
        factor = random_factor(wanted)
        expected = reference.share_linear(layer, rule, x.double(), wanted * factor, *weights).inputs[0]

        whole = LinearOperation(layer, rule, norm != "pass", parameters, nonnegative, dtype, "layer")
        for operation in ways(whole, x, tuple(factor.shape)):
            value, z, output = operation.forward(x.to(dtype))
            stabilized = operation.packed is not None and operation.packed.stabilized
            poles = [one - rule.stabilizer.epsilon for one in z] if stabilized else z
            R = (own_pole(rule, poles, output, value) * factor).to(dtype)
            gates = operation.gates(z, output, 1.0)
            r = total(operation.backward(R, gates, x.to(dtype), geometry.input_shape), x.to(dtype))
            case = f"{rule} {signed=} {nonnegative=} {bias=} {norm=} packed={operation.packed is not None}"
            assert relative_error(r, expected) <= BOUNDS[dtype], case
            assert relative_error(value, layer.forward((x.double(),), double(parameters))) <= BOUNDS[dtype], case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factory", FACTORIES)
def test_weights_are_rounded_once(factory: str, dtype: torch.dtype) -> None:
    """To the bit what their float64 product with the batch norm, its part and its coefficient are rounded to."""
    geometry = GEOMETRIES["2d"]
    for rule in FACTORIES[factory](geometry.channels[0]):
        layer, parameters = layer_with(geometry, True, normed=True)
        operation = LinearOperation(layer, rule, True, parameters, False, dtype, "layer")
        exact, _ = layer.folded(double(parameters))
        terms = {(term, 1.0) for term in operation.evaluated}
        terms |= {(term, factor) for sent in operation.sent.values() for _, term, factor in sent}
        for term, factor in terms:
            if isinstance(term.weight, Part):
                part = exact.clamp(min=0) * term.weight.positive + exact.clamp(max=0) * term.weight.negative
            else:
                part = exact.square() if term.weight == "square" else torch.ones_like(exact)
            assert torch.equal(operation.rounded(term, factor), (part * factor).to(dtype)), (rule, term, factor)


@pytest.mark.parametrize("composite", list_composites())
def test_a_batch_norm_is_folded_once(monkeypatch: pytest.MonkeyPatch, composite: str) -> None:
    model, images, folded = CifarResNet(1).eval(), torch.randn(1, 3, 16, 16), Linear.folded
    calls: list[str] = []

    def counted(layer: Linear, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        calls.append(layer.weight)
        return folded(layer, parameters)

    monkeypatch.setattr(Linear, "folded", counted)
    convolutions = sorted(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    for dtype in (torch.float32, torch.float64):  # on a CPU with packed weights and without
        calls.clear()
        LRP(model, composite, dtype=dtype).attribute(images)
        assert sorted(calls) == convolutions


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", ["1d grouped dilated", "2d strided odd", "3d grouped", "dense"])
def test_gates_carry_a_numerator_and_several_maps(name: str, factory: str) -> None:
    """``gates(numerator) = numerator · gates(1)``, and maps in front of the batch are what each is alone."""
    geometry = GEOMETRIES[name]
    for rule in FACTORIES[factory](geometry.channels[0]):
        layer, parameters = layer_with(geometry, bias=True, normed=False)
        x = random_input(geometry, signed=True, count=3)
        operation = LinearOperation(layer, rule, True, parameters, False, torch.float64, "layer")
        value, z, output = operation.forward(x)
        numerator = torch.rand_like(value)
        gates = operation.gates(z, output, numerator)
        R = torch.rand(2, *value.shape, dtype=torch.float64)
        alone = [
            total(operation.backward(one * numerator, operation.gates(z, output, 1.0), x, geometry.input_shape), x)
            for one in R
        ]
        together = total(operation.backward(R.flatten(0, 1), gates, x, geometry.input_shape), x)
        assert relative_error(together.unflatten(0, (2, 3)), torch.stack(alone)) <= 1e-12, f"{rule}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_channel_sums_where_an_operation_offers_them(name: str) -> None:
    geometry = GEOMETRIES[name]
    offering = set()
    for rule in itertools.chain(*(make(geometry.channels[0]) for make in FACTORIES.values())):
        layer, parameters = layer_with(geometry, bias=True, normed=False)
        operation = LinearOperation(layer, rule, True, parameters, False, torch.float64, "layer")
        if not operation.sums_channels:
            continue
        offering.add(rule.name)
        x = random_input(geometry, signed=True)
        value, z, output = operation.forward(x)
        gates, R = operation.gates(z, output, 1.0), torch.rand_like(value)
        whole, summed = (
            total(operation.backward(R, gates, x, geometry.input_shape, heatmap), x) for heatmap in (False, True)
        )
        assert summed.shape[1] == 1
        assert relative_error(summed, whole.sum(1, keepdim=True)) <= 1e-12, f"{rule}"
    wanted = {"w-square", "flat", "positive-products"} if geometry.groups == 1 and geometry.kernel else set()
    assert offering == wanted


@pytest.mark.parametrize("rule", [rules.ZPlus(), *FACTORIES["PositiveProducts"](4)], ids=str)
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if "padding" not in name])
def test_bfloat16_convolutions_keep_two_digits(name: str, rule: Rule) -> None:
    """Without a bias, so that nothing cancels."""
    geometry = GEOMETRIES[name]
    layer, parameters = layer_with(geometry, bias=False, normed=False)
    parameters["weight"] = parameters["weight"].bfloat16().float()
    x = random_input(geometry, signed=False).bfloat16()
    weights = reference.weights(layer, double(parameters), "fold")
    R = torch.rand_like(layer.apply(x, parameters["weight"].bfloat16()))
    expected = reference.share_linear(layer, rule, x.double(), R.double(), *weights).inputs[0]
    whole = LinearOperation(layer, rule, True, parameters, True, torch.bfloat16, "layer")
    for operation in ways(whole, x, tuple(R.shape)):
        _, z, output = operation.forward(x)
        r = total(operation.backward(R, operation.gates(z, output, 1.0), x, geometry.input_shape), x)
        assert float((r.double() - expected).norm() / expected.norm()) <= 2e-2


@pytest.mark.parametrize("x", ["zeros", "ones"])
def test_no_denominator_gives_a_nan(x: str) -> None:
    """All-zero inputs, weights and biases under every rule: finite, and under a zero-guard nothing is lost."""
    geometry = GEOMETRIES["2d grouped dilated"]
    inputs = torch.full((2, *geometry.input_shape), float(x == "ones"))
    for rule in itertools.chain(*(make(geometry.channels[0]) for make in FACTORIES.values())):
        layer = geometry.layer(bias=True)
        parameters = {"weight": torch.zeros(geometry.weight_shape), "bias": torch.zeros(geometry.channels[1])}
        whole = LinearOperation(layer, rule, True, parameters, True, torch.float32, "layer")
        R = torch.rand_like(whole.forward(inputs)[0])
        for operation in ways(whole, inputs, tuple(R.shape)):
            _, z, output = operation.forward(inputs)
            r = total(operation.backward(R, operation.gates(z, output, 1.0), inputs, geometry.input_shape), inputs)
            assert bool(r.isfinite().all()), f"{rule}"
            if isinstance(rule.stabilizer, ZeroGuard):
                assert relative_error(r.flatten(1).sum(1), R.flatten(1).sum(1)) <= 1e-5


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_structural_zeros_are_no_valid_inputs(name: str, pixels: bool, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES[name]
    rule = rules.PositiveProducts(ZeroGuard(), bias=False, pixels=pixels)
    layer, parameters = layer_with(geometry, bias=True, normed=False)
    zeros = random_zeros(geometry.input_shape, edge=2)
    x = random_input(geometry, signed=False).masked_fill(zeros, 0.0).to(dtype)
    weights = reference.weights(layer, double(parameters), "fold")
    whole = LinearOperation(layer, rule, True, parameters, True, dtype, "layer")
    operation = whole.without(zeros)
    value, z, output = operation.forward(x)
    R = torch.randn_like(value)
    expected = reference.share_linear(layer, rule, x.double(), R.double(), *weights, zeros).inputs[0]
    assert not operation.sums_channels
    gates = operation.gates(z, output, 1.0)
    r = total(operation.backward(torch.cat([R, 2 * R]), gates, x, geometry.input_shape), x).unflatten(0, (2, 2))
    assert relative_error(r[0], expected) <= BOUNDS[dtype]
    assert relative_error(r[1], 2 * expected) <= BOUNDS[dtype]

    value, z, output = whole.forward(x)  # the operation it was made from knows nothing of them
    got = total(whole.backward(R, whole.gates(z, output, 1.0), x, geometry.input_shape), x)
    expected = reference.share_linear(layer, rule, x.double(), R.double(), *weights).inputs[0]
    assert relative_error(got, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 7, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_zero_guard_has_nothing_to_spread_where_nothing_is_dead(shape: tuple[int, ...], share: float) -> None:
    """Which is seen at once on a CPU; in a graph that is being made it cannot be, and the mask is there, empty."""
    guard = ZeroGuard(1e-3)
    z, numerator = torch.rand(shape) + 0.1, torch.randn(shape)
    z[0] *= 1e-6  # an image's own largest denominator decides
    z[-1][torch.rand(shape[1:]) < share] = 1e-4
    z[1, 0], z[-1, 0] = 1.0, 1.0
    if share:
        z[-1, 1] = 1e-4
    for above in (1.0, numerator):
        alive, dead = guarded(z, guard, above)
        with Watched():
            told = guarded(z, guard, above)
        assert torch.equal(told[0], alive)
        assert told[1] is not None
        if share == 0:
            assert dead is None
            assert torch.equal(alive, above / z)
            assert not told[1].any()
        else:
            mask = z == 1e-4
            assert dead is not None
            assert torch.equal(dead, mask * above)
            assert torch.equal(alive, torch.where(mask, 0.0, above / z))
            assert torch.equal(told[1], dead)


class Watched(TorchDispatchMode):
    """Any dispatch mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_bounds_of_the_wrong_number_of_channels_name_the_layer() -> None:
    geometry = GEOMETRIES["2d"]
    layer, parameters = layer_with(geometry, bias=False, normed=False)
    with pytest.raises(ValueError, match=r"stem\.conv.*3 values for 'low'.*2 input channels"):
        LinearOperation(layer, rules.ZBox(), True, parameters, False, torch.float32, "stem.conv")


@pytest.mark.parametrize("name", [name for name, geometry in GEOMETRIES.items() if geometry.kernel])
def test_transposed_convolution_is_the_transpose(name: str) -> None:
    """⟨A x, s⟩ = ⟨x, Aᵀ s⟩, up to what rounding leaves of their terms, whose sum may be next to nothing."""
    geometry = GEOMETRIES[name]
    layer, weight = geometry.layer(), torch.randn(geometry.weight_shape, dtype=torch.float64)
    assert isinstance(layer, Convolution)
    x = random_input(geometry, signed=True)
    y = layer.apply(x, weight)
    s = torch.randn_like(y)
    back = transposed_convolution(s, weight, layer, geometry.input_shape, layer.groups)
    terms, others = x * back, y * s
    assert (terms.sum() - others.sum()).abs() <= 1e-13 * (terms.abs().sum() + others.abs().sum())


# Pools ----------------------------------------------------------------------------------------------------------------


def pool_operation(layer: object, rule: PoolRule, x: Tensor, nonnegative: bool) -> ProportionalPool | WinnerPool:
    if rule.kind == "winner":
        return WinnerPool(layer)  # type: ignore[arg-type]
    y = layer.forward((x,), {})  # type: ignore[attr-defined]
    return ProportionalPool(layer, rule, tuple(x.shape[1:]), tuple(y.shape[1:]), nonnegative, x[:0])  # type: ignore[arg-type]


def pool_backward(operation: ProportionalPool | WinnerPool, R: Tensor, saved: Gates | Tensor, x: Tensor) -> Message:
    shape = tuple(x.shape[1:])
    if isinstance(operation, WinnerPool):
        return operation.backward(R, saved, shape)  # type: ignore[arg-type]
    return operation.backward(R, saved, x, shape)  # type: ignore[arg-type]


def pool_pole(layer: Pool, rule: PoolRule, x: Tensor) -> Tensor:
    """What the pool rule's denominator vanishes with, in the precision of x; ones for a rule without poles."""
    y, _ = outputs_of(layer, x)
    if not isinstance(rule.stabilizer, Stabilizer) or not rule.stabilizer.signed:
        return torch.ones_like(y)
    if isinstance(layer, Average):
        return y
    return BlockMap(layer, tuple(x.shape[1:]), tuple(y.shape[2:]), x[:0]).forward(x)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", POOLS)
def test_pool_is_the_references(name: str, dtype: torch.dtype) -> None:
    layer, size = POOLS[name]
    kinds = set()
    for (rule, _), (signed, known) in itertools.product(
        pool_rules(layer), ((True, False), (False, False), (False, True))
    ):
        kinds.add(rule.kind)
        x = pool_input(size, signed).to(dtype)
        wanted = pool_pole(layer, rule, x.double())
        factor = random_factor(wanted)
        expected = reference.share_pool(layer, rule, x.double(), wanted * factor).inputs[0]
        R = (pool_pole(layer, rule, x) * factor).to(dtype)
        operation = pool_operation(layer, rule, x, known)
        y, gates = operation.forward(x)
        assert relative_error(y, layer.forward((x.double(),), {})) <= BOUNDS[dtype]
        r = total(pool_backward(operation, torch.cat([R, 2 * R]), gates, x), x).unflatten(0, (2, 2))
        case = f"{rule} {rule.stabilizer} {signed=} {known=}"
        assert relative_error(r[0], expected) <= BOUNDS[dtype], case
        assert relative_error(r[1], 2 * expected) <= BOUNDS[dtype], case
    assert kinds == ({"proportional"} if isinstance(layer, Average) else {"winner", "blocks"})


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", POOLS)
def test_structural_zeros_are_no_valid_inputs_of_a_pool(name: str, dtype: torch.dtype) -> None:
    layer, size = POOLS[name]
    rule = next(rule for rule, _ in pool_rules(layer) if isinstance(rule.stabilizer, ZeroGuard))
    zeros = random_zeros((2, *size), edge=2)
    x = pool_input(size, signed=False).masked_fill(zeros, 0.0).to(dtype)
    y = layer.forward((x,), {})
    operation = ProportionalPool(layer, rule, (2, *size), tuple(y.shape[1:]), True, x[:0], zeros)
    y, gates = operation.forward(x)
    R = torch.randn_like(y)
    expected = reference.share_pool(layer, rule, x.double(), R.double(), zeros).inputs[0]
    r = total(operation.backward(torch.cat([R, 2 * R]), gates, x, (2, *size)), x).unflatten(0, (2, 2))
    assert relative_error(r[0], expected) <= BOUNDS[dtype]
    assert relative_error(r[1], 2 * expected) <= BOUNDS[dtype]


def test_the_tables_hold_every_kind_of_pool_and_pool_layer() -> None:
    kinds = {rule.kind for layer, _ in POOLS.values() for rule, _ in pool_rules(layer)}
    assert kinds == set(get_args(get_type_hints(PoolRule)["kind"]))
    assert {type(layer) for layer, _ in POOLS.values()} == concrete(Layer) & POOL_LAYERS


def concrete(family: type) -> set[type]:
    """All classes of a family that can be made."""
    below: set[Any] = set(family.__subclasses__())
    return {kind for kind in below if not kind.__abstractmethods__} | set().union(*map(concrete, below), set())


POOL_LAYERS = {kind for kind in concrete(Layer) if "Pool" in kind.__name__ or issubclass(kind, Average)}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_maxima_that_tie_go_to_one_of_them(dtype: torch.dtype) -> None:
    layer = MaxPool((3, 3), (2, 2), (1, 1), (1, 1), False)
    x = torch.randint(0, 2, (2, 3, 7, 7)).to(dtype)
    operation = WinnerPool(layer)
    y, indices = operation.forward(x)
    R = torch.rand_like(y)
    _, r = operation.backward(R, indices, tuple(x.shape[1:]))
    assert r is not None
    assert relative_error(r.flatten(1).sum(1), R.flatten(1).sum(1)) <= BOUNDS[dtype]
    assert relative_error(r, reference.share_pool(layer, PoolRule("winner"), x.double(), R.double()).inputs[0]) <= 1e-6


def test_a_map_that_tiles_repeats_and_one_that_does_not_contracts() -> None:
    tiles = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 1) / 2
    uneven = torch.rand(3, 6, dtype=torch.float64)
    s = torch.rand(2, 5, 3, 3, dtype=torch.float64)
    for rows, columns in itertools.product((tiles, uneven), repeat=2):
        placed = AverageMap([rows, columns])
        assert placed.tiles == [2 if matrix is tiles else None for matrix in (rows, columns)]
        assert relative_error(placed.transpose(s), torch.einsum("ncyx,yi,xj->ncij", s, rows, columns)) <= 1e-12


# Merges and rearrangements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("kind", ["identity", "projection"])
@pytest.mark.parametrize("split", list_splits())
def test_split_is_the_references(split: str, kind: str, skip: int, dtype: torch.dtype) -> None:
    for constant in (None, "residual", "skip"):
        F, S = (branch.to(dtype) for branch in merge_branches())
        zeros: list[Tensor | None] = [None, None]
        if constant is not None:  # the channels that an option-A shortcut pads
            mask = torch.zeros(1, *F.shape[1:], dtype=torch.bool)
            mask[:, 1] = True
            (S if constant == "skip" else F).masked_fill_(mask, 0.0)
            zeros[skip if constant == "skip" else 1 - skip] = mask
        branches = [S, F] if skip == 0 else [F, S]
        layer = Merge(skip, kind, False)  # type: ignore[arg-type]
        R = (F + S).relu() * torch.rand_like(F) if split == "signed" else torch.randn_like(F)
        wide = [branch.double() for branch in branches]
        expected = reference.share_merge(layer, split, wide, R.double(), zeros).inputs
        h, weights = MergeOperation(layer, get_split(split), zeros, dtype).forward(*branches)
        got = torch.stack([times(R, weight) for weight in weights])
        assert relative_error(h, wide[0] + wide[1]) <= BOUNDS[dtype]
        assert relative_error(got, torch.stack(expected)) <= BOUNDS[dtype], f"{constant}"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Pad((1, 2)), (3, 4)),
        (Pad((0, 0, 1, 0, 2, 1)), (3, 4, 5)),
        (Pad((1, -1, 0, -2)), (3, 4, 5)),
        (Slice((slice(None), slice(None), slice(None, None, 2), slice(1, None, 2))), (3, 5, 6)),
        (Slice((Ellipsis, slice(1, 3))), (3, 5)),
        (Slice((slice(None), 1)), (3, 4)),
        (Reshape("flatten", (1,)), (3, 4, 5)),
        (Reshape("reshape", (2, -1, 3)), (3, 4)),
        (Reshape("squeeze", (-1,)), (3, 4, 1)),
        (Reshape("unsqueeze", (2,)), (3, 4)),
    ],
    ids=str,
)
def test_rearrangement_moves_back_by_its_transpose(layer: Pad | Slice | Reshape, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape, dtype=torch.float64)
    y, transpose = reference.applied(lambda u: layer.forward((u,), {}), x)
    s = torch.randn_like(y)
    expected = transpose(s)
    got = move_back(layer, s, shape)
    assert got is not None
    assert torch.equal(got, expected)


def test_structural_zeros_of_an_option_a_shortcut() -> None:
    steps = (
        Step("input", "input", Input(), (), False),
        Step("slice", "slice", Slice((slice(None), slice(None), slice(None, None, 2))), (0,), False),
        Step("pad", "pad", Pad((0, 0, 1, 2)), (1,), False),
    )
    plan = Plan(steps, 2, {})
    zeros = plan.structural_zeros(2, ((4, 2, 6), (4, 2, 3), (4, 5, 3)))
    assert zeros is not None
    assert zeros[0, :, 0].tolist() == [True, False, False, True, True]
    assert plan.structural_zeros(1, ((4, 2, 6), (4, 2, 3), (4, 5, 3))) is None


# Whole tiny networks --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A projection merge, an identity merge and a head, in 1 to 3 dimensions."""

    def __init__(self, dimensions: int, bias: bool) -> None:
        super().__init__()
        convolution = partial((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1], bias=bias)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.stem = nn.Sequential(convolution(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimensions - 1](2)
        self.branch = nn.Sequential(
            convolution(8, 24, 3, 2, 1, groups=2), norm(24), nn.ReLU(), convolution(24, 24, 1), norm(24)
        )
        self.projection = nn.Sequential(convolution(8, 24, 1, 2), norm(24))
        self.last = nn.Sequential(convolution(24, 24, 3, 1, 2, dilation=2), norm(24))
        self.mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1](1)
        self.head = nn.Linear(24, 5)
        for module in self.modules():
            if isinstance(module, norm):
                nn.init.uniform_(module.weight, -0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(self.branch(x) + self.projection(x))
        x = torch.relu(x + self.last(x))
        return self.head(self.mean(x).flatten(1))


def residual(dimensions: int, bias: bool = True) -> tuple[nn.Module, Tensor]:
    """A network and a batch of two; ``bias`` for its convolutions."""
    return Residual(dimensions, bias).eval(), torch.randn(2, 3, *(13, 7, 9)[:dimensions])


def network_error(model: nn.Module, x: Tensor, composite: Composite, dtype: torch.dtype) -> float:
    """The largest relative L2 error of an image's map, torch backend against reference."""
    expected = LRP(model, composite, backend="reference").attribute(x)
    got = LRP(model, composite, backend="torch", dtype=dtype).attribute(x)
    assert isinstance(expected, Tensor)
    assert isinstance(got, Tensor)
    assert got.shape == x.shape
    assert bool(expected.flatten(1).any(1).all())
    distance = (got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(distance.max())


EVERYWHERE = [rule for name, make in FACTORIES.items() for rule in make(1) if name != "ZBox"] + [rules.ZBox(-3.0, 3.0)]


@pytest.mark.parametrize("batch_norm", ["fold", "pass"])
@pytest.mark.parametrize("rule", EVERYWHERE, ids=str)
def test_network_with_one_rule_everywhere(rule: Rule, batch_norm: Literal["fold", "pass"]) -> None:
    base = Composite.named("conserving" if isinstance(rule.stabilizer, ZeroGuard) else "epsilon_plus")
    composite = replace(base, convolution=rule, dense=rule, stem=rule, batch_norm=batch_norm)
    for dimensions in (1, 2, 3):
        model, x = residual(dimensions)
        assert network_error(model, x, composite, torch.float64) <= 1e-8


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_network_of_any_dimension_in_bfloat16(dimensions: int) -> None:
    model, x = residual(dimensions)
    plain = LRP(model, "conserving", dtype=torch.float32).explain(x).heatmap
    got = LRP(model, "conserving", dtype=torch.bfloat16).explain(x).heatmap
    assert relative_error(got, plain) <= 0.1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, (3, 7), (1, 2), (0, 1), (2, 1), groups=8), (2, 4, 6, 5)),
        (nn.Conv3d(4, 8, (3, 3, 7), (2, 1, 4), (3, 2, 1), groups=4), (3, 4, 1, 2, 6)),
        (nn.AvgPool3d(2), (2, 4, 4, 5, 4)),
    ],
    ids=["wide and depthwise", "volumes and depthwise", "mean over volumes"],
)
def test_what_torch_cannot_do_in_bfloat16(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Garbage from a CPU's grouped convolutions with channels last, and no average pool of volumes."""
    channels = getattr(layer, "in_channels", 4)
    first = nn.Conv2d(4, channels, 1) if len(shape) == 4 else nn.Conv3d(4, channels, 1)
    model = nn.Sequential(first, nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.rand(shape)
    model(x)
    for parameter in model.parameters():
        parameter.data.abs_()  # without poles, at which rounding counts for as much
    for name in ("otsuki2024", "epsilon_plus_flat", "epsilon_alpha2_beta1"):
        expected = LRP(model, name, backend="reference").explain(x, 1, start="one").heatmap
        got = LRP(model, name, dtype=torch.bfloat16).explain(x, 1, start="one").heatmap
        assert relative_error(got, expected) <= 0.1


@pytest.mark.parametrize("name", list_composites())
def test_network_under_each_composite(name: str) -> None:
    composite = Composite.named(name)
    for dimensions in (1, 2, 3):
        model, x = residual(dimensions)
        assert network_error(model, x, composite, torch.float64) <= 1e-8


@pytest.mark.parametrize("name", list_composites())
def test_network_under_each_composite_in_float32(name: str) -> None:
    """Without convolution biases, which give the paper's rule poles too."""
    for dimensions in (1, 2, 3):
        model, x = residual(dimensions, bias=False)
        bound = 1e-5 if name in ("otsuki2024", "conserving") else 1e-3
        assert network_error(model, x, Composite.named(name), torch.float32) <= bound


@pytest.mark.parametrize("identity", list_splits())
@pytest.mark.parametrize("projection", list_splits())
def test_network_under_each_pair_of_splits(identity: str, projection: str) -> None:
    from lrp_fast import Splits

    model, x = residual(2)
    for name in ("conserving", "epsilon_plus"):
        composite = Composite.named(name).with_split(Splits(identity, projection))
        assert network_error(model, x, composite, torch.float64) <= 1e-8


@pytest.mark.parametrize("name", list_composites())
def test_several_targets_are_each_target_alone(name: str) -> None:
    model, x = residual(2)
    explainer = LRP(model, name)
    targets = torch.tensor([[0, 3, 1], [2, 2, 4]])
    together = explainer.explain(x, targets, layers=("pool", "branch"))
    for column in range(3):
        alone = explainer.explain(x, targets[:, column], layers=("pool", "branch"))
        assert together.relevance is not None
        assert alone.relevance is not None
        assert relative_error(together.relevance[:, column], alone.relevance) <= 1e-5
        assert float((together.leak[:, column] - alone.leak).abs().max()) <= 1e-5
        for layer, relevance in alone.layers.items():
            assert relative_error(together.layers[layer][:, column], relevance) <= 1e-5
    assert torch.equal(together.target, targets)


@pytest.mark.parametrize("name", list_composites())
def test_a_heatmap_alone_is_the_channel_sum(name: str) -> None:
    model, x = residual(2)
    explainer = LRP(model, name)
    whole, alone = explainer.explain(x), explainer.explain(x, relevance=False)
    assert whole.relevance is not None
    assert alone.relevance is None
    assert relative_error(whole.heatmap, whole.relevance.sum(1)) <= 1e-6
    assert relative_error(alone.heatmap, whole.heatmap) <= 1e-5
    for target in ([[1, 2], [3, 0]],):
        several = explainer.explain(x, target, relevance=False)
        assert relative_error(several.heatmap, explainer.explain(x, target).heatmap) <= 1e-5


@pytest.mark.parametrize("name", ["otsuki2024", "conserving"])
def test_network_in_bfloat16(name: str) -> None:
    model, x = calibrated(CifarResNet(blocks=1), seed=0, shape=(8, 3, 32, 32)), torch.randn(4, 3, 32, 32)
    targets = torch.tensor([0, 1, 2, 3])
    expected = LRP(model, name, backend="reference").explain(x, targets, start="one").relevance
    got = LRP(model, name, dtype=torch.bfloat16).explain(x, targets, start="one").relevance
    assert expected is not None
    assert got is not None
    assert got.dtype == torch.float32
    assert float(((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()) <= 2e-2


def test_poison_reaches_what_is_left_unwritten() -> None:
    assert bool(torch.empty(3).isnan().all())
    assert bool(Gates((torch.empty(3),)).groups[0].isnan().all())


def test_a_mean_without_its_axes_gets_them_back() -> None:
    layer = Mean((-1, 2), keepdim=False)
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for stabilizer in (Stabilizer(1e-5, signed=False), ZeroGuard()):
        operation = ProportionalPool(layer, PoolRule("proportional", stabilizer), (3, 4, 5), (3,), True, x[:0])
        _, gates = operation.forward(x)
        R = torch.rand(4, 3, dtype=torch.float64)
        r = total(operation.backward(R, gates, x, (3, 4, 5)), x)
        expected = torch.cat(
            [
                reference.share_pool(layer, PoolRule("proportional", stabilizer), x, half).inputs[0]
                for half in R.chunk(2)
            ]
        )
        assert relative_error(r, expected) <= 1e-12
