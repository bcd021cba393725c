"""Sources: what they list, in what order, with which labels; what they refuse; what never happens."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrp_fast.data import FileSource, Source, SourceError, open_source
from lrp_fast.data.masks import BoxMasks
from lrp_fast.data.source import Texts
from lrp_fast.images import ImageError, decode_image


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode() if content is None else content)
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def listed(source: Source) -> list[tuple[str, int]]:
    return list(zip(source.keys, source.labels.tolist(), strict=True))


def test_texts_give_back_what_they_were_made_of() -> None:
    texts = ["", "a", "é\n\0=", "日本", "\udcff", "x" * 5000, ""]
    kept = Texts(texts)
    assert list(kept) == texts
    assert kept[1:3] == texts[1:3]
    assert list(pickle.loads(pickle.dumps(kept))) == texts
    for index in (-1, len(texts)):
        with pytest.raises(IndexError):
            kept[index]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/10.PNG", "a/deep/1.jpg", "=c/x.jpg"):
        put(tmp_path / name)
    put(tmp_path / "a" / "readme.txt")
    put(tmp_path / ".hidden" / "x.jpg")
    put(tmp_path / "out" / "x.jpg")
    source = open_source(tmp_path, exclude=tmp_path / "out")
    assert listed(source) == [("=c/x.jpg", 0), ("a/deep/1.jpg", 1), ("b/10.PNG", 2), ("b/2.jpg", 2)]
    assert source.classes == ("=c", "a", "b")
    assert source.read(1) == str(tmp_path / "a/deep/1.jpg").encode()


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg", "sub/c.jpg"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert listed(source) == [("a.jpg", -1), ("b.jpg", -1), ("sub/c.jpg", -1)]
    assert source.classes == ()


def test_names_that_are_no_text_are_read_and_have_keys(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff\xfe.jpg")
    put(file, b"content")
    source = open_source(tmp_path)
    assert list(source.keys) == ["\\xff\\xfe.jpg"]
    assert source.read(0) == b"content"
    assert len(source.fingerprint()) == 64


def test_a_manifest(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside.jpg")
    table = put(tmp_path / "in" / "list.csv", f'\ufeffpath,label,id\nz.jpg,7,"=1+1"\n{outside},,\n'.encode())
    put(tmp_path / "in" / "z.jpg")
    source = open_source(table)
    assert listed(source) == [("=1+1", 7), (str(outside), -1)]
    assert source.read(0) == str(tmp_path / "in" / "z.jpg").encode()
    assert source.read(1) == str(outside).encode()


def test_class_names_in_a_manifest_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    table = put(tmp_path / "list.csv", b"label,path\nwasp,1\nant,2\n12,3\nwasp,4\n,5\n")
    source = open_source(table)
    assert source.classes == ("12", "ant", "wasp")
    assert listed(source) == [("1", 2), ("2", 1), ("3", 0), ("4", 2), ("5", -1)]


def test_numbers_with_none_among_them_stay_numbers(tmp_path: Path) -> None:
    """-1 is a store's own mark for no label; -2 is no label that there could be, so a name."""
    table = put(tmp_path / "list.csv", b"label,path\n10,1\n2,2\n-1,3\n,4\n")
    assert listed(open_source(table)) == [("1", 10), ("2", 2), ("3", -1), ("4", -1)]
    table = put(tmp_path / "list.csv", b"label,path\n-1,1\nant,2\n-2,3\n")
    assert listed(open_source(table)) == [("1", 0), ("2", 2), ("3", 1)]


@pytest.mark.parametrize("gap", [None, math.nan])
def test_whole_numbers_that_a_gap_made_floating_are_labels(tmp_path: Path, gap: float | None) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a", "b", "c"], "label": [10.0, 2.0, gap]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    assert listed(source) == [("a", 10), ("b", 2), ("c", -1)]
    assert source.classes == ()


def test_a_parquet_manifest_is_as_its_csv(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a.jpg", "b.jpg"], "label": [3, None], "more": [1.5, 2.5]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    put(tmp_path / "list.csv", b"path,label\na.jpg,3\nb.jpg,\n")
    tables = [open_source(tmp_path / name) for name in ("list.parquet", "list.csv")]
    assert listed(tables[0]) == listed(tables[1]) == [("a.jpg", 3), ("b.jpg", -1)]
    assert tables[0].fingerprint() == tables[1].fingerprint()


class Explosive:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_webdataset_shards_are_raw_bytes(tmp_path: Path) -> None:
    bomb = pickle.dumps(Explosive(tmp_path / "unpickled"))
    shard(tmp_path / "in" / "1.tar", {"x/b.jpg": b"B", "x/b.cls": b"2\n", "a.png": b"A", "a.pkl": bomb, "a.pyd": bomb})
    shard(tmp_path / "in" / "0.tar", {"../../b.seg.jpg": b"", "../../b.jpg": b"C", "only.json": b"{}", "t.cls": bomb})
    source = open_source(tmp_path / "in")
    assert listed(source) == [("0.tar/../../b", -1), ("1.tar/x/b", 2), ("1.tar/a", -1)]
    assert [source.read(index) for index in range(3)] == [b"C", b"B", b"A"]
    assert not (tmp_path / "unpickled").exists()


def test_only_files_of_a_shard_are_samples(tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", {"a.jpg": b"A"})
    with tarfile.open(file, "a") as tar:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    source = open_source(file)
    assert listed(source) == [("0.tar/a", -1)]
    assert source.read(0) == b"A"


def test_a_shard_that_shrank_is_named(tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", {"a.jpg": bytes(3000)})
    source = open_source(file)
    assert len(source.read(0)) == 3000
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ImageError, match="ends after 488 of 3000 bytes"):
        source.read(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"file,label\na,b\n", "no column `path`; it has: file, label"),
        ("list.csv", b"", "no column `path`; it has: none"),
        ("list.csv", b"path\n", "holds no pictures"),
        ("list.csv", b"path,id\na,1\nb,1\n", "'1' comes 2 times"),
        ("list.csv", b"path,id\na,1\n,2\n", "row 2 names no path"),
        ("list.csv", b"path\n\xff\n", "not a CSV table in UTF-8"),
        ("list.csv", b"path\n" + b"x" * 200_000, "not a CSV table"),
        ("list.parquet", b"path\na", "not a readable Parquet table"),
        ("0.tar", b"no tar", "0.tar is not a whole, uncompressed tar file"),
        ("list.xls", b"", "neither a folder nor"),
    ],
)
def test_what_cannot_be_listed_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(SourceError) as error:
        open_source(put(tmp_path / name, content))
    assert message in str(error.value)


def test_more_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no pictures"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match=r"holds no \.tar files"):
        open_source(tmp_path, "webdataset")
    with pytest.raises(ValueError, match="known: folder, manifest, .*webdataset"):
        open_source(tmp_path, "mnist")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(tmp_path / "none.csv")
    twice = shard(tmp_path / "0.tar", {"a.jpg": b"", "a.png": b""})
    with pytest.raises(SourceError, match="two pictures for 'a'"):
        open_source(twice)


def test_missing_and_empty_files_fail_one_by_one(tmp_path: Path) -> None:
    put(tmp_path / "empty.jpg", b"")
    (tmp_path / "folder.jpg").mkdir()
    source = open_source(put(tmp_path / "list.csv", b"path\nnone.jpg\nempty.jpg\nfolder.jpg\nlist.csv\n"))
    for index, reason in enumerate(("no such file", "0 bytes", "not a regular file")):
        with pytest.raises(ImageError, match=reason):
            source.read(index)
    assert source.read(3).startswith(b"path")


def test_what_is_too_large_to_hold_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in" / "a.jpg", bytes(2_000_001))
    tar = shard(tmp_path / "0.tar", {"a.jpg": bytes(2_000_001)})
    for module in ("lrp_fast.images", "lrp_fast.data.source"):
        monkeypatch.setattr(f"{module}.MAX_BYTES", 2_000_000)
    for path in (tmp_path / "in", tar):
        with pytest.raises(ImageError, match="too large: 2 MB, and the limit is 2"):
            open_source(path).read(0)


def test_the_fingerprint_tells_sources_apart() -> None:
    def fingerprint(kind: str, keys: list[str], labels: list[int], classes: list[str]) -> str:
        return FileSource(kind, [Path(key) for key in keys], keys, np.array(labels), classes).fingerprint()

    same = fingerprint("folder", ["a", "b"], [0, 1], ["x", "y"])
    assert same == fingerprint("folder", ["a", "b"], [0, 1], ["x", "y"])
    others = {
        fingerprint("manifest", ["a", "b"], [0, 1], ["x", "y"]),
        fingerprint("folder", ["b", "a"], [0, 1], ["x", "y"]),
        fingerprint("folder", ["a", "b"], [1, 0], ["x", "y"]),
        fingerprint("folder", ["a", "b"], [0, 1], ["y", "x"]),
        fingerprint("folder", ["ab", ""], [0, 1], ["x", "y"]),
        fingerprint("folder", ["a", "b", "x"], [0, 1, 1], ["y"]),
    }
    assert len(others | {same}) == 7


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng().integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def odd_pictures() -> tuple[dict[str, tuple[bytes, np.ndarray]], dict[str, tuple[bytes, str]]]:
    """Files by name: the good ones with the colour of their top left corner, the bad ones with the reason."""
    red, grey = Image.new("RGB", (40, 30), (200, 30, 60)), Image.new("L", (40, 30), 77)
    deep = Image.fromarray(np.full((30, 40), 40_000, dtype=np.uint16))
    frames = [Image.new("RGB", (40, 30), color) for color in ("blue", "red")]
    large = Image.new("RGB", (8660, 5774), (10, 120, 230))
    good = {
        "cmyk.jpg": (saved(red.convert("CMYK"), "JPEG", quality=100), (200, 30, 60)),
        "grey.jpg": (saved(grey, "JPEG"), (77, 77, 77)),
        "deep.png": (saved(deep, "PNG"), (156, 156, 156)),  # 40000 / 257
        "moving.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), (0, 0, 255)),
        "large.jpg": (saved(large, "JPEG"), (10, 120, 230)),
    }
    whole = saved(picture((60, 50)), "JPEG")
    bad = {
        "truncated.jpg": (whole[: len(whole) // 2], "damaged"),
        "empty.jpg": (b"", "0 bytes"),
        "text.jpg": (b"no picture at all\n" * 20, "not a picture"),
    }
    return {name: (content, np.array(color)) for name, (content, color) in good.items()}, bad


def test_every_odd_file_is_decoded_or_named(tmp_path: Path) -> None:
    good, bad = odd_pictures()
    contents = {name: content for name, (content, _) in (good | bad).items()}
    for name, content in contents.items():
        put(tmp_path / "in" / name, content)
    for source in (open_source(tmp_path / "in"), open_source(shard(tmp_path / "0.tar", contents))):
        names = [name for key in source.keys for name in contents if Path(name).stem == Path(key).stem]
        assert sorted(names) == sorted(contents)
        for index, name in enumerate(names):
            if name in bad:
                with pytest.raises(ImageError, match=bad[name][1]):
                    decode_image(source.read(index))
            else:
                image = decode_image(source.read(index))
                assert image.mode == "RGB"
                assert np.abs(np.array(image.getpixel((0, 0))) - good[name][1]).max() <= 4


def test_masks_in_a_parallel_folder(tmp_path: Path) -> None:
    for name in ("b/x.jpg", "a/y.jpeg", "a/none.jpg"):
        put(tmp_path / "in" / name)
    inside = np.random.default_rng().random((6, 9)) < 0.5
    Image.fromarray(inside).save(put(tmp_path / "in" / "truth" / "b" / "x.png", b"-"))
    graded = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    Image.fromarray(graded).save(put(tmp_path / "in" / "truth" / "a" / "y.png", b"-"))
    source = open_source(tmp_path / "in", masks=tmp_path / "in" / "truth")
    assert listed(source) == [("a/none.jpg", 0), ("a/y.jpeg", 0), ("b/x.jpg", 1)]
    assert source.has_masks
    assert source.mask(0, (9, 6)) is None
    found = [source.mask(1, (4, 1)), source.mask(2, (9, 6))]
    assert [image.mode for image in found if image is not None] == ["L", "L"]
    assert np.asarray(found[0]).tolist() == [[0, 0, 255, 255]]
    assert np.array_equal(np.asarray(found[1]), inside * 255)
    assert source.fingerprint() == open_source(tmp_path / "in", exclude=tmp_path / "in" / "truth").fingerprint()
    with pytest.raises(ImageError, match="its mask is of 9 x 6 pixels, the picture of 6 x 9"):
        source.mask(2, (6, 9))
    with pytest.raises(IndexError, match="index 3 is not among 3 samples"):
        source.mask(3, (6, 9))


def test_masks_that_cannot_be_meant(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jpg")
    (tmp_path / "masks").mkdir()
    with pytest.raises(SourceError, match=r"none of the 1 masks is there, such as .*masks/a\.png"):
        open_source(tmp_path / "in", masks=tmp_path / "masks")
    with pytest.raises(SourceError, match="masks/none is not a folder"):
        open_source(tmp_path / "in", masks=tmp_path / "masks" / "none")
    mask = put(tmp_path / "masks" / "a.png", b"damaged")
    source = open_source(tmp_path / "in", masks=tmp_path / "masks")
    with pytest.raises(ImageError, match="its mask: not a picture"):
        source.mask(0, (2, 2))
    Image.fromarray(np.array([[0, 1], [1, 1]], dtype=np.uint8)).save(mask)
    with pytest.raises(ImageError, match="nowhere brighter than 1; expected 255 on the object"):
        source.mask(0, (2, 2))
    for path in (put(tmp_path / "list.csv", b"path\na.jpg\n"), shard(tmp_path / "0.tar", {"a.jpg": b""})):
        with pytest.raises(SourceError, match="takes no folder of masks; of kinds that do: folder"):
            open_source(path, masks=tmp_path / "masks")
        assert not open_source(path).has_masks
        assert open_source(path).mask(0, (5, 5)) is None


def test_splits_are_refused_where_there_are_none(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jpg")
    with pytest.raises(SourceError, match="kind folder has no split 'test'; its splits: none"):
        open_source(tmp_path / "in", split="test")
    with pytest.raises(SourceError, match="kind cub has no split 'val'; its splits: test, train"):
        open_source(tmp_path / "in", "cub", split="val")


def test_boxes_become_masks() -> None:
    generator = np.random.default_rng()
    boxes = np.concatenate([generator.uniform(-4, 9, (50, 2)), generator.uniform(3, 12, (50, 2))], axis=1)
    masks, (width, height) = BoxMasks(boxes), (13, 11)
    for index, (left, top, across, down) in enumerate(boxes.tolist()):
        expected = np.zeros((height, width), dtype=np.uint8)
        for row, column in itertools.product(range(height), range(width)):
            if left <= column + 0.5 < left + across and top <= row + 0.5 < top + down:
                expected[row, column] = 255
        if expected.any():
            assert np.array_equal(np.asarray(masks.mask(index, (width, height))), expected)
    whole = BoxMasks(np.array([[2.0, 1.0, 3.0, 4.0], [13.0, 0.0, 5.0, 5.0]]))
    assert np.argwhere(np.asarray(whole.mask(0, (13, 11)))).min(0).tolist() == [1, 2]
    assert np.count_nonzero(np.asarray(whole.mask(0, (13, 11)))) == 12
    with pytest.raises(ImageError, match="lies outside its 13 x 11 pixels"):
        whole.mask(1, (13, 11))
    for bad in ([0, 0, 0, 5], [0, 0, 5, -1], [0, float("nan"), 5, 5]):
        with pytest.raises(SourceError, match="box 2 of 2 has no area"):
            BoxMasks(np.array([[0, 0, 1, 1], bad], dtype=np.float64))
