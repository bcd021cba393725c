"""``lrp-fast evaluate``: how good the maps of several methods are, measured on the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lrp_fast.data import Source
from lrp_fast.evaluation import (
    TARGETS,
    Evaluation,
    EvaluationError,
    EvaluationOptions,
    EvaluationOutcome,
    with_controls,
)
from lrp_fast.methods import PRESETS, Method, find_method, list_methods
from lrp_fast.metrics import Interval
from lrp_fast.models import load_model
from lrp_fast.report import PAGE, Failure
from lrp_fast.report.scores import METRICS, PROTOCOLS, Row, groups_in, number, span

from .common import (
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    CommandError,
    DeviceOption,
    InterpolationOption,
    KindOption,
    MeanOption,
    ModelOption,
    ResizeOption,
    SizeOption,
    SourceOption,
    SourceSplitOption,
    StdOption,
    UsageError,
    WeightsOption,
    app,
    check_choice,
    find_device,
    find_source,
    override_preprocessing,
    print_table,
    reporting,
    shown,
    stop,
)
from .progress import PlainLines

BASELINES = ("black", "mean", "blur")
BOTH = "both"
SANITY_PICTURES = 4


@app.command()
@reporting()
def evaluate(
    source: SourceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for results; continued if it is there.")],
    kind: KindOption = None,
    source_split: SourceSplitOption = None,
    masks: Annotated[
        Path | None, typer.Option(help="A folder of masks of the objects, named as the pictures.", exists=True)
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between them (see `lrp-fast methods`).")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"A list of methods: {', '.join(PRESETS)}.")] = None,
    metrics: Annotated[str, typer.Option(help="What is measured, with commas between.")] = ",".join(METRICS),
    protocol: Annotated[
        str, typer.Option(help=f"How insertion and deletion treat ties: {BOTH}, {' or '.join(PROTOCOLS)}.")
    ] = BOTH,
    target: Annotated[str, typer.Option(help=f"The class explained: {' or '.join(TARGETS)}.")] = "predicted",
    limit: Annotated[int, typer.Option(min=1, help="Pictures drawn from the source, at most.")] = 1000,
    per_class: Annotated[
        bool | None, typer.Option(help="The same number of each class. Default: with a preset, if there are labels.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures drawn, and of the order of ties.")] = 0,
    patch: Annotated[int, typer.Option(min=1, help="Side in pixels of what is shown or removed at once.")] = 1,
    step: Annotated[
        int | None, typer.Option(min=1, help="Patches more at every point. Default: 1 %, 500 at 224 pixels.")
    ] = None,
    baseline: Annotated[str, typer.Option(help=f"What is shown in their place: {', '.join(BASELINES)}.")] = "black",
    sanity: Annotated[
        bool, typer.Option("--sanity", help=f"Also randomize the network's parameters, on {SANITY_PICTURES} pictures.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures explained at a time.")] = 8,
    size: SizeOption = None,
    resize: ResizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Compare methods by insertion and deletion, localisation, leak and time; the same command continues."""
    check_choice("--protocol: unknown protocol", protocol, (BOTH, *PROTOCOLS))
    check_choice("--target: unknown target", target, TARGETS)
    check_choice("--baseline: unknown baseline", baseline, BASELINES)
    chosen, place = find_methods(methods, preset), find_device(device)
    samples = _open(source, output, kind, source_split, masks)
    if per_class is None:
        per_class = preset is not None and bool((samples.labels >= 0).all())
    options = EvaluationOptions(
        metrics=tuple(_names("--metrics", metrics, METRICS)),
        protocols=PROTOCOLS if protocol == BOTH else (protocol,),
        target=target,
        limit=limit,
        per_class=per_class,
        seed=seed,
        batch_size=batch_size,
        patch=patch,
        step=step,
        baseline=baseline,
        sanity=SANITY_PICTURES if sanity else 0,
    )
    loaded = override_preprocessing(load_model(model, weights, size), resize, mean, std, interpolation)
    try:
        options.check_size(loaded.preprocessing.crop)
    except ValueError as error:
        raise UsageError(f"--step, --patch: {error}") from error
    try:
        evaluation = Evaluation(loaded, samples, options, place)
        outcome = _run_with_progress(evaluation, output, chosen)
    except EvaluationError as error:
        raise CommandError(str(error)) from error
    _report(outcome, output)


@app.command("methods")
@reporting()
def show_methods() -> None:
    """List the methods that can be evaluated."""
    print_table("method", list_methods())


def find_methods(names: str | None, preset: str | None) -> dict[str, Method]:
    """The methods of a preset and those named, by name, and the random controls that no table is without."""
    if names is None and preset is None:
        raise UsageError(f"nothing to evaluate: give --methods NAME,NAME or --preset {' or '.join(PRESETS)}")
    wanted: list[str] = []
    if preset is not None:
        check_choice("--preset: unknown preset", preset, PRESETS)
        wanted += PRESETS[preset]
    if names is not None:
        wanted += [name.strip() for name in names.split(",")]
    try:
        return with_controls({name: find_method(name) for name in wanted})
    except ValueError as error:
        raise UsageError(f"--methods: {error}") from error


def _names(option: str, text: str, known: Iterable[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_choice(f"{option}: unknown", name, known)
    return list(dict.fromkeys(names))


def _open(source: str, output: Path, kind: str | None, split: str | None, masks: Path | None) -> Source:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    if output.resolve() == Path(source).resolve():
        raise UsageError(f"--output: {output} is also the data set; results need their own folder")
    return find_source(source, kind, split, exclude=output, masks=masks)


def _run_with_progress(evaluation: Evaluation, output: Path, methods: Mapping[str, Method]) -> EvaluationOutcome:
    """Run, with one live line on a terminal and plain lines elsewhere."""
    console, count = Console(stderr=True), len(evaluation.sample)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    numbers = {name: number for number, name in enumerate(methods)}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(methods) * count)
        name, done, lines = "", 0, PlainLines(console)

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        def on_method(begun: str) -> None:
            nonlocal name, done, lines
            name, done, lines = begun, 0, PlainLines(console)
            title = f"{numbers[name] + 1}/{len(methods)} {shown(name)}"
            bar.update(task, description=title, completed=numbers[name] * count)
            if not console.is_terminal:
                say(title)

        def on_batch(pictures: int) -> None:
            nonlocal done
            done += pictures
            bar.update(task, completed=numbers[name] * count + done)
            lines.tell(f"  {done}/{count}")

        def on_failure(failure: Failure) -> None:
            say(f"[yellow]failed:[/] {shown(failure.name)}: {shown(failure.reason)}")

        return evaluation.into(output, methods, on_method=on_method, on_batch=on_batch, on_failure=on_failure)


def _report(outcome: EvaluationOutcome, output: Path) -> None:
    """Show the table and leave with the exit code that tells."""
    console = Console()
    console.print(_table(outcome.rows))
    skipped = f"; [yellow]{len(outcome.skipped)} pictures could not be read[/]" if outcome.skipped else ""
    page = shown(str(output / PAGE))
    console.print(f"95 % intervals in brackets{skipped}; see {page}", highlight=False, soft_wrap=True)
    if outcome.interrupted:
        stop("interrupted; the same command continues", EXIT_INTERRUPTED)
    if outcome.failures() or outcome.skipped:
        raise typer.Exit(EXIT_SOME_FAILED)


def _table(rows: list[Row]) -> Table:
    """What fits a terminal: ID by each protocol; where it was not measured, what was."""
    columns = [(group, column) for group in groups_in(rows) for column in group.columns]
    columns = [(group, column) for group, column in columns if column.heading == "ID"] or columns
    table = Table("method")
    table.columns[0].overflow = "fold"
    for group, column in columns:
        table.add_column(f"{group.heading}: {column.heading}")
    for row in rows:
        cells = [_cell(column.key, row.intervals.get(column.key)) for _, column in columns]
        cells = [f"[yellow]failed:[/] {shown(row.reason)}"] if row.reason else cells
        table.add_row(shown(row.name), *cells, style="dim" if row.control else None)
    return table


def _cell(key: str, interval: Interval | None) -> str:
    return "" if interval is None else shown(f"{number(key, interval.mean)} {span(key, interval)}")
