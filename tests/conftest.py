"""What every test gets: quiet threads and fresh, repeatable randomness."""

from __future__ import annotations

import os
import pathlib
import signal
import zlib
from collections.abc import Iterator

import pytest
import torch

from lrp_fast.memory import keep_freed_memory

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels then run on the CPU
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter
    import strict_interpreter

    quick_interpreter.install()
    strict_interpreter.install()

keep_freed_memory(pytest)  # else the system fills it with zeros for every test anew, a tenth of all the time

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker for each core; more threads than cores would only wait for each other

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's "&" leaves it, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def fresh_randomness(request: pytest.FixtureRequest) -> Iterator[None]:
    """A seed of its own for every test; LRP_FAST_TEST_SEED shifts them all."""
    seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("LRP_FAST_TEST_SEED", "0"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that compare bits with those of other processes; small pictures gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of trained networks and photographs beside the checkout; a test that needs it skips without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the trained networks and photographs in {SHARED_DATA}")
    return SHARED_DATA
