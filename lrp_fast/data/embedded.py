"""Pictures drawn afresh, of what the embedded network tells apart: ``embedded:COUNT`` or ``embedded:COUNT:SEED``."""

from __future__ import annotations

import io
import re

from PIL import Image

from lrp_fast.embedded.drawing import CLASSES, Picture, draw

from .source import Masks, Source, SourceError

PREFIX = "embedded:"
_FIRST_INDEX = 1 << 31
"""Beyond every index that training and validation count to, and even in ``len(CLASSES)``."""


class DrawnMasks(Masks):
    """The masks of drawn pictures."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(_draw(self._seed, index).mask).convert("L")


class EmbeddedSource(Source):
    """``count`` pictures of a seed, each drawn when it is read, the same in any process; each one's key is ``SEED/INDEX``.

    None is a picture the network was trained or validated on, or one of the committed dozen, whatever their seed: those
    are ``draw(seed, 0)``, ``draw(seed, 1)``, ... and these ``draw(seed, 2**31)``, ``draw(seed, 2**31 + 1)``, ..., with
    seeds and indices below 2**32, so that no two pairs start NumPy's generator alike.
    """

    def __init__(self, count: int, seed: int) -> None:
        if not 1 <= count <= _FIRST_INDEX or seed >= 1 << 32:
            raise SourceError(f"expected 1 to 2**31 drawn pictures of a seed below 2**32, got {count} of seed {seed}")
        labels = [index % len(CLASSES) for index in range(count)]
        super().__init__(
            "embedded", [f"{seed}/{index:06d}" for index in range(count)], labels, CLASSES, DrawnMasks(seed)
        )
        self._seed = seed

    def read(self, index: int) -> bytes:
        self._check_index(index)
        content = io.BytesIO()
        Image.fromarray(_draw(self._seed, index).image).save(content, "PNG", compress_level=1)
        return content.getvalue()


def embedded_source(text: str) -> EmbeddedSource:
    """The pictures that ``embedded:COUNT`` or ``embedded:COUNT:SEED`` asks for; the seed is 0 by default."""
    match = re.fullmatch(rf"{PREFIX}([0-9]{{1,10}})(?::([0-9]{{1,10}}))?", text)
    if match is None:
        raise SourceError(f"expected {PREFIX}COUNT or {PREFIX}COUNT:SEED, got {text!r:.100}")
    return EmbeddedSource(int(match[1]), int(match[2] or 0))


def _draw(seed: int, index: int) -> Picture:
    return draw(seed, _FIRST_INDEX + index)
