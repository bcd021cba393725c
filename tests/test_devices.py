"""Several processes on one machine fill one store: the same arrays, told of as one run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrp_fast.batches import PipelineError
from lrp_fast.data import FileSource, open_source
from lrp_fast.devices import attribute_on_devices
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.pipeline import Progress
from lrp_fast.store import DONE, SettingsError, open_store
from runs import CPU, assert_same_bits, draw_with_an_empty_file, failures, run, setup, small

SIZE, COUNT = 32, 30

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None, None, SIZE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_with_an_empty_file(tmp_path_factory.mktemp("pictures"))


def test_two_devices_give_the_arrays_of_one(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    run(loaded, pictures, tmp_path / "one")
    heard: list[Progress] = []
    named: list[tuple[str, str]] = []
    found = attribute_on_devices(
        setup(loaded),
        open_source(pictures),
        small(),
        tmp_path / "two",
        [CPU, CPU],
        on_failure=lambda key, reason: named.append((key, reason)),
        on_batch=heard.append,
    )
    assert (found.total, found.done, found.failed, found.fresh, found.interrupted) == (30, 29, 1, 30, False)
    assert found.bytes_per_image > 100
    assert [progress.fresh for progress in heard] == sorted(progress.fresh for progress in heard)
    assert heard[-1].fresh == 30
    assert dict(named) == failures(tmp_path / "two")
    assert_same_bits(tmp_path / "two", tmp_path / "one")
    with pytest.raises(SettingsError, match="levels: None there, 8 now"):
        attribute_on_devices(setup(loaded), open_source(pictures), small(levels=8), tmp_path / "two", [CPU, CPU])
    with pytest.raises(ValueError, match="no layer named 'layer9'"):
        attribute_on_devices(setup(loaded), open_source(pictures), small(channels=("layer9",)), tmp_path / "n", [CPU])


class Deadly(FileSource):
    """A source one of whose pictures ends the process that reads it."""

    def read(self, index: int) -> bytes:
        if index == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_the_others_go_on_where_one_process_dies(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    source = open_source(pictures)
    assert isinstance(source, FileSource)
    deadly = Deadly("folder", [Path(path) for path in source.paths], list(source.keys), source.labels, source.classes)
    with pytest.raises(PipelineError, match="the process on cpu ended with code -9"):
        attribute_on_devices(setup(loaded), deadly, small(), tmp_path / "s", [CPU, CPU])
    done = open_store(tmp_path / "s").status[:] == DONE
    assert done[:16].all()
    assert not done[24:28].any()
    attribute_on_devices(setup(loaded), source, small(), tmp_path / "s", [CPU, CPU])
    run(loaded, pictures, tmp_path / "whole")
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_an_interruption_ends_all_and_loses_nothing(loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.fresh == 4:
            threading.Thread(target=lambda: (time.sleep(0.01), os.kill(os.getpid(), signal.SIGINT))).start()

    found = attribute_on_devices(
        setup(loaded), open_source(pictures), small(), tmp_path / "s", [CPU, CPU], on_batch=interrupt
    )
    assert found.interrupted
    assert found.fresh == np.count_nonzero(open_store(tmp_path / "s").status[:])
    rest = attribute_on_devices(setup(loaded), open_source(pictures), small(), tmp_path / "s", [CPU, CPU])
    assert rest.fresh >= COUNT - found.fresh  # a failed sample is not computed again
    run(loaded, pictures, tmp_path / "whole")
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


class Interrupting(FileSource):
    """A source that gets a Ctrl-C while it is sent to a process."""

    def __getstate__(self) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return self.__dict__


def test_an_interruption_while_processes_start_is_one_like_any(
    loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    source = open_source(pictures)
    assert isinstance(source, FileSource)
    arguments = ("folder", [Path(path) for path in source.paths], list(source.keys), source.labels, source.classes)
    found = attribute_on_devices(setup(loaded), Interrupting(*arguments), small(), tmp_path / "s", [CPU, CPU])
    assert found.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert found.fresh == np.count_nonzero(open_store(tmp_path / "s").status[:])
