"""A store opened for writing, and the batches that any process may stage for it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp_fast.store.files import (
    LOCK,
    WHOLE_STORE,
    chunk_file,
    import_zarr,
    is_begun,
    is_lost,
    lock_shards,
    only_here,
    shard_of,
    staged_file,
    sync,
)
from lrp_fast.store.layout import (
    DONE,
    FAILED,
    FORMAT,
    FORMAT_VERSION,
    MISSING,
    STAGING,
    WHOLE,
    Layout,
    Part,
    Rows,
    StoreError,
)
from lrp_fast.store.reading import Store
from lrp_fast.store.settings import check_settings


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
        if not is_begun(self.path):
            if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
                raise StoreError(f"{self.path} exists and is not a store; results need a folder of their own")
            self._create()
        self.store = Store(self.path)
        check_settings(self.path, self.store.attributes, self._attributes, self._adopted)
        self.layout = self.store.layout
        self._shards = self.part.shards(self.layout)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_shards(self.path, self._lock, self._shards)
            self._group = import_zarr().open_group(self.path, mode="r+", zarr_format=3)
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

        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, WHOLE_STORE)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, WHOLE_STORE)

    def _create(self) -> None:
        """Make the store beside its place and rename it, so that a half-made one is never found there.

        Of several processes that begin at once, one makes it, and the others wait for that.
        """
        if self.path == Path.cwd():  # the shell would be left in a folder that is gone
            raise StoreError(f"{self.path} is the folder you are in; give one in it, such as {self.path / 'store'}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.lrp-fast-partial")
        while not is_begun(self.path):
            with only_here(partial) as ours:
                if ours and is_begun(self.path):  # another made it meanwhile, and this folder came after that
                    shutil.rmtree(partial)
                elif ours:
                    self._fill(partial)
                    self._put_in_place(partial)
                    sync(self.path.parent)

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
        zarr, layout = import_zarr(), self.layout
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
                sync(file)

    def _recover(self) -> None:
        """Bring what a stopped run left of this part into order: forget half-written files, compact what is due.

        A shard of which something is gone is not complete: its batches are computed again.
        """
        for file in self.path.rglob("*.partial"):
            if shard_of(file.relative_to(self.path), self.layout) in self._shards:
                file.unlink()
        for batch in sorted(self.store.staged & set(self.part.batches(self.layout))):
            if self.store.staged_rows(batch, tuple(self.layout.fields())) is None:
                staged_file(self.path, batch).unlink(missing_ok=True)
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
            with import_zarr().config.set({"array.write_empty_chunks": True}):  # what is not there is lost
                array = self._group[name]
            array[low:high] = self.store.rows((name,), low, high, strict=True)[name]
            self._sync_chunk(name, shard, array)
        for batch in batches:
            if batch in self.store.staged:
                self.store.staged.discard(batch)
                staged_file(self.path, batch).unlink(missing_ok=True)

    def _sync_chunk(self, name: str, shard: int, array: Any) -> None:
        file = chunk_file(self.path, array, shard)
        for path in (file, *[parent for parent in file.parents if self.path / name in (parent, *parent.parents)]):
            sync(path)

    def _is_complete(self, shard: int) -> bool:
        return chunk_file(self.path, self._group["status"], shard).exists()


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
    file = staged_file(store.path, batch)
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
    sync(file.parent)
