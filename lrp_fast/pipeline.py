"""From a source to a store: decode in worker processes, explain, write; stop and continue at any moment."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn
from torch.utils.data import DataLoader

from lrp_fast.batches import (
    Batches,
    BatchExplainer,
    Decoded,
    Explained,
    PipelineError,
    Setup,
    find_batch_size,
    layer_shapes,
    on_device,
)
from lrp_fast.data import Source
from lrp_fast.report.folder import safe_cell, write_whole
from lrp_fast.scopes import interruptions_heard_by
from lrp_fast.store import DONE, FAILED, MISSING, WHOLE, Array, Layout, Part, Store, StoreError, StoreWriter
from lrp_fast.version import VERSION

FAILURES = "failures.csv"
STAGES = ("decode", "compute", "write")
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps what processes share."""

OnFailure = Callable[[str, str], None]
"""Hears the key and the reason of every sample that fails."""


@dataclass(frozen=True)
class PipelineOptions:
    """How a data set is explained.

    ``batch_size``: 0 for what a store has already, else what is found to be fastest; ``levels``: heat-quantize the stored
    maps to so many, ``None`` for float16 ones; ``channels``: layers whose channel relevances are stored too;
    ``relevance``: layers whose whole relevance is, ``"input"`` for the pictures'; ``workers``: decoding processes, 0 to
    decode in this one; ``shard_batches``: batches in a shard of the store, 0 for about a thousand samples.
    """

    batch_size: int = 0
    workers: int = 2
    levels: int | None = None
    channels: Sequence[str] = ()
    relevance: Sequence[str] = ()
    retry_failed: bool = False
    shard_batches: int = 0


@dataclass
class Progress:
    """How far a run has come. ``done`` and ``failed`` count all samples of its part, ``fresh`` those it dealt with.

    ``waited``: seconds in which each stage was the one waited for; ``bytes_per_image``: what the store takes, at the end.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    fresh: int = 0
    interrupted: bool = False
    bytes_per_image: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        """Count the time inside as waited for that stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.waited[stage] += time.perf_counter() - begin

    def rate(self) -> float:
        """Images per second of this run; 0 before the first."""
        seconds = sum(self.waited.values())
        return self.fresh / seconds if seconds > 0 else 0.0

    def shares(self) -> dict[str, float]:
        """Each stage's share of the time waited, 0 to 1."""
        seconds = sum(self.waited.values()) or 1.0
        return {stage: self.waited[stage] / seconds for stage in STAGES}

    def take(
        self, keys: Sequence[str], before: Array, status: Array, reasons: Sequence[str], on_failure: OnFailure
    ) -> None:
        """Take a batch into account: its samples' keys, their status before and now, and why those failed that did."""
        fresh = before != DONE
        failed = fresh & (status == FAILED)
        self.fresh += int(fresh.sum())
        self.done += int((fresh & ~failed).sum())
        self.failed += int(failed.sum()) - int((before == FAILED).sum())
        for place in np.flatnonzero(failed).tolist():
            on_failure(keys[place], reasons[place])


OnBatch = Callable[[Progress], None]
"""Hears of every batch that is done."""


class Pipeline:
    """Explains a data set into a store: ``Pipeline(setup, source, options, device).into(path)``.

    ``part``: of several that fill one store. Raises what :class:`~lrp_fast.LRP` raises, and ``ValueError`` for a layer of
    the options that the model does not have.
    """

    def __init__(
        self, setup: Setup, source: Source, options: PipelineOptions, device: torch.device, part: Part = WHOLE
    ) -> None:
        self._setup, self._source, self._options, self._part = setup, source, options, part
        self.explainer = setup.explainer(device)
        self._shapes = layer_shapes(
            self.explainer, (*options.channels, *options.relevance), setup.loaded.preprocessing.crop
        )

    def into(
        self,
        path: Path,
        *,
        on_failure: OnFailure = lambda key, reason: None,
        on_batch: OnBatch = lambda progress: None,
    ) -> Progress:
        """Explain what the store at ``path`` does not hold yet of this part, and write its ``failures.csv``.

        Ctrl-C ends the run early, with everything computed stored; a ``KeyboardInterrupt`` of ``on_batch`` does the same.
        Raises what :class:`~lrp_fast.store.StoreWriter` raises, ``OSError`` if the store cannot be written,
        :class:`PipelineError` if the model or a worker process gives up.
        """
        with StoreWriter(path, *self.store_arguments(path)) as writer:

            def run(pending: Sequence[int], progress: Progress) -> None:
                self._run(writer, pending, progress, on_failure, on_batch)

            return fill(writer, self._options.retry_failed, run)

    def store_arguments(self, path: Path) -> tuple[Any, ...]:
        """What :class:`~lrp_fast.store.StoreWriter` is given after the path.

        The batch size is that of the options, else that of a store at ``path``, else found by measurement.
        """
        given, source = self._options.batch_size, self._source
        layout = self._layout(given or self._batch_size_of(path))
        adopt = () if given else ("batch_size",)
        return (layout, self.settings(), source.keys, source.labels, source.classes, self._part, adopt)

    def _batch_size_of(self, path: Path) -> int:
        if (path / "zarr.json").exists():
            try:
                return Store(path).layout.batch_size
            except StoreError:
                return 1  # what is there is refused, with its reason, when it is opened for writing
        return min(find_batch_size(self.explainer, self._setup.loaded.preprocessing.crop), len(self._source))

    def _layout(self, batch_size: int) -> Layout:
        options, size = self._options, self._setup.loaded.preprocessing.crop
        layout = Layout(
            samples=len(self._source),
            batch_size=batch_size,
            height=size,
            width=size,
            levels=options.levels,
            channels={name: self._shapes[name][0] for name in options.channels},
            shard_batches=options.shard_batches,
            relevance={name: self._shapes[name] for name in options.relevance},
        )
        # Every process of several gets a shard, however small the data set.
        each = max(1, -(-layout.batches // self._part.count))
        return replace(layout, shard_batches=min(layout.shard_batches, each))

    def settings(self) -> dict[str, Any]:
        """Everything that decides what a store holds, beside its layout."""
        explainer, loaded = self.explainer, self._setup.loaded
        on_gpu = explainer.device.type == "cuda"
        return {
            "model": loaded.name,
            "weights_sha256": weights_hash(loaded.model),
            "model_classes": list(loaded.classes),
            **explainer.composite.record(),
            "dtype": str(explainer.dtype).removeprefix("torch."),
            "backend": explainer.backend,
            "device": torch.cuda.get_device_name(explainer.device) if on_gpu else explainer.device.type,
            "preprocessing": asdict(loaded.preprocessing),
            "source": {"kind": self._source.kind, "fingerprint": self._source.fingerprint()},
            "versions": {
                "lrp_fast": VERSION,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                **({"triton": importlib.import_module("triton").__version__} if explainer.backend == "triton" else {}),
            },
        }

    def _run(
        self,
        writer: StoreWriter,
        pending: Sequence[int],
        progress: Progress,
        on_failure: OnFailure,
        on_batch: OnBatch,
    ) -> None:
        """Decode ahead in workers, explain here, bring to the host and write behind: one batch at a time each."""
        explainer = BatchExplainer(self.explainer, writer.layout)
        batches = on_device(self._decoded(pending, writer.layout.batch_size), self.explainer.device)
        behind: Explained | None = None
        with _Behind(writer, self._source, progress, on_failure, on_batch) as writing:
            try:
                for _ in pending:
                    with progress.waiting_for("decode"):
                        decoded = next(batches)
                    with progress.waiting_for("compute"):
                        explained = explainer.explain(decoded)
                    # First this one takes its place: whatever ends the other's writing, this one is written too.
                    behind, ready = explained, behind
                    if ready is not None:
                        writing.put(ready)
            finally:
                if behind is not None:
                    writing.put(behind)

    def _decoded(self, pending: Sequence[int], batch_size: int) -> Iterator[Decoded]:
        batches = Batches(self._source, self._setup.loaded.preprocessing, batch_size)
        workers = min(self._options.workers, len(pending))
        options: dict[str, Any] = {}
        if workers:
            _check_shared_memory(workers, batch_size * 3 * self._setup.loaded.preprocessing.crop**2 * 4)
            # A clean server forks the workers: this process has threads, which a fork of it would leave half-alive.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([Batches.__module__])
            options = {"multiprocessing_context": context, "worker_init_fn": _begin_worker}
        pin = self.explainer.device.type == "cuda"
        sampler: Any = list(pending)
        loader = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin, **options)
        heard: list[bool] = []
        try:
            # Workers that are interrupted while they start look for what is gone by then.
            with interruptions_heard_by(lambda: heard.append(True)):
                if workers:
                    _start_fork_server()
                decoded = iter(loader)
            if heard:
                raise KeyboardInterrupt
            yield from decoded
        # What comes of a worker that was killed, in whatever it was doing.
        except (RuntimeError, OSError, EOFError) as error:
            if heard:  # what interrupts this process has ended those that were starting
                raise KeyboardInterrupt from error
            raise PipelineError(f"a decoding process ended: {(str(error).splitlines() or ['killed'])[0]}") from error


class _Behind:
    """Writes batches in a thread, one while the next is computed."""

    def __init__(
        self, writer: StoreWriter, source: Source, progress: Progress, on_failure: OnFailure, on_batch: OnBatch
    ) -> None:
        self._writer, self._source, self._progress = writer, source, progress
        self._on_failure, self._on_batch = on_failure, on_batch
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing: Future[None] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._thread.shutdown()

    def put(self, explained: Explained) -> None:
        progress, store = self._progress, self._writer.store
        with progress.waiting_for("compute"):
            rows = explained.rows(store.layout)
        self._settle()
        low, high = store.layout.span(explained.batch)
        with progress.waiting_for("write"):
            before = store.status[low:high]
        progress.take(self._source.keys[low:high], before, rows["status"], rows["reason"].tolist(), self._on_failure)
        self._writing = self._thread.submit(self._writer.put, explained.batch, rows)
        self._on_batch(progress)

    def _settle(self) -> None:
        if self._writing is not None:
            with self._progress.waiting_for("write"):
                self._writing.result()


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise :class:`PipelineError` where decoded batches have no room: a worker would lose one and all wait for it."""
    if not SHARED_MEMORY.is_dir():
        return
    # Each worker has two under way, and one is explained while another is copied.
    needed, free = (2 * workers + 2) * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise PipelineError(
            f"{workers} decoding processes need {needed / 1e6:.0f} MB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 1e6:.0f} MB left: take fewer --workers (0: none), a smaller --batch-size, or, in a container, give "
            "it more (docker run --shm-size=8g)"
        )


def _start_fork_server() -> None:
    """Start the server that forks the workers, with Ctrl-C blocked in both: it reaches all processes of a terminal.

    So it is for every other process that somebody has this server fork.
    """
    resource_tracker.ensure_running()  # the server's start begins with this, which would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main one; and end when that is killed.

    A DataLoader's worker looks at its own parent for this, which here is the server that forked it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _say_unless_left_alone
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _say_unless_left_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a connection that the main process, interrupted, has closed, nobody needs to hear."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def weights_hash(model: nn.Module) -> str:
    """A SHA-256 of a model's state dict: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_failures(writer: StoreWriter) -> None:
    """Write a store's ``failures.csv`` (key, label, reason), or remove it where nothing failed.

    It is that of the whole store, also where this process writes a part: the last of several to finish knows all.
    """
    with writer.alone():
        store = Store(writer.path)
        failed = np.flatnonzero(store.status[:] == FAILED).tolist()
        file = store.path / FAILURES
        if not failed:
            file.unlink(missing_ok=True)
            return
        keys, labels, reasons = store.key[:], store.label[:], store.reason[:]
        table = io.StringIO(newline="")
        rows = csv.writer(table)
        rows.writerow(("key", "label", "reason"))
        for index in failed:
            label = "" if labels[index] < 0 else int(labels[index])
            rows.writerow((safe_cell(str(keys[index])), label, safe_cell(str(reasons[index]))))
        write_whole(file, table.getvalue().encode("utf-8"))


def fill(writer: StoreWriter, retry_failed: bool, run: Callable[[Sequence[int], Progress], None]) -> Progress:
    """Have ``run`` compute the pending batches of a store, and leave the store in order however that ends."""
    progress = _progress_of(writer)
    try:
        run(writer.pending(retry_failed), progress)
    except KeyboardInterrupt:
        progress.interrupted = True
    finally:
        writer.finish()
        write_failures(writer)
    after = _progress_of(writer)
    progress.done, progress.failed = after.done, after.failed
    progress.bytes_per_image = bytes_per_image(writer.store)
    return progress


def _progress_of(writer: StoreWriter) -> Progress:
    samples = writer.part.samples(writer.layout)
    status = writer.store.status[samples.start : samples.stop]
    return Progress(len(samples), done=int((status == DONE).sum()), failed=int((status == FAILED).sum()))


def bytes_per_image(store: Store) -> float:
    """What the store takes on the disk for each sample that is not missing."""
    size = sum(_size(file) for file in store.path.rglob("*"))
    return size / max(1, int((store.status[:] != MISSING).sum()))


def _size(path: Path) -> int:
    """The bytes of a file; 0 for a folder, and for what another process has removed since it was listed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
