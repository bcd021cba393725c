"""What every source of samples is: keys, labels, a fingerprint, and the bytes of one sample."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from lrp_fast.images import MAX_BYTES, ImageError, read_bytes

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


class Masks(ABC):
    """Where the labelled object is in each picture of a source."""

    @abstractmethod
    def mask(self, index: int, size: tuple[int, int]) -> Image.Image | None:
        """As :meth:`Source.mask`."""


class Source(ABC):
    """An ordered list of samples, which can be sent to other processes.

    ``keys``: a text for each sample, all different; ``labels``: int64 [N], -1 where there is none; ``classes``: the
    labels' names, empty where labels are numbers; ``has_masks``: whether it is known where the labelled objects are.
    Raises :class:`SourceError` if there is no sample, or a key twice.
    """

    def __init__(
        self,
        kind: str,
        keys: Sequence[str],
        labels: npt.ArrayLike,
        classes: Sequence[str] = (),
        masks: Masks | None = None,
    ) -> None:
        if not keys:
            raise SourceError(f"the {kind} holds no pictures")
        key, count = Counter(keys).most_common(1)[0]
        if count > 1:
            raise SourceError(f"every sample needs a key of its own, but {key!r} comes {count} times")
        self.kind = kind
        self.keys = Texts(keys)
        self.labels: npt.NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self.has_masks = masks is not None
        self._masks = masks

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one sample's picture file; raises :class:`~lrp_fast.images.ImageError` with the reason."""

    def mask(self, index: int, size: tuple[int, int]) -> Image.Image | None:
        """Where the labelled object of one sample is: 255 on it, 0 elsewhere; ``None`` where that is not known.

        ``size``: width and height in pixels of the decoded picture, before any preprocessing; those of the mask, whose
        mode is ``L``. :meth:`lrp_fast.images.Preprocessing.frame` brings both into the network's form, after which
        values of 128 and more are inside. Raises :class:`~lrp_fast.images.ImageError` for a mask that cannot be read or
        is of another size.
        """
        self._check_index(index)
        mask = None if self._masks is None else self._masks.mask(index, size)
        if mask is not None and mask.size != size:
            got, expected = (f"{width} x {height}" for width, height in (mask.size, size))
            raise ImageError(f"its mask is of {got} pixels, the picture of {expected}")
        return mask

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not among {len(self)} samples")

    def fingerprint(self) -> str:
        """A SHA-256 of the kind, the keys, the labels and the classes, in order.

        Not of the pictures' contents, nor of masks: a damaged file that was repaired is still the same sample. Keys tell
        the splits of a data set and the seeds of drawn pictures apart.
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
        self,
        kind: str,
        paths: Sequence[Path],
        keys: Sequence[str],
        labels: npt.ArrayLike,
        classes: Sequence[str] = (),
        masks: Masks | None = None,
    ) -> None:
        super().__init__(kind, keys, labels, classes, masks)
        self.paths = Texts(map(str, paths))

    def read(self, index: int) -> bytes:
        return read_bytes(Path(self.paths[index]))


def key_of(path: PurePath) -> str:
    """A path within a data set as a key: slashes, and what is no text in it written out (``\\xff``)."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def read_slice(file: Path, offset: int, size: int, what: str) -> bytes:
    """``size`` bytes of a file that holds many samples; raises :class:`~lrp_fast.images.ImageError`, calling it ``what``."""
    if size > MAX_BYTES:
        raise ImageError(f"too large: {size / 1e6:.0f} MB, and the limit is {MAX_BYTES / 1e6:.0f}")
    try:
        with open(file, "rb") as opened:
            opened.seek(offset)
            content = opened.read(size)
    except OSError as error:
        raise ImageError(f"its {what} cannot be read: {error}") from error
    if len(content) < size:
        raise ImageError(f"its {what} ends after {len(content)} of {size} bytes")
    return content


def number_labels(texts: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """Labels as numbers, -1 for none, and the classes' names: sorted, or none where all labels are numbers already.

    Among numbers "-1" is none too, as in a store.
    """
    if all(text == str(NO_LABEL) or text.isdecimal() for text in texts if text):
        texts = [None if text == str(NO_LABEL) else text for text in texts]
    given = {text for text in texts if text}
    if all(text.isdecimal() and text.isascii() and len(text) < 19 for text in given):
        return [int(text) if text else NO_LABEL for text in texts], []
    classes = sorted(given)
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[text] if text else NO_LABEL for text in texts], classes
