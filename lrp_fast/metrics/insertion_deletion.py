"""Insertion, Deletion and their difference ID (Petsiuk et al. 2018, *RISE*; Otsuki et al. 2024, §4), on the device.

An image's n patches are put in falling order of relevance, and masks of more and more of them are formed: insertion
shows only what the mask holds, deletion hides it; what is hidden shows a baseline. A point of a curve is the softmax
probability of the image's label. Both protocols' masks are counts of patches, so a picture is one comparison of the
patches' ranks with a count: a batch of pictures is formed when its turn comes and forgotten after its forward pass.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_fast.heatmap import smooth
from lrp_fast.metrics.checks import Progress, check_count, check_finite, check_heatmaps
from lrp_fast.rules import IMAGENET_MEAN, IMAGENET_STD
from lrp_fast.trace import check_eval

ORDERS = ("rank", "threshold")
BASELINES = ("black", "mean", "blur")
BLUR_SHARE = 10 / 224
"""Standard deviation of the blurred baseline as a share of the shorter side: 10 pixels at 224 (Fong & Vedaldi 2017)."""


@dataclass(frozen=True)
class InsertionDeletion:
    """The curves of N images, float64 on the CPU.

    - ``insertion_curve``, ``deletion_curve``: N × points, the label's probability
    - ``fractions``: points, the share of an image's patches that each mask holds where no two are tied
    - ``weights``: points, what each counts in the area, in all 1
    - ``forward_passes``: how many pictures the model was shown; equal pictures of an image are shown once
    """

    insertion_curve: Tensor
    deletion_curve: Tensor
    fractions: Tensor
    weights: Tensor
    forward_passes: int

    @property
    def insertion(self) -> Tensor:
        """Area under each insertion curve, N, by the trapezoid rule.

        ``"threshold"``: over the points, divided by points − 1, as published. ``"rank"``: over the fractions, so that a
        last step that is shorter counts for less; otherwise noise would score above 0. (With few and uneven steps it
        scores a little below.)
        """
        return self.insertion_curve @ self.weights

    @property
    def deletion(self) -> Tensor:
        """Area under each deletion curve, N, likewise."""
        return self.deletion_curve @ self.weights

    @property
    def id(self) -> Tensor:
        """Insertion − deletion of each image, N."""
        return self.insertion - self.deletion


def insertion_deletion(
    model: nn.Module,
    images: Tensor,
    heatmaps: Tensor,
    labels: Tensor,
    patch: int = 1,
    step: int = 500,
    order: str = "rank",
    baseline: str = "black",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> InsertionDeletion:
    """Insertion and deletion curves of images under their heatmaps.

    Parameters
    ----------
    model
        A classifier in eval mode: N×C×H×W to logits N × classes.
    images
        N×C×H×W, floating, finite, normalised by ``mean`` and ``std``, on the model's device.
    heatmaps
        N×h×w, floating, finite, h ≤ H and w ≤ W. The image's pixel (y, x) has the relevance of the map's element
        (⌊y·h/H⌋, ⌊x·w/W⌋): the nearest neighbour, where the map is coarser than the image.
    labels
        N int64, the class whose probability is the score.
    patch
        Side of a square patch in pixels; those at the lower and right edge may be smaller. A patch counts by its largest
        relevance.
    step
        By how many patches one mask exceeds the one before; fewer than one mask needs to hold all patches.
    order
        ``"rank"``: strictly by relevance, tied patches in a random order; masks of 0, step, 2·step, … and all n patches.
        ``"threshold"`` (the published protocol): mask i of ⌈n/step⌉ holds every patch at least as relevant as the one of
        0-based rank min(step·(i+1), n−1), so that tied patches enter together. It rewards maps of few levels.
    baseline
        What is shown where the image is not: ``"black"`` (0 before normalisation), ``"mean"`` (``mean``, 0 after it) or
        ``"blur"`` (the image under a Gaussian of standard deviation :data:`BLUR_SHARE` × the shorter side, reflected at
        the border).
    seed
        Fixes the order of tied patches: ``numpy.random.default_rng([seed, crc32(image)]).permutation(n)`` lists the patches
        (row by row) as they enter if all are tied, with the checksum of the image's bytes, C×H×W. So an image's order
        is its own, the same in whatever batch it is and whichever map is scored.
    batch_size
        Pictures in one forward pass, and images prepared at a time: memory grows with it, not with N.
    progress
        Called after every batch with the images done (a fraction) and N.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit (see :func:`check_step`), values that are not finite (the text names the samples),
        labels that the model has no class for, a model in training mode.
    """
    check_eval(model)
    for name, value in (("patch", patch), ("step", step), ("batch_size", batch_size)):
        check_count(name, value, 1)
    check_count("seed", seed, 0)
    _check_choice("order", order, ORDERS)
    _check_choice("baseline", baseline, BASELINES)
    _check_tensors(model, images, heatmaps, labels)
    check_step(images.shape[2], images.shape[3], patch, step, order)
    largest = int(labels.max())
    black, layout = _black(images, mean, std), _memory_format(model, images)
    curves, forward_passes = [], 0
    with torch.inference_mode(False), torch.no_grad():
        for start in range(0, len(images), batch_size):
            some, maps, classes = (x[start : start + batch_size].to(images.device) for x in (images, heatmaps, labels))
            falling, ranks = _ranked(some, maps, patch, seed)
            counts, fractions = _counts(falling, step, order)
            pictures = _pictures(counts, falling.shape[1])
            scores = falling.new_empty(len(pictures.image))
            hidden = _hidden(some, baseline, black)
            for first in range(0, len(scores), batch_size):
                part = slice(first, first + batch_size)
                formed = _form(pictures, part, some, hidden, ranks, layout)
                scores[part] = _probability(_logits(model, formed, largest), classes[pictures.image[part]])
                if progress is not None:
                    progress(start + len(some) * min(1, part.stop / len(scores)), len(images))
            forward_passes += len(scores)
            curves.append(scores[pictures.points].cpu())
        (insertion, deletion), fractions = torch.cat(curves, 1), fractions.cpu()
    check_finite("label probabilities", insertion + deletion)
    places = fractions if order == "rank" else torch.linspace(0, 1, len(fractions), dtype=torch.float64)
    return InsertionDeletion(insertion, deletion, fractions, _trapezoid(places), forward_passes)


# From heatmaps to counts of patches.


def _ranked(images: Tensor, heatmaps: Tensor, patch: int, seed: int) -> tuple[Tensor, Tensor]:
    """The patches' relevance as it falls, float64 [N, n], and the rank of each pixel's patch in it, int32 [N, H, W]."""
    device, (height, width) = images.device, images.shape[2:]
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    nearest = heatmaps.double()[:, (y * heatmaps.shape[1] // height)[:, None], x * heatmaps.shape[2] // width]
    patches = F.max_pool2d(nearest[:, None], patch, ceil_mode=True)[:, 0]
    relevance = patches.flatten(1) + 0.0  # -0.0 becomes 0.0: some sorts tell them apart
    ties = torch.stack([_tie_order(image, relevance.shape[1], seed) for image in images]).to(device)
    falling, places = relevance.gather(1, ties).sort(dim=1, descending=True, stable=True)
    positions = torch.arange(relevance.shape[1], dtype=torch.int32, device=device).expand(relevance.shape)
    ranks = torch.empty_like(relevance, dtype=torch.int32).scatter_(1, ties.gather(1, places), positions)
    return falling, ranks.view(patches.shape)[:, (y // patch)[:, None], x // patch]


def _tie_order(image: Tensor, count: int, seed: int) -> Tensor:
    """The order in which an image's patches enter if all are tied, int64 [count] on the CPU."""
    checksum = zlib.crc32(image.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return torch.from_numpy(np.random.default_rng([seed, checksum]).permutation(count))


def _counts(falling: Tensor, step: int, order: str) -> tuple[Tensor, Tensor]:
    """How many patches each mask holds, int64 [N, points], and their share of all without ties, float64 [points].

    Under both protocols the mask that holds c patches is those of rank below c: a mask that tied patches enter together
    holds whole groups of them.
    """
    count = falling.shape[1]
    if order == "rank":
        held = torch.arange(0, count + step, step, device=falling.device).clamp(max=count)
        return held.expand(len(falling), -1), held.double() / count
    last = torch.arange(step, count + step, step, device=falling.device).clamp(max=count - 1)
    held = torch.searchsorted(-falling, -falling[:, last], right=True)
    return held, (last + 1).double() / count


# From counts to pictures.


@dataclass(frozen=True)
class _Pictures:
    """The different pictures that the curves of some images need.

    Picture p shows the ``count[p]`` most relevant patches of image ``image[p]``, or all but these where ``without[p]``;
    both are p × 1 × 1. ``owners`` is ``image`` on the host. ``points``: 2 × N × points, the picture of each point of the
    insertion and the deletion curves.
    """

    image: Tensor
    owners: list[int]
    count: Tensor
    without: Tensor
    points: Tensor


def _pictures(counts: Tensor, patches: int) -> _Pictures:
    """The pictures of masks that hold ``counts`` [N, points] of so many patches."""
    image = torch.arange(len(counts), device=counts.device)[:, None]
    # Hiding nothing shows all, hiding all shows nothing; else a number of its own, above those of insertion.
    without = torch.where(counts == 0, patches, torch.where(counts == patches, 0, patches + counts))
    keys, points = torch.unique(torch.stack([counts, without]) + 2 * patches * image, return_inverse=True)
    image, kind = keys // (2 * patches), (keys % (2 * patches))[:, None, None]
    without = kind > patches
    return _Pictures(image, image.tolist(), torch.where(without, kind - patches, kind), without, points)


def _form(
    pictures: _Pictures, part: slice, images: Tensor, hidden: Tensor, ranks: Tensor, layout: torch.memory_format
) -> Tensor:
    """A batch of pictures B×C×H×W: of ``images`` N×C×H×W, with ``hidden`` N×C×H×W where the image is not shown.

    Image by image, so that nothing but the batch itself is written.
    """
    owners, first = pictures.owners[part], 0
    formed = torch.empty(
        (len(owners), *images.shape[1:]), dtype=images.dtype, device=images.device, memory_format=layout
    )
    for image, run in itertools.groupby(owners):
        rows = slice(first, first + len(list(run)))
        shown = ranks[image] < pictures.count[part][rows]  # [B, H, W]
        shown ^= pictures.without[part][rows]
        torch.where(shown[:, None], images[image], hidden[image], out=formed[rows])
        first = rows.stop
    return formed


def _hidden(images: Tensor, baseline: str, black: Tensor) -> Tensor:
    """The baseline of each image, N×C×H×W."""
    if baseline == "blur":
        return smooth(images, BLUR_SHARE * min(images.shape[2:]))
    return (black if baseline == "black" else torch.zeros_like(black)).expand_as(images)


def _black(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """0 before normalisation, [1, C, 1, 1]."""
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ValueError(f"expected a mean and a positive std for {channels} channels, got {mean} and {std}")
    average, deviation = (torch.tensor(value, dtype=torch.float64) for value in (mean, std))
    return (-average / deviation).to(images).view(1, channels, 1, 1)


# From pictures to scores.


def _logits(model: nn.Module, pictures: Tensor, largest: int) -> Tensor:
    """The model's logits B × classes, checked to have the class ``largest``."""
    with torch.inference_mode():
        logits = model(pictures)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pictures):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected the model to give logits {len(pictures)} x classes, got {got}")
    if largest >= logits.shape[1]:
        raise ValueError(f"label {largest} is out of range: the model has classes 0 to {logits.shape[1] - 1}")
    return logits


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax probability of the labels [B], float64."""
    return logits.double().softmax(1).gather(1, labels[:, None])[:, 0]


def _memory_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Channels last where the images or the model's convolutions are."""
    tensors = [images, *(parameter for parameter in model.parameters() if parameter.ndim == 4)]
    last = any(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in tensors)
    return torch.channels_last if last else torch.contiguous_format


def _trapezoid(places: Tensor) -> Tensor:
    """The weights of the trapezoid rule at ``places`` from 0 to 1, float64 [points]."""
    halves = places.diff() / 2
    return F.pad(halves, (0, 1)) + F.pad(halves, (1, 0))


# Arguments.


def check_step(height: int, width: int, patch: int, step: int, order: str) -> None:
    """Raise ``ValueError`` if one step shows all of a picture: every map would have the same curves.

    That is a step of all patches, or by ``"threshold"``, whose first mask holds one patch more, of all but one.
    """
    patches = -(-height // patch) * -(-width // patch)
    largest = patches - (2 if order == "threshold" else 1)
    if step > largest:
        expected = f"a step of at most {largest}" if largest > 0 else "a smaller patch"
        raise ValueError(
            f"step {step}: one step shows all of a picture of {height} x {width} pixels, {patches} "
            f"{'patches' if patches > 1 else 'patch'} of {patch} x {patch}; expected {expected} ({order} protocol)"
        )


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _check_tensors(model: nn.Module, images: Tensor, heatmaps: Tensor, labels: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"expected images as a floating-point tensor N x C x H x W, normalised, got {got}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"expected images N x C x H x W, at least one, got shape {list(images.shape)}")
    devices = {parameter.device for parameter in model.parameters()} or {images.device}
    if devices != {images.device}:
        raise ValueError(f"the images are on {images.device} but the model is on {', '.join(map(str, devices))}")
    check_finite("images", images)
    check_heatmaps(heatmaps)
    count, _, height, width = images.shape
    if len(heatmaps) != count or heatmaps.shape[1] > height or heatmaps.shape[2] > width:
        raise ValueError(
            f"expected {count} heatmaps of at most {height} x {width}, one for each image, got shape {list(heatmaps.shape)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"expected labels as a tensor of {count} int64, got {got}")
    if labels.shape != (count,):
        raise ValueError(f"expected {count} labels, one for each image, got shape {list(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} is out of range: the first class is 0")
