"""The composites named after zennit's give zennit's maps (zennit is only run, never read)."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lrp_fast import LRP
from lrp_fast.methods.zennit_relevance import with_sum_modules
from networks import calibrated, errors, vgg
from random_networks import random_network

zennit_composites = pytest.importorskip("zennit.composites", reason="compares with zennit")
from zennit.attribution import Gradient  # noqa: E402
from zennit.canonizers import SequentialMergeBatchNorm  # noqa: E402
from zennit.torchvision import ResNetCanonizer  # noqa: E402

COMPOSITES = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
    "epsilon_gamma_box": "EpsilonGammaBox",
}


def even_kernels() -> nn.Module:
    """Convolutions whose input is padded at one end alone, or more than at the other."""
    return nn.Sequential(
        nn.Conv2d(3, 8, (4, 2), padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2, padding="same", dilation=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), ResNetCanonizer),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), ResNetCanonizer),
    "vgg": (vgg, SequentialMergeBatchNorm),
    "even kernels": (even_kernels, SequentialMergeBatchNorm),
}

# Black and white in the units of ImageNet's normalisation, which is what our z-box defaults to.
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 1, 3, 1, 1)


def zennit_map(model: nn.Module, canonizer: object, composite: str, images: Tensor) -> Tensor:
    """zennit's relevance of the predicted class, started with one, in the dtype of the images."""
    model = copy.deepcopy(model).to(images.dtype)
    keywords = {}
    if composite == "epsilon_gamma_box":
        bounds = {"low": (0 - MEAN) / STD, "high": (1 - MEAN) / STD}
        keywords = {name: bound.to(images).expand_as(images[:1]).contiguous() for name, bound in bounds.items()}
    made = getattr(zennit_composites, COMPOSITES[composite])(canonizers=[canonizer], **keywords)

    def start(output: Tensor) -> Tensor:
        return nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output)

    with Gradient(model=model, composite=made) as attributor:
        # Merged into its convolution, a batch norm stays behind and divides by √(1 + eps) once more: 5e-6 for each layer.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-30  # no zero: torch 2.11 refuses it
        _, relevance = attributor(images.clone().requires_grad_(), start)
    return relevance.detach()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return {name: calibrated(make(), 2) for name, (make, _) in NETWORKS.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # zennit's hooks on inputs, 'same' for even kernels
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", NETWORKS)
def test_same_map(networks: dict[str, nn.Module], name: str, composite: str) -> None:
    model, canonizer = networks[name], NETWORKS[name][1]
    images = torch.randn(3, 3, 48, 48)

    def error(dtype: torch.dtype) -> Tensor:
        expected = zennit_map(model, canonizer(), composite, images.to(dtype))
        got = LRP(model, composite, split="signed", dtype=dtype).explain(images.to(dtype)).relevance
        assert got is not None
        return errors(got, expected)

    assert float(error(torch.float64).max()) <= 1e-9
    # A unit within float32's rounding of zero, or a near-tie in a window, can cost an image more, in either program.
    assert float(error(torch.float32).median()) <= 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("composite", COMPOSITES)
def test_random_networks(composite: str) -> None:
    """Odd kernels, paddings, dilations, groups and pools, blocks within blocks: zennit sees the additions that we made modules."""
    compared = 0
    while compared < 12:
        model, images = random_network(int(torch.randint(2**31, ())), biased=True)
        if composite == "epsilon_gamma_box" and images.shape[1] != 3:
            continue
        expected = zennit_map(with_sum_modules(model), SequentialMergeBatchNorm(), composite, images.double())
        got = LRP(model, composite, split="signed", dtype=torch.float64).explain(images.double()).relevance
        assert got is not None
        assert float(expected.flatten(1).norm(dim=1).min()) > 0
        assert float(errors(got, expected).max()) <= 1e-8
        compared += 1
