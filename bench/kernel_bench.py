"""The kernel table: every kernel beside the same work in eager and compiled torch, and beside its floor.

The floor of a kernel is ``max(bytes / copy bandwidth, FLOPs / matrix-product rate)``, both rates measured in the same run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from builders import Prepared
from cases import KernelCase, kernel_cases, small_cases
from lrp_fast.memory import is_out_of_memory
from lrp_fast.scopes import float32_precision
from predict import H100, predicted
from report import ENDED, Cell, Results
from timing import Budget, Device, OutOfTimeError, time_limit

logger = logging.getLogger("gpu_check")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
BOUNDS = {"bfloat16": 2e-2, "float32": 2e-5, "tf32": 5e-3}
ROUNDED = "αβ"
"""Eager torch rounds the two stacks of these to bfloat16 before it adds them up, which costs it 4e-2; and what TF32 drops of
either does not cancel with them."""
ROUNDED_BOUNDS = BOUNDS | {"bfloat16": 8e-2, "tf32": 2e-2}
BATCH, DRY_BATCH = 256, 2
OTHERS = 6
"""How many of the heaviest kernels are measured in float32 and TF32 too."""
COMPILED = 2
"""How many of the heaviest are compared with compiled torch where time is short."""
COMPILING_SECONDS = 40.0
SECONDS_EACH = 0.25
"""For the repeats of one row."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a case in a precision."""

    case: KernelCase
    precision: str
    compiled: bool

    @property
    def product(self) -> Literal["ieee", "tf32"]:
        """How kernels multiply float32."""
        return "tf32" if self.precision == "tf32" else "ieee"

    @property
    def bound(self) -> float:
        """The largest relative L2 difference between the kernel's outputs and eager torch's."""
        return (ROUNDED_BOUNDS if ROUNDED in self.case.name else BOUNDS)[self.precision]

    @property
    def key(self) -> str:
        """The row by name."""
        return f"{self.case.name}, {self.precision}"

    @property
    def known(self) -> Cell:
        """What a cell says of the row before anything is measured."""
        return {"kernel": self.case.kernel, "count": self.case.count, "precision": self.precision}


def measure_kernels(results: Results, device: Device, budget: Budget, share: float, full: bool = False) -> None:
    """Measure the rows that are not there yet until ``share`` of the budget is spent."""
    cells, rates = results.run["cells"], results.run.setdefault("rates", {})
    for row in plan(device.dry, full):
        if row.key in cells:
            continue
        if not budget.remaining(share):
            results.leave_out(f"kernel {row.key}")
            continue
        _measure_rates(rates, device, row.precision)
        with results.attempting(cells, row.key, **row.known):
            found = measure_row(row, device, rates)
        cells[row.key] = found
        results.take_in(f"kernel {row.key}")
        results.write()
        device.check()
        device.free()


def measure_compiled(results: Results, device: Device, budget: Budget, full: bool = False) -> None:
    """What compiled torch takes for rows that are there and are to be compared with it: it compiles for long, so after all else."""
    for row in plan(device.dry, full):
        cell = results.run["cells"].get(row.key, {})
        if not row.compiled or "seconds" not in cell or "compiled seconds" in cell or "compiled entry" in cell:
            continue
        where = f"kernel {row.key}, compiled torch"
        if not budget.remaining():
            results.leave_out(where)
            continue
        cell["compiled entry"] = ENDED
        results.write()
        found = _compiled(row, device, min(COMPILING_SECONDS, budget.remaining()))
        del cell["compiled entry"]
        cell |= found
        results.take_in(where)
        results.write()
        device.check()
        device.free()


def plan(dry: bool, full: bool) -> list[Row]:
    """The rows: those of the default explanation first, the heaviest first."""
    if dry:
        smallest = {case.kernel: case for case in reversed(small_cases())}
        return [Row(case, "float32", False) for case in smallest.values()]
    cases = sorted(kernel_cases(), key=_weight, reverse=True)
    rows = [Row(case, "bfloat16", full or rank < COMPILED) for rank, case in enumerate(cases)]
    others = cases if full else cases[:OTHERS]
    rows += [Row(case, precision, full) for precision in ("float32", "tf32") for case in others]
    return rows


def _weight(case: KernelCase) -> tuple[float, float]:
    """About the seconds this kernel takes of an explanation on an H100, and of a single launch."""
    prepared = case.build(torch.device("meta"), torch.bfloat16, BATCH, "ieee")
    seconds = predicted(prepared.bytes, prepared.flops, H100)
    return case.count * seconds, seconds


# One row ----------------------------------------------------------------------------------------------------------------


def measure_row(row: Row, device: Device, rates: Cell) -> Cell:
    """Parity first; a kernel that fails it gets no speed, only its bare time. Errors become entries."""
    cell = row.known
    try:
        with float32_precision(row.precision == "tf32"):
            batch, prepared = _batch(device), _prepared(row, device)
            cell |= {"batch": batch, "bytes": prepared.bytes, "flops": prepared.flops} | _parity(prepared, row)
            speed = _speed(prepared, device, rates, row.precision)
            cell |= {"unchecked seconds": speed["seconds"]} if "failed" in cell else speed
    except Exception as error:
        full = is_out_of_memory(error)
        cell |= {"entry": "out of memory"} if full else {"entry": describe(error), "failed": True}
    return cell


def _batch(device: Device) -> int:
    return DRY_BATCH if device.dry else BATCH


def _prepared(row: Row, device: Device) -> Prepared:
    torch.manual_seed(0)
    return row.case.build(device.torch_device, DTYPES[row.precision], _batch(device), row.product)


def describe(error: Exception) -> str:
    """An error on one line; all of it, with what led to it, is logged."""
    logger.error("%s", type(error).__name__, exc_info=error)
    behind = error.__cause__ or error.__context__
    return f"error: {_in_short(error)}" + (f" (behind {_in_short(behind)})" if behind else "")


def _in_short(error: BaseException) -> str:
    """Its first line and its last, where compilers say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ends = dict.fromkeys([*lines[:1], *lines[-1:]])
    return ": ".join([type(error).__name__, " … ".join(line[:200] for line in ends)])


def _parity(prepared: Prepared, row: Row) -> Cell:
    with poisoned_outputs():
        got = prepared.run()
    error = difference(got, prepared.eager())
    found: Cell = {"relative error": error, "bound": row.bound}
    if not error <= row.bound:
        found |= {"entry": f"FAILED: differs from eager torch by {error:.1e}, bound {row.bound:.0e}", "failed": True}
    return found


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Whatever a launcher allocates holds NaN (integers: 200) before its kernel runs."""
    fresh = Tensor.new_empty

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        empty = fresh(like, *shape, **options)
        return empty.fill_(torch.nan if empty.is_floating_point() else 200)

    with mock.patch.object(Tensor, "new_empty", poisoned):
        yield


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative L2 difference of any output; NaN if there is one."""
    errors = [0.0]
    for one, other in zip(got, wanted, strict=True):
        norm = float(torch.linalg.vector_norm(other.float(), dtype=torch.float64))
        errors.append(float(torch.linalg.vector_norm(one.float() - other.float(), dtype=torch.float64)) / norm)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _speed(prepared: Prepared, device: Device, rates: Cell, precision: str) -> Cell:
    medians = device.medians({"kernel": prepared.run, "eager": prepared.eager}, SECONDS_EACH)
    seconds = medians["kernel"]
    floor = max(prepared.bytes / (1e9 * rates["copy GB/s"]), prepared.flops / (1e12 * rates[f"{precision} TFLOP/s"]))
    return {
        "seconds": seconds, "eager seconds": medians["eager"], "floor seconds": floor, "share": floor / seconds,
        "gigabytes per second": prepared.bytes / seconds / 1e9, "teraflops": prepared.flops / seconds / 1e12,
    }  # fmt: skip


def _compiled(row: Row, device: Device, seconds: float) -> Cell:
    """The eager work through torch.compile, in turn with the kernel; what goes wrong there is an entry."""
    try:
        with time_limit(seconds), float32_precision(row.precision == "tf32"):
            prepared = _prepared(row, device)
            torch.compiler.reset()  # past a number of recompilations, functions would silently stay uncompiled
            compiled = torch.compile(prepared.eager, dynamic=False)
            compiled()
            medians = device.medians({"kernel": prepared.run, "compiled": compiled}, SECONDS_EACH)
            taken = medians["compiled"]
            return {"compiled seconds": taken, "compiled over kernel": taken / medians["kernel"]}
    except OutOfTimeError:
        return {"compiled entry": f"not within {seconds:.0f} s"}
    except Exception as error:
        return {"compiled entry": describe(error)}


# Rates ------------------------------------------------------------------------------------------------------------------


def _measure_rates(rates: Cell, device: Device, precision: str) -> None:
    """GB/s of a copy, bytes read and written counted, and TFLOP/s of a matrix product in ``precision``."""
    where = device.torch_device
    if "copy GB/s" not in rates:
        source = torch.ones(2**20 if device.dry else 2**31, dtype=torch.uint8, device=where)
        target = torch.empty_like(source)
        seconds = device.medians({"copy": lambda: target.copy_(source)}, SECONDS_EACH)["copy"]
        rates["copy GB/s"] = 2 * source.numel() / seconds / 1e9
    name = f"{precision} TFLOP/s"
    if name not in rates:
        side = 64 if device.dry else 8192
        a, b = (torch.randn(side, side, device=where, dtype=DTYPES[precision]) for _ in range(2))
        with float32_precision(precision == "tf32"):
            seconds = device.medians({"product": lambda: a @ b}, SECONDS_EACH)["product"]
        rates[name] = 2 * side**3 / seconds / 1e12
