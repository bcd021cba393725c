"""The folder of an evaluation."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lrp_fast.evaluation.options import EvaluationError
from lrp_fast.metrics import RandomizationCurve
from lrp_fast.report.folder import ForeignFileError, write_whole
from lrp_fast.report.scores import MethodScores, file_name
from lrp_fast.store import check_settings, differences

FORMAT, FORMAT_VERSION = "lrp-fast evaluation", 1
SETTINGS = "settings.json"
RESULTS = "results"

Arrays = dict[str, npt.NDArray[Any]]
Result = TypeVar("Result")


class ResultFiles:
    """The folder of an evaluation: its settings, and a file for each finished method.

    Raises ``SettingsError`` if it was begun with other settings, naming each with both values, and ``ForeignFileError``
    if it holds files but no evaluation.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self._results = folder / RESULTS
        record = json.loads(json.dumps(record))
        self._fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        about = folder / SETTINGS
        if not about.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ForeignFileError(f"{folder} holds files, but not those of an evaluation; results need their own")
            self._results.mkdir(parents=True)
            content = {"format": FORMAT, "version": FORMAT_VERSION, "settings": record}
            write_whole(about, (json.dumps(content, indent=2) + "\n").encode())
        _check_settings(about, record)
        self._results.mkdir(exist_ok=True)

    def load(self, name: str, about: Mapping[str, Any]) -> MethodScores | None:
        """What was measured of a method; ``None`` if that was not done yet."""
        return self._load(name, "", about, partial(_scores_of, name))

    def save(self, scores: MethodScores, about: Mapping[str, Any]) -> None:
        """Put what was measured of a method on the disk, and ``about``: what decides its maps beside its name."""
        arrays: dict[str, Any] = {"maps": scores.maps, "machine": np.array(scores.machine)}
        for kind, each in (("value", scores.values), ("curve", scores.curves), ("fraction", scores.fractions)):
            arrays |= {f"{kind}.{key}": array for key, array in each.items()}
        self._save(scores.name, "", arrays, about)

    def load_sanity(self, name: str, count: int, about: Mapping[str, Any]) -> RandomizationCurve | None:
        """A method's parameter randomization on so many pictures; ``None`` if that was not done yet."""
        return self._load(name, f"-sanity-{count}", about, _curve_of)

    def save_sanity(self, name: str, count: int, curve: RandomizationCurve, about: Mapping[str, Any]) -> None:
        """Put a method's parameter randomization on so many pictures on the disk."""
        tensors = {"spearman": curve.spearman, "spearman_magnitude": curve.spearman_magnitude, "cosine": curve.cosine}
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        self._save(name, f"-sanity-{count}", {"stages": np.array(curve.stages), **arrays}, about)

    def _file(self, name: str, suffix: str) -> Path:
        return self._results / f"{file_name(name)}{suffix}.npz"

    def _load(
        self, name: str, suffix: str, about: Mapping[str, Any], read: Callable[[Arrays], Result]
    ) -> Result | None:
        file = self._file(name, suffix)
        if not file.exists():
            return None
        content = io.BytesIO(file.read_bytes())
        try:
            with np.load(content, allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            stamp = (str(found.pop("method")), str(found.pop("fingerprint")))
            before = json.loads(str(found.pop("about", "{}")))
            result = read(found)
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, RuntimeError, TypeError) as error:
            raise EvaluationError(f"{file} is damaged ({error}); delete it to measure {name} again") from error
        if stamp != (name, self._fingerprint):
            raise EvaluationError(f"{file} is not of {name} with these settings; delete it to measure {name} again")
        if differing := differences(before, about):
            raise EvaluationError(f"{file} is of another {name}; delete it to measure {name} again: {differing}")
        return result

    def _save(self, name: str, suffix: str, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        stamp = {"method": name, "fingerprint": self._fingerprint, "about": json.dumps(about)}
        texts = {key: np.array(text) for key, text in stamp.items()}
        np.savez_compressed(buffer, allow_pickle=False, **texts, **arrays)
        write_whole(self._file(name, suffix), buffer.getvalue())


def _scores_of(name: str, arrays: Arrays) -> MethodScores:
    parts: dict[str, Arrays] = {"value": {}, "curve": {}, "fraction": {}, "": {}}
    for key, array in arrays.items():
        kind, _, rest = key.rpartition(".")
        parts[kind][rest] = array
    plain = parts[""]
    return MethodScores(name, parts["value"], parts["curve"], parts["fraction"], plain["maps"], str(plain["machine"]))


def _curve_of(arrays: Arrays) -> RandomizationCurve:
    tensors = (torch.from_numpy(arrays[key]) for key in ("spearman", "spearman_magnitude", "cosine"))
    return RandomizationCurve(tuple(map(str, arrays["stages"])), *tensors)


def _check_settings(about: Path, wanted: Mapping[str, Any]) -> None:
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        form, found = (content["format"], content["version"]), content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ForeignFileError(f"{about} is not the settings of an evaluation: {error}") from error
    if form != (FORMAT, FORMAT_VERSION):
        raise ForeignFileError(f"{about} is of {form[0]!r} version {form[1]}, expected {FORMAT!r} {FORMAT_VERSION}")
    check_settings(about.parent, found, wanted)
