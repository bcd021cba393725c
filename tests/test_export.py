"""Exports: every value arrives, nothing half-made or foreign is touched, and no more than a slice is in memory."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lrp_fast.export import FORMATS, ExportError, OptionError, export_store
from lrp_fast.export import selection as selections
from lrp_fast.export.selection import Format, Selection, encoded
from lrp_fast.store import DONE, Store
from stores import BITING, CLASSES, MODEL_CLASSES, write_store

pytest.importorskip("zarr")
parquet = pytest.importorskip("pyarrow.parquet")
for name in ("h5py", "yaml"):
    pytest.importorskip(name)

FAILED = (0, 5, 6, 22)
LAYERS = ["layer4.1", "layer3"]
OPTIONS: dict[str, dict[str, Any]] = {
    "npz": {"rows_per_file": 5, "relevance": LAYERS},
    "parquet": {"relevance": LAYERS},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of 23 samples four failed and four more were never computed."""
    return write_store(tmp_path / "store", failed=FAILED, missing_batches=[3])


def done(store: Store) -> Any:
    return np.flatnonzero(store.status[:] == DONE)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# What is exported.


@pytest.mark.parametrize(
    ("slice_samples", "slice_bytes"), [(1024, 1 << 26), (3, 1 << 26), (1024, 4 * 64 * 2), (1024, 1)]
)
def test_slices_cover_what_is_done(
    store: Store, monkeypatch: pytest.MonkeyPatch, slice_samples: int, slice_bytes: int
) -> None:
    monkeypatch.setattr(selections, "SLICE_SAMPLES", slice_samples)
    monkeypatch.setattr(selections, "SLICE_BYTES", slice_bytes)
    told: list[tuple[int, int]] = []
    selection = Selection(store, None, lambda count, total: told.append((count, total)))
    places = done(store)
    assert (len(selection), selection.left_out) == (15, 8) == (len(places), len(store) - len(places))
    for low, high in ((0, 15), (4, 11), (14, 15)):
        slices = list(selection.slices(["layer4.1"], ["layer3"], low, high))
        found = np.concatenate([each.places for each in slices])
        assert np.array_equal(found, places[low:high])
        assert [each.first for each in slices] == (np.cumsum([0, *(len(each.places) for each in slices)]) + low)[
            :-1
        ].tolist()
        for field in ("heatmap", "label", "target", "probability", "leak", "key"):
            values = np.concatenate([getattr(each, field) for each in slices])
            assert np.array_equal(values, getattr(store, field)[:][found]), field
        channels = np.concatenate([each.channels["layer4.1"] for each in slices])
        assert np.array_equal(channels, store.channels["layer4.1"][:][found])
        relevance = store.relevance["layer3"][:][found]
        assert np.array_equal(np.concatenate([each.relevance["layer3"] for each in slices]), relevance)
        assert np.array_equal(np.concatenate(list(selection.relevance_slices("layer3", low, high))), relevance)
    assert told[-1] == (15, 15)
    assert all(count <= total == 15 for count, total in told)


def test_only_a_slice_is_read_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selections, "SLICE_SAMPLES", 3)
    read: list[int] = []
    rows = Store.rows

    def spy(self: Store, names: Any, low: int, high: int) -> Any:
        if set(names) & {"heatmap", "key", "channels/layer3", "relevance/layer3"}:
            read.append(high - low)
        return rows(self, names, low, high)

    monkeypatch.setattr(Store, "rows", spy)
    for name in FORMATS:
        read.clear()
        export_store(store, name, tmp_path / name, **OPTIONS.get(name, {}))
        assert read
        assert max(read) <= 3, name
    monkeypatch.setattr(selections, "SLICE_SAMPLES", 1024)
    monkeypatch.setattr(selections, "SLICE_BYTES", 4 * (5 * 4 * 3) * 2)
    sizes = [len(each) for each in Selection(store).relevance_slices("layer3", 0, 15)]
    assert max(sizes) == 2
    monkeypatch.setattr(selections, "SLICE_BYTES", 4 * (8 * 8 + 5 * 4 * 3 + 7 * 2 * 3) * 2)
    assert max(len(each.key) for each in Selection(store).slices([], LAYERS)) == 2


def test_limit_and_counts(store: Store, tmp_path: Path) -> None:
    exported = export_store(str(store.path), "png", str(tmp_path / "png"), limit=4)
    assert (exported.output, exported.samples, exported.left_out) == (tmp_path / "png", 4, 8)
    assert len(list((tmp_path / "png").glob("*.png"))) == 4
    assert export_store(store, "png", tmp_path / "png", limit=400).samples == 15


def test_a_store_without_a_map_is_refused(tmp_path: Path) -> None:
    empty = write_store(tmp_path / "store", 8, failed=range(4), missing_batches=[1])
    with pytest.raises(ExportError, match="none of its 8 samples is done"):
        export_store(empty, "npz", tmp_path / "npz")
    assert not (tmp_path / "npz").exists()


# The formats.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("field", "scale", "shape"),
    [("heatmap", "scale", (3, 5)), ("relevance/relevance/a", "relevance_scale/relevance/a", (2, 3, 5))],
)
def test_encoded(dtype: str, field: str, scale: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng().normal(size=(4, *shape)).astype(np.float32)
    values *= np.array([1e-30, 1.0, 0.0, 1e30], np.float32).reshape(-1, *[1] * len(shape))
    fields = encoded(field, values, dtype)
    assert fields.keys() == ({field, scale} if dtype == "float16" else {field})
    assert_same_relevance(fields, field, scale, values, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("levels", "relevance"), [(None, ["layer4.1", "layer3"]), (8, ["layer3"]), (None, [])])
def test_npz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, levels: int | None, relevance: list[str]
) -> None:
    monkeypatch.setattr(selections, "SLICE_SAMPLES", 3)
    store = write_store(tmp_path / "store", failed=FAILED, missing_batches=[3], signed=True, levels=levels, size=(9, 6))
    export_store(store, "npz", tmp_path / "npz", dtype=dtype, rows_per_file=4, relevance=relevance)
    files = sorted((tmp_path / "npz").glob("*.npz"))
    assert [file.name for file in files] == [f"00000{number}.npz" for number in range(4)]
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as archive:
            parts.append(dict(archive))
    assert [len(part["key"]) for part in parts] == [4, 4, 4, 3]
    found = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
    places = done(store)
    expected = {field: getattr(store, field)[:][places] for field in ("label", "target", "probability", "leak")}
    expected |= {f"channels/{layer}": store.channels[layer][:][places] for layer in ("layer3", "layer4.1")}
    scales = {"scale", *(f"relevance_scale/{layer}" for layer in relevance)} if dtype == "float16" else set()
    assert found.keys() == {*expected, "key", "heatmap", *(f"relevance/{layer}" for layer in relevance)} | scales
    for field, values in expected.items():
        assert (found[field].dtype, np.array_equal(found[field], values)) == (values.dtype, True), field
    assert found["key"].tolist() == store.key[:][places].tolist()
    assert_same_relevance(found, "heatmap", "scale", store.heatmap[:][places], dtype)
    for layer in relevance:
        name = f"relevance_scale/{layer}"
        assert_same_relevance(found, f"relevance/{layer}", name, store.relevance[layer][:][places], dtype)
    about = json.loads((tmp_path / "npz" / "about.json").read_text())
    assert (about["samples"], about["left_out"], about["store"]["composite"]) == (15, 8, "otsuki2024")
    assert (about["store"]["classes"], about["store"]["model_classes"]) == ([*CLASSES], [*MODEL_CLASSES])


def assert_same_relevance(found: dict[str, Any], field: str, scale: str, expected: Any, dtype: str) -> None:
    """The values are those of the store; of float16, times their scale, within its rounding."""
    assert found[field].dtype == dtype
    if dtype == "float32":
        assert np.array_equal(found[field], expected)
        return
    assert found[scale].dtype == np.float32
    inner = [1] * (expected.ndim - 1)
    error = np.abs(found[field].astype(np.float64) * found[scale].reshape(-1, *inner) - expected)
    largest = np.abs(expected).max(tuple(range(1, expected.ndim)), keepdims=True)
    assert (error <= np.abs(expected) * 2.0**-11 + largest * 2.0**-25).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(selections, "SLICE_SAMPLES", 7)
    file = tmp_path / "maps.parquet"
    export_store(store, "parquet", file, dtype=dtype, channels=["layer4.1"], relevance=["layer3"])
    places = done(store)
    table = parquet.read_table(file)
    assert parquet.ParquetFile(file).metadata.num_row_groups == 3
    maps, relevance = ["heatmap", "scale"], ["relevance/layer3", "relevance_scale/layer3"]
    if dtype == "float32":
        del maps[1], relevance[1]
    names = ["key", "label", "target", "probability", "leak", *maps, "channels/layer4.1", *relevance]
    assert table.column_names == names
    assert table["key"].to_pylist() == store.key[:][places].tolist()
    for field in ("label", "target", "probability", "leak"):
        values = getattr(store, field)[:][places]
        assert np.array_equal(table[field].to_numpy(), values), field
        assert table[field].to_numpy().dtype == values.dtype, field
    assert np.array_equal(
        np.array(table["channels/layer4.1"].to_pylist(), np.float32), store.channels["layer4.1"][:][places]
    )
    for (field, *scale), column in ((maps, store.heatmap), (relevance, store.relevance["layer3"])):
        shape = json.loads(table.schema.field(field).metadata[b"shape"])
        values = np.array(table[field].to_pylist(), dtype).reshape(-1, *shape)
        fields = {field: values, **{name: table[name].to_numpy() for name in scale}}
        assert_same_relevance(fields, field, "".join(scale), column[:][places], dtype)
    about = json.loads(table.schema.metadata[b"lrp_fast"])
    assert (about["samples"], about["left_out"], about["store"]["model"]) == (15, 8, "resnet18")
    assert (about["store"]["classes"], about["store"]["model_classes"]) == ([*CLASSES], [*MODEL_CLASSES])


@pytest.mark.parametrize("signed", [False, True])
def test_png(tmp_path: Path, signed: bool) -> None:
    store = write_store(tmp_path / "store", failed=FAILED, missing_batches=[3], signed=signed, size=(9, 6))
    export_store(store, "png", tmp_path / "png")
    places = done(store)
    with open(tmp_path / "png" / "index.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {file.name for file in (tmp_path / "png").glob("*.png")} == {row["file"] for row in rows}
    assert [row["file"] for row in rows] == [f"{number:06d}.png" for number in range(15)]
    for row, place in zip(rows, places, strict=True):
        record = store.by_key(store.key[int(place)])
        peak = np.abs(record.heatmap).max()
        strength = record.heatmap.astype(np.float64) / peak
        colors = (
            matplotlib.colormaps["RdBu_r"]((strength + 1) / 2) if signed else matplotlib.colormaps["inferno"](strength)
        )
        with Image.open(tmp_path / "png" / row["file"]) as picture:
            found = np.asarray(picture.convert("RGB")) / 255
        assert (np.abs(found - colors[..., :3]) <= 1 / 255).all()
        assert row["key"].removeprefix("'") == record.key
        assert row["signed"] == str(signed)
        assert (row["label"], row["target"]) == ("" if record.label < 0 else str(record.label), str(record.target))
        assert row["label_name"].removeprefix("'") == ("" if record.label < 0 else CLASSES[record.label])
        assert row["target_name"].removeprefix("'") == MODEL_CLASSES[record.target]
        for field, value in (("largest", peak), ("probability", record.probability), ("leak", record.leak)):
            assert float(row[field]) == pytest.approx(value, rel=1e-5)
    cells = [cell for row in rows for cell in (row["key"], row["label_name"], row["target_name"])]
    assert any(cell.startswith("'=") for cell in cells)
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_no_key_becomes_a_path(store: Store, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    for name in FORMATS:
        export_store(store, name, tmp_path / f"out-{name}")
    assert set(tmp_path.iterdir()) - before == {tmp_path / f"out-{name}" for name in FORMATS}
    names = [file.name for file in tmp_path.rglob("out-*/**/*")]
    assert not [name for name in names if any(part in name for part in ("SUM", "up", "passwd", "日本", *BITING))]


# Options.


def test_mistakes_are_named(store: Store, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tiff", {}, "unknown format 'tiff'; known: virelay, npz, png, parquet"),
        ("png", {"dtype": "float16"}, "the format png has no option dtype; it has: none"),
        ("npz", {"source": None}, "no option source; it has: dtype, rows_per_file, channels, relevance"),
        ("png", {"relevance": ["layer3"]}, "the format png has no option relevance; it has: none"),
        ("virelay", {"relevance": ["layer3"]}, "no option relevance; it has: source, channels"),
        ("npz", {"dtype": "int8"}, "unknown dtype 'int8'; known: float32, float16"),
        ("parquet", {"dtype": "float64"}, "unknown dtype 'float64'"),
        ("npz", {"rows_per_file": 0}, "at least 1, got 0"),
        ("npz", {"limit": 0}, "at least 1, got 0"),
    ]
    for layered in ("npz", "parquet", "virelay"):
        cases.append(
            (layered, {"channels": ["layer4.1", "layer9"]}, "no channel relevance of layer9; it has: layer3, layer4.1")
        )
    for layered in ("npz", "parquet"):
        options = {"relevance": ["layer4.1", "layer9"]}
        cases.append((layered, options, "no whole relevance of layer9; it has: layer3, layer4.1"))
    for format_name, options, message in cases:
        with pytest.raises(OptionError, match=message):
            export_store(store, format_name, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(("format_name", "module"), [("virelay", "h5py"), ("virelay", "yaml"), ("parquet", "pyarrow")])
def test_what_is_not_installed_is_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=rf"needs {module}.*pip install 'lrp-fast\[export\]'"):
        export_store(store, format_name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# Where it goes.


@pytest.mark.parametrize("format_name", FORMATS)
def test_its_own_is_replaced_and_nothing_else(store: Store, tmp_path: Path, format_name: str) -> None:
    output = tmp_path / "new" / "out"
    export_store(store, format_name, output, limit=3)
    small = content(output)
    export_store(store, format_name, output)
    assert content(output) != small
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    foreign = output if output.is_file() else output / "notes.txt"
    foreign.write_text("mine")
    before = content(output)
    with pytest.raises(ExportError, match="holds what no export wrote"):
        export_store(store, format_name, output)
    assert content(output) == before
    export_store(store, format_name, output, overwrite=True)
    assert foreign == output or not foreign.exists()
    export_store(store, format_name, output)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_ends_early_leaves_the_place_as_it_was(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, error: type[BaseException]
) -> None:
    monkeypatch.setattr(selections, "SLICE_SAMPLES", 4)

    def stop(count: int, total: int) -> None:
        if count > 4:
            raise error("stopped")

    output = tmp_path / "out"
    for existing in (False, True):
        if existing:
            export_store(store, format_name, output, limit=2)
        before = content(output) if existing else {}
        with pytest.raises(error, match="stopped"):
            export_store(store, format_name, output, on_progress=stop)
        assert {path.name for path in tmp_path.iterdir()} == ({"store", "out"} if existing else {"store"})
        assert (content(output) if existing else {}) == before


def test_a_failed_exchange_brings_the_old_folder_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    export_store(store, "png", output, limit=2)
    before, rename = content(output), os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "made":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        export_store(store, "png", output)
    assert content(output) == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out"}


def test_places_that_are_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "home" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cases = [
        ("png", tmp_path / "file", "is a file, and what is exported is a folder"),
        ("parquet", tmp_path / "folder", "is a folder, and what is exported is a file"),
        ("npz", store.path, "must not lie in each other"),
        ("npz", store.path / "inside", "must not lie in each other"),
        ("npz", tmp_path, "must not lie in each other"),
        ("npz", tmp_path / "home", "the home folder and is not replaced"),
    ]
    for format_name, output, message in cases:
        with pytest.raises(ExportError, match=message):
            export_store(store, format_name, output, overwrite=True)
    monkeypatch.chdir(tmp_path / "folder")
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="the current folder and is not replaced"):
        export_store(store, "npz", ".", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "file", "folder", "home"}


def test_a_link_is_followed_and_an_empty_folder_is_free(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_store(store, "npz", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "000000.npz").is_file()


KILLED = """
import os, signal, sys
from lrp_fast.export import export_store, selection
selection.SLICE_SAMPLES = 4
def told(count, total):
    print(count, flush=True)
    if sys.argv[4] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
export_store(sys.argv[1], sys.argv[2], sys.argv[3], on_progress=told)
"""


def test_after_a_kill_it_is_made_anew_and_two_do_not_mix(store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(store.path), "png", str(tmp_path / "out")]
    killed = subprocess.run([*command, "die"], capture_output=True, text=True, timeout=60, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "4\n"), killed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"store", ".out.lrp-fast-partial"}
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdin is not None
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "4\n"
        with pytest.raises(ExportError, match="another export is being written"):
            export_store(store, "png", tmp_path / "out")
        waiting.stdin.close()
        assert waiting.wait(60) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out"}
    assert len(list((tmp_path / "out").glob("*.png"))) == 15


def test_every_format_says_what_it_is() -> None:
    for format_class in FORMATS.values():
        assert issubclass(format_class, Format)
        assert format_class.summary
