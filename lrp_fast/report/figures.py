"""The figures of an evaluation, as PNG: curves, ID with intervals, conservation, parameter randomization."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .scores import MethodScores, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 144
_CONTROL_STYLES = ("--", ":", "-.")
_MOST_STAGES_NAMED = 24
_INK, _SOFT = "#1d1b20", "#8a8590"


def curves_figure(scores: Sequence[MethodScores], controls: Collection[str], protocols: Sequence[str]) -> bytes:
    """The mean insertion and deletion curves of every method, a column for each protocol."""
    figure = _figure(4.6 * len(protocols) + 3.2, 7.2)
    panels = figure.subplots(2, len(protocols), sharex=True, sharey="row", squeeze=False)
    styles = method_styles(scores, controls)
    for (row, kind), (column, protocol) in _product(("insertion", "deletion"), protocols):
        axes = panels[row][column]
        for one in scores:
            curve = _mean(one.curves[f"{protocol}_{kind}"])
            axes.plot(one.fractions[protocol], curve, label=one.name, **styles[one.name])
        better = "higher is better" if kind == "insertion" else "lower is better"
        axes.set_title(f"{kind}, {protocol} ({better})", fontsize=10.5, loc="left")
        if row == 1:
            ties = ", were there no ties" if protocol == "threshold" else ""
            axes.set_xlabel(f"share of patches shown or removed{ties}")
        if column == 0:
            axes.set_ylabel("probability of the class")
    _legend(figure, panels[0][0])
    return _png(figure)


def id_figure(rows: Sequence[Row], protocols: Sequence[str]) -> bytes:
    """ID of every method with its interval, both protocols on one axis."""
    figure = _figure(8.6, 0.9 + 0.32 * len(rows))
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    for number, protocol in enumerate(protocols):
        intervals = [row.intervals[f"{protocol}_id"] for row in rows]
        means = np.array([each.mean for each in intervals])
        ends = np.array([[each.mean - each.low, each.high - each.mean] for each in intervals]).T
        axes.errorbar(
            means, places + (0.14 if number == 0 else -0.14), xerr=ends, fmt="o" if protocol == "rank" else "D",
            color="#2a6fbb" if protocol == "rank" else "#d2691e", mfc=None if protocol == "rank" else "white",
            markersize=5, linewidth=1.4, label=f"{protocol} protocol",
        )  # fmt: skip
    axes.axvline(0, color=_SOFT, linewidth=0.8)
    axes.set_yticks(places, [f"{row.name} (control)" if row.control else row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_SOFT if row.control else _INK)
    axes.grid(axis="x", color="#e6e3e8", linewidth=0.6)
    axes.set_xlabel("ID = insertion − deletion, mean and 95 % interval")
    axes.legend(frameon=False, fontsize=9, loc="best")
    return _png(figure)


def conservation_figure(scores: Sequence[MethodScores]) -> bytes:
    """Σ relevance against the start relevance, a panel for each method, or for several with the same numbers."""
    panels: dict[bytes, tuple[list[str], npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for one in scores:
        start, total = one.values["start"], one.values["relevance"]
        panels.setdefault(start.tobytes() + total.tobytes(), ([], start, total))[0].append(one.name)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.1 * columns, 3.1 * lines + 0.2)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (names, start, total) in zip(grid, panels.values(), strict=False):
        low, high = _range(start, total)
        axes.plot([low, high], [low, high], color=_SOFT, linewidth=0.8)
        axes.scatter(start, total, s=9, color="#2a6fbb", alpha=0.6, linewidths=0)
        axes.set_title("\n".join(names), fontsize=8)
        axes.set_xlabel("start relevance", fontsize=8)
        axes.set_ylabel("Σ relevance", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    return _png(figure)


def sanity_figure(scores: Sequence[MethodScores], controls: Collection[str]) -> bytes:
    """How alike the maps stay while the parameters are randomized from the output to the input, for every method."""
    figure = _figure(12.4, 5.0)
    panels = figure.subplots(1, 2, sharey=True)
    styles = method_styles(scores, controls)
    curves = {one.name: one.sanity for one in scores if one.sanity is not None}
    for name, curve in curves.items():
        for axes, similarity in zip(panels, (curve.spearman, curve.spearman_magnitude), strict=True):
            means = [1.0, *similarity.nanmean(1).tolist()]
            axes.plot(range(len(means)), means, label=name, **styles[name])
    longest = ["(trained)", *max((curve.stages for curve in curves.values()), key=len)]
    every = -(-len(longest) // _MOST_STAGES_NAMED)
    for axes, title in zip(panels, ("values", "absolute values"), strict=True):
        axes.set_title(f"rank correlation of {title}", fontsize=10.5, loc="left")
        axes.set_xticks(range(0, len(longest), every), longest[::every], rotation=90)
        axes.axhline(0, color=_SOFT, linewidth=0.8)
        axes.set_xlabel("randomized down to")
    panels[0].set_ylabel("similarity to the map of the trained network")
    _legend(figure, panels[0])
    return _png(figure)


def method_styles(scores: Sequence[MethodScores], controls: Collection[str]) -> Mapping[str, dict[str, Any]]:
    """A line's colour and dash for each method: controls grey and broken, quantized maps of a method dashed."""
    import matplotlib

    colors = [matplotlib.colormaps["tab10"](number) for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    families = list(dict.fromkeys(_family(one.name) for one in scores if one.name not in controls))
    grey = [one.name for one in scores if one.name in controls]
    styles: dict[str, dict[str, Any]] = {}
    for name in (one.name for one in scores):
        if name in controls:
            dash = _CONTROL_STYLES[grey.index(name) % len(_CONTROL_STYLES)]
            styles[name] = {"color": _SOFT, "linestyle": dash, "linewidth": 1.6}
            continue
        turn, place = divmod(families.index(_family(name)), len(colors))
        styles[name] = {
            "color": colors[place],
            "linestyle": "-" if name == _family(name) else (0, (4, 1.5)),
            "linewidth": 2.6 if turn else 1.5,
            "alpha": 0.55 if turn else 1.0,
        }
    return styles


def _family(name: str) -> str:
    """The method without its heat quantization: both have one colour."""
    return name.partition("+quantized")[0]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5)


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_SOFT)
        axes.tick_params(colors=_INK, labelsize=8)
    buffer = io.BytesIO()
    # Neither the date nor the version of matplotlib: the same numbers give the same file.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean over images [N, points] → [points], over those that have a value."""
    known = np.isfinite(values).all(axis=1)
    return values[known].mean(axis=0) if known.any() else np.full(values.shape[1], np.nan)


def _range(*values: npt.NDArray[np.float64]) -> tuple[float, float]:
    known = np.concatenate([each[np.isfinite(each)] for each in values])
    return (min(0.0, float(known.min())), float(known.max())) if known.size else (0.0, 1.0)


def _product(rows: Sequence[str], columns: Sequence[str]) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    return [(row, column) for row in enumerate(rows) for column in enumerate(columns)]
