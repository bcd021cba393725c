"""``lrp-fast export``: a store in, a form that other tools open out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrp_fast.data import Source
from lrp_fast.export import FORMATS, Exported, ExportError, OptionError, export_store
from lrp_fast.export.selection import DTYPES
from lrp_fast.store import Store, open_store

from .common import (
    CommandError,
    KindOption,
    SourceSplitOption,
    UsageError,
    app,
    check_choice,
    find_source,
    layer_names,
    reporting,
    shown,
)
from .progress import PlainLines


@app.command()
@reporting()
def export(
    store: Annotated[Path, typer.Argument(help="What `attribute-dataset` wrote.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; for parquet a file.")],
    format: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {each.summary}" for name, each in FORMATS.items()) + ".")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    channels: Annotated[
        list[str] | None, typer.Option(help="Channel relevances of this layer; again for more. Default: all stored.")
    ] = None,
    relevance: Annotated[
        list[str] | None, typer.Option(help="Whole relevance of this layer, in npz and parquet; again for more.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of relevance in npz and parquet: {', '.join(DTYPES)}.")] = None,
    rows_per_file: Annotated[int | None, typer.Option(min=1, help="Samples in one file of npz. Default: 4096.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The data set that was explained, whose pictures virelay is to show.")
    ] = None,
    kind: KindOption = None,
    source_split: SourceSplitOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever is at the output.")] = False,
) -> None:
    """Write a store's maps and numbers in a form that other tools open; samples that failed are left out."""
    check_choice("--format: unknown format", format, FORMATS)
    opened = open_store(store)
    options = {
        "channels": layer_names(channels) or None,
        "relevance": layer_names(relevance) or None,
        "dtype": dtype,
        "rows_per_file": rows_per_file,
        "source": _open_pictures(opened, source, kind, source_split, output),
    }
    given = {name: value for name, value in options.items() if value is not None}
    _report(_export(opened, format, output, limit=limit, overwrite=overwrite, **given), format)


def _open_pictures(
    store: Store, source: str | None, kind: str | None, split: str | None, output: Path
) -> Source | None:
    if source is None:
        if kind is not None or split is not None:
            raise UsageError("--kind and --source-split say how to read a source: give --source too")
        return None
    if Path(source).resolve().is_relative_to(output.resolve()):
        raise UsageError(f"--output: {output} is or holds the data set {source}; what is exported needs its own place")
    return find_source(source, kind, split, exclude=store.path)


def _export(store: Store, format: str, output: Path, **options: Any) -> Exported:
    try:
        with _progress() as told:
            return export_store(store, format, output, on_progress=told, **options)
    except ExportError as error:
        raise CommandError(str(error)) from error
    except OptionError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Hears how many samples of how many are written: one live line on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn("exporting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, lines = bar.add_task("exporting", total=None), PlainLines(console)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            lines.tell(f"{done}/{total} written")

        yield told


def _report(exported: Exported, format: str) -> None:
    console = Console()
    where = shown(str(exported.output))
    left_out = f", {exported.left_out} left out that failed or are not computed yet" if exported.left_out else ""
    console.print(f"{exported.samples} samples as {format} in {where}{left_out}", highlight=False, soft_wrap=True)
    for remark in exported.remarks:
        console.print(f"[yellow]note:[/] {shown(remark)}", highlight=False, soft_wrap=True)
