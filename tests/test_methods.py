"""Every method: the model left alone, maps that do not depend on the batch, and numbers against plain evaluations."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lrp_fast import LRP, Composite, Splits, TraceError, composites, heat_quantize, list_composites
from lrp_fast.embedded import draw_batch, embedded_network, network_input
from lrp_fast.methods import (
    PRESETS,
    ActivationMap,
    CaptumLRP,
    Edges,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LRPMethod,
    Method,
    PreparedMethod,
    RandomMap,
    RandomTwoLevels,
    Rise,
    SmoothGrad,
    ZennitMethod,
    checked_heatmaps,
    find_method,
    list_methods,
)
from lrp_fast.methods.activation_maps import last_feature_map
from lrp_fast.methods.zennit_relevance import ZENNIT_COMPOSITES
from lrp_fast.trace import trace
from networks import CifarResNet, calibrated, relative_error, vgg

pytest.importorskip("captum", reason="needs the baselines")
pytest.importorskip("pytorch_grad_cam", reason="needs the baselines")
pytest.importorskip("zennit", reason="needs the baselines")

CONTROLS = ("random", "random-two-level", "edges")
NAMES = [
    *list_methods(),
    "otsuki2024:residual-only/symmetric",
    "otsuki2024+quantized",
    "conserving:symmetric+quantized4",
]


def quick(name: str) -> Method:
    """The method of that name, with fewer passes where it takes many."""
    cheaper = {
        "rise": Rise(masks=20),
        "integrated-gradients": IntegratedGradients(steps=8),
        "smoothgrad": SmoothGrad(6),
    }
    return cheaper.get(name) or find_method(name)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return calibrated(torchvision.models.resnet18(num_classes=5), 3)


@pytest.fixture(scope="module")
def double(resnet: nn.Module) -> nn.Module:
    return copy.deepcopy(resnet).double()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return calibrated(CifarResNet(blocks=1, classes=5), 4)


def logit(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return model(images).gather(1, target[:, None]).sum()


def gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(logit(model, images, target), images)[0]


def condition(model: nn.Module) -> dict[str, object]:
    """Everything about a model that an explanation could leave behind."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "versions": [value._version for value in model.state_dict(keep_vars=True).values()],
        "addresses": [value.data_ptr() for value in model.state_dict(keep_vars=True).values()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in model.modules()
        ],
        "forward": [vars(module).get("forward") for module in model.modules()],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    values, now = before.pop("values"), after.pop("values")
    assert all(torch.equal(value, now[name]) for name, value in values.items())  # type: ignore[index,attr-defined]
    assert before == after


# Every method.


def predicted(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The embedded network, pictures drawn afresh, and their classes: what speaks for others may be nothing at all."""
    model, images = embedded_network(), network_input(draw_batch(int(torch.randint(1000, ())), range(count), 96)[0])
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def subject(name: str, resnet: nn.Module, small: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of this test's own, three images, and their targets, with which a method's map is well defined."""
    images, target = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 1])
    if name in ("grad-cam", "grad-cam++"):
        return predicted(3)
    if name == "score-cam":
        return copy.deepcopy(small), images, target
    if name.startswith(("otsuki2024", "conserving", "rise", *CONTROLS)):
        return copy.deepcopy(resnet), images, target
    # Poles and kinks: in float32 a sum near zero can take another sign in another batch.
    return embedded_network().double(), images.double(), target


@pytest.mark.parametrize("name", NAMES)
def test_contract(resnet: nn.Module, small: nn.Module, name: str) -> None:
    model, images, target = subject(name, resnet, small)
    model.get_parameter("conv1.weight").requires_grad_(False)  # a flag that is not the default must stay, too
    kept, method, before = images.clone(), quick(name), condition(model)
    random_state = torch.get_rng_state()
    maps = method(model, images, target)
    assert_same(before, condition(model))
    assert torch.equal(images, kept)
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    assert maps.shape == (3, *images.shape[2:])
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert not maps.is_inference()
    assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
    alone = torch.cat([method(model, images[i : i + 1], target[i : i + 1]) for i in range(3)])
    if name in CONTROLS:
        assert torch.equal(alone, maps)
        assert torch.equal(method(model, images, target.flip(0)), maps)
    else:
        assert relative_error(alone, maps) <= 1e-4
        others = method(model, images, (target + 1) % 5)
        assert relative_error(others, maps) > 1e-3


@pytest.mark.parametrize(
    "name", ["otsuki2024", "guided-backprop", "grad-cam", "captum-lrp", "zennit:epsilon_plus", "rise"]
)
def test_modes_of_the_caller_do_not_matter(name: str) -> None:
    method, (model, images, target) = quick(name), predicted(2)
    expected = method(model, images, target)
    assert expected.abs().max() > 0
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = method(model, images.clone(), target.clone())
    assert not got.is_inference()
    assert relative_error(got, expected) <= 1e-6
    with torch.no_grad():
        assert relative_error(method(model, images, target), expected) <= 1e-6


@pytest.mark.parametrize("name", ["otsuki2024", "grad-cam", "input-x-gradient", "zennit:epsilon_plus", "edges"])
def test_sizes_that_are_not_square(small: nn.Module, name: str) -> None:
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    wide = F.pad(images, (0, 24))
    pooled = nn.Sequential(small.conv1, small.bn1, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    maps = find_method(name)(pooled.eval(), wide, target)
    assert maps.shape == (2, 32, 56)
    assert maps.isfinite().all()


@pytest.mark.parametrize("name", ["otsuki2024", "input-x-gradient", "grad-cam"])
def test_changed_models_are_seen(small: nn.Module, name: str) -> None:
    model, method = copy.deepcopy(small), find_method(name)
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([4, 0])

    def check() -> Tensor:
        maps = method(model, images, target)
        assert relative_error(maps, find_method(name)(model, images, target)) <= 1e-6
        return maps

    first = check()
    with torch.no_grad():
        model.conv1.weight.mul_(torch.randn_like(model.conv1.weight))
    second = check()
    assert relative_error(second, first) > 1e-2
    model.linear = nn.Linear(64, 7).eval()
    with torch.no_grad():
        model.linear.weight.abs_()
    assert relative_error(check(), second) > 1e-3
    target = torch.tensor([6, 5])
    check()
    other = calibrated(CifarResNet(blocks=1, classes=5), 5)
    with pytest.raises(ValueError, match="target 6 is out of range: the model has classes 0 to 4"):
        method(other, images, target)


@pytest.mark.parametrize("name", ["otsuki2024", "input-x-gradient", "grad-cam"])
def test_a_model_that_is_dropped_is_freed(small: nn.Module, name: str) -> None:
    model, method = copy.deepcopy(small), find_method(name)
    method(model, torch.randn(1, 3, 32, 32), torch.tensor([1]))
    assert isinstance(method, PreparedMethod)
    assert method._memory.prepared is not None
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert method._memory.prepared is None
    method(small, torch.randn(1, 3, 32, 32), torch.tensor([1]))
    method.forget()
    assert method._memory.prepared is None


@dataclass(frozen=True)
class Interrupted(PreparedMethod[nn.Module]):
    """Hooks the copy it is given, and is interrupted unless it finds no hook."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        if images.max() > 100:
            state.register_forward_hook(lambda module, inputs, output: output * math.nan)
            raise KeyboardInterrupt
        return state(images)[:, :1, None].expand(-1, *images.shape[-2:])


def test_what_an_interruption_leaves_on_the_copy_is_dropped(small: nn.Module) -> None:
    method, images, target = Interrupted(), torch.randn(1, 3, 32, 32), torch.tensor([0])
    expected = method(small, images, target)
    with pytest.raises(KeyboardInterrupt):
        method(small, images * 1000, target)
    assert torch.equal(method(small, images, target), expected)
    assert not small._forward_hooks


def test_methods_prepare_once(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prepare = LRPMethod.prepare

    def counted(method: LRPMethod, model: nn.Module) -> LRP:
        calls.append(model)
        return prepare(method, model)

    monkeypatch.setattr(LRPMethod, "prepare", counted)
    method = find_method("otsuki2024")
    for _ in range(3):
        method(small, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert len(calls) == 1
    assert calls[0] is not small
    assert calls[0].conv1.weight.data_ptr() == small.conv1.weight.data_ptr(), "the copy shares the weights' memory"


# Ours.


@pytest.mark.parametrize(
    ("name", "split", "levels"),
    [
        ("otsuki2024", None, None),
        ("otsuki2024:residual-only/ratio+quantized", Splits("residual-only", "ratio"), 8),
        ("conserving:symmetric+quantized4", Splits("symmetric", "symmetric"), 4),
        ("epsilon-plus-flat", None, None),
    ],
)
def test_ours_are_the_explainer(resnet: nn.Module, name: str, split: Splits | None, levels: int | None) -> None:
    images, target = torch.randn(2, 3, 64, 64), torch.tensor([3, 0])
    result = LRP(resnet, name.partition("+")[0].partition(":")[0], split).explain(images, target, relevance=False)
    method = find_method(name)
    assert isinstance(method, LRPMethod)
    expected = result.heatmap if levels is None else heat_quantize(result.heatmap, levels)
    assert torch.equal(method(resnet, images, target), expected)
    attribution = method.explain(resnet, images, target)
    assert torch.equal(attribution.leak, result.leak)
    assert torch.equal(attribution.start, result.start)
    assert torch.equal(method.finish(attribution.heatmap), expected)


def test_a_composite_of_ones_own(resnet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine() -> Composite:
        return Composite.named("epsilon_plus")

    monkeypatch.setattr(composites, "_REGISTRY", dict(composites._REGISTRY))
    composites.register_composite(mine)
    images, target = torch.randn(1, 3, 64, 64), torch.tensor([1])
    assert "mine" in list_methods()
    got = find_method("mine:symmetric")(resnet, images, target)
    assert torch.equal(got, LRPMethod("epsilon_plus", "symmetric")(resnet, images, target))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("otsuki2025", "unknown method 'otsuki2025'; did you mean 'otsuki2024'"),
        ("otsuki:ratio", "did you mean 'otsuki2024'.*a composite goes on as COMPOSITE"),
        ("gradcam", "did you mean 'grad-cam'"),
        ("zennit:epsilon", "did you mean 'zennit:epsilon_plus'"),
        ("", "unknown method ''; known: otsuki2024"),
        ("otsuki2024:ration", "'otsuki2024:ration': unknown split 'ration'; known: ratio, .*expected COMPOSITE"),
        ("otsuki2024:ratio/", "unknown split ''"),
        ("otsuki2024:", "unknown split ''"),
        ("otsuki2024:ratio/ratio/ratio", "unknown split 'ratio/ratio'"),
        ("otsuki2024+quantised", "only .quantized or .quantized with a number of levels may follow, got .quantised"),
        ("otsuki2024+quantized+quantized", "may follow, got"),
        ("otsuki2024+", "may follow, got"),
        ("otsuki2024+quantized1", "at least 2 levels, got 1"),
        ("otsuki2024+quantized-3", "may follow"),
    ],
)
def test_names_that_are_not_understood(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        find_method(name)


def test_names() -> None:
    names = list_methods()
    assert set(list_composites()) < set(names)
    assert all(names.values())
    for name in (*names, *(name for preset in PRESETS.values() for name in preset)):
        assert callable(find_method(name))
    for preset in PRESETS.values():
        assert len(set(preset)) == len(preset)
        assert set(CONTROLS) <= set(preset)
    with pytest.raises(TypeError, match="expected a method's name, got 3"):
        find_method(3)  # type: ignore[arg-type]
    # Both spellings of the paper's method are one.
    ratio, plain = find_method("otsuki2024:ratio/ratio"), find_method("otsuki2024:ratio")
    assert ratio == plain == LRPMethod("otsuki2024", Splits("ratio", "ratio"))


# captum's.


def test_integrated_gradients(small: nn.Module) -> None:
    double = copy.deepcopy(small).double()
    images, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([2, 4])
    points, weights = np.polynomial.legendre.leggauss(8)
    mean = sum(w / 2 * gradient(double, (p + 1) / 2 * images, target) for p, w in zip(points, weights, strict=True))
    got = IntegratedGradients(steps=8, batch_size=6)(double, images, target)
    assert relative_error(got, (images * mean).sum(1)) <= 1e-6
    assert relative_error(IntegratedGradients(steps=8, batch_size=1)(double, images, target), got) <= 1e-6


def test_integrated_gradients_are_complete(small: nn.Module) -> None:
    """What a map sums up to is what the logit has risen by from the mean colour."""
    model, target = copy.deepcopy(small).double(), torch.tensor([2, 4])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    whole = IntegratedGradients(steps=200)(model, images, target).double().sum((1, 2))
    with torch.no_grad():
        rise = (model(images) - model(images * 0)).gather(1, target[:, None])[:, 0]
    assert float((whole - rise).abs().max()) <= 0.02 * float(rise.abs().max())


def test_input_x_gradient(double: nn.Module) -> None:
    images, target = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([2, 4])
    expected = (images * gradient(double, images, target)).sum(1)
    assert relative_error(InputXGradient()(double, images, target), expected) <= 1e-6


class GuidedReLU(nn.Module):
    """Backward lets through what is positive where the input was."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
            return g * (g > 0) * (ctx.saved_tensors[0] > 0)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x)


def test_guided_backprop(double: nn.Module) -> None:
    images, target = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([2, 4])
    guided = copy.deepcopy(double)
    for name, module in list(guided.named_modules()):
        if isinstance(module, nn.ReLU):
            guided.set_submodule(name, GuidedReLU())
    expected = gradient(guided, images, target).sum(1)
    got = GuidedBackprop()(double, images, target)
    assert relative_error(got, expected) <= 1e-6
    assert relative_error(got, gradient(double, images, target).sum(1)) > 0.1


def test_guided_backprop_refuses_what_it_cannot_see(small: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"calls ReLU as a function \(relu, blocks.0.relu"):
        GuidedBackprop()(small, torch.randn(1, 3, 32, 32), torch.tensor([0]))


class PreActivation(nn.Module):
    """The sum of a branch and what its ReLU reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.conv = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.end, self.fc = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.end(self.conv(self.relu(x)) + x).mean((2, 3)))


def test_guided_backprop_refuses_what_captum_would_clip_twice() -> None:
    with pytest.raises(ValueError, match="all that flows into stem, which others than a ReLU read, too"):
        GuidedBackprop()(PreActivation().eval(), torch.randn(1, 3, 8, 8), torch.tensor([0]))


def test_smoothgrad(small: nn.Module) -> None:
    double = copy.deepcopy(small).double()
    images, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([2, 4])
    expected = []
    for image, label in zip(images, target, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            spread = torch.full((5, 3, 32, 32), 0.2 * float(image.max() - image.min()))
            noisy = image + torch.normal(0, spread).double()
        each = [gradient(double, one[None], label[None]) for one in noisy]
        expected.append(torch.cat(each).mean(0).sum(0))
    got = SmoothGrad(samples=5, noise=0.2, seed=7)(double, images, target)
    assert relative_error(got, torch.stack(expected)) <= 1e-6
    assert relative_error(SmoothGrad(samples=5, noise=0.2, seed=8)(double, images, target), got) > 1e-2


def test_captum_lrp_is_captums(resnet: nn.Module) -> None:
    from captum.attr import LRP as Captum  # noqa: N811

    images, target = torch.randn(2, 3, 64, 64), torch.tensor([2, 4])
    expected = Captum(copy.deepcopy(resnet)).attribute(images.clone().requires_grad_(), target=target).sum(1)
    method = CaptumLRP()
    for _ in range(2):  # it leaves things on the modules of the copy
        assert relative_error(method(resnet, images, target), expected.detach()) <= 1e-4


# Class activation maps.


def feature_map(model: nn.Module, layer: str, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output N×C×h×w and the logit's gradient there."""
    held: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: held.append(output))
    score = logit(model, images.clone().requires_grad_(), target)
    handle.remove()
    return held[0].detach(), torch.autograd.grad(score, held[0])[0]


def scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Positive parts N×h×w, upsampled, from 0 to 1; OpenCV's weights differ from these by up to 1e-4."""
    maps = maps.relu()
    maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = (end(maps.flatten(1), 1).values.view(-1, 1, 1) for end in (torch.min, torch.max))
    return (maps - low) / (1e-7 + high - low)


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference of maps in [0, 1], of which some may be all zero: nothing speaks for the class."""
    return float((got - expected).abs().max())


def test_grad_cam(resnet: nn.Module) -> None:
    images, target = torch.randn(3, 3, 160, 128), torch.tensor([2, 4, 0])
    for layer, method in (("layer4", ActivationMap("grad-cam")), ("layer3", ActivationMap("grad-cam", layer="layer3"))):
        features, slope = feature_map(resnet, layer, images, target)
        expected = scaled((features * slope.mean((2, 3), keepdim=True)).sum(1), (160, 128))
        assert expected.max() > 0.9
        assert difference(method(resnet, images, target), expected) <= 1e-3


def test_a_class_activation_map_leaves_no_hook_for_the_next_one(small: nn.Module) -> None:
    method, images, target = ActivationMap("grad-cam"), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    state = method.prepare(copy.deepcopy(small))
    before = condition(state.model)["hooks"]
    method.heatmaps(state, images, target)
    assert condition(state.model)["hooks"] == before
    with pytest.raises(IndexError) as held:  # which keeps what the library would release once nobody has it
        method.heatmaps(state, images, torch.tensor([0, 99]))
    assert condition(state.model)["hooks"] == before
    del held


def test_grad_cam_plus_plus(double: nn.Module) -> None:
    images, target = torch.randn(3, 3, 96, 64, dtype=torch.float64), torch.tensor([2, 4, 0])
    features, slope = feature_map(double, "layer4", images, target)
    share = slope**2 / (2 * slope**2 + features.sum((2, 3), keepdim=True) * slope**3 + 1e-6)
    weights = (slope.relu() * share).sum((2, 3), keepdim=True)
    expected = scaled((features * weights).sum(1), (96, 64))
    assert difference(ActivationMap("grad-cam++")(double, images, target), expected) <= 1e-3


def test_score_cam(small: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([2, 4])
    features = feature_map(small, "blocks", images, target)[0]
    got = ActivationMap("score-cam", batch_size=7)(small, images, target)
    assert "it/s" not in capfd.readouterr().err, "no progress bars of others"
    for image, label, channels, heatmap in zip(images, target, features, got, strict=True):
        scores = []
        for channel in channels:
            mask = F.interpolate(channel[None, None], size=(32, 32), mode="bilinear", align_corners=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            with torch.no_grad():
                scores.append(small(image[None] * mask)[0, label])
        weights = torch.stack(scores).softmax(0)
        expected = scaled((weights[:, None, None] * channels).sum(0)[None], (32, 32))
        assert difference(heatmap[None], expected) <= 1e-3


class Bare(nn.Module):
    """Its feature map is the output of a function, and of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def test_last_feature_map(resnet: nn.Module, small: nn.Module) -> None:
    def found(model: nn.Module) -> str:
        return last_feature_map(trace(model.eval()), dict(model.named_modules()))

    assert found(resnet) == "layer4"
    assert found(torchvision.models.resnet50(num_classes=2)) == "layer4"
    assert found(small) == "blocks"
    assert found(embedded_network(pretrained=False)) == "layer4"
    assert found(torchvision.models.vgg11(num_classes=2)) == "features.19"  # the ReLU before the last pool
    assert found(vgg()) == "20"
    linear_end = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    assert found(linear_end) == "1"
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match="not the output of a module that is called once"):
        found(twice)
    with pytest.raises(ValueError, match="no convolution"):
        found(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))


def test_the_layer_can_be_named() -> None:
    model, images, target = Bare().eval(), torch.randn(1, 3, 16, 16), torch.tensor([1])
    with pytest.raises(ValueError, match=r"\(relu\) is not the output of a module.*ActivationMap\(layer="):
        ActivationMap()(model, images, target)
    features, slope = feature_map(model, "conv", images, target)
    expected = scaled((features * slope.mean((2, 3), keepdim=True)).sum(1), (16, 16))
    assert difference(ActivationMap(layer="conv")(model, images, target), expected) <= 1e-3
    with pytest.raises(ValueError, match="no module 'convolution'; it has: conv, fc"):
        ActivationMap(layer="convolution")(model, images, target)
    with pytest.raises(TraceError, match=r"Name the module to take with ActivationMap\(layer="):
        ActivationMap()(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sigmoid(), nn.Flatten()).eval(), images, target)
    with pytest.raises(ValueError, match="unknown kind of class activation map 'cam'; known: grad-cam, "):
        ActivationMap("cam")  # type: ignore[arg-type]


# zennit's.


def network(name: str, resnet: nn.Module) -> tuple[nn.Module, Tensor]:
    if name == "resnet":
        return copy.deepcopy(resnet).double(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    if name == "embedded":
        return embedded_network().double(), network_input(draw_batch(5, range(2), 64)[0]).double()
    return calibrated(vgg(), 4, (4, 3, 32, 32)).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    ("where", "name"),
    [("resnet", "epsilon_plus_flat"), *((w, n) for w in ("embedded", "vgg") for n in ZENNIT_COMPOSITES)],
)
def test_zennits_are_our_composites(resnet: nn.Module, where: str, name: str) -> None:
    model, images = network(where, resnet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # merged, zennit's batch norm divides by √(1 + eps) once more: 5e-6 for each layer
    target = torch.tensor([2, 4])
    expected = LRPMethod(name)(model, images, target)
    assert relative_error(find_method(f"zennit:{name}")(model, images, target), expected) <= 1e-5


def test_zennits_are_zennits(double: nn.Module) -> None:
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    images, target = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([2, 4])
    composite = EpsilonPlusFlat(canonizers=[ResNetCanonizer()])
    with Gradient(model=copy.deepcopy(double), composite=composite) as attributor:
        expected = attributor(images.clone().requires_grad_(), torch.eye(5)[target].double())[1].sum(1)
    assert relative_error(ZennitMethod()(double, images, target), expected) <= 1e-6


def test_zennit_refuses_what_it_cannot_see(small: nn.Module) -> None:
    images, target = torch.randn(1, 3, 32, 32), torch.tensor([0])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(3600, 2)).eval()
    with pytest.raises(TraceError, match="Sigmoid has no relevance rule"):
        ZennitMethod()(model, images, target)
    with pytest.raises(ValueError, match=r"modules only, but this model calls functions: relu, blocks.0.relu, "):
        ZennitMethod()(small, images, target)
    frozen = torchvision.models.resnet18(num_classes=2, norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    with pytest.raises(ValueError, match="the model has 8 residual additions, but .* additions were found"):
        ZennitMethod()(frozen, images, target)
    with pytest.raises(ValueError, match="unknown composite of zennit 'epsilon'; known: epsilon_plus, "):
        ZennitMethod("epsilon")


# RISE and the controls.


@pytest.mark.parametrize("size", [(32, 32), (45, 38)])
def test_rise(size: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()
    images, target = torch.randn(2, 3, *size), torch.tensor([2, 4])
    method = Rise(masks=30, grid=5, probability=0.3, seed=11, batch_size=8)
    cells, shifts = method._draw(images)
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    step = [math.ceil(side / 5) for side in size]
    expected = torch.zeros(2, *size)
    for i in range(30):
        large = F.interpolate(cells[i][None], size=(6 * step[0], 6 * step[1]), mode="bilinear")[0, 0]
        top, left = shifts[i].tolist()
        assert 0 <= top < step[0]
        assert 0 <= left < step[1]
        mask = large[top : top + size[0], left : left + size[1]]
        for n in range(2):
            with torch.no_grad():
                expected[n] += model(images[n : n + 1] * mask).softmax(1)[0, target[n]] * mask
    got = method(model, images, target)
    assert relative_error(got, expected / (30 * 0.3)) <= 1e-5
    again = Rise(masks=30, grid=5, probability=0.3, seed=11, batch_size=64)(model, images, target)
    assert relative_error(again, got) <= 1e-5
    assert relative_error(Rise(masks=30, grid=5, probability=0.3, seed=12)(model, images, target), got) > 1e-3


def test_rise_sees_what_the_model_looks_at() -> None:
    """A model that reads one corner only: its map is highest there."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen = x[:, :, :8, :8].mean((1, 2, 3))
            return torch.stack([0.5 - seen, seen - 0.5], 1) * 5

    heatmap = Rise(masks=400)(Corner().eval(), torch.ones(1, 3, 40, 40), torch.tensor([1]))[0]
    assert heatmap[:8, :8].mean() > 1.2 * heatmap[16:, 16:].mean()


def test_random_maps(small: nn.Module) -> None:
    images, target = torch.randn(4, 3, 50, 40), torch.tensor([0, 1, 2, 3])
    images[3] = images[0]
    noise = RandomMap()(small, images, target)
    assert torch.equal(noise[3], noise[0])
    assert relative_error(noise[1:2], noise[:1]) > 0.1
    assert abs(float(noise.mean()) - 0.5) <= 0.02
    assert abs(float(noise.std()) - 12**-0.5) <= 0.02
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    assert torch.equal(RandomMap()(small, images.flip(0), target), noise.flip(0))
    assert relative_error(RandomMap(seed=1)(small, images, target), noise) > 0.1
    levels = RandomTwoLevels()(small, images, target)
    assert set(levels.unique().tolist()) == {0.0, 1.0}
    assert levels.sum((1, 2)).tolist() == [40.0] * 4  # 2 % of 2000
    for n in range(4):
        assert noise[n][levels[n] == 1].min() > noise[n][levels[n] == 0].max()


@pytest.mark.parametrize("share", [-1.0, 0.0, 1.5, float("nan")])
def test_two_levels_need_a_share_of_the_pixels(share: float) -> None:
    with pytest.raises(ValueError, match="share is a part of the pixels"):
        RandomTwoLevels(share=share)


def test_edges(small: nn.Module) -> None:
    images = torch.randn(2, 3, 9, 7)
    grey = np.pad(images.double().mean(1).numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    expected = np.zeros((2, 9, 7))
    for n, i, j in np.ndindex(2, 9, 7):
        window = grey[n, i : i + 3, j : j + 3]
        across = window[:, 2] @ [1, 2, 1] - window[:, 0] @ [1, 2, 1]
        down = window[2] @ [1, 2, 1] - window[0] @ [1, 2, 1]
        expected[n, i, j] = np.hypot(across, down)
    got = Edges()(small, images, torch.tensor([0, 1]))
    assert relative_error(got, torch.from_numpy(expected)) <= 1e-6


# Errors.


@pytest.mark.parametrize("name", ["otsuki2024", "grad-cam", "random", "edges"])
def test_arguments(small: nn.Module, name: str) -> None:
    method = find_method(name)
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    broken = images.clone()
    broken[1, 0, 3, 3] = math.nan
    cases: list[tuple[type[Exception], str, tuple[object, object, object]]] = [
        (TypeError, "expected a torch.nn.Module, got function", (lambda x: x, images, target)),
        (TraceError, "training mode", (copy.deepcopy(small).train(), images, target)),
        (TypeError, "expected images as a floating-point tensor.*got torch.uint8", (small, images.byte(), target)),
        (TypeError, "got ndarray", (small, images.numpy(), target)),
        (ValueError, r"N x C x H x W, at least one, got shape \[3, 32, 32\]", (small, images[0], target)),
        (ValueError, r"got shape \[0, 3, 32, 32\]", (small, images[:0], target[:0])),
        (ValueError, "image 1 of the batch holds values that are NaN", (small, broken, target)),
        (TypeError, "expected target as an int64 tensor.*got list", (small, images, [0, 1])),
        (TypeError, "got torch.float32", (small, images, target.float())),
        (ValueError, r"expected 2 targets, one for each image, got shape \[1\]", (small, images, target[:1])),
        (ValueError, "must be on one device, got images on cpu, target on meta", (small, images, target.to("meta"))),
    ]
    if name not in CONTROLS:
        cases += [
            (ValueError, "target 5 is out of range: the model has classes 0 to 4", (small, images, target + 4)),
            (ValueError, "target -1 is out of range", (small, images, target - 1)),
            (ValueError, r"returns logits N x classes, got \[1, 16, 32, 32\]", (small.conv1, images, target)),
        ]
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            method(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Rise(masks=0), "masks must be an integer of at least 1, got 0"),
        (lambda: Rise(probability=0.0), r"lies in \(0, 1\], got 0.0"),
        (lambda: IntegratedGradients(steps=0), "steps must be"),
        (lambda: SmoothGrad(samples=2.5), "samples must be an integer of at least 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: SmoothGrad(noise=-1.0), "0 or more, got -1.0"),
        (lambda: ActivationMap(batch_size=0), "batch_size must be"),
        (lambda: LRPMethod("otsuki"), "unknown composite 'otsuki'"),
        (lambda: LRPMethod(split="half"), "unknown split 'half'"),
        (lambda: LRPMethod(levels=1), "at least 2 levels, got 1"),
    ],
)
def test_options(make: Callable[[], Method], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_returned_maps() -> None:
    images = torch.randn(2, 3, 8, 9)
    maps = checked_heatmaps(torch.randn(2, 8, 9, dtype=torch.float64, requires_grad=True), images)
    assert (maps.dtype, maps.requires_grad) == (torch.float32, False)
    with pytest.raises(TypeError, match="a tensor N x H x W, got ndarray"):
        checked_heatmaps(np.zeros((2, 8, 9)), images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[2, 8, 9\], got \[2, 1, 8, 9\]"):
        checked_heatmaps(torch.zeros(2, 1, 8, 9), images)


@pytest.mark.parametrize(
    ("name", "library", "module"),
    [
        ("integrated-gradients", "captum", "captum.attr"),
        ("input-x-gradient", "captum", "captum.attr"),
        ("guided-backprop", "captum", "captum.attr"),
        ("smoothgrad", "captum", "captum.attr"),
        ("captum-lrp", "captum", "captum.attr"),
        ("grad-cam", "grad-cam", "pytorch_grad_cam"),
        ("zennit:epsilon_plus", "zennit", "zennit"),
    ],
)
def test_a_library_that_is_missing(name: str, library: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    method = find_method(name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"needs {library}, which cannot be imported.*pip install 'lrp-fast\[baselines\]'"
    ):
        method(model, torch.randn(1, 3, 4, 4), torch.tensor([0]))


def test_libraries_are_imported_when_a_method_runs() -> None:
    program = (
        "import sys; from lrp_fast.methods import find_method, list_methods; [find_method(n) for n in list_methods()]; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'captum', 'zennit', 'pytorch_grad_cam', 'torchvision'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
