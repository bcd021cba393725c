"""ImageNet 2012 as torchvision lays it out: ``val/WNID/*.JPEG``, ``train/WNID/*.JPEG`` and ``meta.bin``."""

from __future__ import annotations

import pickle
from pathlib import Path

from lrp_fast.models import imagenet_classes

from .source import FileSource, SourceError, key_of

# What torch's reader raises on bytes that are not its own, and torchvision on what it did not write.
_META_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError,
)  # fmt: skip


def imagenet_source(path: Path, split: str) -> FileSource:
    """The pictures of one split, listed by torchvision's own class; each one's key is its path from ``path``.

    Labels count all of ``meta.bin``'s classes in sorted order of their WordNet ids, also where only some have folders, as
    the outputs of ImageNet's networks do. The 1000 classes are named as torchvision names them, others by their first
    synonym. ``meta.bin`` (read as data only) is made by torchvision from the devkit archive where it is missing. Pictures
    are not unpacked here: processes that start together would each see another part of them.
    """
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import load_meta_file

    if not (path / split).is_dir():
        unpack = f"torchvision.datasets.ImageNet({str(path)!r}, {split!r})"
        raise SourceError(f"{path} has no folder {split!r}; {unpack} in Python makes it from ImageNet's archives")
    try:
        dataset = ImageNet(path, split)
        synonyms, _ = load_meta_file(path)
        numbers = {wnid: number for number, wnid in enumerate(sorted(synonyms))}
        classes = imagenet_classes() if len(numbers) == 1000 else tuple(synonyms[wnid][0] for wnid in numbers)
        labels = [numbers[dataset.wnids[label]] for label in dataset.targets]
    except ImportError as error:
        raise SourceError(f"{path}: ImageNet's devkit is read with scipy (pip install scipy): {error}") from error
    except _META_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0]
        raise SourceError(
            f"{path} is not ImageNet as torchvision keeps it: {type(error).__name__}: {reason}"
        ) from error
    paths = [Path(file) for file, _ in dataset.samples]
    return FileSource("imagenet", paths, [key_of(file.relative_to(path)) for file in paths], labels, classes)
