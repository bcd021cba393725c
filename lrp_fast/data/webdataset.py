"""WebDataset shards: tar files in which members of the same name but for the extension are one sample.

Only raw bytes are read: the format's usual decoder would unpickle members, which can run code.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrp_fast.images import SUFFIXES

from .source import Source, SourceError, Texts, number_labels, read_slice

_LONGEST_LABEL = 1000


@dataclass(frozen=True)
class _Member:
    """Where in its shard a sample's picture lies."""

    shard: int
    key: str
    label: str | None
    offset: int
    size: int


class ShardSource(Source):
    """Samples inside uncompressed tar files, read by their offsets."""

    def __init__(self, shards: list[Path], members: list[_Member]) -> None:
        labels, classes = number_labels([member.label for member in members])
        super().__init__("webdataset", [member.key for member in members], labels, classes)
        self._shards = Texts(map(str, shards))
        self._places = np.array([(member.shard, member.offset, member.size) for member in members], dtype=np.int64)

    def read(self, index: int) -> bytes:
        self._check_index(index)
        shard, offset, size = map(int, self._places[index])
        return read_slice(Path(self._shards[shard]), offset, size, "shard")


def webdataset_source(path: Path) -> ShardSource:
    """The samples of one ``.tar`` file or of all in a folder, in sorted order of shards and in each one's own order.

    A sample's picture is its member with a picture's suffix, its label the text of its ``.cls`` member; its key is
    ``SHARD/NAME``. Samples without a picture are passed over.
    """
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards:
        raise SourceError(f"{path} holds no .tar files")
    return ShardSource(shards, [member for number, shard in enumerate(shards) for member in _index(number, shard)])


def _index(number: int, shard: Path) -> list[_Member]:
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if not member.isreg() or member.issparse():
                    continue
                if f".{extension.lower()}" in SUFFIXES:
                    if name in pictures:
                        raise SourceError(f"{shard} holds two pictures for {name!r}")
                    pictures[name] = (member.offset_data, member.size)
                elif extension == "cls":
                    labels[name] = _label(tar, member)
    except tarfile.TarError as error:
        raise SourceError(f"{shard} is not a whole, uncompressed tar file: {error}") from error
    keys = {name: f"{shard.name}/{name}".encode("utf-8", "surrogateescape") for name in pictures}
    return [
        _Member(number, keys[name].decode("utf-8", "backslashreplace"), labels.get(name), *place)
        for name, place in pictures.items()
    ]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = tar.extractfile(member)
    assert content is not None
    return content.read(_LONGEST_LABEL).decode("utf-8", "backslashreplace").strip()
