"""What an explanation moves and computes, pass by pass, recorded from the very operations it runs without running them.

Each pass takes ``max(bytes / bandwidth, FLOPs / rate)``, each tensor it touches being moved once: **a prediction**, with
measured :class:`Rates`. Real passes reach less of either; what stays in a cache costs less than its bytes say.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrp_fast.backends.passes import Passes
from lrp_fast.backends.triton import Choices, serve
from lrp_fast.composites import Composite
from lrp_fast.engine import Operation, Program, bind_linears
from lrp_fast.kernels.common import Denominators
from lrp_fast.layers import Shape
from lrp_fast.plan import Unit
from lrp_fast.trace import trace
from lrp_fast.watch import parameter_table

KERNELS = {
    "gate": "gate.gate", "image_maximum": "gate.image_maximum", "merge": "merge.merge", "arrive": "merge.arrive",
    "pointwise_maximum": "pointwise_conv.image_maximum",
    "pointwise_gated": "pointwise_conv.gated", "pointwise_merged": "pointwise_conv.merged",
    "pointwise_backward": "pointwise_conv.backward", "spatial_gated": "spatial_conv.gated",
    "spatial_merged": "spatial_conv.merged", "spatial_backward": "spatial_conv.backward",
    "stem_heatmap": "spatial_conv.stem_heatmap", "max_pool": "pool.max_pool_gated",
    "max_pool_average": "pool.max_pool_average", "winner_pool": "pool.winner_pool",
    "winner_backward": "pool.winner_backward", "block_backward": "pool.block_backward", "spread": "pool.spread",
    "channel_sum": "heatmap.channel_sum", "quantize": "heatmap.quantize",
}  # fmt: skip
"""The launcher behind each custom operator."""
DIVISOR = -2
"""Where an operator that settles an arrival has the weight of its divisor."""


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second: bytes moved, FLOPs by bytes of an element, and warps' instructions issued at most."""

    bandwidth: float
    flops: Mapping[int, float]
    issue: float = 132 * 4 * 1.755e9
    """Processors · schedulers · clock, of which each issues one instruction a cycle: a bound that no kernel passes."""


# Of bytes and bf16 as measured (H100: by the design; H200: a copy of 8.6 GB, a product of 8192³); float32 outside tensor cores
# is an assumption.
H100 = Rates(3.0e12, {2: 800e12, 4: 50e12})
H200 = Rates(4.3e12, {2: 790e12, 4: 50e12})


@dataclass(frozen=True)
class Pass:
    """One operation: a kernel (``file.launcher``), a library convolution or another operation of torch.

    ``shapes``: of the tensors read and written; ``written``: bytes of the latter; ``itemsize``: of what products multiply.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    flops: int
    written: int
    itemsize: int

    def seconds(self, rates: Rates) -> float:
        """Predicted."""
        return predicted(self.bytes, self.flops, rates, self.itemsize)


@dataclass(frozen=True)
class Recorded:
    """An explanation's ``passes`` in order, and the bytes it holds at most (``peak``) beyond the model and the images.

    What libraries and kernels take for themselves while they run is not seen.
    """

    passes: list[Pass]
    peak: int


def predicted(bytes_moved: int, flops: int, rates: Rates, itemsize: int = 2) -> float:
    """Seconds of a pass."""
    return max(bytes_moved / rates.bandwidth, flops / rates.flops[itemsize] if flops else 0.0)


def recorded(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, composite: str = "otsuki2024",
    defaults: dict[str, Any] | None = None,
) -> Recorded:  # fmt: skip
    """An explanation with heatmaps out. ``defaults``: those of :class:`Choices`, by default its own."""
    plan, chosen = trace(model), Composite.named(composite)
    assignments, parameters = chosen.assign(plan), parameter_table(model, plan)
    linears = bind_linears(plan, assignments, chosen.batch_norm == "fold", parameters, dtype)
    choices = Choices() if defaults is None else Choices(defaults=defaults)

    def served(
        units: Sequence[Unit], operations: Sequence[Operation], shapes: Sequence[Shape]
    ) -> Sequence[Passes | str]:
        return serve(units, operations, shapes, dtype, "ieee", choices)

    shapes, like = plan.shapes(tuple(shape), parameters), torch.empty(0, dtype=dtype)
    program = Program(plan, assignments, linears, shapes, like, heatmap=True, serve=served)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(tuple(shape), dtype=dtype)
        program.forward(images)  # what does not depend on the images is computed once
        with Recorder() as recorder:
            logits, tape = program.forward(images)
            program.backward(tape, logits.softmax(1))
    return Recorded(recorder.passes, recorder.peak)


class Recorder(TorchDispatchMode):
    """Keeps every operation that moves anything, and how much memory those before it hold at most."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self.held: dict[int, int] = {}
        self.peak = 0

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage._cdata)
            self.peak = max(self.peak, sum(self.held.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in distinct(result):
            self._hold(tensor)
        aliased = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
        read, written = distinct((args, kwargs)), distinct(result)
        if aliased and aliased[0].is_write:
            read, written = read[1:], read[:1]
        elif aliased:
            return result  # a view
        if read and written:
            self.passes.append(_pass(func.name().split(".")[0], args, read, written))
        return result


def distinct(tree: object) -> list[Tensor]:
    """The tensors in a tree of arguments, each once."""
    found = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return list(found.values())


def size(x: Tensor) -> int:
    """Bytes behind a tensor; an expanded one has fewer than it shows."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _pass(operator: str, args: tuple[Any, ...], read: list[Tensor], written: list[Tensor]) -> Pass:
    name, own = operator.replace("aten::", "torch: "), operator.split("::")[-1]
    moved = sum(map(size, read)) + sum(map(size, written))
    if operator.startswith("lrp_fast::"):
        name = KERNELS[own]
        values = json.loads(args[1])
        if own.endswith("_maximum"):  # of the second stack, where there is one
            stack = read[own == "pointwise_maximum"]
            moved -= size(stack) - size(stack) // _stacks(values)
        if own in ("pointwise_maximum", "pointwise_gated", "pointwise_merged"):  # which read only what they use
            moved += size(read[0]) // values["stride"] ** 2 - size(read[0])
        if own == "pointwise_merged":
            other = size(args[0][3])
            moved += other // values["other_stride"] ** 2 - other
    elif own == "convolution":
        name = "library convolution, transposed" if args[6] else "library convolution"
    if "conv" in name:
        _check_dtypes(name, read[:2])
    shapes = tuple(tuple(x.shape) for x in (*read, *written))
    return Pass(name, shapes, moved, _flops(own, args, read, written), sum(map(size, written)), read[0].element_size())


def _check_dtypes(name: str, operands: Sequence[Tensor]) -> None:
    if name != KERNELS["stem_heatmap"] and len({x.dtype for x in operands}) > 1:
        got = " and ".join(str(x.dtype) for x in operands)
        raise ValueError(f"{name} would get {got} to multiply, and takes one dtype only")


def _stacks(values: dict[str, Any]) -> int:
    return Denominators(**values["denominators"]).stacks


def _flops(operator: str, args: tuple[Any, ...], read: list[Tensor], written: list[Tensor]) -> int:
    """Of the matrix products, multiply-adds times two."""
    if operator == "convolution":
        rows = args[0] if args[6] else written[0]  # a weight element is used once for each pixel of these
        return 2 * rows.shape[0] * math.prod(rows.shape[2:]) * args[1].numel()
    if operator in ("mm", "addmm"):
        first, second = args[-2:]
        return 2 * first.shape[0] * second.numel()
    if operator == "pointwise_maximum":
        values = json.loads(args[1])
        images, height, width, _ = read[0].shape
        pixels = math.prod(-(-length // values["stride"]) for length in (height, width))
        return 2 * images * pixels * read[1].numel() // _stacks(values)
    if operator.startswith(("pointwise", "spatial")):
        rows = written[0] if operator.endswith(("gated", "merged")) else read[0]
        others = {"pointwise_backward": (3, DIVISOR), "pointwise_merged": (5,)}
        weights = [args[0][place] for place in (1, *others.get(operator, ()))]
        return 2 * rows.shape[:3].numel() * sum(weight.numel() for weight in weights if weight is not None)
    if operator == "stem_heatmap":
        return 2 * read[0].shape[:3].numel() * read[1].numel()
    return 0
