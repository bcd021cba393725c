"""Compile the very kernels a call would launch, for GPUs this machine does not have, and say what they cost.

Run in a process of its own without TRITON_INTERPRET: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
STORE = re.compile(r"\bst\.global(?:\.L\w+)*(?:\.v([248]))?\.[bfsu](\d+)")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
WGMMA = re.compile(r"^HGMMA\.64x(\d+)x(\d+)\b")


@dataclass(frozen=True)
class Launch:
    """One kernel launch as a launcher asked for it; ``programs``: the size of its grid."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]
    programs: int


@dataclass(frozen=True)
class Code:
    """What one warp issues, from the machine code: outside of loops, and in one pass of a loop, their mean.

    ``flops``: what a warp multiplies in such a pass, where that is ``wgmma``; other matrix instructions are not counted.
    """

    outside: int
    looped: float
    flops: float

    def issued(self, warps: int, flops: float) -> float:
        """Instructions of all warps of a launch that multiplies ``flops`` in all; each loop is passed once if it does not."""
        passes = flops / self.flops if self.flops else warps
        return warps * self.outside + passes * self.looped


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a launch for one capability: bytes, registers a thread, instructions.

    ``widths``: the bytes that its instructions store to the device's memory or copy from there to shared memory.
    """

    name: str
    capability: int
    shared: int
    registers: int
    stack: int
    wgmma: int
    widths: tuple[int, ...]
    cubin: bytes = field(repr=False)

    @cached_property
    def code(self) -> Code:
        """Disassembled when it is asked for: that takes a third of a second."""
        return code_of(cuobjdump("-sass", self.cubin))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of running them; give the launchers tensors on the meta device."""
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        assert set(named) == set(self.arg_names), set(named) ^ set(self.arg_names)
        launches.append(Launch(self, named, options, math.prod(grid)))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches a call makes."""
    with recorded() as launches:
        call()
    return launches


def source_of(launch: Launch) -> ASTSource:
    """What is compiled for a launch; launches of equal ``.hash()`` and options are compiled to the same."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile a launch for ``capability`` and read what it costs from the cubin."""
    kernel = triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = kernel.asm["ptx"]
    stores = [int(bits) // 8 * int(vector or 1) for vector, bits in STORE.findall(ptx)]
    assert len(stores) == ptx.count("st.global"), f"{launch.kernel.__name__}: stores that STORE does not know"
    copies = [int(size, 0) for size in COPY.findall(ptx)]
    usage = dict(item.split(":", 1) for item in cuobjdump("-res-usage", kernel.asm["cubin"]).split() if ":" in item)
    return Resources(
        launch.kernel.__name__, capability, kernel.metadata.shared, int(usage["REG"]), int(usage["STACK"]),
        ptx.count("wgmma.mma"), (*stores, *copies), kernel.asm["cubin"],
    )  # fmt: skip


def cuobjdump(option: str, cubin: bytes) -> str:
    """What Triton's own cuobjdump prints of machine code."""
    program = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def code_of(listing: str) -> Code:
    """Read from what ``cuobjdump -sass`` prints; a loop is what lies between a branch back and its target."""
    found = [(int(place, 16), name, rest) for place, name, rest in INSTRUCTION.findall(listing)]
    assert found, "no instructions that INSTRUCTION knows"
    targets = [(int(rest.split("0x")[-1], 16), place) for place, name, rest in found if name == "BRA" and "0x" in rest]
    spans = [(start, end) for start, end in targets if start < end]
    loops = [[name for place, name, _ in found if start <= place <= end] for start, end in spans]
    multiplied = [WGMMA.match(name) for loop in loops for name in loop]
    flops = sum(2 * 16 * int(match[1]) * int(match[2]) for match in multiplied if match)  # 64 rows for four warps
    outside = [
        name for place, name, _ in found if name != "NOP" and not any(start <= place <= end for start, end in spans)
    ]
    count = max(len(loops), 1)
    return Code(len(outside), sum(map(len, loops)) / count, flops / count)
