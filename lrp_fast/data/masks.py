"""Ground truth for localisation: files of masks, and boxes, which become masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lrp_fast.images import ImageError, read_image

from .source import Masks, SourceError, Texts


class FileMasks(Masks):
    """Pictures that are bright (128 of 255 and more) on the object; a sample whose file does not exist has no mask.

    They are read as any picture is, so transparency counts as white. Raises :class:`SourceError` if no file exists.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not any(path.is_file() for path in paths):
            raise SourceError(f"none of the {len(paths)} masks is there, such as {paths[0]}")
        self._paths = Texts(map(str, paths))

    def mask(self, index: int, size: tuple[int, int]) -> Image.Image | None:
        path = Path(self._paths[index])
        if not path.exists():
            return None
        try:
            values = np.asarray(read_image(path).convert("L"))
        except ImageError as error:
            raise ImageError(f"its mask: {error}") from error
        if 0 < values.max() < 128:
            raise ImageError(
                f"its mask is nowhere brighter than {values.max()}; expected 255 on the object, 0 elsewhere"
            )
        return _as_mask(values >= 128)


class BoxMasks(Masks):
    """Boxes around the objects: float64 [N, 4] of left, top, width and height in pixels from the picture's corner.

    Inside is every pixel whose centre is. Raises :class:`SourceError`, by its number, for a box without an area.
    """

    def __init__(self, boxes: npt.NDArray[np.float64]) -> None:
        bad = np.flatnonzero(~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)))
        if len(bad):
            raise SourceError(f"box {bad[0] + 1} of {len(boxes)} has no area: {boxes[bad[0]].tolist()}")
        self._boxes = boxes

    def mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        left, top, width, height = self._boxes[index].tolist()
        x, y = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
        inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
        if not inside.any():
            raise ImageError(f"its box, {self._boxes[index].tolist()}, lies outside its {size[0]} x {size[1]} pixels")
        return _as_mask(inside)


def _as_mask(inside: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * np.uint8(255))
