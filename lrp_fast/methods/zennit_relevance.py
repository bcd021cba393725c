"""zennit's composites, on any residual network that can be traced."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from lrp_fast.layers import AdaptiveMaxPool, Average, Linear, MaxPool, Merge, ReLU
from lrp_fast.rules import IMAGENET_MEAN, IMAGENET_STD
from lrp_fast.trace import trace

from .method import PreparedMethod, importing

ZENNIT_COMPOSITES = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
    "epsilon_gamma_box": "EpsilonGammaBox",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_LAYERS = (Linear, ReLU, MaxPool, AdaptiveMaxPool, Average)


@dataclass(frozen=True)
class ZennitMethod(PreparedMethod[nn.Module]):
    """Relevance by one of zennit's composites, started with one at the target class.

    ``composite``: one of ``ZENNIT_COMPOSITES``. Batch norms are merged by zennit's ``SequentialMergeBatchNorm``; residual
    additions become its ``Sum``, as its ``ResNetCanonizer`` does for torchvision's blocks, here for every traceable
    model. The box of ``epsilon_gamma_box`` goes from black to white in the units of ``mean`` and ``std``.
    zennit gives rules to modules and to nothing else; what it would pass over in silence is refused: ``TraceError`` for
    a model that cannot be traced, ``ValueError`` for one that calls ReLUs, pools or layers as functions.
    """

    composite: str = "epsilon_plus_flat"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.composite not in ZENNIT_COMPOSITES:
            known = ", ".join(ZENNIT_COMPOSITES)
            raise ValueError(f"unknown composite of zennit {self.composite!r}; known: {known}")

    def prepare(self, model: nn.Module) -> nn.Module:
        with importing("zennit"):
            import zennit  # noqa: F401
        return with_sum_modules(model)

    def heatmaps(self, state: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with importing("zennit"):
            from zennit import composites
            from zennit.attribution import Gradient
            from zennit.canonizers import SequentialMergeBatchNorm
        options: dict[str, Any] = {"canonizers": [SequentialMergeBatchNorm()]}
        if self.composite == "epsilon_gamma_box":
            options |= self._box(images)
        composite = getattr(composites, ZENNIT_COMPOSITES[self.composite])(**options)

        def start(output: Tensor) -> Tensor:
            return nn.functional.one_hot(target, output.shape[1]).to(output)

        with Gradient(model=state, composite=composite) as attributor:
            return attributor(images.requires_grad_(), start)[1].sum(1)

    def _box(self, images: Tensor) -> dict[str, Tensor]:
        """The lowest and the highest image there is, each 1×C×H×W."""
        mean, std = (torch.tensor(each).to(images).view(1, -1, 1, 1) for each in (self.mean, self.std))
        ends = {"low": (0 - mean) / std, "high": (1 - mean) / std}
        return {name: end.expand_as(images[:1]).contiguous() for name, end in ends.items()}


def with_sum_modules(model: nn.Module) -> nn.Module:
    """The same network with every addition of two branches as a module of zennit's, which its composites see."""
    from zennit.layer import Sum

    steps = trace(model).steps
    functions = [step.name for step in steps if isinstance(step.layer, _LAYERS) and step.module_type is None]
    if functions:
        raise ValueError(
            f"zennit gives rules to modules only, but this model calls functions: {', '.join(functions[:5])}"
        )
    traced = torch.fx.symbolic_trace(model)
    added = 0
    for node in list(traced.graph.nodes):
        branches = [argument for argument in node.args if isinstance(argument, torch.fx.Node)]
        if node.target not in _ADDITIONS or len(branches) != 2:
            continue
        traced.add_submodule(f"sum_{added}", Sum())
        with traced.graph.inserting_before(node):
            stacked = traced.graph.call_function(torch.stack, (branches,), {"dim": -1})
            node.replace_all_uses_with(traced.graph.call_module(f"sum_{added}", (stacked,)))
        traced.graph.erase_node(node)
        added += 1
    merges = sum(isinstance(step.layer, Merge) for step in steps)
    if added != merges:
        raise ValueError(f"the model has {merges} residual additions, but {added} additions were found for zennit")
    traced.recompile()
    return traced.eval()
