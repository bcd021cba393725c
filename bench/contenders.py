"""Who runs in the whole-network benchmarks, on which networks and images, and what their maps are held against."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from lrp_fast import LRP
from peers import Explain, cam_explainer, captum_explainer, gradient_explainer, zennit_explainer

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from networks import CifarResNet, calibrated, plain_errors, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], Tensor]
Build = Callable[[nn.Module, Tensor], Run]

REFERENCED = 1
"""How many images of a batch are compared with the reference, which takes seconds for each."""
POSITIVE = ("otsuki2024", "conserving", "epsilon_plus", "epsilon_plus_flat")
"""Composites whose convolutions have positive products only."""
CANCELLING = ("epsilon",)
"""Composites whose float32 map of an untrained network is known no better than a plain float32 evaluation knows it."""
PLAIN_IMAGES = 4
"""How many images that is measured on."""
PEER_BOUND = 1e-2
"""The largest relative L2 error of a map that is not called wrong."""


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    - ``build(model, images)`` prepares it in the images' dtype and returns what explains them once and gives relevance
      N×C×H×W, a heatmap N×H×W, or the logits; all but ours may change the model, which :func:`prepare` copies for them
    - ``computes``: what that is, in words
    - ``composite``, ``start``: of ours, meaning the same rules: its float64 reference is what the map is held against
    - ``library``: imported beforehand, so that neither time nor memory of an import is counted
    - ``on``: the devices it runs on
    """

    name: str
    kind: Literal["forward", "peer", "ours"]
    computes: str
    build: Build
    composite: str | None = None
    start: str | None = None
    library: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    on: tuple[str, ...] = ("cpu", "cuda")


class ParityError(AssertionError):
    """A map of ours is not the reference's: it is not timed."""


# Networks and images ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=3)
def network(name: str, device: torch.device) -> nn.Module:
    """A torchvision network, or ``cifar``, with random, calibrated weights, the same in every run."""
    torch.manual_seed(0)
    model = CifarResNet(1) if name == "cifar" else getattr(torchvision.models, name)()
    return calibrated(model, seed=1).to(device)


def noise(batch: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images N×3×side×side of noise; the first ones are the same in every batch."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(1, 3, side, side, generator=generator) for _ in range(batch)]
    return torch.cat(drawn).to(device, dtype)


# How each is prepared ---------------------------------------------------------------------------------------------------


def forward(model: nn.Module, images: Tensor, *, compiled: bool) -> Run:
    """The model alone, channels last."""
    plain = model.to(images.dtype).to(memory_format=torch.channels_last)
    x = images.contiguous(memory_format=torch.channels_last)
    call: Callable[[Tensor], Tensor] = torch.compile(plain, dynamic=False) if compiled else plain
    return torch.no_grad()(lambda: call(x))


def peer(model: nn.Module, images: Tensor, *, explainer: Callable[[nn.Module], Explain]) -> Run:
    """Another program, which may hook and patch the model."""
    explain = explainer(model.to(images.dtype))
    return lambda: explain(images)


def ours(model: nn.Module, images: Tensor, *, composite: str, **options: Any) -> Run:
    """Our relevance of the predicted classes."""
    explainer = LRP(model, composite, dtype=images.dtype, **options)

    def run() -> Tensor:
        relevance = explainer.explain(images).relevance
        assert relevance is not None
        return relevance

    return run


def prepare(contender: Contender, model: nn.Module, images: Tensor) -> Run:
    """What explains the images once; the model stays as it is."""
    return contender.build(model if contender.kind == "ours" else copy.deepcopy(model), images)


# The contenders ---------------------------------------------------------------------------------------------------------

ZENNIT = {
    "EpsilonPlusFlat": "epsilon_plus_flat", "EpsilonPlus": "epsilon_plus",
    "EpsilonAlpha2Beta1Flat": "epsilon_alpha2_beta1_flat", "EpsilonAlpha2Beta1": "epsilon_alpha2_beta1",
    "EpsilonGammaBox": "epsilon_gamma_box",
}  # fmt: skip
"""zennit's composites, and ours with the same rules."""
OURS = ("otsuki2024", "conserving", *ZENNIT.values(), "epsilon")
WAYS: Mapping[str, dict[str, Any]] = {
    "eager": {"backend": "torch"},
    "compiled": {"backend": "torch", "compile": True},
    "triton": {"backend": "triton"},
    "triton + graph": {"backend": "triton", "cuda_graph": True},
}
"""How ours are run."""
EVERY_WAY, COMPILED = ("otsuki2024",), ("otsuki2024", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon")
"""Recorded graphs, which keep their memory, and compiled ones, which take long to make, are not run of every composite."""
BOTH = (torch.float32, torch.bfloat16)


def _contenders() -> list[Contender]:
    found = [
        Contender(f"forward {way}", "forward", "the logits", partial(forward, compiled=way == "compiled"), dtypes=BOTH)
        for way in ("eager", "compiled")
    ]
    found += [
        Contender("gradient x input", "peer", "input times gradient", partial(peer, explainer=gradient_explainer)),
        Contender(
            "grad-cam", "peer", "a class activation map, 7 x 7 pixels at 224",
            partial(peer, explainer=cam_explainer), library="pytorch_grad_cam",
        ),
        Contender(
            "captum LRP", "peer", "LRP, ε everywhere", partial(peer, explainer=captum_explainer), "epsilon", "logit",
            library="captum.attr",
        ),
    ]  # fmt: skip
    for theirs, composite in ZENNIT.items():
        build = partial(peer, explainer=partial(zennit_explainer, composite=theirs))
        found.append(Contender(f"zennit {theirs}", "peer", "LRP", build, composite, library="zennit.composites"))
    for composite in OURS:
        for way, options in WAYS.items():
            if composite not in {"triton + graph": EVERY_WAY, "compiled": COMPILED}.get(way, OURS):
                continue
            build = partial(ours, composite=composite, **options)
            dtypes = BOTH if composite == "otsuki2024" else (torch.float32,)
            on = ("cuda",) if "triton" in way else ("cpu", "cuda")
            found.append(Contender(f"{composite} {way}", "ours", "LRP", build, composite, dtypes=dtypes, on=on))
    return found


CONTENDERS = _contenders()


def choose(wanted: str | None, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """Those of a dtype and device whose name is, or contains, one of the names ``wanted`` (by commas); all if None.

    A name in full means that contender alone. Raises ``ValueError`` for what fits none at all.
    """
    able = [each for each in CONTENDERS if dtype in each.dtypes and device.type in each.on]
    if wanted is None:
        return able
    names: set[str] = set()
    for part in (part.strip() for part in wanted.split(",")):
        exact = {each.name for each in CONTENDERS if each.name == part}
        fitting = exact or {each.name for each in CONTENDERS if part and part in each.name}
        if not fitting:
            raise ValueError(f"no contender is called {part!r}; known: {', '.join(each.name for each in CONTENDERS)}")
        names |= fitting
    return [each for each in able if each.name in names]


def find(name: str) -> Contender:
    """The contender of that name; raises ``ValueError`` that lists what is known."""
    for each in CONTENDERS:
        if each.name == name:
            return each
    raise ValueError(f"no contender is called {name!r}; known: {', '.join(each.name for each in CONTENDERS)}")


# Parity -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What float64 gives for the first images of a batch.

    ``plain``: the relative error of a plain float32 evaluation of the same equations, for a composite that is judged by it.
    """

    values: Tensor
    plain: float = 0.0


def expected(contender: Contender, model: nn.Module, images: Tensor) -> Reference | None:
    """What a contender's result is held against; None where it means no rules of ours."""
    first = images[:REFERENCED].double()
    if contender.kind == "forward":
        with torch.no_grad():
            return Reference(copy.deepcopy(model).double()(first))
    if contender.composite is None:
        return None
    explainer = LRP(model, contender.composite, backend="reference")
    relevance = explainer.explain(first, start=contender.start).relevance
    assert relevance is not None
    if contender.kind == "peer" or contender.composite not in CANCELLING:
        return Reference(relevance)
    several = noise(PLAIN_IMAGES, images.shape[-1], torch.float32, images.device)
    return Reference(relevance, float(plain_errors(model, explainer, several).max()))


def bound(contender: Contender, dtype: torch.dtype, plain: float = 0.0) -> float:
    """The largest relative L2 error allowed; twice that of a ``plain`` evaluation where that is more."""
    if contender.kind == "peer":
        return PEER_BOUND
    if dtype == torch.bfloat16:
        return 2e-2
    return 1e-5 if contender.composite in POSITIVE else max(1e-3, 2 * plain)


def parity(contender: Contender, dtype: torch.dtype, got: Tensor, reference: Reference | None) -> dict[str, Any]:
    """The map of the first images against the reference: the error, its bound and a verdict.

    Raises :class:`ParityError` if a map of ours is further off than its bound, or not finite; others' are called wrong.
    """
    if reference is None:
        return {"against": None, "relative_error": None, "bound": None, "verdict": "no reference"}
    error = relative_error(got[: len(reference.values)], reference.values)
    most = bound(contender, dtype, reference.plain)
    against = "float64 forward pass" if contender.kind == "forward" else f"float64 reference of {contender.composite}"
    right = error <= most
    if contender.kind == "ours" and not right:
        raise ParityError(f"{contender.name}: relative error {error:.1e} against the {against}, bound {most:.0e}")
    known = error if math.isfinite(error) else None
    return {"against": against, "relative_error": known, "bound": most, "verdict": "ok" if right else "wrong"}
