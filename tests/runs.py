"""Small data sets and pipeline runs, for the tests of everything that fills a store."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lrp_fast import Composite
from lrp_fast.batches import Setup
from lrp_fast.data import Source, open_source
from lrp_fast.models import LoadedModel
from lrp_fast.pipeline import Pipeline, PipelineOptions, Progress
from lrp_fast.splits import as_splits
from lrp_fast.store import WHOLE, Part, Rows, Store, open_store

CPU = torch.device("cpu")


def draw(path: Path, **options: Any) -> Path:
    """A picture of noise, of a size of its own."""
    generator = np.random.default_rng()
    height, width = generator.integers(40, 60, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


def draw_classes(folder: Path, count: int, classes: int = 3) -> Path:
    for index in range(count):
        draw(folder / f"{index % classes}" / f"{index}.jpg")
    return folder


def draw_with_an_empty_file(folder: Path, count: int = 30) -> Path:
    """Pictures of three classes, one of them, ``2/29.jpg``, a file without content."""
    draw_classes(folder, count)
    (folder / "2" / "29.jpg").write_bytes(b"")
    return folder


def setup(
    loaded: LoadedModel, composite: str | Composite = "otsuki2024", split: str | None = None, **options: Any
) -> Setup:
    rules = composite if isinstance(composite, Composite) else Composite.named(composite)
    return Setup(loaded, rules if split is None else replace(rules, splits=as_splits(split)), **options)


def small(**options: Any) -> PipelineOptions:
    return PipelineOptions(**{"batch_size": 4, "workers": 0, "shard_batches": 2, **options})


def run(
    loaded: LoadedModel,
    source: Path | Source,
    output: Path,
    explainer: dict[str, Any] | None = None,
    part: Part = WHOLE,
    **options: Any,
) -> Progress:
    found = open_source(source) if isinstance(source, Path) else source
    return Pipeline(setup(loaded, **(explainer or {})), found, small(**options), CPU, part).into(output)


def everything(store: Store) -> Rows:
    return {**store.rows(tuple(store.layout.fields()), 0, len(store)), "key": store.key[:], "label": store.label[:]}


def assert_same_bits(found: Path, expected: Path) -> None:
    one, other = everything(open_store(found)), everything(open_store(expected))
    assert one.keys() == other.keys()
    for name in other:
        same = one[name] == other[name] if name in ("key", "reason") else _bytes(one[name]) == _bytes(other[name])
        assert np.all(same), name


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def failures(store: Path) -> dict[str, str]:
    with open(store / "failures.csv", newline="", encoding="utf-8") as file:
        return {row["key"]: row["reason"] for row in csv.DictReader(file)}
