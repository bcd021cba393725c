"""Reading pictures of every kind, refusing what is none, and preprocessing them as torchvision would."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lrp_fast.images import ImageError, Preprocessing, find_images, load_picture, read_image

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be that large, with a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    pixels = noise(31, 23)
    Image.fromarray(pixels).save(tmp_path / f"picture{suffix}")
    assert np.array_equal(np.asarray(read_image(tmp_path / f"picture{suffix}")), pixels)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    pixels = noise(9, 7)
    Image.fromarray(pixels).save(tmp_path / "picture.txt", "PNG")
    assert np.array_equal(np.asarray(read_image(tmp_path / "picture.txt")), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels = noise(12, 20)
    # What a viewer shows for each value of the tag, from the EXIF standard: which edge row 0 and column 0 are.
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "picture.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "picture.png")), upright)


def test_sixteen_bit_grey_uses_its_full_range(tmp_path: Path) -> None:
    values = np.random.default_rng().integers(0, 65536, (8, 9)).astype(np.uint16)
    values[0, :2] = (0, 65535)
    for suffix in (".png", ".tif"):
        Image.fromarray(values).save(tmp_path / f"deep{suffix}")
        read = np.asarray(read_image(tmp_path / f"deep{suffix}")).astype(int)
        assert np.abs(read - values[..., None] / 257).max() <= 0.5
        assert read[0, 0].tolist() == [0, 0, 0]
        assert read[0, 1].tolist() == [255, 255, 255]


def test_grey_bilevel_and_palette(tmp_path: Path) -> None:
    pixels = noise(10, 11)
    grey = Image.fromarray(pixels).convert("L")
    grey.save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png")), np.repeat(np.asarray(grey)[..., None], 3, -1))
    grey.convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "bilevel.png")))) == {0, 255}
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(14, 15, 4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "glass.png")
    read = np.asarray(read_image(tmp_path / "glass.png")).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(read - (alpha * pixels[..., :3] + (1 - alpha) * 255)).max() <= 1
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 1].tolist() == pixels[0, 1, :3].tolist()
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 10, 10, 200, 10])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert np.asarray(read_image(tmp_path / "palette.gif"))[0].tolist() == [[255, 255, 255], [10, 200, 10]]


def test_cmyk(tmp_path: Path) -> None:
    color = np.random.default_rng().integers(40, 216, 3)
    flat = Image.new("RGB", (32, 32), tuple(color.tolist()))
    flat.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    read = np.asarray(read_image(tmp_path / "print.jpg")).astype(int)
    assert np.abs(read - color).max() <= 4


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_of_an_animation_the_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"moving{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged|not a picture"),
        (png_header(20_000, 20_000), "100 megapixels"),
        (png_header(11_000, 11_000), "11000 x 11000 = 121 megapixels, and the limit is 100"),
        (png_header(9_900, 9_900), "damaged"),  # between Pillow's warning and our limit: tried, and found too short
    ],
)
def test_what_is_no_picture_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_are_refused_or_read_never_anything_else(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng()
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 40)).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "picture"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError):
        read_image(path)
    for _ in range(60):
        bent = bytearray(whole)
        for position in generator.integers(0, len(bent), 5):
            bent[position] = generator.integers(0, 256)
        path.write_bytes(bent)
        with contextlib.suppress(ImageError):
            assert read_image(path).mode == "RGB"


def test_missing_folders_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    start = time.monotonic()
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.png")
    assert time.monotonic() - start < 5


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng().random((5, 5)).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="floating-point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_is_torchvisions(interpolation: str) -> None:
    generator = np.random.default_rng()
    for _ in range(20):
        height, width = (int(side) for side in generator.integers(60, 400, 2))
        resize = int(generator.integers(20, 260))
        crop = int(generator.integers(10, resize + 1))
        mean, std = tuple(generator.random(3)), tuple(generator.random(3) + 0.1)
        picture = Image.fromarray(noise(height, width))
        theirs = transforms.Compose(
            [
                transforms.Resize(resize, InterpolationMode(interpolation)),
                transforms.CenterCrop(crop),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )(picture)
        ours = Preprocessing(resize, crop, mean, std, interpolation)
        assert torch.allclose(ours.normalize(ours.frame(picture)), theirs, rtol=0, atol=1e-5)


def test_a_very_long_strip_shows_its_middle() -> None:
    strip = Image.new("RGB", (3, 3_000_000), "red")
    strip.paste((0, 0, 255), (0, 1_400_000, 3, 1_600_000))
    assert np.asarray(Preprocessing(232, 224).frame(strip)).reshape(-1, 3).tolist() == [[0, 0, 255]] * 224**2


def test_preprocessing_sizes_and_refusals() -> None:
    base = Preprocessing(resize=256, crop=224)
    assert (base.with_size(112).resize, base.with_size(112).crop) == (128, 112)
    assert (base.with_size(448).resize, base.with_size(448).crop) == (512, 448)
    with pytest.raises(ValueError, match=r"1\.\.100.*got 101"):
        Preprocessing(resize=100, crop=101)
    with pytest.raises(ValueError, match=r"known: .*bicubic"):
        Preprocessing(resize=100, crop=100, interpolation="psychic")


def test_overriding_the_preprocessing() -> None:
    base = Preprocessing(resize=256, crop=224)
    assert base.override() == base
    assert base.override(crop=112) == base.with_size(112)
    assert base.override(crop=250, resize=250) == Preprocessing(250, 250)
    changed = base.override(resize=300, mean=[0, 0.5, 1], std=[1, 2, 3], interpolation="BiCubic")
    assert changed == Preprocessing(300, 224, (0.0, 0.5, 1.0), (1.0, 2.0, 3.0), "bicubic")
    assert str(changed) == "shorter side to 300 px (bicubic), minus 0, 0.5, 1, over 1, 2, 3"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"resize": 200}, r"1\.\.200 .*got 224"),
        ({"crop": 0}, "at least 1 pixel wide, got 0"),
        ({"crop": -5}, "at least 1 pixel wide, got -5"),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers"),
        ({"std": (1, 1, float("nan"))}, "std must be three finite numbers"),
        ({"mean": (123.675, 116.28, 103.53)}, r"mean is for pixel values in \[0, 1\]"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"interpolation": "psychic"}, "known: nearest, .*bicubic"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            base.override(**options)


def test_a_loaded_picture_shows_what_the_network_gets(tmp_path: Path) -> None:
    Image.fromarray(noise(90, 70)).save(tmp_path / "picture.png")
    preprocessing = Preprocessing(resize=48, crop=40)
    picture = load_picture(tmp_path / "picture.png", preprocessing)
    assert picture.image.size == (40, 40)
    mean, std = torch.tensor(preprocessing.mean).view(3, 1, 1), torch.tensor(preprocessing.std).view(3, 1, 1)
    shown = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)
    assert torch.equal((picture.tensor * std + mean).mul(255).round().to(torch.uint8), shown)


def test_finding_pictures(tmp_path: Path) -> None:
    inside = ["b.PNG", "a.jpg", "sub/c.jpeg", "sub/deeper/d.webp"]
    outside = ["notes.txt", ".hidden.png", ".cache/e.png", "results/f.png", "sub/ours.png"]
    for name in inside + outside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / ".lrp-fast-files").write_text("ours.png\nresults.csv\n")  # an earlier run's
    for name in ("sub/maps/made.png", "sub/maps/cat/made.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub" / "maps" / ".lrp-fast-export").write_text("made.png\ncat/made.png\ngone.png\n")
    found = find_images([tmp_path], exclude=tmp_path / "results")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "b.PNG", "sub/c.jpeg", "sub/deeper/d.webp"]
    named = [tmp_path / "notes.txt", tmp_path / "missing.png", tmp_path / "sub", tmp_path / "sub" / "c.jpeg"]
    assert find_images(named) == [*named[:2], tmp_path / "sub" / "c.jpeg", tmp_path / "sub" / "deeper" / "d.webp"]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}")
def test_real_photographs() -> None:
    for path in sorted(PHOTOS.iterdir())[:5]:
        picture = load_picture(path, Preprocessing(232, 224))
        assert picture.tensor.std() > 0.2
        assert picture.tensor.isfinite().all()


def test_bounds_are_what_black_and_white_become() -> None:
    preprocessing = Preprocessing(8, 8, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    for shade, bound in zip((0, 255), preprocessing.bounds(), strict=True):
        inputs = preprocessing.normalize(Image.new("RGB", (8, 8), (shade,) * 3))
        assert torch.allclose(inputs, torch.tensor(bound).view(3, 1, 1))
