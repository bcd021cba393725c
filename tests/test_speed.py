"""The speed the README promises, as a ratio within one interleaved run whose parity is checked in that run."""

from __future__ import annotations

import pathlib
import sys

import pytest

pytest.importorskip("zennit", reason="compares with zennit")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
import speed


@pytest.mark.slow
def test_faster_than_zennit() -> None:
    found = speed.measure(batch=8, side=224, repeats=5, compile_too=True)["ms_per_image"]
    assert found["zennit EpsilonPlusFlat"] >= 3.5 * found["otsuki2024 compiled"]
