"""Triton's interpreter made as strict as a GPU: what it lets pass, and a GPU would not, fails in every test.

The interpreter follows any address, runs programs one after another, gives zeros where a mask is off, multiplies tiles no
tensor core takes, and treats bfloat16 as whole numbers. :func:`install` changes its builder, for this
process, so that in every launch

- each address lies inside a tensor that was given, at one of its elements;
- no two programs, and no two lanes of a store, write the same element, and none reads what another program writes:
  on a GPU they run in any order;
- a masked load without ``other`` gives NaN (whole numbers: the largest) where the mask is off;
- a product has at least 16 elements a side;
- a grid's second and third dimension have at most 65,535 programs;
- no whole number of less than 64 bits overflows (Triton's own check of that takes a third of the interpreter's time);
- bfloat16 is rounded to nearest and computed in float32, and TF32 products drop the digits a tensor core drops.

:func:`only` runs some programs of a grid alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY, MANY = -1, -2
OVERFLOWING = (np.add, np.subtract, np.multiply)
MOST_PROGRAMS = 65_535
"""Of a grid's second and third dimension."""
LARGEST_TRACKED = 1 << 26
"""Elements: of larger tensors, which a test makes to reach far addresses, only the bounds are checked."""


class Fault(AssertionError):  # noqa: N818 - as a GPU reports one
    """What a GPU would not have done, or not always."""


class Region:
    """The elements of one tensor of a launch, and which programs touched each."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.itemsize, self.begin = name, tensor.element_size(), tensor.data_ptr()
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        self.length = span if tensor.numel() else 0
        self.tracked = self.length <= LARGEST_TRACKED
        size = self.length if self.tracked else 0
        self.writer, self.reader = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)

    @property
    def end(self) -> int:
        """The address behind the last element."""
        return self.begin + self.length * self.itemsize


class Launch:
    """The memory of a launch under way."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor], grid: tuple[int, ...]) -> None:
        self.kernel, self.grid, self.number = kernel, grid, NOBODY
        self.axes = [sorted({program % count for program in _chosen or range(count)}) for count in grid]
        self.program: tuple[int, ...] = ()
        self.regions: list[Region] = []
        for name, tensor in tensors.items():
            region = Region(name, tensor)
            if all((region.begin, region.end) != (known.begin, known.end) for known in self.regions):
                self.regions.append(region)
        self.regions.sort(key=lambda region: region.begin)

    def fault(self, what: str) -> Fault:
        """To be raised."""
        return Fault(f"{self.kernel}, program {self.program}: {what}")

    def places(self, addresses: np.ndarray, doing: str) -> Iterator[tuple[Region, np.ndarray]]:
        """The elements at some addresses, tensor by tensor."""
        rest = addresses
        for region in self.regions:
            here = (rest >= region.begin) & (rest < region.end)
            if here.any():
                offsets = (rest[here] - np.uint64(region.begin)).astype(np.int64)
                if (offsets % region.itemsize).any():
                    raise self.fault(f"{doing} between the elements of {region.name}")
                yield region, offsets // region.itemsize
                rest = rest[~here]
        if rest.size:
            distance = {r.name: (int(rest[0]) - r.begin) // r.itemsize for r in self.regions}
            raise self.fault(
                f"{doing} at {rest.size} addresses outside all tensors; the first, in elements: {distance}"
            )

    def strangers(self, touched: np.ndarray) -> np.ndarray:
        """Which of these programs are others than the one that runs."""
        return (touched != NOBODY) & (touched != self.number)

    def read(self, addresses: np.ndarray) -> None:
        """Note a load."""
        for region, places in self.places(addresses, "reads"):
            if region.tracked:
                if self.strangers(region.writer[places]).any():
                    raise self.fault(f"reads what another program wrote in {region.name}")
                region.reader[places] = np.where(self.strangers(region.reader[places]), MANY, self.number)

    def write(self, addresses: np.ndarray) -> None:
        """Note a store."""
        for region, places in self.places(addresses, "writes"):
            if not region.tracked:
                continue
            if np.unique(places).size != places.size:
                raise self.fault(f"writes an element of {region.name} twice in one store")
            if self.strangers(region.writer[places]).any():
                raise self.fault(f"writes what another program wrote in {region.name}")
            if self.strangers(region.reader[places]).any():
                raise self.fault(f"writes what another program read in {region.name}")
            region.writer[places] = self.number


_launch: Launch | None = None
_launches: list[Launch] = []
_chosen: tuple[int, ...] = ()
_call = GridExecutor.__call__
_set_grid_dim, _set_grid_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
_masked_load, _masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_cast, _binary, _unary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
_product = InterpreterBuilder.create_dot
_dtype_of_scalar = cache(interpreter._get_np_dtype)


def install() -> None:
    """Make the interpreter strict in this process."""
    changed = {
        "set_grid_dim": _grid, "set_grid_idx": _begin, "create_masked_load": _load, "create_masked_store": _store,
        "create_dot": _dot, "cast_impl": _converted, "create_fp_to_fp": lambda self, x, dtype, _: _converted(self, x, dtype),
        "binary_op": _computed, "unary_op": _unary_in_float32,
    }  # fmt: skip
    for name, method in changed.items():
        setattr(InterpreterBuilder, name, method)
    GridExecutor.__call__ = _run
    interpreter._get_np_dtype = _dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


@contextmanager
def only(*programs: int) -> Iterator[list[Launch]]:
    """Run only these programs of each axis of a grid, negative ones from its end; gives the launches."""
    global _chosen
    _chosen = programs
    _launches.clear()
    try:
        yield _launches
    finally:
        _chosen = ()


# Memory ---------------------------------------------------------------------------------------------------------------


def _run(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    global _launch
    named = dict(zip(self.arg_names, args, strict=False)) | kwargs
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    _launch = Launch(self.fn.__name__, tensors, (*self.grid, 1, 1)[:3])
    if max(_launch.grid[1:]) > MOST_PROGRAMS:
        raise _launch.fault(f"its grid {_launch.grid} has more than {MOST_PROGRAMS:,} programs behind the first dimension")
    if _chosen:
        _launches.append(_launch)
    self.grid = tuple(map(len, _launch.axes))
    try:
        _call(self, *args, **kwargs)
    finally:
        _launch = None


def _grid(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
    assert _launch is not None
    _set_grid_dim(self, *_launch.grid)


def _begin(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
    assert _launch is not None
    _launch.program = tuple(axis[place] for axis, place in zip(_launch.axes, (x, y, z), strict=True))
    _launch.number += 1
    _set_grid_idx(self, *_launch.program)


def _load(
    self: InterpreterBuilder, addresses: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any
) -> TensorHandle:
    assert _launch is not None
    _launch.read(np.broadcast_to(addresses.data, mask.data.shape)[mask.data])
    result = _masked_load(self, addresses, mask, other, *options)
    if other is None and not mask.data.all():
        data = result.data
        poison = np.nan if data.dtype.kind == "f" else np.iinfo(data.dtype).max  # of bfloat16 a NaN too
        result = TensorHandle(np.where(mask.data, data, np.asarray(poison, data.dtype)), result.dtype)
    return result


def _store(
    self: InterpreterBuilder, addresses: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any
) -> None:
    assert _launch is not None
    _launch.write(np.broadcast_to(addresses.data, mask.data.shape)[mask.data])
    _masked_store(self, addresses, value, mask, *options)


# Numbers --------------------------------------------------------------------------------------------------------------


def _dtype(dtype: Any) -> np.dtype[Any]:
    """What of NumPy holds a type of Triton, which makes a table of all of them at every call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _dtype_of_scalar(scalar)


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as its bits (uint16), in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """float32 as the bits of the nearest bfloat16, of two the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def truncated(x: np.ndarray) -> np.ndarray:
    """float32 without the 13 digits that a tensor core drops of a TF32 operand."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _converted(self: InterpreterBuilder, x: TensorHandle, dtype: Any) -> TensorHandle:
    source, target = x.dtype.scalar, dtype.scalar
    if tl.bfloat16 not in (source, target) or source == target:
        return _cast(self, x, dtype)
    wide = TensorHandle(widened(x.data), tl.float32) if source == tl.bfloat16 else _cast(self, x, tl.float32)
    return TensorHandle(narrowed(wide.data), target) if target == tl.bfloat16 else _cast(self, wide, dtype)


def _computed(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, op: Any) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        found = _binary(self, x, y, op)
        if op in OVERFLOWING and found.data.dtype.kind in "iu" and found.data.itemsize < 8:
            assert _launch is not None
            if (op(x.data.astype(np.int64), y.data.astype(np.int64)) != found.data).any():
                raise _launch.fault(f"{op.__name__} of {x.dtype.scalar} overflows")
        return found
    result = op(widened(x.data), widened(y.data))
    # The interpreter gives a comparison the dtype of what is compared.
    return TensorHandle(result if result.dtype == bool else narrowed(result), tl.bfloat16)


def _unary_in_float32(self: InterpreterBuilder, x: TensorHandle, op: Any) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return _unary(self, x, op)
    return TensorHandle(narrowed(op(widened(x.data))), tl.bfloat16)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, *options: Any
) -> TensorHandle:
    assert _launch is not None
    if min(*a.data.shape, *b.data.shape) < 16:
        raise _launch.fault(f"multiplies {a.data.shape} by {b.data.shape}, and no side may be below 16")
    if a.dtype.scalar == tl.bfloat16:
        a, b = (TensorHandle(widened(x.data), tl.float32) for x in (a, b))
    elif precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        a, b = (TensorHandle(truncated(x.data), tl.float32) for x in (a, b))
    return _product(self, a, b, acc, precision, *options)
