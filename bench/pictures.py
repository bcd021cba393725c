"""The benchmarks' pictures, from what they wrote: peers, roofline and growth, each as SVG and PNG in ``bench/pictures/``.

    python bench/pictures.py [--device cpu-x86_64] [--network resnet50] [--batch 8] [--dtype float32]

Reads the newest results of this machine, or of the device named, in ``bench/results/``, and measures nothing. The same numbers
give the same files. Where results are missing it says which command makes them, draws the others, and ends with exit code 1.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console

import records
from growth import CARDS, CURVES, IN_ONE_PIECE

PICTURES = Path(__file__).resolve().parent / "pictures"
DOTS_PER_INCH = 144
WIDTH = 9.6
"""Inches: about 920 pixels of a page."""
INK, SOFT, PALE, GRID = "#1d1b20", "#8a8590", "#c9c6cd", "#e6e3e8"
BLUE, ORANGE = "#2a6fbb", "#d2691e"
"""As in an evaluation's figures; told apart by every kind of colour vision."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lrp_fast", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": SOFT, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "xtick.color": INK, "ytick.color": INK, "hatch.linewidth": 0.7,
}  # fmt: skip

Result = Mapping[str, Any]


class MissingResultError(Exception):
    """There is nothing to draw a picture from; the text names the command that makes it."""


# Results ----------------------------------------------------------------------------------------------------------------


def newest(results: Path, pattern: str, needs: str, command: str) -> dict[str, Any]:
    """The latest result, by its date, whose file fits the pattern and has ``needs``.

    MissingResultError if there is none. ValueError, with the file's name, for one that is no JSON.
    """
    found = []
    for path in sorted(results.glob(pattern)):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if needs in result:
            found.append((result.get("date", ""), path.name, result))
    if not found:
        raise MissingResultError(f"no {results / pattern} with {needs!r}: make it with `{command}`")
    latest: dict[str, Any] = max(found, key=lambda one: one[:2])[2]
    return latest


def source_line(result: Result, setting: str) -> str:
    """The small line below a picture: what was measured, on which machine, with what, and when."""
    device = result["device"]
    threads = f", {device['threads']} thread{'s' * (device['threads'] != 1)}"
    name = device.get("device", device["processor"])
    version, day = result["versions"]["torch"].partition("+")[0], result["date"].partition(" ")[0]
    return f"{setting}; {name}{threads}; torch {version}; {day}"


def network_title(name: str) -> str:
    """As papers write it."""
    return name.replace("resnet", "ResNet-", 1).replace("ResNet-_", "ResNet-") if name.startswith("resnet") else name


# Peers ------------------------------------------------------------------------------------------------------------------


def peers_figure(result: Result, network: str, batch: int, dtype: str) -> Figure:
    """Images per second of every contender in one setting, the fastest on top."""
    setting = {"network": network, "batch": batch, "dtype": dtype}
    rows = [row for row in result["rows"] if all(row[name] == value for name, value in setting.items())]
    timed = [row for row in rows if row.get("images_per_second")]
    if not timed:
        raise MissingResultError(
            f"the results have no row of {network}, batch {batch}, {dtype}: make it with `make bench`"
        )
    timed.sort(key=lambda row: -row["images_per_second"])
    failed = [row for row in rows if not row.get("images_per_second")]
    figure = _figure(1.5 + 0.27 * len(rows))
    axes = figure.subplots()
    fastest = timed[0]["images_per_second"]
    for place, row in enumerate(timed):
        style = _bar_style(row)
        axes.barh(place, row["images_per_second"], height=0.72, **style)
        axes.text(
            row["images_per_second"] + 0.008 * fastest, place, _bar_text(row, timed), va="center", fontsize=8,
            color=ORANGE if _wrong(row) else INK, fontweight="bold" if is_ours(row) else "normal",
        )  # fmt: skip
    for place, row in enumerate(failed, len(timed)):
        axes.text(0.008 * fastest, place, _verdict(row)[:90], va="center", fontsize=8, color=SOFT)
    axes.set_yticks(range(len(rows)), [row["contender"] for row in (*timed, *failed)])
    for label, row in zip(axes.get_yticklabels(), (*timed, *failed), strict=True):
        label.set_fontweight("bold" if is_ours(row) else "normal")
        label.set_color(BLUE if is_ours(row) else INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * fastest)
    axes.set_xlabel(
        "images per second; “ours n×”: our speed with the same rules, or else with otsuki2024's, over this one's"
    )
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    side = timed[0]["side"]
    _titled(
        figure, _peers_title(timed), source_line(result, f"{network_title(network)}, {side}², batch {batch}, {dtype}")
    )
    return figure


def is_ours(row: Result) -> bool:
    """Whether a row is one of our explainers'."""
    return row["kind"] == "ours"


def _verdict(row: Result) -> str:
    return str(row.get("parity", {}).get("verdict", "not measured"))


def _wrong(row: Result) -> bool:
    return _verdict(row) == "wrong"


def _bar_style(row: Result) -> dict[str, Any]:
    if is_ours(row):
        return {"color": BLUE}
    if row["kind"] == "forward":
        return {"color": SOFT}
    if _wrong(row):
        return {"facecolor": "white", "edgecolor": ORANGE, "hatch": "////", "linewidth": 0.8}
    return {"color": PALE}


def best_of_ours(rows: Sequence[Result], composite: str | None) -> Result | None:
    """Our fastest row of a composite; of ``otsuki2024`` where we have not timed that one."""
    ours = [row for row in rows if is_ours(row)]
    same = [row for row in ours if row["composite"] == composite]
    return max(
        same or [row for row in ours if row["composite"] == "otsuki2024"],
        key=lambda row: row["images_per_second"], default=None,
    )  # fmt: skip


def _bar_text(row: Result, rows: Sequence[Result]) -> str:
    text, ours = f"{row['images_per_second']:.3g}", best_of_ours(rows, row.get("composite"))
    if ours is not None and not is_ours(row):
        ratio = ours["images_per_second"] / row["images_per_second"]
        text += f"   ours {ratio:.{1 if ratio >= 1 else 2}f}×"
    return f"{text}   map is wrong" if _wrong(row) else text


def _peers_title(rows: Sequence[Result]) -> str:
    speeds = {row["contender"]: row["images_per_second"] for row in rows}
    ours, zennit = best_of_ours(rows, "otsuki2024"), speeds.get("zennit EpsilonPlusFlat")
    forward = max((row["images_per_second"] for row in rows if row["kind"] == "forward"), default=None)
    if ours is None:
        return "Maps per second"
    found = []
    if zennit is not None:
        found.append(f"{ours['images_per_second'] / zennit:.1f} times as fast as zennit's")
    if forward is not None:
        found.append(f"each in the time of {forward / ours['images_per_second']:.1f} forward passes")
    return f"Our maps: {', '.join(found)}" if found else "Our maps per second"


# Roofline ---------------------------------------------------------------------------------------------------------------

DIRECTIONS = (("forward", BLUE, "o"), ("backward", ORANGE, "D"))


def roofline_figure(result: Result) -> Figure:
    """Every unit with products by intensity and rate; beside it, what only moves memory, by bandwidth."""
    figure = _figure(4.9)
    memory, axes = figure.subplots(1, 2, width_ratios=(1, 4.6))
    units, ceilings, dtype = result["units"], result["ceilings"], result["dtype"]
    computing = [row for row in units if row["flops"]]
    moving = [row for row in units if not row["flops"] and row["bytes"]]
    kinds = sorted({row["kind"] for row in moving})
    largest = max(row["seconds"] for row in units)
    for direction, color, marker in DIRECTIONS:
        rows = [row for row in computing if row["direction"] == direction]
        x, y = [row["flops"] / row["bytes"] for row in rows], [row["flops"] / row["seconds"] / 1e9 for row in rows]
        _dots(axes, x, y, rows, largest, color, marker, direction)
        rows = [row for row in moving if row["direction"] == direction]
        shift = -0.13 if direction == "forward" else 0.13
        places = [kinds.index(row["kind"]) + shift for row in rows]
        _dots(
            memory,
            places,
            [row["bytes"] / row["seconds"] / 1e9 for row in rows],
            rows,
            largest,
            color,
            marker,
            direction,
        )
    _ceilings(axes, memory, computing, ceilings, dtype)
    axes.set_xlabel("arithmetic intensity (FLOP per byte moved)")
    axes.set_ylabel("GFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="lower right", markerscale=0.8)
    memory.set_ylabel("GB/s")
    memory.set_xticks(range(len(kinds)), kinds)
    memory.set_xlim(-0.6, len(kinds) - 0.4)
    memory.set_title("moving memory only", fontsize=9, loc="left")
    axes.set_title("layers with products (area of a dot: its time)", fontsize=9, loc="left")
    whole = result["whole"]
    title = (
        f"{whole['share_of_floor']:.0%} of the machine's limit: {1000 * whole['seconds']:.0f} ms, at the roofline "
        f"{1000 * whole['floor_seconds']:.0f} ms\n"
        f"{whole['forward_passes']:.1f} forward passes ({whole['forward_passes_at_the_floor']:.1f} if both were at the roofline)"
    )
    setting = f"{network_title(result['network'])}, {result['side']}², batch {result['batch']}, {dtype}, {result['composite']}"
    _titled(figure, title, source_line(result, setting))
    return figure


def _dots(
    axes: Any, x: Sequence[float], y: Sequence[float], rows: Sequence[Result], largest: float, color: str, marker: str,
    label: str,
) -> None:  # fmt: skip
    area = [12 + 220 * row["seconds"] / largest for row in rows]
    axes.scatter(
        x, y, s=area, color=color, marker=marker, alpha=0.55, edgecolors="white", linewidths=0.5, label=label, zorder=3
    )


def _ceilings(axes: Any, memory: Any, rows: Sequence[Result], ceilings: Result, dtype: str) -> None:
    """The roof: the slope of the bandwidth up to the best rate, and the other rate below it."""
    rates = {
        "matrix products": ceilings["products"][dtype] / 1e9,
        "3×3 convolutions": ceilings["convolutions"][dtype] / 1e9,
    }
    bandwidth, top = ceilings["bandwidth"] / 1e9, max(rates.values())
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensities, top / bandwidth) / 2, max(*intensities, top / bandwidth) * 2
    for name, rate in rates.items():
        x = [low, rate / bandwidth, high] if rate == top else [rate / bandwidth, high]
        y = [low * bandwidth, rate, rate] if rate == top else [rate, rate]
        axes.plot(
            x, y, color=INK, linewidth=1.4, linestyle="-" if rate == top else "--", label=f"{name}: {rate:,.0f} GFLOP/s"
        )
    memory.axhline(bandwidth, color=INK, linewidth=1.4)
    memory.annotate(
        f"copy: {bandwidth:,.0f} GB/s", (0.02, bandwidth), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="left", va="bottom", fontsize=8,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _log_values(axes.xaxis)
    for each, ceiling in ((axes, top), (memory, bandwidth)):
        each.set_yscale("log")
        bottom, above = each.get_ylim()
        each.set_ylim(bottom / 2, max(above, 1.6 * ceiling))
        _log_values(each.yaxis)
        each.grid(color=GRID, linewidth=0.6)
        each.set_axisbelow(True)


def _log_values(axis: Any) -> None:
    """1, 2, 5, 10, 20…, as numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(_PLAIN)
    axis.set_minor_locator(NullLocator())


_PLAIN = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


# Growth -----------------------------------------------------------------------------------------------------------------

PANELS = {
    "batch": ("ms per image", "images in a batch"),
    "side": ("ms per image", "side of the image (pixels)"),
    "depth": ("ms per image", "layers of the ResNet (batch 2)"),
    "width": ("ms per image", "width of a ResNet-50's 3×3 convolutions (batch 2)"),
    "targets": ("ms per map", "maps of one image"),
}


def growth_figure(result: Result) -> Figure:
    """A panel for each curve, and one for memory."""
    curves = {name: entry for name, entry in result["curves"].items() if len(entry["points"]) > 1 and name in PANELS}
    if not curves:
        raise MissingResultError(
            "the growth results have no curve of two points: make them with `python bench/growth.py`"
        )
    panels = len(curves) + ("batch" in curves)
    rows = -(-panels // 2)
    figure = _figure(0.9 + 2.7 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (name, entry) in zip(grid, curves.items(), strict=False):
        _time_panel(axes, name, entry)
    if "batch" in curves:
        _memory_panel(grid[len(curves)], result)
    for axes in grid[panels:]:
        axes.axis("off")
    handles, labels = grid[0].get_legend_handles_labels()
    grid[0].legend(handles, labels, frameon=False, fontsize=8.5, loc="best")
    _titled(
        figure,
        _growth_title(result),
        source_line(result, f"ResNet-50, 224² unless said, {result['settings']['dtype']}"),
    )
    return figure


def _growth_title(result: Result) -> str:
    found = result["curves"].get("batch", {}).get("fits", {})
    more = ""
    if found:
        ours, forward = found["seconds"]["slope"], found["forward_seconds"]["slope"]
        more = f": {1000 * ours:.3g} ms for each image more, {ours / forward:.1f} forward passes"
    return f"How an explanation grows{more}"


def _time_panel(axes: Any, name: str, entry: Result) -> None:
    points = entry["points"]
    x = [point["value"] for point in points]
    maps = [point["batch"] * point["targets"] for point in points]
    label, axis = PANELS[name]
    series = [("explanation", "seconds", BLUE, "o-"), ("forward pass", "forward_seconds", SOFT, "s--")]
    for what, measure, color, style in series:
        each = maps if measure == "seconds" else [point["batch"] for point in points]
        y = [1000 * point[measure] / count for point, count in zip(points, each, strict=True)]
        axes.plot(x, y, style, color=color, linewidth=1.6, markersize=4.5, label=what)
    axes.set_xlabel(axis, fontsize=8.5)
    axes.set_ylabel(label)
    _value_axis(axes, x, log=name != "depth")
    if CURVES[name].fit == "power":
        axes.set_yscale("log")
        _log_values(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    fitted = entry["fits"]
    stopped = f"; stopped before {entry['stopped']['before']}" if entry.get("stopped") else ""
    time, memory = _law(name, fitted["seconds"], 1e3, "ms"), _law(name, fitted["peak_bytes"], 1e-6, "MB")
    axes.set_title(f"{name}: time of a call {time}\npeak memory {memory}{stopped}", fontsize=8.5, loc="left")


EACH = {"batch": "image", "depth": "layer", "targets": "map"}


def _law(name: str, fit: Result, scale: float, unit: str) -> str:
    """A fitted law of a call."""
    if "exponent" in fit:
        return f"∝ {name}^{fit['exponent']:.2f}"
    return f"{scale * fit['intercept']:.3g} {unit} + {scale * fit['slope']:.3g} {unit} × {EACH[name]}s"


def _memory_panel(axes: Any, result: Result) -> None:
    """Peaks per image, and where cards stop."""
    points, cards = result["curves"]["batch"]["points"], result.get("cards", {})
    x = [point["batch"] for point in points]
    peaks = [point["peak_bytes"] / point["batch"] / 1e6 for point in points]
    axes.plot(x, peaks, "o-", color=BLUE, linewidth=1.6, markersize=4.5)
    slope = result["curves"]["batch"]["fits"]["peak_bytes"]["slope"] / 1e6
    axes.axhline(slope, color=SOFT, linewidth=0.9, linestyle=":")
    _value_axis(axes, x)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a batch", fontsize=8.5)
    axes.set_ylabel("peak MB per image")
    estimate = " (estimated from a CPU)" if any(found["estimate"] for found in cards.values()) else ""
    pieces = f" up to {IN_ONE_PIECE}, then little" if estimate and max(x) > IN_ONE_PIECE else ""
    stops = ", ".join(f"{name} hold {cards[name]['largest_batch']:,}" for name in CARDS if name in cards)
    cut = f"\n{stops}{estimate}" if stops else ""
    axes.set_title(f"memory: {slope:.3g} MB for each image more{pieces}{cut}", fontsize=8.5, loc="left")


def _value_axis(axes: Any, values: Sequence[float], log: bool = True) -> None:
    """A tick for each value, as far as there is room."""
    measure = np.log if log else np.asarray
    axes.set_xscale("log" if log else "linear")
    shown: list[float] = []
    for value in values:
        if not shown or measure(value) - measure(shown[-1]) > 0.07 * (measure(values[-1]) - measure(values[0])):
            shown.append(value)
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


# Files ------------------------------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def _titled(figure: Figure, title: str, source: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(source, x=0.01, ha="left", fontsize=7.5, color=SOFT)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


def write(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """As SVG and PNG, without date or version: the same numbers give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    metadata: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    for kind, without in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=without)
        path = folder / f"{stem}.{kind}"
        path.write_bytes(buffer.getvalue())
        written.append(path)
    return written


def draw(
    results: Path, output: Path, device: str, network: str, batch: int, dtype: str
) -> tuple[list[Path], list[str]]:
    """All pictures there are results for: the files, and for each that is missing what to do."""

    def peers() -> Figure:
        found = newest(results, f"{device}-{dtype}-torch*.json", "rows", "make bench")
        return peers_figure(found, network, batch, dtype)

    def roofline() -> Figure:
        command = f"python bench/limits.py --network {network} --dtype {dtype}"
        return roofline_figure(newest(results, f"limits-{network}-{device}-{dtype}-*.json", "units", command))

    def growth() -> Figure:
        command = f"python bench/growth.py --dtype {dtype}"
        return growth_figure(newest(results, f"growth-{device}-{dtype}-*.json", "curves", command))

    figures: dict[str, Callable[[], Figure]] = {"peers": peers, "roofline": roofline, "growth": growth}
    written, missing = [], []
    with matplotlib.rc_context(STYLE):
        for stem, make in figures.items():
            try:
                written += write(make(), output, stem)
            except MissingResultError as error:
                missing.append(f"{stem}: {error}")
    return written, missing


def main(
    results: Annotated[Path, typer.Option(help="folder of results")] = records.RESULTS,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = PICTURES,
    device: Annotated[str, typer.Option(help="as in the results' file names; this machine's by default")] = "",
    network: str = "resnet50",
    batch: Annotated[int, typer.Option(help="of the peers")] = 8,
    dtype: str = "float32",
) -> None:
    """Draw the pictures and say what is missing."""
    console = Console(soft_wrap=True)
    written, missing = draw(results, output, device or records.device_name(), network, batch, dtype)
    for path in written:
        console.print(str(path), highlight=False)
    for text in missing:
        console.print(text, highlight=False, markup=False)
    if missing:
        raise typer.Exit(1)


application = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
application.command()(main)

if __name__ == "__main__":
    application()
