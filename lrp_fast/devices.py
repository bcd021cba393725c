"""Several devices of one machine fill one store: a process for each, which writes its part."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from lrp_fast.batches import PipelineError, Setup
from lrp_fast.data import Source
from lrp_fast.pipeline import OnBatch, OnFailure, Pipeline, PipelineOptions, Progress, bytes_per_image
from lrp_fast.scopes import current_device, interruptions_heard_by
from lrp_fast.store import WHOLE, Part, Store, StoreError


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

    ``options.workers`` decoding processes for each device; on a CPU the threads are shared out. If one process
    fails, the others finish their shares; then its error is raised: a :class:`~lrp_fast.store.StoreError` or ``ValueError``
    as it is, any other as a :class:`PipelineError`. What was computed is stored, and the same call continues.
    """
    context = torch.multiprocessing.get_context("spawn")
    stop = context.Event()
    threads = max(1, torch.get_num_threads() // max(1, sum(device.type == "cpu" for device in devices)))
    jobs = [
        _Job(setup, source, options, path, device, part.divided(index, len(devices)), threads)
        for index, device in enumerate(devices)
    ]
    watch = _Watch(jobs, on_failure, on_batch)
    try:
        # Half-started processes could not be told to end.
        with interruptions_heard_by(stop.set):
            for job in jobs:
                watch.start(context, job, stop)
        while watch.running:
            try:
                watch.listen()
            except KeyboardInterrupt:
                if stop.is_set():
                    raise
                stop.set()
    finally:
        watch.end()
    if watch.errors:
        raise watch.errors[0]
    found = watch.total(interrupted=stop.is_set())
    found.bytes_per_image = bytes_per_image(Store(path))
    return found


class _Watch:
    """The processes, and what they have said so far: each through a pipe of its own, whose end tells that it has ended.

    One queue for all would have a lock, which a process that is killed while it holds it never gives back.
    """

    def __init__(self, jobs: Sequence[_Job], on_failure: OnFailure, on_batch: OnBatch) -> None:
        self._on_failure, self._on_batch = on_failure, on_batch
        self._progress = [Progress() for _ in jobs]
        self._processes: list[Any] = []
        self.running: dict[Any, int] = {}
        self.errors: list[Exception] = []

    def start(self, context: Any, job: _Job, stop: Any) -> None:
        heard, said = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, said, stop), name=str(job.device), daemon=False)
        process.start()
        said.close()  # the process has its own; with ours open the pipe would never end
        self.running[heard] = len(self._processes)
        self._processes.append(process)

    def listen(self) -> None:
        """Wait for messages and take them in."""
        ready = wait(list(self.running))
        for heard, index in [(heard, index) for heard, index in self.running.items() if heard in ready]:
            kind, what = self._hear(heard, index)
            if kind in ("end", "error"):
                del self.running[heard]
            if kind == "error":
                self.errors.append(what)
            elif kind == "failure":
                self._on_failure(*what)
            else:
                self._progress[index] = what
                self._on_batch(self.total())

    def _hear(self, heard: Any, index: int) -> tuple[str, Any]:
        try:
            return heard.recv()
        except (EOFError, OSError):  # it has ended, perhaps within a message
            process = self._processes[index]
            process.join()
            return "error", PipelineError(f"the process on {process.name} ended with code {process.exitcode}")

    def end(self) -> None:
        """Wait for the processes; for those that still run, after a second Ctrl-C, not: what they stored is kept."""
        for index in self.running.values():
            self._processes[index].kill()
        for process in self._processes:
            process.join()

    def total(self, interrupted: bool = False) -> Progress:
        """All parts together; what was waited for is the mean, as all wait at once."""
        parts = self._progress
        waited = {stage: sum(part.waited[stage] for part in parts) / len(parts) for stage in parts[0].waited}
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("total", "done", "failed", "fresh")}
        return Progress(**sums, interrupted=interrupted, waited=waited)


def _work(job: _Job, said: Any, stop: Any) -> None:
    """One process: its pipeline, told of in messages ``("batch" | "failure" | "end" | "error", what)``."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the first one decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(job.threads)

    def tell(kind: str, what: object) -> None:
        try:
            said.send((kind, what))
        except BrokenPipeError as error:  # the first process was killed: nobody is left to hear or to stop this one
            raise KeyboardInterrupt from error

    last = Progress()

    def on_batch(progress: Progress) -> None:
        nonlocal last
        last = progress
        tell("batch", progress)
        if stop.is_set():
            raise KeyboardInterrupt

    try:
        with current_device(job.device):
            pipeline = Pipeline(job.setup, job.source, job.options, job.device, job.part)
            found = pipeline.into(job.path, on_failure=lambda *what: tell("failure", what), on_batch=on_batch)
        ending: tuple[str, object] = ("end", found)
    except (StoreError, ValueError) as error:
        ending = ("error", error)
    except (PipelineError, OSError) as error:
        ending = ("error", PipelineError(f"{job.device}: {error}"))
        if isinstance(error, PipelineError) and stop.is_set():  # the decoding processes were sent SIGTERM too
            ending = ("end", last)
    except Exception as error:
        ending = ("error", PipelineError(f"{job.device}: {type(error).__name__}: {error}"))
    with contextlib.suppress(KeyboardInterrupt):
        tell(*ending)
