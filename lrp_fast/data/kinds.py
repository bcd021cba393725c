"""The kinds of source there are, and which one a path is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .folder import folder_source
from .manifest import manifest_source
from .source import Source, SourceError
from .webdataset import webdataset_source

KINDS: dict[str, Callable[[Path, Path | None], Source]] = {
    "folder": folder_source,
    "manifest": lambda path, exclude: manifest_source(path),
    "webdataset": lambda path, exclude: webdataset_source(path),
}


def open_source(path: Path, kind: str | None = None, exclude: Path | None = None) -> Source:
    """The data set at ``path``; ``kind`` is one of ``KINDS``, by default what the path looks like.

    ``exclude``: a folder that is passed over, because results go there. Raises :class:`SourceError` if the path is not
    such a data set or holds no pictures, ``ValueError`` for an unknown kind.
    """
    if kind is None:
        kind = _kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of source {kind!r}; known: {', '.join(KINDS)}")
    try:
        return KINDS[kind](path, exclude)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if path.suffix.lower() == ".tar":
        return "webdataset"
    if path.suffix.lower() in (".csv", ".parquet"):
        return "manifest"
    raise SourceError(f"{path} is neither a folder nor a .csv, .parquet or .tar file; say what it is with a kind")
