"""The embedded network: a narrow ResNet of basic and bottleneck blocks, written out in torch, with committed weights.

Modules are named, ordered and wired like torchvision's ResNet, so that whatever handles this network handles those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .drawing import CLASSES

WEIGHTS_PATH = Path(__file__).parent / "assets" / "weights.safetensors"
MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
STD: tuple[float, float, float] = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip: [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a skip: [N, inputs, H, W] to [N, 4 * width, H / stride, W / stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class EmbeddedResNet(nn.Module):
    """Images float [N, 3, H, W], normalised by ``MEAN`` and ``STD`` (trained at 224 x 224), to logits [N, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(24, 24, 1), BasicBlock(24, 24, 1))
        self.layer2 = nn.Sequential(BasicBlock(24, 48, 2), BasicBlock(48, 48, 1))
        self.layer3 = nn.Sequential(Bottleneck(48, 48, 2), Bottleneck(192, 48, 1))
        self.layer4 = nn.Sequential(Bottleneck(192, 64, 2), Bottleneck(256, 64, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(256, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def embedded_network(pretrained: bool = True) -> nn.Module:
    """The embedded network in eval mode on the CPU, in float32; with the committed weights, or freshly initialised.

    Raises FileNotFoundError if the weights are missing and RuntimeError if they do not fit the network exactly.
    """
    network = EmbeddedResNet()
    if pretrained:
        load_weights(network, WEIGHTS_PATH)
    return network.eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``network``, every name and shape required to match; halves become float32.

    Raises FileNotFoundError if there is no such file and RuntimeError if names or shapes differ.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: make them with `python -m lrp_fast.embedded.training`")
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)


def save_weights(network: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Write the network's parameters and buffers as safetensors; each metadata value is stored as JSON."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


def weights_metadata(path: Path = WEIGHTS_PATH) -> dict[str, Any]:
    """What the weights file says of itself: classes, validation accuracy, mean, std and the training arguments."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def network_input(images: npt.NDArray[np.uint8]) -> Tensor:
    """Images uint8 [N, H, W, 3] in 0 to 255 to the network's input, float32 [N, 3, H, W], normalised.

    Raises ValueError for another shape or dtype.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255.0
    return (scaled - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The skip's 1x1 convolution where the block changes shape, else None (the identity)."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
