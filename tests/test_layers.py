"""Layers compute what torch's own modules compute, whatever their geometry."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Layer,
    MaxPool,
    Mean,
    Merge,
    Pad,
    ReLU,
    Reshape,
    Size,
    SizeExpression,
    Slice,
    resolve,
)

CASES = 12
NORM = BatchNorm("1.running_mean", "1.running_var", "1.weight", "1.bias", 1e-3)


@pytest.fixture
def choose() -> random.Random:
    return random.Random(torch.initial_seed())


def lengths(choose: random.Random, axes: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(choose.randint(low, high) for _ in range(axes))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def of(kind: str, axes: int) -> Callable[..., nn.Module]:
    return getattr(nn, f"{kind}{axes}d")


def agree(layer: Layer, module: Callable[[Tensor], Tensor], x: Tensor, parameters: dict[str, Tensor]) -> bool:
    """Whether torch computes anything at all here; then the layer and its outline must agree, and else refuse too."""
    try:
        expected = module(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            layer.forward((x,), parameters)
        return False
    torch.testing.assert_close(layer.forward((x,), parameters), expected, rtol=1e-10, atol=1e-10)
    outline = layer.outline((x.to("meta"),), {path: value.to("meta") for path, value in parameters.items()})
    assert (outline.shape, outline.device.type) == (expected.shape, "meta")
    return True


def test_a_refusal_must_be_shared() -> None:
    """``agree`` can fail, both ways."""
    with pytest.raises(AssertionError):
        agree(ReLU(), lambda x: x, noise(2, 3), {})
    with pytest.raises(pytest.fail.Exception):
        agree(ReLU(), lambda x: x.view(7), noise(2, 3), {})


# Linear layers ------------------------------------------------------------------------------------------------------


def random_norm(norm: nn.Module) -> None:
    norm.eps = NORM.eps
    for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        value.uniform_(0.3, 1.5)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "batch norm"])
def test_convolution(axes: int, normalised: bool, choose: random.Random) -> None:
    computed = 0
    for _ in range(CASES):
        groups, bias = choose.choice([1, 1, 2, 4]), choose.random() < 0.5
        bounds = ((1, 4), (1, 3), (0, 3), (1, 2))
        kernel, stride, padding, dilation = (lengths(choose, axes, low, high) for low, high in bounds)
        convolution = of("Conv", axes)(4, 8, kernel, stride, padding, dilation, groups, bias)
        model = nn.Sequential(convolution, of("BatchNorm", axes)(8) if normalised else nn.Identity()).double().eval()
        if normalised:
            random_norm(model[1])
        parameters = {name: value.detach() for name, value in model.state_dict().items()}
        bias_path = "0.bias" if bias else None
        layer = Convolution("0.weight", bias_path, NORM if normalised else None, stride, padding, dilation, groups)
        x = noise(2, 4, *lengths(choose, axes, 3, 9))
        with torch.no_grad():
            if agree(layer, model, x, parameters):
                computed += 1
                folded = layer.apply(x, *layer.folded(parameters))
                torch.testing.assert_close(folded, model(x), rtol=1e-10, atol=1e-10)
                raw = layer.apply(x, *layer.raw(parameters))
                torch.testing.assert_close(raw, model[0](x), rtol=1e-10, atol=1e-10)
    assert computed >= CASES // 3


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("bias", [False, True])
def test_dense(normalised: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(7, 5, bias), nn.BatchNorm1d(5) if normalised else nn.Identity()).double().eval()
    if normalised:
        random_norm(model[1])
    parameters = {name: value.detach() for name, value in model.state_dict().items()}
    layer = Dense("0.weight", "0.bias" if bias else None, NORM if normalised else None)
    x = noise(3, 7)
    assert agree(layer, model, x, parameters)
    torch.testing.assert_close(layer.apply(x, *layer.folded(parameters)), model(x), rtol=1e-10, atol=1e-10)
    if normalised:
        with pytest.raises(RuntimeError, match="needs N x features"):
            layer.forward((noise(3, 5, 7),), parameters)
        with pytest.raises(RuntimeError, match="needs N x features"):
            layer.outline((noise(3, 5, 7),), parameters)
    else:
        assert agree(layer, model, noise(3, 2, 7), parameters)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 4), (2, 1, 5), (2,)])
def test_batch_norm_alone(shape: tuple[int, ...]) -> None:
    norm = (nn.BatchNorm2d(5) if len(shape) == 4 else nn.BatchNorm1d(5)).double().eval()
    random_norm(norm)
    parameters = {f"1.{name}": value.detach() for name, value in norm.state_dict().items()}
    if shape[1:2] == (5,):
        assert agree(NORM, norm, noise(*shape), parameters)
    else:
        with pytest.raises(RuntimeError, match="a batch norm of 5 channels gets"):
            NORM.outline((torch.empty(shape, device="meta"),), parameters)


# Pools --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_max_pool(axes: int, choose: random.Random) -> None:
    computed = 0
    for _ in range(CASES):
        kernel, stride, dilation = (lengths(choose, axes, 1, high) for high in (4, 3, 2))
        padding = tuple(choose.randint(0, k // 2) for k in kernel)
        ceil = choose.random() < 0.5
        layer = MaxPool(kernel, stride, padding, dilation, ceil)
        pool = of("MaxPool", axes)(kernel, stride, padding, dilation, ceil_mode=ceil)
        x = noise(2, 3, *lengths(choose, axes, 3, 9))
        if agree(layer, pool, x, {}):
            computed += 1
            values, indices = layer.with_indices(x)
            assert torch.equal(values, pool(x))
            assert indices is not None
            inside = values.isfinite()  # a dilated window may miss the input
            picked = x.flatten(2).gather(2, indices.flatten(2).clamp(min=0)).view_as(values)
            assert torch.equal(picked[inside], values[inside])
    assert computed >= CASES // 3


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_average_pool(axes: int, choose: random.Random) -> None:
    computed = 0
    for _ in range(CASES):
        kernel, stride = lengths(choose, axes, 1, 4), lengths(choose, axes, 1, 3)
        padding = tuple(choose.randint(0, k // 2) for k in kernel)
        ceil, include = choose.random() < 0.5, choose.random() < 0.5
        divisor = choose.choice([None, 3]) if axes > 1 else None
        arguments = (kernel, stride, padding, ceil, include)
        pool = of("AvgPool", axes)(*arguments, *([divisor] if axes > 1 else []))
        computed += agree(AveragePool(*arguments, divisor), pool, noise(2, 3, *lengths(choose, axes, 3, 9)), {})
    assert computed >= CASES // 3


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Avg", "Max"])
def test_adaptive_pools(kind: str, axes: int, choose: random.Random) -> None:
    for _ in range(CASES):
        size = tuple(choose.choice([None, 1, 2, 5]) for _ in range(axes)) if axes > 1 else (choose.randint(1, 5),)
        layer = AdaptiveAveragePool(size) if kind == "Avg" else AdaptiveMaxPool(size)
        x = noise(2, 3, *lengths(choose, axes, 1, 9))
        assert agree(layer, of(f"Adaptive{kind}Pool", axes)(size), x, {})
        if isinstance(layer, AdaptiveMaxPool):
            values, indices = layer.with_indices(x)
            assert indices is not None
            assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)).view_as(values), values)


@pytest.mark.parametrize(
    "layer",
    [
        MaxPool((2, 2), (2, 2), (0, 0), (1, 1), False),
        AveragePool((2, 2), (2, 2), (0, 0), False, True, None),
        AdaptiveAveragePool((2, None)),
        AdaptiveMaxPool((2, 2)),
    ],
)
def test_pools_need_a_batch(layer: Layer) -> None:
    """Torch would pool the channels of N × C × L, read as one image without a batch."""
    with pytest.raises(RuntimeError, match="pooling over 2 axes needs N x channels and these"):
        layer.forward((noise(3, 4, 6),), {})


@pytest.mark.parametrize("dimensions", [(2,), (-1,), (2, 3), (-2, -1), (3, 2)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_mean(dimensions: tuple[int, ...], keepdim: bool) -> None:
    assert agree(Mean(dimensions, keepdim), lambda x: x.mean(dimensions, keepdim), noise(2, 3, 4, 5), {})


@pytest.mark.parametrize("dimensions", [(1,), (0,), (-3, 2), (-4,)])
def test_mean_over_more_than_space(dimensions: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="over space only"):
        Mean(dimensions, False).forward((noise(2, 3, 4, 5),), {})


# The rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (ReLU(), F.relu),
        (Reshape("flatten", (1, -1)), nn.Flatten()),
        (Reshape("reshape", (2, -1, 5)), lambda x: x.view(2, -1, 5)),
        (Reshape("reshape", ((2, 3, 20),)), lambda x: x.view(2, 3, 20)),
        (Reshape("unsqueeze", (-1,)), lambda x: x[..., None]),
        (Pad((1, 2, -1, 0, 0, 2)), lambda x: F.pad(x, (1, 2, -1, 0, 0, 2))),
        (Slice((slice(None), slice(1, None), slice(None, None, 2))), lambda x: x[:, 1:, ::2]),
        (Slice((..., 2)), lambda x: x[:, :, :, 2]),
        (Slice((slice(None), 1, ..., slice(-2, None))), lambda x: x[:, 1, :, -2:]),
    ],
)
def test_rearrangements(layer: Layer, function: Callable[[Tensor], Tensor]) -> None:
    assert agree(layer, function, noise(2, 3, 4, 5), {})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Reshape("flatten", (0, 1)), "does not keep the batch first"),
        (Reshape("reshape", (3, 2, 20)), "does not keep the batch first"),
        (Reshape("unsqueeze", (0,)), "does not keep the batch first"),
        (Pad((0, 0, 0, 0, 0, 0, 1, 0)), "along the batch"),
        (Slice((slice(1, None),)), "along the batch"),
        (Slice((0,)), "along the batch"),
        (Slice((..., slice(1, None), slice(None), slice(None), slice(None))), "along the batch"),
    ],
)
def test_rearrangements_that_touch_the_batch(layer: Layer, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        layer.forward((noise(2, 3, 4, 5),), {})


def test_merge() -> None:
    first, second = noise(2, 3, 4), noise(2, 3, 4)
    assert torch.equal(Merge(1, "identity", False).forward((first, second), {}), first + second)
    assert Merge(1, "identity", False).outline((first, second), {}).shape == (2, 3, 4)
    for compute in (Merge(1, "identity", False).forward, Merge(1, "identity", False).outline):
        with pytest.raises(RuntimeError, match=r"differ in shape: \(2, 3, 4\) and \(2, 1, 4\)"):
            compute((first, second[:, :1]), {})


def test_lengths_known_later() -> None:
    shapes: Sequence[tuple[int, ...]] = [(2, 3, 8, 6), (2, 4, 4, 3)]
    width = SizeExpression(operator.getitem, (Size(1), 3))
    half = SizeExpression(operator.floordiv, (SizeExpression(operator.getitem, (Size(0), -2)), 2))
    assert resolve((width, (half, slice(None, width, 2)), 7), shapes) == (3, (4, slice(None, 3, 2)), 7)
    assert resolve(SizeExpression(operator.getitem, (Size(0), slice(2, None))), shapes) == (8, 6)
    spatial = SizeExpression(operator.getitem, (Size(1), slice(-2, None)))
    pool = AveragePool(spatial, spatial, (0, 0), False, True, None)  # type: ignore[arg-type]
    x = noise(*shapes[1])
    torch.testing.assert_close(pool.resolved(shapes).forward((x,), {}), x.mean((2, 3), keepdim=True))
    assert Slice((slice(None), slice(half, None))).resolved(shapes) == Slice((slice(None), slice(4, None)))
