"""Tracing: a plan computes what its model computes, or there is an error; the model is left as it was."""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lrp_fast import reference
from lrp_fast.composites import Composite
from lrp_fast.explain import LRP
from lrp_fast.layers import AveragePool, Dense, Linear, Merge, Pad
from lrp_fast.plan import Plan, TraceError
from lrp_fast.trace import trace
from lrp_fast.watch import parameter_table
from tests.networks import CifarResNet

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Named modules and a function of them: ``function(net, x)``."""

    def __init__(self, function: Forward, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def net(function: Forward, **modules: nn.Module) -> Net:
    """Three convolutions of one shape, their batch norms, a head; ``modules`` besides."""
    convolutions = {f"conv{i}": nn.Conv2d(3 if i == 1 else 4, 4, 3, padding=1) for i in (1, 2, 3)}
    norms = {f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2, 3)}
    return Net(function, **convolutions, **norms, relu=nn.ReLU(), fc=nn.Linear(4, 5), **modules)


def head(net: Any, x: Tensor) -> Tensor:
    return net.fc(x.mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with fresh weights and statistics of an ordinary size."""
    model = model.double().eval()
    if next(model.parameters()).is_meta:
        model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            scale = (2 / value[0].numel()) ** 0.5 * 3**0.5 if value.ndim > 1 else 0.3
            value.uniform_(-scale, scale)
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.add_(1.0)
    return model


def built(factory: Callable[[], nn.Module]) -> nn.Module:
    """A large model without the time its own initialisation takes."""
    with torch.device("meta"):
        model = factory()
    if isinstance(model, torchvision.models.VGG):
        model.classifier[0] = nn.Linear(512 * 49, 8)
        model.classifier[3] = nn.Linear(8, 8)
        model.classifier[6] = nn.Linear(8, 10)
        model = model.to_empty(device="cpu")
    return randomised(model)


def check(model: nn.Module, *shapes: tuple[int, ...]) -> Plan:
    """The plan of a float64 model, checked on random inputs: output, shapes and signs."""
    plan = trace(model)
    parameters = parameter_table(model, plan)
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x.clone())
            values = reference.forward(plan, parameters, x)
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(values[plan.output], expected, rtol=0, atol=1e-10 * scale)
        assert plan.shapes(shape, parameters) == tuple(tuple(value.shape) for value in values)
        for step, value in zip(plan.steps, values, strict=True):
            assert not step.nonnegative or bool((value >= 0).all()), step.name
    return plan


def merge_of(plan: Plan) -> Merge:
    (merge,) = [step.layer for step in plan.steps if isinstance(step.layer, Merge)]
    return merge


# Known networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_residual_networks(name: str) -> None:
    factory = functools.partial(getattr(torchvision.models, name), num_classes=10)
    check(built(factory), (1, 3, 35, 32))


def test_several_sizes_of_one_plan() -> None:
    plan = check(built(torchvision.models.resnet18), (1, 3, 65, 47), (3, 3, 32, 32), (2, 3, 31, 64))
    assert len(plan.steps) == 50


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_torchvision_vgg(name: str) -> None:
    plan = check(built(getattr(torchvision.models, name)), (1, 3, 40, 33))
    assert sum(isinstance(step.layer, Dense) for step in plan.steps) == 3


@pytest.mark.parametrize("name", ["resnet101", "resnet152"])
def test_shapes_of_the_deep_ones(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    found: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_hook(lambda _, __, y, path=path: found.update({path: tuple(y.shape)}))
        for path, module in model.named_modules()
        if path and isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.Linear, nn.Sequential))
    ]
    model(torch.empty(2, 3, 97, 65, device="meta"))
    for handle in handles:
        handle.remove()
    plan = trace(model)
    shapes = plan.shapes((2, 3, 97, 65), parameter_table(model, plan))
    assert len(found) > 100
    for path, shape in found.items():
        assert shapes[plan.find(path)] == shape, path


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "resnext50_32x4d"])
def test_timm_residual_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    plan = check(built(lambda: timm.create_model(name, num_classes=10)), (1, 3, 33, 40))
    pooled = [s for s in plan.steps if isinstance(s.layer, AveragePool) and "downsample" in s.name]
    assert len(pooled) == (3 if name == "resnet50d" else 0)


def test_option_a_shortcuts() -> None:
    plan = check(randomised(CifarResNet()), (3, 3, 32, 32), (1, 3, 24, 24))
    merges = [step.layer for step in plan.steps if isinstance(step.layer, Merge)]
    assert len(merges) == 9
    assert all((merge.kind, merge.skip, merge.ambiguous) == ("identity", 1, False) for merge in merges)


# Adds and merges ----------------------------------------------------------------------------------------------------


def _add_in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "+=": _add_in_place,
    "torch.add": torch.add,
    "add": lambda a, b: a.add(b),
    "add_": lambda a, b: a.add_(b),
    "other": lambda a, b: torch.add(a, other=b),
    "sum": lambda a, b: sum([a, b]),
}


@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("flipped", [False, True], ids=["branch first", "skip first"])
@pytest.mark.parametrize("name", ADDS)
def test_adds(name: str, flipped: bool, projection: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.bn1(net.conv1(x)))
        branch = net.bn3(net.conv3(net.relu(net.bn2(net.conv2(x)))))
        skip = net.shortcut(x)
        return head(net, F.relu(ADDS[name](skip, branch) if flipped else ADDS[name](branch, skip)))

    shortcut = nn.Conv2d(4, 4, 1) if projection else nn.Identity()
    merge = merge_of(check(randomised(net(forward, shortcut=shortcut)), (3, 3, 7, 6)))
    assert merge.skip == (0 if flipped else 1)
    assert merge.kind == ("projection" if projection else "identity")
    assert not merge.ambiguous


def _two_branches(net: Any, x: Tensor) -> Tensor:
    return head(net, net.conv1(x) + net.conv1b(x))


def _doubled(net: Any, x: Tensor) -> Tensor:
    x = net.relu(net.conv1(x))
    return head(net, x + x)


@pytest.mark.parametrize("forward", [_two_branches, _doubled])
def test_ambiguous_merges(forward: Forward) -> None:
    model = randomised(net(forward, conv1b=nn.Conv2d(3, 4, 1)))
    plan = check(model, (2, 3, 5, 5))
    assert merge_of(plan).ambiguous
    with pytest.raises(ValueError, match="add: both branches hold equally many linear layers"):
        Composite.named("otsuki2024").with_split("residual-only").assign(plan)
    for split in ("ratio", "symmetric", "signed"):
        assert Composite.named("otsuki2024").with_split(split).assign(plan)
    relevance = LRP(model, "conserving").explain(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert float(relevance.leak.abs().max()) < 1e-9


def test_three_branches_and_nested_skips() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.relu(net.conv1(x))
        inner = net.conv2(x) + x
        return head(net, sum([net.conv3(inner), x, inner]))

    plan = check(randomised(net(forward)), (2, 3, 5, 6))
    kinds = [(step.layer.skip, step.layer.kind) for step in plan.steps if isinstance(step.layer, Merge)]
    # inner = F + x; conv3(inner) + x; (...) + inner, where all that inner does not share is conv3
    assert kinds == [(1, "identity"), (1, "identity"), (1, "identity")]


# Changes in place ---------------------------------------------------------------------------------------------------


def _skip_reads_what_a_module_relu_changed(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return head(net, net.conv2(net.inplace(x)) + x)


def _skip_reads_what_a_functional_relu_changed(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return head(net, net.conv2(F.relu(x, inplace=True)) + x)


def _skip_taken_before_a_change(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    skip = x
    x.relu_()
    return head(net, net.conv2(x) + skip)


def _branch_computed_before_a_change(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    branch = net.conv2(x)
    torch.relu_(x)
    return head(net, branch + x)


def _add_into_a_skip_read_again(net: Any, x: Tensor) -> Tensor:
    x = net.relu(net.conv1(x))
    y = x
    y += net.conv2(x)
    return head(net, net.conv3(y) + x)


def _relu_of_an_in_place_sum(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = net.conv2(x)
    y.add_(x).relu_()
    return head(net, net.conv3(y) + y)


def _through_identity_and_dropout(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = net.drop(F.dropout(net.identity(x), 0.5, net.training))
    F.relu_(y)
    return head(net, net.conv2(y) + x)


def _copy_is_not_changed(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    kept = x.clone()
    x.relu_()
    return head(net, net.conv2(x) + kept)


def _copy_is_changed_alone(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = torch.clone(x).relu_()
    return head(net, net.conv2(y) + x)


def _adding_nothing_copies(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = sum([x])
    y += net.conv2(x)
    return head(net, net.conv3(y) + x)


def _view_changed_and_read(net: Any, x: Tensor) -> Tensor:
    return net.fc(F.relu_(net.conv1(x).mean((2, 3), keepdim=True).flatten(1)))


def _view_made_after_the_change(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    x.view(x.size(0), -1)
    x.relu_()
    return head(net, x.view(x.shape) + net.conv2(x))


RIGHT = [
    _skip_reads_what_a_module_relu_changed,
    _skip_reads_what_a_functional_relu_changed,
    _skip_taken_before_a_change,
    _branch_computed_before_a_change,
    _add_into_a_skip_read_again,
    _relu_of_an_in_place_sum,
    _through_identity_and_dropout,
    _copy_is_not_changed,
    _copy_is_changed_alone,
    _adding_nothing_copies,
    _view_changed_and_read,
    _view_made_after_the_change,
]
EXTRA = {"inplace": nn.ReLU(inplace=True), "identity": nn.Identity(), "drop": nn.Dropout(0.5, inplace=True)}


@pytest.mark.parametrize("forward", RIGHT)
def test_changes_in_place(forward: Forward) -> None:
    check(randomised(net(forward, **EXTRA)), (3, 3, 5, 4), (1, 3, 6, 6))


def _base_read_after_a_slice_changed(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    x[:, :2].relu_()
    return head(net, x)


def _view_read_after_its_base_changed(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = x.flatten(2)
    x.relu_()
    return net.fc(y.mean(2))


def _sibling_view_read_after_a_change(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y, z = x[:, :, 1:], x[:, :, :-1]
    F.relu(y, inplace=True)
    return head(net, z)


def _base_of_a_view_with_an_add(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = x.view(x.shape)
    y += x
    return head(net, x)


def _contiguous_may_or_may_not_copy(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y = x[:, :, ::2, ::2].contiguous()
    y.relu_()
    return head(net, x) + head(net, y)


@pytest.mark.parametrize(
    "forward",
    [
        _base_read_after_a_slice_changed,
        _view_read_after_its_base_changed,
        _sibling_view_read_after_a_change,
        _base_of_a_view_with_an_add,
        _contiguous_may_or_may_not_copy,
    ],
)
def test_views_of_changed_memory(forward: Forward) -> None:
    with pytest.raises(TraceError, match="changed in place through another view"):
        trace(net(forward).eval())


UNARY: tuple[Callable[[Any, Tensor], Tensor], ...] = (
    lambda net, x: net.conv(x),
    lambda net, x: F.relu(x),
    lambda net, x: x.relu_(),
    lambda net, x: x[:, :],
    lambda net, x: x[:, :, 1:-1],
    lambda net, x: x.view(x.shape),
    lambda net, x: x.reshape(x.size(0), x.size(1), -1).reshape(x.shape),
    lambda net, x: x.clone(),
    lambda net, x: x.contiguous(),
    lambda net, x: net.identity(x),
    lambda net, x: x + 0,
    lambda net, x: F.pad(x, (0, 0, 1, 1)),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (ADDS["+"], ADDS["+="], ADDS["add_"])


def random_forward(choose: random.Random) -> Forward:
    """A program of random operations on a growing list of tensors, many of them views and changes in place."""
    lines = [(choose.random(), choose.random(), choose.random(), choose.random()) for _ in range(8)]

    def forward(net: Any, x: Tensor) -> Tensor:
        tensors = [net.start(x)]
        for kind, operation, first, second in lines:
            a, b = tensors[int(first * len(tensors))], tensors[int(second * len(tensors))]
            if kind < 0.7:
                tensors.append(UNARY[int(operation * len(UNARY))](net, a))
            else:
                tensors.append(BINARY[int(operation * len(BINARY))](a, b))
        pooled = [t.mean((2, 3)) for t in tensors[-3:]]
        return sum(pooled)

    return forward


@pytest.mark.parametrize("case", range(5))
def test_random_programs(case: int) -> None:
    choose, compared, refusals = random.Random(torch.initial_seed()), 0, []
    while compared < 25:
        model = Net(random_forward(choose), start=nn.Conv2d(3, 4, 1), conv=nn.Conv2d(4, 4, 1), identity=nn.Identity())
        model, x = randomised(model), torch.randn(2, 3, 12, 4, dtype=torch.float64)
        try:
            model(x.clone())
        except RuntimeError:  # the branches differ in shape, or a view cannot be had
            continue
        try:
            check(model, (2, 3, 12, 4))
            compared += 1
        except TraceError as error:
            refusals.append(str(error))
    assert all("changed in place" in refusal for refusal in refusals)
    assert len(refusals) < 100


# Operations ---------------------------------------------------------------------------------------------------------


def _pool_of_a_size(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    x = F.avg_pool2d(x, x.size()[3])
    return net.fc(x.view(x.size(0), -1))


def _pool_of_a_shape(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return net.fc(torch.flatten(F.avg_pool2d(x, x.shape[2:]), 1))


def _pool_of_the_last_of_a_shape(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return net.fc(F.avg_pool2d(x, kernel_size=x.size()[-2:]).reshape(x.shape[:2]))


def _unpacked_shape(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    n, c, h, w = x.shape
    return net.fc(x.reshape(n, c, h * w).mean(-1))


def _resized_to_another(net: Any, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return head(net, F.adaptive_avg_pool2d(y, F.max_pool2d(x, 2).shape[2:]))


def _mean_by_negative_dimensions(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.conv1(x).mean((-2, -1), keepdim=True).flatten(1))


def _mean_of_mean(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.conv1(x).mean(2).mean(2))


def _mean_by_list(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.mean(net.conv1(x), dim=[2, 3]))


def _squeezed(net: Any, x: Tensor) -> Tensor:
    return net.fc(F.adaptive_max_pool2d(net.conv1(x), 1).squeeze(-1).squeeze(dim=2).unsqueeze(1).squeeze(1))


def _max_pools(net: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(net.relu(net.conv1(x)), 3, 2, padding=1, ceil_mode=True)
    return head(net, F.max_pool2d(x, kernel_size=(2, 1)))


def _functional_layers(net: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, net.conv1.weight, stride=2, padding=(1, 0))
    bn = net.bn1
    x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, eps=1e-3)
    x = F.dropout(torch.relu(x), p=0.3, training=net.training)
    return F.linear(x.mean((2, 3)), net.fc.weight, net.fc.bias)


def _norm_without_scale(net: Any, x: Tensor) -> Tensor:
    return head(net, F.batch_norm(net.conv1(x), net.bn1.running_mean, net.bn1.running_var))


def _shared_modules(net: Any, x: Tensor) -> Tensor:
    x = net.relu(net.conv1(x))
    return head(net, net.relu(net.conv2(net.relu(net.conv2(x)))))


def _slices(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    first, second = x[:, : x.size(1) // 2], x[:, x.size(1) // 2 :, ...]
    return head(net, F.pad(first + second, [0, 0, 0, 0, 1, 1]))


def _cropped_by_padding(net: Any, x: Tensor) -> Tensor:
    return head(net, F.pad(net.conv1(x), (-1, 1, 0, -2)))


def _in_a_context(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.conv1(x)
    return head(net, x.detach())


OPERATIONS = [
    _pool_of_a_size,
    _pool_of_a_shape,
    _pool_of_the_last_of_a_shape,
    _unpacked_shape,
    _resized_to_another,
    _mean_by_negative_dimensions,
    _mean_of_mean,
    _mean_by_list,
    _squeezed,
    _max_pools,
    _functional_layers,
    _norm_without_scale,
    _shared_modules,
    _slices,
    _cropped_by_padding,
    _in_a_context,
]


@pytest.mark.parametrize("forward", OPERATIONS)
def test_operations(forward: Forward) -> None:
    check(randomised(net(forward)), (3, 3, 8, 8), (1, 3, 9, 9))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "frozen batch norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), torchvision.ops.FrozenBatchNorm2d(6, eps=0.1)),
    "same, odd": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "same, even": lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    # Of channels last, torch's own convolution dies of it on a CPU: 1 × 1, dilated, with a window in the padding.
    "one element, dilated": lambda: nn.Conv2d(4, 6, 1, (4, 2), 1, (1, 3)),
    "valid, grouped": lambda: nn.Conv2d(4, 6, 2, padding="valid", groups=2, stride=2),
    "pool": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "pool, divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "max pool, dilated": lambda: nn.MaxPool2d((2, 3), 1, (1, 0), dilation=2),
    "adaptive": lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, None)), nn.AdaptiveMaxPool2d(2)),
    "padded": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 0.0)),
    "dropouts": lambda: nn.Sequential(nn.Dropout(), nn.Dropout2d(inplace=True), nn.AlphaDropout()),
    "stack": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Identity(), nn.BatchNorm2d(6, affine=False))),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), MODULES[name](), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(5)
    )
    model(torch.randn(2, 3, 9, 11))
    check(randomised(model), (3, 3, 9, 11), (1, 3, 12, 8))


@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(axes: int) -> None:
    def one(kind: str) -> Callable[..., nn.Module]:
        return getattr(nn, f"{kind}{axes}d")

    model = nn.Sequential(
        one("Conv")(2, 4, 3, padding="same"), one("BatchNorm")(4), nn.ReLU(), one("MaxPool")(2), one("Dropout")(),
        one("ZeroPad")(1), one("Conv")(4, 6, 2, stride=2, groups=2), one("AvgPool")(2, 1), one("AdaptiveMaxPool")(2),
        one("AdaptiveAvgPool")(1), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    check(randomised(model), (3, 2, *(11, 9, 10)[:axes]), (1, 2, *(12,) * axes))


class _FunctionsAlong(nn.Module):
    """The functions of one to three dimensions, by the names that end in ``d``."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.weight = nn.Parameter(torch.empty(4, 2, *[2] * axes))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        def one(name: str) -> Callable[..., Tensor]:
            return getattr(F, f"{name}{self.axes}d")

        x = torch.relu(one("conv")(x, self.weight, padding=1))
        x = one("avg_pool")(one("max_pool")(x, 2, 1), 3, 2, padding=1)
        x = one("adaptive_avg_pool")(one("adaptive_max_pool")(x, 3), 1)
        return self.fc(one("dropout")(x, training=self.training).flatten(1))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_functions_of_other_dimensions(axes: int) -> None:
    check(randomised(_FunctionsAlong(axes)), (3, 2, *(11, 9, 10)[:axes]), (1, 2, *(12,) * axes))


def test_norm_after_a_linear_layer_needs_features() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(25, 3)).eval()
    plan = trace(model)
    with pytest.raises(ValueError, match=r"0 \(Linear\).*batch norm after a linear layer needs N x features"):
        plan.shapes((2, 5, 7), parameter_table(model, plan))


class _Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, pool: bool = True, *, scale: float = 1.0) -> Tensor:
        x = self.conv(x) if mask is None else x
        return x.mean((2, 3)) if pool and scale == 1.0 else x


class _Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Defaults()

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(self.inner(x, pool=False), scale=1.0, mask=mask)


def test_arguments_with_defaults() -> None:
    check(randomised(_Defaults()), (2, 3, 6, 5))
    check(randomised(_Decorated()), (2, 3, 6, 5))
    model = net(lambda net, x: head(net, net.conv1(input=x, padding=1))).eval()
    with pytest.raises(TraceError, match="conv1: Conv2d has arguments that are not understood"):
        trace(model)


def test_forward_replaced_inside() -> None:
    """A forward put on an object is what runs, so it is what is traced."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].forward = lambda x: F.conv2d(x, model[0].weight, stride=2)
    model[1].forward = lambda x: x
    plan = check(randomised(model), (2, 3, 9, 8))
    assert not any(step.operation.lower() == "relu" for step in plan.steps)


def test_subclasses_are_read() -> None:
    class Strided(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :, ::2, ::2])

    model = nn.Sequential(Strided(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    check(randomised(model), (2, 3, 9, 8))


# The model is left as it was ----------------------------------------------------------------------------------------


def _snapshot(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, id(module), module.training, [(key, id(value)) for key, value in vars(module).items()]))
        found.append([(name, dict(getattr(module, name))) for name in hooks])
    for path, value in [*model.named_parameters(), *model.named_buffers()]:
        found.append((path, id(value), value.data_ptr(), value._version, value.requires_grad, value.grad))
    return found


def _storing(net: Any, x: Tensor) -> Tensor:
    net.seen = x = F.relu(net.conv1(x))
    net.conv1.output_of_mine = x
    return head(net, net.conv2(x) + x)


def test_nothing_is_changed() -> None:
    calls: list[Any] = []
    model = net(_storing).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = model(x)
    model.conv1.register_forward_hook(lambda module, args, output: calls.append(output))
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    model.conv2.register_full_backward_hook(lambda *arguments: calls.append(arguments))
    model.conv1.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    snapshot, image = _snapshot(model), x.clone()
    with pytest.warns(UserWarning, match="forward hooks at the model, conv1 are not run"):
        explainer = LRP(model)
    assert _snapshot(model) == snapshot
    explainer.explain(x, layers=["conv1"])
    explainer.attribute(x, target=1)
    explainer.audit(x)
    assert _snapshot(model) == snapshot
    assert calls == []
    assert torch.equal(x, image)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert len(calls) == 2


def test_a_failed_trace_changes_nothing() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.seen = net.conv1(x)
        return head(net, net.seen + torch.ones(4, 1, 1))

    model = net(forward).eval()
    snapshot = _snapshot(model)
    with pytest.raises(TraceError, match="add"):
        trace(model)
    assert _snapshot(model) == snapshot


def test_buffers_that_a_forward_changes() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.bn1.num_batches_tracked += 1
        return head(net, net.conv1(x))

    model = net(forward).eval()
    with pytest.raises(TraceError):
        trace(model)
    assert int(model.bn1.num_batches_tracked) == 0


# Errors -------------------------------------------------------------------------------------------------------------


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))


class _Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class _Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def of(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda _, x: function(x))


def _on_values(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x.relu()


def _on_shapes(x: Tensor) -> Tensor:
    return x if x.shape[2] > 2 else x.relu()


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sigmoid module": (nn.Sigmoid, "body: Sigmoid has no relevance rule"),
    "sigmoid": (of(torch.sigmoid), "body: sigmoid has no relevance rule"),
    "sigmoid method": (of(lambda x: x.sigmoid()), "body: sigmoid has"),
    "gelu": (nn.GELU, "body: GELU has"),
    "silu": (of(F.silu), "body: silu has"),
    "leaky relu": (nn.LeakyReLU, "body: LeakyReLU has"),
    "relu6": (nn.ReLU6, "body: ReLU6 has"),
    "product": (_SqueezeExcite, "body: mul has"),
    "cat": (of(lambda x: torch.cat([x, x], 1)), "body: cat has"),
    "number": (of(lambda x: x + 1), "body: add .* the number 1"),
    "number in place": (of(lambda x: x.add_(0.5)), r"body: add .* the number 0\.5"),
    "parameter": (_Offset, r"body: add .* the parameter body\.offset"),
    "constant tensor": (of(lambda x: x + torch.ones(4, 1, 1)), "body: add has"),
    "alpha": (of(lambda x: torch.add(x, x, alpha=2)), "body: add .* alpha=2"),
    "difference": (of(lambda x: x - x.relu()), "body: sub has"),
    "division": (of(lambda x: x / 2), "body: truediv has"),
    "norm first": (lambda: nn.BatchNorm2d(4), r"body: BatchNorm2d .* right after .* it follows relu \(ReLU\)"),
    "norm twice": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        r"body\.2: BatchNorm2d .* right after",
    ),
    "norm of the batch": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        r"body\.1: BatchNorm2d has no running statistics",
    ),
    "layer norm": (lambda: nn.LayerNorm(6), "body: LayerNorm has"),
    "group norm": (lambda: nn.GroupNorm(2, 4), "body: GroupNorm has"),
    "values decide": (of(_on_values), r"body \(Net\): forward cannot be traced.*control flow"),
    "shapes decide": (of(_on_shapes), r"body \(Net\): forward cannot be traced.*control flow"),
    "reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "reflection pad": (lambda: nn.ReflectionPad2d(1), "body: ReflectionPad2d has"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 2), "body: ConvTranspose2d has"),
    "computed weights": (lambda: _Standardised(4, 4, 1), "body: mean has"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "body: .* has"),
    "filled": (of(lambda x: F.pad(x, (1, 1), value=1.0)), r"body: pad .* value=1\.0"),
    "filled module": (lambda: nn.ConstantPad2d(1, 0.5), r"body: ConstantPad2d .* value=0\.5"),
    "reflect pad": (of(lambda x: F.pad(x, (1, 1), mode="reflect")), "body: pad .* mode='reflect'"),
    "mean of all": (of(lambda x: x.mean()), "body: mean has no relevance rule over all"),
    "indices": (of(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), "body: max_pool2d_with_indices has"),
    "indices module": (lambda: nn.MaxPool2d(2, return_indices=True), "body: MaxPool2d .* return_indices=True"),
    "random": (of(F.dropout), "body: dropout .* training=True"),
    "another dtype": (of(lambda x: x.view(torch.int32)), "body: view .* dtype"),
    "tensor argument": (of(lambda x: F.max_pool2d(x, x)), "body: max_pool2d has"),
    "picked": (of(lambda x: x[:, [0, 2]]), "body: getitem has"),
    "permuted": (of(lambda x: x.permute(0, 2, 3, 1)), "body: permute has"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations(name: str) -> None:
    factory, pattern = UNSUPPORTED[name]

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.body(net.relu(net.conv1(x))).mean((2, 3))

    model = Net(forward, conv1=nn.Conv2d(3, 4, 1), relu=nn.ReLU(), body=factory()).eval()
    with pytest.raises(TraceError, match=f"(?s){pattern}.*Supported: "):
        trace(model)


def test_old_weight_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        convolution = nn.utils.weight_norm(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.warns(UserWarning, match="hooks"), pytest.raises(TraceError, match=r"0\.weight is no param"):
        trace(model)


def test_squeeze_and_excitation_of_timm() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("seresnet18").eval()
    with pytest.raises(TraceError, match=r"layer1\.0\.se.* has no relevance rule"):
        trace(model)


def _norm_read_by_others(net: Any, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return head(net, net.bn1(x) + x)


def _norm_of_the_output(net: Any, x: Tensor) -> Tensor:
    x = net.fc(net.conv1(x).mean((2, 3)))
    net.last(x)
    return x


def test_norm_of_what_others_read() -> None:
    with pytest.raises(TraceError, match=r"bn1: BatchNorm2d .* nothing else reads, here it follows conv1 \(Conv2d\)"):
        trace(net(_norm_read_by_others).eval())
    check(randomised(net(_norm_of_the_output, last=nn.BatchNorm1d(5))), (2, 3, 4, 4))


def test_a_model_that_torch_fx_has_traced_is_the_model_itself() -> None:
    """What holds its modules' modules is in training mode, and computes nothing."""
    model = randomised(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(16, 2)).eval())
    again = torch.fx.symbolic_trace(model)
    assert again.get_submodule("0").training
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(LRP(again).explain(x).heatmap, LRP(model).explain(x).heatmap)


def test_training_mode() -> None:
    model = net(lambda net, x: head(net, net.conv1(x)))
    with pytest.raises(TraceError, match=r"training mode .*eval\(\)"):
        trace(model)
    model.eval().bn2.train()
    with pytest.raises(TraceError, match=r"training mode \(bn2\).*eval\(\)"):
        trace(model)
    explainer = LRP(model.eval())
    model.bn2.train()
    with pytest.raises(TraceError, match=r"bn2.*eval\(\)"):
        explainer.explain(torch.randn(1, 3, 4, 4))


def test_outputs_and_inputs() -> None:
    for output in (lambda x: {"out": x}, lambda x: (x, x), lambda x: [x], lambda x: None, lambda x: x.shape):
        with pytest.raises(TraceError, match=r"Net\.forward must return one tensor of logits"):
            trace(net(lambda net, x, output=output: output(head(net, net.conv1(x)))).eval())

    class TwoInputs(nn.Conv2d):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    class AnyInputs(nn.Conv2d):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(*inputs)

    for kind in (TwoInputs, AnyInputs):
        with pytest.raises(TraceError, match=rf"{kind.__name__}\.forward\(.*expected one tensor"):
            trace(kind(3, 4, 1).eval())


def test_what_is_no_module() -> None:
    for model in (lambda x: x, "resnet18", {"weight": torch.ones(1)}, nn.Linear):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got"):
            trace(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit, and inside torch.export
def test_forward_that_cannot_be_seen() -> None:
    model = net(lambda net, x: head(net, net.conv1(x))).eval()
    replaced = copy.deepcopy(model)
    replaced.forward = types.MethodType(lambda self, x: head(self, self.conv1(x).relu()), replaced)
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model, (x,)).module()  # in training mode, and refuses to leave it
    for hidden in (replaced, torch.compile(model), torch.jit.trace(model, x), exported):
        with pytest.raises(TraceError, match="replaced on the object"):
            trace(hidden)


def test_questions_that_tracing_cannot_answer() -> None:
    class Asking(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self.answer(x)

        def answer(self, x: Tensor) -> Tensor:
            return super().forward(x).relu() if isinstance(x, torch.Tensor) else super().forward(x)

    class AskingOtherwise(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu() if torch.is_tensor(x) else super().forward(x)

    for kind in (Asking, AskingOtherwise):
        with pytest.raises(TraceError, match=rf"1 \({kind.__name__}\) asks whether something is a tensor"):
            trace(nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())


def test_questions_that_a_forward_never_asks() -> None:
    """As wrappers for training have in methods of their own."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x)

        def scores(self, x: Tensor) -> Tensor:
            return self.net(x)

        def transfer(self, batch: object) -> object:
            return batch.cuda() if isinstance(batch, torch.Tensor) else batch

    class Deeper(Wrapper):
        def scores(self, x: Tensor) -> Tensor:
            return super().scores(x)

        def predict(self, batch: object) -> object:
            return batch if torch.is_tensor(batch) else None

    assert [step.operation for step in trace(Wrapper().eval()).steps] == [s.operation for s in trace(Deeper().eval()).steps]


def test_a_forward_with_keywords_alone_is_refused() -> None:
    class Keywords(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(TraceError, match=r"Keywords\.forward\(.*expected one tensor"):
        trace(Keywords().eval())


@pytest.mark.parametrize("adds", ["in place", "assigned", "anew"])
def test_a_layer_is_what_its_module_returned(adds: str) -> None:
    """Not what was under its name before it was changed in place."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            if adds == "in place":
                y.add_(x)
                F.relu_(y)
            elif adds == "assigned":
                y += x
                y = F.relu(y)
            else:
                y = (x + y).relu()
            return y

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    plan = trace(model)
    for name in ("2", "3"):
        assert plan.steps[plan.find(name)].operation == "relu" or isinstance(plan.steps[plan.find(name)].layer, Merge)
        assert plan.find(name) > plan.find(f"{name}.norm") == plan.find(f"{name}.conv")
    images = torch.randn(2, 3, 9, 9)
    layers = LRP(model, "conserving").explain(images, layers=("2", "3")).layers
    start = LRP(model, "conserving").explain(images).start
    assert all(torch.allclose(value.flatten(1).sum(1), start, rtol=1e-4) for value in layers.values())


def test_threads_trace_beside_each_other_and_beside_what_runs() -> None:
    """torch.fx changes how every module of the process is called while it traces."""
    models = [CifarResNet(2).eval() for _ in range(3)]
    expected = [[step.name for step in trace(model).steps] for model in models]
    bystander, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 4)
    errors: list[BaseException] = []
    done = threading.Event()

    def again(work: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    def traced(model: nn.Module, names: list[str]) -> None:
        assert [step.name for step in trace(model).steps] == names

    works = [functools.partial(traced, model, names) for model, names in zip(models, expected, strict=True)]
    threads = [threading.Thread(target=again, args=(work,)) for work in (*works, lambda: bystander(x))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        done.wait(1.0)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
    assert bystander(x).shape == (1, 2)


def test_modules_that_are_not_registered() -> None:
    hidden = [nn.Conv2d(4, 4, 1)]
    with pytest.raises(TraceError, match="not installed as a submodule"):
        trace(net(lambda net, x: head(net, hidden[0](net.conv1(x)))).eval())


@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (lambda net, x: head(net, net.conv1(x)[1:]), "slicing along the batch"),
        (lambda net, x: head(net, net.conv1(x)[..., 1:, :, :, :]), "slicing along the batch"),
        (lambda net, x: head(net, net.conv1(x)[0]), "slicing along the batch"),
        (lambda net, x: head(net, F.pad(net.conv1(x), (0, 0, 0, 0, 0, 0, 1, 0))), "padding along the batch"),
        (lambda net, x: net.conv1(x).mean(1).flatten(1), "mean has a relevance rule over space only"),
        (lambda net, x: net.conv1(x).mean((-3, 2)), "mean has a relevance rule over space only"),
        (lambda net, x: net.conv1(x).reshape(-1, 5), "does not keep the batch first"),
        (lambda net, x: F.adaptive_avg_pool1d(net.fc(net.conv1(x).mean((2, 3))), 2), "pooling over 1 axes needs"),
        (lambda net, x: head(net, net.conv1(x) + net.conv1(x)[:, :1]), "the branches differ in shape"),
        (lambda net, x: net.conv1(x), "output must be N x classes"),
    ],
)
def test_what_only_shapes_show(forward: Forward, pattern: str) -> None:
    model = net(forward).eval()
    plan = trace(model)
    with pytest.raises(ValueError, match=pattern):
        plan.shapes((2, 3, 5, 6), parameter_table(model, plan))


# Names and signs ----------------------------------------------------------------------------------------------------


def test_names_of_modules_and_containers() -> None:
    model = built(lambda: torchvision.models.resnet18(num_classes=10))
    plan = trace(model)
    x, found = torch.randn(1, 3, 33, 40, dtype=torch.float64), {}
    for path in ("layer1", "layer4.1", "layer2.0.downsample", "maxpool", "layer3.0.bn1", "fc", "avgpool"):
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: found.update({path: y.clone()}))
    with torch.no_grad():
        model(x)
        values = reference.forward(plan, parameter_table(model, plan), x)
    assert len(found) == 7
    for path, value in found.items():
        torch.testing.assert_close(values[plan.find(path)], value, rtol=1e-9, atol=1e-9)
    assert plan.steps[plan.find("layer1.0.conv2")].module_type is nn.Conv2d
    assert plan.find("input") == 0


def test_names_of_repeated_calls() -> None:
    model = randomised(net(_shared_modules))
    plan = trace(model)
    linear = [step.name for step in plan.steps if isinstance(step.layer, Linear)]
    assert linear == ["conv1", "conv2", "conv2:1", "fc"]
    assert plan.find("conv2:0") < plan.find("conv2:1") == plan.find("conv2")
    assert [plan.find(f"relu:{call}") for call in range(3)] == [2, 4, 6]


def test_names_that_are_not_there() -> None:
    with torch.device("meta"):
        plan = trace(torchvision.models.resnet101().eval())
    for wrong, near in (("layer3.22.conv9", "layer3.22.conv1"), ("Layer4", "layer4"), ("fcc", "fc")):
        with pytest.raises(ValueError, match=rf"no layer named '{wrong}'.*\b{near}\b"):
            plan.find(wrong)


def test_signs_that_are_known() -> None:
    model = built(lambda: torchvision.models.resnet50(num_classes=10))
    plan = trace(model)
    signs = {step.name: step.nonnegative for step in plan.steps}
    assert signs["maxpool"]
    assert signs["layer1.0.relu:1"]
    assert signs["avgpool"]
    assert not signs["input"]
    assert not signs["layer1.0.conv3"]
    assert not signs["fc"]
    cifar = trace(CifarResNet().eval())
    assert all(step.nonnegative for step in cifar.steps if isinstance(step.layer, Pad))


def test_copies_of_a_model_are_not_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2)).eval()
    with pytest.raises(TraceError, match=r"give the model itself, its \.module"):
        trace(nn.DataParallel(model).eval())
    with pytest.raises(TraceError, match=r"give the model itself, its \.module"):
        trace(nn.DataParallel(model).train())
    model.eval()
