"""Who is served: for each unit its passes, or the reason why the torch backend runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import torch

from lrp_fast.backends.passes import Passes
from lrp_fast.backends.torch import (
    AverageMap,
    BlockMap,
    LinearOperation,
    MergeOperation,
    ProportionalPool,
    Term,
    WinnerPool,
)
from lrp_fast.backends.triton.choice import Choice, Choices, Direction, Task
from lrp_fast.backends.triton.linear import (
    FusedLinear,
    PartedLinear,
    SettledLinear,
    epilogue_of,
    is_pointwise,
    stabilizer_form,
)
from lrp_fast.backends.triton.merges import FusedMerge, may_divide, merge_epilogue
from lrp_fast.backends.triton.passes import TritonPasses
from lrp_fast.backends.triton.pools import FusedPool, FusedWinnerPool
from lrp_fast.kernels import pointwise_conv
from lrp_fast.kernels.common import SPLITS, Arrival, Denominators, End, interpreted
from lrp_fast.layers import AveragePool, Convolution, MaxPool, Shape
from lrp_fast.plan import Unit, readers_of
from lrp_fast.rules import FIXED_PARTS, NEGATIVE, POSITIVE, WHOLE, ZeroGuard
from lrp_fast.splits import is_known

Served = Passes | str
"""A unit's passes, or why there are none."""

Recipe = tuple[tuple[float, Term], ...]
LIBRARY = Choice("library")
ROUNDED = "the parts of its output would be rounded to bfloat16 before they are summed"


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where no kernel can run, saying what would help."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the triton backend computes in float32 or bfloat16, got {dtype}; use backend='torch'")
    if interpreted():
        if device.type != "cpu":
            raise ValueError(f"TRITON_INTERPRET=1 runs kernels on the CPU only, got {device}; unset it")
        if dtype == torch.bfloat16 and not multiplies_bfloat16():
            raise ValueError(
                "Triton's interpreter (TRITON_INTERPRET=1) takes the bits of bfloat16 for whole numbers; got "
                "dtype=torch.bfloat16, use float32 or backend='torch'"
            )
        return
    if device.type != "cuda":
        raise ValueError(
            f"the triton backend needs a CUDA device, got {device}; use backend='torch' "
            "(or set TRITON_INTERPRET=1 before Python starts, to run the kernels slowly on the CPU)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"the triton backend needs compute capability 8.0 or newer, got {capability}; use backend='torch'"
        )


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether kernels that are interpreted multiply bfloat16 right."""
    ones = torch.ones(1, 4, 4, 16, dtype=torch.bfloat16)
    (sums,) = pointwise_conv.backward(ones, torch.ones(16, 16, dtype=torch.bfloat16), Arrival((End(),)))
    return bool((sums == 16).all())


def serve(
    units: Sequence[Unit], operations: Sequence[object], shapes: Sequence[Shape], dtype: torch.dtype, precision: str,
    choices: Choices,
) -> list[Served]:  # fmt: skip
    """For each unit its passes or a reason. ``operations``, ``shapes``: of every step; ``precision``: "ieee" or "tf32"."""
    served: list[Served] = []
    readers = readers_of(units)
    for place, unit in enumerate(units):
        operation = operations[unit.step]
        inputs = [shapes[units[source].output] for source in unit.inputs]
        shape = shapes[unit.output][1:]
        if isinstance(operation, LinearOperation):
            (source,) = unit.inputs
            receiver = receiver_of(place, served[source], readers[source])
            settled = settled_with(None if receiver is None else receiver.epilogue, readers[source])
            served.append(_serve_linear(unit, operation, inputs[0], shape, precision, settled, choices))
        elif isinstance(operation, MergeOperation):
            divides = partial(_divides, units, operations, shapes, place, readers[place], precision, choices)
            found = _serve_merge(unit, operation, units, served, shape, inputs[0][0], choices, divides)
            if isinstance(found, str):
                for source in unit.inputs:
                    if units[source].numerator == "weight":
                        served[source] = f"its merge runs in torch: {found}"
            served.append(found)
        elif isinstance(operation, ProportionalPool):
            served.append(_serve_pool(operation, inputs[0][1:], shape))
        elif isinstance(operation, WinnerPool):
            served.append(_serve_winner(operation, dtype, inputs[0][1:], shape))
        else:
            served.append("it only moves elements")
    return served


# Linear layers ----------------------------------------------------------------------------------------------------------


def _serve_linear(
    unit: Unit, operation: LinearOperation, x_shape: Shape, shape: Shape, precision: str, settled: str, choices: Choices
) -> Served:
    layer = operation.layer
    if not isinstance(layer, Convolution):
        return "a linear layer is too small to gain"
    if len(layer.stride) != 2:
        return "not a two-dimensional convolution"
    if any(layer.extra):
        return "its input is padded further at one end"
    if operation.live is not None:
        return "its zero-guard leaves out padding"
    denominators = denominators_of(operation)
    if isinstance(denominators, str) and unit.numerator == "weight":
        return denominators
    over_value = unit.numerator == "value"
    if isinstance(denominators, str):
        if len(operation.rule.groups) + (operation.guard is not None) > 2:
            return denominators
        kind = PartedLinear if has_parts(operation) else SettledLinear
        return kind(operation, unit.relu, over_value, x_shape[1:], shape)
    task = task_of(operation, denominators, x_shape, shape, precision)
    onward, back = choices.of(task("forward", epilogue_of(denominators))), choices.of(task("backward", settled))
    wide = has_wide_groups(layer, x_shape[1], shape[0])
    if not wide:
        onward, back = LIBRARY, LIBRARY
    if rounds_parts(operation, denominators):
        if not wide:
            return ROUNDED
        onward = _fused(onward)
    merges = unit.numerator == "weight"
    return FusedLinear(
        operation, denominators, unit.relu, over_value, x_shape[1:], shape, precision, None if merges else onward, back
    )


def _fused(choice: Choice) -> Choice:
    """A choice that is not the library's."""
    return choice if choice.way == "fused" else Choice("fused")


def has_parts(operation: LinearOperation) -> bool:
    """Whether a rule's denominators are sums over parts of the input, and what is the same for every image of one."""
    fixed = any(term.input in FIXED_PARTS for terms in operation.groups for term, _ in terms)
    plain = operation.guard is None and not operation.masked and not operation.grouped
    return plain and not (fixed and len(operation.groups) > 1)


def rounds_parts(operation: LinearOperation, denominators: Denominators) -> bool:
    """Whether a library's convolution would round the two products that a denominator is the difference of."""
    return denominators.kind == "signs" and operation.dtype == torch.bfloat16


def task_of(
    operation: LinearOperation, denominators: Denominators, x_shape: Shape, shape: Shape, precision: str
) -> Callable[[Direction, str], Task]:
    """The task of each direction of a layer, with an epilogue."""
    layer = operation.layer
    assert isinstance(layer, Convolution)
    size = (*operation.weight_shape[2:], *layer.stride, *layer.padding, *layer.dilation)
    kernel: Literal["pointwise", "spatial"] = "pointwise" if is_pointwise(layer, operation) else "spatial"
    dtype = str(operation.dtype).removeprefix("torch.")

    def task(direction: Direction, epilogue: str) -> Task:
        stacks = denominators.groups if direction == "backward" else denominators.stacks
        return Task(
            kernel, direction, x_shape[0], tuple(x_shape[1:]), tuple(shape), size, layer.groups, stacks, dtype, precision,
            epilogue,
        )  # fmt: skip

    return task


def receiver_of(place: int, source: object, readers: Sequence[int]) -> TritonPasses | None:
    """What a unit's message goes to, the passes ``source`` with those readers, if it is settled in the kernel that sends it."""
    return source if isinstance(source, TritonPasses) and readers[0] == place else None


def settled_with(epilogue: str | None, readers: Sequence[int]) -> str:
    """What the kernel that sends a message does behind its product, its receiver's epilogue; empty if nothing."""
    if epilogue is None:
        return ""
    return epilogue + ("+more" if len(readers) > 1 else "")


def has_wide_groups(layer: Convolution, inputs: int, outputs: int) -> bool:
    """Groups wide enough for a kernel's tile."""
    return layer.groups == 1 or min(inputs, outputs) // layer.groups >= 16


def denominators_of(operation: LinearOperation) -> Denominators | str:
    """How a layer's stacked output becomes denominators, or why the kernels cannot form them."""
    if set(operation.stacks) != {"x"} or operation.inputs != ["x"]:
        parts = ", ".join(dict.fromkeys([*operation.stacks, *operation.inputs]))
        return f"its rule looks at parts of the input ({parts})"
    evaluated = [term for terms, _, _ in operation.stacks["x"] for term in terms]
    if any(len(terms) != 1 or terms[0][1] != 1.0 for terms in operation.groups):
        return "its rule sums several products"
    if operation.masked and operation.output != operation.own:
        return "its rule's mask looks at another output than its own"
    recipes = [operation.recipes[term] for term in (operation.own, *(terms[0][0] for terms in operation.groups))]
    guard = isinstance(operation.rule.stabilizer, ZeroGuard)
    if guard and isinstance(operation.layer, Convolution) and operation.layer.groups > 1:
        return "a zero-guard over groups of channels"
    stabilizer = operation.rule.stabilizer
    epsilon = 0.0 if isinstance(stabilizer, ZeroGuard) else stabilizer.epsilon
    form = stabilizer_form(operation)
    weights = [term.weight for term in evaluated]
    plain = all(recipe == ((1.0, term),) for recipe, term in zip(recipes, evaluated, strict=False))
    if len(evaluated) == 1 and len(recipes) == 2:
        return Denominators("own", epsilon, form)
    if len(evaluated) == len(recipes) == 2 and plain:
        return Denominators("stacked", epsilon, form)
    if weights == [WHOLE, POSITIVE, NEGATIVE] and len(recipes) == 3 and plain:
        own, *halves = evaluated
        biases = (POSITIVE, NEGATIVE) if own.bias is not None else (None, None)
        if [(term.own, term.bias) for term in halves] != [(own.own, bias) for bias in biases]:
            return "its denominators do not add up to its output"
        return Denominators("signs", epsilon, form)
    if weights == [WHOLE, POSITIVE] and len(recipes) == 3 and operation.masked:
        gamma = recipes[1][-1][0]
        factors = [factor for recipe in recipes for factor, _ in recipe]
        if len(factors) == 5 and all(map(math.isclose, factors, (1.0, 1.0, gamma, 1.0 + gamma, -gamma))):
            return Denominators("gamma", epsilon, form, gamma)
    return f"its rule takes {len(evaluated)} stacked weights in a way no kernel does"


# Merges and pools -------------------------------------------------------------------------------------------------------


def _serve_merge(
    unit: Unit, operation: MergeOperation, units: Sequence[Unit], served: Sequence[Served], shape: Shape, batch: int,
    choices: Choices, divides: Callable[[str], bool],
) -> Served:  # fmt: skip
    """``divides``: whether the kernel that settles what arrives at the merge, with that epilogue, multiplies a divisor."""
    if operation.split.name not in SPLITS or not is_known(operation.split):
        return f"no kernel knows the split {operation.split.name!r}"
    if any(zeros is not None for zeros in operation.zeros):
        return "a branch is constant in places"
    if unit.inputs[0] == unit.inputs[1]:
        return "both branches are the same"
    branches = []
    for place in unit.inputs:
        passes = served[place]
        linear = units[place].numerator == "weight"
        if linear and not isinstance(passes, FusedLinear):
            return f"a branch ends in a layer without a kernel ({passes})"
        branches.append(passes if linear and isinstance(passes, FusedLinear) else None)
    linears = [branch for branch in branches if branch is not None]
    if operation.split.name == "signed" and any(branch.guard is not None for branch in linears):
        return "a zero-guard under a split whose weights may be negative"
    if not linears:
        return "no branch ends in a linear layer read by the merge alone"
    if len({branch.denominators for branch in linears}) > 1:
        return "its branches end in different rules"
    if any(branch.layer.groups > 1 and branch.denominators.stacks > 1 for branch in linears):
        return "a branch ends in a grouped convolution"
    last, vanishes, split = linears[-1], unit.vanishes and unit.keep, operation.split.name
    divided = may_divide(branches, split, vanishes) and divides(merge_epilogue(last, split, divides=True))
    choice = choices.of(merge_task(linears, batch, split, divided))
    if not has_wide_groups(last.layer, last.x_shape[0], last.shape[0]):
        choice = LIBRARY
    if any(rounds_parts(branch.operation, branch.denominators) for branch in linears):
        if len(linears) > 1 and not all(branch.pointwise for branch in linears):
            return ROUNDED
        choice = _fused(choice)
    return FusedMerge(operation, unit.relu, branches, shape, choice, vanishes, divided)


def _divides(
    units: Sequence[Unit], operations: Sequence[object], shapes: Sequence[Shape], place: int, readers: Sequence[int],
    precision: str, choices: Choices, epilogue: str,
) -> bool:  # fmt: skip
    """Whether what arrives at the merge at ``place`` is settled behind a product, in the kernel of a 1×1 convolution."""
    if not readers:
        return False
    sender = units[readers[0]]
    operation = operations[sender.step]
    if not isinstance(operation, LinearOperation) or not isinstance(operation.layer, Convolution):
        return False
    denominators, pointwise = denominators_of(operation), is_pointwise(operation.layer, operation)
    if isinstance(denominators, str) or not pointwise or operation.layer.stride != (1, 1):
        return False
    task = task_of(operation, denominators, shapes[units[place].output], shapes[sender.output][1:], precision)
    settled = settled_with(epilogue, readers)
    return choices.of(task("backward", settled)).way == "fused" and choices.of(task("gates", settled)).way == "divided"


def merge_task(linears: Sequence[FusedLinear], batch: int, split: str, divides: bool) -> Task:
    """The task of a merge's forward pass; ``linears``: the last layers of its branches that are such."""
    *others, last = linears
    task = task_of(last.operation, last.denominators, (batch, *last.x_shape), last.shape, last.precision)
    beside = tuple((*branch.x_shape, *branch.weights.forward.shape[1:]) for branch in others)
    return replace(task("merge", merge_epilogue(last, split, divides)), beside=beside)


def _serve_pool(operation: ProportionalPool, x_shape: Shape, shape: Shape) -> Served:
    layer, relevance_map = operation.layer, operation.map
    if operation.clamps:
        return "a pool over inputs of both signs"
    if operation.live is not None:
        return "its zero-guard leaves out padding"
    if len(x_shape) != 3:
        return "not a two-dimensional pool"
    if isinstance(layer, MaxPool) and isinstance(relevance_map, BlockMap):
        if relevance_map.windows is not None:
            return "a block of its is empty"
        return FusedPool(operation, layer.stride, x_shape, shape)
    if isinstance(layer, AveragePool) and layer.kernel == layer.stride and not any(layer.padding):
        fits = layer.divisor is None
        return FusedPool(operation, layer.stride, x_shape, shape) if fits else "a pool with a divisor of its own"
    if isinstance(relevance_map, AverageMap) and all(tile is not None for tile in relevance_map.tiles):
        return FusedPool(operation, tuple(tile or 1 for tile in relevance_map.tiles), x_shape, shape)
    return "a pool whose windows do not tile its input"


def _serve_winner(operation: WinnerPool, dtype: torch.dtype, x_shape: Shape, shape: Shape) -> Served:
    layer = operation.layer
    if not isinstance(layer, MaxPool) or len(layer.kernel) != 2 or layer.kernel[0] * layer.kernel[1] > 255:
        return "not a two-dimensional max-pool with windows of up to 255 elements"
    return FusedWinnerPool(operation, dtype, x_shape, shape)
