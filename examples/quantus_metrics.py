"""Quantus' metrics on our maps: how concentrated they are, and how well they find the labelled object.

python examples/quantus_metrics.py      # needs: pip install 'lrp-fast[quantus]'

The embedded network explains the twelve embedded pictures, whose masks say where the labelled object is. Quantus 0.6 calls
``np.trapz`` in its metrics with an area under a curve (pixel flipping, ROAD, AUC, ...), which NumPy 2.4 no longer has; these
three do without.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import quantus
import torch
from PIL import Image

from lrp_fast.embedded import embedded_network, embedded_pictures, network_input
from lrp_fast.integrations.quantus import explain

METHODS = ("otsuki2024", "otsuki2024+quantized", "conserving", "random", "edges")
METRICS = {
    "Sparseness": quantus.Sparseness(disable_warnings=True),
    "Pointing game": quantus.PointingGame(disable_warnings=True),
    "Relevance rank accuracy": quantus.RelevanceRankAccuracy(disable_warnings=True),
}


def scores(method: str, size: int = 112) -> dict[str, npt.NDArray[np.float64]]:
    """Each metric's score of each picture [12], explained for its predicted class at ``size`` x ``size`` pixels."""
    model = embedded_network()
    pictures = embedded_pictures()
    x = network_input(np.stack([pixels(picture.path, "RGB", size) for picture in pictures]))
    masks = np.stack([pixels(picture.mask_path, "1", size) for picture in pictures])
    with torch.no_grad():
        y = model(x).argmax(1).numpy()
    return {
        name: np.asarray(
            metric(
                model=model,
                x_batch=x.numpy(),
                y_batch=y,
                s_batch=masks[:, None],
                explain_func=explain,
                explain_func_kwargs={"method": method},
                device="cpu",
            ),
            dtype=np.float64,
        )
        for name, metric in METRICS.items()
    }


def pixels(path: Path, mode: str, size: int) -> npt.NDArray[np.generic]:
    """A picture file in a mode of Pillow's, resized to [size, size] or [size, size, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert(mode).resize((size, size)))


def main() -> None:
    print(f"{'method':24}" + "".join(f"{name:>26}" for name in METRICS))
    for method in METHODS:
        print(f"{method:24}" + "".join(f"{found.mean():26.3f}" for found in scores(method).values()))


if __name__ == "__main__":
    main()
