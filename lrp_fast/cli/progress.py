"""How far a data set's run has come: one live line on a terminal, plain lines elsewhere, and a log in JSON."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lrp_fast.pipeline import Progress

from .common import shown

PLAIN_SECONDS = 10.0
"""How often progress is told in lines, where there is no terminal to redraw."""


class PlainLines:
    """Progress in lines, at most one every ``PLAIN_SECONDS``, where there is no terminal to redraw.

    The first is told ``at_once``, or when that time has passed.
    """

    def __init__(self, console: Console, at_once: bool = False) -> None:
        self._console = console
        self._told_at = -PLAIN_SECONDS if at_once else time.monotonic()

    def tell(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._told_at >= PLAIN_SECONDS:
            self._told_at = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)


class Display:
    """Shows a run of ``total`` samples, by default what the run says: ``with Display(total, log) as display``.

    ``log``: a file to which every event is appended as one line of JSON with its ``event`` and ``time`` (seconds since 1970).
    """

    def __init__(self, total: int | None = None, log: Path | None = None) -> None:
        self._total, self._log_path = total, log
        self._console = Console(stderr=True)
        columns = (
            TextColumn("explaining"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._lines = PlainLines(self._console, at_once=True)
        self._log: IO[str] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Display:
        if self._log_path is not None:
            self._log = self._open.enter_context(open(self._log_path, "a", encoding="utf-8"))
        self._open.enter_context(self._bar)
        self._task = self._bar.add_task("explaining", total=self._total, told="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._write("error", reason=" ".join(str(error).split()) or type(error).__name__)
        self._open.close()

    def begin(self, **settings: Any) -> None:
        self._write("begin", **settings)

    def failure(self, key: str, reason: str) -> None:
        self._console.print(f"[yellow]failed:[/] {shown(key)}: {shown(reason)}", highlight=False, soft_wrap=True)
        self._write("failure", key=key, reason=reason)

    def batch(self, progress: Progress) -> None:
        dealt_with, total = progress.done + progress.failed, self._total or progress.total
        told = f"{progress.failed} failed, {rates(progress)}"
        self._bar.update(self._task, completed=dealt_with, total=total, told=told)
        left = (total - dealt_with) / progress.rate() if progress.rate() else 0.0
        self._lines.tell(f"{dealt_with}/{total}, {progress.failed} failed, {left:.0f} s left, {rates(progress)}")
        self._write("batch", **_numbers(progress))

    def end(self, progress: Progress) -> None:
        numbers = {**_numbers(progress), "bytes_per_image": round(progress.bytes_per_image, 1)}
        self._write("end", interrupted=progress.interrupted, **numbers)

    def _write(self, event: str, **facts: Any) -> None:
        if self._log is not None:
            self._log.write(json.dumps({"event": event, "time": round(time.time(), 3), **facts}) + "\n")
            self._log.flush()


def _numbers(progress: Progress) -> dict[str, Any]:
    return {
        "done": progress.done,
        "failed": progress.failed,
        "fresh": progress.fresh,
        "images_per_second": round(progress.rate(), 3),
        "waited_for": {stage: round(share, 4) for stage, share in progress.shares().items()},
    }


def rates(progress: Progress) -> str:
    """The speed of a run, and what it waited for."""
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in progress.shares().items())
    return f"{progress.rate():.1f} images/s, waited for {shares}"
