"""An evaluation against the metrics called one by one; what is kept, continued, refused; what its report holds."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lrp_fast import LRP, Composite, heat_quantize
from lrp_fast.data import Source, open_source
from lrp_fast.embedded import CLASSES
from lrp_fast.evaluation import (
    Evaluation,
    EvaluationError,
    EvaluationOptions,
    EvaluationOutcome,
    draw_sample,
    load_sample,
    match_labels,
    with_controls,
)
from lrp_fast.images import decode_image, find_images
from lrp_fast.methods import LRPMethod, Method, find_method
from lrp_fast.metrics import (
    Interval,
    bootstrap,
    bootstrap_difference,
    insertion_deletion,
    parameter_randomization,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.report import ForeignFileError
from lrp_fast.report.figures import method_styles
from lrp_fast.report.scores import MethodScores, file_name, number, span, table_csv, table_markdown
from lrp_fast.store import SettingsError

COUNT, SIZE, STEP = 6, 64, 900
OPTIONS = EvaluationOptions(batch_size=4, step=STEP, shown=2)
METHODS = ("otsuki2024", "otsuki2024:symmetric+quantized", "edges")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(size=SIZE)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(f"embedded:{COUNT}:{np.random.default_rng().integers(1 << 30)}")


@pytest.fixture(scope="module")
def evaluated(loaded: LoadedModel, source: Source, tmp_path_factory: pytest.TempPathFactory) -> _Evaluated:
    """One evaluation for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    outcome = Evaluation(loaded, source, OPTIONS).into(folder, {name: find_method(name) for name in METHODS})
    return _Evaluated(folder, outcome)


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    folder: Path
    outcome: EvaluationOutcome

    def scores(self, name: str) -> MethodScores:
        (found,) = [entry for entry in self.outcome.entries if entry.name == name]
        assert isinstance(found, MethodScores)
        return found


class Counting:
    """Vertical stripes, and how often they were asked for; ``fails`` on the call of that number."""

    def __init__(self, fails: int = -1, error: BaseException | None = None) -> None:
        self.calls, self._fails, self._error = 0, fails, error

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        self.calls += 1
        if self.calls == self._fails:
            assert self._error is not None
            raise self._error
        return torch.arange(images.shape[3]).remainder(7).float().expand(images.shape[0], *images.shape[2:])


def pictures(source: Source, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """All pictures as inputs, and their masks, decoded one by one."""
    inputs, masks = [], []
    for index in range(len(source)):
        image = decode_image(source.read(index))
        inputs.append(loaded.preprocessing.normalize(loaded.preprocessing.frame(image)))
        mask = source.mask(index, image.size)
        assert mask is not None
        masks.append(torch.from_numpy(np.asarray(loaded.preprocessing.frame(mask)) >= 128))
    return torch.stack(inputs), torch.stack(masks)


def explained(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The maps, and what conservation says, batch by batch as the evaluation does: a bit more can move a patch."""
    batches = list(zip(inputs.split(OPTIONS.batch_size), targets.split(OPTIONS.batch_size), strict=True))
    if not name.startswith("otsuki2024"):
        return torch.cat([find_method(name)(model, *batch) for batch in batches]), {}
    explainer = LRP(model, split="symmetric" if "symmetric" in name else None)
    attributions = [explainer.explain(*batch, relevance=False) for batch in batches]
    leak, start, heatmaps = (torch.cat([getattr(a, key) for a in attributions]) for key in ("leak", "start", "heatmap"))
    expected = {"leak": leak.abs(), "start": start, "relevance": heatmaps.sum((1, 2))}
    return heat_quantize(heatmaps) if "quantized" in name else heatmaps, expected


@pytest.mark.parametrize("name", [*METHODS, "random", "random-two-level"])
def test_the_numbers_are_those_of_the_metrics(
    name: str, evaluated: _Evaluated, loaded: LoadedModel, source: Source
) -> None:
    inputs, masks = pictures(source, loaded)
    model, labels = loaded.model, torch.from_numpy(source.labels)
    targets = model(inputs).argmax(1).detach()
    heatmaps, expected = explained(name, model, inputs, targets)
    scores = evaluated.scores(name)
    for order in ("rank", "threshold"):
        result = insertion_deletion(model, inputs, heatmaps, labels, step=STEP, order=order)
        expected |= {f"{order}_{key}": getattr(result, key) for key in ("insertion", "deletion", "id")}
        for key in ("insertion", "deletion"):
            curve = getattr(result, f"{key}_curve").numpy()
            assert np.abs(scores.curves[f"{order}_{key}"] - curve).max() <= 1e-5
        assert np.array_equal(scores.fractions[order], result.fractions.numpy())
    expected |= {metric.__name__: metric(heatmaps, masks) for metric in (pointing_game, relevance_mass, relevance_rank)}
    assert set(scores.values) == {*expected, "seconds"}
    for key, values in expected.items():
        assert np.abs(scores.values[key] - values.numpy()).max() <= 1e-5, key
    (row,) = [row for row in evaluated.outcome.rows if row.name == name]
    for key in set(expected) - {"start", "relevance"}:
        assert row.intervals[key] == bootstrap(scores.values[key])
    assert len(scores.values["seconds"]) == 1  # the second batch is smaller, which says less
    assert scores.values["seconds"][0] > 0
    assert np.array_equal(scores.maps[1], heatmaps[-1].numpy())


def test_pictures_of_a_report_are_not_taken_for_photographs(evaluated: _Evaluated) -> None:
    assert len(list(evaluated.folder.rglob("*.png"))) > 3
    assert find_images([evaluated.folder.parent]) == []


def test_controls_are_in_every_table_and_marked(evaluated: _Evaluated) -> None:
    rows = evaluated.outcome.rows
    assert [row.name for row in rows] == [*METHODS, "random", "random-two-level"]
    assert [row.control for row in rows] == [False, False, True, True, True]
    assert list(with_controls({"random": find_method("random")})) == ["random", "random-two-level"]
    with open(evaluated.folder / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["control"] for line in table] == ["no", "no", "yes", "yes", "yes"]


def test_a_stopped_run_goes_on_where_it_was(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, metrics=("insertion-deletion",), protocols=("rank",), shown=1)
    evaluation = Evaluation(loaded, source, options)
    first, second, third = Counting(), Counting(2, KeyboardInterrupt()), Counting()
    methods = {"first": first, "second": second, "third": third}
    outcome = evaluation.into(tmp_path / "out", methods)
    assert outcome.interrupted
    assert [row.name for row in outcome.rows] == ["first"]
    assert (first.calls, second.calls, third.calls) == (3, 2, 0)  # a warm-up and two batches
    page = (tmp_path / "out" / "index.html").read_text()
    assert "was interrupted" in page

    heard: list[Any] = []
    again = {name: Counting() for name in methods}
    outcome = Evaluation(loaded, source, options).into(
        tmp_path / "out", again, on_method=heard.append, on_batch=heard.append
    )
    assert not outcome.interrupted
    assert {name: method.calls for name, method in again.items()} == {"first": 0, "second": 3, "third": 3}
    assert heard[:6] == ["first", 6, "second", 4, 2, "third"]
    assert len({row.intervals["rank_id"] for row in outcome.rows[:3]}) == 1  # kept or measured: the same method
    assert "was interrupted" not in (tmp_path / "out" / "index.html").read_text()


def test_a_stopped_run_reports_what_an_earlier_one_finished(
    loaded: LoadedModel, source: Source, tmp_path: Path
) -> None:
    options = dataclasses.replace(OPTIONS, metrics=("insertion-deletion",), protocols=("rank",), shown=1, sanity=2)
    evaluation = Evaluation(loaded, source, options)
    before = evaluation.into(tmp_path / "out", {"first": Counting(), "third": Counting()})
    methods = {"first": Counting(), "second": Counting(1, KeyboardInterrupt()), "third": Counting()}
    outcome = evaluation.into(tmp_path / "out", methods)
    assert outcome.interrupted
    assert [row.name for row in outcome.rows] == ["first", "third", "random", "random-two-level"]
    assert outcome.rows == before.rows
    assert [entry.sanity is not None for entry in outcome.entries if isinstance(entry, MethodScores)] == [True] * 4
    assert (tmp_path / "out" / "sanity.png").exists()
    (broken,) = (tmp_path / "out" / "results").glob("third-????????.npz")
    broken.write_bytes(b"no")
    outcome = evaluation.into(tmp_path / "out", {"second": Counting(1, KeyboardInterrupt()), "third": Counting()})
    assert [row.name for row in outcome.rows] == ["random", "random-two-level"]


def test_other_settings_are_refused_and_named(loaded: LoadedModel, source: Source, evaluated: _Evaluated) -> None:
    changed = dataclasses.replace(OPTIONS, step=STEP + 1, baseline="mean")
    evaluation = Evaluation(loaded, source, changed)
    before = {path: path.stat().st_mtime_ns for path in evaluated.folder.rglob("*")}
    with pytest.raises(SettingsError, match=r"baseline: 'black' there, 'mean' now; step: 900 there, 901 now"):
        evaluation.into(evaluated.folder, {})
    smaller = Evaluation(load_model(size=SIZE - 8), source, OPTIONS)
    with pytest.raises(SettingsError, match="preprocessing.crop: 64 there, 56 now"):
        smaller.into(evaluated.folder, {})
    assert {path: path.stat().st_mtime_ns for path in evaluated.folder.rglob("*")} == before


def test_a_composite_of_the_same_name_is_another_method(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    evaluation = Evaluation(loaded, source, dataclasses.replace(OPTIONS, metrics=("leak",), shown=1, sanity=1))
    mild, strong = (Composite.named("epsilon_gamma_box", gamma=gamma) for gamma in (0.25, 9.0))
    evaluation.into(tmp_path, {"mine": LRPMethod(mild)})
    for other, named in ((LRPMethod(strong), r"rules\.convolution"), (LRPMethod(mild, levels=2), "levels: None there, 2")):
        with pytest.raises(EvaluationError, match=f"delete it to measure mine again: {named}"):
            evaluation.into(tmp_path, {"mine": other})
    with pytest.raises(EvaluationError, match="splits: 'signed' there, 'ratio' now"):
        evaluation.into(tmp_path, {"mine": LRPMethod("epsilon_gamma_box", "ratio")})
    first = (tmp_path / "table.csv").read_text()
    evaluation.into(tmp_path, {"mine": LRPMethod("epsilon_gamma_box", "signed")})  # the same, said otherwise
    assert (tmp_path / "table.csv").read_text() == first


def test_what_is_not_an_evaluation_is_left_alone(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    evaluation = Evaluation(loaded, source, dataclasses.replace(OPTIONS, metrics=("time",)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ForeignFileError, match="not those of an evaluation"):
        evaluation.into(tmp_path, {})
    assert os.listdir(tmp_path) == ["notes.txt"]
    for content in ("{", "[]", '{"format": "another", "version": 1, "settings": {}}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ForeignFileError):
            evaluation.into(tmp_path, {})


def test_damaged_results_are_said(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, metrics=("time",), shown=1)
    evaluation = Evaluation(loaded, source, options)
    evaluation.into(tmp_path / "out", {"stripes": Counting()})
    results = tmp_path / "out" / "results"
    file, other = results / f"{file_name('stripes')}.npz", results / f"{file_name('random')}.npz"
    content = file.read_bytes()
    with np.load(file) as arrays:
        lacking = {key: arrays[key] for key in arrays.files if key != "maps"}
    directory = content.index(b"PK\x01\x02")  # of the first array
    bits = {6: 0x40, 8: 0x01, 10: 0x04}  # a later version, encryption, another compression
    flipped = [bytearray(content) for _ in bits]
    for damaged, (place, bit) in zip(flipped, bits.items(), strict=True):
        damaged[directory + place] ^= bit
    without, plain = io.BytesIO(), io.BytesIO()
    np.savez(without, allow_pickle=False, **lacking)
    np.save(plain, lacking["machine"])
    replaced = without.getvalue(), plain.getvalue()
    for bad in (content[: len(content) // 2], b"", other.read_bytes(), *replaced, *flipped):
        file.write_bytes(bad)
        with pytest.raises(EvaluationError, match=f"{file.name} is .*delete it to measure stripes again"):
            evaluation.into(tmp_path / "out", {"stripes": Counting()})
    file.unlink()
    assert not evaluation.into(tmp_path / "out", {"stripes": Counting()}).failures()


def _wrong_shape(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
    return images[:, 0, :5]


def _all_nan(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
    return images[:, 0] * torch.nan


def _writes_into_its_input(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
    return images.zero_()[:, 0]


def test_a_method_that_fails_is_a_row_and_the_others_go_on(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    late = Counting(3, RuntimeError("<b>no</b> memory\nleft"))
    methods: dict[str, Method] = {
        "late": late, "shape": _wrong_shape, "nan": _all_nan, "out": Counting(1, torch.OutOfMemoryError("16 GiB")),
        "good": Counting(), "writes": _writes_into_its_input,
    }  # fmt: skip
    options = dataclasses.replace(OPTIONS, metrics=("insertion-deletion", "leak"), protocols=("rank",), shown=1)
    told: list[Any] = []
    outcome = Evaluation(loaded, source, options).into(tmp_path / "out", methods, on_failure=told.append)
    reasons = {failure.name: failure.reason for failure in outcome.failures()}
    assert told == outcome.failures()
    assert reasons.keys() == {"late", "shape", "nan", "out"}
    assert "no</b> memory" in reasons["late"]
    assert "expected heatmaps of shape [4, 64, 64], got [4, 5, 64]" in reasons["shape"]
    assert reasons["nan"] == "ValueError: none of its 6 maps is finite"
    assert "smaller batch size" in reasons["out"]
    by_name = {row.name: row for row in outcome.rows}
    assert by_name["good"].intervals["rank_id"].count == COUNT
    # What a method does to its input changes nothing for the metrics: a constant map, all ties.
    constant = insertion_deletion(
        loaded.model, pictures(source, loaded)[0], torch.zeros(COUNT, 1, 1), torch.from_numpy(source.labels), step=STEP
    )
    assert by_name["writes"].intervals["rank_id"].mean == pytest.approx(float(constant.id.mean()), abs=1e-4)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "failed: RuntimeError: &lt;b&gt;no&lt;/b&gt; memory" in page
    assert "leak" not in {key for row in outcome.rows for key in row.intervals}  # of none of these methods
    assert "failed: RuntimeError" in (tmp_path / "out" / "table.md").read_text()
    again = Counting()
    Evaluation(loaded, source, options).into(tmp_path / "out", {"late": again})
    assert again.calls == 3  # a failure is tried again


def test_maps_that_are_not_finite_are_left_out_and_counted(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    def partly(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        maps = Counting()(model, images, target).clone()
        maps[-1, 3, 3] = torch.inf
        return maps

    outcome = Evaluation(loaded, source, OPTIONS).into(tmp_path / "out", {"partly": partly, "whole": Counting()})
    part, whole = outcome.entries[:2]
    assert isinstance(part, MethodScores)
    assert isinstance(whole, MethodScores)
    bad = [3, 5]  # the last of either batch
    for key in ("rank_id", "threshold_insertion", "relevance_mass"):
        assert np.flatnonzero(np.isnan(part.values[key])).tolist() == bad
        assert np.allclose(np.delete(part.values[key], bad), np.delete(whole.values[key], bad), atol=1e-5)
    assert outcome.rows[0].intervals["rank_id"].count == COUNT - len(bad)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "of 4</small>" in page


def _gradient(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images).gather(1, target[:, None]).sum(), images)[0].sum(1)


def test_parameter_randomization(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, metrics=("time",), sanity=2, shown=1)
    methods = {"gradient": _gradient}
    entries = Evaluation(loaded, source, options).into(tmp_path / "out", methods).entries
    curves = {entry.name: entry.sanity for entry in entries if isinstance(entry, MethodScores)}
    inputs, _ = pictures(source, loaded)
    targets = loaded.model(inputs[:2]).argmax(1)
    expected = parameter_randomization(loaded.model, inputs[:2], targets, _gradient)
    assert curves["gradient"] is not None
    assert curves["gradient"].stages == expected.stages
    assert torch.allclose(curves["gradient"].spearman, expected.spearman, atol=1e-4)
    assert curves["random"] is not None
    assert bool((curves["random"].spearman > 0.999999).all())  # it does not look at the network at all
    assert "sanity.png" in (tmp_path / "out" / "index.html").read_text()

    counting = Counting(1, RuntimeError("never called again"))
    kept = Evaluation(loaded, source, options).into(tmp_path / "out", {"gradient": counting}).entries[0]
    assert counting.calls == 0
    assert isinstance(kept, MethodScores)
    assert kept.sanity is not None
    assert torch.equal(kept.sanity.spearman, curves["gradient"].spearman)
    error = RuntimeError("late")
    failing = Evaluation(loaded, source, options).into(tmp_path / "out", {"new": Counting(4, error)})
    assert isinstance(failing.entries[0], MethodScores)
    assert failing.entries[0].sanity is None
    assert failing.entries[0].sanity_reason == "RuntimeError: late"
    assert "RuntimeError: late" in (tmp_path / "out" / "index.html").read_text()
    assert [failure.name for failure in failing.failures()] == ["parameter randomization of new"]
    without = Evaluation(loaded, source, dataclasses.replace(options, sanity=0)).into(tmp_path / "out", {})
    assert not without.interrupted
    assert not (tmp_path / "out" / "sanity.png").exists()


# The sample.


class Listed(Source):
    """A source of labels alone."""

    def __init__(self, labels: list[int], classes: tuple[str, ...] = ()) -> None:
        super().__init__("list", [f"{index:04d}" for index in range(len(labels))], labels, classes)

    def read(self, index: int) -> bytes:
        raise AssertionError("labels do not depend on pictures")


def test_the_sample_is_drawn_from_the_seed() -> None:
    labels = np.random.default_rng().integers(0, 4, 200).tolist()
    source = Listed([*labels, 0, 1, 2, 3])
    options = EvaluationOptions(limit=40, seed=3)
    chosen = draw_sample(source, options)
    assert chosen == sorted(set(chosen)) == draw_sample(source, options)
    assert len(chosen) == 40
    assert chosen != draw_sample(source, dataclasses.replace(options, seed=4))
    assert draw_sample(source, dataclasses.replace(options, limit=None)) == list(range(204))
    even = draw_sample(source, dataclasses.replace(options, per_class=True))
    assert np.bincount(source.labels[even]).tolist() == [10, 10, 10, 10]
    smallest = int(np.bincount(source.labels).min())
    most = draw_sample(source, dataclasses.replace(options, limit=None, per_class=True))
    assert np.bincount(source.labels[most]).tolist() == [smallest] * 4
    with pytest.raises(EvaluationError, match="3 pictures cannot hold the same number of each of the 4 classes"):
        draw_sample(source, dataclasses.replace(options, limit=3, per_class=True))
    with pytest.raises(EvaluationError, match="needs a label"):
        draw_sample(Listed([0, -1]), dataclasses.replace(options, per_class=True))


def test_labels_are_matched_by_name() -> None:
    model = ("ant", "bee", "crane", "crane", "=dog")
    assert match_labels(Listed([1, 0, 1, -1], ("=dog", "bee")), model).tolist() == [1, 4, 1, -1]
    assert match_labels(Listed([4, 2], model), model).tolist() == [4, 2]  # the same list: numbers decide
    assert match_labels(Listed([3, -1, 0]), model).tolist() == [3, -1, 0]
    assert match_labels(Listed([1], ("cat", "ant")), model).tolist() == [0]  # an unused class need not be known
    with pytest.raises(
        EvaluationError, match=r"no class named 'cat'; the source's classes: 'ant', 'cat'; the model's: 'ant'"
    ):
        match_labels(Listed([0, 1], ("ant", "cat")), model)
    with pytest.raises(EvaluationError, match="'crane' is the name of 2 classes"):
        match_labels(Listed([0], ("crane",)), model)
    with pytest.raises(EvaluationError, match="label 5 is not among the model's 5 classes"):
        match_labels(Listed([0, 5]), model)


def draw_folder(folder: Path, source: Source) -> None:
    folder.mkdir()
    for index in range(len(source)):
        (folder / f"{index}.png").write_bytes(source.read(index))


def test_without_labels_the_predicted_class_is_measured(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    draw_folder(tmp_path / "in", source)
    options = dataclasses.replace(OPTIONS, metrics=("insertion-deletion",), shown=1)
    evaluation = Evaluation(loaded, open_source(tmp_path / "in"), options)
    predicted = loaded.model(pictures(source, loaded)[0]).argmax(1).tolist()
    assert evaluation.sample.labels.tolist() == evaluation.sample.targets.tolist() == predicted
    evaluation.into(tmp_path / "out", {})
    page = (tmp_path / "out" / "index.html").read_text()
    assert "the predicted class (the source has no labels)" in page
    assert "predicted right" not in page
    with pytest.raises(EvaluationError, match="needs a source with labels"):
        load_sample(open_source(tmp_path / "in"), loaded, dataclasses.replace(options, target="label"))


def test_labels_of_some_pictures_are_refused(loaded: LoadedModel, source: Source) -> None:
    some = Listed([-1, *source.labels.tolist()[1:]])
    with pytest.raises(EvaluationError, match=f"1 of {COUNT} pictures have no label; expected all or none"):
        load_sample(some, loaded, OPTIONS)


def test_the_label_can_be_explained(loaded: LoadedModel, source: Source) -> None:
    sample = load_sample(source, loaded, dataclasses.replace(OPTIONS, target="label"))
    assert sample.targets.tolist() == sample.labels.tolist() == source.labels.tolist()
    assert sample.labelled


def test_pictures_that_cannot_be_read_are_skipped(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    draw_folder(tmp_path / "in", source)
    (tmp_path / "in" / "2.png").write_bytes(b"no picture")
    (tmp_path / "in" / "<i>.png").write_bytes(b"")
    sample = load_sample(open_source(tmp_path / "in"), loaded, OPTIONS)
    assert sorted(failure.name for failure in sample.skipped) == ["2.png", "<i>.png"]
    assert list(sample.keys) == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    whole = load_sample(source, loaded, OPTIONS)
    assert np.array_equal(sample.pixels, np.delete(whole.pixels, 2, axis=0))
    options = dataclasses.replace(OPTIONS, metrics=("time",), shown=1)
    outcome = Evaluation(loaded, open_source(tmp_path / "in"), options).into(tmp_path / "out", {})
    assert len(outcome.skipped) == 2
    page = (tmp_path / "out" / "index.html").read_text()
    assert "2 pictures not evaluated" in page
    assert "&lt;i&gt;.png" in page
    for file in (tmp_path / "in").iterdir():
        file.write_bytes(b"")
    with pytest.raises(EvaluationError, match="none of the 7 pictures can be read"):
        load_sample(open_source(tmp_path / "in"), loaded, OPTIONS)


def test_localisation_that_was_asked_for_needs_masks(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    draw_folder(tmp_path / "in", source)
    without = open_source(tmp_path / "in")
    for metrics in (("localisation",), ("localisation", "time")):
        with pytest.raises(EvaluationError, match="'localisation' needs a source with masks; none of the 6 pictures has"):
            Evaluation(loaded, without, dataclasses.replace(OPTIONS, metrics=metrics))
        load_sample(source, loaded, dataclasses.replace(OPTIONS, metrics=metrics))
    assert not load_sample(without, loaded, OPTIONS).masks.any()  # of all metrics it is left out


def test_masks_come_through_the_same_frame(loaded: LoadedModel, source: Source) -> None:
    sample = load_sample(source, loaded, OPTIONS)
    assert np.array_equal(sample.masks, pictures(source, loaded)[1].numpy())
    assert sample.masks.any((1, 2)).all()
    without = load_sample(source, loaded, dataclasses.replace(OPTIONS, metrics=("time",)))
    assert not without.masks.any()
    assert without.digest() != sample.digest()


def test_options_are_checked() -> None:
    for wrong in (
        {"metrics": ("speed",)}, {"protocols": ()}, {"target": "best"}, {"baseline": "grey"}, {"step": 0},
        {"batch_size": 0}, {"seed": -1}, {"shown": -1}, {"sanity": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvaluationOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step must be an integer, got 1.5"):
        EvaluationOptions(step=1.5)  # type: ignore[arg-type]
    assert EvaluationOptions().step_for(224) == 500
    assert EvaluationOptions(patch=7).step_for(224) == round(1024 * 500 / 224**2)
    assert EvaluationOptions(step=3).step_for(224) == 3


def test_a_step_that_shows_all_is_refused_before_any_picture_is_read(loaded: LoadedModel, source: Source) -> None:
    rank, both = {"patch": 8, "protocols": ("rank",)}, {"patch": 8}
    for wrong, said in (
        ({**rank, "step": 64}, r"step 64: .* of 64 x 64 pixels, 64 patches of 8 x 8; expected a step of at most 63"),
        ({**both, "step": 63}, r"expected a step of at most 62 \(threshold"),  # whose first mask holds one patch more
        ({"patch": 64}, "1 patch of 64 x 64; expected a smaller patch"),
    ):
        with pytest.raises(ValueError, match=said):
            Evaluation(loaded, Unreadable(), EvaluationOptions(**wrong))  # type: ignore[arg-type]
    for right in ({**rank, "step": 63}, {**both, "step": 62}, {"step": 5000, "metrics": ("time",)}):
        EvaluationOptions(**right).check_size(SIZE)  # type: ignore[arg-type]


class Unreadable:
    """No source: whatever is asked of it is an error of another kind."""


# The report.


class Page(HTMLParser):
    """The elements of a page, its text, and its first table as rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_both_protocols_side_by_side(evaluated: _Evaluated) -> None:
    html = (evaluated.folder / "index.html").read_text()
    page = Page(html)
    table, paired = page.tables
    assert table[0][1:3] == ["rank protocol", "threshold protocol (published)"]
    assert table[1][1:7] == ["ID ↑", "insertion ↑", "deletion ↓"] * 2
    for line, row in zip(table[2:], evaluated.outcome.rows, strict=True):
        assert line[0] == f"{row.name} control" if row.control else row.name
        for place, key in ((1, "rank_id"), (4, "threshold_id")):
            interval = row.intervals[key]
            assert line[place] == number(key, interval.mean) + span(key, interval)
    assert [attributes.get("class") for attributes in page.all("tr")].count("control") == 3 + 3
    assert "no conclusion should rest on the threshold protocol alone" in html
    two = evaluated.scores("random-two-level").values
    for protocol in ("rank", "threshold"):
        assert f"{number('', two[f'{protocol}_id'].mean())} [" in html
    first, other = (evaluated.scores(name) for name in METHODS[:2])
    difference = bootstrap_difference(other.values["rank_id"], first.values["rank_id"])
    assert paired[2][:2] == [METHODS[1], number("", difference.mean) + span("", difference)]


def test_every_picture_of_the_page_is_there_and_nothing_from_outside(evaluated: _Evaluated) -> None:
    html = (evaluated.folder / "index.html").read_text()
    page = Page(html)
    addresses = [attributes["src"] or "" for attributes in page.all("img")]
    assert {"curves.png", "id.png", "conservation.png"} <= set(addresses)
    assert len([address for address in addresses if address.startswith("samples/")]) == 2 * (1 + 5)
    for address in addresses:
        with Image.open(evaluated.folder / address) as image:
            image.load()
            assert min(image.size) >= SIZE
            assert len(np.unique(np.asarray(image.convert("L")))) > 3
    assert "://" not in html
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in html
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark))


def test_only_what_was_measured_is_shown(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, protocols=("threshold",), metrics=("insertion-deletion",), shown=1)
    Evaluation(loaded, source, options).into(tmp_path / "out", {"stripes": Counting()})
    html = (tmp_path / "out" / "index.html").read_text()
    assert "rewards ties, so nothing can be concluded" in html
    assert Page(html).tables[0][0][1:] == ["threshold protocol (published)"]
    assert not (tmp_path / "out" / "conservation.png").exists()
    assert "conservation.png" not in html
    options = dataclasses.replace(options, metrics=("time",))
    Evaluation(loaded, source, options).into(tmp_path / "time", {"stripes": Counting()})
    assert not (tmp_path / "time" / "curves.png").exists()
    assert "seconds measured on" in (tmp_path / "time" / "index.html").read_text()


def test_a_table_of_methods_without_numbers(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, metrics=("leak",), shown=1)
    outcome = Evaluation(loaded, source, options).into(tmp_path / "out", {"fails": Counting(1, ValueError("no"))})
    assert [failure.name for failure in outcome.failures()] == ["fails"]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[2] == "| fails | failed: ValueError: no |"
    assert {line.count("|") for line in lines} == {3}
    html = (tmp_path / "out" / "index.html").read_text()
    assert "failed: ValueError: no" in html
    assert "baseline" not in html
    assert "Insertion" not in html


def test_how_many_pictures_a_mean_is_of(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    """Also in Markdown, where a picture's map was not finite."""

    def partly(model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        maps = images[:, 0].clone()
        maps[1] = torch.nan
        return maps

    options = dataclasses.replace(OPTIONS, metrics=("insertion-deletion", "time"), protocols=("rank",), shown=1)
    outcome = Evaluation(loaded, source, options).into(tmp_path / "out", {"partly": partly, "whole": Counting()})
    known = outcome.rows[0].intervals["rank_id"].count
    lines = [line.split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()]
    assert known == COUNT - 2  # one of each batch
    assert [cell.endswith(f" of {known}") for cell in lines[2][1:]] == [True, True, True, False]
    assert not any(" of " in cell for cell in lines[3])


def test_pictures_that_cannot_be_read_are_not_called_drawn(loaded: LoadedModel, tmp_path: Path) -> None:
    for place in range(3):
        Image.new("RGB", (70, 70), (40 * place, 80, 120)).save(tmp_path / f"{place}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    for limit, said in ((None, "2 of 3 (folder)"), (2, "of 3 (folder, drawn with seed 0)")):
        options = dataclasses.replace(OPTIONS, metrics=("time",), limit=limit, shown=1)
        out = tmp_path / f"out-{limit}"
        Evaluation(loaded, open_source(str(tmp_path)), options).into(out, {"stripes": Counting()})
        assert said in (out / "index.html").read_text()


def test_the_tables_agree(evaluated: _Evaluated) -> None:
    rows = evaluated.outcome.rows
    with open(evaluated.folder / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    content = json.loads((evaluated.folder / "table.json").read_text())
    assert content["settings"]["step"] == STEP
    for row, line, one in zip(rows, table, content["methods"], strict=True):
        assert row.name == line["method"] == one["name"]
        for key, interval in row.intervals.items():
            for part in ("mean", "low", "high"):
                value = getattr(interval, part)
                text, exact = line[f"{key}_{part}"], one["metrics"][key][part]
                assert (
                    (text == "" and exact is None) if np.isnan(value) else float(text) == pytest.approx(value, rel=1e-5)
                )
            assert int(line[f"{key}_count"]) == interval.count
    lines = (evaluated.folder / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | rank: ID | rank: insertion | rank: deletion | threshold: ID |")
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| *{r.name}*" if r.control else f"| {r.name}" for r in rows
    ]
    assert f"{number('rank_id', rows[0].intervals['rank_id'].mean)} [" in lines[2]


def test_names_and_reasons_cannot_become_markup_formulas_or_paths(
    loaded: LoadedModel, source: Source, tmp_path: Path
) -> None:
    nasty = {
        "=1+1": Counting(),
        "../up": Counting(),
        "<script>a|b": Counting(),
        "@x": Counting(1, ValueError("=2\n|x")),
    }
    options = dataclasses.replace(OPTIONS, metrics=("time",), shown=1)
    outcome = Evaluation(loaded, source, options).into(tmp_path / "out", nasty)
    assert os.listdir(tmp_path) == ["out"]
    assert not Page((tmp_path / "out" / "index.html").read_text()).all("script")
    for line in csv.reader(table_csv(outcome.rows).splitlines()):
        assert not [cell for cell in line if cell.startswith(("=", "+", "-", "@"))]
    lines = table_markdown(outcome.rows).splitlines()
    assert len(lines) == 2 + 6
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "\\<script\\>a\\|b" in lines[4]
    names = [file_name(name) for name in ("a/b", "a_b", "a:b", "..", "x" * 300)]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) and not name.startswith(".") for name in names)


def test_lines_tell_methods_apart() -> None:
    names = ["a", "a+quantized", "b", "random", "edges", *(f"m{index}" for index in range(9))]
    empty = np.zeros(0)
    scores = [MethodScores(name, {}, {}, {}, empty.astype(np.float32), "") for name in names]
    styles = method_styles(scores, ["random", "edges"])
    assert styles["a"]["color"] == styles["a+quantized"]["color"] != styles["b"]["color"]
    assert styles["a"]["linestyle"] != styles["a+quantized"]["linestyle"]
    assert styles["random"]["color"] == styles["edges"]["color"]
    assert len({str(style) for style in styles.values()}) == len(names)


def test_the_embedded_classes_are_the_networks(loaded: LoadedModel, source: Source) -> None:
    assert match_labels(source, loaded.classes).tolist() == [index % len(CLASSES) for index in range(COUNT)]


def test_an_interval_that_holds_zero_shows_it() -> None:
    assert span("rank_id", Interval(0.002, -0.0001, 0.0044, 200)) == "[−0.000, 0.004]"
    assert span("rank_id", Interval(0.002, 0.0001, 0.0044, 200)) == "[0.000, 0.004]"
    assert span("rank_id", Interval(0.0, math.nan, math.nan, 1)) == ""


def test_times_are_milliseconds_in_plain_digits() -> None:
    texts = [number("seconds", seconds) for seconds in (0.0012345, 0.0999, 0.99949, 0.9995, 0.9999, 12.3)]
    assert texts == ["1.23", "99.9", "999", "1000", "1000", "12300"]
