"""The speed the README promises, as a ratio within one interleaved run whose parity is checked in that run."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

pytest.importorskip("zennit", reason="compares with zennit")
pytest.importorskip("torchvision", reason="explains its networks")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
import contenders

CPU, PEER = torch.device("cpu"), "zennit EpsilonPlusFlat"


@pytest.fixture
def seconds() -> Iterator[Callable[..., dict[str, float]]]:
    """A function for the shortest time of each contender's calls, taken in turn after their maps were found right."""
    threads = torch.get_num_threads()

    def measure(names: Sequence[str], network: str, batch: int, side: int, turns: int, most: int) -> dict[str, float]:
        torch.set_num_threads(most)
        model, images = contenders.network(network, CPU), contenders.noise(batch, side, torch.float32, CPU)
        runs = {}
        for each in map(contenders.find, names):
            runs[each.name] = contenders.prepare(each, model, images)
            found = contenders.parity(each, images.dtype, runs[each.name](), contenders.expected(each, model, images))
            assert found["verdict"] == "ok", (each.name, found)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - begin)
        # Whatever else the machine does only adds: of several calls the shortest is nearest to what a call takes.
        return {name: min(each) for name, each in taken.items()}

    yield measure
    torch.set_num_threads(threads)


def test_faster_than_zennit_on_small_pictures(seconds: Callable[..., dict[str, float]]) -> None:
    found = seconds([PEER, "otsuki2024 eager"], "resnet18", batch=2, side=96, turns=12, most=1)
    assert found[PEER] >= 2.5 * found["otsuki2024 eager"], found


@pytest.mark.slow
def test_faster_than_zennit(seconds: Callable[..., dict[str, float]]) -> None:
    found = seconds([PEER, "otsuki2024 compiled"], "resnet50", batch=8, side=224, turns=5, most=torch.get_num_threads())
    assert found[PEER] >= 4 * found["otsuki2024 compiled"], found
