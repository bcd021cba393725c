"""The engine: a plan under a composite, bound to weights, dtype and shape, as two straight-line functions of tensors.

``forward`` gives the logits and a tape of gates; ``backward`` takes the tape and a start relevance and gives the
relevance of the input. Steps are grouped into units (a linear layer or merge with the ReLU behind it), and for each unit
it is decided once how relevance reaches it (DESIGN §4): as ``acc`` alone, with its own output in the gate's numerator;
from a merge, with the split's weight in the numerator; or whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrp_fast.backends.torch import (
    Gates,
    LinearOperation,
    MergeOperation,
    Message,
    ProportionalPool,
    WinnerPool,
    channels_last,
    move_back,
    times,
    times_plus,
)
from lrp_fast.composites import Assignment
from lrp_fast.layers import AdaptiveMaxPool, Average, Dense, Input, Linear, MaxPool, Merge, Parameters, ReLU, Shape
from lrp_fast.plan import Plan
from lrp_fast.rules import ZeroGuard

Operation = LinearOperation | ProportionalPool | WinnerPool | MergeOperation | None
Numerator = Literal["value", "weight", "one"]


@dataclass(frozen=True)
class Unit:
    """One step, or a linear step or merge together with the ReLU that alone reads it.

    ``numerator``: what the gates of a linear unit are over: its own output (relevance arrives as ``acc``), the weight of
    the merge behind it (the merge's relevance arrives), or one (its own relevance arrives). ``keep``: its output is needed
    again in the backward pass.
    """

    step: int
    output: int
    inputs: tuple[int, ...]
    relu: bool
    numerator: Numerator
    keep: bool


def bind_linears(
    plan: Plan, assignments: Sequence[Assignment], fold: bool, parameters: Parameters, dtype: torch.dtype
) -> dict[int, LinearOperation]:
    """Pack the weights of every linear step for its rule, by step: what does not depend on the input's shape."""
    operations = {}
    for index, (step, assignment) in enumerate(zip(plan.steps, assignments, strict=True)):
        if isinstance(step.layer, Linear):
            assert assignment.rule is not None
            # A head is too small to gain from bf16, and the start probability depends on its logits.
            precise = torch.float32 if dtype == torch.bfloat16 and isinstance(step.layer, Dense) else dtype
            nonnegative = plan.steps[step.inputs[0]].nonnegative
            operations[index] = LinearOperation(
                step.layer, assignment.rule, fold, parameters, nonnegative, precise, step.name
            )
    return operations


Tape = list[tuple[object, Tensor | None]]


class Program:
    """A bound plan. ``shapes`` are those of every step for one input shape; ``observed`` are steps to report.

    With ``heatmap`` the input's relevance may come summed over channels (one channel) where that is cheaper.
    """

    def __init__(
        self, plan: Plan, assignments: Sequence[Assignment], linears: Mapping[int, LinearOperation], shapes: tuple[Shape, ...],
        like: Tensor, observed: frozenset[int] = frozenset(), heatmap: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.shapes, self.dtype = plan, shapes, like.dtype
        self.operations: list[Operation] = []
        for index, assignment in enumerate(assignments):
            self.operations.append(_bind(plan, index, assignment, linears, shapes, like))
        self.layers = [step.layer.resolved(shapes) for step in plan.steps]
        self.units = _units(plan, self.operations, observed)
        self.position = {}
        for place, unit in enumerate(self.units):
            self.position[unit.step] = place
            self.position[unit.output] = place
        self.observed = {step: self.position[step] for step in observed}
        readers = [unit for unit in self.units if 0 in unit.inputs]
        summing = [op for unit in readers if isinstance(op := self.operations[unit.step], LinearOperation)]
        sums = len(summing) == len(readers) and all(operation.sums_channels for operation in summing)
        self.direct_heatmap = heatmap and sums and 0 not in self.observed
        self.last_reader = [0] * len(self.units)
        for place, unit in enumerate(self.units):
            for source in unit.inputs:
                self.last_reader[source] = place

    # Forward.

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """Logits N × classes (float32, or float64) and the tape, from inputs N × …."""
        values: list[Tensor | None] = [None] * len(self.units)
        pending: dict[int, tuple[list[Tensor], Tensor | None]] = {}
        tape: Tape = [(None, None)] * len(self.units)
        for place, unit in enumerate(self.units):
            sources = [values[source] for source in unit.inputs]
            value, saved = self._forward_unit(place, unit, sources, inputs, pending, tape)  # type: ignore[arg-type]
            values[place] = value
            tape[place] = (saved, value if unit.keep else None)
            for source in set(unit.inputs):
                if self.last_reader[source] == place and source != self.position[self.plan.output]:
                    values[source] = None
        logits = values[self.position[self.plan.output]]
        assert logits is not None
        return logits.to(torch.float64 if self.dtype == torch.float64 else torch.float32), tape

    def _forward_unit(
        self, place: int, unit: Unit, sources: list[Tensor], inputs: Tensor,
        pending: dict[int, tuple[list[Tensor], Tensor | None]], tape: Tape,
    ) -> tuple[Tensor, object]:  # fmt: skip
        operation, layer = self.operations[unit.step], self.layers[unit.step]
        if isinstance(operation, LinearOperation):
            value, z, output = operation.forward(sources[0])
            value = value.relu() if unit.relu else value
            if unit.numerator == "weight":
                pending[place] = (z, output)
                return value, None
            return value, operation.gates(z, output, value if unit.numerator == "value" else 1.0)
        if isinstance(operation, MergeOperation):
            value, weights = operation.forward(*sources)
            for source, weight in zip(unit.inputs, weights, strict=True):
                if source in pending:
                    branch = self.operations[self.units[source].step]
                    assert isinstance(branch, LinearOperation)
                    tape[source] = (branch.gates(*pending.pop(source), weight), tape[source][1])
            stored = [weight.to(self.dtype) if isinstance(weight, Tensor) else weight for weight in weights]
            kept = [
                None if self.units[i].numerator == "weight" else w for i, w in zip(unit.inputs, stored, strict=True)
            ]
            return value.relu() if unit.relu else value, kept
        if isinstance(operation, (ProportionalPool, WinnerPool)):
            return operation.forward(sources[0])
        value = channels_last(inputs.to(self.dtype)) if isinstance(layer, Input) else layer.forward(sources, {})
        return value, None

    # Backward.

    def backward(self, tape: Tape, start: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The input's relevance ((maps · N) × …), and that of the observed steps, from the start (maps · N) × classes.

        Consumes the tape, so that memory is freed on the way.
        """
        acc: list[Tensor | None] = [None] * len(self.units)
        dense: list[Tensor | None] = [None] * len(self.units)
        dense[self.position[self.plan.output]] = start
        places = set(self.observed.values())
        arrived: dict[int, Tensor] = {}
        for place in range(len(self.units) - 1, 0, -1):
            saved, value = tape[place]
            tape[place] = (None, None)
            unit = self.units[place]
            if acc[place] is None and dense[place] is None:
                continue
            relevance = self._arriving(unit, acc[place], dense[place], value)
            acc[place] = dense[place] = None
            if place in places:
                arrived[place] = relevance
            for source, (a, d) in zip(unit.inputs, self._messages(unit, relevance, saved, tape), strict=True):
                acc[source] = _plus(acc[source], a)
                dense[source] = _plus(dense[source], d)
        result = _total(acc[0], dense[0], tape[0][1])
        if result is None:
            result = start.new_zeros(start.shape[0], *self.shapes[0][1:])
        arrived[0] = result
        for step, place in self.observed.items():  # a layer and the ReLU behind it share one place
            if place not in arrived:
                arrived[place] = start.new_zeros(start.shape[0], *self.shapes[step][1:])
        return result, {step: arrived[place] for step, place in self.observed.items()}

    def _arriving(self, unit: Unit, acc: Tensor | None, dense: Tensor | None, value: Tensor | None) -> Tensor:
        if unit.numerator == "value":
            assert acc is not None
            return acc
        total = _total(acc, dense, value)
        assert total is not None
        return total

    def _messages(self, unit: Unit, relevance: Tensor, saved: object, tape: Tape) -> list[Message]:
        operation = self.operations[unit.step]
        shape = self.shapes[self.units[unit.inputs[0]].output][1:]
        if isinstance(operation, LinearOperation):
            assert isinstance(saved, Gates)
            x = None if operation.factored else tape[unit.inputs[0]][1]
            return [operation.backward(relevance, saved, x, shape, self.direct_heatmap and unit.inputs[0] == 0)]
        if isinstance(operation, MergeOperation):
            assert isinstance(saved, list)
            return [(None, relevance if weight is None else times(relevance, weight)) for weight in saved]
        if isinstance(operation, ProportionalPool):
            assert isinstance(saved, Gates)
            return [operation.backward(relevance, saved, tape[unit.inputs[0]][1], shape)]
        if isinstance(operation, WinnerPool):
            assert isinstance(saved, Tensor)
            return [operation.backward(relevance, saved, shape)]
        return [(None, move_back(self.layers[unit.step], relevance, shape))]


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _total(acc: Tensor | None, dense: Tensor | None, value: Tensor | None) -> Tensor | None:
    if acc is None:
        return dense
    assert value is not None
    return times(acc, value) if dense is None else times_plus(acc, value, dense.to(acc.dtype))


def _bind(
    plan: Plan,
    index: int,
    assignment: Assignment,
    linears: Mapping[int, LinearOperation],
    shapes: tuple[Shape, ...],
    like: Tensor,
) -> Operation:
    step = plan.steps[index]
    layer = step.layer.resolved(shapes)

    def zeros(source: int) -> Tensor | None:
        found = plan.structural_zeros(source, shapes)
        return None if found is None else found.to(like.device)

    if isinstance(layer, Linear):
        operation = linears[index]
        padding = None if operation.guard is None else zeros(step.inputs[0])
        return operation if padding is None else operation.without(padding)
    if isinstance(layer, Merge):
        assert assignment.split is not None
        return MergeOperation(layer, assignment.split, [zeros(source) for source in step.inputs], like.dtype)
    if isinstance(layer, (MaxPool, AdaptiveMaxPool, Average)):
        assert assignment.pool is not None
        if assignment.pool.kind == "winner":
            assert not isinstance(layer, Average)
            return WinnerPool(layer)
        nonnegative = plan.steps[step.inputs[0]].nonnegative
        shape, outputs = shapes[step.inputs[0]][1:], shapes[index][1:]
        padding = zeros(step.inputs[0]) if isinstance(assignment.pool.stabilizer, ZeroGuard) else None
        return ProportionalPool(layer, assignment.pool, shape, outputs, nonnegative, like, padding)
    return None


def _units(plan: Plan, operations: Sequence[Operation], observed: frozenset[int]) -> list[Unit]:
    """Group steps into units and decide how relevance reaches each."""
    readers = plan.consumers()
    place: dict[int, int] = {}
    units: list[Unit] = []
    behind: list[tuple[int, ...]] = []  # the steps that read each unit
    for index, step in enumerate(plan.steps):
        if index in place:
            continue
        follower = readers[index][0] if len(readers[index]) == 1 else None
        fuses = isinstance(step.layer, (Linear, Merge)) and follower is not None and index != plan.output
        relu = fuses and follower is not None and isinstance(plan.steps[follower].layer, ReLU)
        output = follower if relu and follower is not None else index
        place[index] = place[output] = len(units)
        units.append(Unit(index, output, tuple(place[source] for source in step.inputs), relu, "one", False))
        behind.append(readers[output])
    return [
        _decide(unit, behind[position], operations, plan, bool({unit.step, unit.output} & observed))
        for position, unit in enumerate(units)
    ]


def _decide(unit: Unit, readers: Sequence[int], operations: Sequence[Operation], plan: Plan, observed: bool) -> Unit:
    """How relevance reaches a unit, from who reads it."""
    reading = [operations[reader] for reader in readers]
    factored = [
        isinstance(operation, (LinearOperation, ProportionalPool)) and operation.factored for operation in reading
    ]
    dense = [
        not factor or (isinstance(operation, LinearOperation) and operation.guard is not None)
        or (isinstance(operation, ProportionalPool) and operation.valid is not None)
        for factor, operation in zip(factored, reading, strict=True)
    ]  # fmt: skip
    free = isinstance(operations[unit.step], LinearOperation) and not observed and unit.output != plan.output
    numerator: Numerator = "one"
    if free and not any(dense) and readers:
        numerator = "value"
    elif free and not unit.relu and len(readers) == 1 and isinstance(reading[0], MergeOperation):
        numerator = "weight"
    multiplies = any(
        factor or isinstance(operation, (LinearOperation, ProportionalPool))
        for factor, operation in zip(factored, reading, strict=True)
    )
    return Unit(unit.step, unit.output, unit.inputs, unit.relu, numerator, multiplies and numerator != "value")
