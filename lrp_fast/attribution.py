"""What an explanation gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_fast.audit import leak_of, whole_of
from lrp_fast.starts import Start


@dataclass(frozen=True)
class Attribution:
    """What :meth:`LRP.explain` returns; ordinary tensors on the model's device, float32 (float64 where computed in float64).

    N images; with K targets for each image everything but ``output`` begins with N×K instead of N. Where an image's values
    overflow, its own map and leak hold NaN; other images are not affected.

    - ``relevance``: N×C×H×W, shaped like the inputs, or None if it was not asked for
    - ``heatmap``: N×H×W, the relevance summed over channels
    - ``target``: N int64, the class that was explained; the predicted one where the start was given as a tensor or function
    - ``output``: N × classes, the model's logits
    - ``start``: N, the relevance put in
    - ``leak``: N, the share of the start that did not arrive, ``(start − Σ relevance) / start``, signed; 0 where both are 0.
      Taken before a probability or logit scales the map; for a given start the divisor is the sum of its magnitudes
    - ``layers``: module name → relevance at that module's output, shaped like that output
    - ``probability``: N float64, the softmax probability of ``target``
    """

    relevance: Tensor | None
    heatmap: Tensor
    target: Tensor
    output: Tensor
    start: Tensor
    leak: Tensor
    layers: Mapping[str, Tensor]

    @property
    def probability(self) -> Tensor:
        """The softmax probability of the class that was explained, float64, shaped like ``target``."""
        targets = self.target.reshape(self.output.shape[0], -1)
        return self.output.double().softmax(1).gather(1, targets).reshape(self.target.shape)


def assembled(relevance: Tensor, layers: Mapping[str, Tensor], output: Tensor, start: Start, keep: bool) -> Attribution:
    """An attribution from results with the maps in front, K×N×…, not scaled yet."""

    def placed(x: Tensor) -> Tensor:
        return (x[0] if start.single else x.transpose(0, 1)).contiguous()

    def scaled(x: Tensor) -> Tensor:
        precise = x.dtype == torch.float64
        factor = start.scale if precise else start.scale.float()
        return placed((x if precise else x.float()) * factor.reshape(*factor.shape, *[1] * (x.ndim - 2)))

    total = relevance.sum(tuple(range(2, relevance.ndim)), dtype=torch.float64)
    begin, leak = start.scale, 1.0 - total
    if start.given:
        begin = start.relevance.sum(-1, dtype=torch.float64)
        leak = leak_of(begin, total, whole_of(start.relevance))
    overflows = ~(output < math.inf).all(1)  # NaN too; what a model rules out may be −infinity
    leak = leak.masked_fill(overflows, math.nan)
    start = start._replace(scale=start.scale.masked_fill(overflows, math.nan))
    shares = scaled(relevance)
    heatmap = shares.sum(1 if start.single else 2)
    return Attribution(
        relevance=shares if keep else None,
        heatmap=heatmap,
        target=placed(start.classes),
        output=output,
        start=placed(begin).to(heatmap.dtype),
        leak=placed(leak).to(heatmap.dtype),
        layers={name: scaled(found) for name, found in layers.items()},
    )


def joined(results: Sequence[Attribution]) -> Attribution:
    """The attribution of a batch from those of its pieces."""
    if len(results) == 1:
        return results[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(result, name) for result in results])

    names = ("heatmap", "target", "output", "start", "leak")
    layers = {name: torch.cat([result.layers[name] for result in results]) for name in results[0].layers}
    relevance = None if results[0].relevance is None else joined("relevance")
    return Attribution(relevance=relevance, layers=layers, **{name: joined(name) for name in names})
