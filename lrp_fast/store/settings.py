"""Comparing what was begun with what is wanted now."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrp_fast.store.layout import StoreError

MOST_COMPARED = 6
"""How many settings that differ are told with both values; of the others the names."""


class SettingsError(StoreError):
    """A store was begun with other settings; the message names each with both values."""


def check_settings(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], adopted: Collection[str] = ()
) -> None:
    """Raise :class:`SettingsError` if what ``path`` was begun with differs, but for the names in ``adopted``.

    Settings may be nested; the error names each that differs, with both values.
    """
    listed = differences(found, wanted, adopted)
    if listed:
        raise SettingsError(f"{path} was begun with other settings, so it cannot be continued with these: {listed}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], adopted: Collection[str] = ()) -> str:
    """The settings that differ, but for the names in ``adopted``, as text: each with both values; empty if none does."""
    there, here = dict(_flat(found)), dict(_flat(wanted))
    names = sorted((there.keys() | here.keys()) - set(adopted))
    names = [name for name in names if there.get(name) != here.get(name)]
    told = [f"{name}: {there.get(name)!r:.200} there, {here.get(name)!r:.200} now" for name in names[:MOST_COMPARED]]
    return "; ".join(told + ([f"and {', '.join(names[MOST_COMPARED:])}"] if names[MOST_COMPARED:] else []))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and plain values; that they belong to the layout goes without saying."""
    if not isinstance(value, Mapping):
        yield name, list(value) if isinstance(value, tuple) else value
        return
    for key, each in value.items():
        prefix = "" if name in ("", "layout") else f"{name}."
        yield from _flat(each, prefix + key)
