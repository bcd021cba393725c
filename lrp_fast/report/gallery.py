"""The gallery: one self-contained page over a folder of overlays, readable on a phone, in the light and in the dark.

Everything that comes from a file name or a class name is escaped by the template engine, and quoted where
it is an address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .page import fill_template


@dataclass(frozen=True)
class Card:
    """One explained picture.

    ``name``: as displayed; ``picture`` and ``overlay``: paths relative to the page; ``probability`` in [0, 1] of
    ``class_name``; ``leak``: the share of relevance lost, signed; ``facts``: further (label, text) pairs; ``signed``:
    whether the overlay's colours run from negative to positive relevance.
    """

    name: str
    picture: str
    overlay: str
    class_name: str
    probability: float
    leak: float
    facts: Sequence[tuple[str, str]] = ()
    signed: bool = False


@dataclass(frozen=True)
class Failure:
    """One picture that could not be explained, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Gallery:
    """What a page shows: ``settings`` of the run and ``summary`` of its results as label to text, cards and failures.

    ``interrupted``: the run was stopped early.
    """

    title: str
    settings: Mapping[str, str]
    cards: Sequence[Card]
    failures: Sequence[Failure] = ()
    summary: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


def render_gallery(gallery: Gallery) -> str:
    """The page as HTML text; it explains each colour scale that its cards use."""
    signs = (card.signed for card in gallery.cards)
    return fill_template("gallery.html", gallery.settings, signs, {"percent": percent}, gallery=gallery)


def percent(share: float) -> str:
    """A share as a percentage of about three digits, 0.0123 as ``1.23 %``; tiny ones of either sign as ``< 0.01 %``."""
    if 0 < abs(share) < 1e-4:
        return "< 0.01 %"
    digits = 0 if abs(share) >= 0.9995 else 1 if abs(share) >= 0.1 else 2
    return f"{share * 100:.{digits}f} %".replace("-", "−")
