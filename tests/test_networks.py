"""Whole networks: the torch backend against the float64 reference, and conservation."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms.functional import to_tensor

from lrp_fast import LRP, list_composites
from networks import CifarResNet, calibrated, errors, plain_errors, vgg, without_winners

POSITIVE = ("otsuki2024", "conserving")
SPLITS = ("ratio", "symmetric", "residual-only")


def _timm(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm's networks need timm")
    network: nn.Module = timm.create_model(name, num_classes=10)
    return network


def _resnext26() -> nn.Module:
    """torchvision's ResNeXt with half the blocks of its ResNeXt-50; ResNet-50 itself is here in full."""
    return ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10, groups=32, width_per_group=4)


def _vgg11() -> nn.Module:
    """torchvision's VGG-11 with hidden layers of 64 units: it has 100 million weights there, which only take time."""
    network: nn.Module = torchvision.models.vgg11_bn(num_classes=10, init_weights=False)
    network.classifier[0] = nn.Linear(network.classifier[0].in_features, 64)
    network.classifier[3] = nn.Linear(64, 64)
    network.classifier[6] = nn.Linear(64, 10)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 97),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 65),
    "resnext26": (_resnext26, 64),
    "vgg11_bn": (_vgg11, 64),
    "resnet26d": (lambda: _timm("resnet26d"), 65),
    "cifar20": (lambda: CifarResNet(3), 65),
    "vgg_small_head": (vgg, 16),
}

# Networks in which no unit decides anything: no winner in a window, no hidden layer under the rule ε, whose relevance jumps
# where a unit starts to fire. What is left of a difference is rounding, and it is small for every image.
CONTINUOUS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18_average": (lambda: without_winners(torchvision.models.resnet18(num_classes=10)), 65),
    "resnet50_average": (lambda: without_winners(torchvision.models.resnet50(num_classes=10)), 65),
    "vgg_average": (lambda: vgg(nn.AvgPool2d, hidden=0), 32),
    "cifar20": NETWORKS["cifar20"],
}


def tried(name: str) -> list[str]:
    """The composites tried on a network; those that differ in a flat first layer alone on a plain stem, a deep and a small one."""
    flat = name in ("resnet18", "resnet18_average", "resnet26d", "cifar20")
    return [composite for composite in list_composites() if flat or not composite.endswith("_flat")]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {}


def network(networks: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            networks[name] = calibrated((NETWORKS | CONTINUOUS)[name][0](), 11)
    return networks[name]


@pytest.mark.parametrize(
    ("name", "composite"),
    [(name, composite) for name in NETWORKS if name != "vgg_small_head" for composite in tried(name)],
)
def test_against_the_reference(networks: dict[str, nn.Module], name: str, composite: str) -> None:
    model, side = network(networks, name), NETWORKS[name][1]
    images = torch.randn(3, 3, side, side)
    # Started with one: the softmax of an untrained head magnifies the rounding of its logits, which is not the map's.
    expected = LRP(model, composite, backend="reference").explain(images, start="one")
    got = LRP(model, composite).explain(images, start="one")
    assert torch.equal(got.target, expected.target)
    found = errors(got.relevance, expected.relevance)
    if composite in POSITIVE:
        assert float(found.max()) <= 1e-5
        return
    precise = LRP(model, composite, dtype=torch.float64).explain(images, start="one")
    assert float(errors(precise.relevance, expected.relevance).max()) <= 1e-8
    # Where float32 decides otherwise than float64 (which element of a window is the maximum, whether a unit of a merge or
    # of a hidden dense layer fires), the map changes by that unit's share. How often, the two tests below bound.
    assert float(found.max()) <= 1e-1
    # Under ε alone every unit decides: plain float32 too is off by about 1e-3 on an untrained ResNet-50.
    assert composite == "epsilon" or float(found.median()) <= 1e-3


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        (name, composite)
        for name in CONTINUOUS
        for composite in tried(name)
        if composite not in (*POSITIVE, "epsilon")
    ],
)
def test_float32_where_nothing_is_decided(networks: dict[str, nn.Module], name: str, composite: str) -> None:
    """The split by magnitudes and pools without a winner leave no jumps: every image is as good as float32 can be."""
    model, side = network(networks, name), CONTINUOUS[name][1]
    images = torch.randn(4, 3, side, side)
    expected = LRP(model, composite, "ratio", backend="reference").explain(images)
    got = LRP(model, composite, "ratio").explain(images)
    assert float(errors(got.relevance, expected.relevance).max()) <= 1e-5


@pytest.mark.parametrize(
    ("name", "composite", "factor"),
    [
        ("cifar20", "epsilon", 1),
        ("cifar20", "epsilon_alpha2_beta1", 2),
        ("cifar20", "epsilon_gamma_box", 2),
        ("vgg_small_head", "epsilon", 1),
        ("vgg_small_head", "epsilon_plus", 2),
        ("vgg_small_head", "epsilon_alpha2_beta1", 2),
        ("vgg_small_head", "epsilon_gamma_box", 2),
    ],
)
def test_cancellation_costs_no_more_than_plain_float32(
    networks: dict[str, nn.Module], name: str, composite: str, factor: float
) -> None:
    """Decisions fall differently in either evaluation; over many images ours is not worse than a plain one."""
    model, side = network(networks, name), min(32, NETWORKS[name][1])
    images = torch.randn(32, 3, side, side)
    explainer = LRP(model, composite)
    expected = LRP(model, composite, backend="reference").explain(images, start="one")
    ours = errors(explainer.explain(images, start="one").relevance, expected.relevance)
    theirs = plain_errors(model, explainer, images)
    # At most one image in eight meets a decision that costs it more than 1e-3.
    assert int((ours > 1e-3).sum()) <= 4
    # The geometric mean: what single decisions cost makes the errors heavy-tailed in either evaluation.
    assert float(ours.log().mean().exp()) <= factor * float(theirs.log().mean().exp())


@pytest.mark.parametrize("composite", POSITIVE)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_full_size(networks: dict[str, nn.Module], name: str, composite: str) -> None:
    images = torch.randn(1, 3, 224, 224)
    got = LRP(network(networks, name), composite).explain(images)
    expected = LRP(network(networks, name), composite, backend="reference").explain(images)
    assert float(errors(got.relevance, expected.relevance).max()) <= 1e-5


@pytest.mark.parametrize("zero_initialised", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "cifar20"])
def test_conserving_leaks_nothing(name: str, zero_initialised: bool) -> None:
    model = CifarResNet(3) if name == "cifar20" else getattr(torchvision.models, name)(num_classes=10)
    if name == "cifar20" or not zero_initialised:
        model = calibrated(model, 5, (4, 3, 64, 64))
    if zero_initialised:
        for path, module in model.eval().named_modules():
            if path.endswith(("bn2", "bn3")) and isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    images = torch.randn(2, 3, 65, 64)
    for split in SPLITS:
        result = LRP(model, "conserving", split).explain(images, start="one", relevance=False)
        assert bool(result.heatmap.isfinite().all())
        assert float(result.leak.abs().max()) <= 1e-5, split


def test_targets_in_one_pass_of_a_bottleneck_network(networks: dict[str, nn.Module]) -> None:
    model, images = network(networks, "resnet50"), torch.randn(2, 3, 64, 64)
    targets = torch.tensor([[0, 3, 9], [2, 2, 7]])
    together = LRP(model).explain(images, targets).relevance
    for column in range(3):
        alone = LRP(model).explain(images, targets[:, column]).relevance
        assert float(errors(together[:, column], alone).max()) <= 1e-5


class TestTrained:
    """The trained networks beside the checkout, on photographs."""

    @pytest.fixture(scope="class")
    @staticmethod
    def photographs(shared_data: pathlib.Path) -> Tensor:
        files = sorted(shared_data.glob("imagenette/*/*.JPEG"))[::100]
        pictures = [to_tensor(Image.open(file).convert("RGB"))[None] for file in files]
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        return (torch.cat(pictures) - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    @staticmethod
    def load(shared_data: pathlib.Path, name: str) -> nn.Module:
        model: nn.Module = getattr(torchvision.models, name)(num_classes=10)
        model.load_state_dict(load_file(shared_data / f"{name}_imagenette.safetensors"))
        return model.float().eval()

    @pytest.mark.parametrize(
        ("name", "side", "composite"),
        [
            (name, side, composite)
            for name, side in (("resnet18", 224), ("resnet50", 97))
            for composite in tried(name)
        ],
    )
    def test_against_the_reference(
        self, shared_data: pathlib.Path, photographs: Tensor, name: str, side: int, composite: str
    ) -> None:
        model = self.load(shared_data, name)
        images = nn.functional.interpolate(photographs, (side, side), mode="bilinear", antialias=True)
        got = LRP(model, composite).explain(images, layers=("maxpool",))
        expected = LRP(model, composite, backend="reference").explain(images, layers=("maxpool",))
        bound = 1e-5 if composite in POSITIVE else 1e-3
        assert float(errors(got.layers["maxpool"], expected.layers["maxpool"]).max()) <= bound
        whole = errors(got.relevance, expected.relevance)
        # In a photograph's even areas several elements of a window are the maximum, and rounding picks the winner.
        assert float(whole.max() if composite in POSITIVE else whole.quantile(0.5)) <= bound

    def test_bfloat16(self, shared_data: pathlib.Path, photographs: Tensor) -> None:
        model = self.load(shared_data, "resnet50")
        expected = LRP(model, backend="reference").explain(photographs, start="one")
        got = LRP(model, dtype=torch.bfloat16).explain(photographs, target=expected.target, start="one")
        assert float(errors(got.relevance, expected.relevance).max()) <= 2e-2
        for one, other in zip(got.heatmap.flatten(1), expected.heatmap.flatten(1), strict=True):
            ranks = torch.stack([one.double().argsort().argsort(), other.argsort().argsort()]).double()
            assert float(torch.corrcoef(ranks)[0, 1]) >= 0.999

    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    def test_conserving_leaks_nothing(self, shared_data: pathlib.Path, photographs: Tensor, name: str) -> None:
        model = self.load(shared_data, name)
        for split in SPLITS:
            leak = LRP(model, "conserving", split).explain(photographs, relevance=False).leak
            assert float(leak.abs().max()) <= 1e-5, split
