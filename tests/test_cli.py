"""The command line end to end, with a small network and pictures made here: what is written, said, and returned."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.models import resnet18
from typer.testing import CliRunner, Result

from lrp_fast import LRP, Splits, list_composites, open_store
from lrp_fast.cli import app
from lrp_fast.data import KINDS
from lrp_fast.embedded import embedded_pictures
from lrp_fast.images import Preprocessing, load_picture
from lrp_fast.models import list_models, load_model
from lrp_fast.version import VERSION

CLASSES = ("ant", "bee", "=wasp")
SIZE = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ResNet-18 of three classes, with its architecture and class names in the file."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    about = {"arch": "resnet18", "classes": json.dumps(CLASSES)}
    safetensors.torch.save_file(resnet18(num_classes=len(CLASSES)).state_dict(), path, about)
    return path


def draw(path: Path, **options: Any) -> Path:
    generator = np.random.default_rng()
    height, width = generator.integers(40, 90, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


def bomb(path: Path) -> Path:
    """A PNG whose header says 20000 x 20000 pixels."""
    chunks, header = b"", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    for content in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(99))):
        chunks += struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def lrp_fast(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def attribute(weights: Path, images: Path | list[Path], output: Path, *more: object) -> Result:
    paths = images if isinstance(images, list) else [images]
    return lrp_fast("attribute", *paths, "--weights", weights, "--size", SIZE, "--output", output, *more)


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(weights: Path, files: list[Path], target: int | None = None, **options: Any) -> Any:
    """What the Python API gives for the same pictures in one batch."""
    loaded = load_model(None, weights, SIZE)
    inputs = torch.stack([load_picture(path, loaded.preprocessing).tensor for path in files])
    return LRP(loaded.model, **options).explain(inputs, target=target)


def one_line_of_error(result: Result) -> str:
    """The error text, which must be a single line without a traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    return errors[0]


def test_attribute_writes_what_the_api_computes(weights: Path, tmp_path: Path) -> None:
    files = [draw(tmp_path / "in" / f"{name}.png") for name in "abc"]
    result = attribute(weights, tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "3 explained; mean leak" in result.stdout
    api = expected(weights, files)
    probabilities = api.output.double().softmax(1)
    for index, (row, file) in enumerate(zip(rows(tmp_path / "out"), files, strict=True)):
        target = int(api.target[index])
        assert row["file"] == str(file)
        assert (row["class"].lstrip("'"), row["class_index"]) == (CLASSES[target], str(target))
        assert float(row["probability"]) == pytest.approx(float(probabilities[index, target]), rel=1e-4)
        assert float(row["leak"]) == pytest.approx(float(api.leak[index]), rel=1e-3, abs=1e-5)
        heatmap = np.load(tmp_path / "out" / row["map"], allow_pickle=False)
        assert heatmap.dtype == np.float32
        assert np.allclose(heatmap, api.heatmap[index].numpy(), rtol=1e-5, atol=1e-7 * float(heatmap.max()))
        with Image.open(tmp_path / "out" / row["overlay"]) as overlay:
            assert overlay.size == (SIZE, SIZE)
            assert np.asarray(overlay).std() > 5
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<article") == 3
    assert all(f'src="{name}.png"' in page for name in "abc")


def test_the_largest_relevance_glows_in_the_overlay(weights: Path, tmp_path: Path) -> None:
    file = draw(tmp_path / "a.png")
    assert attribute(weights, file, tmp_path / "out", "--smooth", 0).exit_code == 0
    heatmap = np.load(tmp_path / "out" / "a.npy")
    overlay = np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(int)
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert overlay[row, column].sum() > np.median(overlay.sum(-1)) + 150


def test_bad_pictures_are_reported_and_the_others_go_on(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = [draw(folder / "=cmd.png"), draw(folder / "<b>.png"), draw(folder / "c.gif")]
    Image.new("CMYK", (50, 60), (10, 200, 30, 0)).save(folder / "print.jpg")
    Image.fromarray(np.random.default_rng().integers(0, 65536, (50, 60)).astype(np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", (50, 50), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "[red]zero.jpg").write_bytes(b"")
    (folder / "torn.png").write_bytes(good[0].read_bytes()[:300])
    bomb(folder / "zbomb.png")
    missing = tmp_path / "missing.png"
    result = attribute(weights, [folder, missing], tmp_path / "out", "--batch-size", 2)
    assert result.exit_code == 3, result.output
    assert "6 explained, 4 failed" in result.stdout
    by_name = {Path(row["file"].lstrip("'")).name: row for row in rows(tmp_path / "out")}
    assert [Path(row["file"]).name for row in rows(tmp_path / "out")] == [*sorted(os.listdir(folder)), "missing.png"]
    for name, reason in {
        "[red]zero.jpg": "empty",
        "torn.png": "damaged",
        "zbomb.png": "100 megapixels",
        "missing.png": "no such file",
    }.items():
        row = by_name.pop(name)
        assert row["status"] == "failed"
        assert reason in row["reason"]
        assert row["overlay"] == row["map"] == row["probability"] == ""
        assert re.search(rf"failed: .*{re.escape(name)}: .*{reason}", result.stderr)
    assert {row["status"] for row in by_name.values()} == {"ok"}
    assert len(by_name) == 6
    page = (tmp_path / "out" / "index.html").read_text()
    assert "4 not explained" in page
    assert "<b>.png" not in page
    assert "&lt;b&gt;.png" in page


def test_no_cell_starts_a_formula(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("=cmd.png", "@sum.png", "+1.png"):
        draw(Path(name))
    target = CLASSES.index("=wasp")
    result = attribute(weights, [Path("=cmd.png"), Path("@sum.png"), Path("+1.png")], Path("out"), "--target", target)
    assert result.exit_code == 0, result.output
    written = rows(tmp_path / "out")
    assert [row["file"] for row in written] == ["'=cmd.png", "'@sum.png", "'+1.png"]
    assert {row["class"] for row in written} == {"'=wasp"}
    for row in written:
        for cell in row.values():
            assert not cell.startswith(("=", "+", "@", "\t", "\r"))
        assert re.fullmatch(r"[A-Za-z0-9._-]+\.png", row["overlay"])
        assert isinstance(float(row["leak"]), float)
    assert sorted(os.listdir(tmp_path)) == ["+1.png", "=cmd.png", "@sum.png", "out"]


def test_the_page_says_what_was_predicted_instead(weights: Path, tmp_path: Path) -> None:
    file = draw(tmp_path / "a.png")
    predicted = int(expected(weights, [file]).target)
    for target in range(len(CLASSES)):
        assert attribute(weights, file, tmp_path / str(target), "--target", str(target)).exit_code == 0
        page = (tmp_path / str(target) / "index.html").read_text()
        assert ("predicted instead" in page) == (target != predicted)


@pytest.mark.parametrize("target", ["1", "bee", "BEE"])
def test_target_by_number_and_by_name(weights: Path, tmp_path: Path, target: str) -> None:
    file = draw(tmp_path / "a.png")
    assert attribute(weights, file, tmp_path / "out", "--target", target).exit_code == 0
    api = expected(weights, [file], target=1)
    (row,) = rows(tmp_path / "out")
    assert (row["class"], row["class_index"]) == ("bee", "1")
    assert np.allclose(np.load(tmp_path / "out" / "a.npy"), api.heatmap[0].numpy(), rtol=1e-4, atol=1e-9)


def test_composite_and_split_reach_the_explainer(weights: Path, tmp_path: Path) -> None:
    file = draw(tmp_path / "a.png")
    maps: dict[str, np.ndarray] = {}
    cases: dict[str, dict[str, Any]] = {
        "": {},
        "conserving": {"composite": "conserving"},
        "symmetric": {"split": "symmetric"},
        "identity=residual-only,projection=ratio": {"split": Splits(identity="residual-only", projection="ratio")},
    }
    for text, options in cases.items():
        option = "--composite" if "composite" in options else "--split"
        output = tmp_path / f"out-{len(maps)}"
        assert attribute(weights, file, output, *([option, text] if text else [])).exit_code == 0
        maps[text] = np.load(output / "a.npy")
        api = expected(weights, [file], **options)
        assert np.allclose(maps[text], api.heatmap[0].numpy(), rtol=1e-4, atol=1e-4 * float(api.heatmap.max()))
    first, *others = maps.values()
    for other in others:
        assert np.abs(other - first).max() > 0.01 * first.max()


def test_heat_quantization_changes_overlays_and_never_maps(weights: Path, tmp_path: Path) -> None:
    file = draw(tmp_path / "a.png")
    overlays, maps = [], []
    for index, options in enumerate((["--levels", "2"], ["--levels", "8"], ["--no-heat-quantization"])):
        output = tmp_path / str(index)
        assert attribute(weights, file, output, "--smooth", 0, *options).exit_code == 0
        overlays.append(np.asarray(Image.open(output / "a.png")).astype(int))
        maps.append(np.load(output / "a.npy"))
    assert np.array_equal(maps[0], maps[1])
    assert np.array_equal(maps[0], maps[2])
    assert len(np.unique(maps[0])) > 100
    assert np.abs(overlays[0] - overlays[1]).max() > 20
    assert np.abs(overlays[1] - overlays[2]).max() > 5


def test_batch_size_does_not_matter(weights: Path, tmp_path: Path) -> None:
    for name in "abcde":
        draw(tmp_path / "in" / f"{name}.png")
    for size in (1, 2, 5):
        assert attribute(weights, tmp_path / "in", tmp_path / str(size), "--batch-size", size).exit_code == 0
    for name in "abcde":
        first, *others = [np.load(tmp_path / str(size) / f"{name}.npy") for size in (1, 2, 5)]
        for other in others:
            assert np.allclose(first, other, rtol=1e-3, atol=1e-5 * first.max())


def test_names_that_collide_are_numbered(weights: Path, tmp_path: Path) -> None:
    files = [draw(tmp_path / "x" / "cat.png"), draw(tmp_path / "y" / "cat.png"), draw(tmp_path / "y" / "cat.gif")]
    assert attribute(weights, files, tmp_path / "out").exit_code == 0
    assert [row["map"] for row in rows(tmp_path / "out")] == ["cat.npy", "cat-2.npy", "cat-3.npy"]
    maps = [np.load(tmp_path / "out" / row["map"]) for row in rows(tmp_path / "out")]
    assert not np.allclose(maps[0], maps[1])


def test_a_second_run_replaces_ours_and_explains_none_of_them(weights: Path, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    output = tmp_path / "out"
    assert attribute(weights, tmp_path, output).exit_code == 0
    before = np.load(output / "a.npy")
    draw(tmp_path / "a.png")
    assert attribute(weights, tmp_path, output).exit_code == 0
    assert len(rows(output)) == 1
    assert not np.allclose(before, np.load(output / "a.npy"))


def test_a_second_run_leaves_nothing_of_the_first(weights: Path, tmp_path: Path) -> None:
    """What it wrote is told by its own list, and another file of the folder stays."""
    files, output = [draw(tmp_path / f"{name}.png") for name in "abcd"], tmp_path / "out"
    assert attribute(weights, files, output, "--composite", "conserving").exit_code == 0
    (output / "mine.npy").write_bytes(b"mine")
    assert attribute(weights, files[1], output).exit_code == 0
    assert sorted(file.name for file in output.glob("*.*")) == sorted(
        [".lrp-fast-files", "b.jpg", "b.npy", "b.png", "index.html", "mine.npy", "results.csv"]
    )
    assert np.allclose(np.load(output / "b.npy"), expected(weights, [files[1]]).heatmap[0], rtol=1e-3, atol=1e-6)
    result = attribute(weights, output / "b.jpg", output)
    assert (result.exit_code, "b.jpg was written there by an earlier run" in one_line_of_error(result)) == (2, True)
    assert (output / "b.jpg").exists()


def test_a_second_run_interrupted_at_once_leaves_the_first(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = draw(tmp_path / "a.png"), tmp_path / "out"
    assert attribute(weights, file, output).exit_code == 0
    before = {path: path.read_bytes() for path in output.glob("[!.]*")}

    def interrupted(self: LRP, *arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LRP, "explain", interrupted)
    for folder in (output, tmp_path / "new"):
        result = attribute(weights, file, folder)
        assert (result.exit_code, result.stdout) == (130, "")
        assert f"interrupted before anything was done; {folder} is left as it was" in one_line_of_error(result)
    assert {path: path.read_bytes() for path in output.glob("[!.]*")} == before
    assert not (tmp_path / "new" / "results.csv").exists()


def test_a_second_run_in_which_all_fails_leaves_the_first(weights: Path, tmp_path: Path) -> None:
    good, bad, output = draw(tmp_path / "a.png"), tmp_path / "bad.png", tmp_path / "out"
    bad.write_bytes(b"no picture")
    assert attribute(weights, good, output).exit_code == 0
    before = {path: path.read_bytes() for path in output.glob("[!.]*")}
    result = attribute(weights, bad, output)
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"no picture could be explained; {output} is left as it was" in one_line_of_error(result)
    assert {path: path.read_bytes() for path in output.glob("[!.]*")} == before
    assert attribute(weights, bad, tmp_path / "new").exit_code == 3
    assert [row["status"] for row in rows(tmp_path / "new")] == ["failed"]
    assert attribute(weights, [bad, good], output).exit_code == 3
    assert [(row["status"], row["map"]) for row in rows(output)] == [("failed", ""), ("ok", "a.npy")]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_is_used_up_is_said_in_a_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(self: LRP, *arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(LRP, "explain", full)
    result = attribute(weights, draw(tmp_path / "a.png"), tmp_path / "out")
    assert result.exit_code == 1
    assert f"out of memory, try a smaller --batch-size or --size: {error}" in one_line_of_error(result)


def test_foreign_files_are_kept(weights: Path, tmp_path: Path) -> None:
    file, output = draw(tmp_path / "a.png"), tmp_path / "out"
    photograph = draw(output / "a.png").read_bytes()
    result = attribute(weights, file, output)
    assert result.exit_code == 1
    assert "did not write: a.png" in one_line_of_error(result)
    assert (output / "a.png").read_bytes() == photograph
    assert os.listdir(output) == ["a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--composite", "nonsense"], "unknown composite 'nonsense'; known: otsuki2024"),
        (["--split", "nonsense"], "unknown split 'nonsense'; known: ratio"),
        (["--split", "identity=ratio"], "identity=NAME,projection=NAME, got 'identity=ratio'"),
        (["--split", "identity=ratio,projection=nonsense"], "unknown split 'nonsense'"),
        (["--target", "3"], "class 3 is not among the model's 3, 0 to 2"),
        (["--target", "-1"], "class -1 is not among"),
        (["--target=--5"], "no class is called '--5'; the model has 3"),
        (["--target", "cow"], "no class is called 'cow'; the model has 3: ant, bee, =wasp"),
        (["--model", "resnet81"], "unknown model 'resnet81'"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--device", "nonsense"], "'nonsense' cannot be used"),
        (["--device", "meta"], "'meta' cannot be used"),
    ],
)
def test_mistakes_in_the_command(weights: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = attribute(weights, draw(tmp_path / "a.png"), tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in one_line_of_error(result)
    assert not (tmp_path / "out").exists()


def test_more_mistakes_in_the_command(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture = draw(tmp_path / "in" / "a.png")
    result = attribute(weights, tmp_path / "empty", tmp_path / "out")
    assert (result.exit_code, "no picture files in" in one_line_of_error(result)) == (2, True)
    result = attribute(weights, tmp_path / "in", tmp_path / "in")
    assert (result.exit_code, "results need their own" in one_line_of_error(result)) == (2, True)
    result = attribute(weights, picture, picture)
    assert (result.exit_code, "is a file, expected a folder" in one_line_of_error(result)) == (2, True)
    for options in (
        ["--levels", 1],
        ["--batch-size", 0],
        ["--size", 8],
        ["--smooth", -1],
        ["--smooth", "inf"],
        ["--levels", 65537],
        ["--nonsense"],
    ):
        assert attribute(weights, picture, tmp_path / "out", *options).exit_code == 2
    assert lrp_fast("attribute", picture).exit_code == 2
    assert lrp_fast("attribute", picture, "--weights", tmp_path / "none.pth", "-o", tmp_path / "out").exit_code == 2
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_one_line(weights: Path, tmp_path: Path) -> None:
    result = attribute(weights, draw(tmp_path / "a.png"), tmp_path / "out", "--model", "resnet50")
    assert result.exit_code == 1
    assert re.search(r"does not fit resnet50: \d+ missing", one_line_of_error(result))


def test_a_model_without_rules_is_one_line(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("efficientnet_b0", num_classes=2).state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    file = draw(tmp_path / "a.png")
    result = attribute(tmp_path / "weights.safetensors", file, tmp_path / "out", "--model", "timm:efficientnet_b0")
    assert result.exit_code == 1
    assert "timm:efficientnet_b0: " in one_line_of_error(result)


def test_a_model_that_gives_no_numbers_is_one_line(tmp_path: Path) -> None:
    """Weights that are finite can still make none."""
    model = resnet18(num_classes=3)
    model.bn1.running_var[5] = -1.0
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    file = draw(tmp_path / "a.png")
    result = attribute(tmp_path / "weights.safetensors", file, tmp_path / "out", "--model", "resnet18")
    assert result.exit_code == 1
    assert "logits are not finite" in one_line_of_error(result)


def test_a_mean_over_nothing_is_not_reported(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    result = attribute(weights, [tmp_path / "empty.jpg"], tmp_path / "out")
    assert result.exit_code == 3
    assert "0 explained, 1 failed; see" in result.stdout
    assert "leak" not in result.stdout
    assert "mean leak" not in (tmp_path / "out" / "index.html").read_text()


def test_a_map_that_is_not_finite_is_a_failure(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [draw(tmp_path / f"{name}.png") for name in "ab"]
    real = LRP.explain

    def spoiled(self: LRP, *arguments: Any, **options: Any) -> Any:
        result = real(self, *arguments, **options)
        result.heatmap[0, 3, 3] = torch.nan
        return result

    monkeypatch.setattr(LRP, "explain", spoiled)
    result = attribute(weights, files, tmp_path / "out")
    assert result.exit_code == 3
    assert [row["status"] for row in rows(tmp_path / "out")] == ["failed", "ok"]
    assert not (tmp_path / "out" / "a.npy").exists()


def test_an_interruption_keeps_what_was_done(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [draw(tmp_path / f"{name}.png") for name in "abcde"]
    real, calls = LRP.explain, []

    def interrupted(self: LRP, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(LRP, "explain", interrupted)
    result = attribute(weights, files, tmp_path / "out", "--batch-size", 2)
    assert result.exit_code == 130
    assert "interrupted" in one_line_of_error(result)
    assert [Path(row["file"]).name for row in rows(tmp_path / "out")] == ["a.png", "b.png"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<article") == 2
    assert "interrupted" in page


def test_a_real_ctrl_c(weights: Path, tmp_path: Path) -> None:
    files = [draw(tmp_path / "in" / f"{index}.png") for index in range(400)]
    output = tmp_path / "out"
    arguments = ["attribute", tmp_path / "in", "--weights", weights, "--batch-size", 1, "--size", 32, "-o", output]
    command = [sys.executable, "-m", "lrp_fast", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 60
        while not (output / "results.csv").exists() or len(rows(output)) < 2:
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no results after a minute: {process.communicate()}")
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = rows(output)
    assert 2 <= len(done) < len(files)
    for row in done:
        assert np.load(output / row["map"]).shape == (32, 32)
    assert (output / "index.html").read_text().count("<article") in (len(done), len(done) - 1)


def attribute_dataset(weights: Path, source: Path, store: Path, *more: object) -> Result:
    pytest.importorskip("zarr")
    fixed = ["--weights", weights, "--size", SIZE, "--workers", 0, "--batch-size", 2, "--output", store]
    return lrp_fast("attribute-dataset", "--source", source, *fixed, *more)


def test_attribute_dataset_stores_what_the_api_computes(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    files = [draw(folder / "=a" / "1.png"), draw(folder / "=a" / "2.png"), draw(folder / "b" / "[red]3.png")]
    options = ["--split", "symmetric", "--dtype", "float64", "--channels", "layer3,layer4", "--levels", 16]
    result = attribute_dataset(weights, folder, folder / "store", *options)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"3 of 3 explained, [\d,]+ bytes per image, in .*store; 3 in this run; .*waited for decode", result.stdout
    )
    assert re.search(r"2/3, 0 failed, \d+ s left, .* images/s", result.stderr)
    store = open_store(folder / "store")
    api = expected(weights, files, split="symmetric", dtype=torch.float64)
    ladder = (api.heatmap.amax((1, 2)) - api.heatmap.amin((1, 2))) / 15
    below = api.heatmap - torch.from_numpy(store.heatmap[:])
    assert ((below > -1e-6 * ladder[:, None, None]) & (below < (1 + 1e-6) * ladder[:, None, None])).all()
    assert store.target[:].tolist() == api.target.tolist()
    assert store.label[:].tolist() == [0, 0, 1]
    assert {name: column[:].shape[1] for name, column in store.channels.items()} == {"layer3": 256, "layer4": 512}
    for name, value in {"dtype": "float64", "splits": "symmetric", "model": "resnet18", "classes": ["=a", "b"]}.items():
        assert store.attributes[name] == value
    again = attribute_dataset(weights, folder, folder / "store", *options)
    assert (again.exit_code, "nothing was left to do" in again.stdout) == (0, True)


def test_attribute_dataset_reports_failures_and_retries(weights: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    content = [draw(folder / f"{name}.png") for name in ("a", "[b]", "c")][1].read_bytes()
    (folder / "[b].png").write_bytes(content[:200])
    result = attribute_dataset(weights, folder, store)
    assert result.exit_code == 3
    assert "2 of 3 explained, 1 failed (see failures.csv)" in result.stdout
    assert re.search(r"failed: \[b\]\.png: damaged", result.stderr)
    (folder / "[b].png").write_bytes(content)
    assert attribute_dataset(weights, folder, store).exit_code == 3
    assert attribute_dataset(weights, folder, store, "--retry-failed").exit_code == 0
    refused = attribute_dataset(weights, folder, store, "--composite", "epsilon")
    assert refused.exit_code == 2
    assert "composite: 'otsuki2024' there, 'epsilon' now" in one_line_of_error(refused)


def test_mistakes_in_attribute_dataset(weights: Path, tmp_path: Path) -> None:
    picture, store = draw(tmp_path / "in" / "a.png"), tmp_path / "store"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, list[object], str]] = [
        (tmp_path / "empty", [], "holds no pictures"),
        (picture, [], "neither a folder nor"),
        (picture.parent, ["--kind", "mnist"], f"unknown kind 'mnist'; known: {', '.join(KINDS)}"),
        (picture.parent, ["--dtype", "float16"], "unknown dtype 'float16'; known: float32, bfloat16, float64"),
        (picture.parent, ["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (picture.parent, ["--backend", "reference", "--dtype", "float32"], "the reference computes in float64"),
        (picture.parent, ["--channels", "layer9"], "no layer named 'layer9'"),
    ]
    for source, options, message in cases:
        result = attribute_dataset(weights, source, store, *options)
        assert result.exit_code == 2, result.output
        assert message in one_line_of_error(result)
    result = attribute_dataset(weights, picture.parent, picture.parent)
    assert (result.exit_code, "results need their own" in one_line_of_error(result)) == (2, True)
    result = attribute_dataset(weights, picture.parent, tmp_path / "empty")
    assert result.exit_code == 0
    (tmp_path / "full" / "foreign").mkdir(parents=True)
    result = attribute_dataset(weights, picture.parent, tmp_path / "full")
    assert (result.exit_code, "is not a store" in one_line_of_error(result)) == (1, True)
    assert not store.exists()


def test_ctrl_c_leaves_a_store_that_goes_on(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    for index in range(300):
        draw(tmp_path / "in" / f"{index}.png")
    store = tmp_path / "store"
    arguments = ["--source", tmp_path / "in", "--weights", weights, "--size", 32, "--batch-size", 2, "-o", store]
    command = [sys.executable, "-m", "lrp_fast", "attribute-dataset", *map(str, arguments), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(store.glob(".staging/*.npz")):
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no results after a minute: {process.communicate()}")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the decoding processes too
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the same command continues" in errors
    done = int(re.findall(r"(\d+) of 300 explained", output)[0])
    assert 0 < done < 300
    assert int((open_store(store).status[:] == 1).sum()) == done


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_ctrl_c_while_the_decoding_processes_start(tmp_path: Path, seconds: float) -> None:
    """The server that forks them imports for a while, and hears of it too."""
    pytest.importorskip("zarr")
    arguments = ["--source", "embedded:2000", "--size", 32, "--batch-size", 2, "--workers", 2, "-o", tmp_path / "store"]
    command = [sys.executable, "-m", "lrp_fast", "attribute-dataset", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not _has_a_fork_server(process.pid):
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no decoding processes after a minute: {process.communicate()}")
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1:] == ["error: interrupted; the same command continues"]
    assert "Traceback" not in errors


def _has_a_fork_server(session: int) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session and b"forkserver" in (process / "cmdline").read_bytes():
                return True
        except (ProcessLookupError, FileNotFoundError):
            continue
    return False


def test_demo(tmp_path: Path) -> None:
    result = lrp_fast("demo", "--output", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    numbers = dict(re.findall(r"│ ([a-z ]+?) +│ ([^│]+?) +│", result.stdout))
    right, total = map(int, numbers["accuracy"].split(" of "))
    assert total == int(numbers["explained"]) == len(rows(tmp_path / "demo")) == 12
    assert right >= 10

    inside, area = [], []
    for row, picture in zip(rows(tmp_path / "demo"), embedded_pictures(), strict=True):
        positive = np.load(tmp_path / "demo" / row["map"]).clip(min=0)
        with Image.open(picture.mask_path) as image:
            mask = np.asarray(image.convert("L")) > 0
        inside.append(positive[mask].sum() / positive.sum())
        area.append(mask.mean())
    assert float(numbers["relevance in the masks"].removesuffix(" %")) == pytest.approx(100 * np.mean(inside), abs=0.1)
    assert float(numbers["area of the masks"].removesuffix(" %")) == pytest.approx(100 * np.mean(area), abs=0.1)
    assert np.mean(inside) > 3 * np.mean(area)
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("<article") == 12
    assert page.count("relevance in the mask</dt>") == 12


def test_tables_come_from_the_registries() -> None:
    result = lrp_fast("composites")
    assert result.exit_code == 0
    assert re.findall(r"^│ (\w+) +│", result.stdout, re.MULTILINE) == list(list_composites())
    result = lrp_fast("models")
    assert result.exit_code == 0
    assert re.findall(r"^│ ([\w:]+) +│", result.stdout, re.MULTILINE) == list(list_models())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to write to")
@pytest.mark.parametrize("command", ["composites", "models", "methods"])
def test_a_list_that_cannot_be_written_is_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "lrp_fast", command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


def test_version_and_help() -> None:
    assert lrp_fast("--version").stdout.strip() == f"lrp-fast {VERSION}"
    assert lrp_fast("--help").exit_code == 0
    run = subprocess.run([sys.executable, "-m", "lrp_fast", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"lrp-fast {VERSION}"


def test_importing_the_command_line_is_light() -> None:
    heavy = ("torchvision", "timm", "matplotlib", "triton", "zarr", "pyarrow")
    program = f"import sys, lrp_fast.cli; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_preprocessing_can_be_overridden(weights: Path, tmp_path: Path) -> None:
    file, other = draw(tmp_path / "a.png"), Preprocessing(90, SIZE, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0), "nearest")
    options = ["--resize", 90, "--mean", "0.5,0.4, 0.3", "--std", "0.25,0.5,1", "--interpolation", "NEAREST"]
    assert attribute(weights, file, tmp_path / "out", *options).exit_code == 0
    loaded = load_model(None, weights, SIZE)
    heatmap = torch.from_numpy(np.load(tmp_path / "out" / "a.npy"))
    ours = LRP(loaded.model).explain(load_picture(file, other).tensor[None]).heatmap[0]
    usual = LRP(loaded.model).explain(load_picture(file, loaded.preprocessing).tensor[None]).heatmap[0]
    assert (heatmap - ours).norm() <= 1e-4 * ours.norm()
    assert (heatmap - usual).norm() > 0.1 * usual.norm()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "shorter side to 90 px (nearest), minus 0.5, 0.4, 0.3, over 0.25, 0.5, 1" in page


def test_mistakes_in_the_preprocessing(weights: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[object], str]] = [
        (["--resize", 50], f"the crop must lie in 1..50 (the resized shorter side), got {SIZE}"),
        (["--mean", "0.5,x,0.5"], "--mean: expected three numbers such as 0.5,0.5,0.5, got '0.5,x,0.5'"),
        (["--mean", "0.5"], "mean must be three finite numbers"),
        (["--mean", "123.7,116.3,103.5"], "mean is for pixel values in [0, 1]"),
        (["--std", "1,0,1"], "std must be positive"),
        (["--std", "1,nan,1"], "std must be three finite numbers"),
        (["--interpolation", "psychic"], "unknown interpolation 'psychic'; known: nearest, "),
    ]
    for options, message in cases:
        result = attribute(weights, draw(tmp_path / "a.png"), tmp_path / "out", *options)
        assert result.exit_code == 2, result.output
        assert message in one_line_of_error(result)
    assert not (tmp_path / "out").exists()
