"""Random networks: layers, blocks and pools drawn with odd settings, where networks that people design have even ones."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import calibrated

CLASSES = 5


class Residual(nn.Module):
    """A branch and a skip, added in either order, with a ReLU behind or none."""

    def __init__(self, draw: random.Random, branch: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip
        self.swapped = draw.random() < 0.5
        self.last = nn.ReLU() if draw.random() < 0.85 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch, skip = self.branch(x), self.skip(x)
        return self.last(skip + branch if self.swapped else branch + skip)


class OptionA(nn.Module):
    """A skip by slicing and zero channels (He et al. 2016, §4.2)."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class Drawing:
    """Draws a network layer by layer; ``biased``: its convolutions may have a bias."""

    def __init__(self, draw: random.Random, biased: bool) -> None:
        self.draw, self.biased, self.pixels = draw, biased, draw.choice([3, 3, 1, 4])
        self.channels = self.pixels

    def convolution(self, outputs: int, stride: int = 1, same: bool = False, relu: bool = True) -> nn.Sequential:
        """Often with a batch norm, and a ReLU; ``same``: its output is as large as its input over the stride."""
        draw = self.draw
        kernel = draw.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (3, 1)] + [(2, 2)] * (not same))
        dilation = draw.choice([1, 1, 1, 2])
        reach = [dilation * (side - 1) // 2 for side in kernel]
        padding = reach if same else [draw.randint(0, side) for side in reach]
        groups = draw.choice([1, 1, 2, 4])
        groups = 1 if self.channels % groups or outputs % groups else groups
        biased = self.biased and draw.random() < 0.3
        layers: list[nn.Module] = [
            nn.Conv2d(self.channels, outputs, kernel, stride, tuple(padding), dilation, groups, biased),
            *([nn.BatchNorm2d(outputs)] if draw.random() < 0.7 else []),
            *([nn.ReLU(draw.random() < 0.5)] if relu else []),
        ]
        self.channels = outputs
        return nn.Sequential(*layers)

    def residual(self, inner: bool = False) -> Residual:
        """A block with an identity, projection or option-A skip, and perhaps a block inside; ``inner``: it keeps all shapes."""
        draw, inputs = self.draw, self.channels
        outputs = inputs if inner else draw.choice([inputs, inputs, 12, 16, 24])
        stride = 1 if inner else draw.choice([1, 1, 2])
        option_a = outputs >= inputs and draw.random() < 0.3
        projects = (stride > 1 or outputs != inputs) and not option_a
        depth = draw.randint(2 if projects else 1, 3)  # of branches that are equally deep neither is the skip
        layers: list[nn.Module] = []
        for place in range(depth - 1):
            layers.append(self.convolution(draw.choice([8, 16, 20]), stride if place == 0 else 1, same=True))
            if not inner and draw.random() < 0.3:
                layers.append(self.residual(inner=True))
        layers.append(self.convolution(outputs, stride if depth == 1 else 1, same=True, relu=False))
        skip: nn.Module = OptionA(stride, outputs - inputs) if option_a else nn.Identity()
        if projects:
            skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return Residual(draw, nn.Sequential(*layers), skip)

    def pool(self) -> nn.Module:
        """A max or average pool."""
        draw = self.draw
        kernel, stride, ceil = draw.choice([2, 3, 4]), draw.choice([1, 2, 2, 3]), draw.random() < 0.4
        padding = draw.randint(0, kernel // 2)
        if draw.random() < 0.5:
            return nn.MaxPool2d(kernel, stride, padding, draw.choice([1, 1, 2]), ceil_mode=ceil)
        return nn.AvgPool2d(kernel, stride, padding, ceil, count_include_pad=draw.random() < 0.5)

    def layers(self) -> nn.Sequential:
        """All before the head."""
        draw = self.draw
        layers: list[nn.Module] = [self.convolution(draw.choice([8, 12, 16, 24]), draw.choice([1, 2]))]
        for _ in range(draw.randint(1, 5)):
            kind = draw.random()
            if kind < 0.6:
                layers.append(self.residual())
            elif kind < 0.8:
                layers.append(self.pool())
            else:
                layers.append(self.convolution(draw.choice([8, 16, 20, 32]), draw.choice([1, 1, 2])))
        return nn.Sequential(*layers)


def random_network(seed: int, biased: bool) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and three images for it; the same for the same seed. ``biased``: convolutions may have a bias."""
    draw = random.Random(seed)
    while True:
        size = (draw.randint(9, 30), draw.randint(9, 30))
        drawing = Drawing(draw, biased)
        layers, images = drawing.layers(), torch.randn(3, drawing.pixels, *size)
        try:
            model = calibrated(_with_head(draw, layers, images), seed, (6, *images.shape[1:]))
        except RuntimeError:  # what was drawn left no pixels
            continue
        if bool(model(images).std() > 0):
            return model, images


def _with_head(draw: random.Random, layers: nn.Sequential, images: Tensor) -> nn.Sequential:
    pool = draw.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d((1, 2)), nn.Identity()])
    body = nn.Sequential(*layers, pool, nn.Flatten()).eval()
    with torch.no_grad():
        features = body(images).shape[1]
    hidden = [nn.Linear(features, 16), nn.ReLU()] if draw.random() < 0.4 else []
    return nn.Sequential(*body, *hidden, nn.Linear(16 if hidden else features, CLASSES, draw.random() < 0.8))
