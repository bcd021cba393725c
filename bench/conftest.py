"""What the benchmarks of networks and layers share: options, the device, and the record that is written at the end.

    python -m pytest --benchmark-quiet bench/test_networks.py bench/test_layers.py [--batch 8] [--contenders zennit,otsuki2024]

A whole run is kept as ``bench/results/<device>-<dtype>-<versions>.json`` and ``.md``. Whatever is less (some contenders, fewer
turns, a failure, Ctrl-C) goes to ``.benchmarks/`` or where ``--output`` says, and never replaces a whole one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import records
import tables
from lrp_fast.memory import keep_freed_memory
from lrp_fast.scopes import float32_precision

DEFAULTS: dict[str, Any] = {
    "network": "resnet50", "side": 224, "batch": None, "contenders": None, "turns": 7, "memory_calls": 5, "keep_memory": False,
}  # fmt: skip
TESTS = {"test_explanation", "test_memory", "test_layer"}
"""What a whole run consists of (and ``test_kernel``, where there is a GPU)."""
UNFINISHED = records.RESULTS.parent.parent / ".benchmarks"
MEASURED = pytest.StashKey[tables.Measured]()
LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lrp_fast benchmarks")
    group.addoption("--network", default=DEFAULTS["network"], help="of torchvision, or cifar (default: %(default)s)")
    group.addoption("--side", type=int, default=DEFAULTS["side"], help="of the images (default: %(default)s)")
    group.addoption("--batch", type=int, default=None, help="this batch size alone")
    group.addoption("--contenders", default=None, help="names or parts of names, by commas")
    group.addoption("--turns", type=int, default=DEFAULTS["turns"], help="calls of each (default: %(default)s)")
    group.addoption(
        "--memory-calls", type=int, default=DEFAULTS["memory_calls"], help="to measure memory over; 0: none"
    )
    group.addoption(
        "--keep-memory", action="store_true", help="freed memory is kept for the next call, as our command line has it"
    )
    group.addoption("--output", type=Path, default=None, metavar="FILE", help="JSON; the table goes beside it as .md")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks take turns in one process: run them without -n")
    if config.getoption("turns") < 1:
        raise pytest.UsageError(f"--turns is a number of at least 1, got {config.getoption('turns')}")
    config.addinivalue_line("filterwarnings", "default")  # other tools' are shown, and no failure of theirs
    kept = config.getoption("keep_memory")
    if kept and not keep_freed_memory():
        raise pytest.UsageError("--keep-memory: this C library, or the environment, has it otherwise")
    config.stash[MEASURED], config.stash[LEFT_OUT] = tables.Measured(keeps_memory=kept), []


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[LEFT_OUT].append(f"{len(items)} tests deselected")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    left_out = config.stash[LEFT_OUT]
    left_out += [f"--{name.replace('_', '-')}" for name, value in DEFAULTS.items() if config.getoption(name) != value]
    left_out += [argument for argument in config.args if "::" in argument]
    wanted = TESTS | ({"test_kernel"} if torch.cuda.is_available() else set())
    left_out += sorted(wanted - {getattr(item, "originalname", item.name) for item in session.items})
    left_out += [f"exit status {int(exitstatus)}"] if exitstatus else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and the files it is kept in."""
    measured, left_out = config.stash[MEASURED], config.stash[LEFT_OUT]
    if not (measured.rows or measured.layers):
        return
    result = measured.result()
    text = tables.markdown(result)
    folder = UNFINISHED if left_out else records.RESULTS
    file = config.getoption("output") or folder / tables.file_name(result)
    records.write(file, result)
    file.with_suffix(".md").write_text(text)
    terminalreporter.write_line(text)
    why = f"; not the whole: {', '.join(left_out)}" if left_out else ""
    terminalreporter.write_line(f"written to {file}{why}")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> tables.Measured:
    return request.config.stash[MEASURED]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return records.torch_device()


@pytest.fixture(autouse=True, scope="session")
def like_for_like() -> Iterator[None]:
    """No TF32, which our explainers do not use by themselves; and what is called compiled is compiled, whatever it takes."""
    limits = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
    with float32_precision(False), limits:
        yield
