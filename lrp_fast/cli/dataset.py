"""``lrp-fast attribute-dataset``: a data set in, a store out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lrp_fast.batches import Setup
from lrp_fast.cluster import attribute_on_cluster, connect
from lrp_fast.data import Source
from lrp_fast.devices import attribute_on_devices
from lrp_fast.environment import launched
from lrp_fast.explain import BACKENDS
from lrp_fast.models import load_model
from lrp_fast.pipeline import FAILURES, Pipeline, PipelineOptions, Progress
from lrp_fast.plan import TraceError
from lrp_fast.store import WHOLE, Part

from .common import (
    DEFAULT_COMPOSITE,
    DTYPE_NAMES,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    BackendOption,
    CommandError,
    CompositeOption,
    DeviceOption,
    DtypeOption,
    InterpolationOption,
    KindOption,
    MeanOption,
    ModelOption,
    ResizeOption,
    SizeOption,
    SourceOption,
    SourceSplitOption,
    SplitOption,
    StdOption,
    UsageError,
    WeightsOption,
    app,
    check_choice,
    check_rules,
    composite_for,
    find_device,
    find_source,
    layer_names,
    override_preprocessing,
    reporting,
    shown,
    stop,
)
from .progress import Display, rates

ENGINES = ("local", "ray")


@app.command("attribute-dataset")
@reporting()
def attribute_dataset(
    source: SourceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The store, a folder; continued if it is there.")],
    kind: KindOption = None,
    source_split: SourceSplitOption = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    composite: CompositeOption = DEFAULT_COMPOSITE,
    split: SplitOption = None,
    dtype: DtypeOption = None,
    levels: Annotated[
        int | None, typer.Option(min=2, max=256, help="Store maps cut to so many levels, which takes less room.")
    ] = None,
    channels: Annotated[
        list[str] | None, typer.Option(help="Also store this layer's relevance by channel; again for more layers.")
    ] = None,
    relevance: Annotated[
        list[str] | None,
        typer.Option(help="Also store the whole relevance of this layer, or of the `input`; again for more."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures explained at a time. Default: what is measured to be fastest.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures, for each device.")] = 2,
    size: SizeOption = None,
    resize: ResizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    device: DeviceOption = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several devices of this machine, all of one kind: 0,1,2,3 (GPUs) or cpu,cpu.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Part I/N of the data set, beside other processes. Default: as torchrun or srun says."),
    ] = None,
    engine: Annotated[str, typer.Option(help=f"Who runs it: {', '.join(ENGINES)} (a Ray cluster).")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster. Default: one is started here.")] = None,
    backend: BackendOption = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed pictures again.")] = False,
    log_json: Annotated[Path | None, typer.Option(help="Append every event to this file, a line of JSON each.")] = None,
) -> None:
    """Explain every picture of a data set into a store; the same command continues a run that was stopped."""
    check_choice("--backend: unknown backend", backend, BACKENDS)
    if dtype is not None:
        check_choice("--dtype: unknown dtype", dtype, DTYPE_NAMES)
    check_choice("--engine: unknown engine", engine, ENGINES)
    check_rules(composite, split)
    _check_places(source, output)
    part = WHOLE if engine == "ray" else _find_part(shard)
    places = _find_devices(device, devices)
    if engine == "ray" and (devices is not None or shard is not None or device != "auto"):
        raise UsageError("--engine ray finds its devices by itself: leave out --device, --devices and --shard")
    if engine != "ray" and address is not None:
        raise UsageError("--address is of a Ray cluster: it goes with --engine ray")
    samples = find_source(source, kind, source_split, exclude=output)
    loaded = override_preprocessing(load_model(model, weights, size), resize, mean, std, interpolation)
    setup = Setup(loaded, composite_for(loaded, composite, split), backend, None if dtype is None else DTYPE_NAMES[dtype])
    options = PipelineOptions(
        batch_size or 0, workers, levels, layer_names(channels), layer_names(relevance), retry_failed
    )
    run = _Run(setup, samples, options, output)
    with Display(len(samples) if part == WHOLE else None, log_json) as display:
        display.begin(output=str(output), engine=engine, part=str(part), devices=[str(place) for place in places])
        progress = run.on_ray(address, display) if engine == "ray" else run.here(places, part, display)
        display.end(progress)
    _report(progress, output, part)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, as SLURM sends before a job's time is up, ends a run as Ctrl-C does: what is computed is stored."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Run:
    """What is to be done, and the ways to do it."""

    def __init__(self, setup: Setup, source: Source, options: PipelineOptions, output: Path) -> None:
        self._what = (setup, source, options)
        self._output = output

    def here(self, devices: Sequence[torch.device], part: Part, display: Display) -> Progress:
        with _ended_by_sigterm():
            with _naming_the_model(self._what[0].loaded.name):
                if len(devices) > 1:
                    return attribute_on_devices(
                        *self._what, self._output, devices, part, on_failure=display.failure, on_batch=display.batch
                    )
                pipeline = Pipeline(*self._what, devices[0], part)
            return pipeline.into(self._output, on_failure=display.failure, on_batch=display.batch)

    def on_ray(self, address: str | None, display: Display) -> Progress:
        connect(address)  # after this, as it sets a way of its own to end
        with _ended_by_sigterm(), _naming_the_model(self._what[0].loaded.name):
            return attribute_on_cluster(*self._what, self._output, on_failure=display.failure, on_batch=display.batch)


@contextlib.contextmanager
def _naming_the_model(name: str) -> Iterator[None]:
    """A model without rules is an error, a layer that it does not have a mistake in the command."""
    try:
        yield
    except (TraceError, TypeError) as error:
        raise CommandError(f"{name}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def _check_places(source: str, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    if output.resolve() == Path(source).resolve():
        raise UsageError(f"--output: {output} is also the data set to explain; results need their own")


def _find_part(text: str | None) -> Part:
    """``--shard I/N``, else what torchrun's or srun's variables say, else the whole."""
    if text is None:
        found = launched()
        if found is None or found.count == 1:
            return WHOLE
        line = f"part {found.index}/{found.count}, by {found.by}'s variables"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        return Part(found.index, found.count)
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard: expected I/N with 0 <= I < N, got {text!r}")
    return Part(int(index), int(count))


def _find_devices(device: str, devices: str | None) -> list[torch.device]:
    """``--devices``, or the one ``--device``: of several processes on a machine, each takes a GPU of its own."""
    if devices is None:
        found = launched()
        if device == "auto" and found is not None and torch.cuda.is_available():
            device = f"cuda:{found.local % torch.cuda.device_count()}"
        return [find_device(device)]
    if device != "auto":
        raise UsageError("give --device or --devices, not both")
    names = [f"cuda:{name}" if name.isdecimal() else name for name in devices.split(",")]
    places = [find_device(name, "--devices") for name in names]
    if len({place.type for place in places}) > 1:
        raise UsageError(f"--devices: expected devices of one kind, whose bits agree, got {devices}")
    return places


def _report(progress: Progress, output: Path, part: Part) -> None:
    """Say what the store holds and leave with the exit code that tells."""
    where = shown(str(output)) + (f" (part {part})" if part != WHOLE else "")
    failures = f", [yellow]{progress.failed} failed[/] (see {FAILURES})" if progress.failed else ""
    took = f"{progress.fresh} in this run; {rates(progress)}"
    if not progress.fresh and not progress.interrupted:
        took = "nothing was left to do"
    if not progress.total:
        took = "this part is empty, as there are more parts than shards in the store"
    line = f"{progress.done} of {progress.total} explained{failures}, {progress.bytes_per_image:,.0f} bytes per image, "
    Console().print(f"{line}in {where}; {took}", highlight=False, soft_wrap=True)
    if progress.interrupted:
        stop("interrupted; the same command continues", EXIT_INTERRUPTED)
    if progress.failed:
        raise typer.Exit(EXIT_SOME_FAILED)
