"""The committed pictures: a dozen drawn from a seed that no training uses, as PNG files with their masks.

Remake them with ``python -m lrp_fast.embedded.training --pictures-only``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .drawing import CLASSES, draw

PICTURES_FOLDER = Path(__file__).parent / "assets"
PICTURE_SEED = 1_000_033
PICTURE_COUNT = 12


@dataclass(frozen=True)
class EmbeddedPicture:
    """One committed picture.

    ``path`` is an RGB PNG of 224 x 224 pixels, ``mask_path`` a 1-bit PNG of the same size, white on the labelled
    object; ``label`` indexes ``CLASSES`` and ``class_name`` is its entry there.
    """

    path: Path
    mask_path: Path
    label: int
    class_name: str


def embedded_pictures() -> list[EmbeddedPicture]:
    """The committed pictures, in order. Raises FileNotFoundError, naming the files, if any is missing."""
    pictures = _pictures_in(PICTURES_FOLDER)
    missing = [str(path) for picture in pictures for path in (picture.path, picture.mask_path) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"embedded pictures are missing: {', '.join(missing)}")
    return pictures


def write_embedded_pictures(folder: Path) -> list[EmbeddedPicture]:
    """Draw the dozen into ``folder``, their masks into its subfolder ``masks``; the same pixels every time."""
    pictures = _pictures_in(folder)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        drawn = draw(PICTURE_SEED, index)
        Image.fromarray(drawn.image).save(picture.path, optimize=True)
        Image.fromarray(drawn.mask).save(picture.mask_path, optimize=True)
    return pictures


def _pictures_in(folder: Path) -> list[EmbeddedPicture]:
    pictures = []
    for index in range(PICTURE_COUNT):
        label = index % len(CLASSES)
        class_name = CLASSES[label]
        stem = f"{index:02d}-{class_name.replace(' ', '-')}"
        path, mask_path = folder / f"{stem}.png", folder / "masks" / f"{stem}.mask.png"
        pictures.append(EmbeddedPicture(path, mask_path, label, class_name))
    return pictures
