"""Other explainers, run as their documentation says, for comparison: zennit, captum, grad-cam, and plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Explain = Callable[[Tensor], Tensor]


def zennit_explainer(model: nn.Module, composite: str = "EpsilonPlusFlat") -> Explain:
    """One of zennit's composites, of the predicted class, as its documentation runs them on a torchvision ResNet.

    The box of ``EpsilonGammaBox`` goes from black to white.
    """
    from zennit import composites
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer

    def start(output: Tensor) -> Tensor:
        return nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output)

    def explain(images: Tensor) -> Tensor:
        box = _box(images) if composite == "EpsilonGammaBox" else {}
        rules = getattr(composites, composite)(canonizers=[ResNetCanonizer()], **box)
        with warnings.catch_warnings(), Gradient(model=model, composite=rules) as attributor:
            warnings.simplefilter("ignore")  # its hooks on inputs that need no gradient
            return attributor(images.clone().requires_grad_(), start)[1].detach()

    return explain


def _box(images: Tensor) -> dict[str, Tensor]:
    """The lowest and the highest image there is, each 1×C×H×W."""
    from lrp_fast.rules import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(each).to(images).view(1, -1, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    ends = {"low": (0 - mean) / std, "high": (1 - mean) / std}
    return {name: end.expand_as(images[:1]).contiguous() for name, end in ends.items()}


def captum_explainer(model: nn.Module) -> Explain:
    """captum's ``LRP`` of the predicted class: ε = 1e-9 everywhere, started with the logit.

    It sees modules only: at a residual addition both branches get all of the relevance, and its documentation excludes
    networks that use a module twice, as torchvision's ResNets do with their ReLUs. Giving every ReLU a module of its own
    changes no bit of its map (tried), so the model is taken as it is.
    """
    from captum.attr import LRP

    def explain(images: Tensor) -> Tensor:
        with torch.no_grad():
            target = model(images).argmax(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LRP(model).attribute(images.clone(), target=target).detach()

    return explain


def gradient_explainer(model: nn.Module) -> Explain:
    """Input times gradient of the predicted class's logit, one backward pass of autograd."""

    def explain(images: Tensor) -> Tensor:
        inputs = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).amax(1).sum(), inputs)
        return (inputs * gradient).detach()

    return explain


def cam_explainer(model: nn.Module) -> Explain:
    """pytorch-grad-cam's ``GradCAM`` of the predicted class at the last feature map (a ResNet's ``layer4``): N×H×W."""
    from pytorch_grad_cam import GradCAM

    from lrp_fast.methods.activation_maps import last_feature_map
    from lrp_fast.trace import trace

    layer = last_feature_map(trace(model), dict(model.named_modules()))
    cam = GradCAM(model=model, target_layers=[model.get_submodule(layer)])
    return lambda images: torch.from_numpy(cam(images.clone(), None))
