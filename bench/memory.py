"""The peak memory of one contender in a process of its own.

    python bench/memory.py CONTENDER [--network resnet50] [--batch 8] [--side 224] [--dtype float32] [--calls 10]

Prints JSON: ``before``, what is held once model and images are there, and ``by_call``, the highest level so far after each
call, in MB. On a CPU that is the process's resident memory (VmRSS and VmHWM of ``/proc/self/status``, the mark reset before
the first call), on a CUDA device what torch's allocator counts.
"""

from __future__ import annotations

import gc
import importlib
import json
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

import records
from contenders import DTYPES, find, network, noise

MEGABYTE = 1e6


def measure(name: str, model: str, batch: int, side: int, dtype: str, calls: int) -> dict[str, object]:
    """MB before the contender is built, and at the peak after each call of it."""
    contender = find(name)
    device = records.torch_device()
    if contender.library is not None:
        importlib.import_module(contender.library)
    subject, images = network(model, device), noise(batch, side, DTYPES[dtype], device)
    with torch.no_grad():
        subject(images[:1, :, :32, :32].float())  # what torch loads at its first call is no contender's
    gc.collect()
    before = restart(device)
    run = contender.build(subject, images)
    by_call = []
    for _ in range(calls):
        run()
        by_call.append(peak(device))
    return {"contender": name, "before": before, "by_call": by_call}


def restart(device: torch.device) -> float:
    """Forget the peak so far; what is held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MEGABYTE
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    return _status("VmRSS")


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MEGABYTE
    return _status("VmHWM")


def _status(name: str) -> float:
    """An entry of /proc/self/status, whose unit is KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024 / MEGABYTE
    raise RuntimeError(f"/proc/self/status has no {name}: the peak of resident memory cannot be read on this system")


def main(
    contender: str,
    network: Annotated[str, typer.Option(help="of torchvision, or cifar")] = "resnet50",
    batch: int = 8, side: int = 224, dtype: str = "float32", calls: int = 10,
) -> None:  # fmt: skip
    """Measure and print."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    warnings.simplefilter("ignore")  # the peers'; the timed runs show them
    print(json.dumps(measure(contender, network, batch, side, dtype, calls)))


if __name__ == "__main__":
    typer.run(main)
