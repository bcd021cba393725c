"""Explanation methods behind one signature, ``(model, images, target) → heatmaps``: ours, what is used instead, controls.

from lrp_fast.methods import find_method
find_method("otsuki2024:ratio+quantized")(model, images, target)      # N x H x W

A function of one's own with that signature serves wherever a method is taken. Libraries of others are imported only when
one of their methods runs (``pip install 'lrp-fast[baselines]'``).
"""

from .activation_maps import ActivationMap
from .controls import Edges, RandomMap, RandomTwoLevels
from .gradients import CaptumLRP, GuidedBackprop, InputXGradient, IntegratedGradients, SmoothGrad
from .method import Method, PreparedMethod, check_arguments, checked_heatmaps
from .registry import PRESETS, find_method, list_methods
from .relevance import LRPMethod
from .rise import Rise
from .zennit_relevance import ZennitMethod

__all__ = [
    "PRESETS",
    "ActivationMap",
    "CaptumLRP",
    "Edges",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "LRPMethod",
    "Method",
    "PreparedMethod",
    "RandomMap",
    "RandomTwoLevels",
    "Rise",
    "SmoothGrad",
    "ZennitMethod",
    "check_arguments",
    "checked_heatmaps",
    "find_method",
    "list_methods",
]
