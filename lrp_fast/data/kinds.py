"""The kinds of source there are, and which one a path is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import cifar10, cub, embedded
from .folder import folder_source
from .imagenet import imagenet_source
from .manifest import manifest_source
from .source import Source, SourceError
from .webdataset import webdataset_source


@dataclass(frozen=True)
class Options:
    """What a source may be told beyond its path.

    ``exclude``: a folder that is passed over, because results go there; ``split``: a part of the data set, one of its
    kind's; ``masks``: a folder of masks.
    """

    exclude: Path | None = None
    split: str = ""
    masks: Path | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of source.

    ``splits``: the parts such a data set has, the default first; ``takes_masks``: whether a folder of masks may be named;
    ``marks``: patterns of names, any one of which in a folder tells that it is of this kind.
    """

    open: Callable[[Path, Options], Source]
    splits: tuple[str, ...] = ()
    takes_masks: bool = False
    marks: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "folder": Kind(lambda path, options: folder_source(path, options.exclude, options.masks), takes_masks=True),
    "manifest": Kind(lambda path, options: manifest_source(path)),
    "imagenet": Kind(
        lambda path, options: imagenet_source(path, options.split),
        splits=("val", "train"),
        marks=("meta.bin", "ILSVRC2012_devkit_t12.tar.gz"),
    ),
    "cifar10": Kind(
        lambda path, options: cifar10.cifar10_source(path, options.split),
        splits=tuple(cifar10.BATCHES),
        marks=(cifar10.FOLDER, cifar10.PICKLED_FOLDER, "batches.meta.txt", "batches.meta"),
    ),
    "cub": Kind(
        lambda path, options: cub.cub_source(path, options.split),
        splits=tuple(cub.SPLITS),
        marks=("image_class_labels.txt",),
    ),
    "webdataset": Kind(lambda path, options: webdataset_source(path), marks=("*.tar",)),
    "embedded": Kind(lambda path, options: embedded.embedded_source(str(path))),
}


def open_source(
    path: str | Path,
    kind: str | None = None,
    exclude: Path | None = None,
    split: str | None = None,
    masks: Path | None = None,
) -> Source:
    """The data set at ``path``, or drawn as ``embedded:COUNT`` or ``embedded:COUNT:SEED`` says.

    ``kind`` is one of ``KINDS``, by default what the path looks like; the others are those of :class:`Options`. Raises
    :class:`SourceError` if the path is not such a data set, holds no pictures, or has no such split or no place for
    masks, ``ValueError`` for an unknown kind.
    """
    path = Path(path)
    if kind is None:
        kind = _kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of source {kind!r}; known: {', '.join(KINDS)}")
    options = _options(kind, Options(exclude, split or "", masks))
    try:
        return KINDS[kind].open(path, options)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _options(kind: str, given: Options) -> Options:
    """The options with the default split; raises :class:`SourceError` for one that the kind does not have."""
    splits = KINDS[kind].splits
    if given.split and given.split not in splits:
        raise SourceError(
            f"a source of kind {kind} has no split {given.split!r}; its splits: {', '.join(splits) or 'none'}"
        )
    if given.masks is not None and not KINDS[kind].takes_masks:
        takers = ", ".join(name for name, each in KINDS.items() if each.takes_masks)
        raise SourceError(f"a source of kind {kind} takes no folder of masks; of kinds that do: {takers}")
    return replace(given, split=given.split or next(iter(splits), ""))


def _kind_of(path: Path) -> str:
    if str(path).startswith(embedded.PREFIX):
        return "embedded"
    if path.is_dir():
        marked = (name for name, each in KINDS.items() if any(any(path.glob(mark)) for mark in each.marks))
        return next(marked, "folder")
    if path.suffix.lower() == ".tar":
        return "webdataset"
    if path.suffix.lower() in (".csv", ".parquet"):
        return "manifest"
    raise SourceError(
        f"{path} is neither a folder nor a .csv, .parquet or .tar file nor {embedded.PREFIX}COUNT; say which kind it is (--kind)"
    )
