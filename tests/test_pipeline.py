"""From pictures to a store: the explainer's values, every failure named, and the same bits however a run is stopped."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lrp_fast import LRP, Composite, heat_quantize
from lrp_fast.batches import NOT_FINITE, PipelineError, find_batch_size
from lrp_fast.data import FileSource, Source, open_source
from lrp_fast.images import load_picture
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.pipeline import Pipeline, Progress, bytes_per_image, weights_hash
from lrp_fast.rules import Gamma
from lrp_fast.store import DONE, FAILED, Part, SettingsError, open_store
from runs import CPU, assert_same_bits, draw, draw_classes, everything, failures, run, setup, small

SIZE, COUNT = 32, 30
OTSUKI = Composite.named("otsuki2024")
GENTLE = OTSUKI.with_rule("layer1.*", Gamma(0.1))
"""It has the same name."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None, None, SIZE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty JPEGs of three classes."""
    return draw_classes(tmp_path_factory.mktemp("pictures"), COUNT)


def test_the_store_holds_what_the_explainer_gives(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    progress = run(loaded, pictures, tmp_path / "s", channels=("layer3", "layer4"))
    assert (progress.total, progress.done, progress.failed, progress.fresh) == (COUNT, COUNT, 0, COUNT)
    assert not (tmp_path / "s" / "failures.csv").exists()
    store = open_store(tmp_path / "s")
    files = sorted(pictures.rglob("*.jpg"))
    assert store.key[:].tolist() == [file.relative_to(pictures).as_posix() for file in files]
    assert store.label[:].tolist() == [int(file.parent.name) for file in files]
    inputs = torch.stack([load_picture(file, loaded.preprocessing).tensor for file in files])
    api = LRP(loaded.model).explain(inputs, layers=("layer3", "layer4"))
    error = (torch.from_numpy(store.heatmap[:]) - api.heatmap).abs().amax((1, 2))
    assert error.le(2.0**-11 * api.heatmap.abs().amax((1, 2))).all()
    assert store.target[:].tolist() == api.target.tolist()
    probability = api.output.double().softmax(1).gather(1, api.target[:, None])[:, 0]
    assert np.allclose(store.probability[:], probability, rtol=1e-4)
    assert np.allclose(store.leak[:], api.leak, atol=1e-5)
    for name in ("layer3", "layer4"):
        sums = api.layers[name].sum((2, 3))
        assert store.channels[name][:].shape == sums.shape
        assert np.allclose(store.channels[name][:], sums, rtol=1e-3, atol=1e-5 * float(sums.abs().max()))
    assert store.attributes["weights_sha256"] == weights_hash(loaded.model)
    assert store.attributes["composite"] == "otsuki2024"
    assert progress.bytes_per_image == pytest.approx(_size(tmp_path / "s") / COUNT)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_levels_take_less_room_and_are_those_of_heat_quantize(
    loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    explainer = {"composite": "epsilon_plus"}
    large = run(loaded, pictures, tmp_path / "float", explainer)
    small = run(loaded, pictures, tmp_path / "levels", explainer, levels=8)
    assert small.bytes_per_image < 0.7 * large.bytes_per_image
    inputs = [load_picture(file, loaded.preprocessing).tensor for file in sorted(pictures.rglob("*.jpg"))[4:8]]
    api = LRP(loaded.model, "epsilon_plus").explain(torch.stack(inputs), relevance=False)
    assert np.array_equal(open_store(tmp_path / "levels").heatmap[4:8], heat_quantize(api.heatmap, 8).numpy())


def test_bad_files_are_named_and_all_others_explained(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = {draw(folder / name).name for name in ("a.jpg", "m.jpg", "z.jpg")}
    Image.new("CMYK", (50, 60), (10, 200, 30, 0)).save(folder / "print.jpg")
    Image.new("L", (50, 60), 77).save(folder / "grey.jpg")
    Image.fromarray(np.random.default_rng().integers(0, 65536, (50, 60)).astype(np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", (50, 50), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (10_000, 5_000), 99).save(folder / "large.png", compress_level=1)
    good |= {"print.jpg", "grey.jpg", "deep.png", "moving.gif", "large.png"}
    (folder / "=zero.jpg").write_bytes(b"")
    (folder / "torn.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "text.jpg").write_text("no picture")
    draw(folder / "real.png")
    (folder / "real.png").rename(folder / "renamed.jpg")
    good |= {"renamed.jpg"}
    progress = run(loaded, folder, tmp_path / "s")
    assert (progress.done, progress.failed) == (len(good), 3)
    store = open_store(tmp_path / "s")
    assert {store.key[i] for i in np.flatnonzero(store.status[:] == DONE)} == good
    named = failures(tmp_path / "s")
    assert named.keys() == {"'=zero.jpg", "torn.jpg", "text.jpg"}
    assert "0 bytes" in named["'=zero.jpg"]
    assert "damaged" in named["torn.jpg"]
    assert "not a picture" in named["text.jpg"]
    record = store.by_key("torn.jpg")
    assert (record.status, record.reason, float(abs(record.heatmap).max())) == (FAILED, named["torn.jpg"], 0.0)
    assert all(abs(store.by_key(name).heatmap).max() > 0 for name in good)


def test_a_failed_neighbour_changes_no_bit_and_can_be_retried(
    loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for file in sorted(pictures.rglob("*.jpg")):
        draw(folder / file.name)
    run(loaded, folder, tmp_path / "whole")
    contents = {name: (folder / name).read_bytes() for name in ("1.jpg", "10.jpg", "5.jpg")}
    for name in contents:
        (folder / name).write_bytes(b"")
    run(loaded, folder, tmp_path / "s")
    before, whole = open_store(tmp_path / "s"), open_store(tmp_path / "whole")
    bad = np.isin(before.key[:].tolist(), list(contents))
    assert bad.sum() == 3
    assert np.array_equal(before.heatmap[:][~bad], whole.heatmap[:][~bad])
    assert run(loaded, folder, tmp_path / "s").fresh == 0

    for name in ("1.jpg", "5.jpg"):
        (folder / name).write_bytes(contents[name])
    moved = (folder / "11.jpg").rename(tmp_path / "11.jpg")  # done already, and in a batch that is computed again
    source = _with_missing(folder, moved.name)
    progress = run(loaded, source, tmp_path / "s", retry_failed=True)
    assert (progress.fresh, progress.done, progress.failed) == (3, COUNT - 1, 1)
    assert failures(tmp_path / "s").keys() == {"10.jpg"}
    (folder / "10.jpg").write_bytes(contents["10.jpg"])
    assert run(loaded, source, tmp_path / "s", retry_failed=True).failed == 0
    assert_same_bits(tmp_path / "s", tmp_path / "whole")
    assert not (tmp_path / "s" / "failures.csv").exists()


def _with_missing(folder: Path, name: str) -> Source:
    """The folder's source as it was when it had that file too."""
    keys = sorted([*(file.name for file in folder.iterdir()), name])
    return FileSource("folder", [folder / key for key in keys], keys, [-1] * len(keys))


def spoiled(real: Any, change: Callable[[Any, int], None]) -> Any:
    """``LRP.explain`` whose results are changed, given the number of the call."""
    calls = 0

    def explain(self: LRP, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        result = real(self, *arguments, **options)
        change(result, calls)
        calls += 1
        return result

    return explain


@pytest.mark.parametrize("levels", [None, 8])
def test_relevance_that_is_not_finite_is_a_failure(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int | None
) -> None:
    def change(result: Any, call: int) -> None:
        if call == 1:
            result.heatmap[0, 3, 3] = torch.nan
            result.heatmap[2, 0, 0] = torch.inf
            result.layers["layer3"][3, 0, 0, 0] = -torch.inf

    monkeypatch.setattr(LRP, "explain", spoiled(LRP.explain, change))
    progress = run(loaded, pictures, tmp_path / "s", levels=levels, channels=("layer3",))
    store = open_store(tmp_path / "s")
    assert (progress.done, progress.failed) == (COUNT - 3, 3)
    assert np.flatnonzero(store.status[:] == FAILED).tolist() == [4, 6, 7]
    assert set(failures(tmp_path / "s").values()) == {NOT_FINITE}
    for name, values in everything(store).items():
        if values.dtype.kind == "f":
            assert np.isfinite(values).all(), name
    monkeypatch.undo()
    run(loaded, pictures, tmp_path / "s", levels=levels, channels=("layer3",), retry_failed=True)
    run(loaded, pictures, tmp_path / "whole", levels=levels, channels=("layer3",))
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def limited(real: Any, limit: int, sizes: list[int]) -> Any:
    """``LRP.explain`` with memory for so many images."""

    def explain(self: LRP, inputs: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(inputs))
        if len(inputs) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, *arguments, **options)

    return explain


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(loaded, pictures, tmp_path / "whole", batch_size=7)
    sizes: list[int] = []
    monkeypatch.setattr(LRP, "explain", limited(LRP.explain, 2, sizes))
    progress = run(loaded, pictures, tmp_path / "s", batch_size=7)
    assert progress.done == COUNT
    assert sizes[:6] == [7, 4, 2, 2, 2, 1]
    assert max(sizes[2:]) == 2
    halved, whole = everything(open_store(tmp_path / "s")), everything(open_store(tmp_path / "whole"))
    assert np.allclose(halved["scale"], whole["scale"], rtol=1e-5)
    # Of values that differ by 1e-5, those nearest the middle of two float16 numbers go to either.
    assert np.abs(halved["heatmap"].astype(float) - whole["heatmap"]).max() <= 2.0**-10
    assert np.array_equal(halved["target"], whole["target"])

    monkeypatch.setattr(LRP, "explain", limited(LRP.explain, 0, sizes))
    with pytest.raises(PipelineError, match="even for one image"):
        run(loaded, pictures, tmp_path / "none")


def test_a_full_disk_leaves_a_readable_store(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(loaded, pictures, tmp_path / "whole")
    real, calls = np.savez, 0

    def full(file: Any, **arrays: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            file.write(b"some bytes")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run(loaded, pictures, tmp_path / "s")
    assert open_store(tmp_path / "s").status[:].tolist() == [1] * 12 + [0] * 18
    monkeypatch.undo()
    assert run(loaded, pictures, tmp_path / "s").fresh == 18
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_an_interruption_keeps_what_was_done(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(loaded, pictures, tmp_path / "whole")

    def change(result: Any, call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(LRP, "explain", spoiled(LRP.explain, change))
    progress = run(loaded, pictures, tmp_path / "s")
    assert (progress.interrupted, progress.done) == (True, 16)
    monkeypatch.undo()
    progress = run(loaded, pictures, tmp_path / "s")
    assert (progress.interrupted, progress.fresh) == (False, COUNT - 16)
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_an_interruption_between_batches_counts_each_once_and_loses_none(
    loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    folder = draw_classes(tmp_path / "in", COUNT)
    for index in (0, 3, 6):
        (folder / "0" / f"{index}.jpg").write_bytes(b"")
    named: list[str] = []

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    pipeline = Pipeline(setup(loaded), open_source(folder), small(), CPU)
    progress = pipeline.into(tmp_path / "s", on_failure=lambda key, reason: named.append(key), on_batch=interrupt)
    assert progress.interrupted
    assert (progress.fresh, progress.done, progress.failed) == (8, 6, 2)  # the batch told of and the one computed then
    assert sorted(named) == ["0/0.jpg", "0/3.jpg"]  # sorted as text, 0/6.jpg comes in the third batch


def test_decoding_processes_without_shared_memory_are_refused(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (2 * 2 + 2) * 4 * 3 * SIZE**2 * 4
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(PipelineError, match=r"shared memory, .*--workers .*--shm-size"):
        run(loaded, pictures, tmp_path / "s", workers=2)
    assert run(loaded, pictures, tmp_path / "s", workers=0).done == COUNT
    free = needed
    assert run(loaded, pictures, tmp_path / "t", workers=2).done == COUNT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_the_decoding_processes_too_is_an_interruption(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As SLURM sends it to all processes of a step."""

    def end_them_all() -> None:
        os.kill(os.getpid(), number)
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("lrp_fast.pipeline._start_fork_server", end_them_all)
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert run(loaded, pictures, tmp_path / "s", workers=2).interrupted
    finally:
        signal.signal(number, before)


def test_the_size_of_a_store_whose_files_go_meanwhile(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = run(loaded, pictures, tmp_path / "s").bytes_per_image

    class Removed(type(tmp_path)):  # type: ignore[misc]
        """A file that another process removes just after it was seen."""

        def is_file(self) -> bool:
            return True

        def stat(self, **options: Any) -> os.stat_result:
            raise FileNotFoundError(self)

    real = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: [*real(self, pattern), Removed(self / "000000009.npz")])
    assert bytes_per_image(open_store(tmp_path / "s")) == size > 0


@pytest.mark.parametrize(
    ("options", "explainer", "named"),
    [
        ({"batch_size": 8}, {}, "batch_size: 4 there, 8 now"),
        ({"levels": 8}, {}, "levels: None there, 8 now"),
        ({"channels": ("layer3",)}, {}, "channels.layer3: None there"),
        ({}, {"composite": "epsilon"}, "composite: 'otsuki2024' there, 'epsilon' now"),
        ({}, {"split": "symmetric"}, "splits: 'ratio' there, 'symmetric' now"),
        ({}, {"dtype": torch.float64}, "dtype: 'float32' there, 'float64' now"),
        ({}, {"composite": GENTLE}, "rules.overrides.0: None there, \"layer1.*: Rule(name='gamma', parameters=(('gamma', 0.1)"),
        ({}, {"composite": replace(OTSUKI, start="logit")}, "rules.start: 'probability' there, 'logit' now"),
    ],
)
def test_changed_settings_are_refused(
    loaded: LoadedModel,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
    options: Any,
    explainer: Any,
    named: str,
) -> None:
    store = tmp_path_factory.getbasetemp() / "settings"
    run(loaded, pictures, store)
    with pytest.raises(SettingsError) as error:
        run(loaded, pictures, store, explainer, **options)
    assert named in str(error.value)


def test_a_run_is_not_continued_by_other_rules_of_the_same_name(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(result: Any, call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LRP, "explain", spoiled(LRP.explain, change))
        assert run(loaded, pictures, tmp_path / "s", {"composite": GENTLE}).interrupted
    for other in (OTSUKI, OTSUKI.with_rule("layer1.*", Gamma(0.2)), GENTLE.with_rule("layer1.0.*", Gamma(0.1))):
        with pytest.raises(SettingsError, match=r"with these: rules\.overrides"):
            run(loaded, pictures, tmp_path / "s", {"composite": other})
    assert int((open_store(tmp_path / "s").status[:] == DONE).sum()) == 16
    run(loaded, pictures, tmp_path / "s", {"composite": OTSUKI.with_rule("layer1.*", Gamma(0.1))})
    run(loaded, pictures, tmp_path / "whole", {"composite": GENTLE})
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_a_store_that_does_not_say_its_rules_is_read_and_not_continued(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        names = {"composite": "otsuki2024", "splits": "ratio"}  # all that was recorded once
        patched.setattr(Composite, "record", lambda self: names)
        run(loaded, pictures, tmp_path / "s")
    assert abs(open_store(tmp_path / "s").heatmap[:]).max() > 0
    with pytest.raises(SettingsError, match=r"with these: rules\.average_pool: None there, .*; and rules\.stem$"):
        run(loaded, pictures, tmp_path / "s")


def test_another_model_or_data_set_is_refused(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    run(loaded, pictures, tmp_path / "s")
    fewer = tmp_path / "fewer"
    for index in range(COUNT):
        draw(fewer / f"{index}.jpg")
    with pytest.raises(SettingsError, match="source.fingerprint"):
        run(loaded, fewer, tmp_path / "s")
    changed = load_model(None, None, SIZE)
    with torch.no_grad():
        next(changed.model.parameters())[0, 0, 0, 0] += 1
    with pytest.raises(SettingsError, match="weights_sha256") as error:
        run(changed, pictures, tmp_path / "s")
    assert "source" not in str(error.value)
    with pytest.raises(ValueError, match="no layer named 'layer9'"):
        run(loaded, pictures, tmp_path / "other", channels=("layer9",))
    assert not (tmp_path / "other").exists()


def test_hostile_keys_and_class_names_stay_text(loaded: LoadedModel, tmp_path: Path) -> None:
    good, bad = draw(tmp_path / "in" / "a.jpg"), tmp_path / "in" / "none.jpg"
    keys = [
        "../../escaped",
        "/tmp/escaped",
        "=1+1",
        "a\nb",
        "nul\0",
        "é" * 3000,
        "zarr.json",
        ".",
        "[red]x",
        "\tx",
        "@x",
    ]
    classes = ["../../escaped", "=HYPERLINK()", "\x1b[31m"]
    before = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*"))
    for name, path, status in (("good", good, DONE), ("bad", bad, FAILED)):
        labels = [index % 3 for index in range(len(keys))]
        source = FileSource("manifest", [path] * len(keys), keys, labels, classes)
        run(loaded, source, tmp_path / name)
        store = open_store(tmp_path / name)
        assert store.key[:].tolist() == keys
        assert [store.by_key(key).status for key in keys] == [status] * len(keys)
        assert store.attributes["classes"] == classes
    outside = [
        name
        for file in tmp_path.rglob("*")
        if not (name := str(file.relative_to(tmp_path))).startswith(("good", "bad"))
    ]
    assert sorted(outside) == before
    names = {part for file in (tmp_path / "bad").rglob("*") for part in file.parts}
    assert not [name for name in names if "escaped" in name or "é" in name]
    assert not [key for key in failures(tmp_path / "bad") if key.startswith(("=", "+", "-", "@", "\t"))]


def test_parts_give_the_arrays_of_the_whole(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    options = {"channels": ("layer4",), "relevance": ("input", "layer4")}
    run(loaded, pictures, tmp_path / "whole", **options)
    second = run(loaded, pictures, tmp_path / "s", part=Part(1, 2), **options)
    assert (second.total, second.done, second.fresh) == (14, 14, 14)
    assert open_store(tmp_path / "s").status[:].tolist() == [0] * 16 + [1] * 14
    first = run(loaded, pictures, tmp_path / "s", part=Part(0, 2), **options)
    assert (first.total, first.done) == (16, 16)
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_parts_of_a_small_data_set_have_something_each(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    counts = [run(loaded, pictures, tmp_path / "s", part=Part(i, 3), shard_batches=0).fresh for i in range(3)]
    assert sum(counts) == COUNT
    assert min(counts) > 0


def test_failures_of_all_parts_are_listed(loaded: LoadedModel, tmp_path: Path) -> None:
    draw_classes(tmp_path / "in", 20, classes=1)
    for name in ("0.jpg", "9.jpg"):  # in the first and the last shard
        (tmp_path / "in" / "0" / name).write_bytes(b"")
    assert [run(loaded, tmp_path / "in", tmp_path / "s", part=Part(i, 2)).failed for i in (1, 0)] == [1, 1]
    assert failures(tmp_path / "s").keys() == {"0/0.jpg", "0/9.jpg"}


def test_whole_relevance_is_stored(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    run(loaded, pictures, tmp_path / "s", relevance=("input", "layer3"))
    files = sorted(pictures.rglob("*.jpg"))[4:8]
    inputs = torch.stack([load_picture(file, loaded.preprocessing).tensor for file in files])
    api = LRP(loaded.model).explain(inputs, layers=("layer3",))
    assert api.relevance is not None
    store = open_store(tmp_path / "s")
    for name, expected in (("input", api.relevance), ("layer3", api.layers["layer3"])):
        found = torch.from_numpy(store.relevance[name][4:8])
        bound = 2.0**-10 * expected.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        assert (found - expected).abs().le(bound).all()


def test_the_batch_size_is_found_and_kept(
    loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(loaded, pictures, tmp_path / "s", batch_size=0, part=Part(0, 2))
    found = open_store(tmp_path / "s").layout.batch_size
    assert 1 <= found <= COUNT
    monkeypatch.setattr("lrp_fast.pipeline.find_batch_size", lambda explainer, size: found + 1)
    assert run(loaded, pictures, tmp_path / "s", batch_size=0, part=Part(1, 2)).interrupted is False
    assert (open_store(tmp_path / "s").status[:] == DONE).all()
    run(loaded, pictures, tmp_path / "whole", batch_size=found)
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


@pytest.mark.parametrize(("seconds", "limit", "expected", "last"), [
    (lambda n: 1.0 + 0.1 * n, 99, 32, 32),  # images/s: 0.9, 1.7, 2.9, 4.4, 6.2, 7.6, 8.6, ...
    (lambda n: 0.1 * n, 99, 1, 4),
    (lambda n: 1.0, 16, 16, 16),
    (lambda n: {1: 1.0, 2: 2.5, 4: 2.0}.get(n, float(n)), 99, 4, 16),  # one that is slow by chance
])  # fmt: skip
def test_the_batch_is_doubled_while_that_pays_and_fits(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], limit: int, expected: int,
    last: int,
) -> None:  # fmt: skip
    def rate(explainer: LRP, batch_size: int, size: int) -> float:
        if batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_size / seconds(batch_size)

    monkeypatch.setattr("lrp_fast.batches._images_per_second", rate)
    heard: list[int] = []
    assert find_batch_size(LRP(loaded.model), SIZE, 32, lambda batch_size, _: heard.append(batch_size)) == expected
    assert heard[-1] == last


def test_a_batch_size_is_measured(loaded: LoadedModel) -> None:
    heard: list[tuple[int, float]] = []
    found = find_batch_size(LRP(loaded.model), SIZE, largest=4, on_size=lambda *each: heard.append(each))
    assert [size for size, _ in heard] == [1, 2, 4][: len(heard)]
    assert dict(heard)[found] >= 0.95 * max(rate for _, rate in heard)


class Deadly(FileSource):
    """A source one of whose pictures ends the process that decodes it."""

    def read(self, index: int) -> bytes:
        if index == 17:
            os._exit(1)
        return super().read(index)


def test_workers_give_the_same_bits_and_their_death_loses_nothing(
    loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    run(loaded, pictures, tmp_path / "whole")
    source = open_source(pictures)
    assert isinstance(source, FileSource)
    arguments = ("folder", [Path(path) for path in source.paths], list(source.keys), source.labels, source.classes)
    with pytest.raises(PipelineError, match="a decoding process ended"):
        run(loaded, Deadly(*arguments), tmp_path / "s", workers=1)
    done = int((open_store(tmp_path / "s").status[:] == DONE).sum())
    assert done < COUNT
    progress = run(loaded, pictures, tmp_path / "s", workers=2)
    assert progress.fresh == COUNT - done
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def kill_and_resume(
    loaded: LoadedModel, source: Path, tmp_path: Path, kills: int, batch_size: int, workers: int
) -> None:
    """Kill the command at random moments, finish its run, and compare with one that was left alone."""
    store, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [
        "--source",
        source,
        "--size",
        SIZE,
        "--batch-size",
        batch_size,
        "--workers",
        workers,
        "--output",
        store,
    ]
    command = [sys.executable, "-m", "lrp_fast", "attribute-dataset", *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    total = run(loaded, source, whole, batch_size=batch_size).total
    counts = [0]
    for _ in range(kills):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            before, deadline = _files(store), time.monotonic() + 60
            while process.poll() is None and _files(store) == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        while left := _session(process.pid):
            assert time.monotonic() < deadline, f"processes go on without the one that was killed: {left}"
            time.sleep(0.01)
        counts.append(_done(store))
    assert 0 < counts[1] < total, "the first kill came too late to test anything"
    assert counts == sorted(counts)
    assert run(loaded, source, store, batch_size=batch_size).fresh == total - counts[-1]
    assert_same_bits(store, whole)


def _session(leader: int) -> list[int]:
    """The processes that one has started, directly or not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == leader:
                found.append(int(process.name))
        except ProcessLookupError:
            continue
    return found


def _files(store: Path) -> set[Path]:
    """What grows with every batch."""
    return {*store.glob(".staging/*.npz"), *store.glob("status/c/*")}


def _done(path: Path) -> int:
    return int((open_store(path).status[:] == DONE).sum()) if (path / "zarr.json").exists() else 0


def test_killed_and_resumed_gives_the_same_bits(loaded: LoadedModel, tmp_path: Path) -> None:
    for index in range(150):
        draw(tmp_path / "in" / f"{index}.jpg")
    kill_and_resume(loaded, tmp_path / "in", tmp_path, kills=1, batch_size=3, workers=1)


@pytest.mark.slow
def test_two_thousand_pictures_killed_five_times(loaded: LoadedModel, tmp_path: Path) -> None:
    for index in range(2000):
        draw(tmp_path / "in" / f"{index % 7}" / f"{index}.jpg")
    kill_and_resume(loaded, tmp_path / "in", tmp_path, kills=5, batch_size=16, workers=2)
