"""Methods of captum: gradients, and its LRP. A heatmap is the attribution summed over channels."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrp_fast.layers import ReLU
from lrp_fast.trace import trace

from .method import PreparedMethod, check_counts, importing


@dataclass(frozen=True)
class IntegratedGradients(PreparedMethod[nn.Module]):
    """``(x − x₀) ∘ ∫ ∂f_c(x₀ + t (x − x₀))/∂x dt`` of the logit, x₀ = 0: the mean colour (Sundararajan et al. 2017).

    ``steps`` of a Gauss-Legendre quadrature; ``batch_size`` pictures at a time, at least as many as are explained.
    """

    steps: int = 50
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size)

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("captum"):
            from captum.attr import IntegratedGradients as Captum
        together = max(self.batch_size, len(images))
        attribution = Captum(state).attribute(images, target=target, n_steps=self.steps, internal_batch_size=together)
        return attribution.sum(1)


@dataclass(frozen=True)
class InputXGradient(PreparedMethod[nn.Module]):
    """``x ∘ ∂f_c/∂x`` of the logit (Shrikumar et al. 2016)."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("captum"):
            from captum.attr import InputXGradient as Captum
        return Captum(state).attribute(images.requires_grad_(), target=target).sum(1)


@dataclass(frozen=True)
class GuidedBackprop(PreparedMethod[nn.Module]):
    """The gradient of the logit, with what is negative cut off at every ReLU (Springenberg et al. 2015).

    captum cuts at the inputs of ReLUs that are modules. ``ValueError`` for a model where that is something else: one that
    calls a ReLU as a function, or adds what a ReLU reads to its branch; ``TraceError`` for one that cannot be searched.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        plan = trace(model)
        readers = plan.consumers()
        relus = [step for step in plan.steps if isinstance(step.layer, ReLU)]
        functions = [step.name for step in relus if step.module_type is None]
        if functions:
            raise ValueError(
                "captum's guided backpropagation hooks nn.ReLU modules, but this model calls ReLU as a function "
                f"({', '.join(functions[:5])})"
            )
        shared = [plan.steps[step.inputs[0]].name for step in relus if len(readers[step.inputs[0]]) > 1]
        if shared:
            raise ValueError(
                "captum's guided backpropagation would cut the gradient of all that flows into "
                f"{', '.join(shared[:5])}, which others than a ReLU read, too"
            )
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("captum"):
            from captum.attr import GuidedBackprop as Captum
        with warnings.catch_warnings():
            # It announces that it hooks ReLUs, on a model that is ours.
            warnings.filterwarnings("ignore", "Setting backward hooks on ReLU", UserWarning)
            return Captum(state).attribute(images.requires_grad_(), target=target).sum(1)


@dataclass(frozen=True)
class SmoothGrad(PreparedMethod[nn.Module]):
    """The mean gradient of the logit over ``samples`` noisy copies of an image (Smilkov et al. 2017).

    The noise has standard deviation ``noise`` times the image's range of values. It is drawn from ``seed`` for every
    image anew, so that a map does not depend on the batch; ``batch_size`` copies are computed at a time.
    """

    samples: int = 25
    noise: float = 0.15
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch_size=self.batch_size)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise is a share of the image's range, 0 or more, got {self.noise}")

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("captum"):
            from captum.attr import NoiseTunnel, Saliency
        tunnel = NoiseTunnel(Saliency(state))
        maps = []
        for image, label in zip(images.split(1), target.split(1), strict=True):
            with _seeded(image.device, self.seed):
                attribution = tunnel.attribute(
                    image,
                    nt_samples=self.samples,
                    nt_samples_batch_size=self.batch_size,
                    stdevs=self.noise * float(image.max() - image.min()),
                    target=label,
                    abs=False,
                )
            maps.append(attribution.sum(1))
        return torch.cat(maps)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the device's global generator, which captum draws from, and put it back afterwards."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


@dataclass(frozen=True)
class CaptumLRP(PreparedMethod[nn.Module]):
    """captum's LRP: ε = 1e-9 everywhere.

    It knows modules only. A residual addition hands all relevance to both branches, and its documentation excludes
    modules that are used twice; so on torchvision's ResNets its maps are not LRP's. They are what its users get.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("captum"):
            from captum.attr import LRP as Captum  # noqa: N811
        return Captum(state).attribute(images.requires_grad_(), target=target).sum(1)
