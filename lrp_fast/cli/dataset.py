"""``lrp-fast attribute-dataset``: a data set in, a store out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrp_fast.data import KINDS, Source, open_source
from lrp_fast.explain import BACKENDS, LRP
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.pipeline import FAILURES, Pipeline, PipelineOptions
from lrp_fast.pipeline import Progress as DatasetProgress

from .common import (
    DEFAULT_COMPOSITE,
    DTYPE_NAMES,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    BackendOption,
    CompositeOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    SizeOption,
    SplitOption,
    UsageError,
    WeightsOption,
    app,
    check_choice,
    find_composite,
    find_device,
    make_explainer,
    parse_split,
    reporting,
    shown,
    stop,
)

PLAIN_SECONDS = 10.0
"""How often progress is told in lines, where there is no terminal to redraw."""


@app.command("attribute-dataset")
@reporting()
def attribute_dataset(
    source: Annotated[
        Path, typer.Option(help="A folder of pictures, a manifest (.csv, .parquet), or WebDataset shards.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The store, a folder; continued if it is there.")],
    kind: Annotated[
        str | None, typer.Option(help=f"What the source is: {', '.join(KINDS)}. Default: what it looks like.")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    composite: CompositeOption = DEFAULT_COMPOSITE,
    split: SplitOption = None,
    dtype: DtypeOption = "float32",
    levels: Annotated[
        int | None, typer.Option(min=2, max=256, help="Store maps cut to so many levels, which takes less room.")
    ] = None,
    channels: Annotated[
        list[str] | None, typer.Option(help="Also store this layer's relevance by channel; again for more layers.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures explained at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures.")] = 2,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed pictures again.")] = False,
) -> None:
    """Explain every picture of a data set into a store; the same command continues a run that was stopped."""
    check_choice("--backend: unknown backend", backend, BACKENDS)
    check_choice("--dtype: unknown dtype", dtype, DTYPE_NAMES)
    if kind is not None:
        check_choice("--kind: unknown kind", kind, KINDS)
    splits, rules, place = parse_split(split), find_composite(composite), find_device(device)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    if output.resolve() == source.resolve():
        raise UsageError(f"--output: {output} is also the data set to explain; results need their own")
    samples = open_source(source, kind, exclude=output)
    loaded = load_model(model, weights, size)
    explainer = make_explainer(loaded, rules, splits, backend, place, DTYPE_NAMES[dtype])
    layers = tuple(name for text in channels or () for name in text.split(","))
    options = PipelineOptions(batch_size, workers, levels, layers, retry_failed)
    _report_dataset(_run_pipeline(_make_pipeline(explainer, loaded, samples, options), len(samples), output), output)


def _make_pipeline(explainer: LRP, loaded: LoadedModel, source: Source, options: PipelineOptions) -> Pipeline:
    try:
        return Pipeline(explainer, loaded, source, options)
    except ValueError as error:
        raise UsageError(f"--channels: {error}") from error


def _run_pipeline(pipeline: Pipeline, total: int, output: Path) -> DatasetProgress:
    """Run, with one live line on a terminal and plain lines elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("explaining"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task("explaining", total=total, told="")
        told_at = -PLAIN_SECONDS

        def on_failure(key: str, reason: str) -> None:
            console.print(f"[yellow]failed:[/] {shown(key)}: {shown(reason)}", highlight=False, soft_wrap=True)

        def on_batch(progress: DatasetProgress) -> None:
            nonlocal told_at
            display.update(
                task, completed=progress.done + progress.failed, told=f"{progress.failed} failed, {_rates(progress)}"
            )
            if not console.is_terminal and time.monotonic() - told_at >= PLAIN_SECONDS:
                told_at = time.monotonic()
                console.print(_told(progress), highlight=False, soft_wrap=True)

        return pipeline.into(output, on_failure=on_failure, on_batch=on_batch)


def _rates(progress: DatasetProgress) -> str:
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in progress.shares().items())
    return f"{progress.rate():.1f} images/s, waited for {shares}"


def _told(progress: DatasetProgress) -> str:
    dealt_with = progress.done + progress.failed
    seconds = (progress.total - dealt_with) / progress.rate() if progress.rate() else 0.0
    return f"{dealt_with}/{progress.total}, {progress.failed} failed, {seconds:.0f} s left, {_rates(progress)}"


def _report_dataset(progress: DatasetProgress, output: Path) -> None:
    """Say what the store holds and leave with the exit code that tells."""
    where = shown(str(output))
    failures = f", [yellow]{progress.failed} failed[/] (see {FAILURES})" if progress.failed else ""
    took = f"{progress.fresh} in this run; {_rates(progress)}" if progress.fresh else "nothing was left to do"
    line = f"{progress.done} of {progress.total} explained{failures}, {progress.bytes_per_image:,.0f} bytes per image, "
    Console().print(f"{line}in {where}; {took}", highlight=False, soft_wrap=True)
    if progress.interrupted:
        stop("interrupted; the same command continues", EXIT_INTERRUPTED)
    if progress.failed:
        raise typer.Exit(EXIT_SOME_FAILED)
