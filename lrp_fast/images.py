"""Pictures from files: found in folders, read safely, brought into the form a network was trained on.

Every picture becomes 8-bit RGB: EXIF orientation applied, transparency laid on white, the full range of 16-bit grey
scaled to 8 bits, the first frame of an animation. Decoding is limited to raster formats that Pillow reads by itself,
and to a number of pixels that is checked in the header before anything is decoded.
"""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What Pillow may decode here: no format that starts another program (EPS) or describes a drawing (WMF)."""

MANIFEST = ".lrp-fast-files"
"""In a folder that results are written into: their names, a line each."""
LISTING = ".lrp-fast-export"
"""In an exported folder: all other files in it and below, a line each; in an evaluation's: its pictures."""
SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)
MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
"""The largest file that is read into memory whole."""

# What Pillow's decoders raise on damaged data, besides OSError (which includes UnidentifiedImageError).
_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(Exception):
    """A picture that cannot be read; the message gives the reason, without the file's name."""


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pictures: shorter side to ``resize`` pixels, centre ``crop`` x ``crop``, then normalised.

    ``mean`` and ``std`` per channel (red, green, blue) are for values in [0, 1]; ``interpolation`` is a name of
    ``PIL.Image.Resampling``. Raises ``ValueError`` for a crop larger than the resized picture, a mean outside [0, 1], a
    standard deviation that is not positive, or an unknown name.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"the crop must lie in 1..{self.resize} (the resized shorter side), got {self.crop}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be three finite numbers (red, green, blue), got {tuple(values)}")
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean is for pixel values in [0, 1], not 0 to 255; got {tuple(self.mean)}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {tuple(self.std)}")
        if self.interpolation.lower() not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; known: {', '.join(INTERPOLATIONS)}")

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"shorter side to {self.resize} px ({self.interpolation}), minus {mean}, over {std}"

    def bounds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What black and white become, channel by channel: the least and the largest input there is."""
        low, high = (
            tuple((value - mean) / std for mean, std in zip(self.mean, self.std, strict=True)) for value in (0.0, 1.0)
        )
        return low, high

    def with_size(self, size: int) -> Preprocessing:
        """The same for crops of ``size`` pixels, with the margin around the crop in proportion; ``ValueError`` below 1."""
        if size < 1:
            raise ValueError(f"a crop must be at least 1 pixel wide, got {size}")
        return replace(self, resize=max(size, round(self.resize * size / self.crop)), crop=size)

    def override(
        self,
        *,
        resize: int | None = None,
        crop: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """The same but for what is given; a crop without a ``resize`` keeps its margin in proportion.

        Raises ``ValueError`` as the class does.
        """
        same = self if crop is None else self.with_size(crop)
        return Preprocessing(
            resize=same.resize if resize is None else resize,
            crop=same.crop,
            mean=same.mean if mean is None else _floats(mean),
            std=same.std if std is None else _floats(std),
            interpolation=same.interpolation if interpolation is None else interpolation.lower(),
        )

    def frame(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the network sees, resized: ``crop`` x ``crop`` pixels in the picture's own mode.

        As torchvision's ``Resize`` and ``CenterCrop``. Of a strip longer than eight times its width only the middle is
        resized: a picture of 1 x 50,000,000 pixels would not fit into memory at a width of 232.
        """
        shorter = min(image.size)
        width, height = (min(side, 8 * shorter) for side in image.size)
        if (width, height) != image.size:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        # torchvision rounds the longer side down and the crop's corner to the nearest pixel; so do we.
        resized = (int(self.resize * width / shorter), int(self.resize * height / shorter))
        left, top = (round((side - self.crop) / 2) for side in resized)
        whole = image.resize(resized, Image.Resampling[self.interpolation.upper()])
        return whole.crop((left, top, left + self.crop, top + self.crop))

    def normalize(self, image: Image.Image) -> Tensor:
        """An RGB picture as a network's input: float32 [3, H, W], ``(value / 255 - mean) / std``."""
        values = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1).to(torch.float32) / 255
        mean, std = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in (self.mean, self.std))
        return ((values - mean) / std).contiguous()


def _floats(values: Sequence[float]) -> tuple[float, float, float]:
    return cast("tuple[float, float, float]", tuple(map(float, values)))  # how many there are, the class checks


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture ready to be explained: where it came from, what is displayed, what the network gets.

    ``image``: RGB, ``crop`` x ``crop``; ``tensor``: the same pixels, float32 [3, crop, crop], normalised.
    """

    path: Path
    image: Image.Image
    tensor: Tensor


def load_picture(path: Path, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a file and bring it into the network's form; raises :class:`ImageError` with the reason."""
    framed = preprocessing.frame(read_image(path, max_pixels))
    return Picture(path, framed, preprocessing.normalize(framed))


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, transparency on white; of an animation, the first frame.

    Raises :class:`ImageError` for a file that is missing, empty, not a picture, damaged, in a format or pixel type that
    is not read here, or of more than ``max_pixels`` pixels.
    """
    _check_file(path)
    return _decode(path, max_pixels)


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture from the bytes of its file, wherever they were kept; result and errors as of :func:`read_image`."""
    if not content:
        raise ImageError("the file is empty (0 bytes)")
    return _decode(io.BytesIO(content), max_pixels)


def read_bytes(path: Path) -> bytes:
    """The bytes of a picture's file; raises :class:`ImageError` for one that is missing, empty, or too large to hold."""
    _check_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"too large: {size / 1e6:.0f} MB, and the limit is {MAX_BYTES / 1e6:.0f}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be opened: {_first_line(error)}") from error


def _decode(file: Path | BinaryIO, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow's own warning about size, which the limit here decides, and its remarks on odd but readable metadata.
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=_readable_formats()) as image:
                _check_size(image.size, max_pixels)
                image.load()
                # Metadata of the orientation, damaged or not, is all that is asked of the EXIF block.
                return _as_rgb(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError as error:
            raise ImageError(f"too large, more than {max_pixels / 1e6:g} megapixels: {error}") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"not a picture in a known format ({', '.join(_readable_formats())})") from error
        except _DECODING_ERRORS as error:
            raise ImageError(f"damaged or unreadable: {_first_line(error)}") from error


@functools.cache
def _readable_formats() -> list[str]:
    """Those of ``FORMATS`` that this build of Pillow has a decoder for."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise ImageError("no such file")
        if not path.is_file():  # a pipe or a device may never end
            raise ImageError("not a regular file")
        if path.stat().st_size == 0:
            raise ImageError("the file is empty (0 bytes)")
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be opened: {_first_line(error)}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        got = f"{width} x {height} = {width * height / 1e6:.0f} megapixels"
        raise ImageError(f"too large: {got}, and the limit is {max_pixels / 1e6:g}")
    if width * height == 0:
        raise ImageError(f"has no pixels: {width} x {height}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        image = _wide_grey(image)
    elif image.mode == "F":
        raise ImageError("pixels are floating-point numbers, whose range is not known")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, also where Pillow keeps it in 32, to 8 bits: 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"32-bit grey values from {values.min()} to {values.max()}; at most 16 bits are read")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def find_images(paths: Iterable[Path], exclude: Path | None = None) -> list[Path]:
    """The picture files in files and folders, in the order given, a folder's sorted by name, each file once.

    A file named by itself is always listed, whatever its name, also when it does not exist, so that its failure is
    reported. Folders are searched through, following no links to folders, for the known suffixes in any case; names
    that begin with a dot are passed over, and so are the folder ``exclude`` (where results are being written) and what
    lrp_fast has written before.
    """
    found: dict[Path, Path] = {}
    excluded = exclude.resolve() if exclude is not None else None
    for path in paths:
        for file in _search(path, excluded) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _search(folder: Path, excluded: Path | None) -> list[Path]:
    files, exported = [], set()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() != excluded
        )
        ours = written_into(Path(parent))
        exported |= {Path(parent) / name for name in _lines(Path(parent) / LISTING)}
        found = [Path(parent) / name for name in names if _has_image_name(name) and name not in ours]
        files += [file for file in found if file not in exported]
    return sorted(files)


def written_into(folder: Path) -> dict[str, str]:
    """The files that lrp_fast has written into a folder, as that says itself: each name, and what :func:`mark` was, if known."""
    return {name: known for name, _, known in (line.partition("\t") for line in _lines(folder / MANIFEST))}


def _lines(listing: Path) -> list[str]:
    return listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else []


def manifest_line(name: str, known: str) -> str:
    """A file as :func:`written_into` reads it."""
    return f"{name}\t{known}\n" if known else f"{name}\n"


def mark(file: Path) -> str:
    """By which a file is known again, unless somebody has put another in its place: its size and when it was written."""
    found = file.lstat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _has_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _raise(error: OSError) -> None:
    raise error
