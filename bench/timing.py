"""Where benchmarks run and how they are timed: a CUDA device, or this computer's processor in a dry run.

All that only CUDA can do is in :class:`Cuda`; the rest of the benchmarks sees a :class:`Device`.
"""

from __future__ import annotations

import gc
import math
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from heartbeat import beat

Run = Callable[[], Any]
FLUSHED_BYTES = 1 << 30
"""Read before every timed launch: it empties the L2 cache, and while it runs (0.2 to 0.4 ms) the launch is queued. Were it
written, what it leaves in the cache would have to be written back while the launch is timed."""


class OutOfTimeError(BaseException):
    """A time limit has passed. No ``Exception``, so that no handler of a failed attempt takes it for one."""


class DeviceLostError(Exception):
    """The device answers no more in this process (after an illegal memory access, say)."""


class Budget:
    """The minutes a run may take, from ``begin`` on (``time.monotonic()``, the same in all processes) or from now."""

    def __init__(self, minutes: float, begin: float | None = None) -> None:
        self.seconds = 60 * minutes
        self.begin = time.monotonic() if begin is None else begin

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def say(self, what: str) -> None:
        """A line of progress."""
        beat()
        print(f"[{self.spent():4.0f} s] {what}", file=sys.stderr, flush=True)

    def remaining(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the budget is spent; never negative."""
        return max(0.0, share * self.seconds - self.spent())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTimeError` in the block once ``seconds`` have passed, as soon as Python runs again.

    Limits do not nest: the inner one would end the outer one's.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    if not math.isfinite(seconds):
        yield
        return
    if seconds <= 0:
        raise OutOfTimeError
    beat(seconds)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again and again: a destructor may have swallowed the first
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        beat()


class Device(ABC):
    """Where benchmarks run."""

    torch_device: torch.device
    name: str
    dry: bool

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What identifies the device and its driver."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all that was launched."""

    @abstractmethod
    def free(self) -> None:
        """Give memory back that nothing holds any more."""

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`DeviceLostError` if the device answers no more."""

    @abstractmethod
    def peak(self, run: Run) -> tuple[Any, int | None]:
        """What ``run`` returns, and the bytes allocated at its peak beyond those before it."""

    @abstractmethod
    def single(self, run: Run) -> float:
        """Seconds of one call with a cold cache, on the device's own clock."""

    @abstractmethod
    def profiled(self, run: Run) -> tuple[list[tuple[str, int, float]], float]:
        """Of one call: (kernel, calls, seconds on the device), longest first; and the seconds it took in all."""

    def medians(self, runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
        """Median seconds of each run's single calls, taken in turn after one warm-up, for about ``seconds``."""
        for run in () if self.dry else runs.values():
            run()
        taken = {name: [self.single(run)] for name, run in runs.items()}
        for _ in range(self.rounds(seconds, sum(times[0] for times in taken.values()))):
            for name, run in runs.items():
                taken[name].append(self.single(run))
        return {name: statistics.median(times) for name, times in taken.items()}

    def rounds(self, seconds: float, once: float, fewest: int = 5) -> int:
        """How often to repeat what takes ``once`` seconds for about ``seconds``; not at all in a dry run."""
        return 0 if self.dry else min(max(int(seconds / once), fewest), 25)

    def wall(self, run: Run, calls: int) -> float:
        """Seconds of one call on the wall clock, when ``calls`` follow each other."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - begin) / calls


class Cuda(Device):
    """The current CUDA device."""

    dry = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
        self._flushed: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def environment(self) -> dict[str, str]:
        """Name, capability, memory, driver and CUDA version."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
        }

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize()

    def free(self) -> None:
        """Collect garbage and empty the allocator's cache, the flushed buffer included."""
        self._flushed = None
        gc.collect()
        torch.cuda.empty_cache()

    def check(self) -> None:
        """Use the device once."""
        try:
            torch.zeros(1, device=self.torch_device).item()
        except RuntimeError as error:
            raise DeviceLostError(str(error).splitlines()[0]) from error

    def peak(self, run: Run) -> tuple[Any, int | None]:
        """As the caching allocator counts."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def single(self, run: Run) -> float:
        """Between two CUDA events; the L2 cache is flushed before."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def _flush(self) -> None:
        if self._flushed is None:
            self._flushed = torch.zeros(FLUSHED_BYTES // 4, device=self.torch_device)
            self._sum = torch.empty((), device=self.torch_device)
        torch.sum(self._flushed, dim=0, out=self._sum)

    def profiled(self, run: Run) -> tuple[list[tuple[str, int, float]], float]:
        """By CUPTI's records of kernels and copies."""
        seconds = self.wall(run, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            run()
            torch.cuda.synchronize()
        return _rows(profile, torch.autograd.DeviceType.CUDA, "self_device_time_total"), seconds


class Host(Device):
    """This computer's processor: for dry runs, whose times mean nothing."""

    torch_device = torch.device("cpu")
    name = "dry-run"
    dry = True

    def environment(self) -> dict[str, str]:
        """That it is none."""
        return {"device": "none: a dry run on the processor"}

    def synchronize(self) -> None:
        """Nothing runs by itself."""

    def free(self) -> None:
        """Collect garbage."""
        gc.collect()

    def check(self) -> None:
        """Always there."""

    def peak(self, run: Run) -> tuple[Any, int | None]:
        """Memory is not counted."""
        return run(), None

    def single(self, run: Run) -> float:
        """By the wall clock."""
        return self.wall(run, 1)

    def profiled(self, run: Run) -> tuple[list[tuple[str, int, float]], float]:
        """Of operators instead of kernels."""
        begin = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            run()
        seconds = time.perf_counter() - begin
        return _rows(profile, torch.autograd.DeviceType.CPU, "self_cpu_time_total"), seconds


def _rows(profile: Any, kind: Any, measure: str) -> list[tuple[str, int, float]]:
    rows = [
        (event.key, event.count, getattr(event, measure) / 1e6)
        for event in profile.key_averages()
        if event.device_type == kind
    ]
    return sorted(rows, key=lambda row: -row[2])


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return answer.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        said = pathlib.Path("/proc/driver/nvidia/version")
        found = re.search(r"\d+\.\d+(\.\d+)?", said.read_text()) if said.exists() else None
        return found.group() if found else "unknown"
