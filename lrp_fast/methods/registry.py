"""Methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial

from lrp_fast.composites import list_composites

from .activation_maps import ActivationMap
from .controls import Edges, RandomMap, RandomTwoLevels
from .gradients import CaptumLRP, GuidedBackprop, InputXGradient, IntegratedGradients, SmoothGrad
from .method import Method
from .relevance import GRAMMAR, parse_lrp_method
from .rise import Rise
from .zennit_relevance import ZENNIT_COMPOSITES, ZennitMethod

_METHODS: Mapping[str, tuple[str, Callable[[], Method]]] = {
    "integrated-gradients": ("gradients along a path from the mean colour, 50 steps (captum)", IntegratedGradients),
    "input-x-gradient": ("the image times its gradient (captum)", InputXGradient),
    "guided-backprop": ("the gradient, cut off where negative at every ReLU (captum)", GuidedBackprop),
    "smoothgrad": ("the mean gradient of 25 noisy copies (captum)", SmoothGrad),
    "captum-lrp": ("captum's LRP; not LRP on ResNets, whose additions it does not see (captum)", CaptumLRP),
    "grad-cam": ("the last feature map weighted by its gradient (grad-cam)", partial(ActivationMap, "grad-cam")),
    "grad-cam++": ("the same with higher-order weights (grad-cam)", partial(ActivationMap, "grad-cam++")),
    "score-cam": ("the same, weighted by a forward pass a channel (grad-cam)", partial(ActivationMap, "score-cam")),
    **{
        f"zennit:{name}": (f"zennit's {theirs} (zennit)", partial(ZennitMethod, name))
        for name, theirs in ZENNIT_COMPOSITES.items()
    },
    "rise": ("the class's probability under 500 random masks", Rise),
    "random": ("control: noise", RandomMap),
    "random-two-level": ("control: noise cut to two levels, the upper for 2 % of the pixels", RandomTwoLevels),
    "edges": ("control: the picture's edges", Edges),
}

_SPLIT_PAIRS = ("residual-only/symmetric", "residual-only/ratio", "symmetric/symmetric", "ratio/ratio")

PRESETS: Mapping[str, tuple[str, ...]] = {
    "otsuki2024": (
        *(f"otsuki2024:{pair}{quantized}" for pair in _SPLIT_PAIRS for quantized in ("", "+quantized")),
        "captum-lrp",
        "integrated-gradients",
        "guided-backprop",
        "grad-cam",
        "score-cam",
        "random",
        "random-two-level",
        "edges",
    ),
}
"""Lists of methods by name. ``otsuki2024``: the paper's ablation (identity / projection splits, each with and without heat
quantization), the methods its authors' published code compares with, and the controls."""


def list_methods() -> dict[str, str]:
    """Every method's name and a one-line description; a composite's name may go on as :func:`find_method` says."""
    return list_composites() | {name: description for name, (description, _) in _METHODS.items()}


def find_method(name: str) -> Method:
    """The method of that name, new: one of :func:`list_methods`, or a composite with splits and heat quantization.

    ``otsuki2024:ratio``: one split for all merges; ``otsuki2024:residual-only/symmetric``: for identity and projection
    skips; ``otsuki2024+quantized``, ``otsuki2024:ratio+quantized4``: with heat quantization, to 8 or so many levels.
    Libraries are imported only when the method runs. Raises ``ValueError`` that says what is known.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected a method's name, got {name!r}")
    if name in _METHODS:
        return _METHODS[name][1]()
    composite = name.partition("+")[0].partition(":")[0]
    if composite.replace("-", "_") in list_composites():
        return parse_lrp_method(name)
    known = list_methods()
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(composite, known, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown method {name!r}; {meant}known: {', '.join(known)}; a composite goes on as {GRAMMAR}")
