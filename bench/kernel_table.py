"""Writes the tables of kernels/README.md: what each kernel costs and is predicted to take, and what an explanation does.

    python bench/kernel_table.py [bench/results/<device>-kernels-<versions>.json]

With the results of a GPU check, the column of measured times is filled from them. Needs no GPU: kernels are compiled for
sm_80, sm_90 and sm_100, and an explanation is recorded without being run.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import torch
import torchvision
import typer
from resources import Row, resources

from builders import Prepared
from cases import KernelCase, kernel_cases
from lrp_fast import list_composites
from predict import H100, H200, Pass, Recorded, recorded

README = pathlib.Path(__file__).resolve().parents[1] / "kernels" / "README.md"
BATCH, SIDE = 256, 224
FUSED = {"pointwise": "fused", "spatial": "fused"}
FLOOR = {"MB": 197.0, "GFLOP": 24.5, "µs": 75.0}
"""The design's estimate for an image: each tensor moved once."""

Measured = dict[str, float]


def main(
    results: Annotated[
        pathlib.Path | None,
        typer.Argument(help="of a GPU check: <device>-kernels-<versions>.json", exists=True, dir_okay=False),
    ] = None,
) -> None:
    """Rewrite what stands between the markers."""
    measured = _measured(results) if results else {}
    torch.manual_seed(0)
    model, shape = torchvision.models.resnet50().eval(), (BATCH, 3, SIDE, SIDE)
    default, fused = recorded(model, shape).passes, recorded(model, shape, defaults=FUSED).passes
    compiled: dict[str, list[Row]] = {}
    for row in resources("cases", "bf16"):
        compiled.setdefault(row.case, []).append(row)
    text = README.read_text()
    text = between(text, "explanation", explanation_table(default, fused))
    found = {name: recorded(model, shape, composite=name) for name in list_composites()}
    text = between(text, "composites", composite_table(found))
    for name, hot in (("hot", True), ("others", False)):
        cases = [case for case in kernel_cases() if bool(case.count) == hot]
        text = between(text, name, kernel_table(cases, compiled, measured))
    README.write_text(text)


def between(text: str, name: str, table: str) -> str:
    """``text`` with a table between the markers of that name; ValueError where they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the markers {begin} and {end} once each in {README}")
    return f"{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}"


def _measured(path: pathlib.Path) -> Measured:
    """Seconds of each case in bfloat16, from a GPU check's results."""
    try:
        cells = json.loads(path.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path} is not the result of a GPU check: {type(error).__name__}: {error}") from None
    return {key: cell["seconds"] for key, cell in cells.items() if "seconds" in cell}


def lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


# Kernels --------------------------------------------------------------------------------------------------------------


def kernel_table(cases: Sequence[KernelCase], compiled: dict[str, list[Row]], measured: Measured) -> str:
    """One row for each case, by kernel."""
    header = ("case", "×", "MB", "GFLOP", "predicted µs", "issue µs", "measured µs", "registers", "shared KB", "wgmma", "stack")
    order = sorted(cases, key=lambda case: case.kernel)
    return lines(header, (kernel_row(case, compiled[case.name], measured) for case in order))


def kernel_row(case: KernelCase, rows: Sequence[Row], measured: Measured) -> list[str]:
    """What a case moves and computes at batch 256 in bf16, and what was made of it for sm_80 / sm_90 / sm_100."""
    prepared: Prepared = case.build(torch.device("meta"), torch.bfloat16, BATCH, "ieee")
    took = measured.get(f"{case.name}, bfloat16")

    last = {row.capability: row for row in rows}  # a launcher of two kernels launches its namesake last

    def each(value: Callable[[Row], int]) -> str:
        return " / ".join(str(value(last[capability])) for capability in sorted(last))

    kernel, _, shape = case.name.partition(" ")
    return [
        f"`{kernel}` {shape}", str(case.count or "–"), f"{prepared.bytes / 1e6:.1f}", f"{prepared.flops / 1e9:.1f}",
        f"{1e6 * last[90].predicted:.1f}", f"{1e6 * last[90].issue:.1f}",
        "" if took is None else f"{1e6 * took:.1f}",
        each(lambda row: row.registers), each(lambda row: -(-row.shared // 1024)),
        str(last[90].wgmma or "–"), str(max(row.stack for row in rows)),
    ]  # fmt: skip


# The whole explanation ------------------------------------------------------------------------------------------------


@dataclass
class Sum:
    """Passes added up, an image."""

    launches: int = 0
    megabytes: float = 0.0
    gigaflop: float = 0.0
    microseconds: float = 0.0
    """On an H100."""

    def add(self, one: Pass) -> None:
        """One more."""
        self.launches += 1
        self.megabytes += one.bytes / BATCH / 1e6
        self.gigaflop += one.flops / BATCH / 1e9
        self.microseconds += one.seconds(H100) / BATCH * 1e6

    def cells(self) -> list[str]:
        """Of a table."""
        return [str(self.launches), f"{self.megabytes:.1f}", f"{self.gigaflop:.2f}", f"{self.microseconds:.1f}"]


def total(passes: Iterable[Pass]) -> Sum:
    """All of them."""
    found = Sum()
    for one in passes:
        found.add(one)
    return found


def explanation_table(default: Sequence[Pass], fused: Sequence[Pass]) -> str:
    """By kind of pass, for the default choices and with 3×3 convolutions in kernels, and where the bytes are."""
    sides = [by_kind(default), by_kind(fused)]
    kinds = sorted(set().union(*sides), key=lambda kind: -max(side.get(kind, Sum()).microseconds for side in sides))
    rows = [[kind, *(cell for side in sides for cell in side.get(kind, Sum()).cells()), ""] for kind in kinds]
    sums = [total(default), total(fused)]
    rows.append(["**all**", *(f"**{cell}**" for found in sums for cell in found.cells()), ""])
    floor = f"{FLOOR['MB']:.0f}", f"{FLOOR['GFLOP']:.1f}", f"{FLOOR['µs']:.0f}"
    rows.append(["design estimate", *["", *floor] * 2, ""])
    rows.append(
        ["images/s", *(cell for found in sums for cell in ("", "", "", f"{1e6 / found.microseconds:,.0f}")), ""]
    )
    columns = ("launches", "MB", "GFLOP", "predicted µs")
    header = ["an image", *columns, *(f"{column}, 3×3 fused" for column in columns), "measured µs"]
    return f"At {rates()}:\n\n{lines(header, rows)}\n\n{extra_table(default, fused)}"


def composite_table(found: Mapping[str, Recorded]) -> str:
    """Every composite: what an image takes, and how much of it torch's own operations move."""
    columns = ("launches", "MB", "GFLOP", "predicted µs", "images/s")
    header = ("composite", *columns, "µs, H200", "images/s, H200", "MB by torch", "MB held")
    rows = []
    for name, explanation in found.items():
        all_of_it = total(explanation.passes)
        rest = total(one for one in explanation.passes if one.name.startswith("torch: "))
        other = sum(one.seconds(H200) for one in explanation.passes) / BATCH
        speeds = [f"{1e6 / all_of_it.microseconds:,.0f}", f"{1e6 * other:.1f}", f"{1 / other:,.0f}"]
        memory = [f"{rest.megabytes:.1f}", f"{explanation.peak / BATCH / 1e6:.1f}"]
        rows.append([f"`{name}`", *all_of_it.cells(), *speeds, *memory])
    return lines(header, rows)


def by_kind(passes: Sequence[Pass]) -> dict[str, Sum]:
    """Kernels and library convolutions each by name, torch's other operations together."""
    found: dict[str, Sum] = {}
    for one in passes:
        name = one.name if one.name.startswith("library") else f"`{one.name}`"
        kind = "other operations of torch (head, input)" if one.name.startswith("torch: ") else name
        found.setdefault(kind, Sum()).add(one)
    return found


def extra_table(default: Sequence[Pass], fused: Sequence[Pass]) -> str:
    """What a library convolution writes, a pass behind it reads again: traffic an epilogue would not have."""
    sides = [extras(default), extras(fused)]
    rows = [[kind, *(f"{side.get(kind, 0.0):.1f}" for side in sides)] for kind in sides[0]]
    rest = [total(passes).megabytes - sum(side.values()) for passes, side in zip((default, fused), sides, strict=True)]
    rows.append(["everything else", *(f"{value:.1f}" for value in rest)])
    return lines(["written by a library convolution and read again, MB an image", "default", "3×3 fused"], rows)


def extras(passes: Sequence[Pass]) -> dict[str, float]:
    """Megabytes an image by kind of library convolution."""
    names = {
        "3×3, stacked, for `gate.gate`": lambda one, kernel: kernel[2] == 3 and "transposed" not in one.name,
        "3×3 transposed, for `merge.arrive`": lambda one, kernel: "transposed" in one.name,
        "1×1, stacked, the residual branch at a projection": lambda one, kernel: kernel[2] == 1,
        "the stem, for `gate.gate`": lambda one, kernel: kernel[2] == 7,
    }
    found = dict.fromkeys(names, 0.0)
    for one in passes:
        if one.name.startswith("library"):
            (kind,) = (name for name, fits in names.items() if fits(one, one.shapes[1]))
            found[kind] += 2 * one.written / BATCH / 1e6
    return found


def rates() -> str:
    """What predictions divide by."""
    return (
        f"{H100.bandwidth / 1e12:.1f} TB/s, {H100.flops[2] / 1e12:.0f} TFLOP/s in bf16, {H100.flops[4] / 1e12:.0f} in float32, "
        "as an H100 was measured"
    )


if __name__ == "__main__":
    typer.run(main)
