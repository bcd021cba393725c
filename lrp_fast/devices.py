"""Several devices of one machine fill one store: a process for each, which writes its part."""

from __future__ import annotations

import queue
import signal
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from lrp_fast.batches import PipelineError, Setup
from lrp_fast.data import Source
from lrp_fast.pipeline import OnBatch, OnFailure, Pipeline, PipelineOptions, Progress, bytes_per_image
from lrp_fast.store import WHOLE, Part, Store, StoreError

_PATIENCE = 0.2
"""Seconds between two looks at whether a process is still there."""


@dataclass(frozen=True)
class _Job:
    """What one process does; everything in it can be sent there."""

    setup: Setup
    source: Source
    options: PipelineOptions
    path: Path
    device: torch.device
    part: Part
    threads: int


def attribute_on_devices(
    setup: Setup,
    source: Source,
    options: PipelineOptions,
    path: Path,
    devices: Sequence[torch.device],
    part: Part = WHOLE,
    *,
    on_failure: OnFailure = lambda key, reason: None,
    on_batch: OnBatch = lambda progress: None,
) -> Progress:
    """As :meth:`Pipeline.into`, on several devices at once; each writes its share of ``part``.

    ``options.workers`` decoding processes for each device; on a CPU the threads are shared out. What one process cannot
    do the others go on with; then its error is raised: a :class:`~lrp_fast.store.StoreError` as it is, any other as a
    :class:`PipelineError`. Stored is what was computed, and the same call continues.
    """
    context = torch.multiprocessing.get_context("spawn")
    said, stop = context.Queue(), context.Event()
    threads = max(1, torch.get_num_threads() // max(1, sum(device.type == "cpu" for device in devices)))
    jobs = [
        _Job(setup, source, options, path, device, part.divided(index, len(devices)), threads)
        for index, device in enumerate(devices)
    ]
    processes = [
        context.Process(target=_work, args=(index, job, said, stop), daemon=False) for index, job in enumerate(jobs)
    ]
    for process in processes:
        process.start()
    watch = _Watch(processes, jobs, on_failure, on_batch)
    try:
        while watch.running:
            try:
                watch.listen(said)
            except KeyboardInterrupt:
                if stop.is_set():
                    raise
                stop.set()
    finally:
        for process in processes:
            if watch.running:  # a second Ctrl-C: what is on the disk is kept, what is being computed is not waited for
                process.terminate()
            process.join()
    if watch.errors:
        raise watch.errors[0]
    found = watch.total(interrupted=stop.is_set())
    found.bytes_per_image = bytes_per_image(Store(path))
    return found


class _Watch:
    """What the processes have said so far."""

    def __init__(
        self, processes: Sequence[Any], jobs: Sequence[_Job], on_failure: OnFailure, on_batch: OnBatch
    ) -> None:
        self._processes, self._jobs = processes, jobs
        self._on_failure, self._on_batch = on_failure, on_batch
        self._progress = [Progress() for _ in processes]
        self.running = set(range(len(processes)))
        self.errors: list[Exception] = []

    def listen(self, said: Any) -> None:
        """Take in one message, or note that a process has ended without one."""
        ended = [index for index in self.running if not self._processes[index].is_alive()]
        try:
            index, kind, what = said.get(timeout=_PATIENCE)
        except queue.Empty:
            for index in ended:  # it had ended before the queue was found empty
                self.running.discard(index)
                code = self._processes[index].exitcode
                self.errors.append(PipelineError(f"the process on {self._jobs[index].device} ended with code {code}"))
            return
        if kind in ("end", "error"):
            self.running.discard(index)
        if kind == "error":
            self.errors.append(what)
        elif kind == "failure":
            self._on_failure(*what)
        else:
            self._progress[index] = what
            self._on_batch(self.total())

    def total(self, interrupted: bool = False) -> Progress:
        """All parts together; what was waited for is the mean, as all wait at once."""
        parts = self._progress
        waited = {stage: sum(part.waited[stage] for part in parts) / len(parts) for stage in parts[0].waited}
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("total", "done", "failed", "fresh")}
        return Progress(**sums, interrupted=interrupted, waited=waited)


def _work(index: int, job: _Job, said: Any, stop: Any) -> None:
    """One process: its pipeline, told of in messages ``(index, "batch" | "failure" | "end" | "error", what)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    torch.set_num_threads(job.threads)

    def on_failure(key: str, reason: str) -> None:
        said.put((index, "failure", (key, reason)))

    def on_batch(progress: Progress) -> None:
        said.put((index, "batch", deepcopy(progress)))  # it is pickled later, by a thread
        if stop.is_set():
            raise KeyboardInterrupt

    try:
        pipeline = Pipeline(job.setup, job.source, job.options, job.device, job.part)
        said.put((index, "end", pipeline.into(job.path, on_failure=on_failure, on_batch=on_batch)))
    except StoreError as error:
        said.put((index, "error", error))
    except Exception as error:
        said.put((index, "error", PipelineError(f"{job.device}: {type(error).__name__}: {error}")))
