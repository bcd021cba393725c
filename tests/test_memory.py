"""Freed memory that a process keeps, seen from outside: what the system has to fill with zeros again; and having none left."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from lrp_fast.memory import is_out_of_memory, out_of_memory_suppressed

COUNT = """
import gc, json, resource, torch
from lrp_fast import LRP
from lrp_fast.memory import keep_freed_memory

class Owner: pass
def work():
    held = [torch.ones(size, 1 << 18) for size in (150, 5, 24, 9)]  # 157, 5, 25 and 9 MB
def explainer(**options):
    return LRP(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval(), **options)
def faults():
    for _ in range(4):  # until every tensor has found its place
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")


def run(program: str, **environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT + program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[float] = json.loads(done.stdout)
    return found


def test_freed_memory_is_kept_as_long_as_an_owner_lives() -> None:
    program = """
usual = faults()
first, second = Owner(), Owner()
said = [keep_freed_memory(first), keep_freed_memory(second)]
del first
kept, most = faults(), resident()
del second
print(json.dumps([*said, usual, kept, most, resident()]))
"""
    *said, usual, kept, most, given_back = run(program)
    assert said == [True, True]
    assert kept <= usual / 20
    assert given_back <= most - 100  # of 197 MB


def test_an_explainer_is_an_owner() -> None:
    program = """
usual = faults()
other = explainer(keep_memory=False)
without = faults()
one = explainer()
kept, most = faults(), resident()
del one
gc.collect()
print(json.dumps([usual, without, kept, most, resident()]))
"""
    usual, without, kept, most, given_back = run(program)
    assert kept <= usual / 20 <= without
    assert given_back <= most - 100


def test_the_environment_s_choice_stays() -> None:
    said, usual, after = run(
        "usual = faults()\nsaid = keep_freed_memory(json)\nprint(json.dumps([said, usual, faults()]))",
        MALLOC_TRIM_THRESHOLD_="100000",
    )
    assert said is False
    assert after >= usual / 2


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_used_up(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) is full
    with nullcontext() if full else pytest.raises(type(error)), out_of_memory_suppressed():
        raise error
