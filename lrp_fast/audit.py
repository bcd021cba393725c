"""The conservation audit: where relevance is lost, step by step.

``Σ_j R_j − Σ_i r_i = Σ_j R_j (b_j + ε_j) / stab(z_j)`` at a linear layer: what is not handed on went to a bias or a
stabilizer in a denominator, was at an output no input contributed to, or at elements constant by structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_fast.composites import Assignment
from lrp_fast.plan import Plan
from lrp_fast.reference import CAUSES, ReferenceResult, per_image


def whole_of(start: Tensor) -> Tensor:
    """What losses are shares of, float64, from a start relevance … × classes: its sum.

    Of one for and against, the sum of its magnitudes, with the sum's sign: where they cancel it is still a share of something.
    """
    return torch.copysign(start.abs().sum(-1, dtype=torch.float64), start.sum(-1, dtype=torch.float64))


def leak_of(start: Tensor, arrived: Tensor, whole: Tensor) -> Tensor:
    """``(start − arrived) / whole``; 0 where nothing was put in and nothing arrived."""
    return torch.where((whole == 0) & (arrived == 0), 0.0, (start - arrived) / whole)


@dataclass(frozen=True)
class AuditRow:
    """One step: relevance ``received`` at its output and ``passed`` on to its inputs, and what was lost, by cause.

    All tensors hold one number for each image, float64.
    """

    name: str
    operation: str
    rule: str
    received: Tensor
    passed: Tensor
    lost: dict[str, Tensor]

    @property
    def unexplained(self) -> Tensor:
        """What neither was passed on nor has a cause: rounding."""
        return self.received - self.passed - sum(self.lost.values(), torch.zeros_like(self.received))


@dataclass(frozen=True)
class Audit:
    """Every step's account, output first; ``start`` at the output and ``arrived`` at the input, per image (float64).

    ``whole``: what losses are shares of, see :func:`whole_of`.
    """

    rows: tuple[AuditRow, ...]
    start: Tensor
    arrived: Tensor
    whole: Tensor

    @property
    def leak(self) -> Tensor:
        """``(start − arrived) / whole`` per image; 0 where both are 0."""
        return leak_of(self.start, self.arrived, self.whole)

    def share(self, values: Tensor) -> float:
        """The mean over the images of ``values`` as shares of the ``whole``; an image where that is 0 counts as 0."""
        return float(torch.where(self.whole == 0, 0.0, values / self.whole).mean())

    def lost(self) -> dict[str, Tensor]:
        """What was lost over the whole network, by cause, per image."""
        return {
            cause: torch.stack([row.lost.get(cause, torch.zeros_like(self.start)) for row in self.rows]).sum(0)
            for cause in CAUSES
        }

    def __str__(self) -> str:
        """A table of the steps that lose anything, in percent of the start, averaged over the images."""

        def percent(x: Tensor) -> str:
            return f"{100 * self.share(x):.4f}"

        lines = [("step", "rule", "received %", *(f"{cause} %" for cause in CAUSES))]
        for row in self.rows:
            if any(bool((value.abs() > 1e-9 * self.whole.abs()).any()) for value in row.lost.values()):
                losses = [percent(row.lost.get(cause, torch.zeros_like(self.start))) for cause in CAUSES]
                lines.append((row.name, row.rule, percent(row.received), *losses))
        totals = self.lost()
        lines.append(("all steps", "", "100.0000", *(percent(totals[cause]) for cause in CAUSES)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, f"leak {100 * float(self.leak.mean()):.4f} % (mean of {len(self.start)} images)"])


def audit_rows(plan: Plan, assignments: Sequence[Assignment], result: ReferenceResult, start: Tensor) -> Audit:
    """The audit of one backward pass of the reference from ``start`` (N × classes)."""
    rows = []
    for index in range(len(plan.steps) - 1, 0, -1):
        step, shares, assignment = plan.steps[index], result.shares[index], assignments[index]
        if shares is None:
            continue
        passed = torch.stack([per_image(r) for r in shares.inputs]).sum(0)
        chosen = assignment.rule or assignment.pool or (assignment.split and assignment.split.name)
        received = per_image(result.relevance[index])
        rows.append(AuditRow(step.name, step.operation, str(chosen or "passing"), received, passed, shares.lost))
    return Audit(tuple(rows), per_image(start), per_image(result.relevance[0]), whole_of(start))
