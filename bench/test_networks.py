"""Whole explanations: every contender in turn, its map checked before it is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from workers import Task, Worker, WorkerError, uninterrupted

from contenders import (
    DTYPES,
    REFERENCED,
    Contender,
    ParityError,
    Reference,
    choose,
    expected,
    network,
    noise,
    parity,
)
from records import has_bfloat16, torch_device
from tables import Measured, Setting

MEMORY = Path(__file__).resolve().parent / "memory.py"


def batches(device: str) -> dict[int, tuple[str, ...]]:
    """The batch sizes, the headline first, and what is computed in at each."""
    found: dict[int, tuple[str, ...]] = {8: ("float32", "bfloat16"), 1: ("float32",)}
    return found | ({32: ("bfloat16",), 256: ("bfloat16",)} if device == "cuda" else {})


@dataclass(frozen=True)
class Case:
    """One call: of a contender, in a setting, at its turn."""

    turn: int
    setting: Setting
    contender: Contender

    def __str__(self) -> str:
        return f"batch {self.setting.batch}-turn {self.turn}-{self.setting.dtype}-{self.contender.name}"


def cases(config: pytest.Config, turns: int) -> list[Case]:
    """All calls in order: at each batch size turn by turn, in each of them every dtype and contender."""
    device = torch_device()
    known, batch = batches(device.type), config.getoption("batch")
    wanted = known if batch is None else {batch: known.get(batch, tuple(DTYPES))}
    found = []
    for size, dtypes in wanted.items():
        able = [dtype for dtype in dtypes if dtype == "float32" or has_bfloat16()]
        settings = [Setting(config.getoption("network"), config.getoption("side"), size, dtype) for dtype in able]
        for turn in range(turns):
            for setting in settings:
                chosen = choose(config.getoption("contenders"), DTYPES[setting.dtype], device)
                found += [Case(turn, setting, contender) for contender in chosen]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    turns = metafunc.config.getoption("turns") if metafunc.definition.name == "test_explanation" else 1
    found = cases(metafunc.config, turns)
    if metafunc.definition.name == "test_memory":  # at the headline's batch size
        found = [case for case in found if case.setting.batch == found[0].setting.batch]
    metafunc.parametrize("case", found, ids=str)


class Prepared:
    """What is ready to run at the present batch size, each program in a process of its own: torch, zennit, captum, …, ours.

    On a GPU all are in one: the processor's memory is not what counts there, and each process would take some of the GPU's.
    """

    def __init__(self, device: torch.device, measured: Measured) -> None:
        self.device, self.measured = device, measured
        self.batch: int | None = None
        self.workers: dict[str, Worker] = {}
        self.ready: set[tuple[Setting, str]] = set()
        self.references: dict[tuple[object, ...], Reference | None] = {}

    def run_of(self, case: Case) -> Callable[[], float]:
        """A call that gives its seconds, made ready and checked at the first turn; skips what was not ready then."""
        if case.setting.batch != self.batch:
            self.release()
            self.batch = case.setting.batch
        key = (case.setting, case.contender.name)
        if key not in self.ready:
            if case.turn > 0:
                pytest.skip("it was not ready at the first turn")
            self._make_ready(case)
            self.ready.add(key)
        return partial(self._worker(case.contender).explain, _task(case))

    def release(self) -> None:
        """End all processes."""
        self.ready.clear()
        while self.workers:
            self.workers.popitem()[1].end()

    def _worker(self, contender: Contender) -> Worker:
        """The process of the program that a contender belongs to."""
        program = "ours" if contender.kind == "ours" else contender.library or "torch"
        name = "all" if self.device.type == "cuda" else program
        if name not in self.workers:
            with uninterrupted():  # between its start and the note that it is to be ended
                self.workers[name] = Worker(keep_memory=self.measured.keeps_memory)
        return self.workers[name]

    def _make_ready(self, case: Case) -> None:
        """After two calls, the first one checked. Our own failures fail the test; a peer's is what its row says."""
        row = self.measured.row(case.setting, case.contender)
        try:
            built = self._worker(case.contender).build(_task(case))
            row["first_seconds"] = built.first_seconds
            got = torch.from_numpy(built.results).to(self.device)
            row["parity"] = parity(case.contender, DTYPES[case.setting.dtype], got, self._reference(case))
        except ParityError as error:
            row["parity"] = {"verdict": f"FAILED: {error}"}
            raise
        except WorkerError as error:
            row["parity"] = {"verdict": f"error: {error}"[:300]}
            if case.contender.kind == "ours":
                raise
            pytest.skip(row["parity"]["verdict"])

    def _reference(self, case: Case) -> Reference | None:
        contender, setting = case.contender, case.setting
        rules = (contender.kind == "forward", contender.kind == "peer", contender.composite, contender.start)
        key = (setting.network, setting.side, setting.dtype, *rules)
        if key not in self.references:
            images = noise(REFERENCED, setting.side, DTYPES[setting.dtype], self.device)
            self.references[key] = expected(contender, network(setting.network, self.device), images)
        return self.references[key]


def _task(case: Case) -> Task:
    setting = case.setting
    return Task(case.contender.name, setting.network, setting.batch, setting.side, setting.dtype)


@pytest.fixture(scope="session")
def prepared(device: torch.device, measured: Measured) -> Iterator[Prepared]:
    prepared = Prepared(device, measured)
    yield prepared
    prepared.release()


def test_explanation(case: Case, prepared: Prepared, measured: Measured, benchmark: BenchmarkFixture) -> None:
    """One call at a time, so that all contenders see the same machine."""
    run = prepared.run_of(case)
    row = measured.row(case.setting, case.contender)
    benchmark.extra_info.update(vars(case.setting), parity=row["parity"])
    row["seconds"].append(benchmark.pedantic(run))  # without what asking takes


def test_memory(case: Case, prepared: Prepared, measured: Measured, request: pytest.FixtureRequest) -> None:
    """The peak over several calls, in a fresh process."""
    calls, setting = request.config.getoption("memory_calls"), case.setting
    row = measured.row(setting, case.contender)
    if calls == 0 or not row["seconds"]:
        pytest.skip("not asked for" if calls == 0 else "it was not timed")
    prepared.release()
    arguments = [
        case.contender.name, "--network", setting.network, "--batch", str(setting.batch), "--side", str(setting.side),
        "--dtype", setting.dtype, "--calls", str(calls),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, str(MEMORY), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        row["memory_error"] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
        pytest.fail(row["memory_error"])
    found = json.loads(done.stdout.splitlines()[-1])
    row["memory_before_mb"], row["memory_by_call_mb"] = found["before"], found["by_call"]
    row["peak_memory_mb"] = max(found["by_call"])
