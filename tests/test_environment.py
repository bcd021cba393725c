"""What the environment says of this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrp_fast.environment import Launched, cache_folder, launched

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launched(3, 8, 1, "torchrun")),
        (SRUN, Launched(2, 4, 0, "srun")),
        ({**SRUN, **TORCHRUN}, Launched(3, 8, 1, "torchrun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, None),  # a batch script, outside srun
        ({"RANK": "3"}, None),
        ({**TORCHRUN, "RANK": "x"}, None),
        ({**TORCHRUN, "RANK": "8"}, None),
    ],
)
def test_which_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Launched | None
) -> None:
    for name in (*TORCHRUN, *SRUN, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LRP_FAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LRP_FAST_CACHE")
    assert cache_folder() == tmp_path / "lrp_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lrp_fast"
