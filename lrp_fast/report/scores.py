"""What an evaluation measured, the rows that sum it up, and those as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp_fast.metrics import Interval, RandomizationCurve, bootstrap, bootstrap_difference

from .folder import safe_cell
from .gallery import Failure, percent

Floats = npt.NDArray[np.float64]

PROTOCOLS = ("rank", "threshold")
METRICS = ("insertion-deletion", "localisation", "leak", "time")


@dataclass(frozen=True)
class Column:
    """One measured quantity: its key in ``MethodScores.values``, its heading, and which way is better."""

    key: str
    heading: str
    better: str
    what: str


@dataclass(frozen=True)
class Group:
    """Columns that stand under one heading."""

    heading: str
    columns: tuple[Column, ...]


def _protocol_columns(protocol: str) -> tuple[Column, ...]:
    return (
        Column(f"{protocol}_id", "ID", "higher", "insertion − deletion"),
        Column(f"{protocol}_insertion", "insertion", "higher", "area under the curve while patches are shown"),
        Column(f"{protocol}_deletion", "deletion", "lower", "area under the curve while patches are removed"),
    )


GROUPS = (
    Group("rank protocol", _protocol_columns("rank")),
    Group("threshold protocol (published)", _protocol_columns("threshold")),
    Group(
        "conservation", (Column("leak", "leak", "lower", "share of the start relevance that did not reach the pixels"),)
    ),
    Group(
        "localisation",
        (
            Column("pointing_game", "pointing", "higher", "how often the maximum lies on the object"),
            Column("relevance_mass", "mass", "higher", "share of the positive relevance on the object"),
            Column(
                "relevance_rank", "rank", "higher", "share of the most relevant pixels, as many as the object's, on it"
            ),
        ),
    ),
    Group("cost", (Column("seconds", "ms / image", "lower", "milliseconds per image"),)),
)
_PERCENT = ("leak",)


@dataclass(frozen=True, eq=False)
class MethodScores:
    """What was measured of one method, float64, NaN where an image has no such number.

    ``values``: column key → [N], besides ``start`` and ``relevance`` (the sum that arrived) of methods that conserve, and
    ``seconds`` → [batches]; ``curves``: ``PROTOCOL_insertion`` and ``PROTOCOL_deletion`` → [N, points]; ``fractions``:
    protocol → [points], the share of patches at each; ``maps``: float32 [shown, H, W] of the pictures that are shown;
    ``machine``: what the seconds were measured on; ``sanity``: the parameter randomization, where it was asked for, or
    ``sanity_reason``, why there is none.
    """

    name: str
    values: Mapping[str, Floats]
    curves: Mapping[str, Floats]
    fractions: Mapping[str, Floats]
    maps: npt.NDArray[np.float32]
    machine: str
    sanity: RandomizationCurve | None = None
    sanity_reason: str = ""


Entry = MethodScores | Failure
"""A method that was measured, or that failed."""


def sanity_failures(entries: Iterable[Entry]) -> list[Failure]:
    """The parameter randomizations that were asked for and failed."""
    scores = [entry for entry in entries if isinstance(entry, MethodScores) and entry.sanity_reason]
    return [Failure(f"parameter randomization of {one.name}", one.sanity_reason) for one in scores]


def file_name(method: str) -> str:
    """A method's name as that of a file, without suffix: plain characters, and different for different names."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", method).lstrip(".-")[:80]
    return f"{plain}-{zlib.crc32(method.encode('utf-8', 'surrogateescape')):08x}"


@dataclass(frozen=True)
class Row:
    """A line of the table: the mean and 95 % bootstrap interval of each column that was measured."""

    name: str
    control: bool
    intervals: Mapping[str, Interval]
    reason: str = ""


def summarize(entries: Iterable[Entry], controls: Collection[str] = ()) -> list[Row]:
    """The rows of a table, in order: a method that failed has a reason instead of numbers."""
    keys = [column.key for group in GROUPS for column in group.columns]
    rows = []
    for entry in entries:
        if isinstance(entry, Failure):
            rows.append(Row(entry.name, entry.name in controls, {}, entry.reason))
            continue
        measured = {key: bootstrap(entry.values[key]) for key in keys if key in entry.values}
        rows.append(Row(entry.name, entry.name in controls, measured))
    return rows


def differences(
    scores: Sequence[MethodScores], controls: Collection[str], protocols: Sequence[str]
) -> tuple[str, dict[str, dict[str, Interval]]]:
    """The first method that is no control, and of every other the difference of ID from it, paired over images.

    Returned as the method's name and ``{other: {protocol: interval}}``; empty where nothing can be compared.
    """
    measured = [one for one in scores if any(f"{protocol}_id" in one.values for protocol in protocols)]
    first = next((one for one in measured if one.name not in controls), None)
    if first is None:
        return "", {}
    found = {
        one.name: {
            protocol: bootstrap_difference(one.values[f"{protocol}_id"], first.values[f"{protocol}_id"])
            for protocol in protocols
        }
        for one in measured
        if one is not first
    }
    return first.name, found


def groups_in(rows: Sequence[Row]) -> list[Group]:
    """The groups and columns that any row has a number for."""
    measured = {key for row in rows for key in row.intervals}
    kept = [Group(group.heading, tuple(c for c in group.columns if c.key in measured)) for group in GROUPS]
    return [group for group in kept if group.columns]


def number(key: str, value: float) -> str:
    """A value of that column as text: leaks as percentages, seconds as milliseconds, others to three digits."""
    if math.isnan(value):
        return "–"
    if key in _PERCENT:
        return percent(value)
    if key == "seconds":
        return f"{1000 * value:.3g}" if value < 0.9995 else f"{1000 * value:.0f}"
    text = f"{value:.3f}"
    return ("0.000" if text == "-0.000" else text).replace("-", "−")


def span(key: str, interval: Interval) -> str:
    """An interval's ends as ``[low, high]``; empty where there are none. One that is just below 0 is ``−0.000``."""
    if math.isnan(interval.low):
        return ""
    ends = [(end, number(key, end)) for end in (interval.low, interval.high)]
    return f"[{', '.join(f'−{text}' if text == '0.000' and end < 0 else text for end, text in ends)}]"


def table_csv(rows: Sequence[Row]) -> str:
    """One line for each method; for each column its mean, the ends of its interval, and the images it is of."""
    columns = [column.key for group in groups_in(rows) for column in group.columns]
    parts = ("mean", "low", "high", "count")
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["method", "control", "reason", *(f"{key}_{part}" for key in columns for part in parts)])
    for row in rows:
        cells: list[str] = []
        for key in columns:
            interval = row.intervals.get(key)
            if interval is None:
                cells += [""] * len(parts)
                continue
            ends = (interval.mean, interval.low, interval.high)
            cells += ["" if math.isnan(value) else f"{value:.6g}" for value in ends] + [str(interval.count)]
        writer.writerow([safe_cell(row.name), "yes" if row.control else "no", safe_cell(row.reason), *cells])
    return table.getvalue()


def table_json(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """The settings and, for each method, every column's mean, interval and count."""

    def plain(value: float) -> float | None:
        return None if isinstance(value, float) and math.isnan(value) else value

    methods = [
        {
            "name": row.name,
            "control": row.control,
            "reason": row.reason,
            "metrics": {
                key: {part: plain(value) for part, value in asdict(interval).items()}
                for key, interval in row.intervals.items()
            },
        }
        for row in rows
    ]
    return json.dumps({"settings": settings, "methods": methods}, indent=2, allow_nan=False) + "\n"


def table_markdown(rows: Sequence[Row]) -> str:
    """A table for a README: means, with the intervals of ID and how many images fewer than all have; controls in italics."""
    columns = [(group, column) for group in groups_in(rows) for column in group.columns]
    short = {"rank protocol": "rank: ", "threshold protocol (published)": "threshold: ", "localisation": "object: "}
    heads = [f"{short.get(group.heading, '')}{column.heading}" for group, column in columns] or [""]
    lines = [["method", *heads], [":--", *["--:"] * len(heads)]]
    for row in rows:
        cells = [_markdown_cell(column.key, row.intervals.get(column.key)) for _, column in columns] or [""]
        if row.reason:
            cells[0] = f"failed: {_inert(row.reason)}"
        lines.append([f"*{_inert(row.name)}*" if row.control else _inert(row.name), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(key: str, interval: Interval | None) -> str:
    if interval is None or interval.count == 0:
        return ""
    ends = span(key, interval) if key.endswith("_id") else ""
    return " ".join(filter(None, (number(key, interval.mean), ends, f"of {interval.count}" if interval.missing else "")))


def _inert(text: str) -> str:
    """Text in which Markdown finds neither a cell's end nor any markup."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|" else character for character in " ".join(text.split()))
