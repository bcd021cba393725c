"""What every source of samples is: keys, labels, a fingerprint, and the bytes of one sample."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from lrp_fast.images import read_bytes

NO_LABEL = -1


class SourceError(Exception):
    """A data set that cannot be listed; the message says why and what is expected."""


class Texts(Sequence[str]):
    """Many short texts in two arrays: a million of them crowd no memory and are not copied page by page into workers."""

    def __init__(self, texts: Iterable[str]) -> None:
        # File names may hold bytes that are no text; they come back as they were.
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._content = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not among {len(self)} texts")
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class Source(ABC):
    """An ordered list of samples.

    ``keys``: a text for each sample, all different; ``labels``: int64 [N], -1 where there is none; ``classes``: the
    labels' names, empty where labels are numbers. Raises :class:`SourceError` if there is no sample, or a key twice.
    """

    def __init__(self, kind: str, keys: Sequence[str], labels: npt.ArrayLike, classes: Sequence[str] = ()) -> None:
        if not keys:
            raise SourceError(f"the {kind} holds no pictures")
        key, count = Counter(keys).most_common(1)[0]
        if count > 1:
            raise SourceError(f"every sample needs a key of its own, but {key!r} comes {count} times")
        self.kind = kind
        self.keys = Texts(keys)
        self.labels: npt.NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one sample's picture file; raises :class:`~lrp_fast.images.ImageError` with the reason."""

    def fingerprint(self) -> str:
        """A SHA-256 of the kind, the keys, the labels and the classes, in order.

        Not of the pictures' contents: a damaged file that was repaired is still the same sample.
        """
        digest = hashlib.sha256()
        for texts in ([self.kind], self.keys, self.classes):
            for text in texts:
                content = text.encode("utf-8", "surrogateescape")
                digest.update(len(content).to_bytes(8, "little") + content)
            digest.update(b"\xff" * 8)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


class FileSource(Source):
    """Samples that are files of their own; ``paths`` are where, and never what a key says."""

    def __init__(
        self, kind: str, paths: Sequence[Path], keys: Sequence[str], labels: npt.ArrayLike, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(kind, keys, labels, classes)
        self.paths = Texts(map(str, paths))

    def read(self, index: int) -> bytes:
        return read_bytes(Path(self.paths[index]))


def number_labels(texts: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """Labels as numbers, -1 for none, and the classes' names: sorted, or none where all labels are numbers already."""
    given = {text for text in texts if text}
    if all(text.isdecimal() and text.isascii() and len(text) < 19 for text in given):
        return [int(text) if text else NO_LABEL for text in texts], []
    classes = sorted(given)
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[text] if text else NO_LABEL for text in texts], classes
