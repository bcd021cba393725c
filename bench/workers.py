"""Contenders in processes of their own, each explaining once when it is told to.

What a program frees, the C library gives to whatever asks next, and how much of it the system must clear again depends on
who else has run: in one process the times of all contenders depend on their company, by up to a third.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
SHOWN = 8
"""How many images' maps a worker gives out."""


class WorkerError(Exception):
    """A process has ended, or what it was told to do has failed there; the text says how."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class Task:
    """A contender by its name, and what it explains: :func:`contenders.network` and :func:`contenders.noise`."""

    contender: str
    network: str
    batch: int
    side: int
    dtype: str


@dataclass(frozen=True)
class Built:
    """What a worker says of a contender that is ready: the first images' results, and seconds until it had them."""

    results: Any  # numpy, N × … of at most SHOWN images
    first_seconds: float
    imported: Path


class Worker:
    """A process with this folder's contenders and the lrp_fast of ``tree``, until :meth:`end`.

    ``keep_memory``: it keeps what is freed (:func:`lrp_fast.memory.keep_freed_memory`) whatever its contenders do.
    """

    def __init__(self, tree: Path = ROOT, keep_memory: bool = False) -> None:
        self.tree, self._files = tree, tempfile.TemporaryDirectory(prefix="lrp_fast-worker-")
        path = [str(tree), os.environ.get("PYTHONPATH", "")]  # it comes before an editable install
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        command = [sys.executable, str(Path(__file__).resolve()), *(["--keep-memory"] if keep_memory else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tree, text=True
        )

    def build(self, task: Task) -> Built:
        """Make a contender ready and let it explain twice; raises :class:`WorkerError` with what went wrong there."""
        import numpy as np

        file = Path(self._files.name) / "results.npy"
        answer = self._ask({"build": vars(task), "file": str(file)})
        return Built(np.load(file, allow_pickle=False), answer["seconds"], Path(answer["imported"]))

    def explain(self, task: Task) -> float:
        """Seconds of one explanation."""
        return float(self._ask({"explain": vars(task)})["seconds"])

    def end(self) -> None:
        """Kill it, if need be."""
        self._process.kill()
        self._process.communicate()
        self._files.cleanup()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(f"the process of {self.tree} is gone") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process of {self.tree} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


# Inside of the process --------------------------------------------------------------------------------------------------


def work(keep_memory: bool) -> None:
    """Answer one line of JSON to each line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no answer

    import torch

    from lrp_fast.scopes import float32_precision

    if keep_memory:
        from lrp_fast.memory import keep_freed_memory

        keep_freed_memory(sys.modules[__name__])
    runs: dict[Task, Any] = {}
    # What is called compiled is compiled, whatever it takes; and no TF32, which our explainers do not use by themselves.
    limits = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
    with float32_precision(False), limits:
        for line in sys.stdin:
            try:
                answer = _answer(json.loads(line), runs)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


def _answer(question: dict[str, Any], runs: dict[Task, Any]) -> dict[str, Any]:
    if "explain" in question:
        return {"seconds": _timed(runs[Task(**question["explain"])])[1]}
    import numpy as np

    import lrp_fast
    from contenders import DTYPES, find, network, noise, prepare
    from records import torch_device

    task, device = Task(**question["build"]), torch_device()
    contender = find(task.contender)
    if contender.library is not None:
        importlib.import_module(contender.library)
    model, images = network(task.network, device), noise(task.batch, task.side, DTYPES[task.dtype], device)
    begin = time.perf_counter()
    run = prepare(contender, model, images)
    results, _ = _timed(run)
    seconds = time.perf_counter() - begin
    np.save(question["file"], results[:SHOWN].float().cpu().numpy(), allow_pickle=False)
    _timed(run)
    runs[task] = run
    return {"seconds": seconds, "imported": str(Path(lrp_fast.__file__).resolve())}


def _timed(run: Any) -> tuple[Any, float]:
    import torch

    begin = time.perf_counter()
    results = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return results, time.perf_counter() - begin


if __name__ == "__main__":
    work("--keep-memory" in sys.argv[1:])
