"""How an explanation's time and memory grow: with the batch, the image's side, depth, width and the number of targets.

    python bench/growth.py [--what batch,side,depth,width,targets] [--dtype float32] [--quick] [--fresh]

Every point is measured in a process of its own: first the peak of memory of the explanation beyond the model and its images,
then explanations and plain forward passes in turn, medians; before the first point of a network, its map is checked against
the float64 reference. Each point is kept at once in ``results/growth-<device>-<dtype>-<versions>.json``, and the same command
goes on from there, as long as code and threads are the same; ``--fresh`` begins anew. A curve stops where a call would take
too long or too much memory, and says so. ``--quick`` measures a few small points, into a file of its own.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torchvision
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import contenders
import gpu_check
import memory
import records
from contenders import DTYPES
from limits import COMPOSITE, checked, forward_run, interleaved
from lrp_fast import LRP
from networks import calibrated

MOST_SECONDS, MOST_BYTES = 20.0, 6e9
"""What one call may take on a processor before a curve stops."""
SHARE_OF_CARD = 0.9
"""What a call may take of a CUDA device's memory."""
IN_ONE_PIECE = 8
"""On a processor larger batches of a ResNet-50's pictures go in pieces, and take little more memory."""
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
PARITY_SIDE = 64
"""Maps are checked on one image of this side: the float64 reference is slow."""
INTERRUPTED = 130


# What is measured -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One point of a curve: ``value`` on its axis, and what is explained there."""

    value: int
    network: str
    side: int = 224
    batch: int = 1
    targets: int = 1


@dataclass(frozen=True)
class Curve:
    """What grows. ``axis``: in words; ``fit``: the law that is fitted; ``order``: of growth, to see beforehand what a point
    would take; ``point`` makes one from a value, ``values`` and ``quick`` are those measured."""

    axis: str
    fit: Literal["line", "power"]
    order: int
    values: tuple[int, ...]
    quick: tuple[int, ...]
    point: Callable[[int], Point]


CURVES: Mapping[str, Curve] = {
    "batch": Curve(
        "images in a batch", "line", 1, (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4),
        lambda n: Point(n, "resnet50", batch=n),
    ),
    "side": Curve(
        "side of the image (pixels)", "power", 2, (64, 96, 128, 192, 224, 256, 384, 512, 768, 1024), (64, 96, 128),
        lambda n: Point(n, "resnet50", side=n),
    ),
    "depth": Curve(
        "layers", "line", 1, (18, 34, 50, 101, 152), (18, 34), lambda n: Point(n, f"resnet{n}", batch=2)
    ),
    "width": Curve(
        "width of the 3x3 convolutions (first stage; 128: wide_resnet50_2)", "power", 2, (32, 64, 128, 192), (32, 64),
        lambda n: Point(n, f"resnet50:{n}", batch=2),
    ),
    "targets": Curve(
        "maps of one image", "line", 1, (1, 2, 4, 8, 16), (1, 2, 4), lambda n: Point(n, "resnet50", targets=n)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Where a curve stops: the most seconds and bytes of one call."""

    seconds: float
    bytes: float

    @staticmethod
    def of(device: torch.device) -> Limits:
        """A processor's are fixed; a CUDA device has its memory."""
        if device.type == "cpu":
            return Limits(MOST_SECONDS, MOST_BYTES)
        return Limits(math.inf, SHARE_OF_CARD * torch.cuda.get_device_properties(device).total_memory)

    def reason(self, curve: Curve, known: Sequence[Mapping[str, Any]], value: int) -> str | None:
        """Why a point is not measured, judged by the last smaller one; None if it is."""
        before = [point for point in known if point["value"] < value]
        if not before:
            return None
        last = max(before, key=lambda point: point["value"])
        factor = (value / last["value"]) ** curve.order
        if last["seconds"] * factor > self.seconds:
            return f"a call would take about {last['seconds'] * factor:.0f} s, more than {self.seconds:.0f} s"
        if last["peak_bytes"] * factor > self.bytes:
            return f"a call would take about {last['peak_bytes'] * factor / 1e9:.1f} GB, more than {self.bytes / 1e9:.1f} GB"
        return None


# One point --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def network(name: str, device: torch.device) -> nn.Module:
    """A network of :func:`contenders.network`, or ``resnet50:96``: a ResNet-50 whose 3×3 convolutions have 96 channels in the
    first stage in place of 64, and so on. ValueError for a name that is none."""
    base, _, width = name.partition(":")
    if width.isdecimal():
        torch.manual_seed(0)
        return calibrated(torchvision.models.get_model(base, width_per_group=int(width)), seed=1).to(device)
    if name != "cifar" and name not in torchvision.models.list_models():
        raise ValueError(f"unknown network {name!r}; expected a name of torchvision's, 'resnet50:WIDTH' or 'cifar'")
    return contenders.network(name, device)


def measure(point: Point, dtype: str, seconds: float, check: bool = False) -> dict[str, float]:
    """Seconds of an explanation and a forward pass, and bytes at the explanation's peak beyond the model and its images.

    The peak on a processor is that of the whole process, which must be a fresh one for it to mean anything. ``check``: the map
    is compared with the reference, at the end; ``contenders.ParityError`` if it is wrong.
    """
    device = records.torch_device()
    model = network(point.network, device)
    images = contenders.noise(point.batch, point.side, DTYPES[dtype], device)
    targets = None if point.targets == 1 else torch.arange(point.targets).expand(point.batch, -1)
    explainer = LRP(model, COMPOSITE, dtype=DTYPES[dtype])

    def explain() -> object:
        return explainer.explain(images, targets)

    peak = peak_bytes(explain, device)
    medians = interleaved({"explanation": explain, "forward": forward_run(model, images)}, device, seconds, fewest=3)
    found = {"seconds": medians["explanation"], "forward_seconds": medians["forward"], "peak_bytes": peak}
    found["parameter_bytes"] = sum(each.numel() for each in model.parameters()) * DTYPES[dtype].itemsize
    if check:
        small = contenders.noise(1, min(point.side, PARITY_SIDE), DTYPES[dtype], device)
        found["relative_error"] = checked(model, explainer, small)
    return found


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of two calls beyond those before them: of a CUDA device's allocator, or resident in memory (Linux)."""
    gc.collect()
    before = memory.restart(device)
    for _ in range(2):
        run()
    # The kernel's counts of a small process lag behind by some pages.
    return max(0, round(memory.MEGABYTE * (memory.peak(device) - before)))


class DoesNotFitError(Exception):
    """A point needed more memory than there is."""


def measure_apart(point: Point, dtype: str, seconds: float, check: bool) -> dict[str, float]:
    """:func:`measure` in a process of its own; RuntimeError with what it said last where that fails."""
    asked = json.dumps({"point": asdict(point), "dtype": dtype, "seconds": seconds, "check": check})
    done = subprocess.run([sys.executable, __file__, "--point", asked], capture_output=True, text=True)
    if done.returncode == -9 or "OutOfMemoryError" in done.stderr:
        raise DoesNotFitError(f"{point} did not fit into memory")
    if done.returncode:
        raise RuntimeError(f"{point}: {(done.stderr.strip().splitlines() or ['no error text'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# Curves -----------------------------------------------------------------------------------------------------------------

Measure = Callable[[Point, str, float, bool], dict[str, float]]


class Growth:
    """The curves so far; every point is kept as soon as it is measured."""

    def __init__(
        self, name: str, head: Mapping[str, object], settings: Mapping[str, object], fresh: bool = False
    ) -> None:
        self.name = name
        self.result: dict[str, Any] = {**head, "settings": dict(settings), "curves": {}}
        path = records.RESULTS / records.file_name(name)
        self.begun_anew = False
        if path.exists() and not fresh:
            kept = json.loads(path.read_text())
            if kept["settings"] == self.result["settings"]:
                self.result["curves"] = kept["curves"]
            else:
                self.begun_anew = True

    def points(self, curve: str) -> list[dict[str, Any]]:
        """Of one curve, to be added to."""
        entry = self.result["curves"].setdefault(curve, {"axis": CURVES[curve].axis, "points": [], "stopped": None})
        found: list[dict[str, Any]] = entry["points"]
        return found

    def has(self, curve: str, value: int) -> bool:
        """Whether a point is there."""
        return any(point["value"] == value for point in self.points(curve))

    def checked_networks(self) -> set[str]:
        """Networks whose map has been compared with the reference."""
        curves = self.result["curves"].values()
        return {point["network"] for curve in curves for point in curve["points"] if "relative_error" in point}

    def run(
        self, curve: str, values: Sequence[int], limits: Limits, dtype: str, seconds: float,
        measured: Measure = measure_apart, on_point: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """Measure the points of a curve that are not there, up to where it stops."""
        points, entry = self.points(curve), self.result["curves"][curve]
        entry["stopped"] = None
        for value in values:
            if not self.has(curve, value) and entry["stopped"] is None:
                entry["stopped"] = self._add(points, curve, value, limits, dtype, seconds, measured)
                self.save()
            on_point()

    def _add(
        self, points: list[dict[str, Any]], curve: str, value: int, limits: Limits, dtype: str, seconds: float,
        measured: Measure,
    ) -> dict[str, Any] | None:  # fmt: skip
        """One point more; or where and why the curve stops."""
        reason = limits.reason(CURVES[curve], points, value)
        if reason is None:
            point = CURVES[curve].point(value)
            try:
                found = measured(point, dtype, seconds, point.network not in self.checked_networks())
            except DoesNotFitError as error:
                reason = str(error)
            else:
                points.append(asdict(point) | found)
                points.sort(key=lambda one: one["value"])
        return None if reason is None else {"before": value, "why": reason}

    def save(self) -> Path:
        """With what the points amount to."""
        on_processor = "cuda" not in self.result["device"]
        for name, entry in self.result["curves"].items():
            most = IN_ONE_PIECE if on_processor and name == "batch" else math.inf
            entry["fits"] = fits(CURVES[name].fit, entry["points"], most)
            entry["meaning"] = meaning(name, entry["fits"])
        self.result["cards"] = cards(self.result["curves"].get("batch", {}), estimate=on_processor)
        return records.save(self.name, self.result)


# Laws -------------------------------------------------------------------------------------------------------------------


def line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """``y = intercept + slope · x`` with the smallest relative residuals; ValueError for fewer than two points."""
    x, y = _points(xs, ys)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    worst = float(np.abs((intercept + slope * x) / y - 1).max())
    return {"intercept": float(intercept), "slope": float(slope), "worst_residual": worst}


def power(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """``y = factor · x^exponent``, a line in log-log; ``last_exponent`` is that between the two largest x."""
    x, y = (np.log(values) for values in _points(xs, ys))
    exponent, factor = np.polyfit(x, y, 1)
    worst = float(np.abs(np.exp(factor + exponent * x - y) - 1).max())
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return {
        "factor": float(np.exp(factor)), "exponent": float(exponent), "last_exponent": last, "worst_residual": worst,
    }  # fmt: skip


def _points(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    if len(x) < 2 or len(x) != len(y) or not (x > 0).all() or not (y > 0).all():
        raise ValueError(f"a fit needs at least two points, all above zero, got x {list(xs)} and y {list(ys)}")
    order = np.argsort(x)
    return x[order], y[order]


MEASURES = ("seconds", "forward_seconds", "peak_bytes")


def fits(law: str, points: Sequence[Mapping[str, float]], most: float = math.inf) -> dict[str, dict[str, float]]:
    """The law of each measure, of memory up to the value ``most``; none where there are fewer than two points."""
    fit, found = line if law == "line" else power, {}
    for measure in MEASURES:
        chosen = [point for point in points if measure != "peak_bytes" or point["value"] <= most]
        if len(chosen) < 2:
            return {}
        found[measure] = fit([point["value"] for point in chosen], [point[measure] for point in chosen])
    return found


def meaning(curve: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """What the fitted slope says, in a sentence."""
    if not found:
        return "too few points for a slope"
    ours, memory = found["seconds"], found["peak_bytes"]
    if curve in ("side", "width"):
        expected = (
            "2 would be by area"
            if curve == "side"
            else "between 1 for the 1x1 convolutions around a 3x3 one and 2 for itself"
        )
        return (
            f"Time grows with {curve}^{ours['exponent']:.2f} ({expected}), between the two largest with "
            f"^{ours['last_exponent']:.2f}; memory with ^{memory['exponent']:.2f}."
        )
    each = {"batch": "image", "depth": "layer", "targets": "map"}[curve]
    call = "A call of 2 images" if curve == "depth" else "A call"
    return (
        f"{call} takes {1000 * ours['intercept']:.1f} ms and {1000 * ours['slope']:.2f} ms for each {each}, and "
        f"{memory['intercept'] / 1e6:.0f} MB and {memory['slope'] / 1e6:.1f} MB for each {each}."
    )


def cards(batch: Mapping[str, Any], estimate: bool) -> dict[str, dict[str, object]]:
    """The largest batch of 224-pixel images that ResNet-50 is explained in on cards of so much memory.

    From the line through the measured peaks, the model's weights beside it (a driver's own memory is not counted).
    ``estimate``: the peaks are a processor's, where other convolutions run, which may take more or less beside their outputs.
    """
    fitted = batch.get("fits", {}).get("peak_bytes")
    if fitted is None:
        return {}
    model = batch["points"][0]["parameter_bytes"]
    fixed = model + max(fitted["intercept"], 0.0)
    return {
        name: {
            "largest_batch": int((capacity - fixed) // fitted["slope"]),
            "bytes_per_image": fitted["slope"],
            "fixed_bytes": fixed,
            "estimate": estimate,
        }
        for name, capacity in CARDS.items()
    }


# Command ----------------------------------------------------------------------------------------------------------------


def show(console: Console, growth: Growth) -> None:
    """Every curve's points and what they mean."""
    for name, entry in growth.result["curves"].items():
        table = Table(entry["axis"], "ms", "ms, forward", "forward passes", "peak MB", title=name)
        for point in entry["points"]:
            table.add_row(
                str(point["value"]), f"{1000 * point['seconds']:.1f}", f"{1000 * point['forward_seconds']:.1f}",
                f"{point['seconds'] / point['forward_seconds']:.2f}", f"{point['peak_bytes'] / 1e6:.0f}",
            )  # fmt: skip
        console.print(table)
        console.print(entry.get("meaning", ""))
        if entry["stopped"]:
            console.print(f"stopped before {entry['stopped']['before']}: {entry['stopped']['why']}")
    for card, found in growth.result.get("cards", {}).items():
        how = "estimated from a processor's peaks" if found["estimate"] else "from measured peaks"
        console.print(f"a card of {card}: batches of up to {found['largest_batch']} images ({how})")


def chosen(what: str) -> list[str]:
    """The curves in a list with commas; ValueError naming the known ones."""
    names = [name.strip() for name in what.split(",") if name.strip()]
    unknown = [name for name in names if name not in CURVES]
    if unknown or not names:
        raise ValueError(f"unknown curve {', '.join(unknown) or repr(what)}; known: {', '.join(CURVES)}")
    return names


def main(
    what: Annotated[str, typer.Option(help="curves, with commas")] = ",".join(CURVES),
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES))] = "float32",
    seconds: Annotated[float, typer.Option(help="for the repeats of a point")] = 5.0,
    quick: Annotated[bool, typer.Option("--quick", help="a few small points, in a file of their own")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget what was measured before")] = False,
    point: Annotated[str, typer.Option(hidden=True, help="measure this one, as JSON, and print it")] = "",
) -> None:
    """Measure the curves, keeping every point, and print what they mean."""
    if point:
        asked = json.loads(point)
        print(json.dumps(measure(Point(**asked.pop("point")), **asked)))
        return
    try:
        names = chosen(what)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    console, device = Console(), records.torch_device()
    settings = {
        "composite": COMPOSITE,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "code": gpu_check.code_state(),
    }
    growth = Growth(
        f"{'quick-' if quick else ''}growth-{records.device_name()}-{dtype}", records.stamp(), settings, fresh
    )
    if growth.begun_anew:
        console.print("what was measured before was of other code or threads: beginning anew")
    values = {name: CURVES[name].quick if quick else CURVES[name].values for name in names}
    try:
        with Progress(console=console) as progress:
            for name in names:
                task = progress.add_task(name, total=len(values[name]))
                growth.run(
                    name, values[name], Limits.of(device), dtype, 1.0 if quick else seconds,
                    on_point=partial(progress.advance, task),
                )  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on with the rest")
        raise typer.Exit(INTERRUPTED) from None
    show(console, growth)
    console.print(str(growth.save()))


application = typer.Typer(pretty_exceptions_enable=False, add_completion=False)  # the last line of an error is its text
application.command()(main)

if __name__ == "__main__":
    application()
