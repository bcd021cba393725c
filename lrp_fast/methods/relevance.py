"""Our own methods: any composite, with any splits, with or without heat quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from lrp_fast.composites import Composite
from lrp_fast.explain import LRP, Attribution
from lrp_fast.heatmap import heat_quantize
from lrp_fast.splits import Split, Splits, as_splits

from .method import PreparedMethod

_SUFFIX = re.compile(r"quantized(\d*)")
DEFAULT_LEVELS = 8
GRAMMAR = "COMPOSITE[:SPLIT | :IDENTITY-SPLIT/PROJECTION-SPLIT][+quantized[LEVELS]]"


@dataclass(frozen=True)
class LRPMethod(PreparedMethod[LRP]):
    """Layer-wise relevance propagation by :class:`lrp_fast.LRP`; the model is traced once.

    ``composite``, ``split`` and ``backend`` as there; ``levels``: heat quantization to that many levels, None for none.
    Raises ``ValueError`` for a composite or split that is not known, or fewer than 2 levels (more than 65536: at the first
    map).
    """

    composite: str | Composite = "otsuki2024"
    split: str | Split | Splits | None = None
    levels: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.composite, str):
            Composite.named(self.composite)
        if self.split is not None:
            as_splits(self.split)
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"heat quantization needs at least 2 levels, got {self.levels}")

    def prepare(self, model: nn.Module) -> LRP:
        return LRP(model, self.composite, self.split, self.backend)

    def heatmaps(self, state: LRP, images: Tensor, target: Tensor) -> Tensor:
        return self.finish(_attribution(state, images, target).heatmap)

    def explain(self, model: nn.Module, images: Tensor, target: Tensor) -> Attribution:
        """The attribution behind the map, with start and leak; ``finish`` of its heatmap is the method's.

        ``relevance`` is None. Arguments and errors as of a :class:`Method`.
        """
        return self._run(_attribution, model, images, target)

    def finish(self, heatmap: Tensor) -> Tensor:
        """The heatmaps N×H×W after heat quantization, if this method quantizes."""
        return heatmap if self.levels is None else heat_quantize(heatmap, self.levels)


def _attribution(explainer: LRP, images: Tensor, target: Tensor) -> Attribution:
    return explainer.explain(images, target, relevance=False)


def parse_lrp_method(name: str) -> LRPMethod:
    """The method of a name such as ``otsuki2024``, ``conserving:symmetric`` or ``otsuki2024:ratio/symmetric+quantized4``.

    The grammar is ``GRAMMAR``; a single split serves both kinds of merge. Raises ``ValueError`` that says which part is
    not understood, and what is known.
    """
    rest, plus, suffix = name.partition("+")
    composite, colon, splits = rest.partition(":")
    quantized = _SUFFIX.fullmatch(suffix)
    if plus and quantized is None:
        raise ValueError(f"{name!r}: only +quantized or +quantized with a number of levels may follow, got +{suffix}")
    levels = int(quantized[1] or DEFAULT_LEVELS) if quantized else None
    identity, slash, projection = splits.partition("/")
    try:
        split = Splits(identity, projection if slash else identity) if colon else None
        return LRPMethod(composite, split, levels)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}; expected {GRAMMAR}") from error
