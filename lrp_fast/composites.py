"""Composites: which rule each step of a plan gets, as named data.

The names of zennit's composites mean the same rules here; ``otsuki2024`` is the paper's method as published and
``conserving`` the same method without the terms that lose relevance.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from lrp_fast.layers import AdaptiveMaxPool, Average, Dense, Linear, MaxPool, Merge
from lrp_fast.plan import Plan, Step
from lrp_fast.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    PositiveProducts,
    Rule,
    Stabilizer,
    ZBox,
    ZeroGuard,
    ZPlus,
)
from lrp_fast.splits import Split, Splits, as_splits

Start = Literal["probability", "logit", "one"]
STARTS: tuple[Start, ...] = ("probability", "logit", "one")


@dataclass(frozen=True)
class PoolRule:
    """How a pool shares relevance out.

    ``winner``: all to the maximum. ``proportional``: ``r = x · Aᵀ(R / stab(z), 1)`` with z the pool's own average.
    ``blocks``: likewise, with a max-pool answered as an average over blocks: output o answers for the inputs from o · stride
    up to the next output's, clipped to the image, or for the pool's own window where that is empty.
    """

    kind: Literal["winner", "proportional", "blocks"]
    stabilizer: Stabilizer | ZeroGuard | None = None

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Assignment:
    """What one step was given: at most one of the three, none where relevance just passes."""

    rule: Rule | None = None
    pool: PoolRule | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Composite:
    """Rules for linear layers and pools, splits for merges, and the relevance to start from.

    ``convolution``, ``dense``: the rules of convolutions and of linear layers; ``stem``: that of the linear layers which no
    other precedes, ``None`` for no special one; ``max_pool``, ``average_pool``: those of pools; ``splits``: those of merges;
    ``start``: ``"probability"``, ``"logit"`` or ``"one"``, of the explained class.
    ``batch_norm``: ``"fold"`` multiplies it into the weights before their parts are taken, ``"pass"`` hands relevance
    through it unchanged, so that rules see the layer's own weights. ``overrides`` apply last, the latest first.
    """

    name: str
    description: str
    convolution: Rule
    dense: Rule
    stem: Rule | None
    max_pool: PoolRule
    average_pool: PoolRule
    batch_norm: Literal["fold", "pass"]
    splits: Splits
    start: Start
    overrides: tuple[tuple[str | type, Rule], ...] = ()

    @staticmethod
    def named(name: str, **parameters: object) -> Composite:
        """The registered composite of that name (hyphens or underscores), with its own parameters if it has any.

        ``Composite.named("epsilon_gamma_box", low=-1.0, high=1.0)``. Raises ``ValueError`` that lists what is known,
        ``TypeError`` for a name that is no text.
        """
        if not isinstance(name, str):
            raise TypeError(f"a composite is a name or a Composite, got {name!r}")
        factory = _REGISTRY.get(name.replace("-", "_"))
        if factory is None:
            raise ValueError(f"unknown composite {name!r}; known: {', '.join(_REGISTRY)}")
        known = inspect.signature(factory).parameters
        if unknown := sorted(set(parameters) - set(known)):
            raise ValueError(f"composite {name!r} has no parameter {', '.join(unknown)}; it has: {', '.join(known)}")
        return factory(**parameters)

    @staticmethod
    def for_range(name: str, low: Sequence[float], high: Sequence[float]) -> Composite:
        """The registered composite of that name, with the least and the largest input of each channel as its pixel bounds.

        Only composites with a zᴮ rule use the bounds; all others are as :meth:`named` gives them.
        """
        factory = _REGISTRY.get(name.replace("-", "_"))
        bounded = factory is not None and {"low", "high"} <= set(inspect.signature(factory).parameters)
        return Composite.named(name, low=low, high=high) if bounded else Composite.named(name)

    def with_rule(self, layers: str | type, rule: Rule) -> Composite:
        """This composite with another rule for some linear layers.

        ``layers``: a module name, a pattern of names (``"layer1.*"``, as in a shell), or a module class (``nn.Linear``). Where
        several fit a layer, the latest counts. Raises ``TypeError`` for other arguments; that nothing fits, :class:`LRP` says.
        """
        if not isinstance(layers, (str, type)):
            raise TypeError(f"expected a name pattern or a module class, got {layers!r}")
        if not isinstance(rule, Rule):
            raise TypeError(f"expected a rule such as Gamma(0.25), got {rule!r}")
        return replace(self, overrides=(*self.overrides, (layers, rule)))

    def with_split(self, split: str | Split | Splits) -> Composite:
        """This composite with other splits at its merges; raises what :class:`~lrp_fast.splits.Splits` raises."""
        return replace(self, splits=as_splits(split))

    def record(self) -> dict[str, Any]:
        """Everything that decides what a composite does, as JSON; its name alone does not, as :meth:`with_rule` keeps it."""
        layers = ("convolution", "dense", "stem", "max_pool", "average_pool")
        overrides = {
            str(place): f"{_text(pattern)}: {_plain(rule)}" for place, (pattern, rule) in enumerate(self.overrides)
        }
        return {
            "composite": self.name,
            "splits": str(self.splits),
            "rules": {
                **{each: _plain(getattr(self, each)) for each in layers},
                "overrides": overrides,
                "batch_norm": self.batch_norm,
                "start": self.start,
            },
        }

    def assign(self, plan: Plan) -> tuple[Assignment, ...]:
        """What every step of a plan gets; raises ``ValueError`` where that is undefined or an override fits nothing."""
        self._check_overrides(plan)
        stems = plan.stems
        return tuple(self._assign(step, index in stems) for index, step in enumerate(plan.steps))

    def _assign(self, step: Step, is_stem: bool) -> Assignment:
        layer = step.layer
        if isinstance(layer, Linear):
            default = self.dense if isinstance(layer, Dense) else self.convolution
            default = self.stem if is_stem and self.stem is not None else default
            fitting = [rule for pattern, rule in self.overrides if _fits(pattern, step)]
            return Assignment(rule=fitting[-1] if fitting else default)
        if isinstance(layer, (MaxPool, AdaptiveMaxPool)):
            return Assignment(pool=self.max_pool)
        if isinstance(layer, Average):
            return Assignment(pool=self.average_pool)
        if isinstance(layer, Merge):
            split = self.splits.of(layer.kind)
            if layer.ambiguous and not split.symmetric:
                raise ValueError(
                    f"{step.name}: both branches hold equally many linear layers, so neither is the skip and the split "
                    f"{split.name!r} is undefined; use one that treats both alike, such as 'ratio' or 'symmetric'"
                )
            return Assignment(split=split)
        return Assignment()

    def _check_overrides(self, plan: Plan) -> None:
        linear = [step for step in plan.steps if isinstance(step.layer, Linear)]
        for pattern, _ in self.overrides:
            if not any(_fits(pattern, step) for step in linear):
                names = ", ".join(step.name for step in linear[:20])
                raise ValueError(f"the rule for {pattern!r} fits no linear layer of the model; there are: {names}")


def as_composite(composite: str | Composite, split: str | Split | Splits | None = None) -> Composite:
    """A composite, or the one of that name; with other splits if ``split`` is given. Raises ``ValueError`` for unknown names."""
    chosen = composite if isinstance(composite, Composite) else Composite.named(composite)
    return chosen if split is None else chosen.with_split(split)


def _plain(value: object) -> str:
    """A rule as text, the same for equal numbers of any type, and whole."""
    if is_dataclass(value):
        return f"{type(value).__name__}({', '.join(f'{each.name}={_plain(getattr(value, each.name))}' for each in fields(value))})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    return repr(float(value)) if isinstance(value, Real) and not isinstance(value, bool) else repr(value)


def _text(pattern: str | type) -> str:
    return pattern if isinstance(pattern, str) else f"{pattern.__module__}.{pattern.__qualname__}"


def _fits(pattern: str | type, step: Step) -> bool:
    if isinstance(pattern, str):
        # A module called twice is one layer to its user.
        return fnmatch.fnmatchcase(step.name, pattern) or fnmatch.fnmatchcase(step.name.split(":")[0], pattern)
    return isinstance(step.layer, pattern) or (step.module_type is not None and issubclass(step.module_type, pattern))


_REGISTRY: dict[str, Callable[..., Composite]] = {}


def register_composite(factory: Callable[..., Composite]) -> Callable[..., Composite]:
    """Make a function that returns a composite known by its name, to :func:`list_composites` and the command line.

    ``factory``: its name becomes the composite's; it must be callable without arguments, and those it takes are given by
    :meth:`Composite.named`. Returns it, so this is a decorator. Raises ``ValueError`` if the name is taken.
    """
    name = factory.__name__
    if name in _REGISTRY:
        raise ValueError(f"a composite named {name!r} is registered already")
    _REGISTRY[name] = factory
    return factory


def list_composites() -> dict[str, str]:
    """Every known composite's name and a one-line description."""
    return {name: factory().description for name, factory in _REGISTRY.items()}


_SIGNED = Splits("signed", "signed")
_RATIO = Splits("ratio", "ratio")
_WINNER = PoolRule("winner")
_NORM = PoolRule("proportional", Stabilizer(1e-6))


def _positive(name: str, description: str, stabilizer: Stabilizer | ZeroGuard, bias: bool) -> Composite:
    return Composite(
        name=name,
        description=description,
        convolution=PositiveProducts(stabilizer, bias=bias),
        dense=PositiveProducts(stabilizer, bias=False),
        stem=PositiveProducts(stabilizer, bias=bias, pixels=False),
        max_pool=PoolRule("blocks", stabilizer),
        average_pool=PoolRule("proportional", stabilizer),
        batch_norm="pass",
        splits=_RATIO,
        start="probability",
    )


@register_composite
def otsuki2024() -> Composite:
    """The method of Otsuki et al., ECCV 2024, as their published code computes it for one image."""
    description = "the paper's: positive products over z + 1e-5, ratio-based relevance splitting"
    return _positive("otsuki2024", description, Stabilizer(1e-5, signed=False), bias=True)


@register_composite
def conserving() -> Composite:
    """The paper's products without what loses relevance: no bias in a denominator, a zero-guard for stabilizer."""
    description = "the paper's method made to conserve: no bias, no stabilizer, dead windows shared out evenly"
    return _positive("conserving", description, ZeroGuard(), bias=False)


def _zennit(name: str, description: str, convolution: Rule, stem: Rule | None, dense: Rule | None = None) -> Composite:
    return Composite(
        name=name,
        description=description,
        convolution=convolution,
        dense=dense or Epsilon(),
        stem=stem,
        max_pool=_WINNER,
        average_pool=_NORM,
        batch_norm="fold",
        splits=_SIGNED,
        start="one",
    )


@register_composite
def epsilon() -> Composite:
    """ε everywhere."""
    return _zennit("epsilon", "epsilon everywhere", Epsilon(), None)


@register_composite
def epsilon_plus() -> Composite:
    """zennit's ``EpsilonPlus``."""
    return _zennit("epsilon_plus", "z+ in convolutions, epsilon in linear layers", ZPlus(), None)


@register_composite
def epsilon_plus_flat() -> Composite:
    """zennit's ``EpsilonPlusFlat``."""
    description = "z+ in convolutions, flat in the first, epsilon in linear layers"
    return _zennit("epsilon_plus_flat", description, ZPlus(), Flat())


@register_composite
def epsilon_alpha2_beta1() -> Composite:
    """zennit's ``EpsilonAlpha2Beta1``."""
    description = "alpha 2, beta 1 in convolutions, epsilon in linear layers"
    return _zennit("epsilon_alpha2_beta1", description, AlphaBeta(2.0, 1.0), None)


@register_composite
def epsilon_alpha2_beta1_flat() -> Composite:
    """zennit's ``EpsilonAlpha2Beta1Flat``."""
    description = "alpha 2, beta 1 in convolutions, flat in the first, epsilon in linear layers"
    return _zennit("epsilon_alpha2_beta1_flat", description, AlphaBeta(2.0, 1.0), Flat())


@register_composite
def epsilon_gamma_box(
    gamma: float = 0.25, low: float | Sequence[float] | None = None, high: float | Sequence[float] | None = None
) -> Composite:
    """zennit's ``EpsilonGammaBox``; ``low`` and ``high`` as in :func:`lrp_fast.rules.ZBox`.

    Of a network whose first layer is none of convolution, zennit's has no box.
    """
    description = "gamma 0.25 in convolutions, z-box in the first, epsilon in linear layers"
    return _zennit("epsilon_gamma_box", description, Gamma(gamma), ZBox(low, high))
