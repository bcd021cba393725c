"""The pictures of an evaluation: drawn, read and classified once, for all methods."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lrp_fast.data import Source
from lrp_fast.evaluation.options import EvaluationError, EvaluationOptions
from lrp_fast.images import ImageError, decode_image
from lrp_fast.models import LoadedModel
from lrp_fast.report.folder import printable
from lrp_fast.report.gallery import Failure
from lrp_fast.report.scores import METRICS


def draw_sample(source: Source, options: EvaluationOptions) -> list[int]:
    """The indices of the pictures that are evaluated, rising; the same for the same source, limit and seed.

    With ``per_class`` of every class as many as the limit allows for all of them, at most what the smallest one has.
    Raises :class:`EvaluationError` if classes cannot be told apart, or are more than the limit.
    """
    limit = len(source) if options.limit is None else min(options.limit, len(source))
    order = np.random.default_rng(options.seed).permutation(len(source))
    if not options.per_class:
        return sorted(order[:limit].tolist())
    if (source.labels < 0).any():
        raise EvaluationError("the same number of each class needs a label for every picture, which this source lacks")
    classes, counts = np.unique(source.labels, return_counts=True)
    each = min(limit // len(classes), int(counts.min()))
    if each == 0:
        raise EvaluationError(
            f"{limit} pictures cannot hold the same number of each of the {len(classes)} classes: raise the limit, "
            "or go without (--no-per-class)"
        )
    chosen = [order[source.labels[order] == label][:each] for label in classes]
    return sorted(np.concatenate(chosen).tolist())


def match_labels(source: Source, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The model's class of each sample, int64 [N], -1 where the source has no label.

    The source's class names are looked up among the model's and must be written alike; labels that are numbers are used
    as they are. Raises :class:`EvaluationError` naming what does not fit.
    """
    labels = source.labels
    if not source.classes or source.classes == tuple(classes):
        beyond = np.unique(labels[labels >= len(classes)])
        if len(beyond):
            raise EvaluationError(f"label {beyond[0]} is not among the model's {len(classes)} classes")
        return labels
    used = np.unique(labels[labels >= 0])
    numbers = np.full(len(source.classes), -1, dtype=np.int64)
    places: dict[str, list[int]] = {}
    for place, name in enumerate(classes):
        places.setdefault(name, []).append(place)
    missing = [source.classes[label] for label in used if source.classes[label] not in places]
    if missing:
        raise EvaluationError(
            f"the model has no class named {_some(missing)}; the source's classes: {_some(source.classes)}; "
            f"the model's: {_some(classes)}"
        )
    for label in used:
        found = places[source.classes[label]]
        if len(found) > 1:
            raise EvaluationError(
                f"{source.classes[label]!r} is the name of {len(found)} classes of the model ({found}); "
                "give labels as numbers, in a manifest"
            )
        numbers[label] = found[0]
    return np.where(labels < 0, -1, numbers[labels])


def _some(names: Sequence[str], most: int = 6) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


@dataclass(frozen=True, eq=False)
class Sample:
    """The pictures that are evaluated, N of them.

    ``keys``: their names; ``pixels``: uint8 [N, H, W, 3]; ``masks``: bool [N, H, W], all false where the object is not
    known; ``predicted``, ``labels`` and ``targets``: int64 [N], what the network says, the class whose probability is
    measured, and the one explained; ``labelled``: whether ``labels`` are the source's, and not the predicted classes;
    ``skipped``: what could not be read.
    """

    keys: Sequence[str]
    pixels: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    labelled: bool
    skipped: Sequence[Failure]

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """A SHA-256 of everything that is measured on."""
        arrays = (self.pixels, np.packbits(self.masks), self.labels, self.targets)
        digest = hashlib.sha256("\n".join(map(printable, self.keys)).encode())
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_sample(source: Source, loaded: LoadedModel, options: EvaluationOptions) -> Sample:
    """Read, decode and classify the pictures of the sample, on the model's device.

    A picture that cannot be read, or whose mask cannot, is skipped. Raises :class:`EvaluationError` if all are, if labels
    do not fit, or if localisation was asked for without masks.
    """
    indices = draw_sample(source, options)
    labels = match_labels(source, loaded.classes)[indices]
    labelled = bool((labels >= 0).all())
    if not labelled and (labels >= 0).any():
        raise EvaluationError(f"{(labels < 0).sum()} of {len(labels)} pictures have no label; expected all or none")
    if options.target == "label" and not labelled:
        raise EvaluationError("target 'label' needs a source with labels; this one has none")
    kept, pixels, masks, skipped = [], [], [], []
    for place, index in enumerate(indices):
        try:
            image = decode_image(source.read(index))
            mask = source.mask(index, image.size) if "localisation" in options.metrics else None
        except ImageError as error:
            skipped.append(Failure(printable(source.keys[index]), str(error)))
            continue
        kept.append(place)
        pixels.append(np.asarray(loaded.preprocessing.frame(image)))
        shape = pixels[-1].shape[:2]
        masks.append(np.zeros(shape, bool) if mask is None else np.asarray(loaded.preprocessing.frame(mask)) >= 128)
    if not kept:
        raise EvaluationError(f"none of the {len(indices)} pictures can be read; the first: {skipped[0].reason}")
    named = "localisation" in options.metrics and set(options.metrics) != set(METRICS)
    if named and not np.any(masks):
        raise EvaluationError(
            f"metric 'localisation' needs a source with masks; none of the {len(kept)} pictures has one (--masks gives a "
            "folder's)"
        )
    known, shown = labels[kept], np.stack(pixels)
    predicted = _classify(loaded, shown, options.batch_size)
    measured = known if labelled else predicted
    targets = predicted if options.target == "predicted" else known
    keys = [printable(source.keys[indices[place]]) for place in kept]
    return Sample(keys, shown, np.stack(masks), predicted, measured, targets, labelled, skipped)


def _classify(loaded: LoadedModel, pixels: npt.NDArray[np.uint8], batch_size: int) -> npt.NDArray[np.int64]:
    with torch.inference_mode():
        batches = (inputs_of(pixels[part], loaded) for part in batches_of(len(pixels), batch_size))
        return torch.cat([loaded.model(batch).argmax(1) for batch in batches]).cpu().numpy()


def inputs_of(pixels: npt.NDArray[np.uint8], loaded: LoadedModel) -> Tensor:
    """Some pictures uint8 [n, H, W, 3] as the network's input, float32 [n, 3, H, W]; new memory at every call."""
    device = next(loaded.model.parameters()).device
    return torch.stack([loaded.preprocessing.normalize(Image.fromarray(each)) for each in pixels]).to(device)


def batches_of(count: int, size: int) -> Iterator[slice]:
    """The places of ``count`` pictures, ``size`` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
