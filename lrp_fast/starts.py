"""Which classes are explained, and the relevance that is put in at the logits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_fast.composites import STARTS

Target = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None
StartArgument = str | Callable[[Tensor], Tensor] | Tensor | None


class Targets(NamedTuple):
    """Classes N×K, or None for the predicted ones; ``single``: one map for each image, without a dimension for K."""

    classes: Tensor | None
    single: bool

    @staticmethod
    def of(target: Target, count: int) -> Targets:
        """Those of ``count`` images, where the caller has them, so that to look at them no GPU is waited for.

        Raises ``TypeError`` for what are no integers, ``ValueError`` for another number of them.
        """
        if target is None:
            return Targets(None, True)
        try:
            classes = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"expected target as None, an int, or ints in a list or tensor of N or N x K, got {target!r}"
            ) from error
        expected = f"expected one target, {count} targets (one for each input) or {count} x K"
        if classes.numel() == 0:
            raise ValueError(f"{expected}, got shape {tuple(classes.shape)}")
        if classes.dtype.is_floating_point or classes.dtype.is_complex or classes.dtype == torch.bool:
            raise TypeError(f"expected integer targets, got {classes.dtype}")
        classes = classes.to(torch.int64)
        if classes.ndim == 0:
            classes = classes.expand(count)
        if classes.ndim > 2 or classes.shape[0] != count:
            raise ValueError(f"{expected}, got shape {tuple(classes.shape)}")
        return Targets(classes if classes.ndim == 2 else classes[:, None], classes.ndim == 1)

    @property
    def maps(self) -> int:
        """How many of each image."""
        return 1 if self.classes is None else self.classes.shape[1]

    def split(self, count: int, images: int) -> list[Targets]:
        """Those of every ``count`` of all the images."""
        if self.classes is None:
            return [self] * -(-images // count)
        return [Targets(classes, self.single) for classes in self.classes.split(count)]


class Start(NamedTuple):
    """What is propagated, K×N×classes, for the classes K×N, and what the maps are multiplied with in the end, K×N float64.

    So that relevance far below one does not underflow on its way. ``single``: K is 1 and not to be shown. ``given``: by the
    caller, not one for the class.
    """

    relevance: Tensor
    classes: Tensor
    scale: Tensor
    single: bool
    given: bool = False

    @staticmethod
    def of(output: Tensor, targets: Targets, start: StartArgument) -> Start:
        """That of logits N × classes, by name or as the caller gives it.

        Raises ``ValueError`` for an unknown name, a class that there is not, or a given start that does not fit,
        ``TypeError`` for one that is no tensor.
        """
        if not isinstance(start, str):
            return _given_start(start, output, targets)
        if start not in STARTS:
            raise ValueError(
                f"unknown start {start!r}; known: {', '.join(STARTS)}, a function of the logits, or a tensor"
            )
        count, classes = output.shape
        if targets.classes is None:
            chosen = output.argmax(1, keepdim=True)
        else:
            chosen = targets.classes
            bad = (chosen < 0) | (chosen >= classes)
            if bool(bad.any()):
                raise ValueError(
                    f"target {int(chosen[bad][0])} is out of range: the model has classes 0 to {classes - 1}"
                )
            chosen = chosen.to(output.device, non_blocking=True)
        # In float64, where the probability of a class that is out of the question is not zero.
        values = output.double() if start == "logit" else output.double().softmax(1)
        scale = values.new_ones(chosen.shape) if start == "one" else values.gather(1, chosen)
        relevance = output.new_zeros(chosen.shape[1], count, classes).scatter_(2, chosen.t()[..., None], 1.0)
        return Start(relevance, chosen.t(), scale.t(), targets.single)

    @property
    def maps(self) -> int:
        """How many of each image."""
        return self.relevance.shape[0]


def _given_start(start: object, output: Tensor, targets: Targets) -> Start:
    """A start relevance that the caller made, with the predicted class as the target."""
    if targets.classes is not None:
        raise ValueError(
            "a start relevance given as a tensor or function covers all classes itself; give no target with it"
        )
    given = start(output) if callable(start) else start
    if not isinstance(given, Tensor) or given.is_complex():
        got = f"a {given.dtype} tensor" if isinstance(given, Tensor) else repr(given)
        raise TypeError(f"expected the start as a name, a real tensor N x classes or a function giving one, got {got}")
    shape = tuple(output.shape)
    if given.ndim not in (2, 3) or (given.shape[0], given.shape[-1]) != shape:
        raise ValueError(f"expected a start relevance of shape {shape} or N x K x classes, got {tuple(given.shape)}")
    begin = given.detach().to(output.device, output.dtype)
    if not bool(begin.isfinite().all()):
        raise ValueError("the start relevance is not finite (NaN or infinity)")
    begin = begin[None] if given.ndim == 2 else begin.transpose(0, 1)
    scale = begin.new_ones(begin.shape[:2], dtype=torch.float64)
    return Start(begin, output.argmax(1).expand(begin.shape[0], -1), scale, given.ndim == 2, True)
