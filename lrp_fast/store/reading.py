"""A store opened for reading."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrp_fast.store.files import import_zarr, is_lost, staged_file, unreadable
from lrp_fast.store.layout import (
    CHANNELS,
    DONE,
    FORMAT,
    FORMAT_VERSION,
    RELEVANCE,
    RELEVANCE_SCALE,
    STAGING,
    Array,
    Layout,
    Rows,
    StoreError,
)


class Column:
    """One field of all samples: ``column[i]``, ``column[i:j]`` and ``len(column)``; a slice is read when asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self._read(place, place + 1)[0]
        wanted = range(len(self))[index]
        if not wanted:
            return self._read(0, 0)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        return self._read(low, high)[np.asarray(wanted) - low]

    def _read(self, low: int, high: int) -> Array:
        return self._store.rows((self._name,), low, high)[self._name]


class Maps(Column):
    """The heatmaps, float32 [N, H, W]: scaled back, or (with levels) each pixel's level."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "heatmap")

    def _read(self, low: int, high: int) -> Array:
        layout = self._store.layout
        return layout.decode(self._store.rows(layout.map_fields(), low, high))


class Relevances(Column):
    """The relevance of one layer, float32 [N, C, H, W] or [N, C], scaled back."""

    def __init__(self, store: Store, layer: str) -> None:
        super().__init__(store, RELEVANCE + layer)
        self._scale = RELEVANCE_SCALE + layer

    def _read(self, low: int, high: int) -> Array:
        rows = self._store.rows((self._name, self._scale), low, high)
        values = rows[self._name].astype(np.float32)
        return values * rows[self._scale].reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True, eq=False)
class Record:
    """One sample: its place and everything stored of it; ``heatmap`` float32 [H, W]."""

    index: int
    key: str
    label: int
    target: int
    probability: float
    leak: float
    status: int
    reason: str
    heatmap: npt.NDArray[np.float32]


class Store:
    """A store opened for reading; also one that is being written or was left unfinished, as far as it has come.

    ``heatmap``, ``label``, ``target``, ``probability``, ``leak``, ``status`` (0 missing, 1 done, 2 failed), ``key``,
    ``reason``, ``channels[LAYER]`` and ``relevance[LAYER]`` are :class:`Column`: what is sliced is read. ``attributes``: the
    settings of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._group = import_zarr().open_group(path, mode="r", zarr_format=3)
            self.attributes: dict[str, Any] = self._group.attrs.asdict()
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is not a store: {error}") from error
        if self.attributes.get("format") != FORMAT or self.attributes.get("format_version") != FORMAT_VERSION:
            got = f"{self.attributes.get('format')!r}, version {self.attributes.get('format_version')!r}"
            raise StoreError(f"{path}: expected {FORMAT!r}, version {FORMAT_VERSION}, got {got}")
        try:
            described = self.attributes["layout"]
            shapes = {name: tuple(shape) for name, shape in described["relevance"].items()}
            self.layout = Layout(**{**described, "relevance": shapes})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(f"{path} does not say how it is laid out: {type(error).__name__}: {error}") from error
        self.heatmap = Maps(self)
        self.key, self.label = Column(self, "key"), Column(self, "label")
        self.target, self.probability = Column(self, "target"), Column(self, "probability")
        self.leak, self.status, self.reason = (Column(self, name) for name in ("leak", "status", "reason"))
        self.channels = {name: Column(self, CHANNELS + name) for name in self.layout.channels}
        self.relevance = {name: Relevances(self, name) for name in self.layout.relevance}
        self._places: dict[str, int] | None = None
        self.staged = {int(file.stem) for file in (path / STAGING).glob("*.npz") if file.stem.isdecimal()}

    def __len__(self) -> int:
        return self.layout.samples

    def __repr__(self) -> str:
        done = int((self.status[:] == DONE).sum())
        return f"Store({str(self.path)!r}: {done} of {len(self)} maps of {self.layout.height} x {self.layout.width})"

    def by_key(self, key: str) -> Record:
        """The sample of that key; ``KeyError`` if there is none. The first call reads all keys."""
        if self._places is None:
            self._places = {each: index for index, each in enumerate(self.key[:].tolist())}
        if key not in self._places:
            raise KeyError(f"no sample has the key {key!r} in {self.path}")
        index = self._places[key]
        numbers = int(self.label[index]), int(self.target[index]), float(self.probability[index])
        last = float(self.leak[index]), int(self.status[index]), str(self.reason[index])
        return Record(index, key, *numbers, *last, self.heatmap[index])

    def dataset(self) -> StoreDataset:
        """The maps that are done, as a torch data set of (heatmap float32 [H, W], label)."""
        return StoreDataset(self)

    def rows(self, names: Sequence[str], low: int, high: int, strict: bool = False) -> Rows:
        """Fields of the samples ``low`` to ``high`` as they are stored, staged batches included.

        A staged file that cannot be read counts as missing, or (``strict``) raises :class:`StoreError`.
        """
        size = self.layout.batch_size
        near = [batch for batch in range(low // size, -(-high // size)) if batch in self.staged]
        computed = [name for name in names if name in self.layout.fields()]
        # Staged ones first: what is compacted meanwhile is in the arrays by then.
        staged: dict[int, Rows] = {}
        for batch in near:
            rows = self.staged_rows(batch, computed)
            if rows is not None:
                staged[batch] = rows
            elif strict:
                file = staged_file(self.path, batch)
                raise StoreError(f"{file} can no longer be read; the same command computes what it held again")
        found = {name: self._stored(name, low, high) for name in names}
        for batch, rows in staged.items():
            start, stop = self.layout.span(batch)
            first, last = max(start, low), min(stop, high)
            for name, values in rows.items():
                found[name][first - low : last - low] = values[first - start : last - start]
        return found

    def _stored(self, name: str, low: int, high: int) -> Array:
        size, again = self.layout.shard_samples, "the same command computes them again"
        try:
            array = self._group[name]
            shards = range(low // size, -(-high // size)) if name in self.layout.fields() else ()
            for shard in shards:
                if is_lost(self.path, self._group, array, shard):
                    first, last = shard * size, min((shard + 1) * size, len(self)) - 1
                    raise StoreError(f"{self.path}: {name!r} of the samples {first} to {last} are gone; {again}")
            return np.asarray(array[low:high])
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            found = f"{self.path}: {name!r} of the samples {low} to {high - 1} cannot be read: {error}"
            files = [] if isinstance(error, KeyError) else unreadable(self.path, array, shards, size)
            way_out = f"; once deleted, {again}: {', '.join(map(str, files))}" if files else ""
            raise StoreError(found + way_out) from error

    def staged_rows(self, batch: int, names: Sequence[str]) -> Rows | None:
        """Fields of what is staged of a batch, or None: nothing, or a file that is damaged."""
        count = len(range(*self.layout.span(batch)))
        try:
            with open(staged_file(self.path, batch), "rb") as opened, np.load(opened, allow_pickle=False) as file:
                rows = {name: file[name] for name in names}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
        if "reason" in rows:
            rows["reason"] = rows["reason"].astype(object)
        return rows if all(len(values) == count for values in rows.values()) else None


class StoreDataset(Dataset[tuple[Tensor, int]]):
    """See :meth:`Store.dataset`; ``indices`` are the places in the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.indices = np.flatnonzero(store.status[:] == DONE)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = int(self.indices[index])
        return torch.from_numpy(self.store.heatmap[place]), int(self.store.label[place])


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open what ``lrp-fast attribute-dataset`` wrote, for reading; nothing but its description is read yet.

    ``store.heatmap[i:j]`` float32 [n, H, W], ``store.by_key(key)``, ``len(store)``, ``store.attributes``,
    ``store.dataset()``. Raises :class:`StoreError` if it is none or zarr is not installed.
    """
    return Store(Path(path))
