"""CIFAR-10 in its binary version: records of a label's byte and 3 x 32 x 32 bytes of pixels, red first.

The version for Python, which torchvision's class reads, is made of pickles, and nothing is unpickled here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from .source import Source, SourceError, Texts, read_slice

FOLDER, PICKLED_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
BATCHES = {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6))}
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


class CifarSource(Source):
    """Samples inside batch files; each one's key is ``BATCH/NUMBER``, its picture a PPM of 32 x 32 pixels."""

    def __init__(self, batches: list[Path], labels: list[npt.NDArray[np.uint8]], classes: list[str]) -> None:
        places = [(batch, number) for batch, each in enumerate(labels) for number in range(len(each))]
        keys = [f"{batches[batch].stem}/{number:05d}" for batch, number in places]
        super().__init__("cifar10", keys, np.concatenate(labels), classes)
        self._batches = Texts(map(str, batches))
        self._places = np.array(places, dtype=np.int64)

    def read(self, index: int) -> bytes:
        self._check_index(index)
        batch, number = map(int, self._places[index])
        pixels = read_slice(Path(self._batches[batch]), number * (1 + _PIXELS) + 1, _PIXELS, "batch")
        planes = np.frombuffer(pixels, np.uint8).reshape(3, _SIDE * _SIDE)
        return b"P6 %d %d 255\n" % (_SIDE, _SIDE) + planes.T.tobytes()


def cifar10_source(path: Path, split: str) -> CifarSource:
    """The pictures of one split; ``path`` is the folder ``cifar-10-batches-bin`` or the one that holds it."""
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    batches = [folder / name for name in BATCHES[split]]
    missing = [batch.name for batch in batches if not batch.is_file()]
    if missing:
        if (path / PICKLED_FOLDER).is_dir() or (path / "batches.meta").is_file():
            raise SourceError(
                f"{path} holds CIFAR-10's version for Python, whose pickles could run code when read; the binary version "
                f"is at {ADDRESS}"
            )
        raise SourceError(f"{folder} lacks {', '.join(missing)} of CIFAR-10's binary version, which is at {ADDRESS}")
    try:
        lines = (folder / "batches.meta.txt").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{folder / 'batches.meta.txt'} is not text in UTF-8: {error}") from error
    classes = [line.strip() for line in lines if line.strip()]
    return CifarSource(batches, [_read_labels(batch, len(classes)) for batch in batches], classes)


def _read_labels(batch: Path, classes: int) -> npt.NDArray[np.uint8]:
    size = batch.stat().st_size
    if size == 0 or size % (1 + _PIXELS):
        raise SourceError(f"{batch} is of {size} bytes; expected a multiple of {1 + _PIXELS}")
    labels = np.fromfile(batch, np.uint8).reshape(-1, 1 + _PIXELS)[:, 0].copy()
    if labels.max() >= classes:
        record = int(labels.argmax())
        raise SourceError(f"{batch}: record {record} has label {labels[record]}, and there are {classes} classes")
    return labels
