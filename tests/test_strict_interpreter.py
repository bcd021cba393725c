"""What the strict interpreter refuses, each by a small kernel that does it, and that its numbers are a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

import strict_interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="on a GPU kernels are not interpreted")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, shift, step, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(x_ptr + places + shift, mask=places < size, other=0.0), mask=places < size)


@triton.jit
def _repeat_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places // 2, tl.load(x_ptr + places))


@triton.jit
def _no_other_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(x_ptr + places, mask=places < size))


@triton.jit
def _far_index_kernel(x_ptr, out_ptr, factor):
    place = tl.program_id(0) * factor
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr + place))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    tl.store(out_ptr + places, tl.where(x < y, x * y + x, tl.abs(-x) - y))


@triton.jit
def _convert_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places, tl.load(x_ptr + places))


@triton.jit
def _product_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, SIZE), tl.arange(0, INNER)
    x = tl.load(x_ptr + rows[:, None] * INNER + inner[None, :])
    y = tl.load(y_ptr + inner[:, None] * SIZE + rows[None, :])
    tl.store(out_ptr + rows[:, None] * SIZE + rows[None, :], tl.dot(x, y, input_precision=PRECISION))


def fault(what: str, call: Callable[[], object]) -> None:
    with pytest.raises(InterpreterError, match=what):
        call()


def test_reads_and_writes_stay_inside_their_tensors() -> None:
    storage = torch.randn(100)
    x, out = storage[10:42], torch.empty(32)
    _copy_kernel[(2,)](x, out, 0, 16, 32, BLOCK=16)
    assert torch.equal(out, x)
    fault("_copy_kernel, program .1, 0, 0.: reads at 1 addresses outside all tensors; the first, in elements: .*'x_ptr': 32",
          lambda: _copy_kernel[(2,)](x, out, 1, 16, 32, BLOCK=16))  # fmt: skip
    fault("reads at 1 addresses .*'x_ptr': -1", lambda: _copy_kernel[(2,)](x, out, -1, 16, 32, BLOCK=16))
    fault("writes at 16 addresses .*'out_ptr': 16", lambda: _copy_kernel[(2,)](x, out[:16], 0, 16, 32, BLOCK=16))


def test_programs_do_not_meet() -> None:
    x, out = torch.randn(48), torch.empty(32)
    fault("writes what another program wrote in out_ptr", lambda: _copy_kernel[(2,)](x, out, 0, 8, 32, BLOCK=16))
    fault("reads what another program wrote in x_ptr", lambda: _copy_kernel[(2,)](x, x[16:], 0, 16, 32, BLOCK=16))
    fault("writes what another program read in x_ptr", lambda: _copy_kernel[(2,)](x, x, 16, 16, 32, BLOCK=16))
    fault("writes an element of out_ptr twice in one store", lambda: _repeat_kernel[(1,)](x, out, SIZE=32))


def test_what_a_mask_leaves_out_is_nothing_to_rely_on() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.zeros(16, dtype=dtype)
        _no_other_kernel[(1,)](torch.ones(16, dtype=dtype), out, 5, BLOCK=16)
        assert out.isnan().tolist() == [False] * 5 + [True] * 11
    numbers = torch.zeros(16, dtype=torch.int32)
    _no_other_kernel[(1,)](numbers, numbers.clone(), 16, BLOCK=16)
    _no_other_kernel[(1,)](torch.ones_like(numbers), numbers, 5, BLOCK=16)
    assert numbers.tolist() == [1] * 5 + [2**31 - 1] * 11


def test_whole_numbers_do_not_overflow() -> None:
    x, out = torch.empty(2**31 + 8, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)
    with strict_interpreter.only(0, 1) as launches:
        _far_index_kernel[(3,)](x, out, 2**30)
    assert [launch.axes for launch in launches] == [[[0, 1], [0], [0]]]
    with strict_interpreter.only(-1):
        fault("program .2, 0, 0.: multiply of int32 overflows", lambda: _far_index_kernel[(3,)](x, out, 2**30))
    for dtype in (torch.int8, torch.int32):
        half = torch.iinfo(dtype).max // 2
        x, y, out = (torch.full((4,), value, dtype=dtype) for value in (half, 1, 0))
        _arithmetic_kernel[(1,)](x, y, out, SIZE=4)
        assert out.tolist() == [half - 1] * 4
        # Of both sides of a choice: x + x is not stored.
        fault(
            f"add of int{8 * dtype.itemsize} overflows",
            lambda x=x + 1, y=y, out=out: _arithmetic_kernel[(1,)](x, y, out, SIZE=4),
        )


def test_narrow_products_are_refused() -> None:
    x = torch.randn(16, 16)
    _product_kernel[(1,)](x, x, torch.empty_like(x), SIZE=16, INNER=16, PRECISION="ieee")
    fault(r"multiplies \(16, 8\) by \(8, 16\), and no side may be below 16",
          lambda: _product_kernel[(1,)](x, x, torch.empty_like(x), SIZE=16, INNER=8, PRECISION="ieee"))  # fmt: skip


def equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinities
def test_bfloat16_is_torchs() -> None:
    x, y = torch.randn(2, 256).mul(8).bfloat16()
    x[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, 3e38])
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, y, out, SIZE=256)
    equal(out, torch.where(x < y, x * y + x, x.abs() - y))
    wide = torch.randn(256).mul(torch.randn(256).exp())
    wide[:3] = torch.tensor([1.00390625, 1.01171875, 3.4e38])  # two halfway cases, and what becomes infinite
    _convert_kernel[(1,)](wide, out, SIZE=256)
    equal(out, wide.bfloat16())
    for dtype in (torch.float32, torch.float16):
        back = torch.empty(256, dtype=dtype)
        _convert_kernel[(1,)](y, back, SIZE=256)
        equal(back, y.to(dtype))
    wide[0] = torch.nan
    _convert_kernel[(1,)](wide, out, SIZE=256)
    equal(out, wide.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [
        (torch.float32, "ieee", 0.0, 1e-6),
        (torch.float32, "tf32", 1e-4, 2e-3),
        (torch.bfloat16, "ieee", 0.0, 1e-6),
        (torch.float16, "ieee", 0.0, 1e-6),
    ],
)
def test_products_are_those_of_tensor_cores(dtype: Any, precision: str, least: float, most: float) -> None:
    x, y = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    _product_kernel[(1,)](x, y, out, SIZE=32, INNER=32, PRECISION=precision)
    wanted = x.double() @ y.double()
    assert least <= float((out.double() - wanted).norm() / wanted.norm()) <= most
