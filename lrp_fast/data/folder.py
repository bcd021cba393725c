"""A folder of pictures: one subfolder for each class, or no classes."""

from __future__ import annotations

from pathlib import Path

from lrp_fast.images import find_images

from .masks import FileMasks
from .source import NO_LABEL, FileSource, SourceError, key_of


def folder_source(path: Path, exclude: Path | None = None, masks: Path | None = None) -> FileSource:
    """The pictures in a folder, sorted by path; each one's key is its path from there.

    If all lie in subfolders, those of the first level are the classes, numbered in sorted order; otherwise there are no
    labels. What counts as a picture is decided as by :func:`lrp_fast.images.find_images`. ``masks``: a folder of masks
    with the same names, but for the suffix, which is .png; if it lies in ``path``, it is passed over there.
    """
    for folder in (path, masks):
        if folder is not None and not folder.is_dir():
            raise SourceError(f"{folder} is not a folder")
    paths = find_images([path], exclude)
    if masks is not None:
        paths = [file for file in paths if masks.resolve() not in file.resolve().parents]
    names = [file.relative_to(path) for file in paths]
    keys = [key_of(name) for name in names]
    found = FileMasks([masks / name.with_suffix(".png") for name in names]) if masks is not None and paths else None
    if any(len(name.parts) == 1 for name in names):
        return FileSource("folder", paths, keys, [NO_LABEL] * len(paths), masks=found)
    classes = sorted({key.split("/")[0] for key in keys})
    numbers = {name: number for number, name in enumerate(classes)}
    return FileSource("folder", paths, keys, [numbers[key.split("/")[0]] for key in keys], classes, found)
