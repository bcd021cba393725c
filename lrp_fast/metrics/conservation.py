"""Conservation over a data set: what arrives against what was put in, and where the rest was lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_fast.audit import Audit, AuditRow, leak_of
from lrp_fast.explain import LRP, Attribution, Target
from lrp_fast.reference import CAUSES


@dataclass(frozen=True)
class Conservation:
    """The relevance put in (``start``) and what arrived at the pixels (``total``), [N] each, kept as float64 on the CPU.

    Raises ``ValueError`` for shapes that differ, no images, or values that are not finite.
    """

    start: Tensor
    total: Tensor

    def __post_init__(self) -> None:
        if self.start.ndim != 1 or self.start.shape != self.total.shape or not len(self.start):
            raise ValueError(
                f"expected a start and a total of each image, got shapes {list(self.start.shape)} and {list(self.total.shape)}"
            )
        for name in ("start", "total"):
            values = getattr(self, name).detach().cpu().double()
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name} is not finite in sample {', '.join(map(str, bad[:10]))}")
            object.__setattr__(self, name, values)

    @classmethod
    def of(cls, attributions: Iterable[Attribution]) -> Conservation:
        """That of explained batches: ``total`` is each heatmap's sum."""
        pairs = []
        for each in attributions:
            total = each.heatmap.double().reshape(*each.start.shape, -1).sum(-1)  # over whatever space there is
            pairs.append((each.start.flatten(), total.flatten()))
        if not pairs:
            raise ValueError("expected at least one attribution, got none")
        return cls(torch.cat([start for start, _ in pairs]), torch.cat([total for _, total in pairs]))

    @property
    def leak(self) -> Tensor:
        """``(start − total) / start`` per image, signed: 0 where both are 0, infinite where only the start is 0."""
        return leak_of(self.start, self.total, self.start)

    @property
    def mean(self) -> float:
        """The mean \\|leak\\|."""
        return float(self.leak.abs().mean())

    @property
    def largest(self) -> float:
        """The largest \\|leak\\|."""
        return float(self.leak.abs().max())

    def quantile(self, share: float) -> float:
        """The smallest \\|leak\\| in the data set that at least this share of the images does not exceed.

        Raises ``ValueError`` for a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"expected a share of the images in [0, 1], got {share}")
        images = math.ceil(round(share * len(self.leak), 6))  # 0.07 · 100 is a little more than 7
        return float(self.leak.abs().sort().values[max(images, 1) - 1])

    @property
    def slope(self) -> float:
        """Σ start·total / Σ start²: the line through the origin nearest to (start, total); 1 where all is conserved.

        NaN if every start is 0.
        """
        return float((self.start * self.total).sum() / self.start.square().sum())


@dataclass(frozen=True)
class StepLoss:
    """One step over a data set, as shares of the start, averaged over images: received at its output, lost by cause."""

    name: str
    operation: str
    rule: str
    received: float
    lost: Mapping[str, float]


def audit_dataset(explainer: LRP, batches: Iterable[Tensor | tuple[Tensor, Target]]) -> Audit:
    """The conservation audit of many batches as one :class:`~lrp_fast.audit.Audit` of all their images.

    ``batches``: inputs N×C×H×W, or pairs of inputs and targets, as :meth:`LRP.audit` takes them; the shapes may differ.
    Only what is kept of an image grows with the data set: a few numbers for each step. Every batch is evaluated by the
    float64 equations, which is slow. Raises ``ValueError`` for no batches, and what :meth:`LRP.audit` raises.
    """
    audits = []
    for batch in batches:
        inputs, target = batch if isinstance(batch, tuple) else (batch, None)
        audits.append(explainer.audit(inputs, target))
    if not audits:
        raise ValueError("expected at least one batch, got none")
    rows = tuple(_joined(rows) for rows in zip(*(audit.rows for audit in audits), strict=True))
    names = ("start", "arrived", "whole")
    return Audit(rows, *(torch.cat([getattr(audit, name) for audit in audits]) for name in names))


def _joined(rows: tuple[AuditRow, ...]) -> AuditRow:
    """The same step's account in several batches."""
    first = rows[0]
    causes = dict.fromkeys(cause for row in rows for cause in row.lost)
    lost = {cause: torch.cat([row.lost.get(cause, torch.zeros_like(row.received)) for row in rows]) for cause in causes}
    received, passed = torch.cat([row.received for row in rows]), torch.cat([row.passed for row in rows])
    return AuditRow(first.name, first.operation, first.rule, received, passed, lost)


def step_losses(audit: Audit) -> tuple[StepLoss, ...]:
    """Every step of an audit in shares of the start, output first; an image whose start is 0 counts as 0.

    Over all steps and causes the losses sum to the mean leak, up to rounding.
    """
    return tuple(
        StepLoss(
            row.name,
            row.operation,
            row.rule,
            audit.share(row.received),
            {cause: audit.share(row.lost[cause]) for cause in CAUSES if cause in row.lost},
        )
        for row in audit.rows
    )
