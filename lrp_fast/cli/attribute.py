"""``lrp-fast attribute``: pictures in, overlays, maps, a table and a gallery out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lrp_fast.composites import Composite
from lrp_fast.explain import BACKENDS
from lrp_fast.heatmap import MOST_LEVELS, default_smoothing
from lrp_fast.images import find_images, written_into
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.report import PAGE, Failure, Outcome, Run, RunOptions
from lrp_fast.version import VERSION

from .common import (
    DEFAULT_COMPOSITE,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    BackendOption,
    CompositeOption,
    DeviceOption,
    InterpolationOption,
    MeanOption,
    ModelOption,
    ResizeOption,
    SizeOption,
    SplitOption,
    StdOption,
    UsageError,
    WeightsOption,
    app,
    check_choice,
    check_rules,
    composite_for,
    find_device,
    make_explainer,
    override_preprocessing,
    reporting,
    shown,
    stop,
)


@app.command()
@reporting()
def attribute(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Picture files, and folders that are searched for them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for results; those of an earlier run are replaced.")
    ],
    model: ModelOption = None,
    weights: WeightsOption = None,
    composite: CompositeOption = DEFAULT_COMPOSITE,
    split: SplitOption = None,
    target: Annotated[
        str | None, typer.Option(help="The class to explain, by number or name. Default: the predicted one.")
    ] = None,
    heat_quantization: Annotated[bool, typer.Option(help="Cut overlays to a few levels; maps stay.")] = True,
    levels: Annotated[int, typer.Option(min=2, max=MOST_LEVELS, help="Levels of the heat quantization.")] = 8,
    smooth: Annotated[
        float | None,
        typer.Option(min=0, help="Blur overlays by this many pixels; 0 shows exact ones. Default: size / 32."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures explained at a time.")] = 8,
    size: SizeOption = None,
    resize: ResizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Explain pictures: for each an overlay (.png) and the raw map (.npy), a results.csv and an index.html gallery."""
    check_choice("--backend: unknown backend", backend, BACKENDS)
    if smooth is not None and not math.isfinite(smooth):
        raise UsageError(f"--smooth: expected a number of pixels, got {smooth}")
    check_rules(composite, split)
    files = _find_files(images, output)
    loaded = override_preprocessing(load_model(model, weights, size), resize, mean, std, interpolation)
    rules = composite_for(loaded, composite, split)
    options = RunOptions(
        target=None if target is None else _parse_target(target, loaded.classes),
        levels=levels if heat_quantization else None,
        smoothing=smooth,
        batch_size=batch_size,
        device=find_device(device),
    )
    explainer = make_explainer(loaded, rules, backend, options.device)
    settings = describe_run(loaded, rules, options)
    outcome = run_with_progress(Run(explainer, loaded, options), output, files, settings)
    report(outcome, output)


def _parse_target(text: str, classes: Sequence[str]) -> int:
    """``--target``: a number, or a class name in any case, of which there must be exactly one."""
    if text.removeprefix("-").isdecimal():
        if not 0 <= int(text) < len(classes):
            raise UsageError(f"--target: class {text} is not among the model's {len(classes)}, 0 to {len(classes) - 1}")
        return int(text)
    exact = [index for index, name in enumerate(classes) if name == text]
    found = exact or [index for index, name in enumerate(classes) if name.lower() == text.lower()]
    if not found:
        some = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise UsageError(f"--target: no class is called {text!r}; the model has {len(classes)}: {some}")
    if len(found) > 1:
        raise UsageError(f"--target: {text!r} is the name of {len(found)} classes; choose one by number: {found}")
    return found[0]


def _find_files(images: Sequence[Path], output: Path) -> list[Path]:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    for path in images:
        if path.is_dir() and path.resolve() == output.resolve():
            raise UsageError(f"--output: {output} is also a folder of pictures to explain; results need their own")
    files = find_images(images, exclude=output)
    written = written_into(output)
    for file in files:
        places = ((one.parent.resolve(), one.name) for one in (file, file.resolve()))
        if any(parent == output.resolve() and name in written for parent, name in places):
            raise UsageError(f"--output: {file} was written there by an earlier run, and would be replaced by this one")
    if not files:
        raise UsageError(f"no picture files in {', '.join(map(str, images))}")
    return files


def describe_run(loaded: LoadedModel, composite: Composite, options: RunOptions) -> dict[str, str]:
    """The header of the gallery: everything that decides what its pictures show, label to text."""
    size = loaded.preprocessing.crop
    smoothing = default_smoothing(size, size) if options.smoothing is None else options.smoothing
    return {
        "model": loaded.name,
        "weights": loaded.source,
        "composite": composite.name,
        "split": str(composite.splits),
        "class": "predicted" if options.target is None else loaded.classes[options.target],
        "heat quantization": "off" if options.levels is None else f"{options.levels} levels",
        "overlays smoothed by": f"{smoothing:g} px" if smoothing else "nothing",
        "size": f"{size} px",
        "preprocessing": str(loaded.preprocessing),
        "device": str(options.device),
        "lrp-fast": VERSION,
    }


def run_with_progress(run: Run, output: Path, files: Sequence[Path], settings: Mapping[str, str]) -> Outcome:
    columns = (
        TextColumn("explaining"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("explaining", total=len(files))

        def on_failure(failure: Failure) -> None:
            line = f"[yellow]failed:[/] {shown(failure.name)}: {shown(failure.reason)}"
            progress.console.print(line, highlight=False, soft_wrap=True)

        def on_batch(count: int) -> None:
            progress.advance(task, count)

        return run.into(output, files, settings, on_failure=on_failure, on_batch=on_batch)


def report(outcome: Outcome, output: Path) -> None:
    """Say what was done and leave with the exit code that tells."""
    if not outcome.begun:
        why = "interrupted before anything was done" if outcome.interrupted else "no picture could be explained"
        stop(f"{why}; {output} is left as it was", EXIT_INTERRUPTED if outcome.interrupted else EXIT_SOME_FAILED)
    numbers = outcome.summary()
    failed = f", [yellow]{numbers['failed']} failed[/]" if "failed" in numbers else ""
    leak = f"; mean leak {numbers['mean leak']}" if "mean leak" in numbers else ""
    line = f"{numbers['explained']} explained{failed}{leak}; see {shown(str(output / PAGE))}"
    Console().print(line, highlight=False, soft_wrap=True)
    if outcome.interrupted:
        stop("interrupted; what was done until then is kept", EXIT_INTERRUPTED)
    if outcome.failures:
        raise typer.Exit(EXIT_SOME_FAILED)
