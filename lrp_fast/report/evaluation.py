"""The report of an evaluation: tables, figures, maps side by side, and one page over them.

Files of the folder: ``table.csv``, ``table.json``, ``table.md``, ``curves.png``, ``id.png``, ``conservation.png``,
``sanity.png`` (each where there is something to show), ``samples/`` and ``index.html``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image

from lrp_fast.heatmap import is_signed, overlay
from lrp_fast.images import LISTING

from .figures import conservation_figure, curves_figure, id_figure, sanity_figure
from .folder import PAGE, encode_image, write_whole
from .gallery import Failure
from .page import fill_template
from .scores import (
    PROTOCOLS,
    Entry,
    MethodScores,
    Row,
    differences,
    file_name,
    groups_in,
    number,
    sanity_failures,
    span,
    summarize,
    table_csv,
    table_json,
    table_markdown,
)

SAMPLES = "samples"
TWO_LEVELS = "random-two-level"


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that is shown with every method's map: its name, RGB image, and the class that is explained."""

    name: str
    image: Image.Image
    class_name: str


@dataclass(frozen=True)
class EvaluationReport:
    """What a report is made of.

    ``entries``: methods in order, measured or failed; ``controls``: the names of those that show nothing on purpose;
    ``pictures``: how many were evaluated; ``skipped``: pictures that could not be; ``settings``: what the header says,
    label to text; ``record``: the settings as they go into ``table.json``.
    """

    entries: Sequence[Entry]
    controls: Collection[str]
    pictures: int
    shown: Sequence[Shown]
    skipped: Sequence[Failure]
    settings: Mapping[str, str]
    record: Mapping[str, Any]
    interrupted: bool = False

    def scores(self) -> list[MethodScores]:
        return [entry for entry in self.entries if isinstance(entry, MethodScores)]


def write_report(report: EvaluationReport, folder: Path) -> list[Row]:
    """Write all files of the report into a folder, each whole or not at all, and return the rows of its table."""
    rows = summarize(report.entries, report.controls)
    write_whole(folder / "table.csv", table_csv(rows).encode("utf-8"))
    write_whole(folder / "table.json", table_json(rows, report.record).encode("utf-8"))
    write_whole(folder / "table.md", table_markdown(rows).encode("utf-8"))
    figures = _figures(report, rows)
    for name in ("curves.png", "id.png", "conservation.png", "sanity.png"):
        if name in figures:
            write_whole(folder / name, figures[name])
        else:
            (folder / name).unlink(missing_ok=True)
    strips = _write_samples(report, folder / SAMPLES)
    pictures = [*figures, *(f"{SAMPLES}/{file.name}" for file in sorted((folder / SAMPLES).iterdir()))]
    write_whole(folder / LISTING, "".join(f"{name}\n" for name in pictures).encode("utf-8"))  # for whoever looks for others
    write_whole(folder / PAGE, _render(report, rows, tuple(figures), strips).encode("utf-8"))
    return rows


def _figures(report: EvaluationReport, rows: Sequence[Row]) -> dict[str, bytes]:
    scores = report.scores()
    protocols = protocols_in(scores)
    figures = {}
    if protocols:
        figures["id.png"] = id_figure([row for row in rows if not row.reason], protocols)
        figures["curves.png"] = curves_figure(scores, report.controls, protocols)
    conserving = [one for one in scores if "relevance" in one.values]
    if conserving:
        figures["conservation.png"] = conservation_figure(conserving)
    randomized = [one for one in scores if one.sanity is not None]
    if randomized:
        figures["sanity.png"] = sanity_figure(randomized, report.controls)
    return figures


def protocols_in(scores: Sequence[MethodScores]) -> list[str]:
    """The protocols that insertion and deletion were measured by."""
    return [protocol for protocol in PROTOCOLS if any(f"{protocol}_id" in one.values for one in scores)]


@dataclass(frozen=True)
class _Strip:
    """One picture and all maps of it: ``maps`` are (method, whether it is a control, address), the picture's own first."""

    name: str
    class_name: str
    picture: str
    maps: Sequence[tuple[str, bool, str]]


def _write_samples(report: EvaluationReport, folder: Path) -> tuple[list[_Strip], list[bool]]:
    """Draw the maps as the gallery does; returns the strips, and which colour scales they use."""
    folder.mkdir(exist_ok=True)
    scores = report.scores()
    strips, scales = [], set()
    for place, shown in enumerate(report.shown):
        picture = f"picture-{place}.jpg"
        write_whole(folder / picture, encode_image(shown.image, "JPEG"))
        maps = []
        for one in scores:
            heatmap = torch.from_numpy(one.maps[place])
            if not bool(heatmap.isfinite().all()):
                continue
            signed = is_signed(heatmap)
            scales.add(signed)
            file = f"{file_name(one.name)}-{place}.png"
            write_whole(folder / file, encode_image(overlay(heatmap, shown.image, signed=signed), "PNG"))
            maps.append((one.name, one.name in report.controls, f"{SAMPLES}/{file}"))
        strips.append(_Strip(shown.name, shown.class_name, f"{SAMPLES}/{picture}", maps))
    return strips, sorted(scales)


def _render(
    report: EvaluationReport, rows: Sequence[Row], figures: Sequence[str], samples: tuple[list[_Strip], list[bool]]
) -> str:
    strips, scales = samples
    protocols = protocols_in(report.scores())
    first, paired = differences(report.scores(), report.controls, protocols)
    groups = groups_in(rows)
    return fill_template(
        "evaluation.html",
        report.settings,
        scales,
        {"breakable": _breakable},
        report=report,
        rows=rows,
        groups=groups,
        width=max(1, sum(len(group.columns) for group in groups)),
        figures=figures,
        strips=strips,
        protocols=protocols,
        first=first,
        paired=paired,
        two_levels=next((row for row in rows if row.name == TWO_LEVELS and not row.reason), None),
        number=number,
        span=span,
        sanity_failures=sanity_failures(report.entries),
    )


def _breakable(name: str) -> Markup:
    """A method's name that may go on in a new line after each of its parts."""
    return Markup("<wbr>").join(re.findall(r"[^:/+]*[:/+]|[^:/+]+", name))
