"""Signs of life, and a supervisor that starts another process where they stop.

What waits for a CUDA device cannot be interrupted from within: no signal handler of Python's runs before the wait ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

FILE = "GPU_CHECK_HEARTBEAT"
"""The variable that names the file whose time says until when its supervisor waits; only a supervised process has it."""
SILENCE, MARGIN = 120.0, 30.0
"""Seconds that may pass between two beats, and beyond the limit of what has one of its own."""
LONGEST = 1e6
MOST_RESTARTS = 20
GRACE = 20.0
"""What an interrupted process may take to end."""


def beat(seconds: float = 0.0) -> None:
    """A sign of life to the supervisor, if there is one; the next may take ``seconds`` where that is longer than usual."""
    if file := os.environ.get(FILE):
        _wait_for(file, seconds)


def _wait_for(file: str, seconds: float) -> None:
    until = time.time() + min(max(SILENCE, seconds + MARGIN), LONGEST)
    os.utime(file, (until, until))


def supervise(command: Sequence[str], again: Sequence[str], deadline: float) -> int:
    """Run ``command`` and return its exit code; where it hangs or is killed, ``again`` goes on until the deadline.

    ``deadline``: as ``time.monotonic()`` counts. Ctrl-C is handed on. If this process ends, so does the other.
    """
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(1 + MOST_RESTARTS):
            _wait_for(file.name, 0.0)
            child = subprocess.Popen(
                command, env=os.environ | {FILE: file.name}, process_group=0, preexec_fn=_end_with_parent
            )
            try:
                while child.poll() is None and time.time() < os.stat(file.name).st_mtime:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(0.5)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(GRACE)
                return 128 + signal.SIGINT
            finally:
                ended = child.poll()
                if ended is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            if ended is not None and ended >= 0:
                return ended
            print(f"{'hung' if ended is None else f'ended by signal {-ended}'}: going on behind it", file=sys.stderr)
            if time.monotonic() >= deadline:
                break
            command = again
    return 1


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
