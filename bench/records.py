"""Where the benchmarks that run on any machine keep what they measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def save(name: str, result: Mapping[str, object]) -> Path:
    """Write ``results/NAME-torchVERSION.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-torch{torch.__version__.split('+')[0]}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file
