"""Other explainers, run as their documentation says, for comparison: zennit and captum."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor, nn


def zennit_explainer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """zennit's ``EpsilonPlusFlat`` of the predicted class, as its documentation runs it on a ResNet."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    def start(output: Tensor) -> Tensor:
        return nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output)

    def explain(images: Tensor) -> Tensor:
        composite = EpsilonPlusFlat(canonizers=[ResNetCanonizer()])
        with warnings.catch_warnings(), Gradient(model=model, composite=composite) as attributor:
            warnings.simplefilter("ignore")  # its hooks on inputs that need no gradient
            return attributor(images.clone().requires_grad_(), start)[1].detach()

    return explain


def captum_explainer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """captum's ``LRP`` of the predicted class. Its documentation excludes networks that use a module twice."""
    from captum.attr import LRP

    def explain(images: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LRP(model).attribute(images, target=model(images).argmax(1)).detach()

    return explain
