"""What a GPU check found: kept as JSON while it runs, shown as one Markdown table at the end.

Files: ``<device>-kernels-<versions>.json`` and ``<device>-<precision>-<versions>.json`` for bfloat16, float32 and tf32, and
``<device>-<versions>.md``; what the GPU tests print is in ``<device>-tests-<versions>.log``, what compiles ahead in
``<device>-ahead-<versions>.log``. A cell holds numbers, or under ``entry`` the reason why there are none; a ``provisional``
one was not yet timed in turn with the others. ``unchecked seconds`` is what took heatmaps or outputs that failed parity.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import records
from heartbeat import beat

Cell = dict[str, Any]

PRECISIONS = ("bfloat16", "float32", "tf32")
COLUMNS = (
    "forward", "forward compiled", "torch", "torch compiled", "triton", "triton tuned", "triton + graph", "zennit",
    "captum",
)  # fmt: skip
PEERS = ("zennit", "captum")
OURS = ("torch", "torch compiled", "triton", "triton tuned", "triton + graph")
ENDED, NO_TIME = "the process ended or hung", "no time left"
HAVE_CHOICES = ("complete", "cut short")
"""What is said of tuning that measured choices."""
HEADLINE = "resnet50/otsuki2024/256"
BATCH_ONE = "resnet50/otsuki2024/1"


class Results:
    """Everything measured, by file; :meth:`write` keeps it on disk."""

    def __init__(self, folder: pathlib.Path, device: str, versions: str, code: str, began: float = 0.0) -> None:
        self.folder, self.device, self.versions, self.code, self.began = folder, device, versions, code, began
        self.files: dict[str, Cell] = {name: self._empty() for name in ("kernels", *PRECISIONS)}

    def _empty(self) -> Cell:
        return {"code": self.code, "began": self.began, "cells": {}}

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{self.device}-{name}-{self.versions}.json"

    @property
    def table_path(self) -> pathlib.Path:
        """The Markdown file."""
        return self.folder / f"{self.device}-{self.versions}.md"

    def log_path(self, what: str) -> pathlib.Path:
        """What the GPU ``"tests"`` print, or those that compile ``"ahead"``, or whole ``"errors"``."""
        return self.folder / f"{self.device}-{what}-{self.versions}.log"

    @property
    def run(self) -> Cell:
        """What concerns the whole run: environment, tests, measured rates, what was left out."""
        return self.files["kernels"]

    def load(self, earlier: bool = True) -> None:
        """Go on from the files of the same code. Without ``earlier`` runs' only from those of this one: theirs are removed."""
        for name in self.files:
            path = self._path(name)
            found = json.loads(path.read_text()) if path.exists() else {}
            if found.get("code") == self.code and (earlier or found.get("began") == self.began):
                self.files[name] = found
            elif not earlier:
                path.unlink(missing_ok=True)

    def write(self) -> None:
        """Everything so far, JSON and Markdown. Each file is replaced as a whole."""
        beat()
        for name, found in self.files.items():
            if found["cells"] or name == "kernels":
                records.write(self._path(name), finite(found))
        records.write_text(self.table_path, markdown(self))  # last: an error in there loses no number

    def columns(self, precision: str, setting: str) -> dict[str, Cell]:
        """The cells of one network, composite and batch, to be filled."""
        found: dict[str, Cell] = self.files[precision]["cells"].setdefault(setting, {})
        return found

    def has(self, precision: str, setting: str, column: str, provisional: bool = False) -> bool:
        """Whether there is a cell to stay: a provisional one only where ``provisional`` suffices, or if it failed."""
        cell = self.files[precision]["cells"].get(setting, {}).get(column)
        return cell is not None and (provisional or cell.get("failed", False) or not cell.get("provisional"))

    def measure_again(self, precision: str, setting: str, columns: Iterable[str]) -> None:
        """Make provisional what was timed, unless it failed."""
        cells = self.files[precision]["cells"].get(setting, {})
        for cell in (cells[name] for name in columns if name in cells):
            if "seconds" in cell and not cell.get("failed"):
                cell["provisional"] = True

    def tuning(self, setting: str) -> str | None:
        """What came of tuning a setting, if it was tried."""
        found: str | None = self.run.get("tuned", {}).get(setting)
        return found

    @contextmanager
    def attempting(self, cells: dict[str, Cell], name: str, **known: object) -> Iterator[None]:
        """Within, a cell that is not there to stay says that the process ended: so that no later run ends the same way."""
        earlier = cells.get(name, {})
        if earlier and not earlier.get("provisional"):
            yield
            return
        attempt = cells[name] = known | earlier | {"entry": ENDED, "failed": True}
        self.write()
        try:
            yield
        finally:
            if cells[name] is attempt and earlier:
                cells[name] = earlier
            elif cells[name] is attempt:
                del cells[name]

    def leave_out(self, what: str, why: str = NO_TIME) -> None:
        """Record what was not measured."""
        self.run.setdefault("left out", {})[what] = why

    def take_in(self, what: str) -> None:
        """It was measured after all."""
        self.run.get("left out", {}).pop(what, None)

    def failures(self) -> list[str]:
        """Whatever must not be: failed tests, failed parity, errors of our own explainers and kernels."""
        tests = self.run.get("tests")
        unfinished = tests and tests["exit code"] is None and not tests["failed"]
        found = [f"GPU tests: {tests['summary']}"] if tests and tests["exit code"] != 0 and not unfinished else []
        found += [f"{stage}: {entry}" for stage, entry in self.run.get("stages", {}).items()]
        fine = (*HAVE_CHOICES, "out of memory")
        found += [f"tuning {name}: {entry}" for name, entry in self.run.get("tuned", {}).items() if entry not in fine]
        found += [f"kernel {key}: {cell['entry']}" for key, cell in self.run["cells"].items() if cell.get("failed")]
        for precision in PRECISIONS:
            for setting, columns in self.files[precision]["cells"].items():
                for column, cell in columns.items():
                    if cell.get("failed"):
                        found.append(f"{setting} {precision} {column}: {cell['entry']}")
        return found


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Targets ----------------------------------------------------------------------------------------------------------------


def targets(results: Results) -> list[tuple[str, str, str]]:
    """The issue's targets for an H100: what, the measured value (or ``not measured``), yes or no.

    Numbers that are only provisional decide nothing: that is said instead of yes or no.
    """
    cells = results.files["bfloat16"]["cells"]
    columns, decided = _to_judge(cells.get(HEADLINE, {}), ("triton", "triton tuned"))
    single, single_decided = _to_judge(cells.get(BATCH_ONE, {}), ("triton + graph",))
    seconds = {name: cell["seconds"] for name, cell in columns.items()}
    interleaved = min((seconds[name] for name in ("triton", "triton tuned") if name in seconds), default=None)
    best = min((seconds[name] for name in OURS if name.startswith("triton") and name in seconds), default=None)
    peaks = [columns[name].get("peak bytes per image") for name in ("triton tuned", "triton") if name in seconds]
    peak = peaks[0] / 1e6 if peaks and peaks[0] is not None else None

    def ratio(name: str, inverse: bool = False) -> float | None:
        if interleaved is None or name not in seconds:
            return None
        return interleaved / seconds[name] if inverse else seconds[name] / interleaved

    alone = single.get("triton + graph", {}).get("seconds")
    rows = [
        ("at least 6,500 images/s", best and 256 / best, lambda x: x >= 6500, "{:,.0f} images/s"),
        ("at least 1.3x the compiled torch backend", ratio("torch compiled"), lambda x: x >= 1.3, "{:.2f}x"),
        ("at most 4x the compiled forward pass", ratio("forward compiled", True), lambda x: x <= 4, "{:.2f}x"),
        ("at least 20x zennit", ratio("zennit"), lambda x: x >= 20, "{:.1f}x"),
        ("at most 60 MB per image at the peak", peak, lambda x: x <= 60, "{:.1f} MB"),
        ("batch 1 under 1.5 ms with a CUDA graph", alone and 1000 * alone, lambda x: x < 1.5, "{:.2f} ms"),
    ]
    judged = [*[decided] * 5, single_decided]
    return [_judged(*row, final) for row, final in zip(rows, judged, strict=True)]


def _to_judge(columns: dict[str, Cell], needed: Sequence[str]) -> tuple[dict[str, Cell], bool]:
    """What was timed and did not fail, and whether it is final: all of it is, if any of what is ``needed`` is."""
    timed = {name: cell for name, cell in columns.items() if "seconds" in cell and not cell.get("failed")}
    final = {name: cell for name, cell in timed.items() if not cell.get("provisional")}
    return (final, True) if any(name in final for name in needed) else (timed, False)


def _judged(
    what: str, value: float | None, met: Callable[[float], bool], form: str, final: bool
) -> tuple[str, str, str]:
    if value is None:
        return what, "not measured", ""
    return what, form.format(value), ("yes" if met(value) else "no") if final else "provisional"


# Markdown ---------------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """The whole report."""
    run = results.run
    environment = ", ".join(f"{name} {value}" for name, value in run.get("environment", {}).items())
    tests = run.get("tests", {"summary": "not run"})
    parts = [
        f"# GPU check: {results.device}",
        f"{environment}\n\ncode {results.code}, {run.get('date', '')}; GPU tests: {tests['summary']}",
    ]
    failures = results.failures()
    if failures:
        parts.append("## Failures\n\n" + "\n".join(f"- {failure}" for failure in failures))
    head = "## Targets, set for an H100: ResNet-50, 224 x 224, bfloat16, batch 256, heatmaps out"
    parts.append(f"{head}\n\n{table(('target', 'measured', 'met'), targets(results))}")
    provisional = [
        f"{setting} {column}"
        for setting, columns in results.files["bfloat16"]["cells"].items() if setting in (HEADLINE, BATCH_ONE)
        for column, cell in columns.items() if cell.get("provisional")
    ]  # fmt: skip
    if provisional:
        parts.append(f"Provisional, not timed in turn with the others: {', '.join(provisional)}.")
    parts += [_speeds(results, precision) for precision in PRECISIONS if results.files[precision]["cells"]]
    if "profile" in run:
        parts.append(_profile(run["profile"]))
    if run["cells"]:
        parts.append(_kernels(run))
    if run.get("left out"):
        parts.append(table(("left out", "why"), run["left out"].items()))
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _speeds(results: Results, precision: str) -> str:
    cells = results.files[precision]["cells"]
    present = [name for name in COLUMNS if any(name in columns for columns in cells.values())]
    speeds, memory, parity = [], [], []
    for setting, columns in cells.items():
        speeds.append([setting, *(_number(columns.get(name), "images per second", "{:,.0f}") for name in present)])
        memory.append([setting, *(_megabytes(columns.get(name)) for name in present)])
        parity += [
            [setting, name, *_parity(columns[name])] for name in OURS if "relative error" in columns.get(name, {})
        ]
    head = ["network/composite/batch", *present]
    return (
        f"## {precision}: images/s\n\n{table(head, speeds)}\n\n"
        f"Timed in turn with each other; {' and '.join(PEERS)} alone, two calls after a first one; "
        "~: provisional, not yet in turn.\n\n"
        f"Peak memory of a call beyond model and inputs, MB per image (`triton + graph`: of the recording call):\n\n"
        f"{table(head, memory)}\n\n"
        "Parity of the timed heatmaps with the float64 reference:\n\n"
        f"{table(('network/composite/batch', 'run', 'relative L2', 'bound', 'Spearman'), parity)}"
    )


def _number(cell: Cell | None, name: str, form: str) -> str:
    if cell is None:
        return ""
    if cell.get(name) is None:
        return str(cell.get("entry", ""))
    return "~" * bool(cell.get("provisional")) + form.format(cell[name])


def _megabytes(cell: Cell | None) -> str:
    peak = (cell or {}).get("peak bytes per image")
    return "" if peak is None else f"{peak / 1e6:.1f}"


def _parity(cell: Cell) -> list[str]:
    bound = cell["bound"]
    return [
        _or_nan(cell["relative error"], "{:.1e}"), "none" if bound is None else f"{bound:.0e}",
        _or_nan(cell["spearman"], "{:.5f}"),
    ]  # fmt: skip


def _or_nan(value: float | None, form: str) -> str:
    """A number, or what is None in JSON."""
    return form.format(math.nan if value is None else value)


def _profile(profile: Cell) -> str:
    rows = [
        (row["kernel"][:90], str(row["calls"]), f"{1e6 * row['seconds']:,.0f}", f"{row['share']:.1%}")
        for row in profile["rows"]
    ]
    busy = f"{profile['busy seconds'] / profile['seconds']:.0%}" if profile["seconds"] else "?"
    return (
        f"## Profile: {profile['what']}\n\n{1000 * profile['seconds']:.2f} ms on the wall clock, kernels running {busy} of "
        f"it; {profile['kernels']} different kernels, the longest:\n\n"
        f"{table(('kernel', 'calls', 'µs', 'share'), rows)}"
    )


def _kernels(run: Cell) -> str:
    rates = ", ".join(f"{name} {value:.4g}" for name, value in run.get("rates", {}).items())
    rows = []
    for key, cell in run["cells"].items():
        if "seconds" not in cell:
            rows.append([key, str(cell.get("count", "")), str(cell.get("entry", "")), *[""] * 6])
            continue
        compiled = cell.get("compiled over kernel")
        rows.append([
            key, str(cell["count"]), f"{1e6 * cell['seconds']:,.1f}", f"{cell['gigabytes per second']:,.0f}",
            f"{cell['teraflops']:,.1f}", f"{cell['share']:.0%}", f"{cell['eager seconds'] / cell['seconds']:.2f}x",
            str(cell.get("compiled entry", "")) if compiled is None else f"{compiled:.2f}x",
            _or_nan(cell["relative error"], "{:.0e}"),
        ])  # fmt: skip
    head = ("kernel", "count", "µs", "GB/s", "TFLOP/s", "of the floor", "over eager", "over compiled", "error")
    return f"## Kernels\n\nRates measured in this run: {rates}. {_whole(run)}\n\n{table(head, rows)}"


def _whole(run: Cell) -> str:
    """What the kernels of one explanation add up to."""
    cells = [cell for cell in run["cells"].values() if cell.get("precision") == "bfloat16" and cell.get("count")]
    timed = [cell for cell in cells if "seconds" in cell]
    if not timed:
        return ""
    seconds = sum(cell["count"] * cell["seconds"] for cell in timed)
    floor = sum(cell["count"] * cell["floor seconds"] for cell in timed)
    return (
        f"One explanation of a ResNet-50, bfloat16, batch 256, without the library's convolutions: count times µs over the "
        f"{len(timed)} of {len(cells)} rows that were timed is {1000 * seconds:.2f} ms; their floor is {1000 * floor:.2f} ms."
    )
