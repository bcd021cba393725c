"""``lrp-fast evaluate`` end to end on drawn pictures: exit codes, what is said, written, continued and refused."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from lrp_fast import LRP
from lrp_fast.cli import app
from lrp_fast.cli import evaluate as command
from lrp_fast.data import open_source
from lrp_fast.images import decode_image
from lrp_fast.methods import PRESETS, Method, list_methods
from lrp_fast.metrics import insertion_deletion
from lrp_fast.models import load_model
from lrp_fast.report.scores import number

COUNT, SIZE, STEP = 6, 64, 1500


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lrp_fast(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def evaluate(output: Path, *more: object, source: object = f"embedded:{COUNT}:5") -> Result:
    return lrp_fast("evaluate", "--source", source, "--size", SIZE, "--step", STEP, "--output", output, *more)


def table(output: Path) -> dict[str, dict[str, str]]:
    with open(output / "table.csv", newline="") as file:
        return {line["method"]: line for line in csv.DictReader(file)}


def error_of(result: Result) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_methods_by_name(tmp_path: Path) -> None:
    names = ("otsuki2024:ratio/ratio", "conserving+quantized", "input-x-gradient")
    result = evaluate(tmp_path / "out", "--methods", ",".join(names), "--batch-size", 3)
    assert result.exit_code == 0, result.output
    lines = table(tmp_path / "out")
    assert list(lines) == [*names, "random", "random-two-level"]

    loaded, source = load_model(size=SIZE), open_source(f"embedded:{COUNT}:5")
    framed = [loaded.preprocessing.frame(decode_image(source.read(index))) for index in range(COUNT)]
    images = torch.stack([loaded.preprocessing.normalize(image) for image in framed])
    explainer = LRP(loaded.model)
    heatmaps = torch.cat([explainer.explain(batch, relevance=False).heatmap for batch in images.split(3)])
    labels = torch.from_numpy(source.labels)
    for order in ("rank", "threshold"):
        mean = float(insertion_deletion(loaded.model, images, heatmaps, labels, step=STEP, order=order).id.mean())
        assert float(lines[names[0]][f"{order}_id_mean"]) == pytest.approx(mean, abs=1e-4)
        assert number(f"{order}_id", mean) in result.stdout
    leaks = [float(lines[name]["leak_mean"]) for name in names[:2]]
    assert leaks[0] > 0.01
    assert leaks[1] < 1e-5
    assert lines[names[2]]["leak_mean"] == ""
    assert [line for line in result.stderr.splitlines() if re.match(r"\d/5 ", line)] == [
        f"{number}/5 {name}" for number, name in enumerate(lines, 1)
    ]
    page = (tmp_path / "out" / "index.html").read_text()
    for name in lines:
        assert page.count(f"{name} of 5/0000") == COUNT  # the alternative text of its maps


def test_the_same_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    stops = ["edges"]

    def counted(name: str) -> Method:
        def count(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
            if name in stops:
                raise KeyboardInterrupt
            computed.append(name)
            return images[:, 0].abs()

        return count

    monkeypatch.setattr(command, "find_method", counted)
    arguments = ("--methods", "first,edges,random", "--metrics", "insertion-deletion,time", "--sanity")
    result = evaluate(tmp_path / "out", *arguments)
    assert result.exit_code == 130
    assert "interrupted; the same command continues" in error_of(result)
    assert set(computed) == {"first"} == table(tmp_path / "out").keys()

    stops.clear()
    computed.clear()
    result = evaluate(tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert set(computed) == {"edges", "random"}
    assert list(table(tmp_path / "out")) == ["first", "edges", "random", "random-two-level"]
    assert (tmp_path / "out" / "sanity.png").exists()

    result = evaluate(tmp_path / "out", *arguments, "--patch", 2, "--step", 700, "--protocol", "rank")
    assert result.exit_code == 2
    assert "patch: 1 there, 2 now; protocols: ['rank', 'threshold'] there, ['rank'] now" in error_of(result)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    result = evaluate(tmp_path / "other", *arguments)
    assert (result.exit_code, "not those of an evaluation" in error_of(result)) == (1, True)


def test_a_missing_library_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    result = evaluate(tmp_path / "out", "--methods", "input-x-gradient,otsuki2024", "--metrics", "leak,time")
    assert result.exit_code == 3
    assert "failed: input-x-gradient: this method needs captum" in result.stderr
    lines = table(tmp_path / "out")
    assert "pip install 'lrp-fast[baselines]'" in lines["input-x-gradient"]["reason"]
    assert float(lines["otsuki2024"]["leak_mean"]) > 0
    assert "pip install" in (tmp_path / "out" / "index.html").read_text()


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    source = open_source("embedded:4:8")
    for index, name in enumerate(("striped disc", "dotted disc", "striped disc", "dotted disc")):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{index}.png").write_bytes(source.read(index))
    (tmp_path / "in" / "dotted disc" / "bad.png").write_bytes(b"no picture")
    arguments = ("--methods", "edges", "--metrics", "insertion-deletion", "--protocol", "rank")
    result = evaluate(tmp_path / "out", *arguments, source=tmp_path / "in")
    assert result.exit_code == 3
    assert "1 pictures could not be read" in result.stdout
    assert table(tmp_path / "out")["edges"]["rank_id_count"] == "4"
    result = evaluate(tmp_path / "even", *arguments, "--per-class", "--limit", 3, "--seed", 1, source=tmp_path / "in")
    settings = json.loads((tmp_path / "even" / "settings.json").read_text())["settings"]
    assert (settings["per_class"], settings["limit"], settings["seed"]) == (True, 3, 1)
    (tmp_path / "in" / "striped disc").rename(tmp_path / "in" / "stripy disc")
    result = evaluate(tmp_path / "new", *arguments, source=tmp_path / "in")
    assert result.exit_code == 1
    assert "no class named 'stripy disc'" in error_of(result)
    assert "the model's: 'striped disc'" in error_of(result)
    assert not (tmp_path / "new").exists()


def test_masks_of_a_folder(tmp_path: Path) -> None:
    source = open_source("embedded:4:9")
    for index in range(4):
        image = decode_image(source.read(index))
        mask = source.mask(index, image.size)
        assert mask is not None
        for folder, picture in (("in", image), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{index}.png")
    arguments = ("--methods", "edges", "--metrics", "localisation")
    result = evaluate(tmp_path / "out", *arguments, "--masks", tmp_path / "masks", source=tmp_path / "in")
    assert result.exit_code == 0, result.output
    drawn = evaluate(tmp_path / "drawn", *arguments, source="embedded:4:9")
    assert drawn.exit_code == 0
    for key in ("pointing_game_mean", "relevance_mass_mean", "relevance_rank_mean"):
        # What is explained differs where there are no labels, which edges do not look at.
        assert float(table(tmp_path / "out")["edges"][key]) == pytest.approx(
            float(table(tmp_path / "drawn")["edges"][key])
        )
    assert evaluate(tmp_path / "x", *arguments, "--masks", tmp_path / "masks").exit_code == 2
    without = evaluate(tmp_path / "x", *arguments, source=tmp_path / "in")
    assert (without.exit_code, "needs a source with masks" in error_of(without)) == (1, True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--methods NAME,NAME or --preset otsuki2024"),
        (("--methods", "otsuki2023"), "unknown method 'otsuki2023'"),
        (("--methods", "otsuki2024,"), "unknown method ''"),
        (("--methods", "otsuki2024:half"), "half"),
        (("--preset", "paper"), "unknown preset 'paper'; known: otsuki2024"),
        (("--methods", "edges", "--metrics", "speed"), "unknown 'speed'; known: insertion-deletion"),
        (("--methods", "edges", "--protocol", "none"), "known: both, rank, threshold"),
        (("--methods", "edges", "--baseline", "white"), "known: black, mean, blur"),
        (("--methods", "edges", "--target", "best"), "known: predicted, label"),
        (("--methods", "edges", "--source", "embedded:0"), "drawn pictures"),
        (("--methods", "edges", "--device", "tpu:9"), "'tpu:9' cannot be used"),
        (("--methods", "edges", "--interpolation", "sharp"), "interpolation"),
        (("--methods", "edges", "--kind", "zip"), "unknown kind 'zip'"),
        (("--methods", "edges", "--step", 4096), "--step, --patch: step 4096: one step shows all"),
        (("--methods", "edges", "--patch", 64, "--step", 1), "1 patch of 64 x 64; expected a smaller patch"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = evaluate(tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert said in error_of(result)
    assert not (tmp_path / "out").exists()


def test_results_go_to_a_folder_of_their_own(tmp_path: Path) -> None:
    for output in (tmp_path / "file", tmp_path):
        (tmp_path / "file").write_text("")
        result = evaluate(output, "--methods", "edges", source=tmp_path)
        assert (result.exit_code, "--output: " in error_of(result)) == (2, True)


def test_a_preset_is_its_methods_and_the_same_number_of_each_class() -> None:
    methods = command.find_methods("rise,edges", "otsuki2024")
    assert list(methods) == [*PRESETS["otsuki2024"], "rise"]
    assert {"random", "random-two-level"} <= set(methods)


@pytest.mark.parametrize(("option", "even"), [((), True), (("--no-per-class",), False)])
def test_a_preset_draws_the_same_number_of_each_class(
    option: tuple[str, ...], even: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PRESETS", {"small": ("edges",)})
    arguments = ("--preset", "small", "--metrics", "time", "--limit", 9, *option)
    result = evaluate(tmp_path / "out", *arguments, source="embedded:12:2")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["per_class"] is even
    assert settings["pictures"] == (8 if even else 9)


def test_methods_are_listed() -> None:
    result = lrp_fast("methods")
    assert result.exit_code == 0
    assert re.findall(r"^│ (\S+) +│", result.stdout, re.MULTILINE) == list(list_methods())


def test_the_terminal_shows_both_protocols(tmp_path: Path) -> None:
    result = evaluate(tmp_path / "out", "--methods", "edges", "--metrics", "insertion-deletion")
    text = " ".join(result.stdout.split())
    assert "rank protocol: ID" in text
    assert "threshold" in text
    numbers = [float(value.replace("−", "-")) for value in re.findall(r"−?\d\.\d{3}", text)]
    assert len(numbers) == 3 * 2 * 3  # methods, protocols, a mean and its interval's ends
    assert np.isfinite(numbers).all()
