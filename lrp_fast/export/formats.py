"""The formats there are, and the export of a store in one of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrp_fast.store import Store, open_store

from .npz import Npz
from .output import replacing
from .parquet import Parquet
from .png import Png
from .selection import ExportError, Format, OptionError, Selection
from .virelay import ViRelAy

FORMATS: dict[str, type[Format]] = {"virelay": ViRelAy, "npz": Npz, "png": Png, "parquet": Parquet}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: ``samples`` of them to ``output``; ``left_out``: how many failed or were not computed yet."""

    output: Path
    samples: int
    left_out: int
    remarks: tuple[str, ...] = ()


def options_of(format: str) -> list[str]:
    """The names of a format's options; :class:`OptionError` for a format that is not known."""
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    return [field.name for field in dataclasses.fields(FORMATS[format])]  # type: ignore[arg-type]


def export_store(
    store: Store | str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str],
    *,
    limit: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Exported:
    """Write the samples of a store that are done to ``output`` in the form that another tool opens.

    ``format``: a name in ``FORMATS``; ``options`` are its fields (``Npz.dtype``, ``ViRelAy.source``, ...). ``limit``: only
    the first so many samples; ``overwrite``: replace whatever is at ``output``, not only what an export wrote there;
    ``on_progress`` hears how many samples of how many are written. The store is read slice by slice. What is written stands
    at ``output`` only when it is whole: whatever ends the export early, the place is as it was before.

    Raises :class:`ExportError` if it cannot be made, :class:`OptionError` for an unknown format or an option that does not fit,
    :class:`~lrp_fast.store.StoreError` if the store cannot be opened, ``OSError`` if the output cannot be written.
    """
    known = options_of(format)
    unknown = [name for name in options if name not in known]
    if unknown:
        there = ", ".join(known) or "none"
        raise OptionError(f"the format {format} has no option {', '.join(unknown)}; it has: {there}")
    if limit is not None and limit < 1:
        raise OptionError(f"the limit is a number of samples, at least 1, got {limit}")
    opened = store if isinstance(store, Store) else open_store(store)
    writer, place = FORMATS[format](**options), Path(output)
    _check_apart(opened.path.resolve(), place.resolve())
    selection = Selection(opened, limit, on_progress)
    with replacing(place, writer.folder, writer.owns, overwrite) as made:
        remarks = writer.write(selection, made)
    return Exported(place, len(selection), selection.left_out, tuple(remarks))


def _check_apart(store: Path, output: Path) -> None:
    if output.is_relative_to(store) or store.is_relative_to(output):
        raise ExportError(f"{output} and the store {store} must not lie in each other; choose another place")
