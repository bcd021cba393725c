"""Export as pictures: one PNG for each map, and a table of what they show."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lrp_fast.heatmap import colorize, is_signed
from lrp_fast.report.folder import safe_cell

from .output import owns_folder
from .selection import Format, Samples, Selection, name_of

INDEX = "index.csv"
COLUMNS = ("file", "key", "label", "label_name", "target", "target_name", "probability", "leak", "signed", "largest")


@dataclass(frozen=True)
class Png(Format):
    """A folder of ``000000.png``, ``000001.png``, ..., one pixel for each of the map's, and ``index.csv``.

    The colours are those of :func:`lrp_fast.heatmap.colorize`, each map's over its largest magnitude: signed maps are white
    at zero, red above and blue below; others run from black at zero to bright yellow. The table gives each picture's key
    and numbers; ``label_name`` is that of the data set's class (empty where labels are numbers), ``target_name`` that of
    the model's; ``largest`` is the relevance that has the full colour, ``signed`` says which of the two scales it is.
    """

    folder = True
    summary = "one picture for each map, and a table"

    def owns(self, place: Path) -> bool:
        return owns_folder(place)

    def write(self, selection: Selection, place: Path) -> Sequence[str]:
        place.mkdir()
        names, digits = (selection.classes, selection.model_classes), max(6, len(str(len(selection) - 1)))
        with open(place / INDEX, "x", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for samples in selection.slices():
                for row in range(len(samples.key)):
                    name = f"{samples.first + row:0{digits}d}.png"
                    heatmap = torch.from_numpy(samples.heatmap[row])
                    signed = is_signed(heatmap)
                    Image.fromarray(colorize(heatmap, signed)).save(place / name)
                    table.writerow((name, *_cells(samples, row, *names), signed, f"{float(heatmap.abs().max()):.6g}"))
        return ()


def _cells(samples: Samples, row: int, classes: Sequence[str], model_classes: Sequence[str]) -> tuple[object, ...]:
    label, target = int(samples.label[row]), int(samples.target[row])
    label_name, target_name = safe_cell(name_of(classes, label)), safe_cell(name_of(model_classes, target))
    numbers = f"{samples.probability[row]:.6g}", f"{samples.leak[row]:.6g}"
    return safe_cell(samples.key[row]), "" if label < 0 else label, label_name, target, target_name, *numbers
