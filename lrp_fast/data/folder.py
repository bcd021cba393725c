"""A folder of pictures: one subfolder for each class, or no classes."""

from __future__ import annotations

import os
from pathlib import Path

from lrp_fast.images import find_images

from .source import NO_LABEL, FileSource, SourceError


def folder_source(path: Path, exclude: Path | None = None) -> FileSource:
    """The pictures in a folder, sorted by path; each one's key is its path from there.

    If all lie in subfolders, those of the first level are the classes, numbered in sorted order; otherwise there are no
    labels. What counts as a picture is decided as by :func:`lrp_fast.images.find_images`.
    """
    if not path.is_dir():
        raise SourceError(f"{path} is not a folder")
    paths = find_images([path], exclude)
    parts = [file.relative_to(path).parts for file in paths]
    keys = [os.fsencode("/".join(each)).decode("utf-8", "backslashreplace") for each in parts]
    if any(len(each) == 1 for each in parts):
        return FileSource("folder", paths, keys, [NO_LABEL] * len(paths))
    classes = sorted({key.split("/")[0] for key in keys})
    numbers = {name: number for number, name in enumerate(classes)}
    return FileSource("folder", paths, keys, [numbers[key.split("/")[0]] for key in keys], classes)
