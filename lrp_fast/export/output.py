"""Where an export goes: it is made under another name beside its own, and takes that when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lrp_fast.images import LISTING

from .selection import ExportError


@contextlib.contextmanager
def replacing(output: Path, folder: bool, owns: Callable[[Path], bool], overwrite: bool) -> Iterator[Path]:
    """A path to write to, which becomes ``output`` when the block ends well; otherwise nothing of it stays.

    ``folder``: what is written is a folder; ``owns``: whether what is at ``output`` may be replaced unasked, ``overwrite``:
    anything may. Raises :class:`ExportError` if something else is there or another export is on its way there, ``OSError``
    if it cannot be written.
    """
    output = output.resolve()
    _check_free(output, folder, owns, overwrite)
    with _workshop(output) as workshop:
        made = workshop / "made"
        yield made
        if folder:
            _list_files(made)
            _swap(made, output, workshop / "replaced")
        else:
            os.replace(made, output)


def owns_folder(folder: Path) -> bool:
    """Whether every file in a folder was written by an export, by the list that was written with them."""
    try:
        listed = (folder / LISTING).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return {*listed, LISTING} >= set(_files(folder))


def _check_free(output: Path, folder: bool, owns: Callable[[Path], bool], overwrite: bool) -> None:
    if not output.exists():
        return
    if output.is_dir() != folder:
        there, wanted = ("a folder", "a file") if output.is_dir() else ("a file", "a folder")
        raise ExportError(f"{output} is {there}, and what is exported is {wanted}")
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and not owns(output) and not overwrite:
        raise ExportError(f"{output} holds what no export wrote; choose another place, or ask for it to be overwritten")
    for kept, what in ((Path.cwd(), "the current folder"), (Path.home(), "the home folder")):
        if kept.resolve().is_relative_to(output):
            raise ExportError(f"{output} is or holds {what} and is not replaced; choose another place")


@contextlib.contextmanager
def _workshop(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for this process alone, emptied of what a killed one left there, gone in the end."""
    import fcntl

    folder = output.with_name(f".{output.name}.lrp-fast-partial")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"another export is being written to {output}") from error
        try:
            for left_over in folder.iterdir():
                if left_over.name != ".lock":
                    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield folder
        finally:
            shutil.rmtree(folder)


def _swap(made: Path, output: Path, replaced: Path) -> None:
    """Put a folder in the place of another; the old one comes back if that fails."""
    if not output.exists():
        os.rename(made, output)
        return
    os.rename(output, replaced)
    try:
        os.rename(made, output)
    except BaseException:
        os.rename(replaced, output)
        raise


def _list_files(folder: Path) -> None:
    (folder / LISTING).write_text("".join(f"{name}\n" for name in _files(folder)), encoding="utf-8")


def _files(folder: Path) -> list[str]:
    """All that is in a folder but folders, by its path from there."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
