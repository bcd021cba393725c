"""Controls: maps that know nothing of the network. What does not beat them has explained nothing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .method import check_arguments, checked_heatmaps


@dataclass(frozen=True)
class RandomMap:
    """Uniform noise in [0, 1), the same for the same image and ``seed`` whatever the batch."""

    seed: int = 0

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        check_arguments(model, images, target)
        return checked_heatmaps(torch.stack([self._noise(image) for image in images]), images)

    def _noise(self, image: Tensor) -> Tensor:
        content = image.detach().cpu().contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed))
        return torch.rand(image.shape[-2:], generator=generator)


@dataclass(frozen=True)
class RandomTwoLevels:
    """:class:`RandomMap` cut to two levels: 1 at the ``share`` of pixels with the highest values, 0 elsewhere.

    Under the published insertion and deletion protocol, which moves tied pixels together, it scores as high as a good
    map that is quantized: an improvement by quantization alone must be held against it. Raises ``ValueError`` for a share
    outside (0, 1].
    """

    share: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a part of the pixels, above 0 and at most 1, got {self.share}")

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        noise = RandomMap(self.seed)(model, images, target).flatten(1)
        top = noise.topk(max(1, round(self.share * noise.shape[1])), dim=1).indices
        return torch.zeros_like(noise).scatter_(1, top, 1.0).view(len(images), *images.shape[-2:])


@dataclass(frozen=True)
class Edges:
    """``√(Gx² + Gy²)``, G the Sobel filter's answers to the mean over channels, its border repeated outwards."""

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        check_arguments(model, images, target)
        grey = F.pad(images.detach().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        answers = F.conv2d(grey, torch.stack([across, across.t()])[:, None])  # N×2×H×W
        return checked_heatmaps(answers.norm(dim=1), images)
