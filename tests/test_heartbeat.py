"""Processes that hang, are killed, end or are interrupted under the supervisor of the GPU check."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
import heartbeat

BENCH = str(pathlib.Path(heartbeat.__file__).parent)


def program(*lines: str) -> list[str]:
    """A command that can beat."""
    start = f"import os, signal, sys, time; sys.path.insert(0, {BENCH!r}); import heartbeat"
    return [sys.executable, "-c", "\n".join([start, *lines])]


def test_what_hangs_is_ended_and_another_process_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "STARTING", 3.0)
    helper, out = tmp_path / "helper", tmp_path / "beaten"
    beating = [f"open({str(out)!r}, 'w').write(str(os.stat(os.environ[heartbeat.FILE]).st_mtime - time.monotonic()))"]
    hanging = program(
        "import subprocess",
        f"open({str(helper)!r}, 'w').write(str(subprocess.Popen(['sleep', '600'], process_group=0).pid))",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "time.sleep(600)",
    )
    going_on = program("heartbeat.beat()", *beating, "time.sleep(5)", "sys.exit(7)")
    begin = time.monotonic()
    assert heartbeat.supervise(hanging, going_on, math.inf) == 7
    assert 8 < time.monotonic() - begin < 60
    assert 110 < float(out.read_text()) <= 120
    assert ended(int(helper.read_text()))
    assert "hung" in capfd.readouterr().err
    assert heartbeat.FILE not in os.environ


def ended(process: int) -> bool:
    """Within ten seconds, whoever is its parent now."""
    for _ in range(100):
        try:
            if pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_what_is_killed_is_gone_on_with_too_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = program("os.kill(os.getpid(), signal.SIGSEGV)")
    assert heartbeat.supervise(killed, program("sys.exit(1)"), math.inf) == 1
    assert heartbeat.supervise(killed, program("sys.exit(7)"), time.monotonic()) == 1
    monkeypatch.setattr(heartbeat, "MOST_RESTARTS", 2)
    assert heartbeat.supervise(killed, killed, math.inf) == 1


@contextlib.contextmanager
def supervising(child: list[str]) -> Any:
    """A supervisor of ``child``, in a process of its own, and what both print."""
    command = program(f"sys.exit(heartbeat.supervise({child!r}, [], float('inf')))")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process
        process.kill()


def test_a_process_has_time_to_start_and_none_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = program("sys.exit(int(os.stat(os.environ[heartbeat.FILE]).st_mtime - time.monotonic()))")
    assert 220 < heartbeat.supervise(asked, [], math.inf) <= 240
    monkeypatch.setattr(heartbeat, "OVERTIME", 1.0)
    beating = program("for _ in range(300):", "    heartbeat.beat(); time.sleep(0.1)")
    begin = time.monotonic()
    assert heartbeat.supervise(beating, beating, begin + 1) == 1
    assert 2 <= time.monotonic() - begin < 15


def test_what_cannot_even_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> int:
        raise subprocess.TimeoutExpired("stuck in the driver", seconds)

    stuck = mock.Mock(**{"poll.return_value": None, "wait.side_effect": wait})
    monkeypatch.setattr(heartbeat, "STARTING", 0.0)
    monkeypatch.setattr(heartbeat, "_end_session", mock.Mock())
    monkeypatch.setattr(heartbeat.subprocess, "Popen", lambda *_, **__: stuck)
    assert heartbeat.supervise([], [], time.monotonic()) == 1
    assert stuck.wait.call_args_list == [mock.call(heartbeat.GRACE)]


def with_helper(*lines: str) -> list[str]:
    """A process that prints its helper's number, whose process group is its own."""
    helper = "subprocess.Popen(['sleep', '600'], process_group=0, stdout=subprocess.DEVNULL)"
    return program("import subprocess", f"print({helper}.pid, flush=True)", *lines)


def test_helpers_end_with_the_check(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert heartbeat.supervise(with_helper("sys.exit(7)"), [], math.inf) == 7
    assert ended(int(capfd.readouterr().out))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminated_supervisor_ends_the_check_and_its_helpers() -> None:
    with supervising(with_helper("print(os.getpid(), flush=True); time.sleep(60)")) as process:
        both = [int(process.stdout.readline()) for _ in range(2)]
        process.terminate()
        assert process.wait(20) == 143
        assert all(map(ended, both))


def test_ctrl_c_reaches_the_check(tmp_path: pathlib.Path) -> None:
    child = program(
        "try:", "    print('begun', flush=True); time.sleep(60)", "except KeyboardInterrupt:",
        "    print('kept', flush=True); sys.exit(130)",
    )  # fmt: skip
    with supervising(child) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "kept\n"
        assert process.wait(20) == 130


def test_the_check_ends_with_its_supervisor() -> None:
    with supervising(program("print(os.getpid(), flush=True); time.sleep(60)")) as process:
        child = int(process.stdout.readline())
        process.kill()
        assert ended(child)
