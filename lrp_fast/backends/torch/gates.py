"""Gates, the messages that go through them, and the memory layout of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrp_fast.rules import Stabilizer, ZeroGuard
from lrp_fast.scopes import watched

Message = tuple[Tensor | None, Tensor | None]
"""``(acc, dense)``: relevance ``x · acc + dense`` of a layer's input x."""


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels last in memory, if it is an image or a volume."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.ndim == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous()


class Gates(NamedTuple):
    """Per group, what turns incoming relevance into ``s = R / stab(z)``; ``dead`` what a zero-guard spreads evenly."""

    groups: tuple[Tensor, ...]
    dead: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype ratios are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stabilized(z: Tensor, stabilizer: Stabilizer, may_vanish: bool) -> Tensor:
    """``stab(z)``; ``may_vanish``: z may be negative, so that an unsigned ``z + ε`` could be zero."""
    z = stabilizer(z)
    return z.masked_fill(z == 0, stabilizer.epsilon) if may_vanish and not stabilizer.signed else z


def guarded(z: Tensor, guard: ZeroGuard, numerator: Tensor | float) -> tuple[Tensor, Tensor | None]:
    """The gate of a zero-guarded denominator, and the mask (times the numerator) of what counts as zero.

    None for a mask that is known to be empty, as most are: then nothing needs to be spread.
    """
    rest = tuple(range(1, z.ndim))
    limit = guard.threshold * z.amax(rest, keepdim=True)
    if may_look(z) and bool((z.amin(rest, keepdim=True) > limit).all()):
        return numerator / z, None
    dead = z <= limit
    return (numerator / z).masked_fill_(dead, 0.0), dead * numerator


def stored(alive: Tensor, dead: Tensor | None, dtype: torch.dtype) -> Gates:
    """A zero-guard's gates in the compute dtype."""
    return Gates((alive.to(dtype),), None if dead is None else dead.to(dtype))


def may_look(x: Tensor) -> bool:
    """Whether a decision may depend on a tensor: not in a graph that is being made, nor where it means to wait for a device."""
    return x.device.type == "cpu" and not watched()
