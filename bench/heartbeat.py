"""Signs of life, and a supervisor that starts another process where they stop.

What waits for a CUDA device cannot be interrupted from within: no signal handler of Python's runs before the wait ends.
Times are ``time.monotonic()``'s, which is the same in all processes and which nobody sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

FILE = "GPU_CHECK_HEARTBEAT"
"""The variable that names the file whose time says until when its supervisor waits; only a supervised process has it."""
SILENCE, MARGIN = 120.0, 30.0
"""Seconds that may pass between two beats, and beyond the limit of what has one of its own."""
STARTING = 240.0
"""Seconds until the first beat: torch may have to be read from a cold disk, and CUDA to be started."""
OVERTIME = 60.0
"""Seconds after the deadline that no process outlives, whatever it waits for."""
LONGEST = 1e6
MOST_RESTARTS = 20
GRACE = 20.0
"""What an interrupted process may take to end."""


def beat(seconds: float = 0.0) -> None:
    """A sign of life to the supervisor, if there is one; the next may take ``seconds`` where that is longer than usual."""
    if file := os.environ.get(FILE):
        _wait_for(file, max(SILENCE, seconds + MARGIN))


def _wait_for(file: str, seconds: float) -> None:
    until = time.monotonic() + min(seconds, LONGEST)
    os.utime(file, (until, until))


def supervise(command: Sequence[str], again: Sequence[str], deadline: float) -> int:
    """Run ``command`` and return its exit code; where it hangs or is killed, ``again`` goes on until the deadline.

    ``deadline``: as ``time.monotonic()`` counts. Ctrl-C is handed on. If this process ends, so does the other; and whatever
    that has started ends with it.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        with tempfile.NamedTemporaryFile() as file:
            for _ in range(1 + MOST_RESTARTS):
                ended = _run(command, file.name, deadline)
                if ended is not None and ended >= 0:
                    return ended
                print(f"{'hung' if ended is None else f'ended by signal {-ended}'}", end="", file=sys.stderr)
                if time.monotonic() >= deadline:
                    print(", and its time is over", file=sys.stderr)
                    break
                print(": going on behind it", file=sys.stderr)
                command = again
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1


def _run(command: Sequence[str], file: str, deadline: float) -> int | None:
    """A process's exit code, none if it hung; nothing of its session is left."""
    _wait_for(file, STARTING)
    child = subprocess.Popen(
        command, env=os.environ | {FILE: file}, start_new_session=True, preexec_fn=_end_with_parent
    )
    try:
        while child.poll() is None and time.monotonic() < min(os.stat(file).st_mtime, deadline + OVERTIME):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
        return child.poll()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)  # which a terminal sends to this session alone
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(GRACE)
        return 128 + signal.SIGINT
    finally:
        _end_session(child.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)  # what is stuck in the driver does not even end when it is killed


def _end_session(session: int) -> None:
    """Kill every process of a session: with the helpers, which are process groups of their own, what they have started."""
    for _ in range(2):  # once more for what was started meanwhile
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                    os.kill(int(stat.parent.name), signal.SIGKILL)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _terminated(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # a second one would interrupt the end of the others
    sys.exit(128 + signum)
