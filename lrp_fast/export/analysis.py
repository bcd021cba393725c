"""The overview that ViRelAy's page begins with: every sample a point, near those with relevance in the same places.

This is a plain principal component analysis, there to open a run with; spectral relevance analysis proper is CoRelAy's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from .numbering import Numbering
from .selection import Samples, Selection

MOST_POINTS = 20_000
"""Points that the page still moves easily; of more samples, so many evenly spread ones are analysed."""
COMPONENTS, POOLED = 8, 16
ALL = "all"


class Analysis:
    """Collects the samples as they are exported (:meth:`add`), then writes the analysis (:meth:`write`).

    A sample's features are its channel relevances in the last of the exported layers or, if there are none, its map
    averaged to at most 16 x 16; divided by the sum of their magnitudes, so that where relevance is counts and not how much.
    The embedding ``pca`` are their first principal components. What samples are clustered by is what is known of them: the
    explained class (``target``) and the ``label``, if there are any, in one numbering; the page calls class 0 "cluster 1".
    Categories: all samples, and those of each label.
    """

    method: ClassVar[str] = "relevance"

    def __init__(self, selection: Selection, numbering: Numbering) -> None:
        spread = np.linspace(0, len(selection) - 1, min(len(selection), MOST_POINTS)).round().astype(np.int64)
        self._rows: npt.NDArray[np.int64] = spread
        self._label, self._target = numbering.label[spread], selection.target[spread]
        self._identifiers = numbering.identifiers()
        self._features: list[npt.NDArray[np.float64]] = []

    def add(self, samples: Samples) -> None:
        low, high = np.searchsorted(self._rows, (samples.first, samples.first + len(samples.key)))
        chosen = self._rows[low:high] - samples.first
        if samples.channels:
            features = list(samples.channels.values())[-1][chosen]
        else:
            maps = torch.from_numpy(samples.heatmap[chosen])[:, None]
            size = min(POOLED, maps.shape[2]), min(POOLED, maps.shape[3])
            features = torch.nn.functional.adaptive_avg_pool2d(maps, size).flatten(1).numpy()
        self._features.append(_shares(features))

    def write(self, file: Any) -> None:
        """Write the analysis to an HDF5 file; a label's category has its identifier for a name."""
        embedding = principal_components(np.concatenate(self._features), COMPONENTS)
        categories = {ALL: np.arange(len(self._rows))}
        for label in np.unique(self._label[self._label >= 0]).tolist():
            categories[self._identifiers[label]] = np.flatnonzero(self._label == label)
        clusters = {"target": self._target} | ({"label": self._label} if len(categories) > 1 else {})
        for name, points in categories.items():
            file[f"{name}/index"] = self._rows[points].astype(np.uint32)
            file[f"{name}/embedding/pca"] = embedding[points].astype(np.float32)
            for known, values in clusters.items():
                file[f"{name}/cluster/{known}"] = values[points]


def _shares(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    values = features.astype(np.float64)
    total = np.abs(values).sum(1, keepdims=True)
    return values / np.where(total > 0, total, 1)


def principal_components(features: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Features [N, F] as coordinates [N, min(count, F)] along the directions in which they vary most, the first most.

    Each coordinate has mean 0; its sign is such that the direction's largest part is positive.
    """
    centred = features - features.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # by rising variance, in columns
    directions = directions[:, ::-1][:, :count]
    largest = np.abs(directions).argmax(0)
    return centred @ (directions * np.sign(directions[largest, np.arange(directions.shape[1])]))
