"""``lrp-fast export``: what is written, said, and returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lrp_fast.cli import app
from lrp_fast.cli import export as command
from lrp_fast.data import open_source
from lrp_fast.export import selection
from lrp_fast.store import Store
from stores import CLASSES, write_store

pytest.importorskip("zarr")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", failed=[2], missing_batches=[4])


def export(store: Store, output: Path, *arguments: object) -> Result:
    fixed = ["export", store.path, "--output", output]
    return CliRunner().invoke(app, [str(each) for each in (*fixed, *arguments)], catch_exceptions=False)


def test_what_is_said(store: Store, tmp_path: Path) -> None:
    result = export(store, tmp_path / "[red]png", "--format", "png")
    assert result.exit_code == 0, result.output
    assert f"18 samples as png in {tmp_path}/[red]png, 5 left out that failed or are not computed yet" in result.stdout
    assert len(list((tmp_path / "[red]png").glob("*.png"))) == 18
    again = export(store, tmp_path / "[red]png", "--format", "png", "--limit", 2)
    assert again.stdout.startswith("2 samples as png")


def test_options_arrive(store: Store, tmp_path: Path) -> None:
    options = ["--dtype", "float16", "--channels", "layer4.1,layer3", "--limit", 7]
    assert export(store, tmp_path / "npz", "--format", "npz", "--rows-per-file", 5, *options).exit_code == 0
    files = sorted((tmp_path / "npz").glob("*.npz"))
    with np.load(files[0]) as first, np.load(files[1]) as second:
        assert (first["heatmap"].dtype, len(first["heatmap"]), len(second["heatmap"])) == (np.float16, 5, 2)
        assert {name for name in first if name.startswith("channels")} == {"channels/layer3", "channels/layer4.1"}
    assert export(store, tmp_path / "a.parquet", "--format", "parquet", "--channels", "layer3").exit_code == 0
    assert parquet.read_schema(tmp_path / "a.parquet").names[-1] == "channels/layer3"
    layers = ["--relevance", "layer4.1", "--relevance", "layer3"]
    assert export(store, tmp_path / "a.parquet", "--format", "parquet", *layers).exit_code == 0
    assert parquet.read_schema(tmp_path / "a.parquet").names[-2:] == ["relevance/layer4.1", "relevance/layer3"]
    assert export(store, tmp_path / "npz", "--format", "npz", "--relevance", "layer4.1,layer3").exit_code == 0
    with np.load(tmp_path / "npz" / "000000.npz") as file:
        assert {name for name in file if name.startswith("relevance")} == {"relevance/layer3", "relevance/layer4.1"}


def test_virelay_with_its_pictures(tmp_path: Path) -> None:
    for index in range(6):
        file = tmp_path / "pictures" / CLASSES[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 20 * index, np.uint8)).save(file)
    source = open_source(tmp_path / "pictures")
    store = write_store(tmp_path / "pictures" / "store", 6, source=source, labels=source.labels.tolist())
    without = export(store, tmp_path / "project", "--format", "virelay")
    assert (without.exit_code, "give the data set that was explained (--source)" in without.stdout) == (0, True)
    result = export(store, tmp_path / "project", "--format", "virelay", "--source", tmp_path / "pictures")
    assert (result.exit_code, result.stdout.count("note:")) == (0, 0), result.output
    with h5py.File(tmp_path / "project" / "dataset.h5") as file:
        assert [int(picture.mean()) for picture in file["data"]] == [0, 40, 80, 20, 60, 100]
    other = export(store, tmp_path / "project", "--format", "virelay", "--source", "embedded:6", "--kind", "embedded")
    assert (other.exit_code, "this is not the data set of" in other.stderr) == (1, True)


def test_mistakes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (9, 9)).save(pictures / "a.png")
    cases: list[tuple[Path, list[object], int, str]] = [
        (tmp_path / "out", ["--format", "tiff"], 2, "unknown format 'tiff'; known: virelay, npz, png, parquet"),
        (tmp_path / "out", ["--format", "png", "--dtype", "float16"], 2, "the format png has no option dtype"),
        (tmp_path / "out", ["--format", "npz", "--channels", "layer9"], 2, "it has: layer3, layer4.1"),
        (tmp_path / "out", ["--format", "npz", "--relevance", "layer3,layer9"], 2, "no whole relevance of layer9"),
        (tmp_path / "out", ["--format", "png", "--relevance", "layer3"], 2, "the format png has no option relevance"),
        (tmp_path / "out", ["--format", "npz", "--source-split", "val"], 2, "give --source too"),
        (tmp_path / "out", ["--format", "virelay", "--source", pictures, "--source-split", "x"], 2, "no split 'x'"),
        (tmp_path / "out", ["--format", "npz", "--kind", "folder"], 2, "give --source too"),
        (tmp_path / "out", ["--format", "virelay", "--source", pictures, "--kind", "x"], 2, "unknown kind 'x'"),
        (tmp_path / "out", ["--format", "virelay", "--source", tmp_path / "none"], 2, "--source: there is no"),
        (pictures, ["--format", "virelay", "--source", pictures, "--overwrite"], 2, "or holds the data set"),
        (tmp_path / "foreign", ["--format", "npz"], 1, "holds what no export wrote"),
        (store.path, ["--format", "npz", "--overwrite"], 1, "must not lie in each other"),
    ]
    for output, options, code, message in cases:
        result = export(store, output, *options)
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True), result.output
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "foreign" / "notes.txt").read_text() == "mine"
    assert export(store, tmp_path / "foreign", "--format", "npz", "--overwrite").exit_code == 0
    assert not (tmp_path / "foreign" / "notes.txt").exists()
    no_store = CliRunner().invoke(app, ["export", str(pictures), "-o", str(tmp_path / "out"), "--format", "npz"])
    assert (no_store.exit_code, "is not a store" in no_store.stderr) == (1, True)


def test_progress_is_told_in_lines(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SLICE_SAMPLES", 8)
    monkeypatch.setattr("lrp_fast.cli.progress.PLAIN_SECONDS", 0.0)
    result = export(store, tmp_path / "png", "--format", "png")
    assert result.stderr.splitlines() == ["7/18 written", "15/18 written", "18/18 written"]


def test_ctrl_c_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **numbers: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Progress, "update", interrupted)
    result = export(store, tmp_path / "out", "--format", "npz")
    assert (result.exit_code, "interrupted" in result.stderr) == (130, True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
