"""The benchmarks of pipeline and metrics run, and what they compare agrees."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def test_throughput_compares_the_maps_it_times(tmp_path: Path) -> None:
    import throughput
    from lrp_fast.data import open_source

    loaded = throughput._model("embedded")
    source = open_source(throughput._photographs(tmp_path / "in", 6))
    arguments = argparse.Namespace(batch_size=2, workers=0, levels=None, rounds=1)
    result = throughput._compare(tmp_path, loaded, source, torch.device("cpu"), arguments)
    assert 0.05 < result["pipeline_over_bare"] < 20
    assert sum(result["waited_for"].values()) == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.glob("store-*"))


def test_perturbation_compares_equal_numbers_of_passes() -> None:
    import perturbation

    result = perturbation.measure("resnet18", 1, 50176, 2, 1)
    assert result["forward_passes"] == {"rank": 2, "threshold": 2}
    assert all(0.05 < ratio < 20 for ratio in result["metric_over_forward"].values())
