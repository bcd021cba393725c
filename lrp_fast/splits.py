"""Splits: how a merge ``h = F + S`` shares relevance between its residual branch F and its skip S.

Each gives the weights of both branches from their values before the ReLU (Otsuki et al. 2024, §3.2: *relevance
splitting*). A new split is one entry here and its equation in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lrp_fast.rules import Stabilizer

_TINY = 1e-30
"""Turns 0/0 into exactly ½ in one pass and is lost in rounding beside any value above 1e-22."""


@dataclass(frozen=True)
class Split:
    """A named way to weigh the branches of a merge.

    ``weights(F, S)`` gives ``(ρ_F, ρ_S)``, tensors shaped like F in F's dtype, or numbers. ``symmetric``: exchanging F
    and S exchanges the weights. ``complementary``: ρ_S = 1 − ρ_F, so nothing is lost. ``proportional``: a branch that
    is zero where the other is not gets nothing.
    """

    name: str
    description: str
    symmetric: bool
    complementary: bool
    weights: Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]
    proportional: bool = False


def _ratio(residual: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = residual.abs().add_(_TINY)
    weight = magnitude.div_(skip.abs().add_(_TINY).add_(magnitude))
    return weight, 1 - weight


def _halves(residual: Tensor, skip: Tensor) -> tuple[float, float]:
    return 0.5, 0.5


def _residual_only(residual: Tensor, skip: Tensor) -> tuple[float, float]:
    return 1.0, 0.0


def _signed(residual: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    total = SIGNED_STABILIZER(residual + skip)
    return residual / total, skip / total


SIGNED_STABILIZER = Stabilizer(1e-6)

_SPLITS = (
    Split("ratio", "|F| / (|F|+|S|), and 1/2 where both are 0: the paper's", True, True, _ratio, True),
    Split("symmetric", "one half each", True, True, _halves),
    Split("residual-only", "everything to the residual branch", False, True, _residual_only),
    Split("signed", "F / stab(F+S), as zennit's Norm", True, False, _signed, True),
)
_BY_NAME = {split.name: split for split in _SPLITS}


@dataclass(frozen=True)
class Splits:
    """The splits of a model's merges: ``identity`` where the skip holds no linear layer, ``projection`` where it does.

    Both may be given as names or as :class:`Split`. The paper's ablation is (residual-only, symmetric),
    (residual-only, ratio), (symmetric, symmetric) and (ratio, ratio); the last is the method. Raises ``ValueError`` for an
    unknown name, ``TypeError`` for what is neither.
    """

    identity: Split
    projection: Split

    def __init__(self, identity: str | Split, projection: str | Split) -> None:
        object.__setattr__(self, "identity", get_split(identity))
        object.__setattr__(self, "projection", get_split(projection))

    def of(self, kind: Literal["identity", "projection"]) -> Split:
        """The split of one kind of merge."""
        return self.identity if kind == "identity" else self.projection

    def __str__(self) -> str:
        if self.identity == self.projection:
            return self.identity.name
        return f"identity={self.identity.name}, projection={self.projection.name}"


def get_split(split: str | Split) -> Split:
    """The split of that name (hyphens or underscores); ``ValueError`` names the known ones, ``TypeError`` for no name."""
    if isinstance(split, Split):
        return split
    if not isinstance(split, str):
        raise TypeError(f"a split is a name, a Split or Splits(identity=..., projection=...), got {split!r}")
    found = _BY_NAME.get(split.replace("_", "-"))
    if found is None:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(_BY_NAME)}")
    return found


def is_known(split: Split) -> bool:
    """Whether a split is one of the known ones, and not merely called like one."""
    return _BY_NAME.get(split.name) == split


def as_splits(split: str | Split | Splits) -> Splits:
    """``Splits`` from what a caller may write: a name, a ``Split``, or ``Splits`` itself."""
    return split if isinstance(split, Splits) else Splits(split, split)


def list_splits() -> dict[str, str]:
    """Every known split's name and a one-line description."""
    return {split.name: split.description for split in _SPLITS}
