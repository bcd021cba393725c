"""Networks for the tests: random, but with activations of a trained network's size."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_fast import LRP, reference
from lrp_fast.watch import parameter_table


def calibrated(model: nn.Module, seed: int, shape: tuple[int, ...] = (8, 3, 64, 64)) -> nn.Module:
    """Random batch norms of both signs, running statistics measured on noise, and logits of about half a unit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) * 0.7 - 0.1)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1 + 0.05)
                module.momentum = 0.5
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.02)
        model.train()
        for _ in range(5):
            model(torch.randn(shape, generator=generator))
        model.eval()
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        head.weight.mul_(0.5 / model(torch.randn(shape, generator=generator)).std())
    return model


class Block(nn.Module):
    """A residual block: basic, or a bottleneck; a projection where shapes change."""

    def __init__(
        self, kind: Literal["basic", "bottleneck"], inputs: int, planes: int, stride: int, groups: int
    ) -> None:
        super().__init__()
        outputs = planes if kind == "basic" else 2 * planes
        kernels = (3, 3) if kind == "basic" else (1, 3, 1)
        layers: list[nn.Module] = []
        channels = inputs
        for place, kernel in enumerate(kernels):
            last = place == len(kernels) - 1
            strided = stride if kernel == 3 and (kind == "bottleneck" or place == 0) else 1
            width = outputs if last else planes
            shared = groups if kernel == 3 and kind == "bottleneck" else 1
            layers += [
                nn.Conv2d(channels, width, kernel, strided, kernel // 2, groups=shared, bias=False),
                nn.BatchNorm2d(width),
                *([] if last else [nn.ReLU(inplace=True)]),
            ]
            channels = width
        self.branch = nn.Sequential(*layers)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.out = outputs

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.skip(x))


class SmallResNet(nn.Module):
    """Bottleneck and basic blocks, projections at stride 1 and 2, identity skips, a stem with a max-pool."""

    def __init__(self, groups: int = 1, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(
            Block("bottleneck", 16, width, 1, groups), Block("bottleneck", 2 * width, width, 1, groups)
        )
        self.layer2 = nn.Sequential(Block("bottleneck", 2 * width, 20, 2, groups))
        self.layer3 = nn.Sequential(Block("basic", 40, 24, 2, 1), Block("basic", 24, 24, 1, 1))
        self.fc = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class CifarBlock(nn.Module):
    """A basic block with an option-A shortcut: slicing and zero padding."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shrinks = stride != 1 or inputs != planes
        self.extra = planes - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        skip = x
        if self.shrinks:
            skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2), "constant", 0)
        out += skip
        return F.relu(out)


class CifarResNet(nn.Module):
    """A CIFAR ResNet with option-A shortcuts, as in He et al. 2016, §4.2; 3 blocks a stage make ResNet-20."""

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages, inputs = [], 16
        for planes, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(blocks):
                stages.append(CifarBlock(inputs, planes, stride if block == 0 else 1))
                inputs = planes
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def vgg(pool: type[nn.Module] = nn.MaxPool2d, hidden: int = 64, classes: int = 10) -> nn.Sequential:
    """VGG-11 but for its last stage, with batch norm; a small head, with a hidden layer or (0) without one."""
    layers: list[nn.Module] = []
    inputs = 3
    for planes, count in ((64, 1), (128, 1), (256, 2), (512, 2)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
            inputs = planes
        layers.append(pool(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if hidden:
        layers += [nn.Linear(inputs, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden or inputs, classes))


def without_winners(model: nn.Module) -> nn.Module:
    """A torchvision ResNet with an average pool behind its stem."""
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    return model


def errors(got: Tensor, expected: Tensor) -> Tensor:
    """The relative L2 error of each map."""
    difference = (got.double() - expected.double()).flatten(1).norm(dim=1)
    return difference / expected.double().flatten(1).norm(dim=1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of any map."""
    return float(errors(got, expected).max())


def plain_errors(model: nn.Module, explainer: LRP, images: Tensor) -> Tensor:
    """The relative L2 error of each map when the reference's equations are evaluated in the images' dtype: its rounding."""
    plan, composite = explainer.plan, explainer.composite
    expected = LRP(model, composite, backend="reference").explain(images, start="one")
    # In the memory format that ours computes in: a CPU's convolutions round more with their channels last.
    parameters = {
        path: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for path, value in parameter_table(model, plan).items()
    }
    with torch.no_grad():
        values = reference.forward(plan, parameters, images.contiguous(memory_format=torch.channels_last))
        start = F.one_hot(expected.target, values[plan.output].shape[1]).to(images)
        assignments = composite.assign(plan)
        plain = reference.backward(plan, parameters, assignments, composite.batch_norm, values, start).relevance[0]
    assert plain.dtype == images.dtype
    assert expected.relevance is not None
    return errors(plain, expected.relevance)
