"""Sources: what they list, in what order, with which labels; what they refuse; what never happens."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lrp_fast.data import FileSource, Source, SourceError, open_source
from lrp_fast.data.source import Texts
from lrp_fast.images import ImageError


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
    with pytest.raises(ValueError, match="known: folder, manifest, webdataset"):
        open_source(tmp_path, "imagenet")
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
    for module in ("lrp_fast.images", "lrp_fast.data.webdataset"):
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
