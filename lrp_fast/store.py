"""The store of a run over a data set: one Zarr v3 group, written in whole shards, read lazily.

Arrays, one row for each of N samples: ``heatmap`` [N, H, W], float16 of the map over its largest magnitude with that
``scale``, or (with levels) uint8 level indices with each map's ``low`` and ``high``; ``channels/LAYER`` [N, C], relevance
summed over space; ``relevance/LAYER`` [N, C, H, W], float16 over ``relevance_scale/LAYER``; ``key``, ``label`` (-1: none),
``target``, ``probability``, ``leak``, ``status`` and ``reason``.

A finished batch is staged as a file of its own (``.staging``); once all batches of a shard are, they are compacted:
every array's shard is written once, ``status`` last, and the staged files go. What a run has done is therefore on the disk
whenever it is stopped, and a shard whose ``status`` exists is complete. Several processes may write at once, each its own
part: whole shards, which it locks. zarr is imported when a store is opened.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrp_fast.heatmap import from_heat_levels, heat_levels

FORMAT, FORMAT_VERSION = "lrp-fast store", 1
MISSING, DONE, FAILED = 0, 1, 2
SAMPLES_PER_SHARD, BYTES_PER_SHARD = 1024, 1 << 28
STAGING = ".staging"
CHANNELS, RELEVANCE, RELEVANCE_SCALE = "channels/", "relevance/", "relevance_scale/"
INPUT = "input"
"""The name under which the relevance of the pictures themselves is stored, beside those of layers."""
LOCK = ".lock"
MOST_COMPARED = 6
"""How many settings that differ are told with both values; of the others the names."""
_WHOLE_STORE = 1 << 40
"""A byte of the lock file that stands for the store as a whole; the bytes before it are its shards."""

Array = npt.NDArray[Any]
Rows = dict[str, Array]
"""Some samples' values, by field; the first dimension is the sample."""


class StoreError(Exception):
    """A store that cannot be opened or written; the message says why."""


class SettingsError(StoreError):
    """A store was begun with other settings; the message names each with both values."""


@dataclass(frozen=True)
class Layout:
    """The shapes of a store: ``samples`` maps of ``height`` x ``width`` in batches of ``batch_size``.

    ``levels``: of the heat quantization, ``None`` for float16 maps; ``channels``: layer name → number of channels;
    ``shard_batches``: whole batches in a shard, 0 for about a thousand samples; ``relevance``: layer name → shape (C, H, W).
    """

    samples: int
    batch_size: int
    height: int
    width: int
    levels: int | None = None
    channels: Mapping[str, int] = field(default_factory=dict)
    shard_batches: int = 0
    relevance: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_batches == 0:
            widths = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.fields().values()]
            samples = min(SAMPLES_PER_SHARD, BYTES_PER_SHARD // max(widths))
            object.__setattr__(self, "shard_batches", max(1, samples // self.batch_size))

    @property
    def batches(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    @property
    def shards(self) -> int:
        return math.ceil(self.batches / self.shard_batches)

    @property
    def shard_samples(self) -> int:
        return self.shard_batches * self.batch_size

    def span(self, batch: int) -> tuple[int, int]:
        """The samples of a batch, from and to."""
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self.samples)

    def batches_of(self, shard: int) -> range:
        return range(shard * self.shard_batches, min((shard + 1) * self.shard_batches, self.batches))

    def fields(self) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
        """What each sample has that is computed: its dtype and shape (``reason`` is text; ``status`` comes last)."""
        maps: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]
        if self.levels is None:
            maps = {"heatmap": (np.float16, (self.height, self.width)), "scale": (np.float32, ())}
        else:
            ends = {"low": (np.float32, ()), "high": (np.float32, ())}
            maps = {"heatmap": (np.uint8, (self.height, self.width)), **ends}
        layers: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]
        layers = {CHANNELS + name: (np.float32, (count,)) for name, count in self.channels.items()}
        for name, shape in self.relevance.items():
            layers |= {RELEVANCE + name: (np.float16, tuple(shape)), RELEVANCE_SCALE + name: (np.float32, ())}
        numbers = {"target": (np.int64, ()), "probability": (np.float32, ()), "leak": (np.float32, ())}
        return {**maps, **layers, **numbers, "reason": (str, ()), "status": (np.uint8, ())}

    def empty(self, count: int) -> Rows:
        """Rows of that many samples that are missing."""
        return {
            name: _texts(count) if dtype is str else np.zeros((count, *shape), dtype)
            for name, (dtype, shape) in self.fields().items()
        }

    def encode(self, heatmaps: Tensor) -> dict[str, Tensor]:
        """Finite maps [n, H, W] as their stored fields; scaled maps err by at most 2^-11 of a value or 2^-25 of the scale."""
        values = heatmaps.detach().float()
        if self.levels is not None:
            return dict(zip(("heatmap", "low", "high"), heat_levels(values, self.levels, check=False), strict=True))
        return dict(zip(("heatmap", "scale"), _scaled(values), strict=True))

    def encode_relevance(self, layer: str, relevance: Tensor) -> dict[str, Tensor]:
        """Finite relevance [n, C, H, W] of a layer as its stored fields; errors as of scaled maps."""
        scaled, scale = _scaled(relevance.detach().float())
        return {RELEVANCE + layer: scaled, RELEVANCE_SCALE + layer: scale}

    def decode(self, rows: Rows) -> npt.NDArray[np.float32]:
        """The maps float32 [n, H, W] of what :meth:`encode` made."""
        if self.levels is None:
            return rows["heatmap"].astype(np.float32) * rows["scale"][:, None, None]
        index, low, high = (torch.from_numpy(rows[name]) for name in ("heatmap", "low", "high"))
        return from_heat_levels(index, low, high, self.levels).numpy()

    def map_fields(self) -> tuple[str, ...]:
        return ("heatmap", "scale") if self.levels is None else ("heatmap", "low", "high")


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """float16 of the values over each sample's largest magnitude, and that magnitude: plain float16 would underflow."""
    scale = values.flatten(1).abs().amax(1)
    divisor = torch.where(scale > 0, scale, 1.0)
    return (values / divisor.view(-1, *[1] * (values.ndim - 1))).half(), scale


@dataclass(frozen=True)
class Part:
    """The share of one of ``count`` processes that write a store together: part ``index``, whole shards in a row."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"expected a part I/N with 0 <= I < N, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def divided(self, index: int, count: int) -> Part:
        """Part ``index`` of ``count`` of this part."""
        return Part(self.index * count + index, self.count * count)

    def shards(self, layout: Layout) -> range:
        low, high = (layout.shards * each // self.count for each in (self.index, self.index + 1))
        return range(low, high)

    def batches(self, layout: Layout) -> range:
        shards = self.shards(layout)
        low, high = (min(shard * layout.shard_batches, layout.batches) for shard in (shards.start, shards.stop))
        return range(low, high)

    def samples(self, layout: Layout) -> range:
        batches = self.batches(layout)
        low, high = (min(batch * layout.batch_size, layout.samples) for batch in (batches.start, batches.stop))
        return range(low, high)


WHOLE = Part()


def _texts(count: int) -> Array:
    return np.full(count, "", dtype=object)


def _zarr() -> Any:
    """zarr, imported only when a store is opened."""
    try:
        import zarr
    except ImportError as error:
        raise StoreError("a store needs zarr, which is not installed: pip install 'lrp-fast[dataset]'") from error
    return zarr


# Reading.


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
            self._group = _zarr().open_group(path, mode="r", zarr_format=3)
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
                file = _staged_file(self.path, batch)
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
            files = [] if isinstance(error, KeyError) else _unreadable(self.path, array, shards, size)
            way_out = f"; once deleted, {again}: {', '.join(map(str, files))}" if files else ""
            raise StoreError(found + way_out) from error

    def staged_rows(self, batch: int, names: Sequence[str]) -> Rows | None:
        """Fields of what is staged of a batch, or None: nothing, or a file that is damaged."""
        count = len(range(*self.layout.span(batch)))
        try:
            with open(_staged_file(self.path, batch), "rb") as opened, np.load(opened, allow_pickle=False) as file:
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


# Writing.


class StoreWriter:
    """A store opened for writing, begun if it is not there: ``with StoreWriter(path, layout, settings, ...) as writer``.

    ``settings``: everything that decides what is stored, as JSON, nested at will. ``keys``, ``labels``: of all samples.
    ``part``: the shards that this process writes; others may write theirs at the same time, on any machine that sees the
    same files. ``adopt``: names in the layout for which a store's own value is taken, and none is refused; ``layout`` is
    then that of the store.

    Entering raises :class:`SettingsError` if the store was begun with other settings, :class:`StoreError` if the path
    holds something else or another process is writing one of these shards, ``OSError`` if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        settings: Mapping[str, Any],
        keys: Sequence[str],
        labels: npt.NDArray[np.int64],
        classes: Sequence[str] = (),
        part: Part = WHOLE,
        adopt: Sequence[str] = (),
    ) -> None:
        # Behind links: the store is made beside its place and renamed, and to "." or a link nothing can be renamed.
        self.path, self.layout, self.part = path.resolve(), layout, part
        described = {
            **asdict(layout),
            "channels": dict(layout.channels),
            "relevance": {name: list(shape) for name, shape in layout.relevance.items()},
        }
        self._attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": described,
            "classes": list(classes),
            **settings,
        }
        self._keys, self._labels = keys, labels
        self._adopted = {"shard_batches", *adopt}

    def __enter__(self) -> StoreWriter:
        if not _is_begun(self.path):
            if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
                raise StoreError(f"{self.path} exists and is not a store; results need a folder of their own")
            self._create()
        self.store = Store(self.path)
        check_settings(self.path, self.store.attributes, self._attributes, self._adopted)
        self.layout = self.store.layout
        self._shards = self.part.shards(self.layout)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_shards(self.path, self._lock, self._shards)
            self._group = _zarr().open_group(self.path, mode="r+", zarr_format=3)
            self._recover()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def pending(self, retry_failed: bool = False) -> list[int]:
        """The batches of this part still to be computed; with ``retry_failed`` also those with failed samples."""
        samples = self.part.samples(self.layout)
        status = self.store.status[samples.start : samples.stop]
        open_samples = status == MISSING
        if retry_failed:
            open_samples |= status == FAILED
        return sorted(set(((np.flatnonzero(open_samples) + samples.start) // self.layout.batch_size).tolist()))

    def put(self, batch: int, rows: Rows) -> None:
        """Store a batch's rows; on return they are on the disk. Samples that are done already stay as they are."""
        stage(self.store, batch, rows)
        self.take(batch)

    def take(self, batch: int) -> None:
        """Reckon with a batch that was staged, here or by another process; compact its shard if that is complete."""
        self.store.staged.add(batch)
        shard = batch // self.layout.shard_batches
        if set(self.layout.batches_of(shard)) <= self.store.staged:
            self._compact(shard)

    def finish(self) -> None:
        """Compact every shard of this part that has staged batches and misses none."""
        for shard in sorted({batch // self.layout.shard_batches for batch in self.store.staged} & set(self._shards)):
            if self._is_complete(shard) or set(self.layout.batches_of(shard)) <= self.store.staged:
                self._compact(shard)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the other writers of this store waiting where they ask for the same."""
        import fcntl

        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _WHOLE_STORE)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _WHOLE_STORE)

    def _create(self) -> None:
        """Make the store beside its place and rename it, so that a half-made one is never found there.

        Of several processes that begin at once, one makes it, and the others wait for that.
        """
        if self.path == Path.cwd():  # the shell would be left in a folder that is gone
            raise StoreError(f"{self.path} is the folder you are in; give one in it, such as {self.path / 'store'}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.lrp-fast-partial")
        while not _is_begun(self.path):
            with _only_here(partial) as ours:
                if ours and _is_begun(self.path):  # another made it meanwhile, and this folder came after that
                    shutil.rmtree(partial)
                elif ours:
                    self._fill(partial)
                    self._put_in_place(partial)
                    _sync(self.path.parent)

    def _put_in_place(self, partial: Path) -> None:
        try:
            os.rename(partial, self.path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            shutil.rmtree(partial)
            raise StoreError(
                f"a disk is mounted at {self.path}; give a folder in it, such as {self.path / 'store'}"
            ) from error

    def _fill(self, partial: Path) -> None:
        for left_over in partial.iterdir():
            if left_over.is_dir():
                shutil.rmtree(left_over)
            elif left_over.name != LOCK:
                left_over.unlink()
        zarr, layout = _zarr(), self.layout
        group = zarr.create_group(partial, zarr_format=3, attributes=self._attributes)
        for name, (dtype, shape) in layout.fields().items():
            _create_array(group, name, layout, dtype, shape)
        many = max(layout.shard_samples, 65536)  # these are written once, whole
        for name, values, dtype in (
            ("key", np.array(list(self._keys), object), str),
            ("label", self._labels, np.int64),
        ):
            array = group.create_array(name, shape=values.shape, chunks=(many,), dtype=dtype)
            array[:] = values
        with warnings.catch_warnings():
            # One file that describes all arrays spares readers a listing; zarr remarks that version 3 has no such word yet.
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(partial)
        (partial / STAGING).mkdir()
        for file in sorted(partial.rglob("*")):
            if file.name != LOCK:  # to open and close that would unlock it
                _sync(file)

    def _recover(self) -> None:
        """Bring what a stopped run left of this part into order: forget half-written files, compact what is due.

        A shard of which something is gone is not complete: its batches are computed again.
        """
        for file in self.path.rglob("*.partial"):
            if _shard_of(file.relative_to(self.path), self.layout) in self._shards:
                file.unlink()
        for batch in sorted(self.store.staged & set(self.part.batches(self.layout))):
            if self.store.staged_rows(batch, tuple(self.layout.fields())) is None:
                _staged_file(self.path, batch).unlink(missing_ok=True)
                self.store.staged.discard(batch)
        arrays = [self._group[name] for name in self.layout.fields()]
        for shard in self._shards:
            lost = [array for array in arrays if is_lost(self.path, self._group, array, shard)]
            for array in [self._group["status"], *lost] if lost else ():
                chunk_file(self.path, array, shard).unlink(missing_ok=True)
        self.finish()

    def _compact(self, shard: int) -> None:
        batches = self.layout.batches_of(shard)
        low, high = self.layout.span(batches[0])[0], self.layout.span(batches[-1])[1]
        for name in self.layout.fields():  # status last: it says that all the others are there
            with _zarr().config.set({"array.write_empty_chunks": True}):  # what is not there is lost
                array = self._group[name]
            array[low:high] = self.store.rows((name,), low, high, strict=True)[name]
            self._sync_chunk(name, shard, array)
        for batch in batches:
            if batch in self.store.staged:
                self.store.staged.discard(batch)
                _staged_file(self.path, batch).unlink(missing_ok=True)

    def _sync_chunk(self, name: str, shard: int, array: Any) -> None:
        file = chunk_file(self.path, array, shard)
        for path in (file, *[parent for parent in file.parents if self.path / name in (parent, *parent.parents)]):
            _sync(path)

    def _is_complete(self, shard: int) -> bool:
        return chunk_file(self.path, self._group["status"], shard).exists()


def chunk_file(path: Path, array: Any, shard: int) -> Path:
    """The file of a shard's samples in an array of the store at ``path``."""
    place = (shard, *([0] * (array.ndim - 1)))
    return path / array.path / array.metadata.encode_chunk_key(place)


def is_lost(path: Path, group: Any, array: Any, shard: int) -> bool:
    """Whether of a shard that was complete an array's file is gone, which zarr would read as zeros."""
    file = chunk_file(path, array, shard)
    # What is there answers at once. Of a shard just being compacted the status comes last, so the file is looked for again.
    return not _is_filled(file) and chunk_file(path, group["status"], shard).exists() and not _is_filled(file)


def _unreadable(path: Path, array: Any, shards: Iterable[int], size: int) -> list[Path]:
    """The files of these shards that hold what cannot be read."""
    files = []
    for shard in shards:
        try:
            _ = array[shard * size : (shard + 1) * size]
        except (ValueError, RuntimeError, OSError):
            files.append(chunk_file(path, array, shard))
    return files


def _is_filled(file: Path) -> bool:
    """Whether a file holds something: an empty one zarr takes for zeros."""
    return file.exists() and file.stat().st_size > 0


def _create_array(group: Any, name: str, layout: Layout, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """An array of a shard's samples to each file; maps are compressed one by one, so that one can be read alone."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    stored: dict[str, Any] = {"chunks": (layout.shard_samples, *shape)}
    if len(shape) >= 2:
        # Neighbours in a map agree in sign, exponent and first digits: bits of the same place compress together.
        together = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
        stored = {
            "chunks": (1, *shape),
            "shards": (layout.shard_samples, *shape),
            "compressors": [together, Crc32cCodec()],
        }
    fill: Any = "" if dtype is str else 0
    group.create_array(name, shape=(layout.samples, *shape), dtype=dtype, fill_value=fill, **stored)


def stage(store: Store, batch: int, rows: Rows) -> None:
    """Write a batch's rows to a file of its own, from any process; on return it is on the disk.

    Samples that are done already stay as they are. Raises ``OSError`` if it cannot be written.
    """
    low, high = store.layout.span(batch)
    done = store.status[low:high] == DONE
    if done.any():
        before = store.rows(tuple(rows), low, high)
        for name, values in rows.items():
            values[done] = before[name][done]
    file = _staged_file(store.path, batch)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    # An array of objects would be pickled: the reasons become text of fixed width.
    plain = {**rows, "reason": rows["reason"].astype(np.str_)}
    try:
        with open(partial, "wb") as opened:
            np.savez(opened, allow_pickle=False, **plain)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def _staged_file(path: Path, batch: int) -> Path:
    return path / STAGING / f"{batch:09d}.npz"


def _shard_of(file: Path, layout: Layout) -> int | None:
    """Which shard a half-written file belongs to: ``.staging/BATCH.x.partial`` or ``ARRAY/c/SHARD/0.x.partial``."""
    number = file.name if file.parts[0] == STAGING else (*file.parts, "c", "")[(*file.parts, "c").index("c") + 1]
    if not number.split(".")[0].isdecimal():
        return None
    found = int(number.split(".")[0])
    return found // layout.shard_batches if file.parts[0] == STAGING else found


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_begun(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def _lock_shards(path: Path, descriptor: int, shards: range) -> None:
    """Hold shards for this process, until it ends in whatever way; byte i of the lock file is shard i."""
    import fcntl

    if not shards:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, len(shards), shards.start)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise StoreError(f"{path} cannot be locked against other runs: {error}") from error
        raise StoreError(f"another run is writing to {path}, to the same shards of it") from error


@contextlib.contextmanager
def _only_here(folder: Path) -> Iterator[bool]:
    """Wait until no other process makes a store in this folder; False if it has another name by then: the store's."""
    import fcntl

    folder.mkdir(exist_ok=True)
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, _WHOLE_STORE)
        there = folder / LOCK
        yield there.exists() and os.path.samestat(os.fstat(descriptor), there.stat())
    finally:
        os.close(descriptor)


def check_settings(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], adopted: Collection[str] = ()
) -> None:
    """Raise :class:`SettingsError` if what ``path`` was begun with differs, but for the names in ``adopted``.

    Settings may be nested; the error names each that differs, with both values.
    """
    listed = differences(found, wanted, adopted)
    if listed:
        raise SettingsError(f"{path} was begun with other settings, so it cannot be continued with these: {listed}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], adopted: Collection[str] = ()) -> str:
    """The settings that differ, but for the names in ``adopted``, as text: each with both values; empty if none does."""
    there, here = dict(_flat(found)), dict(_flat(wanted))
    names = sorted((there.keys() | here.keys()) - set(adopted))
    names = [name for name in names if there.get(name) != here.get(name)]
    told = [f"{name}: {there.get(name)!r:.200} there, {here.get(name)!r:.200} now" for name in names[:MOST_COMPARED]]
    return "; ".join(told + ([f"and {', '.join(names[MOST_COMPARED:])}"] if names[MOST_COMPARED:] else []))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and plain values; that they belong to the layout goes without saying."""
    if not isinstance(value, Mapping):
        yield name, list(value) if isinstance(value, tuple) else value
        return
    for key, each in value.items():
        prefix = "" if name in ("", "layout") else f"{name}."
        yield from _flat(each, prefix + key)
