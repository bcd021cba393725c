"""Export as NumPy archives, some thousand samples to a file, read with ``numpy.load``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrp_fast.store import CHANNELS, RELEVANCE

from .output import owns_folder
from .selection import Format, OptionError, Samples, Selection, check_dtype, encoded

ABOUT = "about.json"


@dataclass(frozen=True)
class Npz(Format):
    """A folder of ``000000.npz``, ``000001.npz``, ... with the settings of the run in ``about.json``.

    Each holds for n samples: ``heatmap`` [n, H, W], ``key`` (text), ``label`` (-1: none) and ``target`` int64,
    ``probability`` and ``leak`` float32 [n], ``channels/LAYER`` float32 [n, C] and ``relevance/LAYER`` [n, C, H, W]; nothing
    in it is pickled. With ``dtype`` float16, relevance is ``heatmap`` times ``scale``, float32 [n], and ``relevance/LAYER``
    times ``relevance_scale/LAYER``. In ``about.json``, ``store`` has two lists of names: ``classes`` of the labels (empty
    where they are but numbers), ``model_classes`` of the targets.

    ``rows_per_file``: samples in a file; ``channels``: the layers, by default all that the store has; ``relevance``: those
    whose whole relevance is written, by default none, for it is large.
    """

    folder = True
    summary = "NumPy archives of some thousand samples each"

    dtype: str = "float32"
    rows_per_file: int = 4096
    channels: Sequence[str] | None = None
    relevance: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.rows_per_file < 1:
            raise OptionError(f"the rows of a file are at least 1, got {self.rows_per_file}")

    def owns(self, place: Path) -> bool:
        return owns_folder(place)

    def write(self, selection: Selection, place: Path) -> Sequence[str]:
        channels, relevance = list(selection.channels(self.channels)), selection.relevance(self.relevance)
        place.mkdir()
        (place / ABOUT).write_text(json.dumps(selection.about(), indent=1), encoding="utf-8")
        for number, low in enumerate(range(0, len(selection), self.rows_per_file)):
            high = min(low + self.rows_per_file, len(selection))
            with zipfile.ZipFile(place / f"{number:06d}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                self._write_file(selection, archive, channels, relevance, low, high)
        return ()

    def _write_file(
        self,
        selection: Selection,
        archive: zipfile.ZipFile,
        channels: Sequence[str],
        relevance: Mapping[str, tuple[int, ...]],
        low: int,
        high: int,
    ) -> None:
        """Maps and whole relevance go out as they come, one after another; the other fields, which are small, in the end."""
        rest: dict[str, list[np.ndarray]] = {}

        def put(fields: Mapping[str, np.ndarray]) -> None:
            for name, values in fields.items():
                rest.setdefault(name, []).append(values)

        for layer, shape in relevance.items():
            name = RELEVANCE + layer
            with _member(archive, name, self.dtype, (high - low, *shape)) as append:
                for values in selection.relevance_slices(layer, low, high):
                    fields = encoded(name, values, self.dtype)
                    append(fields.pop(name))
                    put(fields)
        with _member(archive, "heatmap", self.dtype, (high - low, *selection.shape)) as append:
            for samples in selection.slices(channels, low=low, high=high):
                fields = encoded("heatmap", samples.heatmap, self.dtype)
                append(fields.pop("heatmap"))
                put({**fields, **_small_fields(samples)})
        for name, parts in rest.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(parts), allow_pickle=False)


def _small_fields(samples: Samples) -> dict[str, np.ndarray]:
    channels = {CHANNELS + layer: values for layer, values in samples.channels.items()}
    return {"key": np.array(samples.key, np.str_), **samples.numbers(), **channels}


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]
) -> Iterator[Callable[[np.ndarray], None]]:
    """An array of an archive, which is written by what is yielded, some rows at a time."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)

        def append(values: np.ndarray) -> None:
            member.write(np.ascontiguousarray(values).data)

        yield append
