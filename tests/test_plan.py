"""Plans: shapes without values, errors for inputs that do not fit, zeros by structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_fast import reference
from lrp_fast.layers import Merge
from lrp_fast.plan import Plan
from lrp_fast.trace import trace
from lrp_fast.watch import parameter_table
from tests.networks import CifarResNet


class Small(nn.Module):
    """A pooled residual network whose head wants a feature map of 2×2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, 2, 1)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1)
        self.conv3 = nn.Conv2d(4, 4, 3, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        return self.fc(torch.flatten(self.conv3(x), 1))


def traced(model: nn.Module) -> tuple[Plan, dict[str, Tensor]]:
    plan = trace(model.double().eval())
    return plan, parameter_table(model, plan)


@pytest.mark.parametrize("size", [(17, 23), (33, 16), (12, 19), (29, 31)])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_on_odd_sizes(size: tuple[int, int], batch: int) -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 4, 3, 2, 2), nn.MaxPool2d(2, 2, 1), nn.AvgPool2d(3, 2, 1, True), Head())
    cifar_takes_squares = (max(size), max(size))
    for model, sides in ((pooled, size), (CifarResNet(blocks=1), cifar_takes_squares)):
        plan, parameters = traced(model)
        x = torch.randn(batch, 3, *sides, dtype=torch.float64)
        values = reference.forward(plan, parameters, x)
        torch.testing.assert_close(values[plan.output], model(x))
        assert plan.shapes((batch, 3, *sides), parameters) == tuple(tuple(value.shape) for value in values)


class Head(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, x.shape[2:]).flatten(1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 4), r"shape \(2, 3, 4, 4\) does not fit the model: conv3 \(Conv2d\) gets \(2, 4, 1, 1\)"),
        # Torch 2.11 lets a convolution make an image of height 0, which the pool then refuses.
        ((2, 3, 2, 19), r"shape \(2, 3, 2, 19\) does not fit the model: (conv1 \(Conv2d\)|pool \(MaxPool2d\)) gets"),
        ((2, 3, 40, 40), r"shape \(2, 3, 40, 40\) does not fit the model: fc \(Linear\) gets \(2, 64\)"),
        ((2, 1, 20, 20), r"expected inputs of shape N x 3 x H x W, got shape \(2, 1, 20, 20\) \(conv1\)"),
        ((3, 20, 20), r"expected inputs of shape N x 3 x H x W, got shape \(3, 20, 20\)"),
        ((2, 3, 20, 20, 20), r"expected inputs of shape N x 3 x H x W, got shape \(2, 3, 20, 20, 20\)"),
        ((2, 3, 0, 20), r"expected inputs of shape N x 3 x H x W, got shape \(2, 3, 0, 20\)"),
        ((), r"expected inputs of shape N x 3 x H x W, got shape \(\)"),
    ],
)
def test_inputs_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    plan, parameters = traced(Small())
    assert plan.shapes((2, 3, 20, 22), parameters)[plan.output] == (2, 5)
    with pytest.raises(ValueError, match=message):
        plan.shapes(shape, parameters)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten()), (2, 3, 9), "N x 2 x L"),
        (nn.Sequential(nn.Conv3d(4, 6, 3, groups=2), nn.Flatten()), (2, 2, 5, 5, 5), "N x 4 x D x H x W"),
        (nn.Sequential(nn.Linear(7, 3)), (2, 6), r"N x 7, got shape \(2, 6\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (2, 3, 2, 3), r"1 \(Linear\) gets \(2, 18\)"),
        (nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(3, 4, 1), nn.Flatten()), (1, 3, 3, 3), r"0 \(MaxPool2d\) gets"),
        (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Flatten()), (3, 8, 8), "0 .AvgPool2d. gets"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), (2, 3, 8), "0 .AdaptiveAvgPool2d."),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()), (3, 8, 8), "1 .Conv2d. gets"),
    ],
)
def test_other_inputs_that_do_not_fit(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    plan, parameters = traced(model)
    with pytest.raises(ValueError, match=message):
        plan.shapes(shape, parameters)


def test_readers_and_stems() -> None:
    plan, _ = traced(Small())
    names = [step.name for step in plan.steps]
    assert names == ["input", "conv1", "relu", "pool", "conv2", "add", "relu:1", "conv3", "flatten", "fc"]
    assert plan.consumers() == ((1,), (2,), (3,), (4, 5), (5,), (6,), (7,), (8,), (9,), ())
    assert plan.stems == {1}
    assert plan.output == 9


def test_stems_behind_pools_and_in_parallel() -> None:
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.late = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.left(F.avg_pool2d(x, 2)) + self.right(x)).mean((2, 3))

    plan, _ = traced(TwoStems())
    assert {plan.steps[step].name for step in plan.stems} == {"left", "right"}


def test_plans_are_frozen() -> None:
    plan, _ = traced(Small())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.output = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.names["conv1"] = 3  # type: ignore[index]


# Zeros by structure -------------------------------------------------------------------------------------------------


def _channels(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))


def _through_relu_and_view(x: Tensor) -> Tensor:
    return F.relu(_channels(x).flatten(2)).view(x.size(0), -1, (x.size(2) + 1) // 2, (x.size(3) + 1) // 2)


def _pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.max_pool2d(F.pad(x, (3, 0, 0, 2, 0, 1)), 2, 1), 2)


def _around_and_cropped(x: Tensor) -> Tensor:
    return F.pad(F.pad(x, (2, 1)), (-1, -1, 1, 0))


def _cropped_away(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1))[..., 1:-1]


def _not_padded(x: Tensor) -> Tensor:
    return x[:, 1:, 1:].clone()


@pytest.mark.parametrize(
    "function", [_channels, _through_relu_and_view, _pooled, _around_and_cropped, _cropped_away, _not_padded]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_structural_zeros(function: Callable[[Tensor], Tensor], batch: int) -> None:
    """They are where the output is 0 whatever the input."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = function(self.conv(x))
            return (x + x).mean((2, 3))

    plan, parameters = traced(Model())
    shape = (batch, 3, 7, 8)
    (merge,) = [step for step in plan.steps if isinstance(step.layer, Merge)]
    seen = []
    for _ in range(40):
        values = reference.forward(plan, parameters, torch.randn(shape, dtype=torch.float64))
        seen.append(values[merge.inputs[0]])
    always = (torch.cat(seen) == 0).all(0, keepdim=True)
    zeros = plan.structural_zeros(merge.inputs[0], plan.shapes(shape, parameters))
    assert (zeros is None) == (not bool(always.any()))
    assert zeros is None or torch.equal(zeros, always)
    assert (zeros is None) == (function in (_cropped_away, _not_padded))


def test_structural_zeros_behind_a_view_with_the_batch_written_into_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4 * 5 * 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.pad(self.conv(x).relu(), (1, 2)).view(2, -1))

    plan, parameters = traced(Model())
    zeros = plan.structural_zeros(plan.steps[plan.output].inputs[0], plan.shapes((2, 3, 5, 5), parameters))
    assert zeros is not None
    assert zeros.shape == (1, 160)
    assert int(zeros.sum()) == 4 * 5 * 3


def test_no_structural_zeros_behind_a_convolution() -> None:
    plan, parameters = traced(CifarResNet(blocks=1))
    shapes = plan.shapes((1, 3, 16, 16), parameters)
    padded = [index for index, step in enumerate(plan.steps) if plan.structural_zeros(index, shapes) is not None]
    assert [plan.steps[index].operation for index in padded] == ["pad", "pad"]
