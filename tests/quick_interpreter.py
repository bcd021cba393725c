"""Triton's interpreter made quick: most of its time goes into describing types and shapes, the same few again and again.

Each operation makes tensors, each tensor a type and a shape of constants with types of their own, and operands are compared
side by side. :func:`install` has each type of blocks described once, by Triton's own code, for this process, and the language
turned to the interpreter once, not at every call of a device function. What is computed stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_block_type, _tensor, _equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
_known: dict[tuple[object, ...], dict[str, Any]] = {}
"""The attributes of each type of blocks, and as ``described`` those of every tensor of it."""


def install() -> None:
    """Make the interpreter quick in this process."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    core.block_type.__init__ = _block_type_once
    core.block_type.to_ir = lambda self, builder: self  # what is interpreted has no other types
    core.tensor.__init__ = _tensor_once
    core.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
    TritonSemantic.broadcast_impl_value = _broadcast_unequal


def _block_type_once(self: Any, element_ty: Any, shape: Sequence[Any]) -> None:
    sides = (side.value if isinstance(side, core.constexpr) else side for side in shape)
    key = (element_ty.name, getattr(element_ty, "address_space", None), *sides)
    known = _known.get(key)
    if known is None:
        _block_type(self, element_ty, shape)
        example = object.__new__(core.tensor)
        _tensor(example, None, self)
        self.described = {name: value for name, value in vars(example).items() if name not in ("handle", "type")}
        known = _known[key] = vars(self)
    vars(self).update(known)


def _tensor_once(self: Any, handle: Any, type: Any) -> None:
    described = getattr(type, "described", None)
    if described is None:
        _tensor(self, handle, type)
        return
    vars(self).update(described)
    self.handle, self.type = handle, type


def _broadcast_unequal(self: TritonSemantic[Any], one: Any, other: Any) -> tuple[Any, Any]:
    return (one, other) if one.shape is other.shape else _broadcast(self, one, other)
