"""Whole explanations: every contender in turn, its map checked before it is timed."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from contenders import DTYPES, Contender, ParityError, Reference, Run, choose, expected, network, noise, parity, prepare
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
    """What is ready to run at the present batch size."""

    def __init__(self, device: torch.device, measured: Measured) -> None:
        self.device, self.measured = device, measured
        self.batch: int | None = None
        self.runs: dict[tuple[Setting, str], Run] = {}
        self.references: dict[tuple[object, ...], Reference | None] = {}

    def run_of(self, case: Case) -> Run:
        """What a case times, made ready and checked at the first turn; skips what was not ready then."""
        if case.setting.batch != self.batch:
            self.release()
            self.batch = case.setting.batch
        key = (case.setting, case.contender.name)
        if key not in self.runs:
            if case.turn > 0:
                pytest.skip("it was not ready at the first turn")
            self.runs[key] = self._ready(case)
        return self.runs[key]

    def release(self) -> None:
        """Forget it all."""
        self.runs.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ready(self, case: Case) -> Run:
        """After two calls, the first one checked. Our own failures fail the test; a peer's is what its row says."""
        row = self.measured.row(case.setting, case.contender)
        try:
            return self._checked(case, row)
        except ParityError as error:
            row["parity"] = {"verdict": f"FAILED: {error}"}
            raise
        except Exception as error:
            row["parity"] = {"verdict": f"error: {type(error).__name__}: {error}"[:300]}
            if case.contender.kind == "ours":
                raise
            pytest.skip(row["parity"]["verdict"])

    def _checked(self, case: Case, row: dict[str, Any]) -> Run:
        contender, setting = case.contender, case.setting
        if contender.library is not None:
            importlib.import_module(contender.library)
        model = network(setting.network, self.device)
        images = noise(setting.batch, setting.side, DTYPES[setting.dtype], self.device)
        reference = self._reference(case, images)
        begin = time.perf_counter()
        run = self._awaited(prepare(contender, model, images))
        got = run()
        row["first_seconds"] = time.perf_counter() - begin
        row["parity"] = parity(contender, images.dtype, got, reference)
        run()
        return run

    def _awaited(self, run: Run) -> Run:
        """Until the device has done it."""
        if self.device.type != "cuda":
            return run

        def complete() -> Tensor:
            result = run()
            torch.cuda.synchronize()
            return result

        return complete

    def _reference(self, case: Case, images: Tensor) -> Reference | None:
        contender, setting = case.contender, case.setting
        rules = (contender.kind == "forward", contender.composite, contender.start)
        key = (setting.network, setting.side, setting.dtype, *rules)
        if key not in self.references:
            self.references[key] = expected(contender, network(setting.network, self.device), images)
        return self.references[key]


@pytest.fixture(scope="session")
def prepared(device: torch.device, measured: Measured) -> Prepared:
    return Prepared(device, measured)


def test_explanation(case: Case, prepared: Prepared, measured: Measured, benchmark: BenchmarkFixture) -> None:
    """One call at a time, so that all contenders see the same machine."""
    run = prepared.run_of(case)
    row = measured.row(case.setting, case.contender)
    benchmark.extra_info.update(vars(case.setting), parity=row["parity"])
    benchmark.pedantic(run)
    row["seconds"].append(benchmark.stats.stats.data[0])


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
