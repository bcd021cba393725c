"""The public API: what it returns, what it refuses, and that it leaves the model alone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from lrp_fast import LRP, Composite, Splits, TraceError, heat_quantize, list_composites
from lrp_fast.engine import Program
from lrp_fast.rules import WHOLE, Epsilon, Gamma, Group, Product, Rule, Stabilizer
from lrp_fast.runners import RecordedRunner
from lrp_fast.splits import Split
from networks import CifarResNet, calibrated, relative_error

SIDE = 32


class Halved(nn.Module):
    """Half a weight, as a parametrization computes it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return calibrated(CifarResNet(1), 3, (8, 3, SIDE, SIDE))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE)


def test_the_probability_is_that_of_the_explained_class(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    expected = explainer.explain(images).output.double().softmax(1)
    assert torch.equal(explainer.explain(images).probability, expected.amax(1))
    assert torch.equal(explainer.explain(images, target=2).probability, expected[:, 2])
    several = explainer.explain(images, target=[[0, 1]] * 4).probability
    assert torch.equal(several, expected[:, :2])


def test_attribution_holds_what_it_says(model: nn.Module, images: Tensor) -> None:
    result = LRP(model).explain(images, layers=("blocks.1", "conv1"))
    with torch.no_grad():
        expected = model(images)
    assert result.relevance is not None
    assert relative_error(result.output, expected) <= 1e-5
    assert torch.equal(result.target, expected.argmax(1))
    assert result.target.dtype == torch.int64
    assert torch.allclose(result.start, expected.softmax(1).amax(1), rtol=1e-5)
    assert torch.equal(result.heatmap, result.relevance.sum(1))
    total = result.relevance.double().flatten(1).sum(1)
    assert torch.allclose(result.leak, ((result.start - total) / result.start).float(), atol=1e-6)
    assert set(result.layers) == {"blocks.1", "conv1"}
    assert result.layers["blocks.1"].shape == (4, 32, SIDE // 2, SIDE // 2)
    everything = (result.relevance, result.heatmap, result.output, result.start, result.leak, *result.layers.values())
    for tensor in everything:
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert not tensor.is_inference()


def dtype_for(composite: str) -> torch.dtype:
    """float32 where all products are positive; rules with cancellation magnify its rounding far beyond 1e-5.

    ``epsilon_plus`` has them too, in its last layer and in its signed splits.
    """
    return torch.float32 if composite in ("otsuki2024", "conserving") else torch.float64


@pytest.mark.parametrize("composite", list(list_composites()))
def test_relevance_of_layers_is_the_references(model: nn.Module, images: Tensor, composite: str) -> None:
    # blocks.1.iadd and blocks.1 are a merge and the ReLU behind it, which travel as one
    names = ("bn1", "blocks.0", "blocks.1.conv1", "blocks.1.iadd", "blocks.1", "blocks.2.bn2", "linear")
    expected = LRP(model, composite, backend="reference").explain(images, layers=names)
    explainer = LRP(model, composite, dtype=dtype_for(composite))
    got = explainer.explain(images, layers=names)
    for name in names:
        assert relative_error(got.layers[name], expected.layers[name]) <= 1e-5, name
    plain = explainer.explain(images)
    assert relative_error(got.heatmap, plain.heatmap) <= 1e-5


def test_targets(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    several = explainer.explain(images, target=torch.tensor([[1, 5, 7]] * 4), layers=("blocks.0",))
    assert several.relevance is not None
    assert several.relevance.shape == (4, 3, 3, SIDE, SIDE)
    assert several.output.shape == (4, 10)
    for column, target in enumerate((1, 5, 7)):
        for form in (target, [target] * 4, (target,) * 4, torch.full((4,), target), torch.tensor(target)):
            single = explainer.explain(images, target=form, layers=("blocks.0",))
            assert single.target.tolist() == [target] * 4
            assert relative_error(several.relevance[:, column], single.relevance) <= 1e-5
            assert relative_error(several.layers["blocks.0"][:, column], single.layers["blocks.0"]) <= 1e-5
            assert torch.allclose(several.heatmap[:, column], single.heatmap, rtol=1e-4, atol=1e-7)
            assert torch.allclose(several.leak[:, column], single.leak, atol=1e-5)
            assert torch.allclose(several.start[:, column], single.start, rtol=1e-6)


def test_several_targets_for_every_composite(model: nn.Module, images: Tensor) -> None:
    targets = torch.randint(10, (4, 2))
    for name in list_composites():
        got = LRP(model, name, dtype=dtype_for(name)).explain(images, targets).relevance
        expected = LRP(model, name, backend="reference").explain(images, targets).relevance
        assert got is not None
        assert expected is not None
        assert relative_error(got.flatten(0, 1), expected.flatten(0, 1)) <= 1e-5, name


def test_starts(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    with torch.no_grad():
        output = model(images)
    one = explainer.explain(images, start="one")
    assert torch.equal(one.start, torch.ones(4))
    logit = explainer.explain(images, start="logit")
    assert torch.allclose(logit.start, output.amax(1), rtol=1e-4)
    assert relative_error(logit.relevance, one.relevance * logit.start.view(-1, 1, 1, 1)) <= 1e-5
    given = torch.rand(4, 10)
    by_tensor = explainer.explain(images, start=given)
    by_function = explainer.explain(images, start=lambda logits: given.to(logits))
    assert torch.equal(by_tensor.relevance, by_function.relevance)
    assert torch.allclose(by_tensor.start, given.sum(1))
    assert torch.equal(by_tensor.target, output.argmax(1))
    expected = LRP(model, backend="reference").explain(images, start=given)
    assert relative_error(by_tensor.relevance, expected.relevance) <= 1e-5
    three = explainer.explain(images, start=torch.stack([given, given * 2, given.flip(1)], 1))
    assert relative_error(three.relevance[:, 1], 2 * by_tensor.relevance) <= 1e-5


def test_nothing_in_nothing_out(model: nn.Module, images: Tensor) -> None:
    result = LRP(model, "conserving").explain(images, start=torch.zeros(4, 10))
    assert torch.equal(result.leak, torch.zeros(4))
    assert torch.equal(result.heatmap, torch.zeros(4, SIDE, SIDE))


def test_attribute_is_captums(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    relevance = explainer.attribute(images, target=2)
    assert isinstance(relevance, Tensor)
    assert relevance.shape == images.shape
    again, delta = explainer.attribute(images, 2, None, True)  # captum's order
    with pytest.raises(TypeError, match="a model of one tensor, got additional_forward_args of tuple"):
        explainer.attribute(images, 2, (1,))
    assert torch.equal(relevance, again)
    start = explainer.explain(images, 2).start
    assert torch.allclose(delta, start - relevance.flatten(1).sum(1), atol=1e-6)


@pytest.mark.parametrize("composite", list(list_composites()))
def test_heatmap_alone_is_the_channel_sum(model: nn.Module, images: Tensor, composite: str) -> None:
    explainer = LRP(model, composite)
    whole, alone = explainer.explain(images), explainer.explain(images, relevance=False)
    assert alone.relevance is None
    assert relative_error(alone.heatmap, whole.heatmap) <= 1e-5
    assert torch.allclose(alone.leak, whole.leak, atol=1e-5)


@pytest.mark.parametrize("composite", list(list_composites()))
def test_a_batch_is_its_images(model: nn.Module, composite: str) -> None:
    images = torch.randn(8, 3, SIDE, SIDE)
    explainer = LRP(model, composite, dtype=dtype_for(composite))
    batch = explainer.explain(images).relevance
    single = torch.cat([explainer.explain(image[None]).relevance for image in images])
    assert relative_error(batch, single) <= 1e-5


def test_two_calls_give_equal_bits_and_new_weights_are_noticed(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    first = explainer.explain(images)
    assert torch.equal(first.relevance, explainer.explain(images).relevance)
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
        model.blocks[0].bn1.running_mean.add_(0.1)
    changed = explainer.explain(images)
    assert relative_error(changed.relevance, first.relevance) > 1e-3
    assert torch.equal(changed.relevance, LRP(model).explain(images).relevance)
    model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)
    model.linear = nn.Linear(64, 10).eval()
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)
    model.blocks[0] = calibrated(CifarResNet(1), 6, (8, 3, SIDE, SIDE)).blocks[0]
    changed = explainer.explain(images)
    assert torch.equal(changed.relevance, LRP(model).explain(images).relevance)
    prune.l1_unstructured(model.linear, "weight", 0.5)
    for _ in range(2):
        with pytest.warns(UserWarning, match="hooks"), pytest.raises(ValueError, match=r"linear\.weight is no param"):
            explainer.explain(images)
    prune.remove(model.linear, "weight")
    assert relative_error(explainer.explain(images).output, changed.output) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(explainer.explain(images).output, model(images))


def test_other_modules_are_traced_anew(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    explainer.explain(images)
    model.conv1 = nn.Conv2d(3, 16, 3, padding=2, dilation=2, bias=False).eval()
    model.linear = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)
    assert explainer.describe() == LRP(model).describe()
    nn.utils.parametrize.register_parametrization(model.linear[0], "weight", Halved().eval())
    model.eval()
    for _ in range(2):
        with pytest.raises(ValueError, match="ParametrizedLinear has no relevance rule"):
            explainer.explain(images)


def test_other_settings_are_traced_anew(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    explainer.explain(images)
    model.conv1.stride = (2, 2)
    model.bn1.eps = 0.5
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)
    model.conv1.stride = "wide"
    for _ in range(2):
        with pytest.raises(ValueError, match="conv1"):
            explainer.explain(images)
    model.conv1.stride = (1, 1)
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)


class Configured(nn.Module):
    """Its forward reads an object that nobody watches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.settings = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), {"relu": True}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.linear((y.relu() if self.settings["relu"] else y).mean((2, 3)))


def test_settings_within_objects_need_a_refresh(images: Tensor) -> None:
    model = Configured().eval()
    explainer = LRP(model)
    explainer.explain(images)
    model.settings["relu"] = False
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"not the model's: off by .*refresh\(\)"):
        explainer.explain(images)
    explainer.refresh()
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)


def test_hooks_are_warned_of_whenever_they_come(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    expected = explainer.explain(images)
    made = [*explainer._programs.values()]
    handle = model.blocks[0].conv1.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.warns(UserWarning, match=r"forward hooks at blocks\.0\.conv1 are not run") as warned:
        got = explainer.explain(images)
    assert [warning.filename for warning in warned] == [__file__]
    assert torch.equal(got.relevance, expected.relevance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer.explain(images)
        handle.remove()
        assert torch.equal(explainer.explain(images).relevance, expected.relevance)
    assert [*explainer._programs.values()] == made  # what was traced again is the same


def test_what_comes_after_a_refresh_is_placed_anew(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    explainer.explain(images)
    model.double()
    explainer.refresh()
    assert explainer.explain(images.double()).relevance.dtype == torch.float64
    assert explainer.dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_squeeze_of_a_batch_is_explained(images: Tensor, backend: str) -> None:
    """Which of one image alone takes the batch away too."""
    model = calibrated(Squeezes(), 5, (8, 3, SIDE, SIDE))
    got = LRP(model, backend=backend).explain(images)
    plain = nn.Sequential(model.conv, nn.ReLU(), model.pool, nn.Flatten(), model.linear).eval()
    expected = LRP(plain, backend=backend)
    assert relative_error(got.relevance, expected.explain(images).relevance) <= 1e-6
    with pytest.raises(ValueError, match=r"squeeze from \(1, 8, 1, 1\) to \(8,\) does not keep the batch"):
        LRP(model, backend=backend).explain(images[:1])


class Squeezes(nn.Module):
    """As older residual networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.linear = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.conv(x).relu()).squeeze())


class Batches(nn.Module):
    """Takes batches of three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)).view(3, 8))


def test_what_the_model_raises_itself_is_said(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Batches itself fails on 2 images: shape '\[3, 8\]' is invalid"):
        LRP(Batches().eval()).explain(images[:3])


class Rows(nn.Module):
    """Gives the logits of one image, but not while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.mean((2, 3)))
        return y[0] if type(y) is Tensor else y


def test_logits_of_another_shape_are_said(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Rows gives logits of shape \(4,\) for 2 images, expected N x classes"):
        LRP(Rows().eval()).explain(images)


def test_memory_that_is_used_up_in_the_check_stays_what_it_is(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    full = torch.OutOfMemoryError("used up")
    with mock.patch.object(CifarResNet, "forward", side_effect=full), pytest.raises(torch.OutOfMemoryError):
        explainer.explain(images)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_first_operation_in_place_leaves_the_images(backend: str) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)).eval()
    features = torch.randn(3, 6)
    before = features.clone()
    LRP(model, "epsilon", backend=backend).explain(features)
    assert torch.equal(features, before)


class Asks(nn.Module):
    """Its forward is another one while it is traced."""

    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.linear, self.asks = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y if self.asks(y) else y.relu()
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "asks",
    [
        lambda y: isinstance(y, Tensor),
        lambda y: type(y) is Tensor,
        lambda y: not hasattr(y, "anything"),
        lambda y: not torch.is_grad_enabled(),
    ],
)
def test_what_was_traced_is_what_the_model_computes(
    asks: Callable[[Tensor], bool], backend: str, images: Tensor
) -> None:
    explainer = LRP(Asks(asks).eval(), backend=backend)
    for call in (explainer.explain, explainer.explain, explainer.audit):
        with pytest.raises(ValueError, match="logits of what was traced are not the model's: off by"):
            call(images)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_weights_that_are_not_finite_are_named(images: Tensor, backend: str) -> None:
    """oneDNN's ReLU makes zeros of NaN, and a map of them looks like any other."""
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model, backend=backend)
    expected = explainer.explain(images)
    whole = model.bn1.weight.detach().clone()
    with torch.no_grad():
        model.bn1.weight[5] = math.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weights are not finite .*: bn1.weight$"):
            explainer.explain(images)
    with torch.no_grad():
        model.bn1.weight.copy_(whole)
    assert torch.equal(explainer.explain(images).relevance, expected.relevance)
    model.bn1.running_var[5] = -1.0
    if backend == "torch":
        with pytest.raises(ValueError, match="own logits are not finite"):
            explainer.explain(images)
    else:
        assert not bool(explainer.explain(images).output.isfinite().any())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_image_that_overflows_has_no_map_and_the_others_have_theirs(images: Tensor, backend: str) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model, backend=backend)
    expected = explainer.explain(images)
    bright = images.to(torch.float64 if backend == "reference" else torch.float32, copy=True)
    bright[1] = torch.finfo(bright.dtype).max * bright[1].sign()
    got = explainer.explain(bright)
    others = torch.arange(len(images)) != 1
    assert torch.equal(got.heatmap[others], expected.heatmap[others])
    assert torch.equal(got.leak[others], expected.leak[others])
    assert bool(got.heatmap[1].isnan().any())
    assert bool(got.leak[1].isnan())


def test_weights_on_several_devices_are_refused_at_every_call(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 3, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    explainer.explain(images)
    [*model.children()][-1].to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lie on several devices \(cpu, meta|meta, cpu\)"):
            explainer.explain(images)


def test_auto_is_decided_anew_where_the_model_has_gone(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.device, torch.dtype]] = []

    def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        seen.append((device, dtype))
        return ("reference" if dtype == torch.float64 else "torch"), ""

    monkeypatch.setattr("lrp_fast.explain._choose_backend", choose)
    model = calibrated(CifarResNet(1), 3, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    assert explainer.backend == "torch"
    model.double()
    explainer.explain(images.double())
    assert explainer.backend == "reference"
    model.float()
    explainer.explain(images)
    assert explainer.backend == "torch"
    cpu = torch.device("cpu")
    assert list(dict.fromkeys(seen)) == [(cpu, torch.float32), (cpu, torch.float64)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("factor", [20, 40])
def test_a_class_out_of_the_question_has_its_map(images: Tensor, backend: str, factor: float) -> None:
    """Relevance far below one would underflow in float32 on its way; the map is scaled in the end."""
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    with torch.no_grad():
        last = [*model.modules()][-1]
        last.weight *= factor / model(images).std()
        last.bias *= 0
    explainer = LRP(model, "conserving", backend=backend)
    target = model(images).argmin(1)
    result, unit = (explainer.explain(images, target, start=start, layers=("blocks.1",)) for start in (None, "one"))
    assert float(result.probability.max()) < 10.0 ** (-factor / 2)
    assert float(result.leak.abs().max()) <= 1e-5
    assert torch.equal(result.leak, unit.leak)
    scale = result.probability.view(-1, 1, 1).to(unit.heatmap.dtype)
    torch.testing.assert_close(result.heatmap, unit.heatmap * scale, rtol=1e-5, atol=1e-44)
    layer = unit.layers["blocks.1"] * scale[..., None]
    torch.testing.assert_close(result.layers["blocks.1"], layer, rtol=1e-5, atol=1e-44)


def test_the_leak_of_what_speaks_for_and_against(model: nn.Module, images: Tensor) -> None:
    """A start whose sum is zero has no relative leak to its sum."""
    start = torch.zeros(len(images), model(images).shape[1])
    start[:, 0], start[:, 1] = 1.0, -1.0
    explainer = LRP(model, "conserving")
    result = explainer.explain(images, start=start)
    assert float(result.leak.abs().max()) <= 1e-5
    assert not bool(result.start.any())
    leaking = LRP(model, "epsilon", dtype=torch.float64)
    one = torch.eye(start.shape[1], dtype=torch.float64)[:1].repeat(len(images), 1)
    expected = leaking.explain(images, 0, start="one").leak
    assert float(expected.abs().min()) > 1e-9
    assert torch.allclose(leaking.explain(images, start=-one).leak, expected)
    both = leaking.explain(images, start=start.double())
    audit = leaking.audit(images, start=start.double())
    assert torch.allclose(audit.leak, both.leak, atol=1e-9)


def test_the_first_image_in_order_shows_that_the_model_is_the_one_traced(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    bright = images.clone()
    bright[0] = torch.finfo(images.dtype).max * images[0].sign()
    bright[1] *= 1e25
    got = LRP(model).explain(bright)
    assert bool(got.heatmap[0].isnan().all())
    assert bool(got.leak[0].isnan())
    assert torch.equal(got.heatmap[2:], LRP(model).explain(images).heatmap[2:])


def test_writes_through_data_need_a_refresh(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    explainer = LRP(model)
    explainer.explain(images)
    model.conv1.weight.data.mul_(1.5)
    explainer.refresh()
    assert torch.equal(explainer.explain(images).relevance, LRP(model).explain(images).relevance)


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 6, (8, 3, SIDE, SIDE))
    before = {key: (value.data_ptr(), value._version, value.clone()) for key, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        output = model(images)
    explainer = LRP(model)
    explainer.explain(images.requires_grad_())
    explainer.audit(images[:1].detach())
    with torch.no_grad():
        assert torch.equal(model(images), output)
    for key, value in model.state_dict().items():
        pointer, version, copied = before[key]
        assert (value.data_ptr(), value._version) == (pointer, version)
        assert torch.equal(value, copied)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_result_does_not_depend_on_the_callers_modes(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    expected = explainer.explain(images)
    with torch.inference_mode():
        inside = explainer.explain(images.clone())
    assert torch.equal(inside.relevance, expected.relevance)
    assert not inside.relevance.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(explainer.explain(images).relevance, expected.relevance)
    strided = torch.randn(4, SIDE, SIDE, 6).permute(0, 3, 1, 2)[:, ::2]
    copied = strided.contiguous()
    assert relative_error(explainer.explain(strided).relevance, explainer.explain(copied).relevance) <= 1e-6


def test_copies_and_pickles_are_explainers_of_their_own(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 5, (8, 3, SIDE, SIDE))
    composite = Composite.named("epsilon_plus").with_rule("blocks.1.*", Gamma(0.25)).with_rule(nn.Linear, Epsilon(1e-3))
    explainer = LRP(model, composite, split="symmetric", dtype=torch.float64)
    expected = explainer.explain(images).relevance
    for made in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert made.describe() == explainer.describe()
        assert torch.equal(made.explain(images).relevance, expected)
        assert made.model is not model
    assert copy.copy(explainer).model is model


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_features_are_explained_as_pixels_are(backend: str) -> None:
    model, x = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 10)
    result = LRP(model, backend=backend).explain(x)
    assert result.relevance.shape == (3, 10)
    assert torch.equal(result.heatmap, result.relevance.sum(1))
    assert torch.allclose(result.leak, 1 - result.heatmap / result.start, atol=1e-5)
    several = LRP(model, backend=backend).explain(x, [[0, 1]] * 3, relevance=False)
    assert several.heatmap.shape == (3, 2)


def test_zero_initialised_branches_are_finite(images: Tensor) -> None:
    model = calibrated(CifarResNet(1), 7, (8, 3, SIDE, SIDE))
    for block in model.blocks:
        nn.init.zeros_(block.bn2.weight)
        nn.init.zeros_(block.bn2.bias)
    images[0] = 0
    images[:, :, : SIDE // 2] = 0
    for name in list_composites():
        for split in ("ratio", "symmetric", "residual-only", "signed"):
            result = LRP(model, name, split).explain(images)
            assert bool(result.relevance.isfinite().all()), (name, split)
            precise = LRP(model, name, split, dtype=dtype_for(name)).explain(images)
            expected = LRP(model, name, split, backend="reference").explain(images)
            scale = expected.relevance.abs().amax() + 1e-12
            assert float((precise.relevance - expected.relevance).abs().amax() / scale) <= 1e-3, (name, split)


class Padded(nn.Module):
    """Padding as steps of their own, before convolutions and a max-pool; every layer has channels no input adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((2, 1, 0, 2)), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.strided = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.same = nn.Conv2d(12, 9, (2, 4), padding="same")
        self.last = nn.Conv2d(12, 6, 3)
        self.head = nn.Linear(9, 5)
        self.apply(_with_dead_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(F.relu(self.stem(x)), (1, 0, 1, 2)), 2, 1)
        x = F.relu(self.strided(F.pad(x, (0, 1, 2, 1))))
        x = F.avg_pool2d(F.pad(F.relu(self.same(x)), (0, 1, 1, 0)), 2)
        x = F.relu(self.last(F.pad(x, (1, 1, 1, 1, 1, 2))))
        return self.head(F.pad(F.adaptive_avg_pool2d(x, 1).flatten(1), (1, 2)))


@torch.no_grad()
def _with_dead_channels(module: nn.Module) -> None:
    """Every third channel has negative weights and a bias that lifts it above zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        module.weight[::3] = -module.weight[::3].abs()
        if module.bias is not None:
            module.bias[::3] = 1.0
    if isinstance(module, nn.BatchNorm2d):
        module.bias[::3] = 3.0


def test_padding_of_its_own_gets_no_relevance_when_conserving() -> None:
    model, x = Padded().eval(), torch.randn(3, 3, 17, 13)
    x[0, :, 5:] = 0.0
    x[1] = 0.0
    names = ("strided", "same", "last")
    expected = LRP(model, "conserving", backend="reference").explain(x, 1, layers=names)
    got = LRP(model, "conserving").explain(x, 1, layers=names)
    assert float(expected.leak.abs().max()) <= 1e-9
    assert float(got.leak.abs().max()) <= 1e-5
    assert relative_error(got.relevance, expected.relevance) <= 1e-5
    for name in names:
        assert relative_error(got.layers[name], expected.layers[name]) <= 1e-5, name
    several = LRP(model, "conserving").explain(x, [[1, 0]] * 3, relevance=False)
    assert relative_error(several.heatmap[:, 0], expected.heatmap) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padding_of_its_own_is_a_convolutions_padding_when_conserving(backend: str) -> None:
    own, inner = nn.Conv2d(3, 8, 3, 2, padding=(2, 1)), nn.Conv2d(8, 4, 3, padding=1)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    one = nn.Sequential(own, nn.ReLU(), inner, head).apply(_with_dead_channels).eval()
    first, second = copy.deepcopy(own), copy.deepcopy(inner)
    first.padding = second.padding = (0, 0)
    two = nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), first, nn.ReLU(), nn.ZeroPad2d(1), second, head).eval()
    x = torch.randn(3, 3, 11, 14)
    x[0] = 0.0
    expected, got = (LRP(model, "conserving", backend=backend).explain(x, 2).relevance for model in (one, two))
    assert relative_error(got, expected) <= 1e-5


def test_relevance_of_what_only_saw_padding_is_lost_to_constants() -> None:
    """Windows without a valid input: a convolution's own padding, or a step's, as wide as its kernel."""
    x = torch.randn(2, 3, 9, 7)
    maps = []
    for padding in (nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(3, 6, 2)), nn.Conv2d(3, 6, 2, padding=2)):
        model = nn.Sequential(padding, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12 * 10, 4)).eval()
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.uniform_(module.weight, -0.1, 0.2)
                nn.init.constant_(module.bias, 0.1)
        result, audit = LRP(model, "conserving").explain(x), LRP(model, "conserving").audit(x)
        assert bool((result.leak > 1e-3).all())
        assert float((result.leak - audit.leak).abs().max()) <= 1e-5
        assert float((audit.lost()["constants"] / audit.start - audit.leak).abs().max()) <= 1e-9
        maps.append(result.relevance)
    assert relative_error(*maps) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 4, 32, 32), (0, 3, 32, 32), (2, 3, 32, 32, 32)])
def test_a_description_is_of_a_shape_that_the_model_takes(
    model: nn.Module, backend: str, shape: tuple[int, ...]
) -> None:
    explainer = LRP(model, backend=backend)
    assert explainer.describe((2, 3, 32, 32)) == explainer.describe()
    with pytest.raises(ValueError, match=r"expected inputs of shape N x 3 x H x W, got shape \("):
        explainer.describe(shape)


def test_per_layer_rules(model: nn.Module, images: Tensor) -> None:
    composite = Composite.named("epsilon-plus").with_rule("blocks.1.*", Gamma(0.25)).with_rule(nn.Linear, Epsilon(1e-3))
    explainer = LRP(model, composite, split=Splits(identity="symmetric", projection="ratio"))
    text = explainer.describe()
    assert "gamma(gamma=0.25" in text
    assert "epsilon(epsilon=0.001)" in text
    assert "symmetric split" in text
    expected = LRP(model, composite, Splits("symmetric", "ratio"), backend="reference").explain(images)
    double = LRP(model, composite, Splits("symmetric", "ratio"), dtype=torch.float64)
    assert relative_error(double.explain(images).relevance, expected.relevance) <= 1e-9
    assert relative_error(expected.relevance, LRP(model, "epsilon_plus").explain(images).relevance) > 1e-3


def test_bfloat16(model: nn.Module) -> None:
    images = torch.randn(8, 3, SIDE, SIDE)
    expected = LRP(model, backend="reference").explain(images)
    got = LRP(model, dtype=torch.bfloat16).explain(images)
    assert got.relevance.dtype == torch.float32
    same = got.target == expected.target
    assert bool(same.any())
    assert relative_error(got.relevance[same], expected.relevance[same]) <= 2e-2
    ranks = [maps[same].flatten(1).argsort(1).argsort(1).double() for maps in (got.heatmap, expected.heatmap)]
    for one, other in zip(*ranks, strict=True):
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) >= 0.999


def test_model_in_its_own_dtype(model: nn.Module, images: Tensor) -> None:
    double = copy.deepcopy(model).double()
    got = LRP(double).explain(images.double())
    expected = LRP(model, backend="reference").explain(images)
    assert got.relevance.dtype == expected.relevance.dtype == torch.float64
    assert relative_error(got.relevance, expected.relevance) <= 1e-12
    brain = LRP(copy.deepcopy(model).bfloat16())
    assert brain.dtype == torch.bfloat16
    assert brain.explain(images).relevance.dtype == torch.float32


def test_a_large_batch_goes_in_pieces(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(7, 3, 16, 16)
    expected = LRP(model, backend="reference")
    explainer = LRP(model)
    monkeypatch.setattr("lrp_fast.explain.LARGEST_TENSOR", 4 * 16 * 16 * 16 * 3)
    for target in (None, 2, list(range(7)), [[1, 2]] * 7):
        got, wanted = (one.explain(images, target, layers=("blocks.0",)) for one in (explainer, expected))
        for name in ("relevance", "heatmap", "output"):
            assert getattr(got, name).shape == getattr(wanted, name).shape
            assert relative_error(getattr(got, name), getattr(wanted, name)) <= 1e-5
        assert relative_error(got.layers["blocks.0"], wanted.layers["blocks.0"]) <= 1e-5
        assert torch.allclose(got.start.double(), wanted.start, rtol=1e-5)
        assert torch.equal(got.target, wanted.target)
        assert got.leak.shape == wanted.leak.shape
    assert {shape[0] for shape, *_ in explainer._programs} < {1, 2, 3, 4}
    assert explainer.explain(images, relevance=False).relevance is None
    given = explainer.explain(images, start=lambda logits: torch.arange(7.0)[:, None] * torch.ones_like(logits))
    assert given.heatmap.shape == (7, 16, 16)


def test_compiled_is_the_same(model: nn.Module, images: Tensor) -> None:
    compiled = LRP(model, compile=True)
    expected = LRP(model, backend="reference").explain(images, layers=("blocks.0",))
    got = compiled.explain(images, layers=("blocks.0",))
    assert relative_error(got.relevance, expected.relevance) <= 1e-5
    assert relative_error(got.layers["blocks.0"], expected.layers["blocks.0"]) <= 1e-5


def test_what_does_not_compile_as_one_graph_is_an_error(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a break in the graph torch would take one step's code for another's, and the map would be wrong."""
    forward_unit = Program._forward_unit

    def breaking(*arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return forward_unit(*arguments)

    monkeypatch.setattr(Program, "_forward_unit", breaking)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        LRP(model, compile=True).explain(images)


class _Graph:
    """Stands in for a CUDA graph: what it leaves is as it was when it was recorded."""

    def pool(self) -> int:
        return 0

    def replay(self) -> None:
        pass


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Recordings without a device, each with its arguments; the first one runs out of memory."""
    begun: list[dict[str, Any]] = []

    @contextmanager
    def graph(graph: object, **options: Any) -> Iterator[None]:
        begun.append(options)
        yield
        if len(begun) == 1:
            raise torch.OutOfMemoryError("no memory")

    stream = mock.Mock()
    for name, stand_in in {
        "CUDAGraph": _Graph, "graph": graph, "Stream": lambda: stream, "current_stream": lambda: mock.Mock(), "Event": mock.Mock,
        "stream": lambda stream: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return begun


def recording_explainer(model: nn.Module, images: Tensor) -> LRP:
    """One that records, which is refused without a device until it has found its place."""
    explainer = LRP(model, backend="torch")
    explainer.explain(images[:1])
    explainer._programs.clear()
    explainer.cuda_graph = True
    return explainer


def test_a_recording_that_fails_is_not_replayed(
    model: nn.Module, images: Tensor, recordings: list[dict[str, Any]]
) -> None:
    explainer = recording_explainer(model, images)
    with pytest.raises(torch.OutOfMemoryError):
        explainer.explain(images)
    got = explainer.explain(images)
    assert relative_error(got.relevance, LRP(model, backend="reference").explain(images).relevance) <= 1e-5
    onward, again, back = recordings
    assert onward == again
    assert back["pool"] == 0
    assert {options["capture_error_mode"] for options in recordings} == {"thread_local"}
    explainer.explain(torch.randn_like(images))
    assert len(recordings) == 3


def test_a_recording_takes_inputs_of_any_dtype_and_keeps_few(
    model: nn.Module, images: Tensor, recordings: list[dict[str, Any]]
) -> None:
    recordings.append({})
    explainer = recording_explainer(model, images)
    output = explainer.explain(images.bfloat16()).output
    (runner,) = explainer._programs.values()
    assert isinstance(runner, RecordedRunner)
    assert runner._onward is not None
    for maps in (2, 1, 3):
        relevance, _ = runner.backward(None, output.repeat(maps, 1))
        assert len(relevance) == maps * len(images)
    assert runner._onward.given.dtype == torch.float32
    assert list(runner._back) == [len(images), 3 * len(images)]


def test_recordings_are_replayed_one_at_a_time(
    model: nn.Module, images: Tensor, recordings: list[dict[str, Any]]
) -> None:
    """Two threads, or two streams, would read what the other has written."""
    recordings.append({})
    explainer = recording_explainer(model, images)
    explainer._one_at_a_time = turn = mock.MagicMock()
    explainer.explain(images)
    turn.__enter__.assert_called_once()
    (runner,) = explainer._programs.values()
    assert runner._done.record.call_count == 2


def test_a_recording_is_freed_at_once(model: nn.Module, images: Tensor, recordings: list[dict[str, Any]]) -> None:
    """It holds the memory of a whole explanation, which nobody should wait for a garbage collector to get back."""
    recordings.append({})
    explainer = recording_explainer(model, images)
    explainer.explain(images)
    held = [weakref.ref(runner) for runner in explainer._programs.values()]
    gc.disable()
    try:
        explainer.refresh()
        assert [runner() for runner in held] == [None]
    finally:
        gc.enable()


def test_the_models_device_is_the_current_one(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        within.append(device)
        yield

    monkeypatch.setattr("lrp_fast.explain.current_device", current)
    explainer = LRP(model)
    explainer.explain(images)
    explainer.audit(images)
    LRP(model, backend="reference").explain(images)
    assert within == [torch.device("cpu")] * 3


def test_which_backend_ran(model: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lrp_fast"):
        explainer = LRP(model)
    assert explainer.backend == "torch"
    assert "backend: torch" in caplog.text
    assert LRP(model, backend="reference").backend == "reference"
    assert LRP(model, backend="reference").explain(images[:1]).relevance.dtype == torch.float64
    assert all(row.endswith("torch") for row in explainer.describe().splitlines()[2:])


class TestErrors:
    """Bad input is refused at the edge, with what was got and what is expected."""

    def test_training_mode(self, images: Tensor) -> None:
        model = CifarResNet(1)
        with pytest.raises(TraceError, match=r"eval\(\)"):
            LRP(model)
        explainer = LRP(model.eval())
        model.blocks[0].bn1.train()
        with pytest.raises(TraceError, match=r"blocks\.0\.bn1.*eval\(\)"):
            explainer.explain(images)

    def test_names(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="otsuki2024.*epsilon_plus"):
            LRP(model, "epsilon_minus")
        with pytest.raises(ValueError, match="ratio.*symmetric"):
            LRP(model, split="half")
        with pytest.raises(ValueError, match="auto, reference, torch"):
            LRP(model, backend="jax")
        with pytest.raises(TypeError, match="composite"):
            LRP(model, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="split"):
            LRP(model, split=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            LRP("resnet50")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="float16"):
            LRP(model, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"the reference computes in float64, got dtype=torch\.bfloat16"):
            LRP(model, backend="reference", dtype=torch.bfloat16)
        half = copy.deepcopy(model).half()
        assert LRP(half, backend="reference").explain(torch.randn(2, 3, SIDE, SIDE).half()).heatmap.dtype == torch.float64
        with pytest.raises(ValueError, match=r"relevance cannot be computed in torch\.float16"):
            LRP(half)
        with pytest.raises(TypeError, match=r"expected a shape N x C x H x W, got 224"):
            LRP(model).describe(224)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="compile=True is for the torch and triton backends, got backend 'reference'"):
            LRP(model, backend="reference", compile=True)

    @pytest.mark.parametrize(
        ("shape", "text"),
        [
            ((3, SIDE, SIDE), r"N x 3 x H x W.*\(3, 32, 32\)"),
            ((2, 4, SIDE, SIDE), r"N x 3 x H x W.*\(2, 4, 32, 32\)"),
            ((0, 3, SIDE, SIDE), r"\(0, 3, 32, 32\)"),
            ((2, 3, SIDE, 0), r"\(2, 3, 32, 0\)"),
            ((2, 3, 16, 64), r"\(2, 3, 16, 64\)"),
        ],
    )
    def test_shapes(self, model: nn.Module, shape: tuple[int, ...], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            LRP(model).explain(torch.randn(shape))

    def test_values(self, model: nn.Module, images: Tensor) -> None:
        images[2, 0, 3, 3] = float("nan")
        images[3, 1, 0, 0] = float("inf")
        with pytest.raises(ValueError, match="not finite.*sample 2, 3"):
            LRP(model).explain(images)

    def test_types(self, model: nn.Module, images: Tensor) -> None:
        with pytest.raises(TypeError, match="uint8"):
            LRP(model).explain((images * 255).to(torch.uint8))
        with pytest.raises(TypeError, match="ndarray"):
            LRP(model).explain(images.numpy())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="meta.*cpu"):
            LRP(model).explain(images.to("meta"))
        with pytest.raises(ValueError, match="meta device, which holds no values"):
            LRP(copy.deepcopy(model).to("meta")).explain(images.to("meta"))
        with pytest.raises(TypeError, match=r"expected dense inputs.*sparse_coo"):
            LRP(model).explain(images.to_sparse())
        with pytest.raises(TypeError, match=r"float8_e5m2"):
            LRP(model).explain(images.to(torch.float8_e5m2))

    @pytest.mark.parametrize("target", [10, -1, [0, 1, 2, 99]])
    def test_target_out_of_range(self, model: nn.Module, images: Tensor, target: int | list[int]) -> None:
        number = target if isinstance(target, int) else 99
        with pytest.raises(ValueError, match=f"{number}.*0 to 9"):
            LRP(model).explain(images, target)

    @pytest.mark.parametrize("target", [[], [1, 2], torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 1, 1).long()])
    def test_target_of_wrong_shape(self, model: nn.Module, images: Tensor, target: list[int] | Tensor) -> None:
        with pytest.raises(ValueError, match="4"):
            LRP(model).explain(images, target)

    @pytest.mark.parametrize("target", ["cat", 1.5, torch.tensor([True] * 4), [[1], [2, 3], [1], [1]]])
    def test_target_of_wrong_type(self, model: nn.Module, images: Tensor, target: object) -> None:
        with pytest.raises(TypeError, match="target"):
            LRP(model).explain(images, target)  # type: ignore[arg-type]

    def test_starts(self, model: nn.Module, images: Tensor) -> None:
        explainer = LRP(model)
        with pytest.raises(ValueError, match="probability, logit, one"):
            explainer.explain(images, start="logits")
        with pytest.raises(ValueError, match=r"\(4, 10\).*\(4, 9\)"):
            explainer.explain(images, start=torch.rand(4, 9))
        with pytest.raises(ValueError, match="no target"):
            explainer.explain(images, target=1, start=torch.rand(4, 10))
        with pytest.raises(TypeError, match="start"):
            explainer.explain(images, start=lambda output: "all")  # type: ignore[arg-type,return-value]
        with pytest.raises(ValueError, match="not finite"):
            explainer.explain(images, start=torch.full((4, 10), float("nan")))
        with pytest.raises(TypeError, match=r"a real tensor N x classes .* got a torch\.complex64 tensor"):
            explainer.explain(images, start=torch.ones(4, 10, dtype=torch.complex64))

    def test_rules_and_splits_of_ones_own(self, model: nn.Module, images: Tensor) -> None:
        given = Split("given", "numbers", False, True, lambda residual, skip: (1, 0))
        expected = LRP(model, split="residual-only").explain(images).heatmap
        assert relative_error(LRP(model, split=given).explain(images).heatmap, expected) <= 1e-6
        other = dataclasses.replace(given, name="ratio")
        for backend, call in (("reference", "explain"), ("torch", "audit")):
            with pytest.raises(ValueError, match="an equation for the split 'ratio', but this is another"):
                getattr(LRP(model, split=other, backend=backend), call)(images)
        doubled = Rule("doubled", (), (Group((Product("x", WHOLE, 2.0),), bias=WHOLE),), Stabilizer(1e-6))
        with pytest.raises(ValueError, match="the rule doubled has a bias, so it needs a product with the coefficient 1"):
            LRP(model, Composite.named("epsilon").with_rule(nn.Linear, doubled)).explain(images)

    def test_layers(self, model: nn.Module, images: Tensor) -> None:
        with pytest.raises(ValueError, match=r"'blocks\.7'.*blocks\.0"):
            LRP(model).explain(images, layers=("blocks.7",))
        layers: Any
        for layers in (None, "blocks.0", [3]):
            with pytest.raises(TypeError, match="expected layers as names in a list or tuple, got"):
                LRP(model).explain(images, layers=layers)


def test_importing_is_light() -> None:
    code = (
        "import sys, lrp_fast\n"
        "from lrp_fast import LRP, Composite, Splits, heat_quantize, list_composites\n"
        "heavy = {'triton', 'torchvision', 'timm', 'matplotlib', 'zennit', 'captum', 'typer', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_quantized_heatmaps_keep_order(model: nn.Module, images: Tensor) -> None:
    heatmap = LRP(model).explain(images).heatmap
    quantized = heat_quantize(heatmap, levels=8)
    assert bool((quantized <= heatmap + 1e-12).all())
    assert all(len(image.unique()) <= 8 for image in quantized)
