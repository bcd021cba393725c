"""Rules: how a linear layer shares relevance out, written down as tables of terms.

Notation: ``x`` is the layer's input, ``W``, ``b`` its weight and bias, ``A(x, W)`` the linear map and
``Aᵀ(s, W)`` its transpose, ``R`` the relevance of the output and ``r`` that of the input. Products are element-wise,
and ``x⁺ x⁻ W⁺ W⁻ b⁺ b⁻`` are positive and negative parts. A rule is a list of groups::

    z_g = Σ_p c_p · A(x_p, W_p) + bias_g
    r   = Σ_g coefficient_g · Σ_p c_p · x_p · Aᵀ(mask_g · R / stab(z_g), W_p)

A new rule is one function here, returning a :class:`Rule`, and its independent equation in ``reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

InputPart = Literal["x", "x+", "x-", "one", "low", "high"]
"""``x``, its positive and negative part, ones, and the lower and upper bound of the pixels."""
FIXED_PARTS: tuple[InputPart, ...] = ("one", "low", "high")
"""Parts of an input that are the same for every image."""


@dataclass(frozen=True)
class Part:
    """``positive · V⁺ + negative · V⁻`` of a weight or bias ``V``."""

    positive: float
    negative: float


WHOLE = Part(1.0, 1.0)
POSITIVE = Part(1.0, 0.0)
NEGATIVE = Part(0.0, 1.0)

SMALLEST_EPSILON = 2.0**-126
"""Float32's smallest normal number: smaller ones count as zero on a GPU, and a stabilizer must not."""

WeightPart = Part | Literal["square", "ones"]


@dataclass(frozen=True)
class Stabilizer:
    """``stab(z) = z + ε · sign(z)`` with sign(0) = +1, or ``z + ε`` where ``signed`` is false.

    Raises ``ValueError`` unless ε is finite and at least 2⁻¹²⁶. So does every rule below for its ``epsilon`` or ``stabilizer``.
    """

    epsilon: float
    signed: bool = True

    def __post_init__(self) -> None:
        try:
            epsilon = math.nan if isinstance(self.epsilon, str) else float(self.epsilon)
        except (TypeError, ValueError):
            epsilon = math.nan
        if not SMALLEST_EPSILON <= epsilon < math.inf:
            raise ValueError(
                f"a stabilizer needs a finite epsilon above zero, {SMALLEST_EPSILON:.1e} at least, got {self.epsilon!r}"
            )
        object.__setattr__(self, "epsilon", epsilon)

    def __call__(self, z: Tensor) -> Tensor:
        """``stab(z)``, in z's dtype."""
        if not self.signed:
            return z + self.epsilon
        epsilon = torch.full((), self.epsilon, dtype=z.dtype, device=z.device)
        if torch.compiler.is_compiling():
            return z + torch.where(z < 0, -epsilon, epsilon)
        # torch.where takes an eager CPU ten times as long; + 0.0 turns −0 into +0, but compiled it would be dropped.
        return torch.copysign(epsilon, z + 0.0).add_(z)


@dataclass(frozen=True)
class ZeroGuard:
    """No stabilizer: ``z`` counts as zero when ``z ≤ threshold · max z`` of that layer and image.

    Relevance at a zero denominator is divided equally over the valid inputs of its window (inside the image, same
    group, not zero by structure), so that nothing is lost.
    """

    threshold: float = 1e-12

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"a zero-guard needs a threshold of at least 0 and below 1, got {self.threshold!r}")


@dataclass(frozen=True)
class Product:
    """``coefficient · A(input, weight)``, one of the products that share a denominator."""

    input: InputPart
    weight: WeightPart
    coefficient: float = 1.0


@dataclass(frozen=True)
class Group:
    """Products with one denominator; ``mask`` restricts them to one sign of the layer's own output."""

    products: tuple[Product, ...]
    bias: Part | Literal["square"] | None
    coefficient: float = 1.0
    mask: Literal["positive", "negative"] | None = None


@dataclass(frozen=True)
class Rule:
    """How one linear layer shares relevance out.

    ``name`` and ``parameters`` are what a person, and the reference, knows the rule by; ``groups`` and ``stabilizer``
    are what the fast backends execute.
    """

    name: str
    parameters: tuple[tuple[str, object], ...]
    groups: tuple[Group, ...]
    stabilizer: Stabilizer | ZeroGuard

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.parameters)})"

    def parameter(self, name: str) -> object:
        """The value of one of the rule's parameters."""
        return dict(self.parameters)[name]


def Epsilon(epsilon: float = 1e-6) -> Rule:  # noqa: N802 - rules are named as in the field
    """``r = x · Aᵀ(R / stab(z), W)``, ``z = A(x, W) + b`` (Bach et al. 2015, eq. 58)."""
    group = Group((Product("x", WHOLE),), bias=WHOLE)
    return Rule("epsilon", (("epsilon", epsilon),), (group,), Stabilizer(epsilon))


def AlphaBeta(alpha: float = 2.0, beta: float = 1.0, stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """Positive contributions weighted α, negative ones −β, each over their own sum (Bach et al. 2015, eq. 60).

    ``r = α · Σ x^± · Aᵀ(R / stab(z⁺), W^±) − β · Σ x^± · Aᵀ(R / stab(z⁻), W^∓)``, with ``z⁺ = A(x⁺, W⁺) + A(x⁻, W⁻) + b⁺``
    and ``z⁻ = A(x⁺, W⁻) + A(x⁻, W⁺) + b⁻``; each Σ has a term for x⁺ and one for x⁻.

    Raises ``ValueError`` unless α ≥ 1, β ≥ 0 and α − β = 1 up to rounding, which conservation needs.
    """
    if not (alpha >= 1 and beta >= 0 and math.isclose(alpha - beta, 1.0, rel_tol=1e-6, abs_tol=1e-6)):
        raise ValueError(f"alpha-beta needs alpha >= 1, beta >= 0 and alpha - beta = 1, got alpha={alpha}, beta={beta}")
    parameters = (("alpha", alpha), ("beta", beta), ("stabilizer", stabilizer))
    return Rule("alpha-beta", parameters, _sign_groups(alpha, beta), Stabilizer(stabilizer))


def ZPlus(stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """Only positive contributions: ``r = x⁺ · Aᵀ(R / stab(z⁺), W⁺) + x⁻ · Aᵀ(R / stab(z⁺), W⁻)`` (Montavon et al. 2017).

    That is alpha-beta with α = 1, β = 0, and ``z⁺`` as there.
    """
    return Rule("z-plus", (("stabilizer", stabilizer),), _sign_groups(1.0, 0.0), Stabilizer(stabilizer))


def _sign_groups(alpha: float, beta: float) -> tuple[Group, ...]:
    raising = Group((Product("x+", POSITIVE), Product("x-", NEGATIVE)), bias=POSITIVE, coefficient=alpha)
    lowering = Group((Product("x+", NEGATIVE), Product("x-", POSITIVE)), bias=NEGATIVE, coefficient=-beta)
    return (raising, lowering) if beta else (raising,)


def Gamma(gamma: float = 0.25, stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """Contributions of the output's own sign favoured by γ (Montavon et al. 2019; for any sign of x as in zennit).

    Where the layer's output is positive ``r = x⁺ · Aᵀ(s, W + γW⁺) + x⁻ · Aᵀ(s, W + γW⁻)``, with ``s = R / stab(z)`` and
    ``z = A(x⁺, W + γW⁺) + A(x⁻, W + γW⁻) + b + γb⁺``; where it is negative, W⁺ and W⁻ change places and b⁻ stands for b⁺.
    Raises ``ValueError`` unless γ is finite and at least 0.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be finite and at least 0, got {gamma!r}")
    up, down = Part(1.0 + gamma, 1.0), Part(1.0, 1.0 + gamma)
    groups = (
        Group((Product("x+", up), Product("x-", down)), bias=up, mask="positive"),
        Group((Product("x+", down), Product("x-", up)), bias=down, mask="negative"),
    )
    return Rule("gamma", (("gamma", gamma), ("stabilizer", stabilizer)), groups, Stabilizer(stabilizer))


Bound = float | Sequence[float] | Tensor | None
"""The least or the largest value of a pixel: one for all channels, one for each, or None for ImageNet's."""


def ZBox(low: Bound = None, high: Bound = None, stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """For pixels in [low, high]: ``z = A(x, W) − A(low, W⁺) − A(high, W⁻)`` (Montavon et al. 2017).

    ``low`` and ``high`` are numbers, or one number per input channel (in a list, or a tensor C, C×1×1 or 1×C×1×1), in the
    model's (normalised) units; they default to black and white under ImageNet's normalisation. Raises ``ValueError`` where
    low is not below high.
    """
    lows = _bound(low, [(0 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    highs = _bound(high, [(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    channels = max(len(lows), len(highs))
    if {len(lows), len(highs)} - {1, channels}:
        raise ValueError(f"low and high need the same number of values, got {len(lows)} and {len(highs)}")
    spread = (bounds * (channels // len(bounds)) for bounds in (lows, highs))
    if any(below >= above for below, above in zip(*spread, strict=True)):
        raise ValueError(f"low must be below high in every channel, got low={lows}, high={highs}")
    products = (Product("x", WHOLE), Product("low", POSITIVE, -1.0), Product("high", NEGATIVE, -1.0))
    parameters = (("low", lows), ("high", highs), ("stabilizer", stabilizer))
    return Rule("z-box", parameters, (Group(products, bias=None),), Stabilizer(stabilizer))


def _bound(value: Bound, default: Sequence[float]) -> tuple[float, ...]:
    if value is None:
        return tuple(default)
    if isinstance(value, Tensor):
        if value.squeeze().ndim > 1:
            raise ValueError(f"a pixel bound is a number for each channel, got a tensor of shape {tuple(value.shape)}")
        value = value.flatten().tolist()
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"a pixel bound needs finite numbers, got {value!r}")
    return values


def WSquare(stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """``r = Aᵀ(R / stab(Σ W² + b²), W²)``, whatever the input (Montavon et al. 2017)."""
    group = Group((Product("one", "square"),), bias="square")
    return Rule("w-square", (("stabilizer", stabilizer),), (group,), Stabilizer(stabilizer))


def Flat(stabilizer: float = 1e-6) -> Rule:  # noqa: N802
    """``r = Aᵀ(R / stab(n), 1)``, n the inputs of a window: the same share for each (Lapuschkin et al. 2019)."""
    group = Group((Product("one", "ones"),), bias=None)
    return Rule("flat", (("stabilizer", stabilizer),), (group,), Stabilizer(stabilizer))


def PositiveProducts(  # noqa: N802
    stabilizer: Stabilizer | ZeroGuard = Stabilizer(1e-5, signed=False), bias: bool = True, pixels: bool = True
) -> Rule:
    """The paper's rule: only ``x⁺ · W⁺``, over ``z + 1e-5`` (Otsuki et al. 2024, §3, and their published code).

    ``r = x⁺ · Aᵀ(R / stab(z), W⁺)``, ``z = A(x⁺, W⁺) + b``. With ``bias`` the layer's bias enters z as it is, so z may be
    negative. With ``pixels`` false ones stand in for the
    input: what the method's first convolution sees. Raises ``ValueError`` for a zero-guard with ``bias``.
    """
    if bias and isinstance(stabilizer, ZeroGuard):
        raise ValueError("a zero-guard shares relevance among inputs only, so it needs bias=False")
    product = Product("x+" if pixels else "one", POSITIVE)
    group = Group((product,), bias=WHOLE if bias else None)
    parameters = (("stabilizer", stabilizer), ("bias", bias), ("pixels", pixels))
    return Rule("positive-products", parameters, (group,), stabilizer)
