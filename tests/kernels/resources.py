"""What the compiler makes of every case of bench/cases.py, for GPUs this machine does not have.

    python tests/kernels/resources.py heaviest|cases|candidates|few [dtype ...]

prints JSON rows (:class:`Row`). A process of its own without TRITON_INTERPRET, which :func:`resources` starts.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))

import torch
from compiling import CAPABILITIES, Launch, Resources, compiled, launches_of, source_of

from builders import Prepared
from cases import KernelCase, kernel_cases
from lrp_fast.kernels import pointwise_conv, spatial_conv
from predict import H100, predicted

ROOT = pathlib.Path(__file__).resolve().parents[2]
Mode = Literal["heaviest", "cases", "candidates", "few"]
BATCH = 256
DTYPES: dict[str, tuple[torch.dtype, pointwise_conv.Precision]] = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
"""A dtype by name, and what products of it are computed in."""
SAME = {
    "ROWS", "COLUMNS", "INNER", "PARTS", "EVEN_K", "OTHER_EVEN_K", "BLOCK", "BLOCK_ROWS", "BLOCK_COLUMNS", "EIGHTH"
}  # fmt: skip
"""Constants that belong to a tile or a size; what differs in others is another variant of a kernel."""
HEAVIEST = (
    "gate.gate 28² 128, γ",
    "gate.image_maximum 28² 512",
    "merge.merge 28² 512, guard, projection",
    "merge.arrive 28² 128, guard",
    "pointwise_conv.image_maximum 28² 128→512",
    "pointwise_conv.gated 28² 512→128, γ",
    "pointwise_conv.merged 28² 128→512, γ, beside a library's",
    "pointwise_conv.merged 56²+28²→512, αβ, projection",
    "pointwise_conv.backward 28² 2·128→512, αβ, merge",
    "pointwise_conv.backward 28² 128→512, guard, merge",
    "pointwise_conv.backward 56² 128→256, divided merge of stride 2",
    "pointwise_conv.backward 56² 64+256→64",
    "spatial_conv.gated 28² 128→128, γ",
    "spatial_conv.merged 28² 128→128, γ, projection",
    "spatial_conv.backward 56² 64→64 stride 1, merge",
    "spatial_conv.stem_heatmap 224² 64",
    "pool.max_pool_gated 112² 64",
    "pool.max_pool_average 112² 64",
    "pool.winner_pool 112² 64",
    "pool.winner_backward 112² 64, two ends",
    "pool.block_backward 7² 2048, global average",
    "pool.spread 28² 128",
    "heatmap.channel_sum 224² 3",
    "heatmap.quantize 224²",
)
"""Of each launcher the case that holds most at once."""


@dataclass(frozen=True)
class Row:
    """What one launch of a case costs on one capability; ``rows`` and ``warps`` of its tile, rows 0 if it is no GEMM.

    ``narrowest``: the fewest bytes of activations that one instruction moves, see :class:`compiling.Resources`.
    ``predicted``: seconds for what the case moves and multiplies; ``issue``: for the instructions of this launch, where every
    scheduler of an H100 issues one in each cycle (of :func:`resources` under ``cases`` in bfloat16 for sm_90; 0 elsewhere).
    """

    case: str
    kernel: str
    dtype: str
    capability: int
    function: str
    shared: int
    registers: int
    stack: int
    wgmma: int
    narrowest: int
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    grouped: bool
    predicted: float
    issue: float

    @property
    def wants_wide(self) -> bool:
        """A pass over activations that must move them 16 bytes at a time: not one number for a tile, a row or a pixel."""
        passes = ("gate.gate", "merge.merge", "merge.arrive", "_conv.gated", "_conv.merged", "_conv.backward")
        return self.kernel.endswith(passes) and not self.grouped

    @property
    def wants_wgmma(self) -> bool:
        """A GEMM that must use Hopper's matrix instructions."""
        return (
            self.capability == 90 and self.dtype != "fp32" and self.rows >= 64 and self.warps >= 4 and not self.grouped
        )


def resources(mode: Mode, *dtypes: str) -> list[Row]:
    """The rows of a mode, from a process that can compile; ``dtypes``: of :data:`DTYPES`, by default all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, mode, *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return [Row(**values) for values in json.loads(done.stdout)]


# In the process that compiles -----------------------------------------------------------------------------------------


def identity(mode: Mode, case: KernelCase, launch: Launch) -> tuple[object, ...]:
    """What launches share that need not both be compiled: the code, or under ``heaviest`` the variant of a kernel."""
    if mode != "heaviest":
        return source_of(launch).hash(), str(launch.options)
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    kept = {name: launch.arguments[name] for name in constants - SAME}
    if kept.get("STABILIZER") != "guard":
        kept.pop("STABILIZER", None)  # the others differ in an addition
    return case.kernel, launch.kernel.__name__, frozenset(kept.items())


def row_of(mode: Mode, case: KernelCase, prepared: Prepared, dtype: str, launch: Launch, found: Resources) -> Row:
    """What was found, as this case launches it."""
    arguments, warps = launch.arguments, launch.options["num_warps"]
    counted = (mode, found.capability, dtype) == ("cases", 90, "bf16")
    issued = found.code.issued(launch.programs * warps, prepared.flops) if counted else 0.0
    sums = {4} if "guarded" in (arguments.get("PART_A"), arguments.get("PART_B")) else set()  # one for eight channels
    tile = {name.lower(): int(arguments.get(name, 0)) for name in ("ROWS", "COLUMNS", "INNER")}
    return Row(
        case.name, case.kernel, dtype, found.capability, found.name, found.shared, found.registers, found.stack, found.wgmma,
        min(width for width in found.widths if width not in sums), **tile,
        warps=warps, stages=launch.options.get("num_stages", 0),
        grouped=arguments.get("columns_of_group") != arguments.get("C") and "columns_of_group" in arguments,
        predicted=predicted(prepared.bytes, prepared.flops, H100, DTYPES[dtype][0].itemsize),
        issue=issued / H100.issue,
    )  # fmt: skip


def wanted(mode: Mode, case: KernelCase, dtype: str, capability: int) -> bool:
    """Whether a mode compiles a case: ``cases`` all in bf16 and for sm_90, and the heaviest elsewhere; others the heaviest."""
    multiplies, heavy = "_conv." in case.kernel, case.name in HEAVIEST
    if dtype == "tf32" and not multiplies:
        return False  # as in fp32
    central = dtype == "bf16" or capability == 90
    if mode == "cases":
        return heavy or central
    return heavy and central and (multiplies or (mode == "heaviest" and dtype == "bf16"))


def launches(mode: Mode, run: Callable[[], object], capability: int) -> list[Launch]:
    """What a case launches; under ``candidates`` with each of them but the default."""
    if mode != "candidates":
        return launches_of(run)
    return [launch for place in range(1, 6) for launch in launches_of(partial(with_candidate, place, capability, run))]


def with_candidate(place: int, capability: int, run: Callable[[], object]) -> None:
    """Run with a device's candidate in that place as the default, if there is one."""

    def shifted(original: Callable[..., list[Any]], options: dict[str, int], *arguments: Any) -> list[Any]:
        found = original(*arguments, **options)
        if place >= len(found):
            raise LookupError
        return found[place:]

    none: dict[str, int] = {}
    launchers = (
        (pointwise_conv, "candidates", {"capability": capability}),
        (spatial_conv, "candidates", none),
        (spatial_conv, "stem_candidates", none),
    )
    with ExitStack() as stack, suppress(LookupError):
        for module, name, options in launchers:
            stack.enter_context(mock.patch.object(module, name, partial(shifted, getattr(module, name), options)))
        run()


def rows(mode: Mode, dtype: str, capability: int) -> list[Row]:
    """What a mode compiles, each launch once (``few``: for one image); under ``cases`` equal ones have rows of their own."""
    cases = [case for case in kernel_cases() if wanted(mode, case, dtype, capability)]
    done: dict[object, Resources] = {}
    found = []
    for case in sorted(cases, key=lambda case: case.name not in HEAVIEST):
        prepared = case.build(torch.device("meta"), DTYPES[dtype][0], 1 if mode == "few" else BATCH, DTYPES[dtype][1])
        for launch in launches(mode, prepared.run, capability):
            key = identity(mode, case, launch)
            if key not in done:
                done[key] = compiled(launch, capability)
            elif mode != "cases":
                continue
            found.append(row_of(mode, case, prepared, dtype, launch, done[key]))
    return found


def main(mode: Mode, *dtypes: str) -> None:
    """Print all rows of a mode; a process for each core compiles."""
    pairs = tuple(zip(*product(dtypes or DTYPES, CAPABILITIES), strict=True))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        found = pool.map(partial(rows, mode), *pairs)
        print(json.dumps([asdict(row) for of_pair in found for row in of_pair]))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
