"""What the commands share: the program, its errors and exit codes, and the options that several of them read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrp_fast.composites import Composite
from lrp_fast.data import KINDS, Source, SourceError, open_source
from lrp_fast.data.embedded import PREFIX as EMBEDDED_SOURCE
from lrp_fast.explain import BACKENDS, DTYPES, LRP
from lrp_fast.images import INTERPOLATIONS
from lrp_fast.memory import is_out_of_memory
from lrp_fast.models import LoadedModel, ModelError, UnknownModelError
from lrp_fast.pipeline import PipelineError
from lrp_fast.plan import TraceError
from lrp_fast.report import ForeignFileError, RunError
from lrp_fast.splits import Splits, as_splits, list_splits
from lrp_fast.store import SettingsError, StoreError
from lrp_fast.version import VERSION

EXIT_ERROR, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130
DEFAULT_COMPOSITE = "otsuki2024"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

ModelOption = Annotated[
    str | None, typer.Option(help="A network (see `lrp-fast models`). Default: the weights' own, or embedded.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="A state dict: .safetensors, or what torch.save wrote.", exists=True, dir_okay=False),
]
SourceOption = Annotated[
    str,
    typer.Option(
        help="A folder of pictures (also as ImageNet, CUB-200-2011 or CIFAR-10 lay them out), a manifest (.csv, .parquet), "
        "WebDataset shards, or embedded:COUNT[:SEED], pictures that are drawn."
    ),
]
KindOption = Annotated[
    str | None, typer.Option(help=f"What the source is: {', '.join(KINDS)}. Default: what it looks like.")
]
SourceSplitOption = Annotated[
    str | None,
    typer.Option(help="Which part of the data set, such as val, test or train, where its kind has several."),
]
CompositeOption = Annotated[str, typer.Option(help="The rules (see `lrp-fast composites`).")]
SplitOption = Annotated[
    str | None,
    typer.Option(
        help="How residual additions share relevance, instead of the composite's way: a name, or "
        f"identity=NAME,projection=NAME. Names: {', '.join(list_splits())}."
    ),
]
SizeOption = Annotated[int | None, typer.Option(min=32, help="Picture size in pixels. Default: the network's.")]
ResizeOption = Annotated[
    int | None, typer.Option(min=1, help="Pixels of the shorter side before the crop. Default: the network's.")
]
MeanOption = Annotated[
    str | None, typer.Option(help="What is subtracted from red, green and blue in [0, 1], such as 0.5,0.5,0.5.")
]
StdOption = Annotated[str | None, typer.Option(help="What red, green and blue are then divided by.")]
InterpolationOption = Annotated[
    str | None, typer.Option(help=f"How pictures are resized: {', '.join(INTERPOLATIONS)}. Default: the network's way.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BackendOption = Annotated[str, typer.Option(help=f"Who computes: {', '.join(BACKENDS)}.")]
DtypeOption = Annotated[
    str | None, typer.Option(help=f"What is computed in: {', '.join(DTYPE_NAMES)}. Default: float32, the reference float64.")
]

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
def reporting() -> Iterator[None]:
    """Turn the errors that are foreseen into one line on stderr and an exit code."""
    try:
        yield
    except (UsageError, UnknownModelError, SourceError, SettingsError) as error:
        stop(str(error), EXIT_USAGE)
    except (
        CommandError, ModelError, TraceError, RunError, PipelineError, StoreError, ForeignFileError, OSError,
    ) as error:  # fmt: skip
        stop(str(error), EXIT_ERROR)
    except KeyboardInterrupt:
        stop("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        stop(f"out of memory, try a smaller --batch-size or --size: {error}", EXIT_ERROR)


def stop(message: str, code: int) -> NoReturn:
    _say_error(f"[bold red]error:[/] {shown(' '.join(message.split()))}")
    raise typer.Exit(code)


def _say_error(markup: str) -> None:
    Console(stderr=True).print(markup, highlight=False, soft_wrap=True)


def shown(text: str) -> str:
    """Text for the terminal: rich's markup in it is inert, and so are control characters in file names."""
    return escape("".join(character if character.isprintable() else repr(character)[1:-1] for character in text))


def check_choice(what: str, text: str, known: Iterable[str]) -> None:
    if text not in known:
        raise UsageError(f"{what} {text!r}; known: {', '.join(known)}")


def find_source(
    text: str, kind: str | None, source_split: str | None, exclude: Path | None = None, masks: Path | None = None
) -> Source:
    """``--source``, ``--kind``, ``--source-split`` (and ``--masks``)."""
    if kind is not None:
        check_choice("--kind: unknown kind", kind, KINDS)
    if not text.startswith(EMBEDDED_SOURCE) and not Path(text).exists():
        raise UsageError(f"--source: there is no {text}")
    return open_source(text, kind, exclude, source_split, masks)


def find_composite(name: str) -> Composite:
    try:
        return Composite.named(name)
    except ValueError as error:
        raise UsageError(f"--composite: {error}") from error


def check_rules(composite: str, split: str | None) -> None:
    """Refuse a mistake in ``--composite`` or ``--split`` before a network is loaded."""
    find_composite(composite)
    parse_split(split)


def composite_for(loaded: LoadedModel, name: str, split: str | None) -> Composite:
    """``--composite`` and ``--split``, for pictures as the network gets them."""
    splits = parse_split(split)
    composite = Composite.for_range(find_composite(name).name, *loaded.preprocessing.bounds())
    return composite if splits is None else composite.with_split(splits)


def layer_names(texts: Sequence[str] | None) -> tuple[str, ...]:
    """Layers of an option that is given once or more, each time one name or several with commas."""
    return tuple(dict.fromkeys(name for text in texts or () for name in text.split(",")))


def parse_split(text: str | None) -> Splits | None:
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


def override_preprocessing(
    loaded: LoadedModel, resize: int | None, mean: str | None, std: str | None, interpolation: str | None
) -> LoadedModel:
    """The network with ``--resize``, ``--mean``, ``--std`` and ``--interpolation`` instead of its own, where given."""
    means, stds = (_parse_channels(option, text) for option, text in (("--mean", mean), ("--std", std)))
    try:
        changed = loaded.preprocessing.override(resize=resize, mean=means, std=stds, interpolation=interpolation)
    except ValueError as error:
        raise UsageError(f"preprocessing: {error}") from error
    return replace(loaded, preprocessing=changed)


def _parse_channels(option: str, text: str | None) -> tuple[float, ...] | None:
    """One number for each channel, separated by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: expected three numbers such as 0.5,0.5,0.5, got {text!r}") from error


def find_device(name: str, option: str = "--device") -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device cannot answer
    except (RuntimeError, AssertionError) as error:  # AssertionError: this build of torch has no CUDA
        raise UsageError(f"{option}: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def make_explainer(loaded: LoadedModel, composite: Composite, backend: str, device: torch.device) -> LRP:
    """The explainer of a network; one that cannot be explained is an error that names it."""
    try:
        return LRP(loaded.model.to(device), composite=composite, backend=backend)
    except (ValueError, TypeError) as error:
        raise CommandError(f"{loaded.name}: {error}") from error


def print_table(heading: str, entries: Mapping[str, str], what: str = "what it is") -> None:
    table = Table(heading, what)
    table.columns[0].no_wrap = True
    for name, description in entries.items():
        table.add_row(escape(name), escape(description))
    Console().print(table)
