"""The command line: ``lrp-fast attribute``, ``attribute-dataset``, ``demo``, ``composites``, ``models``.

Exit codes: 0 all good, 1 an error, 2 a mistake in the command, 3 some pictures failed, 130 interrupted (Ctrl-C). What
the commands offer comes from the registries of composites, splits and models.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lrp_fast.composites import Composite, list_composites
from lrp_fast.data import KINDS, Source, SourceError, open_source
from lrp_fast.explain import BACKENDS, DTYPES, LRP
from lrp_fast.heatmap import default_smoothing
from lrp_fast.images import Picture, find_images
from lrp_fast.models import LoadedModel, ModelError, UnknownModelError, list_models, load_model
from lrp_fast.pipeline import FAILURES, Pipeline, PipelineError, PipelineOptions
from lrp_fast.pipeline import Progress as DatasetProgress
from lrp_fast.report import PAGE, Failure, ForeignFileError, Outcome, Run, RunError, RunOptions, percent
from lrp_fast.splits import Splits, as_splits, list_splits
from lrp_fast.store import SettingsError, StoreError
from lrp_fast.version import VERSION

EXIT_ERROR, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130
DEFAULT_COMPOSITE = "otsuki2024"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
PLAIN_SECONDS = 10.0
"""How often progress is told in lines, where there is no terminal to redraw."""

app = typer.Typer(
    name="lrp-fast",
    help="Explain what a residual network sees, by layer-wise relevance propagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class CommandError(Exception):
    """Something that keeps a command from doing its work; exit code 1."""


class UsageError(CommandError):
    """A command that cannot be meant as written; exit code 2."""


def main() -> None:
    """Run the command line; the entry point ``lrp-fast``."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"lrp-fast {VERSION}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Explain what a residual network sees, by layer-wise relevance propagation."""


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """Turn the errors that are foreseen into one line on stderr and an exit code."""
    try:
        yield
    except (UsageError, UnknownModelError, SourceError, SettingsError) as error:
        _stop(str(error), EXIT_USAGE)
    except torch.OutOfMemoryError as error:
        _stop(f"out of memory, try a smaller --batch-size or --size: {error}", EXIT_ERROR)
    except (CommandError, ModelError, RunError, PipelineError, StoreError, ForeignFileError, OSError) as error:
        _stop(str(error), EXIT_ERROR)
    except KeyboardInterrupt:
        _stop("interrupted", EXIT_INTERRUPTED)


def _stop(message: str, code: int) -> NoReturn:
    _say_error(f"[bold red]error:[/] {_shown(' '.join(message.split()))}")
    raise typer.Exit(code)


def _say_error(markup: str) -> None:
    Console(stderr=True).print(markup, highlight=False, soft_wrap=True)


def _shown(text: str) -> str:
    """Text for the terminal: rich's markup in it is inert, and so are control characters in file names."""
    return escape("".join(character if character.isprintable() else repr(character)[1:-1] for character in text))


@app.command()
@_reporting()
def attribute(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Picture files, and folders that are searched for them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for overlays, maps, table and gallery.")],
    model: Annotated[
        str | None, typer.Option(help="A network (see `lrp-fast models`). Default: the weights' own, or embedded.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="A state dict: .safetensors, or what torch.save wrote.", exists=True, dir_okay=False),
    ] = None,
    composite: Annotated[str, typer.Option(help="The rules (see `lrp-fast composites`).")] = DEFAULT_COMPOSITE,
    split: Annotated[
        str | None,
        typer.Option(
            help="How residual additions share relevance, instead of the composite's way: a name, or "
            f"identity=NAME,projection=NAME. Names: {', '.join(list_splits())}."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The class to explain, by number or name. Default: the predicted one.")
    ] = None,
    heat_quantization: Annotated[bool, typer.Option(help="Cut overlays to a few levels; maps stay.")] = True,
    levels: Annotated[int, typer.Option(min=2, help="Levels of the heat quantization.")] = 8,
    smooth: Annotated[
        float | None,
        typer.Option(min=0, help="Blur overlays by this many pixels; 0 shows exact ones. Default: size / 32."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures explained at a time.")] = 8,
    size: Annotated[int | None, typer.Option(min=32, help="Picture size in pixels. Default: the network's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    backend: Annotated[str, typer.Option(help=f"Who computes: {', '.join(BACKENDS)}.")] = "auto",
) -> None:
    """Explain pictures: for each an overlay (.png) and the raw map (.npy), a results.csv and an index.html gallery."""
    _check_choice("--backend: unknown backend", backend, BACKENDS)
    splits = _parse_split(split)
    rules = _find_composite(composite)
    files = _find_files(images, output)
    loaded = load_model(model, weights, size)
    options = RunOptions(
        target=None if target is None else _parse_target(target, loaded.classes),
        levels=levels if heat_quantization else None,
        smoothing=smooth,
        batch_size=batch_size,
        device=_find_device(device),
    )
    explainer = _make_explainer(loaded, rules, splits, backend, options.device)
    settings = _settings(loaded, rules, splits, options)
    outcome = _run_with_progress(Run(explainer, loaded, options), output, files, settings)
    _report(outcome, output)


@app.command("attribute-dataset")
@_reporting()
def attribute_dataset(
    source: Annotated[
        Path, typer.Option(help="A folder of pictures, a manifest (.csv, .parquet), or WebDataset shards.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The store, a folder; continued if it is there.")],
    kind: Annotated[
        str | None, typer.Option(help=f"What the source is: {', '.join(KINDS)}. Default: what it looks like.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A network (see `lrp-fast models`). Default: the weights' own, or embedded.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="A state dict: .safetensors, or what torch.save wrote.", exists=True, dir_okay=False),
    ] = None,
    composite: Annotated[str, typer.Option(help="The rules (see `lrp-fast composites`).")] = DEFAULT_COMPOSITE,
    split: Annotated[str | None, typer.Option(help="How residual additions share relevance, as for attribute.")] = None,
    dtype: Annotated[str, typer.Option(help=f"What is computed in: {', '.join(DTYPE_NAMES)}.")] = "float32",
    levels: Annotated[
        int | None, typer.Option(min=2, max=256, help="Store maps cut to so many levels, which takes less room.")
    ] = None,
    channels: Annotated[
        list[str] | None, typer.Option(help="Also store this layer's relevance by channel; again for more layers.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures explained at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures.")] = 2,
    size: Annotated[int | None, typer.Option(min=32, help="Picture size in pixels. Default: the network's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    backend: Annotated[str, typer.Option(help=f"Who computes: {', '.join(BACKENDS)}.")] = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed pictures again.")] = False,
) -> None:
    """Explain every picture of a data set into a store; the same command continues a run that was stopped."""
    _check_choice("--backend: unknown backend", backend, BACKENDS)
    _check_choice("--dtype: unknown dtype", dtype, DTYPE_NAMES)
    if kind is not None:
        _check_choice("--kind: unknown kind", kind, KINDS)
    splits, rules, place = _parse_split(split), _find_composite(composite), _find_device(device)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    if output.resolve() == source.resolve():
        raise UsageError(f"--output: {output} is also the data set to explain; results need their own")
    samples = open_source(source, kind, exclude=output)
    loaded = load_model(model, weights, size)
    explainer = _make_explainer(loaded, rules, splits, backend, place, DTYPE_NAMES[dtype])
    layers = tuple(name for text in channels or () for name in text.split(","))
    options = PipelineOptions(batch_size, workers, levels, layers, retry_failed)
    _report_dataset(_run_pipeline(_make_pipeline(explainer, loaded, samples, options), len(samples), output), output)


def _check_choice(what: str, text: str, known: Iterable[str]) -> None:
    if text not in known:
        raise UsageError(f"{what} {text!r}; known: {', '.join(known)}")


def _make_pipeline(explainer: LRP, loaded: LoadedModel, source: Source, options: PipelineOptions) -> Pipeline:
    try:
        return Pipeline(explainer, loaded, source, options)
    except ValueError as error:
        raise UsageError(f"--channels: {error}") from error


def _run_pipeline(pipeline: Pipeline, total: int, output: Path) -> DatasetProgress:
    """Run, with one live line on a terminal and plain lines elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}")
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task("explaining", total=total, told="")
        told_at = -PLAIN_SECONDS

        def on_failure(key: str, reason: str) -> None:
            console.print(f"[yellow]failed:[/] {_shown(key)}: {_shown(reason)}", highlight=False, soft_wrap=True)

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
    where = _shown(str(output))
    failures = f", [yellow]{progress.failed} failed[/] (see {FAILURES})" if progress.failed else ""
    took = f"{progress.fresh} in this run; {_rates(progress)}" if progress.fresh else "nothing was left to do"
    line = f"{progress.done} of {progress.total} explained{failures}, {progress.bytes_per_image:,.0f} bytes per image, "
    Console().print(f"{line}in {where}; {took}", highlight=False, soft_wrap=True)
    if progress.interrupted:
        _stop("interrupted; the same command continues", EXIT_INTERRUPTED)
    if progress.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _find_composite(name: str) -> Composite:
    try:
        return Composite.named(name)
    except ValueError as error:
        raise UsageError(f"--composite: {error}") from error


def _parse_split(text: str | None) -> Splits | None:
    """``--split``: one name for all merges, or ``identity=NAME,projection=NAME`` in either order."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return as_splits(text)
        pairs = [part.strip().partition("=") for part in text.split(",")]
        if sorted(kind for kind, _, _ in pairs) != ["identity", "projection"]:
            raise UsageError(f"--split: expected a name or identity=NAME,projection=NAME, got {text!r}")
        names = {kind: name for kind, _, name in pairs}
        return Splits(identity=names["identity"], projection=names["projection"])
    except ValueError as error:
        raise UsageError(f"--split: {error}") from error


def _parse_target(text: str, classes: Sequence[str]) -> int:
    """``--target``: a number, or a class name in any case, of which there must be exactly one."""
    if text.lstrip("-").isdecimal():
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
    if not files:
        raise UsageError(f"no picture files in {', '.join(map(str, images))}")
    return files


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this build of torch has no CUDA
        raise UsageError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _make_explainer(
    loaded: LoadedModel,
    composite: Composite,
    splits: Splits | None,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> LRP:
    try:
        return LRP(loaded.model.to(device), composite=composite, split=splits, backend=backend, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise CommandError(f"{loaded.name}: {error}") from error


def _settings(loaded: LoadedModel, composite: Composite, splits: Splits | None, options: RunOptions) -> dict[str, str]:
    """The header of the gallery: everything that decides what its pictures show, label to text."""
    size = loaded.preprocessing.crop
    smoothing = default_smoothing(size, size) if options.smoothing is None else options.smoothing
    return {
        "model": loaded.name,
        "weights": loaded.source,
        "composite": composite.name,
        "split": str(composite.splits if splits is None else splits),
        "class": "predicted" if options.target is None else loaded.classes[options.target],
        "heat quantization": "off" if options.levels is None else f"{options.levels} levels",
        "overlays smoothed by": f"{smoothing:g} px" if smoothing else "nothing",
        "size": f"{size} px",
        "device": str(options.device),
        "lrp-fast": VERSION,
    }


def _run_with_progress(run: Run, output: Path, files: Sequence[Path], settings: Mapping[str, str]) -> Outcome:
    columns = (
        TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("explaining", total=len(files))

        def on_failure(failure: Failure) -> None:
            line = f"[yellow]failed:[/] {_shown(failure.name)}: {_shown(failure.reason)}"
            progress.console.print(line, highlight=False, soft_wrap=True)

        def on_batch(count: int) -> None:
            progress.advance(task, count)

        return run.into(output, files, settings, on_failure=on_failure, on_batch=on_batch)


def _report(outcome: Outcome, output: Path) -> None:
    """Say what was done and leave with the exit code that tells."""
    explained, failed = len(outcome.cards), len(outcome.failures)
    failures = f", [yellow]{failed} failed[/]" if failed else ""
    page = _shown(str(output / PAGE))
    line = f"{explained} explained{failures}; mean leak {percent(outcome.mean_leak())}; see {page}"
    Console().print(line, highlight=False, soft_wrap=True)
    if outcome.interrupted:
        _stop("interrupted; what was done until then is kept", EXIT_INTERRUPTED)
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
@_reporting()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for overlays, maps, table and gallery.")],
) -> None:
    """Explain the package's own pictures with its own network; no network connection needed."""
    from lrp_fast.embedded import embedded_pictures

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file, expected a folder")
    pictures = embedded_pictures()
    loaded, composite, options = load_model(), Composite.named(DEFAULT_COMPOSITE), RunOptions()
    explainer = _make_explainer(loaded, composite, None, "auto", options.device)
    scores = MaskScores(loaded, {picture.path: (picture.mask_path, picture.label) for picture in pictures})
    settings = _settings(loaded, composite, None, options)
    run = Run(explainer, loaded, options, scores.facts, lambda outcome: {**outcome.summary(), **scores.summary()})
    outcome = _run_with_progress(run, output, [picture.path for picture in pictures], settings)
    _print_table("the embedded network", run.summarize(outcome), "on the embedded pictures")
    _report(outcome, output)


class MaskScores:
    """How much of the positive relevance falls inside the masks of labelled objects, beside their share of the area.

    ``labelled``: a mask file and a class index by picture path.
    """

    def __init__(self, loaded: LoadedModel, labelled: Mapping[Path, tuple[Path, int]]) -> None:
        self._loaded = loaded
        self._labelled = labelled
        self._inside: list[float] = []
        self._area: list[float] = []
        self._right: list[bool] = []

    def facts(self, picture: Picture, heatmap: Tensor, predicted: int) -> list[tuple[str, str]]:
        """Take one picture's map, float32 [H, W], into account, and return its facts."""
        mask_path, label = self._labelled[picture.path]
        with Image.open(mask_path) as image:
            mask = torch.from_numpy(np.asarray(self._loaded.preprocessing.frame(image.convert("L"))) >= 128)
        positive = heatmap.clamp(min=0).double()
        total = float(positive.sum())
        inside = float(positive[mask].sum()) / total if total > 0 else 0.0
        area = float(mask.double().mean())
        self._inside.append(inside)
        self._area.append(area)
        self._right.append(predicted == label)
        verdict = "right" if predicted == label else f"wrong, it is {self._loaded.classes[label]}"
        return [
            ("relevance in the mask", percent(inside)),
            ("area of the mask", percent(area)),
            ("prediction", verdict),
        ]

    def summary(self) -> dict[str, str]:
        """The means over all pictures so far, label to text; empty before the first."""
        if not self._right:
            return {}
        return {
            "accuracy": f"{sum(self._right)} of {len(self._right)}",
            "relevance in the masks": percent(float(np.mean(self._inside))),
            "area of the masks": percent(float(np.mean(self._area))),
        }


@app.command()
def composites() -> None:
    """List the composites: which rules each applies."""
    _print_table("composite", list_composites())


@app.command()
def models() -> None:
    """List the networks that are known by name."""
    _print_table("model", list_models())


def _print_table(heading: str, entries: Mapping[str, str], what: str = "what it is") -> None:
    table = Table(heading, what)
    table.columns[0].no_wrap = True
    for name, description in entries.items():
        table.add_row(escape(name), escape(description))
    Console().print(table)
