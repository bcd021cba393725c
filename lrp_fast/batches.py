"""The batches of a data set: decoded in any process, explained on a device, brought into the rows of a store.

Batch b holds the samples b·B to (b+1)·B, always, the last one padded: a result depends on the batch it is computed in, so
only with a fixed composition does a resumed or divided run give the bits of an uninterrupted one (on a CPU with as many
threads: they divide sums differently; on a GPU of that kind, by the triton backend, with the same tuned choices). Where a
picture cannot be read, and beyond the last sample, a stand-in takes the place.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrp_fast.composites import Composite
from lrp_fast.data import Source
from lrp_fast.explain import LRP, Attribution
from lrp_fast.images import ImageError, Preprocessing, decode_image
from lrp_fast.memory import is_out_of_memory
from lrp_fast.models import LoadedModel
from lrp_fast.store import CHANNELS, DONE, FAILED, INPUT, Layout, Rows
from lrp_fast.watch import parameter_table

NOT_FINITE = "its relevance holds values that are NaN or infinite"
LARGEST_BATCH = 256
WORTH_DOUBLING = 1.05
"""By how much a batch twice as large must be faster, per image, to be taken."""


class PipelineError(Exception):
    """The run cannot go on; what it has done is kept, and the message says why it stopped."""


@dataclass(frozen=True)
class Setup:
    """What explains, before it is on a device: it can be sent to other processes.

    ``dtype``: what is computed in, by default the model's own.
    """

    loaded: LoadedModel
    composite: Composite
    backend: str = "auto"
    dtype: torch.dtype | None = None

    def explainer(self, device: torch.device) -> LRP:
        """The explainer on a device; raises what :class:`LRP` raises."""
        return LRP(self.loaded.model.to(device), self.composite, backend=self.backend, dtype=self.dtype)


class Decoded(NamedTuple):
    """A batch ready to be explained: ``inputs`` float32 [B, 3, crop, crop], and each sample's failure, or ''."""

    batch: int
    inputs: Tensor
    reasons: list[str]


class Batches(Dataset[Decoded]):
    """The batches of a source, decoded when asked for, in any process."""

    def __init__(self, source: Source, preprocessing: Preprocessing, batch_size: int) -> None:
        self._source, self._preprocessing, self._batch_size = source, preprocessing, batch_size
        # Noise, not zeros: nothing in it divides zero by zero.
        size = preprocessing.crop
        self._stand_in = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, batch: int) -> Decoded:
        low = batch * self._batch_size
        inputs = self._stand_in.repeat(self._batch_size, 1, 1, 1)
        reasons = []
        for place in range(min(self._batch_size, len(self._source) - low)):
            try:
                image = decode_image(self._source.read(low + place))
                inputs[place] = self._preprocessing.normalize(self._preprocessing.frame(image))
                reasons.append("")
            except ImageError as error:
                reasons.append(str(error))
            except Exception as error:  # whatever one file does, the others go on
                reasons.append(f"{type(error).__name__}: {error}")
        return Decoded(batch, inputs, reasons)


def on_device(decoded: Iterable[Decoded], device: torch.device) -> Iterator[Decoded]:
    """The batches on a device; on a GPU each is copied while the one before it is computed."""
    if device.type != "cuda":
        yield from decoded
        return
    stream = torch.cuda.Stream(device)
    ahead: Decoded | None = None
    for batch in itertools.chain(decoded, (None,)):
        following = None
        if batch is not None:
            with torch.cuda.stream(stream):
                following = batch._replace(inputs=batch.inputs.to(device, non_blocking=True))
        if ahead is not None:
            yield ahead
        if following is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
            following.inputs.record_stream(torch.cuda.current_stream(device))
        ahead = following


class Explained:
    """A batch's fields on their way to the host: on a GPU by ``copies``, a stream of their own, while the next is computed."""

    def __init__(self, decoded: Decoded, fields: Mapping[str, Tensor], copies: torch.cuda.Stream | None) -> None:
        self.batch, self._reasons = decoded.batch, decoded.reasons
        self._ready: torch.cuda.Event | None = None
        self._fields = dict(fields)
        if copies is not None:
            copies.wait_stream(torch.cuda.current_stream(copies.device))
            with torch.cuda.stream(copies):
                self._fields = {name: _to_pinned(values, copies) for name, values in fields.items()}
                self._ready = copies.record_event()

    def rows(self, layout: Layout) -> Rows:
        """The rows of the store, once they are here; samples that failed are zero, with the reason."""
        if self._ready is not None:
            self._ready.synchronize()
        count = len(self._reasons)
        found = {name: values[:count].numpy() for name, values in self._fields.items()}
        finite = found.pop("finite")
        reasons = [reason or ("" if good else NOT_FINITE) for reason, good in zip(self._reasons, finite, strict=True)]
        rows = layout.empty(count)
        rows["reason"][:] = reasons
        failed = rows["reason"] != ""
        for name, values in found.items():
            rows[name] = np.where(failed.reshape(-1, *[1] * (values.ndim - 1)), 0, values).astype(values.dtype)
        rows["status"][:] = np.where(failed, FAILED, DONE)
        return rows


def _to_pinned(values: Tensor, copies: torch.cuda.Stream) -> Tensor:
    values.record_stream(copies)  # its memory is not another's before it is copied
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class BatchExplainer:
    """Explains whole batches into the fields of a store's rows, in as many equal parts as the memory asks for."""

    def __init__(self, explainer: LRP, layout: Layout) -> None:
        self.explainer, self.layout = explainer, layout
        self._together = layout.batch_size
        on_gpu = explainer.device.type == "cuda"
        self._copies = torch.cuda.Stream(explainer.device) if on_gpu else None

    def explain(self, decoded: Decoded) -> Explained:
        """Raises :class:`PipelineError` if not even one image fits into memory or the model refuses the pictures."""
        inputs = decoded.inputs.to(self.explainer.device)
        while True:
            try:
                parts = [self._fields(part) for part in inputs.split(self._together)]
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._together == 1:
                    raise PipelineError(f"out of memory even for one image at a time: {error}") from error
            # Outside the handler, whose traceback would hold the tensors that filled the memory.
            self._together = -(-self._together // 2)
            free_memory(self.explainer)
        return Explained(decoded, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, self._copies)

    def _fields(self, inputs: Tensor) -> dict[str, Tensor]:
        """All fields of some images, and ``finite``, whether all relevance is; where it is not, maps are zero."""
        channels, relevance = list(self.layout.channels), list(self.layout.relevance)
        layers = list(dict.fromkeys([*channels, *(name for name in relevance if name != INPUT)]))
        try:
            result = self.explainer.explain(inputs, layers=layers, relevance=INPUT in relevance)
        except ValueError as error:
            raise PipelineError(f"pictures of {list(inputs.shape[1:])}: {error}") from error
        numbers = explained_numbers(result, channels)
        whole = {
            name: (result.relevance if name == INPUT else result.layers[name]).float()  # type: ignore[union-attr]
            for name in relevance
        }
        heatmap = result.heatmap.float()
        finite = heatmap.flatten(1).isfinite().all(1)
        for values in (*(numbers[CHANNELS + name] for name in channels), *whole.values()):
            finite &= values.flatten(1).isfinite().all(1)
        encoded = self.layout.encode(_where(finite, heatmap))
        for name, values in whole.items():
            encoded |= self.layout.encode_relevance(name, _where(finite, values))
        return {**encoded, **numbers, "finite": finite}


def explained_numbers(result: Attribution, channels: Iterable[str]) -> dict[str, Tensor]:
    """What is kept of each image besides its map: the class, its probability, the leak, and relevance by channel."""
    layers = {name: result.layers[name] for name in channels}
    sums = {CHANNELS + name: x.reshape(*x.shape[:2], -1).sum(2).float() for name, x in layers.items()}
    return {"target": result.target, "probability": result.probability.float(), "leak": result.leak.float(), **sums}


def _where(good: Tensor, values: Tensor) -> Tensor:
    return torch.where(good.view(-1, *[1] * (values.ndim - 1)), values, 0.0)


def free_memory(explainer: LRP) -> None:
    """Give back what an explainer and the device's allocator keep for later calls."""
    explainer.refresh()
    if explainer.device.type == "cuda":
        torch.cuda.empty_cache()


def layer_shapes(explainer: LRP, layers: Iterable[str], size: int) -> dict[str, tuple[int, ...]]:
    """The shape of a layer's output for one picture of ``size`` pixels a side, by name; :data:`INPUT` is the picture.

    Raises ``ValueError`` for a layer that the model does not have.
    """
    parameters = parameter_table(explainer.model, explainer.plan)
    shapes = explainer.plan.shapes((1, 3, size, size), parameters)
    return {name: (3, size, size) if name == INPUT else shapes[explainer.plan.find(name)][1:] for name in layers}


def find_batch_size(
    explainer: LRP,
    size: int,
    largest: int = LARGEST_BATCH,
    on_size: Callable[[int, float], None] = lambda batch_size, rate: None,
) -> int:
    """The batch size to explain pictures of ``size`` pixels with: doubled from one while that pays and fits.

    Each is run twice and the second timed; doubling ends where images per second have twice not grown by 5 %, the memory
    is used up, or ``largest`` is reached. ``on_size`` hears each batch size and its images per second.
    """
    found, best, batch_size, disappointments = 1, 0.0, 1, 0
    while batch_size <= largest and disappointments < 2:
        try:
            rate = _images_per_second(explainer, batch_size, size)
        except Exception as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
            break
        on_size(batch_size, rate)
        if rate >= WORTH_DOUBLING * best:
            found, best, disappointments = batch_size, rate, 0
        else:
            disappointments += 1
        batch_size *= 2
    free_memory(explainer)
    return found


def _images_per_second(explainer: LRP, batch_size: int, size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, 3, size, size, generator=generator).to(explainer.device)
    for _ in range(2):
        begin = time.perf_counter()
        explainer.explain(inputs, relevance=False).leak.sum().item()  # what is read waits for the device
    return batch_size / (time.perf_counter() - begin)
