"""What an evaluation measures, and on which pictures."""

from __future__ import annotations

from dataclasses import dataclass

from lrp_fast.metrics.checks import check_count
from lrp_fast.metrics.insertion_deletion import BASELINES, check_step
from lrp_fast.report.scores import METRICS, PROTOCOLS

TARGETS = ("predicted", "label")
PUBLISHED_SHARE = 500 / 224**2
"""The published step, 500 patches of one pixel at 224 x 224, as a share of all patches."""


class EvaluationError(Exception):
    """Something that keeps an evaluation from being made; the message says what and what is expected."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and on which pictures.

    ``metrics``, ``protocols``: some of ``METRICS`` and ``PROTOCOLS``; localisation is left out without masks if all metrics
    are asked for, and else an error; ``target``: the class explained, ``"predicted"`` or ``"label"``; ``limit``: pictures
    drawn with ``seed``, ``None`` for all; ``per_class``: the same number of each class;
    ``batch_size``: pictures explained at a time; ``patch``, ``step``, ``baseline``: as of
    :func:`lrp_fast.metrics.insertion_deletion`, ``step=None`` for the published share (1 % of the patches);
    ``sanity``: pictures for the parameter randomization, 0 for none; ``shown``: pictures shown with every map.
    Raises ``ValueError`` for a name that is not known or a number that is too small, ``TypeError`` for one that is no
    integer.
    """

    metrics: tuple[str, ...] = METRICS
    protocols: tuple[str, ...] = PROTOCOLS
    target: str = "predicted"
    limit: int | None = 1000
    per_class: bool = False
    seed: int = 0
    batch_size: int = 8
    patch: int = 1
    step: int | None = None
    baseline: str = "black"
    sanity: int = 0
    shown: int = 6

    def __post_init__(self) -> None:
        for what, given, known in (
            ("metrics", self.metrics, METRICS),
            ("protocols", self.protocols, PROTOCOLS),
            ("target", (self.target,), TARGETS),
            ("baseline", (self.baseline,), BASELINES),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        for name, least in (
            ("limit", 1), ("batch_size", 1), ("patch", 1), ("step", 1), ("seed", 0), ("sanity", 0), ("shown", 0),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)

    def step_for(self, size: int) -> int:
        """The step in patches for pictures of ``size`` x ``size`` pixels."""
        if self.step is not None:
            return self.step
        return max(1, round(PUBLISHED_SHARE * (-(-size // self.patch)) ** 2))

    def check_size(self, size: int) -> None:
        """Raise ``ValueError`` if a single step shows all of a picture of ``size`` x ``size`` pixels."""
        for protocol in sorted(self.protocols, reverse=True) if "insertion-deletion" in self.metrics else ():
            check_step(size, size, self.patch, self.step_for(size), protocol)
