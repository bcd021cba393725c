"""The composites named after zennit's give zennit's maps (zennit is only run, never read)."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lrp_fast import LRP
from networks import calibrated

zennit_composites = pytest.importorskip("zennit.composites", reason="compares with zennit")
from zennit.attribution import Gradient  # noqa: E402
from zennit.torchvision import ResNetCanonizer, VGGCanonizer  # noqa: E402

# Black and white in the units of ImageNet's normalisation, which is what our z-box defaults to.
LOW = torch.tensor([(0 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)])
HIGH = torch.tensor([(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)])


def zennit_map(model: nn.Module, composite: str, images: Tensor) -> Tensor:
    """zennit's relevance of the predicted class, started with one."""
    canonizer = VGGCanonizer() if isinstance(model, torchvision.models.VGG) else ResNetCanonizer()
    names = {
        "epsilon_plus": "EpsilonPlus",
        "epsilon_plus_flat": "EpsilonPlusFlat",
        "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
        "epsilon_gamma_box": "EpsilonGammaBox",
    }
    keywords = {}
    if composite == "epsilon_gamma_box":
        keywords = {
            "low": LOW.to(images).view(1, 3, 1, 1).expand_as(images[:1]).contiguous(),
            "high": HIGH.to(images).view(1, 3, 1, 1).expand_as(images[:1]).contiguous(),
        }
    made = getattr(zennit_composites, names[composite])(canonizers=[canonizer], **keywords)

    def start(output: Tensor) -> Tensor:
        return nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output)

    with Gradient(model=model, composite=made) as attributor:
        _, relevance = attributor(images.clone().requires_grad_(), start)
    return relevance.detach()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        names = ("resnet18", "resnet50", "vgg16_bn")
        return {name: calibrated(getattr(torchvision.models, name)(num_classes=10), 2) for name in names}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # zennit's hooks on inputs
@pytest.mark.parametrize(
    "composite", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box"]
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn"])
def test_same_map(networks: dict[str, nn.Module], name: str, composite: str) -> None:
    images = torch.randn(3, 3, 64, 64)
    expected = zennit_map(networks[name], composite, images)
    got = LRP(networks[name], composite, split="signed").explain(images).relevance
    assert got is not None
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # One unit within float32's rounding of zero can cost a single image more, in either program.
    assert float(error.median()) <= 1e-3
