"""What a data set's run costs beside its explanations: the pipeline against the bare explainer on the same batches.

Photographs of 500 x 375 pixels are made as JPEG files. In turn, several times in one process: the explainer alone on the
decoded batches, and the whole pipeline from the files to a store on the disk, whose maps are then compared. A pipeline's
rate counts from its first batch to its last, as in a long run; beside it what the start took. ``python bench/throughput.py``
writes ``results/throughput-<network>-<device>-float32-<versions>.json``.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchvision
import typer
from PIL import Image, ImageFilter
from rich.progress import track

import records
from lrp_fast import LRP, Composite, open_store
from lrp_fast.batches import Batches, Setup
from lrp_fast.data import Source, open_source
from lrp_fast.images import Preprocessing
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.pipeline import Pipeline, PipelineOptions, Progress


@dataclass(frozen=True)
class Measured:
    """Seconds of one pipeline run: until its first batch was computed, and per image after that."""

    start: float
    per_image: float
    waited: dict[str, float]


def _model(name: str) -> LoadedModel:
    if name == "embedded":
        return load_model()
    torch.manual_seed(0)
    classes = tuple(f"class {index}" for index in range(1000))
    return LoadedModel(torchvision.models.get_model(name).eval(), classes, Preprocessing(232, 224), name, "random")


def _photographs(folder: Path, count: int) -> Path:
    """Smooth colours with some noise, which compress as photographs do: about 100 kB each."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        fine = np.asarray(
            coarse.resize((500, 375), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)), float
        )
        noisy = (fine + generator.normal(0, 12, fine.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def compare(
    folder: Path, loaded: LoadedModel, source: Source, device: torch.device, options: PipelineOptions, rounds: int
) -> dict[str, object]:
    """Both rates by turns, as ratios, from a source whose first batches are explained alone too; stores go to ``folder``."""
    setup = Setup(loaded, Composite.named("otsuki2024"))
    batches = Batches(source, loaded.preprocessing, options.batch_size)
    count = len(source) // options.batch_size
    decoded = [batches[batch].inputs.to(device) for batch in range(count)]
    explainer = setup.explainer(device)
    maps = torch.cat([explainer.explain(inputs, relevance=False).heatmap for inputs in decoded]).cpu()
    bare, piped, memory = [], [], []
    for number in track(range(rounds), "rounds", transient=True):
        bare.append(_bare(explainer, decoded))
        store = folder / f"store-{number}"
        piped.append(_piped(setup, source, device, options, store))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        error = _error(store, maps, options.levels)
        assert error < 2.0**-10, f"the stored maps differ from the explainer's by {error}"
        shutil.rmtree(store)
    ratios = [alone / run.per_image for alone, run in zip(bare, piped, strict=True)]
    return {
        "model": loaded.name,
        "images": len(source),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "levels": options.levels,
        "pipeline_over_bare": round(statistics.median(ratios), 4),
        "each": [round(ratio, 4) for ratio in ratios],
        "start_in_batches": round(statistics.median(run.start for run in piped) / (bare[0] * options.batch_size), 2),
        "waited_for": {
            name: round(statistics.median(run.waited[name] for run in piped), 4) for name in piped[0].waited
        },
        "peak_memory_mb": [round(each) for each in memory],
    }


def _bare(explainer: LRP, decoded: list[torch.Tensor]) -> float:
    """Seconds per image of the explainer alone, after its first batch."""
    begin, images = 0.0, 0
    for number, inputs in enumerate(decoded):
        explainer.explain(inputs, relevance=False).leak.sum().item()
        if number == 0:
            begin = time.perf_counter()
        else:
            images += len(inputs)
    return (time.perf_counter() - begin) / images


def _piped(setup: Setup, source: Source, device: torch.device, options: PipelineOptions, store: Path) -> Measured:
    pipeline = Pipeline(setup, source, options, device)
    told: list[float] = []

    def on_batch(progress: Progress) -> None:
        told.append(time.perf_counter())

    begin = time.perf_counter()
    progress = pipeline.into(store, on_batch=on_batch)
    assert progress.done == len(source), progress
    return Measured(told[0] - begin, (told[-1] - told[0]) / ((len(told) - 1) * options.batch_size), progress.shares())


def _error(store: Path, maps: torch.Tensor, levels: int | None) -> float:
    """The largest difference of a stored map, as a share of its largest magnitude; quantized ones are not compared."""
    if levels is not None:
        return 0.0
    found = torch.from_numpy(open_store(store).heatmap[: len(maps)])
    return float(((found - maps).abs().amax((1, 2)) / maps.abs().amax((1, 2))).max())


def main(
    network: Annotated[str, typer.Option(help="of torchvision, with random weights; or embedded")] = "resnet50",
    images: int = 96,
    batch_size: int = 8,
    workers: Annotated[int, typer.Option(help="processes that decode")] = 2,
    levels: Annotated[int | None, typer.Option(help="quantize the maps to so many levels")] = None,
    rounds: int = 3,
) -> None:
    """Measure, print and write the result."""
    if network != "embedded" and network not in torchvision.models.list_models():
        raise typer.BadParameter(f"unknown network {network!r}; expected embedded or a name of torchvision's")
    if images < 2 * batch_size:
        raise typer.BadParameter(f"{images} images are less than the two batches of {batch_size} that are needed")
    options = PipelineOptions(batch_size=batch_size, workers=workers, levels=levels)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(_photographs(Path(folder) / "photographs", images))
        result = compare(Path(folder), _model(network), source, records.torch_device(), options, rounds)
    print(json.dumps(result, indent=2))
    print(records.save(f"throughput-{network}-{records.device_name()}-float32", records.stamp() | result))


application = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
application.command()(main)

if __name__ == "__main__":
    application()
