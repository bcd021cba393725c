"""RISE: randomized input sampling for explanation (Petsiuk, Das and Saenko, BMVC 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .method import PreparedMethod, check_counts


@dataclass(frozen=True)
class Rise(PreparedMethod[nn.Module]):
    """``S = Σ_i p_c(x ∘ M_i) M_i / (masks · probability)``: how likely the class is where a pixel is seen (§3.1).

    A mask M_i is a ``grid`` × ``grid`` one whose cells are 1 with ``probability`` and 0 otherwise, upsampled bilinearly
    to one cell more than the image and cropped at a random shift within a cell (§3.2). p_c is the softmax probability;
    hidden pixels are 0 in the network's units, the mean colour. All images see the same masks, drawn from ``seed``;
    ``batch_size`` masked pictures are computed at a time.
    """

    masks: int = 500
    grid: int = 7
    probability: float = 0.5
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(masks=self.masks, grid=self.grid, batch_size=self.batch_size)
        if not 0 < self.probability <= 1:
            raise ValueError(f"the probability of a cell lies in (0, 1], got {self.probability}")

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    @torch.no_grad()
    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        maps = images.new_zeros(len(images), *images.shape[-2:])
        cells, shifts = self._draw(images)
        for chosen in torch.arange(self.masks).split(self.batch_size):
            masks = self._upsampled(cells[chosen], shifts[chosen], images)  # B×H×W
            for image, label, heatmap in zip(images, target, maps, strict=True):
                score = state(image * masks[:, None]).softmax(1)[:, label]
                heatmap += (score[:, None, None] * masks).sum(0)
        return maps / (self.masks * self.probability)

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of all masks, masks × 1 × grid × grid, and their shifts in pixels, masks × 2."""
        generator = torch.Generator().manual_seed(self.seed)
        cells = torch.rand(self.masks, 1, self.grid, self.grid, generator=generator) < self.probability
        share = torch.rand(self.masks, 2, generator=generator)
        return cells.to(images), (share * torch.tensor(self._cell(images))).long()

    def _cell(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        return math.ceil(height / self.grid), math.ceil(width / self.grid)

    def _upsampled(self, cells: Tensor, shifts: Tensor, images: Tensor) -> Tensor:
        """Masks B×H×W of cells B × 1 × grid × grid."""
        height, width = images.shape[-2:]
        size = [(self.grid + 1) * side for side in self._cell(images)]
        large = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)[:, 0]
        places = zip(large, shifts.tolist(), strict=True)
        return torch.stack([mask[top : top + height, left : left + width] for mask, (top, left) in places])
