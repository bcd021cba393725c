"""On Ray: the arrays of a run without it, also when an actor is killed, and data sets of others."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrp_fast import LRP, TraceError
from lrp_fast.batches import Batches, PipelineError
from lrp_fast.cluster import (
    Workers,
    _BatchWriter,
    _decode,
    attribute,
    attribute_on_cluster,
    connect,
    default_workers,
)
from lrp_fast.data import open_source
from lrp_fast.models import LoadedModel, load_model
from lrp_fast.pipeline import Progress
from lrp_fast.store import Layout, SettingsError
from runs import assert_same_bits, draw_with_an_empty_file, failures, run, setup, small

SIZE, COUNT = 32, 40

# Ray warns of what is its own business: futures of its defaults, files that it leaves open when it ends.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors:UserWarning"),
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None, None, SIZE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_with_an_empty_file(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    connect(nodes.address)
    yield ray
    ray.shutdown()
    nodes.shutdown()


def test_a_cluster_gives_the_arrays_of_one_process_though_an_actor_is_killed(
    cluster: Any, loaded: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    options = {"channels": ("layer4",), "retry_failed": False}
    run(loaded, pictures, tmp_path / "whole", **options)
    killed: list[int] = []
    named: dict[str, str] = {}

    def kill(progress: Progress) -> None:
        if progress.fresh >= 8 and not killed:
            # Ray gives its processes the names of what they run.
            titles = {file.parent.name: file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")}
            killed.append(next(int(pid) for pid, title in titles.items() if b"_BatchWriter" in title))
            os.kill(killed[0], signal.SIGKILL)

    found = attribute_on_cluster(
        setup(loaded),
        open_source(pictures),
        small(**options),
        tmp_path / "s",
        on_failure=named.__setitem__,
        on_batch=kill,
    )
    assert killed
    assert (found.total, found.done, found.failed, found.fresh) == (COUNT, COUNT - 1, 1, COUNT)
    assert named == failures(tmp_path / "s")
    assert_same_bits(tmp_path / "s", tmp_path / "whole")
    again = attribute_on_cluster(setup(loaded), open_source(pictures), small(**options), tmp_path / "s")
    assert again.fresh == 0
    with pytest.raises(SettingsError, match="levels: None there, 8 now"):
        attribute_on_cluster(setup(loaded), open_source(pictures), small(levels=8, **options), tmp_path / "s")


def test_a_batch_that_was_staged_when_its_actor_died_counts_once(
    cluster: Any, loaded: LoadedModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry finds the file of the actor that died before it could say so."""

    def twice(
        setup: Any, source: Any, path: Path, layout: Layout, workers: Any, pending: Any
    ) -> Iterator[dict[str, Any]]:
        batches = Batches(source, loaded.preprocessing, layout.batch_size)
        for batch in pending:
            row = _decode(cluster.put(batches), {"batch": batch})
            for _ in range(2):
                said = _BatchWriter(cluster.put(setup), path)({name: np.array([value]) for name, value in row.items()})
            yield {name: values[0] for name, values in said.items()}

    monkeypatch.setattr("lrp_fast.cluster._explain_batches", twice)
    found = attribute_on_cluster(setup(loaded), open_source(pictures), small(), tmp_path / "s")
    assert (found.total, found.done, found.failed, found.fresh) == (COUNT, COUNT - 1, 1, COUNT)


def test_two_nodes_have_two_workers(cluster: Any) -> None:
    assert default_workers() == Workers(2, 0.0, 0.5, 0.5)


def test_an_interruption_is_continued(cluster: Any, loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.fresh >= 8:
            raise KeyboardInterrupt

    found = attribute_on_cluster(setup(loaded), open_source(pictures), small(), tmp_path / "s", on_batch=interrupt)
    assert found.interrupted
    assert 8 <= found.fresh < COUNT
    rest = run(loaded, pictures, tmp_path / "s")
    assert rest.fresh <= COUNT - 8
    run(loaded, pictures, tmp_path / "whole")
    assert_same_bits(tmp_path / "s", tmp_path / "whole")


def test_errors_of_workers_are_plain(cluster: Any, loaded: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer named 'layer9'"):
        attribute_on_cluster(setup(loaded), open_source(pictures), small(channels=("layer9",)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_rows_of_a_data_set_are_explained(cluster: Any, loaded: LoadedModel) -> None:
    pictures = torch.randn(10, 3, SIZE, SIZE)
    rows = [{"image": picture.numpy(), "number": number} for number, picture in enumerate(pictures)]
    found = attribute(
        cluster.data.from_items(rows), loaded.model, "epsilon_plus", "ratio", layers=("layer4",), batch_size=4
    ).take_all()
    expected = LRP(loaded.model, "epsilon_plus", "ratio").explain(pictures, layers=("layer4",))
    chosen = expected.output.softmax(1).amax(1)
    for row in sorted(found, key=lambda row: row["number"]):
        index = row["number"]
        assert np.allclose(row["heatmap"], expected.heatmap[index], rtol=1e-4, atol=1e-6 * float(expected.start[index]))
        assert row["target"] == expected.target[index]
        assert row["probability"] == pytest.approx(float(chosen[index]), rel=1e-5)
        assert row["leak"] == pytest.approx(float(expected.leak[index]), abs=1e-5)
        sums = expected.layers["layer4"][index].sum((1, 2))
        assert np.allclose(row["channels/layer4"], sums, rtol=1e-3, atol=1e-5 * float(sums.abs().max()))


def test_pictures_of_a_data_set_are_brought_into_form(cluster: Any, loaded: LoadedModel) -> None:
    pictures = np.random.default_rng().integers(0, 256, (3, 50, 61, 3), dtype=np.uint8)
    data = cluster.data.from_items([{"picture": picture} for picture in pictures])
    options: dict[str, Any] = {"column": "picture", "preprocessing": loaded.preprocessing}
    found = attribute(data, loaded.model, **options).take_all()
    assert [row["heatmap"].shape for row in found] == [(SIZE, SIZE)] * 3
    assert all(abs(row["heatmap"]).max() > 0 for row in found)


def test_mistakes_are_named(cluster: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cluster.data.from_items([{"image": np.zeros((3, SIZE, SIZE), np.float32)}])
    with pytest.raises(TraceError):
        attribute(data, load_model(None, None, SIZE).model.train())
    with pytest.raises(ValueError, match="no layer named 'layer9'"):
        attribute(data, loaded.model, layers=("layer9",))
    with pytest.raises(Exception, match="no column 'picture'; it has: image"):
        attribute(data, loaded.model, column="picture").take_all()
    with pytest.raises(Exception, match="expected pictures H×W×3 in uint8, got float32"):
        attribute(data, loaded.model, preprocessing=loaded.preprocessing).take_all()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"pip install 'lrp-fast\[cluster\]'"):
        connect()
