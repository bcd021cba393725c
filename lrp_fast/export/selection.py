"""What is exported: the samples of a store that are done, read a slice at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from lrp_fast.store import DONE, RELEVANCE, RELEVANCE_SCALE, Column, Store

SLICE_SAMPLES, SLICE_BYTES = 1024, 1 << 26
"""How many samples, and how many bytes of maps and whole relevance, are read at a time."""
DTYPES = ("float32", "float16")

Floats = npt.NDArray[np.floating[Any]]
Stored = TypeVar("Stored")


class ExportError(Exception):
    """An export that cannot be made; the message says why and what is expected."""


class OptionError(ValueError):
    """An option that the format does not have, or that does not fit it or the store; the message names what does."""


class Format(ABC):
    """A form that a store can be exported in: a frozen dataclass whose fields are its options.

    ``folder``: whether it is a folder or one file; ``summary``: what it is, in a line.
    """

    folder: ClassVar[bool]
    summary: ClassVar[str]

    @abstractmethod
    def write(self, selection: Selection, place: Path) -> Sequence[str]:
        """Write the samples to ``place``, which does not exist yet; returns remarks for whoever asked for it.

        Raises :class:`ExportError` if that cannot be done, :class:`OptionError` for options that do not fit the store.
        """

    @abstractmethod
    def owns(self, place: Path) -> bool:
        """Whether all of what is there was written by an export, so that a new one may replace it unasked."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Some of the samples, in order: the exported ones from ``first`` on.

    ``places``: where they are in the store, int64 [n]; ``label`` (-1: none) and ``target`` int64 [n]; ``probability`` and
    ``leak`` float32 [n]; ``heatmap`` float32 [n, H, W]; ``channels``: layer → float32 [n, C]; ``relevance``: layer →
    float32 [n, C, H, W].
    """

    first: int
    places: npt.NDArray[np.int64]
    key: list[str]
    label: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    leak: npt.NDArray[np.float32]
    heatmap: npt.NDArray[np.float32]
    channels: dict[str, npt.NDArray[np.float32]]
    relevance: dict[str, npt.NDArray[np.float32]]

    def numbers(self) -> dict[str, npt.NDArray[Any]]:
        """The fields of one number for each sample."""
        return {"label": self.label, "target": self.target, "probability": self.probability, "leak": self.leak}


class Selection:
    """The samples of a store that are done, at most ``limit``; ``on_progress`` hears how many of how many are written.

    ``places``: where they are in the store, int64; ``left_out``: how many samples failed or are still to be computed.
    Raises :class:`ExportError` if no sample is done.
    """

    def __init__(
        self, store: Store, limit: int | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        done = np.flatnonzero(store.status[:] == DONE)
        if not len(done):
            raise ExportError(f"{store.path}: none of its {len(store)} samples is done, so there is nothing to export")
        self.store, self.places, self.left_out = store, done[:limit], len(store) - len(done)
        self.label: npt.NDArray[np.int64] = self._numbers(store.label)
        self.target: npt.NDArray[np.int64] = self._numbers(store.target)
        self._on_progress = on_progress

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the maps."""
        return self.store.layout.height, self.store.layout.width

    @property
    def classes(self) -> list[str]:
        """The names of the labels, as far as the data set has any."""
        return [str(name) for name in self.store.attributes.get("classes", ())]

    @property
    def model_classes(self) -> list[str]:
        """The names of the model's outputs, which targets number."""
        return [str(name) for name in self.store.attributes.get("model_classes", ())]

    def channels(self, names: Sequence[str] | None) -> dict[str, int]:
        """The layers of those names with their numbers of channels, or all whose channel relevances are stored.

        Raises :class:`OptionError` for another.
        """
        stored = self.store.layout.channels
        return self._layers(stored, stored if names is None else names, "channel relevance")

    def relevance(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The layers of those names with the shapes (C, H, W) of their whole relevance.

        Raises :class:`OptionError` for one whose relevance is not stored.
        """
        return self._layers(self.store.layout.relevance, names, "whole relevance")

    def slices(
        self, channels: Iterable[str] = (), relevance: Iterable[str] = (), low: int = 0, high: int | None = None
    ) -> Iterator[Samples]:
        """The samples ``low`` to ``high`` of the exported ones, with those layers' channel and whole relevances."""
        channels, relevance = list(channels), list(relevance)
        shapes = [self.shape, *self.relevance(relevance).values()]
        for first, places in self._spans(sum(map(prod, shapes)), low, high):
            yield self._read(first, places, channels, relevance)
            self._on_progress(first + len(places), len(self))

    def relevance_slices(self, layer: str, low: int, high: int) -> Iterator[npt.NDArray[np.float32]]:
        """The whole relevance of a layer alone, of the same samples."""
        (shape,) = self.relevance([layer]).values()
        for _, places in self._spans(prod(shape), low, high):
            yield _taken(self.store.relevance[layer], places)

    def about(self) -> dict[str, Any]:
        """What is worth knowing of an export beside its values, as JSON."""
        return {"store": self.store.attributes, "samples": len(self), "left_out": self.left_out}

    def _spans(self, values: int, low: int, high: int | None) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The samples ``low`` to ``high`` a few at a time, for so many float32 values each: the first, and all their places."""
        wanted = self.places[low:high]
        step = min(SLICE_SAMPLES, max(1, SLICE_BYTES // (4 * values)))
        # Steps through the store, not through the samples: few that are done may lie far apart.
        for begin in range(int(wanted[0]), int(wanted[-1]) + 1, step):
            first, last = np.searchsorted(wanted, (begin, begin + step))
            if first < last:
                yield low + int(first), wanted[first:last]

    def _read(
        self, first: int, places: npt.NDArray[np.int64], channels: Sequence[str], relevance: Sequence[str]
    ) -> Samples:
        store = self.store
        return Samples(
            first,
            places,
            [str(key) for key in _taken(store.key, places)],
            self.label[first : first + len(places)],
            self.target[first : first + len(places)],
            _taken(store.probability, places),
            _taken(store.leak, places),
            _taken(store.heatmap, places),
            {name: _taken(store.channels[name], places) for name in channels},
            {name: _taken(store.relevance[name], places) for name in relevance},
        )

    def _layers(self, stored: Mapping[str, Stored], names: Iterable[str], what: str) -> dict[str, Stored]:
        missing = [name for name in names if name not in stored]
        if missing:
            there = f"it has: {', '.join(stored) or 'none'}"
            raise OptionError(f"{self.store.path} holds no {what} of {', '.join(missing)}; {there}")
        return {name: stored[name] for name in names}

    def _numbers(self, column: Column) -> npt.NDArray[np.int64]:
        return column[: int(self.places[-1]) + 1][self.places]


def _taken(column: Column, places: npt.NDArray[np.int64]) -> Any:
    low, high = int(places[0]), int(places[-1]) + 1
    return column[low:high][places - low]


def name_of(names: Sequence[str], number: int) -> str:
    """The name of a class, empty where it has none."""
    return names[number] if 0 <= number < len(names) else ""


def encoded(field: str, values: npt.NDArray[np.float32], dtype: str) -> dict[str, Floats]:
    """Relevance [n, ...] as the fields that it is written as.

    float32: as it is, under its own name. float16: over each sample's largest magnitude, which is float32 [n] under the
    name of :func:`scale_name`: relevance is so small that it would be lost in plain float16.
    """
    if dtype == "float32":
        return {field: values}
    inner = tuple(range(1, values.ndim))
    scale = np.abs(values).max(inner, keepdims=True)
    scaled = values / np.where(scale > 0, scale, np.float32(1))
    return {field: scaled.astype(np.float16), scale_name(field): scale.reshape(-1)}


def scale_name(field: str) -> str:
    """The field that a float16 field is to be multiplied by."""
    return "scale" if field == "heatmap" else field.replace(RELEVANCE, RELEVANCE_SCALE, 1)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
