"""From the steps that a model takes to those of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from lrp_fast.layers import BatchNorm, Linear, Merge, Size, SizeExpression, arguments_of
from lrp_fast.plan import Plan, Step, TraceError
from lrp_fast.trace.builder import SUPPORTED


def finished(steps: list[Step], output: int, names: Mapping[str, int]) -> Plan:
    """Fold batch norms into what they follow, drop what the output does not need, and tell skips from branches."""
    followers = _fold_batch_norms(steps, output)
    needed = _needed(steps, output, followers)
    position = {old: new for new, old in enumerate(sorted(needed))}

    def place(old: int) -> int | None:
        return position.get(followers.get(old, old))

    kept = [
        replace(steps[old], inputs=tuple(position[followers.get(i, i)] for i in steps[old].inputs))
        for old in sorted(needed)
    ]
    placed = {name: place(old) for name, old in names.items()}
    final = _classify_merges([_renumber(step, place) for step in kept])
    known = {name: step for name, step in placed.items() if step is not None}
    return Plan(tuple(final), position[followers.get(output, output)], known)


def _fold_batch_norms(steps: list[Step], output: int) -> dict[int, int]:
    """Give each batch norm to the linear step it follows (in ``steps``); returns norm step → linear step."""
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for source in step.inputs:
            readers.setdefault(source, []).append(index)
    live = _needed(steps, output, {})
    followers: dict[int, int] = {}
    for index, step in enumerate(steps):
        if not isinstance(step.layer, BatchNorm) or index not in live:
            continue
        source = step.inputs[0]
        before = steps[source]
        alone = [reader for reader in readers[source] if reader in live] == [index] and source != output
        if not (isinstance(before.layer, Linear) and before.layer.norm is None and alone):
            raise TraceError(
                f"{step.name}: {step.operation} has a relevance rule only right after a convolution or linear layer "
                f"that nothing else reads, here it follows {before.name} ({before.operation}). Supported: {SUPPORTED}"
            )
        steps[source] = replace(before, layer=replace(before.layer, norm=step.layer))
        followers[index] = source
    return followers


def _needed(steps: list[Step], output: int, followers: Mapping[int, int]) -> set[int]:
    needed = {0}
    frontier = [followers.get(output, output)]
    while frontier:
        index = frontier.pop()
        if index not in needed:
            needed.add(index)
            frontier.extend(followers.get(source, source) for source in _sources(steps[index]))
    return needed


def _sources(step: Step) -> Iterator[int]:
    """The steps a step reads, if only their shapes."""
    yield from step.inputs
    yield from (value.step for value in arguments_of(step.layer) if isinstance(value, Size))


def _renumber(step: Step, place: Callable[[int], int | None]) -> Step:
    def moved(value: Any) -> Any:
        if isinstance(value, Size):
            return Size(place(value.step))  # type: ignore[arg-type]
        if isinstance(value, SizeExpression):
            return SizeExpression(value.function, moved(value.arguments))
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, slice):
            return slice(moved(value.start), moved(value.stop), moved(value.step))
        return value

    changes = {field.name: moved(getattr(step.layer, field.name)) for field in fields(step.layer)}
    return replace(step, layer=replace(step.layer, **changes))


def _classify_merges(steps: list[Step]) -> list[Step]:
    """Name each merge's skip: the branch with fewer linear layers since the branches parted."""
    above: list[frozenset[int]] = []
    result = []
    for index, step in enumerate(steps):
        above.append(frozenset({index}).union(*(above[source] for source in step.inputs)))
        if isinstance(step.layer, Merge):
            first, second = (above[source] for source in step.inputs)
            counts = [
                sum(isinstance(steps[i].layer, Linear) for i in branch) for branch in (first - second, second - first)
            ]
            skip = 0 if counts[0] < counts[1] else 1
            ambiguous = counts[0] == counts[1]
            step = replace(step, layer=Merge(skip, "projection" if counts[skip] else "identity", ambiguous))
        result.append(step)
    return result
