"""Export as one Parquet table, a row for each sample, read with pyarrow, pandas, polars, DuckDB, Spark, ..."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lrp_fast.store import CHANNELS, RELEVANCE

from .selection import ExportError, Format, Samples, Selection, check_dtype, encoded, scale_name

ABOUT = b"lrp_fast"
"""The name under which the schema's metadata hold what :meth:`Selection.about` tells, as JSON."""


@dataclass(frozen=True)
class Parquet(Format):
    """One file with the columns ``key``, ``label`` (-1: none), ``target``, ``probability``, ``leak`` and ``heatmap``.

    ``heatmap`` is a list of the H·W values row by row, in ``dtype``; its field has the metadata ``shape``, ``[H, W]`` as
    JSON. With float16, relevance is ``heatmap`` times the column ``scale``. ``channels``: layers whose relevances are
    columns ``channels/LAYER`` too, lists of float32, by default all that the store has. ``relevance``: layers whose whole
    relevance is columns ``relevance/LAYER``, written as maps are (``shape`` [C, H, W], ``relevance_scale/LAYER``), by default
    none, for it is large. The metadata ``lrp_fast`` of the schema hold the settings of the run as JSON; there, ``store`` has
    two lists of names: ``classes`` of the labels (empty where they are but numbers), ``model_classes`` of the targets.
    """

    folder = False
    summary = "one table, a row for each sample"

    dtype: str = "float32"
    channels: Sequence[str] | None = None
    relevance: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def owns(self, place: Path) -> bool:
        pyarrow, parquet = _pyarrow()
        try:
            return ABOUT in (parquet.read_schema(place).metadata or {})
        except (pyarrow.ArrowException, OSError):
            return False

    def write(self, selection: Selection, place: Path) -> Sequence[str]:
        pyarrow, parquet = _pyarrow()
        channels, relevance = selection.channels(self.channels), selection.relevance(self.relevance)
        schema = self._schema(pyarrow, selection, channels, relevance)
        # A dictionary of values helps where they repeat: neither keys nor relevances do.
        with parquet.ParquetWriter(place, schema, compression="zstd", use_dictionary=["label", "target"]) as writer:
            for samples in selection.slices(channels, relevance):
                columns = self._columns(samples)
                arrays = [_array(pyarrow, columns[field.name], field.type) for field in schema]
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=len(samples.key))
        return ()

    def _schema(
        self,
        pyarrow: Any,
        selection: Selection,
        channels: Mapping[str, int],
        relevance: Mapping[str, tuple[int, ...]],
    ) -> Any:
        fields = [
            pyarrow.field("key", pyarrow.string(), nullable=False),
            pyarrow.field("label", pyarrow.int64(), nullable=False),
            pyarrow.field("target", pyarrow.int64(), nullable=False),
            pyarrow.field("probability", pyarrow.float32(), nullable=False),
            pyarrow.field("leak", pyarrow.float32(), nullable=False),
            *self._encoded_fields(pyarrow, "heatmap", selection.shape),
        ]
        for layer, count in channels.items():
            fields.append(pyarrow.field(CHANNELS + layer, pyarrow.list_(pyarrow.float32(), count), nullable=False))
        for layer, shape in relevance.items():
            fields += self._encoded_fields(pyarrow, RELEVANCE + layer, shape)
        return pyarrow.schema(fields, metadata={ABOUT: json.dumps(selection.about())})

    def _encoded_fields(self, pyarrow: Any, name: str, shape: tuple[int, ...]) -> list[Any]:
        """What :func:`encoded` makes of relevance [n, *shape]."""
        kind = pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(self.dtype)), prod(shape))
        fields = [pyarrow.field(name, kind, nullable=False, metadata={"shape": json.dumps(shape)})]
        if self.dtype == "float16":
            fields.append(pyarrow.field(scale_name(name), pyarrow.float32(), nullable=False))
        return fields

    def _columns(self, samples: Samples) -> dict[str, Any]:
        columns = {"key": samples.key, **samples.numbers(), **encoded("heatmap", samples.heatmap, self.dtype)}
        columns |= {CHANNELS + layer: values for layer, values in samples.channels.items()}
        for layer, values in samples.relevance.items():
            columns |= encoded(RELEVANCE + layer, values, self.dtype)
        return columns


def _array(pyarrow: Any, values: Any, kind: Any) -> Any:
    """An Arrow array of a column; of several values for each row, lists."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), type=kind)
    return pyarrow.array(values, kind)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ExportError("parquet needs pyarrow, which is not installed: pip install 'lrp-fast[export]'") from error
    return pyarrow, pyarrow.parquet
