"""One numbering for the classes that maps explain and those that pictures are labelled with."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .selection import Selection, name_of


@dataclass(frozen=True, eq=False)
class Numbering:
    """The classes of a store in the numbering of the model's outputs, for tools that know of one numbering only.

    ``outputs``: of the model, the classes 0 to ``outputs`` - 1; ``names``: number → name, of every class of the model and
    of every one that occurs; ``label``: those of the exported samples in this numbering, int64 [N], -1 where there is none;
    ``unmatched``: of the data set's classes that occur, those that are not the name of exactly one class of the model.
    """

    outputs: int
    names: dict[int, str]
    label: npt.NDArray[np.int64]
    unmatched: tuple[str, ...]

    def identifiers(self) -> dict[int, str]:
        """Number → a text that no other class has: the WordNet ID that is its name, or its number."""
        times = Counter(self.names.values())
        return {
            number: name if times[name] == 1 and re.fullmatch(r"n\d{8}", name) else f"class-{number}"
            for number, name in self.names.items()
        }


def number_classes(selection: Selection) -> Numbering:
    """The numbering in which the exported samples' targets stay as they are.

    Labels that are numbers stay too, as do those of a data set with the model's own classes. Otherwise, if every class of
    the data set that occurs is the name of exactly one class of the model, labels become that one's number; else all
    classes of the data set follow after the model's.
    """
    classes, model_classes, label = selection.classes, selection.model_classes, selection.label
    # A store that does not name the model's classes still shows that it has those that were explained.
    outputs = max(len(model_classes), int(selection.target.max()) + 1)
    names = dict(enumerate(model_classes))
    unmatched: tuple[str, ...] = ()
    if classes and classes != model_classes:
        label, unmatched = _matched(label, classes, model_classes)
        if unmatched:
            label = np.where(selection.label < 0, -1, selection.label + outputs)
            names |= dict(enumerate(classes, outputs))
    occurring = {*label.tolist(), *selection.target.tolist()} - {-1}
    names |= {number: f"class-{number}" for number in sorted(occurring - names.keys())}
    return Numbering(outputs, names, label, unmatched)


def _matched(
    label: npt.NDArray[np.int64], classes: list[str], model_classes: list[str]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels as the model's classes of their names, and the names for which there is not exactly one."""
    times = Counter(model_classes)
    places = {name: place for place, name in enumerate(model_classes) if name and times[name] == 1}
    used, inverse = np.unique(label, return_inverse=True)
    numbers = [places.get(name_of(classes, number), -1) for number in used.tolist()]
    unmatched = [number for number, place in zip(used.tolist(), numbers, strict=True) if number >= 0 > place]
    texts = tuple(name_of(classes, number) or str(number) for number in unmatched)
    return np.array(numbers, np.int64)[inverse], texts
