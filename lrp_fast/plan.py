"""Plan: the traced model as frozen data.

Everything that computes relevance works on a plan and a table of parameters, never on the model's modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lrp_fast.layers import (
    AdaptiveMaxPool,
    Average,
    Convolution,
    Dense,
    Input,
    Layer,
    Linear,
    MaxPool,
    Pad,
    Parameters,
    ReLU,
    Reshape,
    Shape,
    Slice,
)


class TraceError(ValueError):
    """The model cannot be explained; the text says why, and names what has no relevance rule and what is supported.

    Also for a model in training mode, a forward that torch.fx cannot trace, traced logits that are not the model's, and
    weights that are not finite.
    """


@dataclass(frozen=True)
class Step:
    """One operation of the model.

    ``name``: the module's path, with ``:1``, ``:2``… for its later calls. ``operation``: what it is called in the
    model's own words. ``inputs``: indices of earlier steps. ``nonnegative``: its output is known to be ≥ 0.
    ``module_type``: the class of the module it came from, or None for a function.
    """

    name: str
    operation: str
    layer: Layer
    inputs: tuple[int, ...]
    nonnegative: bool
    module_type: type | None = None


Numerator = Literal["value", "weight", "one"]


@dataclass(frozen=True)
class Unit:
    """One step, or a linear step or merge together with the ReLU that alone reads it; ``inputs`` are units.

    ``numerator``: what the gates of a linear unit are over: its own output (relevance arrives as ``acc``), the weight of
    the merge behind it (the merge's relevance arrives), or one (its own relevance arrives). ``keep``: its output is needed
    again in the backward pass. ``vanishes``: where its output is zero, so is its relevance.
    """

    step: int
    output: int
    inputs: tuple[int, ...]
    relu: bool
    numerator: Numerator
    keep: bool
    vanishes: bool = False


def readers_of(units: Sequence[Unit]) -> list[list[int]]:
    """For each unit, the places of those that read its output. Backward, the first of them is the last to send."""
    readers: list[list[int]] = [[] for _ in units]
    for place, unit in enumerate(units):
        for source in set(unit.inputs):
            readers[source].append(place)
    return readers


@dataclass(frozen=True)
class Plan:
    """A model's steps in execution order; step 0 is the input, ``output`` the step that gives the logits.

    ``names`` finds the step whose output is a module's output (containers included).
    """

    steps: tuple[Step, ...]
    output: int
    names: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", MappingProxyType(dict(self.names)))

    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the steps that read its output (twice where one reads it twice)."""
        readers: list[list[int]] = [[] for _ in self.steps]
        for index, step in enumerate(self.steps):
            for source in step.inputs:
                readers[source].append(index)
        return tuple(map(tuple, readers))

    @cached_property
    def stems(self) -> frozenset[int]:
        """The linear steps with no linear step before them."""
        behind_linear: list[bool] = []
        found = set()
        for index, step in enumerate(self.steps):
            behind = any(behind_linear[source] for source in step.inputs)
            if isinstance(step.layer, Linear):
                if not behind:
                    found.add(index)
                behind = True
            behind_linear.append(behind)
        return frozenset(found)

    @cached_property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters and buffers that its layers name: the path of a module → the names of its own."""
        owned: dict[str, list[str]] = {}
        for layer in (step.layer for step in self.steps):
            if isinstance(layer, Linear):
                norm = layer.norm
                of_norm = (norm.mean, norm.variance, norm.weight, norm.bias) if norm is not None else ()
                for path in filter(None, (layer.weight, layer.bias, *of_norm)):
                    module, _, name = path.rpartition(".")
                    owned.setdefault(module, []).append(name)
        return {module: tuple(dict.fromkeys(names)) for module, names in owned.items()}

    def find(self, name: str) -> int:
        """The step whose output the module ``name`` gives; raises ``ValueError`` with near names."""
        if name not in self.names:
            near = ", ".join(difflib.get_close_matches(name, self.names, n=12, cutoff=0.0))
            raise ValueError(f"no layer named {name!r} in the traced model; the nearest names are: {near}")
        return self.names[name]

    def shapes(self, input_shape: Shape, parameters: Parameters) -> tuple[Shape, ...]:
        """Every step's output shape for an input of this shape, found without computing any value.

        Raises ``ValueError`` that names the step where the shapes stop fitting.
        """
        self.check_input(input_shape, parameters)
        meta = {name: torch.empty(value.shape, device="meta") for name, value in parameters.items()}
        values: list[Tensor] = []
        shapes: list[Shape] = []
        for step in self.steps:
            if isinstance(step.layer, Input):
                value = torch.empty(input_shape, device="meta")
            else:
                value = self._outline(step, [values[source] for source in step.inputs], shapes, meta, input_shape)
            values.append(value)
            shapes.append(tuple(value.shape))
        if len(shapes[self.output]) != 2:
            raise ValueError(f"the model's output must be N x classes, got shape {shapes[self.output]}")
        return tuple(shapes)

    def structural_zeros(
        self, step: int, shapes: tuple[Shape, ...], device: torch.device | None = None
    ) -> Tensor | None:
        """Where the output of ``step`` is zero by structure (padding), bool of shape (1, …) on ``device``, or None for nowhere.

        The zero padding of an option-A shortcut is such a place: a merge sends no relevance there.
        """
        chain: list[int] = []
        while isinstance(self.steps[step].layer, (Pad, Slice, Reshape, ReLU, MaxPool, AdaptiveMaxPool, Average)):
            chain.append(step)
            step = self.steps[step].inputs[0]
        if not any(isinstance(self.steps[link].layer, Pad) for link in chain):
            return None
        live = torch.ones(1, *shapes[step][1:], device=device)
        single = [(1, *shape[1:]) for shape in shapes]
        for link in reversed(chain):
            layer = self.steps[link].layer
            moved = isinstance(layer, Reshape)  # a view may have the batch size written into it
            live = live.reshape(single[link]) if moved else layer.resolved(single).forward((live,), {})
        zeros = live == 0
        return zeros if bool(zeros.any()) else None

    @staticmethod
    def _outline(
        step: Step, inputs: list[Tensor], shapes: list[Shape], parameters: Parameters, input_shape: Shape
    ) -> Tensor:
        try:
            return step.layer.resolved(shapes).outline(inputs, parameters)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            got = " and ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"an input of shape {tuple(input_shape)} does not fit the model: {step.name} ({step.operation}) "
                f"gets {got}: {error}"
            ) from error

    def check_input(self, shape: Shape, parameters: Parameters) -> None:
        """Raise ``ValueError`` unless an input of this shape can enter the model's first layers."""
        for index in sorted(self.stems):
            step = self.steps[index]
            if not (isinstance(step.layer, Linear) and isinstance(self.steps[step.inputs[0]].layer, Input)):
                continue
            weight = parameters[step.layer.weight]
            if isinstance(step.layer, Convolution):
                channels = weight.shape[1] * step.layer.groups
                spatial = ("L",) if weight.ndim == 3 else ("H", "W") if weight.ndim == 4 else ("D", "H", "W")
                if len(shape) != weight.ndim or shape[1] != channels or 0 in shape:
                    expected = " x ".join(("N", str(channels), *spatial))
                    empty = ", which holds nothing" if 0 in shape else ""
                    raise ValueError(f"expected inputs of shape {expected}, got shape {tuple(shape)}{empty} ({step.name})")
            elif isinstance(step.layer, Dense) and (len(shape) < 2 or shape[-1] != weight.shape[1] or 0 in shape):
                raise ValueError(f"expected inputs of shape N x {weight.shape[1]}, got shape {tuple(shape)}")
