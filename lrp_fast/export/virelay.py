"""Export as a ViRelAy project: ``virelay PROJECT.yaml`` shows the run in the browser.

Written as ViRelAy reads it (0.6.1 and 1.0.0; the slow tests start it), where that differs from what its documentation says.
``attribution.h5`` is also what CoRelAy's analyses begin with: the maps, and the channel relevances if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp_fast.data import Source
from lrp_fast.images import ImageError, Preprocessing, decode_image
from lrp_fast.scopes import interrupted_between
from lrp_fast.store import CHANNELS

from .analysis import Analysis
from .numbering import Numbering, number_classes
from .output import owns_folder
from .selection import ExportError, Format, Samples, Selection

PROJECT, LABELS = "PROJECT.yaml", "label_map.json"
ATTRIBUTION, DATASET, ANALYSIS = "attribution.h5", "dataset.h5", "analysis.h5"
GREY = 128
NO_PICTURES = (
    "ViRelAy shows grey in place of the pictures: to show them, give the data set that was explained (--source)"
)
_COMPRESSED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


@dataclass(frozen=True)
class ViRelAy(Format):
    """A folder with ``PROJECT.yaml`` and what it names; N samples of H x W pixels.

    ``attribution.h5``: ``attribution`` float32 [N, 3, H, W], whose sum over the channels is the map: it lies in the first,
    the others are 0 and take no room (of eight colour maps, ViRelAy draws a single channel in one only); ``prediction``
    float32 [N, outputs of the model], of which a store knows one, the ``probability`` of the explained class, the others
    are 0; ``label`` int64 [N], -1 where there is none, which the label map calls "no label"; ``key``, the samples' keys, and
    ``channels/LAYER`` float32 [N, C], which ViRelAy passes over. There is no ``index``: sample i is row i.

    ``dataset.h5``: ``data`` uint8 [N, 3, H, W], the pictures as the network saw them but for the normalisation, and
    ``label``. They are bytes because ViRelAy guesses the range of floating pixels, wrongly for dark pictures. ViRelAy
    opens no project without a data set: without ``source`` all pictures are grey and take no room.

    ``analysis.h5``: see :class:`~lrp_fast.export.analysis.Analysis`; ViRelAy's page shows nothing without one.
    ``label_map.json``: the names of all classes. Labels are numbered as the model's outputs are, here and everywhere in the
    project; see :func:`~lrp_fast.export.numbering.number_classes`. ``channels``: the layers, by default all that the store
    has.
    """

    folder = True
    summary = "a project that ViRelAy opens in the browser; also the input of CoRelAy"

    source: Source | None = None
    channels: Sequence[str] | None = None

    def owns(self, place: Path) -> bool:
        return owns_folder(place)

    def write(self, selection: Selection, place: Path) -> Sequence[str]:
        h5py, yaml = _libraries()
        channels, numbering = selection.channels(self.channels), number_classes(selection)
        pictures = _Pictures(selection, self.source) if self.source is not None else None
        analysis = Analysis(selection, numbering)
        place.mkdir()
        with (
            interrupted_between() as pause,
            h5py.File(place / ATTRIBUTION, "w") as attributions,
            h5py.File(place / DATASET, "w") as dataset,
        ):
            _create_attributions(h5py, attributions, selection, channels, numbering)
            _create_dataset(dataset, selection, numbering)
            for samples in selection.slices(channels):
                _write_attributions(attributions, samples)
                analysis.add(samples)
                pause()
                for row, picture in enumerate(pictures.read(samples) if pictures is not None else (), samples.first):
                    dataset["data"][row] = picture
                    pause()
            pause()
        with h5py.File(place / ANALYSIS, "w") as file:
            analysis.write(file)
        (place / LABELS).write_text(json.dumps(_label_map(numbering), indent=1), encoding="utf-8")
        project = _project(selection, pictured=pictures is not None)
        (place / PROJECT).write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
        return _remarks(numbering, pictured=pictures is not None)


class _Pictures:
    """The pictures that were explained, as the network saw them, read again from their data set."""

    def __init__(self, selection: Selection, source: Source) -> None:
        described = selection.store.attributes.get("source", {})
        if source.fingerprint() != described.get("fingerprint"):
            raise ExportError(
                f"this is not the data set of {selection.store.path}: its keys, labels or classes are others; expected "
                f"one of kind {described.get('kind', 'unknown')!r} with {len(selection.store)} samples, got one of kind "
                f"{source.kind!r} with {len(source)}"
            )
        settings = selection.store.attributes["preprocessing"]
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        self._source, self._preprocessing = source, Preprocessing(**{**settings, "mean": mean, "std": std})

    def read(self, samples: Samples) -> Iterator[npt.NDArray[np.uint8]]:
        """Each sample's picture, uint8 [3, H, W]."""
        with ThreadPoolExecutor() as threads:
            yield from threads.map(self._read, samples.places.tolist(), samples.key)

    def _read(self, place: int, key: str) -> npt.NDArray[np.uint8]:
        try:
            image = self._preprocessing.frame(decode_image(self._source.read(place)))
        except ImageError as error:
            raise ExportError(f"{key} was explained, but cannot be read now: {error}") from error
        return np.asarray(image, np.uint8).transpose(2, 0, 1)


def _create_attributions(
    h5py: Any, file: Any, selection: Selection, channels: Mapping[str, int], numbering: Numbering
) -> None:
    count, (height, width), outputs = len(selection), selection.shape, numbering.outputs
    rows = min(count, 256)
    shape = 3, height, width
    file.create_dataset("attribution", (count, *shape), np.float32, chunks=(1, 1, height, width), **_COMPRESSED)
    file.create_dataset("prediction", (count, outputs), np.float32, chunks=(rows, outputs), **_COMPRESSED)
    file.create_dataset("label", data=numbering.label)
    file.create_dataset("key", (count,), h5py.string_dtype())
    for layer, each in channels.items():
        file.create_dataset(CHANNELS + layer, (count, each), np.float32, chunks=(rows, each), **_COMPRESSED)


def _write_attributions(file: Any, samples: Samples) -> None:
    rows = slice(samples.first, samples.first + len(samples.key))
    file["attribution"][rows, 0] = samples.heatmap
    predictions = np.zeros((len(samples.key), file["prediction"].shape[1]), np.float32)
    predictions[np.arange(len(samples.key)), samples.target] = samples.probability
    file["prediction"][rows] = predictions
    file["key"][rows] = [key.replace("\0", "\\x00") for key in samples.key]  # HDF5's texts end at a zero
    for layer, values in samples.channels.items():
        file[CHANNELS + layer][rows] = values


def _create_dataset(file: Any, selection: Selection, numbering: Numbering) -> None:
    shape = (3, *selection.shape)
    file.create_dataset("data", (len(selection), *shape), np.uint8, chunks=(1, *shape), fillvalue=GREY, **_COMPRESSED)
    file.create_dataset("label", data=numbering.label)


def _label_map(numbering: Numbering) -> list[dict[str, Any]]:
    entries = [
        {"index": number, "word_net_id": identifier, "name": numbering.names[number]}
        for number, identifier in numbering.identifiers().items()
    ]
    if (numbering.label < 0).any():
        entries.append({"index": -1, "word_net_id": "", "name": "no label"})
    return entries


def _project(selection: Selection, pictured: bool) -> dict[str, Any]:
    (height, width), attributes = selection.shape, selection.store.attributes
    dataset = {
        "name": "the explained pictures" if pictured else "no pictures given",
        "type": "hdf5",
        "path": DATASET,
        "input_width": width,
        "input_height": height,
        "up_sampling_method": "none",
        "down_sampling_method": "none",
    }
    attributions = {
        "attribution_method": str(attributes.get("composite", "LRP")),
        "attribution_strategy": "predicted_label",
        "sources": [ATTRIBUTION],
    }
    project = {
        "name": selection.store.path.name,
        "model": str(attributes.get("model", "unknown")),
        "label_map": LABELS,
        "dataset": dataset,
        "attributions": attributions,
        "analyses": [{"analysis_method": Analysis.method, "sources": [ANALYSIS]}],
    }
    return {"project": project}


def _remarks(numbering: Numbering, pictured: bool) -> list[str]:
    label, unmatched = numbering.label, numbering.unmatched
    unlabelled = int((label < 0).sum())
    remarks = [] if pictured else [NO_PICTURES]
    if unmatched:
        others = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
        remarks.append(
            f"the data set's class {unmatched[0]!r}{others} is not the name of exactly one class of the model, so the data "
            f"set's classes stand after the model's: class 0 as {numbering.outputs}"
        )
    if unlabelled:
        remarks.append(f"{unlabelled} of {len(label)} samples have no label; ViRelAy shows them as 'no label'")
    return remarks


def _libraries() -> tuple[Any, Any]:
    try:
        import h5py
        import yaml
    except ImportError as error:
        missing = f"the virelay format needs {error.name}, which is not installed"
        raise ExportError(f"{missing}: pip install 'lrp-fast[export]'") from error
    return h5py, yaml
