"""Merges under a split, and layers that only rearrange elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.backends.torch.gates import accumulation_dtype
from lrp_fast.layers import Layer, Merge, Pad, Shape, Slice
from lrp_fast.splits import Split


class MergeOperation:
    """A merge under a split, bound to what is constant in its branches."""

    def __init__(self, layer: Merge, split: Split, zeros: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        self.skip, self.split, self.dtype = layer.skip, split, dtype
        self.zeros = zeros if split.complementary else (None, None)
        self.proportional = split.proportional and all(zeros is None for zeros in self.zeros)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, list[Tensor | float]]:
        """The sum and the weights of both branches, in float32."""
        wide = accumulation_dtype(self.dtype)
        branches = (first.to(wide), second.to(wide))
        residual, skip = 1 - self.skip, self.skip
        weights: list[Tensor | float] = [0.0, 0.0]
        weights[residual], weights[skip] = self.split.weights(branches[residual], branches[skip])
        for one, other in ((0, 1), (1, 0)):
            zeros = self.zeros[one]
            if zeros is not None:
                weights[one] = torch.where(zeros, 0.0, weights[one])
                weights[other] = torch.where(zeros, 1.0, weights[other])
        return first + second, weights


def move_back(layer: Layer, relevance: Tensor | None, shape: Shape) -> Tensor | None:
    """The transpose of a rearrangement of elements, onto an input of ``shape`` (without batch)."""
    if relevance is None:
        return None
    if isinstance(layer, Pad):
        return F.pad(relevance, tuple(-amount for amount in layer.amounts))
    if isinstance(layer, Slice):
        whole = relevance.new_zeros(relevance.shape[0], *shape)
        whole[layer.index] = relevance
        return whole
    return relevance.reshape(relevance.shape[0], *shape)
