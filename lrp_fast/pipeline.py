"""From a source to a store: decode in worker processes, explain, write; stop and continue at any moment.

Batch b holds the samples b·B to (b+1)·B, always, the last one padded: a result depends on the batch it is computed in, so
only with a fixed composition does a resumed run give the bits of an uninterrupted one. Where a picture cannot be read, and
beyond the last sample, a stand-in takes the place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lrp_fast.data import Source
from lrp_fast.explain import LRP
from lrp_fast.images import ImageError, Preprocessing, decode_image
from lrp_fast.models import LoadedModel
from lrp_fast.report.folder import safe_cell
from lrp_fast.store import DONE, FAILED, Layout, Rows, Store, StoreWriter
from lrp_fast.trace import parameter_table
from lrp_fast.version import VERSION

FAILURES = "failures.csv"
STAGES = ("decode", "compute", "write")
NOT_FINITE = "its relevance holds values that are NaN or infinite"


class PipelineError(Exception):
    """The run cannot go on; what it has done is kept, and the message says why it stopped."""


@dataclass(frozen=True)
class PipelineOptions:
    """How a data set is explained.

    ``levels``: heat-quantize the stored maps to so many, ``None`` for float16 ones; ``channels``: layers whose channel
    relevances are stored too; ``workers``: decoding processes, 0 to decode in this one; ``shard_batches``: batches in a
    shard of the store, 0 for about a thousand samples.
    """

    batch_size: int = 32
    workers: int = 2
    levels: int | None = None
    channels: Sequence[str] = ()
    retry_failed: bool = False
    shard_batches: int = 0


@dataclass
class Progress:
    """How far a run has come. ``done`` and ``failed`` count all samples, ``fresh`` those this run dealt with.

    ``waited``: seconds in which each stage was the one waited for; ``bytes_per_image``: what the store takes, at the end.
    """

    total: int
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


class Decoded(NamedTuple):
    """A batch ready to be explained: ``inputs`` float32 [B, 3, crop, crop], and each sample's failure, or ''."""

    batch: int
    inputs: Tensor
    reasons: list[str]


class Batches(Dataset[Decoded]):
    """The batches of a source, decoded when asked for, in any process."""

    def __init__(self, source: Source, preprocessing: Preprocessing, batch_size: int) -> None:
        self._source, self._preprocessing, self._batch_size = source, preprocessing, batch_size
        # Noise, not zeros: nothing in it divides zero by zero.
        size = preprocessing.crop
        self._stand_in = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, batch: int) -> Decoded:
        low = batch * self._batch_size
        inputs = self._stand_in.repeat(self._batch_size, 1, 1, 1)
        reasons = []
        for place in range(min(self._batch_size, len(self._source) - low)):
            try:
                image = decode_image(self._source.read(low + place))
                inputs[place] = self._preprocessing.normalize(self._preprocessing.frame(image))
                reasons.append("")
            except ImageError as error:
                reasons.append(str(error))
            except Exception as error:  # whatever one file does, the others go on
                reasons.append(f"{type(error).__name__}: {error}")
        return Decoded(batch, inputs, reasons)


class Pipeline:
    """Explains a data set into a store: ``Pipeline(explainer, loaded, source, options).into(path)``.

    Raises ``ValueError`` for a layer of ``options.channels`` that the model does not have.
    """

    def __init__(self, explainer: LRP, loaded: LoadedModel, source: Source, options: PipelineOptions) -> None:
        self._explainer, self._loaded, self._source, self._options = explainer, loaded, source, options
        size = loaded.preprocessing.crop
        self._layout = Layout(
            samples=len(source),
            batch_size=options.batch_size,
            height=size,
            width=size,
            levels=options.levels,
            channels=_channel_counts(explainer, options.channels, size),
            shard_batches=options.shard_batches,
        )
        self._compute_batch = options.batch_size

    def into(
        self,
        path: Path,
        *,
        on_failure: Callable[[str, str], None] = lambda key, reason: None,
        on_batch: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Explain what the store at ``path`` does not hold yet, and write its ``failures.csv``.

        ``on_failure`` hears the key and reason of every failure, ``on_batch`` of every batch. Ctrl-C
        ends the run early, with everything computed stored. Raises what :class:`~lrp_fast.store.StoreWriter` raises,
        ``OSError`` if the store cannot be written, :class:`PipelineError` if the model or a worker process gives up.
        """
        settings = self.settings()
        arguments = (path, self._layout, settings, self._source.keys, self._source.labels, self._source.classes)
        with StoreWriter(*arguments) as writer:
            pending = writer.pending(self._options.retry_failed)
            progress = _progress_of(writer.store)
            try:
                self._run(writer, pending, progress, on_failure, on_batch)
            except KeyboardInterrupt:
                progress.interrupted = True
            finally:
                writer.finish()
                write_failures(writer.store)
            after = _progress_of(writer.store)
            progress.done, progress.failed = after.done, after.failed
            progress.bytes_per_image = _size(path) / max(1, progress.done)
        return progress

    def settings(self) -> dict[str, Any]:
        """Everything that decides what a store holds, beside its layout."""
        explainer, loaded = self._explainer, self._loaded
        on_gpu = explainer.device.type == "cuda"
        return {
            "model": loaded.name,
            "weights_sha256": weights_hash(loaded.model),
            "composite": explainer.composite.name,
            "splits": str(explainer.composite.splits),
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
            },
        }

    def _run(
        self,
        writer: StoreWriter,
        pending: Sequence[int],
        progress: Progress,
        on_failure: Callable[[str, str], None],
        on_batch: Callable[[Progress], None],
    ) -> None:
        """Decode ahead in workers, explain here, write behind in a thread: one batch at a time each."""
        if not pending:
            return
        batches = self._decoded(pending)
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "store") as thread:
            for _ in pending:
                with progress.waiting_for("decode"):
                    decoded = _next(batches)
                with progress.waiting_for("compute"):
                    rows = self._explain(decoded)
                with progress.waiting_for("write"):
                    if writing is not None:
                        writing.result()
                    self._count(progress, writer.store, decoded.batch, rows, on_failure)
                    writing = thread.submit(writer.put, decoded.batch, rows)
                on_batch(progress)
            with progress.waiting_for("write"):
                assert writing is not None
                writing.result()

    def _count(
        self, progress: Progress, store: Store, batch: int, rows: Rows, on_failure: Callable[[str, str], None]
    ) -> None:
        low, high = self._layout.span(batch)
        before = store.status[low:high]
        fresh = before != DONE
        failed = fresh & (rows["status"] == FAILED)
        progress.fresh += int(fresh.sum())
        progress.done += int((fresh & ~failed).sum())
        progress.failed += int(failed.sum()) - int((before == FAILED).sum())
        for place in np.flatnonzero(failed).tolist():
            on_failure(self._source.keys[low + place], str(rows["reason"][place]))

    def _decoded(self, pending: Sequence[int]) -> Iterator[Decoded]:
        batches = Batches(self._source, self._loaded.preprocessing, self._options.batch_size)
        workers = min(self._options.workers, len(pending))
        options: dict[str, Any] = {}
        if workers:
            # A clean server forks the workers: this process has threads, which a fork of it would leave half-alive.
            options = {"multiprocessing_context": "forkserver", "worker_init_fn": _ignore_interrupt}
        pin = self._explainer.device.type == "cuda"
        sampler: Any = list(pending)
        return iter(
            DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin, **options)
        )

    def _explain(self, decoded: Decoded) -> Rows:
        """The rows of a batch, in as many equal parts as the memory asks for."""
        low, high = self._layout.span(decoded.batch)
        rows = self._layout.empty(high - low)
        inputs = decoded.inputs.to(self._explainer.device, non_blocking=True)
        while True:
            try:
                parts = [self._explain_part(part) for part in inputs.split(self._compute_batch)]
                break
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                if self._compute_batch == 1:
                    raise PipelineError(f"out of memory even for one image at a time: {error}") from error
            # Outside the handler, whose traceback would hold the tensors that filled the memory.
            self._compute_batch = -(-self._compute_batch // 2)
            self._explainer.refresh()
            if self._explainer.device.type == "cuda":
                torch.cuda.empty_cache()
        found = {name: np.concatenate([part[name] for part in parts])[: high - low] for name in parts[0]}
        finite = found.pop("finite")
        rows.update(found)
        rows["reason"][:] = [
            reason or ("" if good else NOT_FINITE) for reason, good in zip(decoded.reasons, finite, strict=True)
        ]
        failed = rows["reason"] != ""
        for name in found:
            rows[name][failed] = 0
        rows["status"][:] = np.where(failed, FAILED, DONE)
        return rows

    def _explain_part(self, inputs: Tensor) -> Rows:
        """All fields of some images, and ``finite``, whether all relevance is; where it is not, maps are zero."""
        channels = list(self._layout.channels)
        try:
            result = self._explainer.explain(inputs, layers=channels, relevance=False)
        except ValueError as error:
            raise PipelineError(f"{self._loaded.name}, pictures of {list(inputs.shape[1:])}: {error}") from error
        heatmap = result.heatmap.float()
        sums = {name: result.layers[name].flatten(2).sum(2).float() for name in channels} if channels else {}
        finite = heatmap.flatten(1).isfinite().all(1)
        for values in sums.values():
            finite &= values.isfinite().all(1)
        chosen = result.output.double().softmax(1).gather(1, result.target[:, None])[:, 0]
        numbers = {
            "target": result.target,
            "probability": chosen.float(),
            "leak": result.leak.float(),
            "finite": finite,
        }
        numbers |= {f"channels/{name}": values for name, values in sums.items()}
        maps = self._layout.encode(torch.where(finite[:, None, None], heatmap, 0.0))
        return {**maps, **{name: values.cpu().numpy() for name, values in numbers.items()}}


def _next(batches: Iterator[Decoded]) -> Decoded:
    try:
        return next(batches)
    except RuntimeError as error:  # what a DataLoader says when a worker is killed
        raise PipelineError(f"a decoding process ended: {str(error).splitlines()[0]}") from error


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _channel_counts(explainer: LRP, layers: Iterable[str], size: int) -> dict[str, int]:
    parameters = parameter_table(explainer.model, explainer.plan)
    shapes = explainer.plan.shapes((1, 3, size, size), parameters)
    return {name: shapes[explainer.plan.find(name)][1] for name in layers}


def weights_hash(model: nn.Module) -> str:
    """A SHA-256 of a model's state dict: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_failures(store: Store) -> None:
    """Write a store's ``failures.csv`` (key, label, reason), or remove it where nothing failed."""
    failed = np.flatnonzero(store.status[:] == FAILED).tolist()
    file = store.path / FAILURES
    if not failed:
        file.unlink(missing_ok=True)
        return
    keys, labels, reasons = store.key[:], store.label[:], store.reason[:]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("key", "label", "reason"))
    for index in failed:
        label = "" if labels[index] < 0 else int(labels[index])
        writer.writerow((safe_cell(str(keys[index])), label, safe_cell(str(reasons[index]))))
    partial = file.with_suffix(".partial")
    partial.write_text(table.getvalue(), encoding="utf-8", newline="")
    os.replace(partial, file)


def _progress_of(store: Store) -> Progress:
    status = store.status[:]
    return Progress(len(store), done=int((status == DONE).sum()), failed=int((status == FAILED).sum()))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
