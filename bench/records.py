"""Where the benchmarks that run on any machine keep what they measured, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = {
    "torch": "torch", "triton": "triton", "torchvision": "torchvision", "zennit": "zennit", "captum": "captum",
    "pytorch_grad_cam": "grad-cam", "lrp_fast": "lrp-fast",
}  # fmt: skip
"""What versions are told of: module and distribution."""


def save(name: str, result: Mapping[str, object]) -> Path:
    """Write ``results/NAME-torchVERSION.json`` and return its path."""
    return write(RESULTS / file_name(name), result)


def file_name(name: str) -> str:
    """``NAME-torchVERSION.json``."""
    return f"{name}-torch{torch.__version__.split('+')[0]}.json"


def write(file: Path, result: Mapping[str, object]) -> Path:
    """Write a JSON file, as a whole or not at all; raises ``ValueError`` for NaN and infinity, which JSON does not have."""
    return write_text(file, json.dumps(result, indent=1, allow_nan=False))


def write_text(file: Path, text: str) -> Path:
    """Write a text file, as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(file)
    return file


def torch_device() -> torch.device:
    """The current CUDA device, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stamp(**more: object) -> dict[str, object]:
    """What heads every result: the machine (and ``more`` of it), versions and the time."""
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"device": device() | more, "versions": versions(), "date": date}


def device_name() -> str:
    """The machine in a file's name: the GPU, or the processor's kind."""
    if torch.cuda.is_available():
        from timing import Cuda

        return Cuda().name
    return f"cpu-{platform.machine()}"


def versions() -> dict[str, str]:
    """Python's and the packages', as far as they are there; "unknown" of what was not installed but only lies on the path."""
    found = {name: _version(name) for module, name in PACKAGES.items() if importlib.util.find_spec(module)}
    return {"python": platform.python_version()} | found | {"torch": torch.__version__}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def device() -> dict[str, object]:
    """The machine in full: processor, cores, threads, whether it has bfloat16 instructions, and the GPU."""
    found: dict[str, object] = {
        "name": device_name(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(),
    }
    if torch.cuda.is_available():
        from timing import Cuda

        found |= Cuda().environment()
    return found


def processor() -> str:
    """The processor by name, as Linux tells it."""
    lines = _processor_lines("model name")
    return lines[0] if lines else platform.machine()


def has_bfloat16() -> bool:
    """Whether what computes here multiplies bfloat16 in instructions of its own."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = {flag for line in (_processor_lines("flags") + _processor_lines("Features"))[:1] for flag in line.split()}
    return not flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def _processor_lines(name: str) -> list[str]:
    """The values of an entry in /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
