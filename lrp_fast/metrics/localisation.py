"""Localisation: does the relevance lie on the object? (Zhang et al. 2018; Arras et al. 2022, *CLEVR-XAI*).

All take heatmaps [N, H, W], floating and finite, and masks bool [N, H, W], true on the object (a box is a mask too), and
return a score from 0 to 1 for each image, float64 [N] on the CPU: NaN where the mask is empty, since nothing can be found
there. Tied pixels count by what a random order of them would score on average, so a constant map scores the mask's share
of the image in the pointing game and in relevance rank. They raise ``TypeError`` or ``ValueError`` for what does not fit
or is not finite; the text names the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrp_fast.metrics.checks import check_heatmaps


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether the most relevant pixel lies in the mask, 1 or 0; the share that does if several tie (Zhang et al. 2018, §4).

    There is no margin around the mask; the original game allows 15 pixels.
    """
    relevance, inside = _flat(heatmaps, masks)
    most = relevance == relevance.amax(1, keepdim=True)
    return _scores((most & inside).sum(1).double() / most.sum(1), inside)


def relevance_mass(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Relevance mass accuracy: Σ positive relevance in the mask / Σ positive relevance (Arras et al. 2022, §3.2).

    0 for a map without positive relevance.
    """
    relevance, inside = _flat(heatmaps, masks)
    positive = relevance.double().clamp(min=0)
    within, total = (positive * inside).sum(1), positive.sum(1)
    return _scores(torch.where(total == 0, 0.0, within / total), inside)


def relevance_rank(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy: the share of the K most relevant pixels that lies in the mask (Arras et al. 2022, §3.2).

    K is the mask's area. Pixels tied at the K-th place fill the places left, and count by their share that is in the mask.
    """
    relevance, inside = _flat(heatmaps, masks)
    area = inside.sum(1)
    last = relevance.sort(dim=1, descending=True).values.gather(1, (area - 1).clamp(min=0)[:, None])
    above, tied = relevance > last, relevance == last
    places = area - above.sum(1)
    found = (above & inside).sum(1) + places * (tied & inside).sum(1).double() / tied.sum(1)
    return _scores(found / area, inside)


def _scores(scores: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside.any(1), scores, torch.nan).cpu()


def _flat(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [N, pixels], checked."""
    check_heatmaps(heatmaps)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"expected masks as a bool tensor, got {got}")
    if masks.shape != heatmaps.shape:
        raise ValueError(f"expected masks of the heatmaps' shape {list(heatmaps.shape)}, got {list(masks.shape)}")
    if masks.device != heatmaps.device:
        raise ValueError(f"the masks are on {masks.device} but the heatmaps are on {heatmaps.device}")
    return heatmaps.detach().flatten(1), masks.flatten(1)
