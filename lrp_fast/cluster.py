"""A Ray cluster fills one store, or explains a ``ray.data.Dataset``.

Ray schedules, moves data and retries what a lost worker leaves; the batches and the store are those of
:mod:`lrp_fast.pipeline`. ray is imported when something is run on it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lrp_fast.batches import Batches, BatchExplainer, Decoded, PipelineError, Setup, explained_numbers
from lrp_fast.composites import Composite
from lrp_fast.data import Source
from lrp_fast.explain import LRP
from lrp_fast.images import Preprocessing
from lrp_fast.pipeline import OnBatch, OnFailure, Pipeline, PipelineOptions, Progress, fill
from lrp_fast.splits import Split, Splits
from lrp_fast.store import Array, Layout, Store, StoreError, StoreWriter, stage

_MOST_BLOCKS, _MOST_CALLS = 10_000, 10_000


@dataclass(frozen=True)
class Workers:
    """What explains on a cluster: ``count`` actors of ``gpus`` GPUs and ``cpus`` CPUs each.

    ``decoding_cpus``: the CPUs of each of the decoding tasks that run beside them.
    """

    count: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    decoding_cpus: float = 1.0

    def options(self) -> dict[str, Any]:
        """What ``map_batches`` is told of the actors."""
        pool = _data().ActorPoolStrategy(size=self.count)
        return {"compute": pool, "num_gpus": self.gpus, "num_cpus": self.cpus}


def connect(address: str | None = None) -> None:
    """Connect to a cluster, or start a local one; nothing if this process is connected already.

    Raises :class:`PipelineError` if there is none at the address, or ray is not installed.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    begun = {"include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **begun)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PipelineError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    _data().DataContext.get_current().enable_progress_bars = False  # there is our own
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def default_workers() -> Workers:
    """An actor for every GPU of the connected cluster; without GPUs one for every node, with half of its CPUs.

    The other CPUs decode.
    """
    ray = _ray()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        return Workers(gpus, 1.0)
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = min(count for count in nodes if count > 0)
    return Workers(sum(count > 0 for count in nodes), cpus=cpus // 2 or cpus / 2, decoding_cpus=min(1.0, cpus / 2))


def attribute_on_cluster(
    setup: Setup,
    source: Source,
    options: PipelineOptions,
    path: Path,
    workers: Workers | None = None,
    *,
    on_failure: OnFailure = lambda key, reason: None,
    on_batch: OnBatch = lambda progress: None,
) -> Progress:
    """As :meth:`Pipeline.into`, on the connected Ray cluster, whose machines all see the source and ``path``.

    Tasks decode whole batches, actors explain them and write each to a file of its own, and this process brings the files
    into the store. A batch lost with its actor or its node is computed again by Ray.
    """
    workers = workers or default_workers()
    remote = _ray().remote(num_gpus=workers.gpus, num_cpus=workers.cpus)(_store_arguments)
    with _plain_errors():
        arguments = _ray().get(remote.remote(setup, source, options, path))
    with StoreWriter(path, *arguments) as writer:

        def run(pending: Sequence[int], progress: Progress) -> None:
            before = writer.store.status[:]
            results = _explain_batches(setup, source, path, writer.layout, workers, pending)
            for _ in pending:
                with progress.waiting_for("compute"), _plain_errors():
                    row = next(results)
                with progress.waiting_for("write"):
                    writer.take(row["batch"])
                low, high = writer.layout.span(row["batch"])
                status, reasons = np.asarray(json.loads(row["status"])), json.loads(row["reasons"])
                progress.take(source.keys[low:high], before[low:high], status, reasons, on_failure)
                on_batch(progress)

        return fill(writer, options.retry_failed, run)


def attribute(
    dataset: Any,
    model: nn.Module,
    composite: str | Composite = "otsuki2024",
    split: str | Split | Splits | None = None,
    *,
    column: str = "image",
    preprocessing: Preprocessing | None = None,
    layers: Sequence[str] = (),
    batch_size: int = 32,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    workers: Workers | None = None,
) -> Any:
    """A ``ray.data.Dataset`` with the explanation of every row: nothing is computed until it is consumed.

    ``column`` holds the pictures: H×W×3 uint8, as ``ray.data.read_images`` gives them, which ``preprocessing`` brings into
    the network's form; or, without it, 3×H×W floating, normalised, all of one size. Added are ``heatmap`` [H, W] float32,
    ``target``, ``probability``, ``leak``, and ``channels/LAYER`` [C] float32, relevance summed over space, for ``layers``.

    ``workers``: the actors, by default one for each GPU, else for each node. Other arguments as of :class:`~lrp_fast.LRP`.
    The composition of batches is Ray's, so bits may differ from run to run in the last digits. Raises what
    :class:`~lrp_fast.LRP` raises, :class:`PipelineError` if ray is not installed or not connected; while it is consumed,
    ray's errors.
    """
    explainer = LRP(model, composite, split, backend="torch" if backend == "auto" else backend, dtype=dtype)
    for name in layers:
        explainer.plan.find(name)
    reference = _ray().put((model, explainer.composite, backend, dtype))
    arguments = (reference, column, preprocessing, tuple(layers))
    chosen = (workers or default_workers()).options()
    return dataset.map_batches(_RowExplainer, batch_size=batch_size, fn_constructor_args=arguments, **chosen)


def _store_arguments(setup: Setup, source: Source, options: PipelineOptions, path: Path) -> tuple[Any, ...]:
    """On a worker, whose device and fastest batch size they are."""
    return Pipeline(setup, source, options, _device()).store_arguments(path)


def _explain_batches(
    setup: Setup, source: Source, path: Path, layout: Layout, workers: Workers, pending: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What :class:`_BatchWriter` says of each pending batch, in the order in which they are done."""
    ray = _ray()
    batches = ray.put(Batches(source, setup.loaded.preprocessing, layout.batch_size))
    numbers = _data().from_items([{"batch": batch} for batch in pending], override_num_blocks=_blocks(pending))
    # Ray has actors do what comes before them if that has the same options: they would decode, and not compute meanwhile.
    decoded = numbers.map(functools.partial(_decode, batches), num_cpus=workers.decoding_cpus, max_calls=_MOST_CALLS)
    arguments = (ray.put(setup), path)
    workers = replace(workers, count=max(1, min(workers.count, len(pending))))
    written = decoded.map_batches(_BatchWriter, batch_size=1, fn_constructor_args=arguments, **workers.options())
    return iter(written.iter_rows())


def _blocks(pending: Sequence[int]) -> int | None:
    """A block to a batch: the smallest piece that Ray moves and retries."""
    return min(len(pending), _MOST_BLOCKS) or None


def _decode(batches: Any, row: dict[str, Any]) -> dict[str, Any]:
    decoded: Decoded = _ray().get(batches)[row["batch"]]
    return {"batch": decoded.batch, "inputs": decoded.inputs.numpy(), "reasons": json.dumps(decoded.reasons)}


class _BatchWriter:
    """An actor: explains whole batches and writes each to a file of its own in the store."""

    def __init__(self, setup: Any, path: Path) -> None:
        self._store = Store(path)
        explainer = _ray().get(setup).explainer(_device())
        self._explainer = BatchExplainer(explainer, self._store.layout)

    def __call__(self, table: dict[str, Array]) -> dict[str, list[Any]]:
        batch, reasons = int(table["batch"][0]), json.loads(str(table["reasons"][0]))
        inputs = torch.from_numpy(np.array(table["inputs"][0]))  # a copy: Ray's own may not be written to
        rows = self._explainer.explain(Decoded(batch, inputs, reasons)).rows(self._store.layout)
        stage(self._store, batch, rows)
        said = {"status": rows["status"], "reasons": rows["reason"]}
        return {"batch": [batch], **{name: [json.dumps(values.tolist())] for name, values in said.items()}}


class _RowExplainer:
    """An actor: adds the explanations to the rows of a table."""

    def __init__(self, reference: Any, column: str, preprocessing: Preprocessing | None, layers: Sequence[str]) -> None:
        model, composite, backend, dtype = _ray().get(reference)
        self._explainer = LRP(model.to(_device()), composite, backend=backend, dtype=dtype)
        self._column, self._preprocessing, self._layers = column, preprocessing, layers

    def __call__(self, table: dict[str, Array]) -> dict[str, Array]:
        if self._column not in table:
            raise ValueError(f"the data set has no column {self._column!r}; it has: {', '.join(table)}")
        inputs = torch.stack([self._input(picture) for picture in table[self._column]])
        result = self._explainer.explain(inputs.to(self._explainer.device), layers=self._layers, relevance=False)
        found = {"heatmap": result.heatmap.float(), **explained_numbers(result, self._layers)}
        return {**table, **{name: values.cpu().numpy() for name, values in found.items()}}

    def _input(self, picture: Array) -> Tensor:
        if self._preprocessing is None:
            if picture.ndim != 3 or picture.dtype.kind != "f":
                raise ValueError(
                    f"expected normalised pictures 3×H×W, floating, got {picture.dtype} {list(picture.shape)}; "
                    "give preprocessing= for pictures H×W×3 in uint8"
                )
            return torch.from_numpy(picture.astype(np.float32))
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"expected pictures H×W×3 in uint8, got {picture.dtype} {list(picture.shape)}")
        return self._preprocessing.normalize(self._preprocessing.frame(Image.fromarray(picture)))


def _device() -> torch.device:
    """Where an actor or task computes: Ray shows it only the GPUs that are its own."""
    return torch.device("cuda" if _ray().get_gpu_ids() else "cpu")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in a worker, without Ray's account of where."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, (StoreError, ValueError)):
            raise cause from error
        raise PipelineError(f"a worker failed: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise PipelineError(f"the cluster failed: {error}") from error


def _data() -> Any:
    import ray.data

    return ray.data


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise PipelineError("a cluster needs ray, which is not installed: pip install 'lrp-fast[cluster]'") from error
    return ray
