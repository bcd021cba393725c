"""The store by itself: what goes in comes out, nothing is lost wherever a run stops, and nothing foreign is touched."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import lrp_fast
from lrp_fast.heatmap import from_heat_levels, heat_levels, heat_quantize
from lrp_fast.store import (
    DONE,
    FAILED,
    WHOLE,
    Layout,
    Part,
    Rows,
    SettingsError,
    Store,
    StoreError,
    StoreWriter,
    check_settings,
    chunk_file,
    open_store,
)

zarr = pytest.importorskip("zarr")

SETTINGS = {"model": "m", "preprocessing": {"crop": 5, "mean": (0.5, 0.25)}}
LAYOUT = Layout(samples=11, batch_size=2, height=4, width=5, channels={"layer1.0": 3}, shard_batches=2)


def keys(layout: Layout) -> list[str]:
    return [f"key/../{index}" for index in range(layout.samples)]


def writer(path: Path, layout: Layout = LAYOUT, settings: dict[str, Any] = SETTINGS) -> StoreWriter:
    return StoreWriter(path, layout, settings, keys(layout), np.arange(layout.samples) % 3 - 1)


def random_maps(count: int, layout: Layout = LAYOUT) -> torch.Tensor:
    return torch.randn(count, layout.height, layout.width) * 10.0 ** torch.randint(-12, 5, (count, 1, 1))


def rows_of(layout: Layout, batch: int, maps: torch.Tensor) -> Rows:
    low, high = layout.span(batch)
    rows = layout.empty(high - low)
    rows.update({name: values.numpy() for name, values in layout.encode(maps[low:high]).items()})
    for name in layout.channels:
        rows[f"channels/{name}"][:] = np.arange(low, high)[:, None]
    rows["target"][:] = np.arange(low, high) + 1000
    rows["status"][:] = DONE
    return rows


def everything(store: Store) -> Rows:
    return {**store.rows(tuple(store.layout.fields()), 0, len(store)), "key": store.key[:], "label": store.label[:]}


def assert_equal(found: Rows, expected: Rows) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert np.array_equal(found[name], expected[name]), name


def write_all(path: Path, maps: torch.Tensor, layout: Layout = LAYOUT) -> Rows:
    with writer(path, layout) as opened:
        for batch in opened.pending():
            opened.put(batch, rows_of(layout, batch, maps))
        opened.finish()
    return everything(open_store(path))


def test_round_trip(tmp_path: Path) -> None:
    maps = random_maps(11)
    write_all(tmp_path / "s", maps)
    store = lrp_fast.open_store(tmp_path / "s")
    assert len(store) == len(store.heatmap) == 11
    # A float16 has 11 bits; below 2^-14 of the map's largest magnitude, its spacing is 2^-24 of that.
    scale = maps.abs().amax((1, 2), keepdim=True)
    bound = maps.abs() * 2.0**-11 + scale * (2.0**-25 + 2.0**-22)
    assert (torch.from_numpy(store.heatmap[:]) - maps).abs().le(bound).all()
    assert store.heatmap[2:9:3].dtype == np.float32
    assert np.array_equal(store.heatmap[2:9:3], store.heatmap[:][2:9:3])
    assert np.array_equal(store.heatmap[::-4], store.heatmap[:][::-4])
    assert np.array_equal(store.heatmap[-1], store.heatmap[10])
    assert store.heatmap[5:5].shape == (0, 4, 5)
    assert np.array_equal(store.channels["layer1.0"][:], np.repeat(np.arange(11.0), 3).reshape(11, 3))
    with pytest.raises(IndexError):
        store.heatmap[11]
    record = store.by_key("key/../7")
    assert (record.index, record.label, record.target, record.status, record.reason) == (7, 0, 1007, DONE, "")
    assert np.array_equal(record.heatmap, store.heatmap[7])
    with pytest.raises(KeyError, match="no sample has the key 'none'"):
        store.by_key("none")
    assert store.attributes["preprocessing"] == {"crop": 5, "mean": [0.5, 0.25]}


def test_small_and_zero_maps_survive_float16(tmp_path: Path) -> None:
    layout = Layout(samples=3, batch_size=3, height=2, width=2)
    maps = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1e-30, -2e-30], [5e-31, 0.0]], [[3e38, 1.0], [-1e38, 2e38]]])
    write_all(tmp_path / "s", maps, layout)
    found = torch.from_numpy(open_store(tmp_path / "s").heatmap[:])
    assert (found[0] == 0).all()
    assert torch.allclose(found[1], maps[1], rtol=1e-3, atol=0)
    assert torch.allclose(found[2], maps[2], rtol=1e-3, atol=1e31)


@pytest.mark.parametrize("levels", [2, 8, 256])
def test_levels_are_those_of_heat_quantize(tmp_path: Path, levels: int) -> None:
    layout = Layout(samples=11, batch_size=4, height=9, width=7, levels=levels)
    maps = random_maps(11, layout)
    maps[3] = 1.25  # a constant map
    write_all(tmp_path / "s", maps, layout)
    store = open_store(tmp_path / "s")
    assert np.array_equal(store.heatmap[:], heat_quantize(maps, levels).numpy())
    raw = zarr.open_group(tmp_path / "s", mode="r")["heatmap"]
    assert raw.dtype == np.uint8
    assert raw[:].max() == levels - 1


def test_heat_levels_refuse_what_does_not_fit_a_byte() -> None:
    index, low, high = heat_levels(torch.randn(2, 3, 4), 256)
    assert from_heat_levels(index, low, high, 256).shape == (2, 3, 4)
    for levels in (1, 257):
        with pytest.raises(ValueError, match="2 to 256"):
            heat_levels(torch.randn(2, 3, 4), levels)
    with pytest.raises(ValueError, match="expected maps"):
        heat_levels(torch.randn(3, 4))
    with pytest.raises(ValueError, match="finite"):
        heat_levels(torch.full((1, 3, 4), torch.nan))


def test_shards_are_files_of_many_samples(tmp_path: Path) -> None:
    layout = Layout(samples=400, batch_size=40, height=2, width=2, shard_batches=5)
    write_all(tmp_path / "s", random_maps(400, layout), layout)
    files = [file for file in (tmp_path / "s").rglob("*") if file.is_file()]
    assert len([file for file in files if "heatmap" in file.parts and file.name != "zarr.json"]) == 2
    assert len(files) < 40
    assert not list((tmp_path / "s" / ".staging").iterdir())


def test_other_tools_read_it_without_a_warning(tmp_path: Path) -> None:
    write_all(tmp_path / "s", random_maps(11))
    (tmp_path / "s" / "failures.csv").write_text("")
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert {name for name, _ in group.members()} >= {"heatmap", "scale", "key", "status", "channels"}
    assert group["heatmap"].dtype == np.float16


def test_the_torch_data_set_holds_what_is_done(tmp_path: Path) -> None:
    maps = random_maps(11)
    with writer(tmp_path / "s") as opened:
        for batch in (0, 1, 3):
            rows = rows_of(LAYOUT, batch, maps)
            rows["status"][0] = FAILED
            opened.put(batch, rows)
    dataset = pickle.loads(pickle.dumps(open_store(tmp_path / "s").dataset()))
    assert len(dataset) == 3
    for place, index in enumerate((1, 3, 7)):
        heatmap, label = dataset[place]
        assert label == index % 3 - 1
        assert torch.allclose(heatmap, maps[index], rtol=1e-3, atol=1e-6 * float(maps[index].abs().max()))


def test_an_unfinished_store_shows_what_it_has(tmp_path: Path) -> None:
    maps = random_maps(11)
    with writer(tmp_path / "s") as opened:
        for batch in (0, 1, 2, 5):
            opened.put(batch, rows_of(LAYOUT, batch, maps))
        assert opened.pending() == [3, 4]
        # While it is being written, too.
        assert open_store(tmp_path / "s").status[:].tolist() == [1] * 6 + [0] * 4 + [1]
    store = open_store(tmp_path / "s")
    assert "7 of 11 maps" in repr(store)
    assert store.by_key("key/../10").target == 1010
    assert store.heatmap[6].tolist() == np.zeros((4, 5)).tolist()


def test_a_stop_at_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = random_maps(11)
    expected = write_all(tmp_path / "whole", maps)

    class StoppedError(Exception):
        pass

    steps, stop_at = 0, -1

    def step(real: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise StoppedError
            return real(*arguments, **options)

        return counted

    import lrp_fast.store.writing as module

    monkeypatch.setattr(module, "sync", step(module.sync))
    monkeypatch.setattr(os, "replace", step(os.replace))
    monkeypatch.setattr(StoreWriter, "_sync_chunk", step(StoreWriter._sync_chunk))
    write_all(tmp_path / "counted", maps)
    total = steps
    assert total > 50
    for number, at in enumerate((torch.randperm(total)[:4] + 1).tolist()):
        path = tmp_path / str(number)
        steps, stop_at = 0, at
        with pytest.raises(StoppedError):
            write_all(path, maps)
        stop_at = -1
        assert_equal(write_all(path, maps), expected)
        assert not list(path.rglob("*.partial"))


def test_a_stop_within_a_compaction_shows_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, path = random_maps(4), tmp_path / "s"
    layout = Layout(samples=4, batch_size=2, height=4, width=5, shard_batches=2)
    expected = write_all(tmp_path / "whole", maps, layout)
    with monkeypatch.context() as patch, writer(path, layout) as opened:
        patch.setattr(StoreWriter, "_compact", lambda self, shard: None)
        for batch in (0, 1):
            opened.put(batch, rows_of(layout, batch, maps))
    real = StoreWriter._sync_chunk
    for last in layout.fields():

        def stop(self: StoreWriter, name: str, shard: int, array: Any, last: str = last) -> None:
            real(self, name, shard, array)
            if name == last:
                raise InterruptedError(name)

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "_sync_chunk", stop)
            with pytest.raises(InterruptedError, match=last), writer(path, layout):
                pass
        assert (path / "status" / "c" / "0").exists() == (last == "status")
        assert_equal(everything(open_store(path)), expected)
    with writer(path, layout) as opened:
        assert opened.pending() == []
    assert not list((path / ".staging").iterdir())
    assert_equal(everything(open_store(path)), expected)


def test_a_damaged_staged_file_is_computed_again_and_never_unpickled(tmp_path: Path) -> None:
    class Explosive:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    maps = random_maps(11)
    with writer(tmp_path / "s") as opened:
        for batch in (0, 2, 4):
            opened.put(batch, rows_of(LAYOUT, batch, maps))
    staging = tmp_path / "s" / ".staging"
    (staging / "000000000.npz").write_bytes((staging / "000000000.npz").read_bytes()[:200])
    (staging / "000000002.npz").write_bytes(b"")
    rows: dict[str, Any] = rows_of(LAYOUT, 4, maps)
    rows["reason"] = np.array([Explosive(), Explosive()], dtype=object)
    np.savez(staging / "000000004.npz", **rows)
    with writer(tmp_path / "s") as opened:
        assert opened.pending() == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "unpickled").exists()


def test_a_staged_file_that_cannot_be_read_never_counts_as_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = random_maps(4)
    layout = Layout(samples=4, batch_size=2, height=4, width=5, shard_batches=2)
    expected = write_all(tmp_path / "whole", maps, layout)
    real = Store.staged_rows

    def unreadable(self: Store, batch: int, names: Sequence[str]) -> Rows | None:
        return None if batch == 0 and tuple(names) == ("heatmap",) else real(self, batch, names)

    with monkeypatch.context() as patch, writer(tmp_path / "s", layout) as opened:
        patch.setattr(Store, "staged_rows", unreadable)
        opened.put(0, rows_of(layout, 0, maps))
        with pytest.raises(StoreError, match=r"000000000.npz can no longer be read"):
            opened.put(1, rows_of(layout, 1, maps))
    assert_equal(write_all(tmp_path / "s", maps, layout), expected)


def test_a_byte_that_changed_is_noticed(tmp_path: Path) -> None:
    write_all(tmp_path / "s", random_maps(11))
    file = tmp_path / "s" / "heatmap" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    store = open_store(tmp_path / "s")
    assert np.isfinite(store.heatmap[:4]).all()
    with pytest.raises(StoreError, match="'heatmap' of the samples 2 to 10 cannot be read: .*checksum") as raised:
        _ = store.heatmap[2:11]
    assert str(raised.value).endswith(f"; once deleted, the same command computes them again: {file}")
    file.write_bytes(content[:40])
    with pytest.raises(StoreError, match="'heatmap' of the samples 4 to 7 cannot be read"):
        _ = open_store(tmp_path / "s").heatmap[4:8]


@pytest.mark.parametrize("empty", [False, True])
def test_maps_that_are_gone_are_no_zeros_and_computed_again(tmp_path: Path, empty: bool) -> None:
    maps = torch.zeros(11, 4, 5) if empty else random_maps(11)
    expected = write_all(tmp_path / "s", maps)
    file = tmp_path / "s" / "heatmap" / "c" / "1" / "0" / "0"
    file.write_bytes(b"") if empty else file.unlink()
    store = open_store(tmp_path / "s")
    assert np.array_equal(store.rows(("heatmap",), 8, 11)["heatmap"], expected["heatmap"][8:])
    with pytest.raises(StoreError, match="'heatmap' of the samples 4 to 7 are gone; the same command"):
        _ = store.heatmap[:]
    with writer(tmp_path / "s") as opened:
        assert opened.pending() == [2, 3]
    assert_equal(write_all(tmp_path / "s", maps), expected)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", sorted(LAYOUT.fields().keys() - {"heatmap", "status"}))
def test_whatever_else_is_gone_is_no_zeros_either(tmp_path: Path, name: str, empty: bool) -> None:
    maps = random_maps(11)
    expected = write_all(tmp_path / "s", maps)
    array = zarr.open_group(tmp_path / "s", mode="r")[name]
    file = chunk_file(tmp_path / "s", array, 1)
    assert file.stat().st_size > 0
    file.write_bytes(b"") if empty else file.unlink()
    with pytest.raises(StoreError, match=f"'{name}' of the samples 4 to 7 are gone; the same command"):
        open_store(tmp_path / "s").rows((name,), 0, 11)
    with writer(tmp_path / "s") as opened:
        assert opened.pending() == [2, 3]
    assert_equal(write_all(tmp_path / "s", maps), expected)


def test_what_is_no_layout_is_named(tmp_path: Path) -> None:
    write_all(tmp_path / "s", random_maps(11))
    (tmp_path / "s" / ".staging" / "abc.npz").write_bytes(b"")
    assert len(open_store(tmp_path / "s")) == 11
    group = zarr.open_group(tmp_path / "s", mode="r+")
    layout = group.attrs["layout"]
    for other in ({**layout, "colour": 3}, {**layout, "relevance": 3}, None):
        group.attrs["layout"] = other
        with pytest.raises(StoreError, match="does not say how it is laid out"):
            open_store(tmp_path / "s")


def test_a_store_is_made_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "empty").mkdir()
    for name, target in (("link", tmp_path / "empty"), ("dangling", tmp_path / "disk" / "new")):
        (tmp_path / name).symlink_to(target)
        write_all(tmp_path / name, random_maps(11))
        assert (tmp_path / name).is_symlink()
        assert (open_store(target).status[:] == DONE).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dangling", "disk", "empty", "link"]


def test_places_where_no_store_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        with pytest.raises(StoreError, match="is the folder you are in"), writer(Path()):
            pass

    def mounted(*arguments: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rename", mounted)
    with pytest.raises(StoreError, match="a disk is mounted at .*here"), writer(tmp_path / "here"):
        pass
    assert [file.name for file in tmp_path.rglob("*")] == ["here"]

    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=PermissionError("not there")))
    with pytest.raises(PermissionError, match="not there"), writer(tmp_path / "here"):
        pass


def test_who_comes_late_to_a_beginning_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lrp_fast.store.writing as module

    write_all(tmp_path / "s", random_maps(11))
    answers = [False]  # as seen just before another process renamed its own to this place
    real = module.is_begun
    monkeypatch.setattr(module, "is_begun", lambda path: answers.pop() if answers else real(path))
    writer(tmp_path / "s")._create()
    assert not answers
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_what_is_done_is_never_replaced(tmp_path: Path) -> None:
    maps = random_maps(11)
    with writer(tmp_path / "s") as opened:
        for batch in range(6):
            rows = rows_of(LAYOUT, batch, maps)
            rows["status"][:] = [DONE, FAILED][: len(rows["status"])]
            opened.put(batch, rows)
        opened.finish()
        before = everything(opened.store)
        assert opened.pending() == []
        assert opened.pending(retry_failed=True) == [0, 1, 2, 3, 4]
        opened.put(1, {**rows_of(LAYOUT, 1, -maps)})
        opened.finish()
    after = everything(open_store(tmp_path / "s"))
    changed = [index for index in range(11) if not np.array_equal(before["heatmap"][index], after["heatmap"][index])]
    assert changed == [3]
    assert after["status"].tolist() == [1, 2, 1, 1] + [1, 2] * 3 + [1]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    write_all(tmp_path / "s", random_maps(11))
    before = everything(open_store(tmp_path / "s"))
    other = {**SETTINGS, "preprocessing": {"crop": 6, "mean": (0.5, 0.25)}, "dtype": "bfloat16"}
    with pytest.raises(SettingsError) as error, writer(tmp_path / "s", settings=other):
        pass
    text = str(error.value)
    assert "dtype: None there, 'bfloat16' now; preprocessing.crop: 5 there, 6 now" in text
    assert "model" not in text
    assert "mean" not in text
    levels = Layout(samples=11, batch_size=2, height=4, width=5, levels=8, shard_batches=3)
    with pytest.raises(SettingsError) as error, writer(tmp_path / "s", levels):
        pass
    assert str(error.value).endswith("channels.layer1.0: 3 there, None now; levels: None there, 8 now")
    assert_equal(everything(open_store(tmp_path / "s")), before)


def test_of_many_differences_the_first_are_told_with_their_values() -> None:
    one, other = ({f"s{place}": value for place in range(9)} for value in ("x" * 300, "y" * 300))
    with pytest.raises(SettingsError) as error:
        check_settings(Path("s"), one, other)
    told = str(error.value).split("with these: ")[1].split("; ")
    assert [text[: len("s0: 'xxx")] for text in told[:6]] == [f"s{place}: 'xxx" for place in range(6)]
    assert told[6:] == ["and s6, s7, s8"]
    check_settings(Path("s"), one, {**one, "s0": 1, "s9": 2}, {"s0", "s9"})


def test_foreign_places_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("a")
    with pytest.raises(StoreError, match="not a store"), writer(tmp_path / "photos"):
        pass
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]
    zarr.create_group(tmp_path / "other", zarr_format=3)
    for path in ("photos", "other", "none"):
        with pytest.raises(StoreError):
            open_store(tmp_path / path)
    with pytest.raises(StoreError, match="expected 'lrp-fast store', version 1"), writer(tmp_path / "other"):
        pass
    (tmp_path / "empty").mkdir()
    write_all(tmp_path / "empty", random_maps(11))


def part_writer(path: Path, part: Part, layout: Layout = LAYOUT) -> StoreWriter:
    return StoreWriter(path, layout, SETTINGS, keys(layout), np.arange(layout.samples) % 3 - 1, part=part)


def _in_processes(action: Callable[..., None], *arguments: tuple[Any, ...]) -> list[int | None]:
    """Exit codes of the action in a process for each tuple of arguments, all at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lrp_fast.store", "zarr"])
    processes = [context.Process(target=action, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _enter(path: Path, part: Part) -> None:
    try:
        with part_writer(path, part):
            pass
    except StoreError as error:
        sys.exit(3 if "another run is writing" in str(error) else 4)


def test_a_shard_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "s"  # of three shards
    with part_writer(path, Part(1, 3)):
        parts = [WHOLE, Part(1, 3), Part(0, 3), Part(2, 3), Part(0, 2), Part(1, 2), Part(0, 9)]
        # One after another: three of them have the first shard in common.
        assert [_in_processes(_enter, (path, part)) for part in parts] == [[3], [3], [0], [0], [0], [3], [0]]
    with writer(path) as opened:
        assert opened.pending() == list(range(6))


def _write_part(path: Path, part: Part, maps: torch.Tensor, layout: Layout) -> None:
    with part_writer(path, part, layout) as opened:
        for batch in opened.pending():
            opened.put(batch, rows_of(layout, batch, maps))
        opened.finish()


@pytest.mark.parametrize("count", [2, 5])
def test_processes_that_begin_at_once_fill_one_store(tmp_path: Path, count: int) -> None:
    maps = random_maps(11)
    expected = write_all(tmp_path / "whole", maps)
    (tmp_path / ".s.lrp-fast-partial" / "heatmap").mkdir(parents=True)  # left by a process that was killed
    arguments = [(tmp_path / "s", Part(index, count), maps, LAYOUT) for index in range(count)]
    assert _in_processes(_write_part, *arguments) == [0] * count
    assert_equal(everything(open_store(tmp_path / "s")), expected)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_are_whole_shards_and_all_there_is(count: int) -> None:
    layout = Layout(samples=int(torch.randint(1, 300, ())), batch_size=3, height=2, width=2, shard_batches=4)
    parts = [Part(index, count) for index in range(count)]
    for of in (Part.shards, Part.batches, Part.samples):
        last = {"shards": layout.shards, "batches": layout.batches, "samples": layout.samples}[of.__name__]
        assert [each for part in parts for each in of(part, layout)] == list(range(last))
    assert all(batch // 4 in part.shards(layout) for part in parts for batch in part.batches(layout))
    halves = [part.divided(index, 2) for part in parts for index in range(2)]
    assert [each for half in halves for each in half.shards(layout)] == list(range(layout.shards))


def test_a_part_must_be_one_of_them() -> None:
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="0 <= I < N"):
            Part(index, count)


def test_a_part_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with part_writer(path, Part(0, 3)) as opened:
        opened.put(0, rows_of(LAYOUT, 0, random_maps(11)))
    others = [path / ".staging" / "000000002.x.partial", path / "heatmap" / "c" / "1" / "0" / "0.x.partial"]
    mine = [path / ".staging" / "000000001.x.partial", path / "status" / "c" / "0.x.partial"]
    for file in (*others, *mine, path / ".staging" / "000000003.npz"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    with part_writer(path, Part(0, 3)) as opened:
        assert opened.pending() == [1]
    assert all(file.exists() for file in others)
    assert not any(file.exists() for file in mine)
    assert (path / ".staging" / "000000003.npz").exists()


def test_the_batch_size_of_a_store_can_be_adopted(tmp_path: Path) -> None:
    write_all(tmp_path / "s", random_maps(11))
    other = Layout(samples=11, batch_size=4, height=4, width=5, channels={"layer1.0": 3})
    arguments = (SETTINGS, keys(other), np.arange(11) % 3 - 1)
    with (
        pytest.raises(SettingsError, match="batch_size: 2 there, 4 now"),
        StoreWriter(tmp_path / "s", other, *arguments),
    ):
        pass
    with StoreWriter(tmp_path / "s", other, *arguments, adopt=("batch_size",)) as opened:
        assert opened.layout == LAYOUT


def test_relevance_of_layers_is_kept_whole(tmp_path: Path) -> None:
    shapes = {"input": (3, 4, 5), "layer1.0": (7, 2, 3), "fc": (9,)}
    layout = Layout(samples=5, batch_size=2, height=4, width=5, shard_batches=2, relevance=shapes)
    maps, whole = random_maps(5, layout), {name: torch.randn(5, *shape) * 1e-9 for name, shape in shapes.items()}
    whole["input"][2] = 0
    with StoreWriter(tmp_path / "s", layout, SETTINGS, keys(layout), np.zeros(5, np.int64)) as opened:
        for batch in opened.pending():
            rows, (low, high) = rows_of(layout, batch, maps), layout.span(batch)
            for name in shapes:
                fields = layout.encode_relevance(name, whole[name][low:high])
                rows |= {field: values.numpy() for field, values in fields.items()}
            opened.put(batch, rows)
    store = open_store(tmp_path / "s")
    for name, expected in whole.items():
        found = torch.from_numpy(store.relevance[name][:])
        assert found.shape == expected.shape
        scale = expected.flatten(1).abs().amax(1).view(-1, *[1] * (expected.ndim - 1))
        assert (found - expected).abs().le(expected.abs() * 2.0**-11 + scale * 2.0**-24).all()
        assert np.array_equal(store.relevance[name][3], found[3])


def test_shards_of_large_samples_hold_fewer() -> None:
    assert Layout(samples=9999, batch_size=16, height=224, width=224).shard_samples == 1024
    large = Layout(samples=9999, batch_size=16, height=224, width=224, relevance={"layer1": (256, 56, 56)})
    assert large.shard_samples * 256 * 56 * 56 * 2 <= 2**28


def test_importing_the_package_imports_no_zarr() -> None:
    program = (
        "import sys, lrp_fast, lrp_fast.store, lrp_fast.pipeline; lrp_fast.open_store; "
        "sys.modules['zarr'] = None\n"
        "try: lrp_fast.open_store('/nowhere')\n"
        "except lrp_fast.store.StoreError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'lrp-fast[dataset]'" in run.stdout
