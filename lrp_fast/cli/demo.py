"""``lrp-fast demo``: the package's own pictures, explained by its own network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from lrp_fast.composites import Composite
from lrp_fast.images import Picture
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.report import Run, RunOptions, percent

from .attribute import describe_run, report, run_with_progress
from .common import DEFAULT_COMPOSITE, UsageError, app, make_explainer, print_table, reporting


@app.command()
@reporting()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for results; those of an earlier run are replaced.")
    ],
) -> None:
    """Explain the package's own pictures with its own network; no network connection needed."""
    from lrp_fast.embedded import embedded_pictures

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    pictures = embedded_pictures()
    loaded, composite, options = load_model(), Composite.named(DEFAULT_COMPOSITE), RunOptions()
    explainer = make_explainer(loaded, composite, "auto", options.device)
    scores = MaskScores(loaded, {picture.path: (picture.mask_path, picture.label) for picture in pictures})
    settings = describe_run(loaded, composite, options)
    run = Run(explainer, loaded, options, scores.facts, lambda outcome: {**outcome.summary(), **scores.summary()})
    outcome = run_with_progress(run, output, [picture.path for picture in pictures], settings)
    print_table("the embedded network", run.summarize(outcome), "on the embedded pictures")
    report(outcome, output)


class MaskScores:
    """How much of the positive relevance falls inside the masks of labelled objects, beside their share of the area.

    ``labelled``: a mask file and a class index by picture path.
    """

    def __init__(self, loaded: LoadedModel, labelled: Mapping[Path, tuple[Path, int]]) -> None:
        self._loaded = loaded
        self._labelled = labelled
        self._inside: list[float] = []
        self._area: list[float] = []
        self._right: list[bool] = []

    def facts(self, picture: Picture, heatmap: Tensor, predicted: int) -> list[tuple[str, str]]:
        """Take one picture's map, float32 [H, W], into account, and return its facts."""
        mask_path, label = self._labelled[picture.path]
        with Image.open(mask_path) as image:
            mask = torch.from_numpy(np.asarray(self._loaded.preprocessing.frame(image.convert("L"))) >= 128)
        positive = heatmap.clamp(min=0).double()
        total = float(positive.sum())
        inside = float(positive[mask].sum()) / total if total > 0 else 0.0
        area = float(mask.double().mean())
        self._inside.append(inside)
        self._area.append(area)
        self._right.append(predicted == label)
        verdict = "right" if predicted == label else f"wrong, it is {self._loaded.classes[label]}"
        return [
            ("relevance in the mask", percent(inside)),
            ("area of the mask", percent(area)),
            ("prediction", verdict),
        ]

    def summary(self) -> dict[str, str]:
        """The means over all pictures so far, label to text; empty before the first."""
        if not self._right:
            return {}
        return {
            "accuracy": f"{sum(self._right)} of {len(self._right)}",
            "relevance in the masks": percent(float(np.mean(self._inside))),
            "area of the masks": percent(float(np.mean(self._area))),
        }
