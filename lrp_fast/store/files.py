"""Where the parts of a store lie, whether they are there, and who may write them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lrp_fast.store.layout import STAGING, Layout, StoreError

LOCK = ".lock"
WHOLE_STORE = 1 << 40
"""A byte of the lock file that stands for the store as a whole; the bytes before it are its shards."""


def import_zarr() -> Any:
    """zarr, imported only when a store is opened."""
    try:
        import zarr
    except ImportError as error:
        raise StoreError("a store needs zarr, which is not installed: pip install 'lrp-fast[dataset]'") from error
    return zarr


def chunk_file(path: Path, array: Any, shard: int) -> Path:
    """The file of a shard's samples in an array of the store at ``path``."""
    place = (shard, *([0] * (array.ndim - 1)))
    return path / array.path / array.metadata.encode_chunk_key(place)


def is_lost(path: Path, group: Any, array: Any, shard: int) -> bool:
    """Whether of a shard that was complete an array's file is gone, which zarr would read as zeros."""
    file = chunk_file(path, array, shard)
    # What is there answers at once. Of a shard just being compacted the status comes last, so the file is looked for again.
    return not _is_filled(file) and chunk_file(path, group["status"], shard).exists() and not _is_filled(file)


def unreadable(path: Path, array: Any, shards: Iterable[int], size: int) -> list[Path]:
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


def staged_file(path: Path, batch: int) -> Path:
    """The file of a finished batch whose shard is not complete yet."""
    return path / STAGING / f"{batch:09d}.npz"


def shard_of(file: Path, layout: Layout) -> int | None:
    """Which shard a half-written file belongs to: ``.staging/BATCH.x.partial`` or ``ARRAY/c/SHARD/0.x.partial``."""
    number = file.name if file.parts[0] == STAGING else (*file.parts, "c", "")[(*file.parts, "c").index("c") + 1]
    if not number.split(".")[0].isdecimal():
        return None
    found = int(number.split(".")[0])
    return found // layout.shard_batches if file.parts[0] == STAGING else found


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_begun(path: Path) -> bool:
    """Whether there is a store."""
    return (path / "zarr.json").is_file()


def lock_shards(path: Path, descriptor: int, shards: range) -> None:
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
def only_here(folder: Path) -> Iterator[bool]:
    """Wait until no other process makes a store in this folder; False if it has another name by then: the store's."""
    import fcntl

    folder.mkdir(exist_ok=True)
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, WHOLE_STORE)
        there = folder / LOCK
        yield there.exists() and os.path.samestat(os.fstat(descriptor), there.stat())
    finally:
        os.close(descriptor)
