"""The engine: a plan under a composite, bound to weights, dtype and shape, as two straight-line functions of tensors.

``forward`` gives the logits and a tape of gates; ``backward`` takes the tape and a start relevance and gives the
relevance of the input. Steps are grouped into units (a linear layer or merge with the ReLU behind it), and for each unit
it is decided once how relevance reaches it: as ``acc`` alone, with its own output in the gate's numerator;
from a merge, with the split's weight in the numerator; or whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrp_fast.backends.passes import Arrived, Passes, times
from lrp_fast.backends.torch import (
    Gates,
    LinearOperation,
    MergeOperation,
    ProportionalPool,
    WinnerPool,
    channels_last,
    move_back,
)
from lrp_fast.composites import Assignment
from lrp_fast.layers import (
    AdaptiveMaxPool,
    Average,
    Convolution,
    Input,
    Linear,
    MaxPool,
    Merge,
    Parameters,
    ReLU,
    Shape,
)
from lrp_fast.plan import Numerator, Plan, Unit, readers_of
from lrp_fast.rules import ZeroGuard

Operation = LinearOperation | ProportionalPool | WinnerPool | MergeOperation | None


def bind_linears(
    plan: Plan, assignments: Sequence[Assignment], fold: bool, parameters: Parameters, dtype: torch.dtype
) -> dict[int, LinearOperation]:
    """Pack the weights of every linear step for its rule, by step: what does not depend on the input's shape."""
    operations = {}
    for index, (step, assignment) in enumerate(zip(plan.steps, assignments, strict=True)):
        if isinstance(step.layer, Linear):
            assert assignment.rule is not None
            precise = torch.float32 if dtype == torch.bfloat16 and _is_precise(step.layer, parameters) else dtype
            nonnegative = plan.steps[step.inputs[0]].nonnegative
            operations[index] = LinearOperation(
                step.layer, assignment.rule, fold, parameters, nonnegative, precise, step.name
            )
    return operations


def _is_precise(layer: Linear, parameters: Parameters) -> bool:
    """Whether a layer is computed in float32 where others are in bfloat16."""
    if not isinstance(layer, Convolution):
        return True  # a head is too small to gain, and the start probability depends on its logits
    weight = parameters[layer.weight]
    axes, is_square = weight.ndim - 2, len(set(weight.shape[2:])) == 1
    # On a CPU, with channels last in memory, torch 2.14 gives garbage for some grouped convolutions of images if the kernel is
    # not square (for a 3 × 7 one a relative error of 0.8), and for some of volumes.
    return layer.groups > 1 and weight.device.type == "cpu" and (axes == 3 or (axes == 2 and not is_square))


Tape = list[tuple[object, Tensor | None]]
Serve = Callable[[Sequence[Unit], Sequence[Operation], Sequence[Shape]], Sequence[Passes | str]]


class Program:
    """A bound plan. ``shapes`` are those of every step for one input shape; ``observed`` are steps to report.

    With ``heatmap`` the input's relevance may come summed over channels (one channel) where that is cheaper. ``serve``
    may take over units: it gives for each its passes, or the reason why it has none. ``maps``: how many there will be of
    each image; others are as right, but on a CPU have the weights brought into oneDNN's layout at every call.
    """

    def __init__(
        self, plan: Plan, assignments: Sequence[Assignment], linears: Mapping[int, LinearOperation], shapes: tuple[Shape, ...],
        like: Tensor, observed: frozenset[int] = frozenset(), heatmap: bool = False, serve: Serve | None = None,
        maps: int = 1,
    ) -> None:  # fmt: skip
        self.plan, self.shapes, self.dtype = plan, shapes, like.dtype
        self.operations: list[Operation] = []
        for index, assignment in enumerate(assignments):
            self.operations.append(_bind(plan, index, assignment, linears, shapes, like))
        self.layers = [step.layer.resolved(shapes) for step in plan.steps]
        self.units = _units(plan, self.operations, observed)
        for unit in self.units:
            operation = self.operations[unit.step]
            if isinstance(operation, LinearOperation):
                shape = shapes[plan.steps[unit.step].inputs[0]]
                count, *rest = shapes[unit.step]
                message = (maps * count, *rest)
                self.operations[unit.step] = operation.placed(shape, message, unit.relu, serve is None)
        self.position = {}
        for place, unit in enumerate(self.units):
            self.position[unit.step] = place
            self.position[unit.output] = place
        self.observed = {step: self.position[step] for step in observed}
        readers = readers_of(self.units)
        reading = [self.operations[self.units[place].step] for place in readers[0]]
        sums = all(isinstance(operation, LinearOperation) and operation.sums_channels for operation in reading)
        self.direct_heatmap = heatmap and sums and 0 not in self.observed
        self.last_reader = [places[-1] if places else 0 for places in readers]
        served = ["" for _ in self.units] if serve is None else serve(self.units, self.operations, shapes)
        self.service = [found.service if isinstance(found, Passes) else found for found in served]
        self.passes = [found if isinstance(found, Passes) else None for found in served]
        self.settles = [
            len(unit.inputs) == 1 and readers[unit.inputs[0]][0] == place
            and self.passes[unit.inputs[0]] is not None
            and unit.inputs[0] not in self.observed.values()
            for place, unit in enumerate(self.units)
        ]  # fmt: skip
        self.taken = {
            source
            for unit, passes in zip(self.units, self.passes, strict=True)
            if passes is not None
            for source, takes in zip(unit.inputs, passes.takes, strict=False)
            if takes
        }

    def serving(self) -> list[str]:
        """For each step what runs it, where units were offered to :data:`Serve`."""
        names = []
        for step in range(len(self.plan.steps)):
            unit, passes = self.units[self.position[step]], self.passes[self.position[step]]
            service = self.service[self.position[step]]
            if unit.step != step:
                names.append(f"with {self.plan.steps[unit.step].name}")
            else:
                names.append(service if passes is not None else f"torch: {service}")
        return names

    # Forward.

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """Logits N × classes (float32, or float64) and the tape, from inputs N × …."""
        values: list[Tensor | None] = [None] * len(self.units)
        pending: dict[int, tuple[list[Tensor], Tensor | None]] = {}
        tape: Tape = [(None, None)] * len(self.units)
        for place, unit in enumerate(self.units):
            sources = [values[source] for source in unit.inputs]
            passes = self.passes[place]
            saved: object
            if place in self.taken:
                value, saved = sources[0], None
            elif passes is not None:
                value, saved = passes.forward(sources)  # type: ignore[arg-type]
            else:
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
            value, z, output = operation.forward(sources[0], unit.relu)
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
            return value.relu_() if unit.relu else value, kept
        if isinstance(operation, (ProportionalPool, WinnerPool)):
            return operation.forward(sources[0])
        value = channels_last(inputs.to(self.dtype)) if isinstance(layer, Input) else layer.forward(sources, {})
        return value, None

    # Backward.

    def backward(self, tape: Tape, start: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The input's relevance ((maps · N) × …), and that of the observed steps, from the start (maps · N) × classes.

        Consumes the tape, so that memory is freed on the way.
        """
        arrived = [Arrived() for _ in self.units]
        arrived[self.position[self.plan.output]].dense = start
        places = set(self.observed.values())
        at: dict[int, Tensor] = {}
        for place in range(len(self.units) - 1, 0, -1):
            here, arrived[place] = arrived[place], Arrived()
            saved, value = tape[place]
            tape[place] = (None, None)
            if here.empty:
                continue
            if place in places:
                relevance = here.total(value, self._shape(place))
                assert relevance is not None
                at[place], here = relevance, Arrived(dense=relevance)
            if self.passes[place] is None:
                self._send(place, here, saved, value, arrived, tape)
            else:
                self._pass_on(place, here, saved, value, arrived, tape)
        result = arrived[0].total(tape[0][1], self._shape(0))
        at[0] = start.new_zeros(start.shape[0], *self._shape(0)) if result is None else result
        for step, place in self.observed.items():  # a layer and the ReLU behind it share one place
            if place not in at:
                at[place] = start.new_zeros(start.shape[0], *self.shapes[step][1:])
        return at[0], {step: at[place] for step, place in self.observed.items()}

    def _shape(self, place: int) -> Shape:
        return self.shapes[self.units[place].output][1:]

    def _pass_on(
        self, place: int, here: Arrived, saved: object, value: Tensor | None, arrived: list[Arrived], tape: Tape
    ) -> None:
        """Send what has arrived at a unit on, by its own passes."""
        unit, passes = self.units[place], self.passes[place]
        assert passes is not None
        leaving = here.leaving if here.leaving is not None else passes.settle(here, value, saved)
        if passes.takes:
            for source, takes, left in zip(unit.inputs, passes.takes, leaving, strict=True):
                if takes:
                    arrived[source].leaving = left
                elif left is not None:
                    arrived[source].add(Arrived(dense=left[0].movedim(-1, 1)), self._shape(source))
            return
        (source,) = unit.inputs
        receiver = self.passes[source]
        if self.settles[place] and receiver is not None:
            saved, value = tape[source]
            arrived[source] = Arrived(leaving=passes.send_into(leaving, receiver, arrived[source], value, saved))
        else:
            message = passes.send(leaving, tape[source][1], self.direct_heatmap and source == 0)
            arrived[source].add(message, self._shape(source))

    def _send(
        self, place: int, here: Arrived, saved: object, value: Tensor | None, arrived: list[Arrived], tape: Tape
    ) -> None:
        """Send what has arrived at a unit on, by the torch backend."""
        unit, operation = self.units[place], self.operations[self.units[place].step]
        shape = self._shape(unit.inputs[0])
        # Gates over the unit's own output take what arrives without it.
        relevance = here.factored(self._shape(place)) if unit.numerator == "value" else None
        relevance = here.total(value, self._shape(place)) if relevance is None else relevance
        assert relevance is not None
        messages: list[Arrived]
        if isinstance(operation, MergeOperation):
            assert isinstance(saved, list)
            messages = [Arrived(dense=relevance if weight is None else times(relevance, weight)) for weight in saved]
        elif isinstance(operation, WinnerPool):
            assert isinstance(saved, Tensor)
            _, dense = operation.backward(relevance, saved, shape)
            messages = [Arrived(dense=dense)]
        elif isinstance(operation, (LinearOperation, ProportionalPool)):
            assert isinstance(saved, Gates)
            x = tape[unit.inputs[0]][1]
            if isinstance(operation, ProportionalPool):
                acc, dense = operation.backward(relevance, saved, x, shape)
            else:
                heatmap = self.direct_heatmap and unit.inputs[0] == 0
                acc, dense = operation.backward(relevance, saved, None if operation.factored else x, shape, heatmap)
            messages = [Arrived(acc=acc, dense=dense)]
        else:
            messages = [Arrived(dense=move_back(self.layers[unit.step], relevance, shape))]
        for source, message in zip(unit.inputs, messages, strict=True):
            arrived[source].add(message, self._shape(source))


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
        return plan.structural_zeros(source, shapes, like.device)

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
    decided: dict[int, Unit] = {}
    for position in reversed(range(len(units))):
        unit = units[position]
        readers_of_it = {reader: decided[place[reader]] for reader in behind[position]}
        decided[position] = _decide(unit, readers_of_it, operations, plan, bool({unit.step, unit.output} & observed))
    return [decided[position] for position in range(len(units))]


def _decide(
    unit: Unit, readers: Mapping[int, Unit], operations: Sequence[Operation], plan: Plan, observed: bool
) -> Unit:
    """How relevance reaches a unit, from the steps that read it and the units they are part of."""
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
    vanishing = [
        not more or (isinstance(operation, MergeOperation) and operation.proportional and reader.vanishes)
        for more, operation, reader in zip(dense, reading, readers.values(), strict=True)
    ]
    return replace(
        unit, numerator=numerator, keep=multiplies and numerator != "value",
        vanishes=all(vanishing) and bool(readers) and unit.output != plan.output,
    )  # fmt: skip
