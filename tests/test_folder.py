"""The output folder: safe names, a table that no spreadsheet executes, and never a file of somebody else's replaced."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from lrp_fast.images import MANIFEST, mark, written_into
from lrp_fast.report.folder import (
    COLUMNS,
    ForeignFileError,
    OutputFolder,
    Row,
    brief_names,
    encode_image,
    encode_map,
    output_names,
    printable,
    safe_cell,
)


def table(folder: Path) -> list[list[str]]:
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_output_names_are_safe_and_distinct() -> None:
    stems = ["cat", "=cmd|calc", "..", ".hidden", "-rf", "<b>", "a b\n", "日本", "x" * 300, "a/../b", "..\\up", "%2e"]
    names = output_names([Path(f"/pictures/{stem}.png") for stem in stems])
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,110}", name) for name in names)
    assert len({name.lower() for name in names}) == len(names)
    assert names[0] == "cat"
    assert names[1] == "_cmd_calc"


def test_output_names_are_numbered_where_they_collide() -> None:
    paths = [Path(name) for name in ("a/cat.png", "b/cat.jpg", "Cat.gif", "cat-2.png", "b/cat.png")]
    assert output_names(paths) == ["cat", "cat-2", "Cat-3", "cat-2-2", "cat-4"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_text_cell_starts_a_formula(tmp_path: Path, start: str) -> None:
    row = Row(f"{start}cmd.png", f"{start}class", 3, 0.25, -0.5)
    with OutputFolder(tmp_path, []) as folder:
        folder.add_row(row)
        folder.add_row(Row("ok.png", reason=f"{start}reason"))
    header, first, second = table(tmp_path)
    assert header == list(COLUMNS)
    assert first[:5] == [f"'{start}cmd.png", f"'{start}class", "3", "0.25", "-0.5"]
    assert second[5:7] == ["failed", f"'{start}reason"]


def test_ordinary_cells_stay_and_numbers_are_numbers(tmp_path: Path) -> None:
    text = 'a "quoted", <b>name</b>\nwith a newline.png'
    leak, probability = float(np.random.default_rng().normal()) * 1e-5, float(np.random.default_rng().random())
    with OutputFolder(tmp_path, []) as folder:
        folder.add_row(Row(text, "great grey owl", 24, probability, leak, "", "x.png", "x.npy"))
    _, row = table(tmp_path)
    assert row[:3] == [text, "great grey owl", "24"]
    assert float(row[3]) == pytest.approx(probability, rel=1e-5)
    assert float(row[4]) == pytest.approx(leak, rel=1e-5)
    assert row[5:] == ["ok", "", "x.png", "x.npy"]
    assert safe_cell("plain") == "plain"


def test_a_name_that_is_not_text_can_be_written(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"caf\xe9.png"))
    with OutputFolder(tmp_path, []) as folder:
        folder.add_row(Row(printable(odd)))
    assert table(tmp_path)[1][0] == "caf\\xe9.png"


def test_rows_reach_the_disk_at_once(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "made" / "here", []) as folder:
        for count in range(1, 4):
            folder.add_row(Row(f"{count}.png"))
            assert len(table(folder.path)) == 1 + count


def test_our_files_are_replaced_and_foreign_ones_never(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, ["cat.png"]) as folder:
        folder.write("cat.png", b"first")
    with OutputFolder(tmp_path, ["cat.png", "dog.png"]) as folder:
        folder.write("cat.png", b"second")
    assert (tmp_path / "cat.png").read_bytes() == b"second"
    (tmp_path / "dog.png").write_bytes(b"a photograph")
    with pytest.raises(ForeignFileError, match=r"did not write: dog\.png$"), OutputFolder(tmp_path, ["dog.png"]):
        pass
    assert (tmp_path / "dog.png").read_bytes() == b"a photograph"
    with OutputFolder(tmp_path, ["cat.png"]) as folder:  # other files in the folder do no harm
        folder.write("cat.png", b"third")
    assert len(table(tmp_path)) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_later_run_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    for names in (["a.png", "a.npy"], ["b.png", "b.npy", "b.jpg"]):
        with OutputFolder(tmp_path, names) as folder:
            for name in names:
                folder.write(name, name.encode())
            folder.add_row(Row(names[0]))
            folder.write("index.html", b"page")
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "c.npy").write_text("mine too")
        assert contents(tmp_path).keys() - {"notes.txt", "c.npy"} == {*names, "results.csv", "index.html", MANIFEST}
    assert [row[0] for row in table(tmp_path)] == ["file", "b.png"]
    (tmp_path / "a.png").write_text("a photograph of that name")
    with OutputFolder(tmp_path, ["b.png"]) as folder:
        folder.add_row(Row("b.png"))
    assert contents(tmp_path).keys() == {"a.png", "notes.txt", "c.npy", "results.csv", MANIFEST}


def test_what_was_put_in_the_place_of_a_result_is_not_ours(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, ["dog.png", "dog.npy"]) as folder:
        folder.write("dog.png", b"overlay")
        folder.write("dog.npy", b"map")
    (tmp_path / "dog.png").write_bytes(b"a photograph")
    with OutputFolder(tmp_path, ["cat.png"]) as folder:
        folder.write("cat.png", b"overlay")
    assert contents(tmp_path).keys() == {"dog.png", "cat.png", "results.csv", MANIFEST}
    assert (tmp_path / "dog.png").read_bytes() == b"a photograph"


def test_a_run_that_is_interrupted_while_it_removes_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFolder(tmp_path, ["a.png", "b.png"]) as folder:
        folder.write("a.png", b"a")
        folder.write("b.png", b"b")
    with OutputFolder(tmp_path, ["c.png"]) as folder:
        monkeypatch.setattr(Path, "unlink", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folder.write("c.png", b"c")
        assert folder.begun


def test_a_file_is_listed_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_and_killed(path: Path, content: bytes, sync: bool) -> None:
        path.write_bytes(content)
        raise KeyboardInterrupt

    with OutputFolder(tmp_path, ["a.png", "a.npy"]) as folder, monkeypatch.context() as patched:
        folder.write("a.png", b"overlay")
        patched.setattr("lrp_fast.report.folder.write_whole", written_and_killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write("a.npy", b"half")
    with OutputFolder(tmp_path, ["a.npy"]) as folder:  # or it would count as somebody else's
        folder.write("a.npy", b"whole")
    assert (tmp_path / "a.npy").read_bytes() == b"whole"


def test_until_something_is_written_an_earlier_run_stays(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, ["a.png"]) as folder:
        folder.write("a.png", b"a")
        folder.add_row(Row("a.png"))
        folder.write("index.html", b"page")
    before, ours = contents(tmp_path), written_into(tmp_path)
    with OutputFolder(tmp_path, ["b.png"]) as folder:
        assert not folder.begun
    after = contents(tmp_path)
    assert written_into(tmp_path) == ours
    assert after | {MANIFEST: b""} == before | {MANIFEST: b""}


def test_a_list_that_was_tampered_with_removes_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "output"
    (output / "deep" / "folder.png").mkdir(parents=True)
    precious = [tmp_path / "a.png", output / "deep" / "b.png", output / "c.txt", output / ".d.png"]
    for file in precious:
        file.write_text("precious")
    (output / "link.png").symlink_to(tmp_path / "a.png")
    (output / "e.png").mkdir()
    names = ["../a.png", str(tmp_path / "a.png"), "deep/b.png", "c.txt", ".d.png", "link.png", "e.png", "..", "", "\0.png"]
    lines = [f"{name}\t{'' if chr(0) in name else mark(output / name)}" for name in names]
    (output / MANIFEST).write_text("\n".join(lines))
    with OutputFolder(output, ["new.png"]) as folder:
        folder.write("new.png", b"x")
    assert all(file.read_text() == "precious" for file in precious)
    assert (output / "e.png").is_dir()
    assert not (output / "link.png").is_symlink()


@pytest.mark.parametrize("name", ["results.csv", "index.html"])
def test_a_foreign_table_or_page_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ForeignFileError, match=name), OutputFolder(tmp_path, []):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_links_are_not_followed(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    with OutputFolder(output, ["cat.png"]) as folder:
        folder.write("cat.png", b"x")
    for name in ("cat.png", "results.csv"):
        (output / name).unlink()
        (output / name).symlink_to(elsewhere)
    with OutputFolder(output, ["cat.png"]) as folder:
        folder.write("cat.png", b"y")
        folder.add_row(Row("cat.png"))
    assert elsewhere.read_text() == "precious"
    assert (output / "cat.png").read_bytes() == b"y"
    dangling = output / "dog.png"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ForeignFileError, match=r"dog\.png"), OutputFolder(output, ["dog.png"]):
        pass


def test_only_planned_names_are_written(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with OutputFolder(output, ["cat.png"]) as folder, pytest.raises(ValueError, match="not among the files"):
        folder.write("../outside.png", b"x")
    assert not (tmp_path / "outside.png").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFolder(tmp_path, ["cat.png"]) as folder:
        folder.write("cat.png", b"whole")

        def fail(*names: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("lrp_fast.report.folder.os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            folder.write("cat.png", b"half")
    assert (tmp_path / "cat.png").read_bytes() == b"whole"


def test_brief_names() -> None:
    assert brief_names(["/x/a.png", "/x/b/c.png"]) == {"/x/a.png": "a.png", "/x/b/c.png": "b/c.png"}
    assert brief_names(["pictures/a.png"]) == {"pictures/a.png": "a.png"}
    assert brief_names(["a.png", "b/c.png"]) == {"a.png": "a.png", "b/c.png": "b/c.png"}
    assert brief_names(["/x/a.png", "b.png"]) == {"/x/a.png": "/x/a.png", "b.png": "b.png"}
    assert brief_names([]) == {}


def test_encoded_maps_and_pictures_read_back() -> None:
    heatmap = torch.randn(5, 7)
    assert np.array_equal(np.load(io.BytesIO(encode_map(heatmap)), allow_pickle=False), heatmap.numpy())
    pixels = np.random.default_rng().integers(0, 256, (6, 4, 3), dtype=np.uint8)
    encoded = encode_image(Image.fromarray(pixels), "PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), pixels)
