"""What an explanation does on a GPU, as far as it can be seen without one: every tensor on the device, and few waits for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrp_fast import LRP, Attribution, backends, heat_quantize, list_composites
from lrp_fast.backends.triton import binding
from lrp_fast.backends.triton.binding import check_device
from lrp_fast.batches import BatchExplainer, Decoded, find_batch_size, on_device
from lrp_fast.heatmap import from_heat_levels, heat_levels, heat_quantize_signed, smooth
from lrp_fast.methods import find_method
from lrp_fast.metrics import InsertionDeletion, insertion_deletion, pointing_game, relevance_mass, relevance_rank
from lrp_fast.store import Layout
from networks import SmallResNet, calibrated
from simulated_device import DEVICE, DeviceTensor, on_simulated_device, simulated_device, waits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is at hand")


@pytest.fixture
def model() -> nn.Module:
    return calibrated(SmallResNet(), int(torch.randint(10**6, ())), (8, 3, 25, 27))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 25, 27)


@pytest.fixture(autouse=True)
def kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (binding, backends.triton):
        monkeypatch.setattr(module, "check_device", lambda device, dtype: check_device(torch.device("cpu"), dtype))


def test_what_the_simulation_refuses_and_counts() -> None:
    with simulated_device():
        x, y = torch.randn(3, device=DEVICE), torch.randn(3)
        assert isinstance(x + 1.0, DeviceTensor)
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            x + y
        assert (x + y.to(DEVICE)).device == DEVICE
        assert waits == []
        x[:2] = 0.0
        x.add_(1.0)
        assert x.tolist()[:2] == [1.0, 1.0]
        assert (x > 0).cpu()[0]
        assert waits == ["tolist", "to the host"]


def tensors_of(results: Any) -> list[Tensor]:
    """All tensors of a result, or of several."""
    if isinstance(results, (Attribution, InsertionDeletion)):
        results = vars(results)
    elif isinstance(results, (list, tuple)):
        results = list(map(tensors_of, results))
    return [x for x in tree_leaves(results) if isinstance(x, Tensor)]


def compared(ask: Callable[..., Any], model: nn.Module, *tensors: Tensor) -> tuple[Any, list[str]]:
    """What a function of a model and tensors gives on the simulated device, found to be what it gives here; and its waits."""
    expected = tensors_of(ask(model, *tensors))
    copied = on_simulated_device(copy.deepcopy(model))
    with simulated_device():
        there = [x.to(DEVICE) for x in tensors]
        ask(copied, *there)  # what is asked the first time only is not counted
        waits.clear()
        results = ask(copied, *there)
    found = tensors_of(results)
    assert len(found) == len(expected) > 0
    for result, other in zip(found, expected, strict=True):
        one = result.values if isinstance(result, DeviceTensor) else result
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-5 * float(other.double().abs().max()))
    return results, list(waits)


INTERPRETED = ("otsuki2024", "conserving", "epsilon_alpha2_beta1", "epsilon_gamma_box")
"""Composites that between them have all kinds of gates and first layers."""


@pytest.mark.parametrize(
    ("composite", "backend"),
    [(name, "torch") for name in list_composites() if name != "epsilon"] + [(name, "triton") for name in INTERPRETED],
)
def test_an_explanation_stays_on_the_device_and_waits_for_nothing(
    model: nn.Module, images: Tensor, composite: str, backend: str
) -> None:
    explainers: dict[nn.Module, LRP] = {}

    def explained(model: nn.Module, images: Tensor) -> list[Attribution]:
        here = backend if isinstance(images, DeviceTensor) else "torch"
        explainer = explainers.setdefault(model, LRP(model, composite, backend=here))
        return [
            explainer.explain(images, layers=("layer2",)),
            explainer.explain(images, [[1, 2], [3, 4]], start="logit"),
            explainer.explain(images, 3, relevance=False),
        ]

    results, waited = compared(explained, model, images)
    assert all(isinstance(x, DeviceTensor) for x in tensors_of(results))
    # Whether the inputs are finite is asked at the beginning and heard at the end, of a copy that is on the host by then.
    assert waited == []


def test_a_start_that_is_given_is_looked_at_once(model: nn.Module, images: Tensor) -> None:
    start = torch.randn(2, 7)
    explainers: dict[nn.Module, LRP] = {}

    def explained(model: nn.Module, images: Tensor, start: Tensor) -> Attribution:
        return explainers.setdefault(model, LRP(model, backend="torch")).explain(images, start=start)

    _, waited = compared(explained, model, images, start)
    assert waited == ["item"]


@pytest.mark.parametrize("levels", [None, 8])
def test_rows_of_a_store_are_fetched_without_waiting(model: nn.Module, images: Tensor, levels: int | None) -> None:
    layout = Layout(8, 4, 25, 27, levels, {"layer2": 40}, relevance={"layer3": (24, 2, 2), "input": (3, 25, 27)})
    explainers: dict[nn.Module, BatchExplainer] = {}

    def rows(model: nn.Module, images: Tensor) -> list[Tensor]:
        explainer = explainers.setdefault(model, BatchExplainer(LRP(model, backend="torch"), layout))
        batches = [Decoded(number, torch.cat([host, host + number]), [""] * 4) for number in range(2)]
        found = [explainer.explain(batch) for batch in on_device(batches, images.device)]
        waits.append("all explained")
        fields = [one.rows(layout) for one in found]
        return [torch.from_numpy(value) for row in fields for value in row.values() if value.dtype.kind in "fiu"]

    host = images
    _, waited = compared(rows, model, images)
    assert waited.index("all explained") == 0


METRICS: dict[str, Callable[..., Any]] = {
    "rank": lambda model, images, maps, masks, labels: insertion_deletion(model, images, maps, labels, step=200),
    "threshold, blurred": lambda model, images, maps, masks, labels: insertion_deletion(
        model, images, maps, labels, patch=2, step=40, order="threshold", baseline="blur"
    ),
    "pointing": lambda model, images, maps, masks, labels: pointing_game(maps, masks),
    "mass": lambda model, images, maps, masks, labels: relevance_mass(maps, masks),
    "relevance rank": lambda model, images, maps, masks, labels: relevance_rank(maps, masks),
    "quantized": lambda model, images, maps, masks, labels: heat_quantize(maps),
    "quantized, signed": lambda model, images, maps, masks, labels: heat_quantize_signed(maps),
    "levels": lambda model, images, maps, masks, labels: from_heat_levels(*heat_levels(maps)),
    "smooth": lambda model, images, maps, masks, labels: smooth(maps, 2.0),
    "method": lambda model, images, maps, masks, labels: find_method("conserving+quantized")(model, images, labels),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_and_maps(model: nn.Module, images: Tensor, name: str) -> None:
    maps, masks = torch.rand(2, 25, 27), torch.rand(2, 25, 27) > 0.5
    compared(METRICS[name], model, images, maps, masks, torch.tensor([1, 4]))


def test_the_batch_size_is_found(model: nn.Module) -> None:
    with simulated_device():
        assert find_batch_size(LRP(on_simulated_device(model), backend="torch"), 25, 2) in (1, 2)
