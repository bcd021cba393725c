"""A folder of results: what its files are called, what may be replaced in it, and its table ``results.csv``.

A folder remembers in ``.lrp-fast-files`` which of its files are ours. Those are removed once a later run has something to
put in their place, unless they were changed since; a file that somebody else put there never is.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

import numpy as np
from PIL import Image
from torch import Tensor

from lrp_fast.images import MANIFEST, manifest_line, mark, written_into

TABLE = "results.csv"
PAGE = "index.html"
SUFFIXES = (".png", ".npy", ".jpg")
"""Of a picture's files: the overlay, the map and the picture as it was explained."""
_OF_A_PICTURE = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]*({'|'.join(map(re.escape, SUFFIXES))})")
COLUMNS = ("file", "class", "class_index", "probability", "leak", "status", "reason", "overlay", "map")
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")
_LONGEST_STEM = 100


class ForeignFileError(Exception):
    """Writing would replace files that are not ours; the message names them."""


@dataclass(frozen=True)
class Row:
    """One line of ``results.csv``: an explained picture, or (``reason`` set) one that failed.

    ``class_index``, ``probability`` and ``leak`` are numbers, ``None`` for a failure; ``overlay`` and ``map`` are file
    names in the folder, empty for a failure.
    """

    file: str
    class_name: str = ""
    class_index: int | None = None
    probability: float | None = None
    leak: float | None = None
    reason: str = ""
    overlay: str = ""
    map: str = ""

    def cells(self) -> list[str]:
        """The cells under ``COLUMNS``: text made safe, numbers as they are."""
        status = "failed" if self.reason else "ok"
        numbers = [_number(self.class_index), _number(self.probability), _number(self.leak)]
        file, name, reason = (safe_cell(text) for text in (self.file, self.class_name, self.reason))
        return [file, name, *numbers, status, reason, self.overlay, self.map]


def _number(value: float | None) -> str:
    return "" if value is None else repr(value) if isinstance(value, int) else f"{value:.6g}"


def safe_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: one that begins like a formula gets an apostrophe in front."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def printable(path: Path | str) -> str:
    """A path as text that can be written as UTF-8, bytes that are not shown as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def output_names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for each input path: its stem made safe, numbered where two would collide.

    Only ASCII letters, digits, ``.``, ``_`` and ``-``, beginning with neither ``.`` nor ``-``, at most 100 characters
    and the number; names that differ only in case count as colliding, since some file systems do not tell them apart.
    """
    taken: set[str] = set()
    names = []
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem).lstrip(".-")[:_LONGEST_STEM] or "image"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def brief_names(names: Sequence[str]) -> dict[str, str]:
    """For each path its name from the innermost folder that holds all of them; as it is where there is none."""
    folders = {os.path.dirname(name) for name in names}
    # Absolute and relative paths together have no common folder.
    if len({os.path.isabs(folder) for folder in folders}) != 1:
        return {name: name for name in names}
    common = os.path.commonpath(folders)
    return {name: os.path.relpath(name, common) if common else name for name in names}


class OutputFolder:
    """A folder that results are written into, made if missing; used as ``with OutputFolder(path, planned) as folder``.

    ``planned``: the names of every file that may be written. Entering raises :class:`ForeignFileError` if one of them
    exists and is not ours, ``OSError`` if the folder cannot be made or written. What an earlier run has written is removed,
    all of it, when the first file is written (``begun``). From then on every row reaches the disk as it comes, so an
    interrupted run leaves all it had done; rows of failures before it are written with it, or by :meth:`finish`.
    """

    def __init__(self, path: Path, planned: Iterable[str]) -> None:
        self.path = path
        self._planned = dict.fromkeys([*planned, TABLE, PAGE])
        self._opened = ExitStack()
        self._table: TextIO | None = None
        self._failed: list[Row] = []
        self.begun = False

    def __enter__(self) -> OutputFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._ours = written_into(self.path)
        foreign = [name for name in self._planned if name not in self._ours and os.path.lexists(self.path / name)]
        if foreign:
            listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise ForeignFileError(f"{self.path} holds files that lrp-fast did not write: {listed}")
        self._list_ours()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def add_row(self, row: Row) -> None:
        """Append a row to ``results.csv``."""
        if self.begun or not row.reason:
            self._append(self._begin(), row.cells())
        else:
            self._failed.append(row)

    def finish(self, page: Callable[[], bytes]) -> None:
        """Write the page, unless nothing else was written and an earlier run's results are there: those stay."""
        if self.begun or not any(os.path.lexists(self.path / name) for name in self._ours):
            self.write(PAGE, page())

    def write(self, name: str, content: bytes) -> str:
        """Write a planned file, whole or not at all, and return its name; ``ValueError`` for an unplanned name."""
        if name not in self._planned:
            raise ValueError(f"{name!r} is not among the files planned for {self.path}")
        self._begin()
        self._own(name)
        write_whole(self.path / name, content, sync=False)
        self._own(name, mark(self.path / name))
        return name

    def _own(self, name: str, known: str = "") -> None:
        """List a file before it is there, so that a run that is killed leaves none that is not listed; and as it is then."""
        self._ours[name] = known
        self._manifest.write(manifest_line(name, known))
        self._manifest.flush()

    def _begin(self) -> TextIO:
        """Before the first file or row: remove what earlier runs have written, and begin the table."""
        if self._table is not None:
            return self._table
        self.begun = True
        for name, known in self._ours.items():
            if self._is_left_by_a_run(name, known):
                (self.path / name).unlink(missing_ok=True)
        self._ours = {name: known for name, known in self._ours.items() if os.path.lexists(self.path / name)}
        self._list_ours()
        self._manifest = self._open(MANIFEST, "a")
        self._own(TABLE)
        self._table = self._open(TABLE, "x")
        self._append(self._table, COLUMNS)
        for row in self._failed:
            self._append(self._table, row.cells())
        return self._table

    def _is_left_by_a_run(self, name: str, known: str) -> bool:
        """Whether a listed file is there as it was written; the table and the page are, whatever is in them."""
        file, always = self.path / name, name in (TABLE, PAGE)
        # The list may have been tampered with: only what a run would write, which is never a path or a folder.
        if not (always or (known and _OF_A_PICTURE.fullmatch(name))):
            return False
        return (file.is_symlink() or file.is_file()) and (always or mark(file) == known)

    @staticmethod
    def _append(table: TextIO, cells: Sequence[object]) -> None:
        csv.writer(table).writerow(cells)
        table.flush()

    def _open(self, name: str, mode: Literal["a", "x"]) -> TextIO:
        opened = open(self.path / name, mode, newline="", encoding="utf-8")  # noqa: SIM115 - closed on leaving
        return self._opened.enter_context(opened)

    def _list_ours(self) -> None:
        lines = [manifest_line(name, known) for name, known in sorted(self._ours.items())]
        write_whole(self.path / MANIFEST, "".join(lines).encode(), sync=False)


def write_whole(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file beside its place and rename it, so that it is never found half-written; ``sync``: not after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)


def encode_image(image: Image.Image, kind: str, quality: int = 92) -> bytes:
    """A picture as the bytes of a file of that format; ``quality`` counts where the format has one."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def encode_map(heatmap: Tensor) -> bytes:
    """A map as the bytes of an ``.npy`` file of its own shape and dtype."""
    buffer = io.BytesIO()
    np.save(buffer, heatmap.numpy(), allow_pickle=False)
    return buffer.getvalue()
