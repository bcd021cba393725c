"""CUB-200-2011: birds of 200 species, with boxes, as its archive lays them out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

import numpy as np

from .masks import BoxMasks, FileMasks
from .source import FileSource, Masks, SourceError, key_of

SPLITS = {"test": "0", "train": "1"}
"""What ``train_test_split.txt`` writes for each."""


def cub_source(path: Path, split: str) -> FileSource:
    """The pictures of one split, in the order of ``images.txt``; each one's key is its path from ``images``.

    Masks are those of the folder ``segmentations``, where there is one, and otherwise the boxes of
    ``bounding_boxes.txt``.
    """
    names, classes = _read_table(path / "images.txt"), _read_table(path / "classes.txt")
    for name in names.values():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise SourceError(f"{path / 'images.txt'}: {name!r} lies outside the data set")
    splits = _pick(path / "train_test_split.txt", list(names), SPLITS.values())
    numbers = [number for number, place in zip(names, splits, strict=True) if place == SPLITS[split]]
    order = {identifier: label for label, identifier in enumerate(classes)}
    labels = [order[identifier] for identifier in _pick(path / "image_class_labels.txt", numbers, order)]
    chosen = [PurePosixPath(names[number]) for number in numbers]
    paths, keys = [path / "images" / name for name in chosen], [key_of(name) for name in chosen]
    masks = _masks(path, numbers, chosen) if chosen else None
    return FileSource("cub", paths, keys, labels, list(classes.values()), masks)


def _masks(path: Path, numbers: list[str], names: list[PurePosixPath]) -> Masks:
    folder = path / "segmentations"
    if folder.is_dir():
        return FileMasks([folder / name.with_suffix(".png") for name in names])
    file = path / "bounding_boxes.txt"
    rows = [row.split() for row in _pick(file, numbers)]
    try:
        return BoxMasks(np.array(rows, dtype=np.float64).reshape(len(rows), 4))
    except ValueError as error:
        raise SourceError(f"{file} is not a table of image, left, top, width and height: {error}") from error


def _read_table(file: Path) -> dict[str, str]:
    """Lines of a number and what belongs to it, in order."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not text in UTF-8: {error}") from error
    table: dict[str, str] = {}
    for place, line in enumerate(lines, start=1):
        number, _, rest = line.strip().partition(" ")
        if not rest or number in table:
            raise SourceError(f"{file}, line {place}: expected a number of its own and a text, got {line!r:.100}")
        table[number] = rest.strip()
    return table


def _pick(file: Path, numbers: list[str], known: Collection[str] | None = None) -> list[str]:
    """What a table says of each of these images; ``known``: what it may say."""
    table = _read_table(file)
    missing = next((number for number in numbers if number not in table), None)
    if missing is not None:
        raise SourceError(f"{file} lacks image {missing}")
    picked = [table[number] for number in numbers]
    if known is not None and (strange := set(picked).difference(known)):
        expected = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise SourceError(f"{file} says {min(strange)!r} of an image; expected one of {expected}")
    return picked
