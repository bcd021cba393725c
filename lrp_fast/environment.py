"""Every environment variable that the package reads.

``LRP_FAST_CACHE`` and ``XDG_CACHE_HOME``: where measured choices are kept. ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` (as
torchrun sets them) and ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``, ``SLURM_LOCALID`` (as srun does): which of several equal
processes this one is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def cache_folder() -> Path:
    """Where measured choices are kept: ``$LRP_FAST_CACHE``, or ``lrp_fast`` in the user's cache folder."""
    own = os.environ.get("LRP_FAST_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lrp_fast"


@dataclass(frozen=True)
class Launched:
    """This process is number ``index`` of ``count``, and ``local`` on its machine; ``by``: who says so."""

    index: int
    count: int
    local: int
    by: str


# Not SLURM_NTASKS: a batch script has it too, and runs once whatever it says.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def launched() -> Launched | None:
    """Which of several processes this is, by torchrun's variables or srun's; None where neither has started it."""
    for by, *names in _LAUNCHERS:
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdecimal() for value in values):
            index, count, local = map(int, values)
            if index < count:
                return Launched(index, count, local, by)
    return None
