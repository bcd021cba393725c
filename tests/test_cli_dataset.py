"""``lrp-fast attribute-dataset``: parts, devices, engines, the log, and a disk that fills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from lrp_fast.cli import app
from lrp_fast.store import DONE, open_store
from runs import assert_same_bits, draw_classes, draw_with_an_empty_file, failures

COUNT = 30

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_with_an_empty_file(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "s"
    with in_process(arguments(pictures, store)) as process:  # which has one thread, as all that is compared with it
        process.communicate(timeout=120)
    assert process.returncode == 3
    return store


def arguments(source: object, store: Path, *more: object) -> list[str]:
    given = ["--source", source, "--output", store, "--size", 32, "--batch-size", 4, "--workers", 0, *more]
    return ["attribute-dataset", *map(str, given)]


def dataset(source: object, store: Path, *more: object) -> Result:
    return CliRunner().invoke(app, arguments(source, store, *more), catch_exceptions=False)


def in_process(command: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "lrp_fast", *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_started_at_once_give_the_arrays_of_one(pictures: Path, whole: Path, tmp_path: Path) -> None:
    variables = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [in_process(arguments(pictures, tmp_path / "s"), **each) for each in variables]
    said = [process.communicate(timeout=120) for process in running]

    assert [process.returncode for process in running] == [0, 3], said
    assert "part 1/2, by torchrun's variables" in said[1][1]
    assert "13 of 14 explained, 1 failed" in said[1][0]
    assert_same_bits(tmp_path / "s", whole)
    assert failures(tmp_path / "s") == failures(whole)


def test_a_part_named_by_hand(pictures: Path, whole: Path, tmp_path: Path) -> None:
    assert dataset(pictures, tmp_path / "s", "--shard", "1/2").exit_code == 3
    status = open_store(tmp_path / "s").status[:]
    assert not status[: COUNT // 2 - 4].any()
    assert dataset(pictures, tmp_path / "s", "--shard", "0/2").exit_code == 0
    assert_same_bits(tmp_path / "s", whole)


@pytest.mark.slow
def test_devices_of_one_machine(pictures: Path, whole: Path, tmp_path: Path) -> None:
    result = dataset(pictures, tmp_path / "s", "--devices", "cpu,cpu")
    assert result.exit_code == 3, result.output
    assert f"29 of {COUNT} explained, 1 failed" in result.stdout
    assert_same_bits(tmp_path / "s", whole)


def wait_for_batches(store: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not list(store.glob(".staging/*.npz")) and not list(store.glob("status/c/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_sigterm_ends_a_run_as_an_interruption(devices: str, tmp_path: Path) -> None:
    source = draw_classes(tmp_path / "in", 800)
    command = arguments(source, tmp_path / "s", "--devices", devices)
    process = in_process(command)
    wait_for_batches(tmp_path / "s", process)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (output, errors)
    assert "interrupted; the same command continues" in errors
    assert "Traceback" not in errors
    done = int((open_store(tmp_path / "s").status[:] == DONE).sum())
    assert 0 < done < 800
    assert f"{done} of 800 explained" in output


def test_the_processes_of_the_devices_end_with_the_first(tmp_path: Path) -> None:
    source = draw_classes(tmp_path / "in", 800)
    process = in_process(arguments(source, tmp_path / "s", "--devices", "cpu,cpu"))
    wait_for_batches(tmp_path / "s", process)
    process.kill()
    process.communicate(timeout=60)  # its pipes are theirs too, so all have ended then
    assert 0 < (open_store(tmp_path / "s").status[:] == DONE).sum() < 800


def test_more_parts_than_shards(pictures: Path, tmp_path: Path) -> None:
    assert dataset(pictures, tmp_path / "s").exit_code == 3
    result = dataset(pictures, tmp_path / "s", "--shard", "0/2")
    assert result.exit_code == 0
    assert "this part is empty, as there are more parts than shards in the store" in result.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_ray_engine(pictures: Path, whole: Path, tmp_path: Path) -> None:
    command = arguments(pictures, tmp_path / "s", "--engine", "ray")
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}  # of no account: Ray shares out the whole
    process = in_process(command, RAY_USAGE_STATS_ENABLED="0", **launched)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 3, errors
    assert f"29 of {COUNT} explained, 1 failed" in output
    assert_same_bits(tmp_path / "s", whole)


def test_the_log_has_every_event(pictures: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert dataset(pictures, tmp_path / "s", "--log-json", log).exit_code == 3
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "begin"
    assert kinds[-1] == "end"
    assert kinds.count("batch") == 8
    assert [event["key"] for event in events if event["event"] == "failure"] == ["2/29.jpg"]
    end = events[-1]
    assert (end["done"], end["failed"], end["fresh"], end["interrupted"]) == (COUNT - 1, 1, COUNT, False)
    assert sum(end["waited_for"].values()) == pytest.approx(1, abs=1e-3)
    assert end["bytes_per_image"] > 100
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert dataset(pictures, tmp_path / "s", "--log-json", log, "--levels", 8).exit_code == 2
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], "levels: None there, 8 now" in last["reason"]) == ("error", True)


def test_drawn_pictures_and_overridden_preprocessing(tmp_path: Path) -> None:
    more = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--relevance", "input,layer4"]
    assert dataset("embedded:6:1", tmp_path / "s", *more).exit_code == 0
    store = open_store(tmp_path / "s")
    assert (store.status[:] == DONE).all()
    assert store.attributes["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    found = store.relevance["input"][:].sum(1)
    assert np.abs(found - store.heatmap[:]).max() <= 2.0**-8 * np.abs(found).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "2/2"], "--shard: expected I/N with 0 <= I < N, got '2/2'"),
        (["--shard", "one"], "--shard: expected I/N"),
        (["--devices", "cpu,nonsense"], "--devices: 'nonsense' cannot be used"),
        (["--devices", "cpu,cpu", "--device", "cpu"], "not both"),
        (["--devices", "cpu,meta"], "--devices: 'meta' cannot be used"),
        (["--engine", "dask"], "unknown engine 'dask'; known: local, ray"),
        (["--engine", "ray", "--shard", "0/2"], "finds its devices by itself"),
        (["--address", "auto"], "goes with --engine ray"),
        (["--relevance", "layer9"], "no layer named 'layer9'"),
        (["--mean", "a,b"], "--mean: expected three numbers"),
        (["--source-split", "test"], "has no split 'test'"),
    ],
)
def test_mistakes_in_the_command(pictures: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = dataset(pictures, tmp_path / "s", *options)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "s").exists()


def test_devices_of_two_kinds(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrp_fast.cli.dataset.find_device", lambda name, option: torch.device(name))
    result = dataset(pictures, tmp_path / "s", "--devices", "cpu,0")
    assert (result.exit_code, "expected devices of one kind" in result.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    result = dataset(tmp_path / "none", tmp_path / "s")
    assert (result.exit_code, f"there is no {tmp_path / 'none'}" in result.stderr) == (2, True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_leaves_a_readable_store(small_disk: Path, tmp_path: Path) -> None:
    source = draw_classes(tmp_path / "in", 400)
    with in_process(arguments(source, small_disk / "s")) as process:
        watch = threading.Timer(120, process.kill)
        watch.start()
        output, errors = process.communicate()
        watch.cancel()
    assert process.returncode == 1, output
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    store = open_store(small_disk / "s")
    done = store.status[:] == DONE
    assert 0 < done.sum() < 400
    maps = store.heatmap[:]
    assert (np.abs(maps[done]).max((1, 2)) > 0).all()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert dataset(source, small_disk / "s").exit_code == 0
    assert dataset(source, tmp_path / "whole").exit_code == 0
    assert_same_bits(small_disk / "s", tmp_path / "whole")
