"""What a data set's run costs beside its explanations: the pipeline against the bare explainer on the same batches.

Photographs of 500 x 375 pixels are made as JPEG files. In turn, several times in one process: the explainer alone on the
decoded batches, and the whole pipeline from the files to a store on the disk, whose maps are then compared. A pipeline's
rate counts from its first batch to its last, as in a long run; beside it what the start took. ``python bench/throughput.py``
writes ``results/throughput-<device>-<dtype>-<versions>.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.models import get_model

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


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = _model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(_photographs(Path(folder) / "photographs", arguments.images))
        result = _compare(Path(folder), loaded, source, device, arguments)
    print(json.dumps(result, indent=2))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    records.save(f"throughput-{loaded.name}-{name.replace(' ', '-')}-float32", result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="of torchvision, with random weights; or embedded")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--levels", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _model(name: str) -> LoadedModel:
    if name == "embedded":
        return load_model()
    torch.manual_seed(0)
    classes = tuple(f"class {index}" for index in range(1000))
    return LoadedModel(get_model(name).eval(), classes, Preprocessing(232, 224), name, "random")


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


def _compare(
    folder: Path, loaded: LoadedModel, source: Source, device: torch.device, arguments: argparse.Namespace
) -> dict[str, object]:
    setup = Setup(loaded, Composite.named("otsuki2024"))
    batches = Batches(source, loaded.preprocessing, arguments.batch_size)
    count = len(source) // arguments.batch_size
    decoded = [batches[batch].inputs.to(device) for batch in range(count)]
    explainer = setup.explainer(device)
    maps = torch.cat([explainer.explain(inputs, relevance=False).heatmap for inputs in decoded]).cpu()
    bare, piped, memory = [], [], []
    for number in range(arguments.rounds):
        bare.append(_bare(explainer, decoded))
        store = folder / f"store-{number}"
        piped.append(_piped(setup, source, device, arguments, store))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        error = _error(store, maps, arguments.levels)
        assert error < 2.0**-10, f"the stored maps differ from the explainer's by {error}"
        shutil.rmtree(store)
    ratios = [alone / run.per_image for alone, run in zip(bare, piped, strict=True)]
    return {
        "model": loaded.name,
        "images": len(source),
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
        "levels": arguments.levels,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "pipeline_over_bare": round(statistics.median(ratios), 4),
        "each": [round(ratio, 4) for ratio in ratios],
        "start_in_batches": round(statistics.median(run.start for run in piped) / (bare[0] * arguments.batch_size), 2),
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


def _piped(setup: Setup, source: Source, device: torch.device, arguments: argparse.Namespace, store: Path) -> Measured:
    options = PipelineOptions(batch_size=arguments.batch_size, workers=arguments.workers, levels=arguments.levels)
    pipeline = Pipeline(setup, source, options, device)
    told: list[float] = []

    def on_batch(progress: Progress) -> None:
        told.append(time.perf_counter())

    begin = time.perf_counter()
    progress = pipeline.into(store, on_batch=on_batch)
    assert progress.done == len(source), progress
    return Measured(told[0] - begin, (told[-1] - told[0]) / ((len(told) - 1) * arguments.batch_size), progress.shares())


def _error(store: Path, maps: torch.Tensor, levels: int | None) -> float:
    """The largest difference of a stored map, as a share of its largest magnitude; quantized ones are not compared."""
    if levels is not None:
        return 0.0
    found = torch.from_numpy(open_store(store).heatmap[: len(maps)])
    return float(((found - maps).abs().amax((1, 2)) / maps.abs().amax((1, 2))).max())


if __name__ == "__main__":
    main()
