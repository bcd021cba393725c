"""Compiling ahead: while the GPU tests run, processes of their own fill the disk caches of Triton and of torch.compile.

What they compile is what the tables need first: every kernel of the kernel table, every tile that tuning will try, and the
compiled columns. Nothing is timed meanwhile, and whatever fails here fails again where it is recorded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from triton.runtime.jit import JITFunction

from contenders import network
from heartbeat import beat
from kernel_bench import BATCH, DTYPES, plan
from lrp_fast.memory import out_of_memory_suppressed
from lrp_fast.scopes import float32_precision
from network_bench import explainer_of, run_of
from settings import COMPILED, HEADLINE, TUNED, Setting, images

COLUMNS = [(setting, column) for setting in COMPILED for column in ("torch compiled", "forward compiled")]
MOST_WORKERS = 6
FEWEST_PROCESSORS = 4
COMPILERS = 4
"""Processes that torch.compile may start for one column."""
WORKERS_MEMORY, COLUMNS_MEMORY = 0.05, 0.2
"""The shares of the device's memory that one process may take: the GPU tests need some too."""
LARGEST, LARGEST_MEMORY = (HEADLINE, "torch compiled"), 0.4
"""The column that needs more, and how much."""
COMMAND = (sys.executable, str(pathlib.Path(__file__).with_name("gpu_check.py")), "--ahead")


def jobs() -> list[str]:
    """What there is to do, for as many processes as there are processors to spare."""
    processors = len(os.sched_getaffinity(0))
    if processors < FEWEST_PROCESSORS:
        return []
    workers = max(1, min(processors - 2 - len(COLUMNS), MOST_WORKERS))
    columns = [f"compiled {index}" for index in range(len(COLUMNS))]
    return columns + [f"kernels {index} {workers}" for index in range(workers)]


class CompileAhead:
    """Jobs under way, which write to ``log``; leaving the block ends what has not ended."""

    def __init__(self, jobs: Sequence[str], log: pathlib.Path, command: Sequence[str] = COMMAND) -> None:
        self.jobs, self.log, self.command = jobs, log, command
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> CompileAhead:
        if not self.jobs:
            return self
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILERS)}
        with self.log.open("wb") as output:
            for job in self.jobs:
                process = subprocess.Popen(
                    [*self.command, job], stdout=output, stderr=output, env=environment, process_group=0
                )
                self._processes.append(process)
        return self

    def wait(self, seconds: float) -> str:
        """Wait for at most so long; says how many jobs did what they should."""
        deadline = time.monotonic() + seconds
        beat(seconds)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(None if seconds == float("inf") else max(0.0, deadline - time.monotonic()))
        done = sum(process.poll() == 0 for process in self._processes)
        return f"{done} of {len(self.jobs)} jobs complete"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that torch.compile has started
                process.wait()


def run_job(job: str) -> None:
    """In a process of its own: one of :func:`jobs`."""
    torch.set_num_threads(1)  # all processes begin by making networks on the processor
    # What torch.compile measures to choose a kernel's blocks is not kept: here others have the GPU too.
    inductor: Any = torch._inductor.config
    inductor.autotune_local_cache = False
    kind, *rest = job.split()
    if kind == "kernels":
        compile_kernels(int(rest[0]), int(rest[1]))
    else:
        compile_column(*COLUMNS[int(rest[0])])


def compile_column(setting: Setting, column: str) -> None:
    """A compiled column of one setting."""
    torch.cuda.set_per_process_memory_fraction(LARGEST_MEMORY if (setting, column) == LARGEST else COLUMNS_MEMORY)
    device = torch.device("cuda")
    model, x = network(setting.network, device), images(device, setting.precision, setting.batch, 224)
    with float32_precision(setting.precision == "tf32"):  # as it will be timed: torch's cache asks for the settings
        run_of(column, setting, model, x)()


def compile_kernels(index: int, count: int) -> None:
    """One of ``count`` shares of the kernel table's kernels and of what tuning tries."""
    with only_compiling(index, count):
        for row in plan(dry=False, full=False):
            row.case.build(torch.device("meta"), DTYPES[row.precision], BATCH, row.product).run()
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, {"LRP_FAST_CACHE": folder}),
            mock.patch.object(importlib.import_module("lrp_fast.backends.triton.tune"), "milliseconds", _called),
        ):
            torch.cuda.set_per_process_memory_fraction(WORKERS_MEMORY)
            device = torch.device("cuda")
            for setting in TUNED:
                x = images(device, setting.precision, setting.batch, 224)
                explainer_of(network(setting.network, device), setting, backend="triton").tune(x)


def _called(work: Any) -> float:
    with out_of_memory_suppressed():
        work()
    return 0.0


@contextlib.contextmanager
def only_compiling(index: int, count: int) -> Iterator[None]:
    """Launches compile their kernel, if it belongs to share ``index`` of ``count``, and do nothing else."""
    run = JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if zlib.crc32(specialization(kernel, args, kwargs).encode()) % count == index:
            with contextlib.suppress(Exception):
                _ = run(kernel, *args, grid=grid, warmup=True, **kwargs).run  # builds what launches it, too

    with mock.patch.object(JITFunction, "run", compiled):
        yield


def specialization(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """What decides whether two launches share a compiled kernel, about as Triton sees it."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    seen = []
    for name, value in sorted(values.items()):
        if isinstance(value, torch.Tensor):
            seen.append(f"{name}:{value.dtype}")
        elif isinstance(value, int) and name in kernel.arg_names and name not in constants:
            seen.append(f"{name}:{value == 1}{value % 16 == 0}")
        else:
            seen.append(f"{name}:{value!r}")
    return " ".join([kernel.__name__, *seen])
