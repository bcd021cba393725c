"""Freed memory that a process keeps, seen from outside: what the system has to fill with zeros again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from lrp_fast.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def work():
    held = [torch.ones(size, 1 << 18) for size in (20, 5, 12, 9)]  # 20, 5, 12 and 9 MB
for _ in range(4):  # until every tensor has found its place
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str, **environment: str) -> tuple[str, int]:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, count = found.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_kept() -> None:
    (_, usual), (said, kept) = faults("usual"), faults("keep")
    assert said == "True"
    assert kept <= usual / 20


def test_the_environment_s_choice_stays() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
