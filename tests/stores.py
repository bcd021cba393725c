"""Stores for tests, written with random values and without a network: done, failed and missing samples, keys that bite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrp_fast.data import Source
from lrp_fast.store import DONE, FAILED, Layout, Store, StoreWriter, open_store

CLASSES = ("=ant", "n01440764", "wasp")
"""Of the labels; each is one of the model's, of another number."""
MODEL_CLASSES = ("wasp", "+bee", "n01440764", "crane", "crane", "=ant", "moth")
BITING = ("=SUM(A1)", "../../up", "-rf", "/etc/passwd", "日本\n", "a,b\"c'", "nul\0")
SETTINGS = {
    "model": "resnet18",
    "model_classes": MODEL_CLASSES,
    "composite": "otsuki2024",
    "preprocessing": {"resize": 12, "crop": 8, "mean": (0.5, 0.25, 0.75), "std": (1.0, 2.0, 0.5), "interpolation": "bilinear"},
    "source": {"kind": "folder", "fingerprint": "none"},
}  # fmt: skip


def write_store(
    path: Path,
    samples: int = 23,
    *,
    failed: Sequence[int] = (),
    missing_batches: Sequence[int] = (),
    signed: bool = False,
    source: Source | None = None,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = CLASSES,
    size: tuple[int, int] = (8, 8),
    **layout: Any,
) -> Store:
    """A store of random relevance in batches of four; those of ``missing_batches`` are still to be computed.

    ``classes``: the names of the labels, unless the ``source`` says.
    """
    layers = {"channels": {"layer3": 5, "layer4.1": 7}, "relevance": {"layer3": (5, 4, 3), "layer4.1": (7, 2, 3)}}
    shape = Layout(samples, 4, *size, **{**layers, "shard_batches": 2, **layout})
    keys = [f"{BITING[index % len(BITING)]}/{index}" for index in range(samples)]
    settings = dict(SETTINGS)
    if source is not None:
        keys, classes = source.keys[:], source.classes
        settings["source"] = {"kind": source.kind, "fingerprint": source.fingerprint()}
    given = np.arange(samples) % 4 - 1 if labels is None else np.array(labels)
    with StoreWriter(path, shape, settings, keys, given.astype(np.int64), classes) as writer:
        for batch in writer.pending():
            if batch not in missing_batches:
                writer.put(batch, _rows(shape, batch, set(failed), signed))
        writer.finish()
    return open_store(path)


def _rows(layout: Layout, batch: int, failed: set[int], signed: bool) -> dict[str, Any]:
    low, high = layout.span(batch)
    maps = _relevance(high - low, layout.height, layout.width)
    rows = layout.empty(high - low)
    rows.update({name: np.asarray(values) for name, values in layout.encode(maps if signed else maps.abs()).items()})
    for name, count in layout.channels.items():
        rows[f"channels/{name}"][:] = torch.randn(high - low, count)
    for name, shape in layout.relevance.items():
        encoded = layout.encode_relevance(name, _relevance(high - low, *shape))
        rows.update({field: np.asarray(values) for field, values in encoded.items()})
    rows["target"][:] = torch.randint(0, len(MODEL_CLASSES), (high - low,))
    rows["probability"][:] = torch.rand(high - low)
    rows["leak"][:] = torch.randn(high - low)
    rows["status"][:] = [FAILED if index in failed else DONE for index in range(low, high)]
    return rows


def _relevance(count: int, *shape: int) -> torch.Tensor:
    """It spans many magnitudes from picture to picture, and plain float16 ends at 6e-8."""
    return torch.randn(count, *shape) * 10.0 ** torch.randint(-12, 3, (count, *[1] * len(shape)))
