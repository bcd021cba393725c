"""What a store holds: the fields of a sample, batches and shards, and the parts of those who write together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp_fast.heatmap import from_heat_levels, heat_levels

FORMAT, FORMAT_VERSION = "lrp-fast store", 1
MISSING, DONE, FAILED = 0, 1, 2
SAMPLES_PER_SHARD, BYTES_PER_SHARD = 1024, 1 << 28
STAGING = ".staging"
CHANNELS, RELEVANCE, RELEVANCE_SCALE = "channels/", "relevance/", "relevance_scale/"
INPUT = "input"
"""The name under which the relevance of the pictures themselves is stored, beside those of layers."""

Array = npt.NDArray[Any]
Rows = dict[str, Array]
"""Some samples' values, by field; the first dimension is the sample."""


class StoreError(Exception):
    """A store that cannot be opened or written; the message says why."""


@dataclass(frozen=True)
class Layout:
    """The shapes of a store: ``samples`` maps of ``height`` x ``width`` in batches of ``batch_size``.

    ``levels``: of the heat quantization, ``None`` for float16 maps; ``channels``: layer name → number of channels;
    ``shard_batches``: whole batches in a shard, 0 for about a thousand samples; ``relevance``: layer name → shape (C, H, W).
    """

    samples: int
    batch_size: int
    height: int
    width: int
    levels: int | None = None
    channels: Mapping[str, int] = field(default_factory=dict)
    shard_batches: int = 0
    relevance: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_batches == 0:
            widths = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.fields().values()]
            samples = min(SAMPLES_PER_SHARD, BYTES_PER_SHARD // max(widths))
            object.__setattr__(self, "shard_batches", max(1, samples // self.batch_size))

    @property
    def batches(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    @property
    def shards(self) -> int:
        return math.ceil(self.batches / self.shard_batches)

    @property
    def shard_samples(self) -> int:
        return self.shard_batches * self.batch_size

    def span(self, batch: int) -> tuple[int, int]:
        """The samples of a batch, from and to."""
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self.samples)

    def batches_of(self, shard: int) -> range:
        return range(shard * self.shard_batches, min((shard + 1) * self.shard_batches, self.batches))

    def fields(self) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
        """What each sample has that is computed: its dtype and shape (``reason`` is text; ``status`` comes last)."""
        maps: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]
        if self.levels is None:
            maps = {"heatmap": (np.float16, (self.height, self.width)), "scale": (np.float32, ())}
        else:
            ends = {"low": (np.float32, ()), "high": (np.float32, ())}
            maps = {"heatmap": (np.uint8, (self.height, self.width)), **ends}
        layers: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]
        layers = {CHANNELS + name: (np.float32, (count,)) for name, count in self.channels.items()}
        for name, shape in self.relevance.items():
            layers |= {RELEVANCE + name: (np.float16, tuple(shape)), RELEVANCE_SCALE + name: (np.float32, ())}
        numbers = {"target": (np.int64, ()), "probability": (np.float32, ()), "leak": (np.float32, ())}
        return {**maps, **layers, **numbers, "reason": (str, ()), "status": (np.uint8, ())}

    def empty(self, count: int) -> Rows:
        """Rows of that many samples that are missing."""
        return {
            name: _texts(count) if dtype is str else np.zeros((count, *shape), dtype)
            for name, (dtype, shape) in self.fields().items()
        }

    def encode(self, heatmaps: Tensor) -> dict[str, Tensor]:
        """Finite maps [n, H, W] as their stored fields; scaled maps err by at most 2^-11 of a value or 2^-25 of the scale."""
        values = heatmaps.detach().float()
        if self.levels is not None:
            return dict(zip(("heatmap", "low", "high"), heat_levels(values, self.levels, check=False), strict=True))
        return dict(zip(("heatmap", "scale"), _scaled(values), strict=True))

    def encode_relevance(self, layer: str, relevance: Tensor) -> dict[str, Tensor]:
        """Finite relevance [n, C, H, W] of a layer as its stored fields; errors as of scaled maps."""
        scaled, scale = _scaled(relevance.detach().float())
        return {RELEVANCE + layer: scaled, RELEVANCE_SCALE + layer: scale}

    def decode(self, rows: Rows) -> npt.NDArray[np.float32]:
        """The maps float32 [n, H, W] of what :meth:`encode` made."""
        if self.levels is None:
            return rows["heatmap"].astype(np.float32) * rows["scale"][:, None, None]
        index, low, high = (torch.from_numpy(rows[name]) for name in ("heatmap", "low", "high"))
        return from_heat_levels(index, low, high, self.levels).numpy()

    def map_fields(self) -> tuple[str, ...]:
        return ("heatmap", "scale") if self.levels is None else ("heatmap", "low", "high")


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """float16 of the values over each sample's largest magnitude, and that magnitude: plain float16 would underflow."""
    scale = values.flatten(1).abs().amax(1)
    divisor = torch.where(scale > 0, scale, 1.0)
    return (values / divisor.view(-1, *[1] * (values.ndim - 1))).half(), scale


@dataclass(frozen=True)
class Part:
    """The share of one of ``count`` processes that write a store together: part ``index``, whole shards in a row."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"expected a part I/N with 0 <= I < N, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def divided(self, index: int, count: int) -> Part:
        """Part ``index`` of ``count`` of this part."""
        return Part(self.index * count + index, self.count * count)

    def shards(self, layout: Layout) -> range:
        low, high = (layout.shards * each // self.count for each in (self.index, self.index + 1))
        return range(low, high)

    def batches(self, layout: Layout) -> range:
        shards = self.shards(layout)
        low, high = (min(shard * layout.shard_batches, layout.batches) for shard in (shards.start, shards.stop))
        return range(low, high)

    def samples(self, layout: Layout) -> range:
        batches = self.batches(layout)
        low, high = (min(batch * layout.batch_size, layout.samples) for batch in (batches.start, batches.stop))
        return range(low, high)


WHOLE = Part()


def _texts(count: int) -> Array:
    return np.full(count, "", dtype=object)
