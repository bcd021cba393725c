"""Class activation maps of pytorch-grad-cam: Grad-CAM, Grad-CAM++ and Score-CAM."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from lrp_fast.layers import Convolution, Merge, ReLU
from lrp_fast.plan import Plan, TraceError
from lrp_fast.trace import trace

from .method import PreparedMethod, check_counts, importing

Kind = Literal["grad-cam", "grad-cam++", "score-cam"]
KINDS: tuple[Kind, ...] = ("grad-cam", "grad-cam++", "score-cam")


@dataclass(frozen=True)
class _Target:
    """The model and its module whose output, N×C×h×w, is weighted."""

    model: nn.Module
    layer: nn.Module


@dataclass(frozen=True)
class ActivationMap(PreparedMethod[_Target]):
    """``ReLU(Σ_c w_c A_c)`` over the channels of the last feature map A, upsampled bilinearly to the image.

    ``kind``: ``"grad-cam"``, w the gradient's mean (Selvaraju et al. 2017); ``"grad-cam++"`` (Chattopadhay et al. 2018);
    ``"score-cam"``, w the softmax of the logits of the image masked by each channel (Wang et al. 2020), as many forward
    passes as channels, ``batch_size`` at a time. The library scales every map to [0, 1].
    ``layer``: the module whose output is A; by default the last convolution's or residual addition's, behind its ReLU.
    Raises ``ValueError`` where that is not the output of a module, ``TraceError`` where the model cannot be traced.
    """

    kind: Kind = "grad-cam"
    layer: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of class activation map {self.kind!r}; known: {', '.join(KINDS)}")
        check_counts(batch_size=self.batch_size)

    def prepare(self, model: nn.Module) -> _Target:
        modules = dict(model.named_modules())
        name = self.layer
        if name is None:
            try:
                name = last_feature_map(trace(model), modules)
            except TraceError as error:
                raise TraceError(f"{error}. Name the module to take with ActivationMap(layer=...)") from error
        if name not in modules:
            raise ValueError(f"the model has no module {name!r}; it has: {', '.join(list(modules)[1:])}")
        return _Target(model, modules[name])

    def heatmaps(self, state: _Target, images: Tensor, target: Tensor) -> Tensor:
        if self.kind != "score-cam":
            return self._maps(state, images, target)
        # It holds a masked copy of the image for every channel: 1.2 GB for one at 224 pixels and 2048 channels.
        alone = zip(images.split(1), target.split(1), strict=True)
        return torch.cat([self._maps(state, image, label) for image, label in alone])

    def _maps(self, state: _Target, images: Tensor, target: Tensor) -> Tensor:
        with importing("grad-cam"):
            import pytorch_grad_cam as library
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        makers = {"grad-cam": library.GradCAM, "grad-cam++": library.GradCAMPlusPlus, "score-cam": library.ScoreCAM}
        cam = makers[self.kind](model=state.model, target_layers=[state.layer])
        cam.batch_size = self.batch_size
        try:
            with _without_progress_bar():
                maps = cam(images.requires_grad_(), [ClassifierOutputTarget(label) for label in target.tolist()])
        finally:
            cam.activations_and_grads.release()  # its own context manager would swallow an IndexError
        return torch.from_numpy(maps)


def last_feature_map(plan: Plan, modules: dict[str, nn.Module]) -> str:
    """The module that gives the last convolution's or merge's output, behind its ReLU if one follows.

    Of several that give it the outermost. Raises ``ValueError`` if none does, or only one that is called twice.
    """
    step, behind = plan.output, plan.output
    while not isinstance(plan.steps[step].layer, (Convolution, Merge)):
        if not plan.steps[step].inputs:
            raise ValueError("the model has no convolution, so there is no feature map to weigh")
        step, behind = plan.steps[step].inputs[0], step
    wanted = behind if isinstance(plan.steps[behind].layer, ReLU) else step
    # Names are in order of completion: a container comes after what it holds.
    found = [
        name for name, at in plan.names.items() if at == wanted and name in modules and f"{name}:1" not in plan.names
    ]
    if not found:
        raise ValueError(
            f"the last feature map ({plan.steps[wanted].name}) is not the output of a module that is called once; name "
            "the module to take with ActivationMap(layer=...)"
        )
    return found[-1]


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Score-CAM shows one for every image, with no way to turn it off."""
    from pytorch_grad_cam import score_cam

    def silent(items: Any) -> Any:
        return items

    with mock.patch.object(score_cam, "tqdm", types.SimpleNamespace(tqdm=silent)):
        yield
