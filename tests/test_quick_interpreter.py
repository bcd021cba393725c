"""The quick interpreter describes types and tensors as Triton does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="its interpreter is made quick")
import triton.language as tl
from triton.language import core

import quick_interpreter
from lrp_fast.kernels.common import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="nothing is interpreted here")

TYPES = (tl.float32, tl.bfloat16, tl.int1, tl.int64, tl.pointer_type(tl.float32), tl.pointer_type(tl.float32, const=True))

SHAPES = ([16], [1, 4], [2, 1, 8], [core.constexpr(2), core.constexpr(64)], tl.tuple([32, 4]))


def made(make: Any, of: type, *arguments: Any) -> dict[str, Any]:
    """The attributes that a constructor gives."""
    bare = object.__new__(of)
    make(bare, *arguments)
    return {name: value for name, value in vars(bare).items() if name != "described"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scalar", TYPES, ids=str)
def test_types_and_tensors_are_as_triton_makes_them(scalar: tl.dtype, shape: Any) -> None:
    for _ in range(2):  # the second is known
        kind = tl.block_type(scalar, shape)
        expected = made(quick_interpreter._block_type, core.block_type, scalar, shape)
        assert made(core.block_type.__init__, core.block_type, scalar, shape) == expected
        assert (kind.name, kind.numel, kind.is_block()) == (expected["name"], expected["numel"], True)
        assert kind.element_ty == kind.scalar == scalar
        for of in (kind, scalar):
            handle = object()
            tensor = tl.tensor(handle, of)
            assert made(core.tensor.__init__, core.tensor, handle, of) == made(quick_interpreter._tensor, core.tensor, handle, of)
            assert (tensor.handle, tensor.type, tensor.dtype) == (handle, of, scalar)


def test_types_that_differ_stay_apart() -> None:
    kinds = [tl.block_type(scalar, shape) for scalar in TYPES for shape in ([2, 4], [4, 2], [8])]
    for place, one in enumerate(kinds):
        assert [one == other for other in kinds] == [place == other for other in range(len(kinds))]


@pytest.mark.parametrize(("shape", "error"), [([3], ValueError), ([2, 12], ValueError), ([], TypeError), ([1 << 21], ValueError)])
def test_what_triton_refuses_is_refused_each_time(shape: list[int], error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error):
            tl.block_type(tl.float32, shape)
