"""A table of pictures: CSV or Parquet with the columns path, label (optional) and id (optional)."""

from __future__ import annotations

import csv
from pathlib import Path

from .source import FileSource, SourceError, number_labels

Columns = dict[str, list[str | None]]
COLUMNS = ("path", "label", "id")


def manifest_source(path: Path) -> FileSource:
    """The pictures a table names, in its order.

    A relative path starts at the table's folder. The key is the id, by default the path as it is written. Labels are
    numbers, or class names, which are then numbered in sorted order; an empty one is none.
    """
    columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    files = columns["path"]
    empty = next((row for row, file in enumerate(files) if not file), None)
    if empty is not None:
        raise SourceError(f"{path}: row {empty + 1} names no path")
    written = [file or "" for file in files]
    keys = [key or file for key, file in zip(columns["id"], written, strict=True)]
    labels, classes = number_labels(columns["label"])
    return FileSource("manifest", [path.parent / file for file in written], keys, labels, classes)


def _read_csv(path: Path) -> Columns:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            _check_columns(path, list(table.fieldnames or ()))
            rows = list(table)
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a CSV table in UTF-8: {error}") from error
    return {name: [row.get(name) for row in rows] for name in COLUMNS}


def _read_parquet(path: Path) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError(f"{path} needs pyarrow, which is not installed: pip install 'lrp-fast[dataset]'") from error
    try:
        names = pyarrow.parquet.read_schema(path).names
        _check_columns(path, names)
        table = pyarrow.parquet.read_table(path, columns=[name for name in COLUMNS if name in names])
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path} is not a readable Parquet table: {error}") from error
    found = table.to_pydict()
    texts = {name: [_text(value) for value in found[name]] for name in found}
    return {name: texts.get(name, [None] * table.num_rows) for name in COLUMNS}


def _text(value: object) -> str | None:
    """A cell as a CSV would hold it. Whole numbers with a gap among them are floating ones to pandas."""
    if value is None or value != value:  # NaN
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _check_columns(path: Path, names: list[str]) -> None:
    if "path" not in names:
        raise SourceError(f"{path} has no column `path`; it has: {', '.join(names) or 'none'}")
