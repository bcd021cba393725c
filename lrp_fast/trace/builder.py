"""The steps of a plan while a graph is read: what the handlers of operations build with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    BatchNorm,
    Layer,
    Linear,
    MaxPool,
    ReLU,
    Reshape,
    Slice,
    arguments_of,
)
from lrp_fast.plan import Step, TraceError

SUPPORTED = (
    "convolution (1-D to 3-D, grouped, dilated), linear, batch norm right after one of these, ReLU, max / average / "
    "adaptive pooling, mean over space, flatten / view / reshape / squeeze, zero padding, slicing, dropout and "
    "identity in eval mode, and the addition of two branches"
)

MODULE_LAYERS = (Linear, MaxPool, AdaptiveMaxPool, AveragePool, AdaptiveAveragePool, ReLU, BatchNorm)
"""Layers that stand for a module which a composite's rules may name by its class."""


@dataclass(eq=False)
class TracedTensor:
    """A tensor of the network: the step that computes what it holds now, and the memory it shares with its views.

    ``stale``: a view of that memory was written to, so that it holds what no step computes.
    """

    step: int
    memory: object
    stale: bool = False


@dataclass(frozen=True)
class TracedParameter:
    """A parameter or buffer, by its path."""

    path: str


@dataclass(frozen=True)
class Ignored:
    """A value only assertions read."""


class Builder:
    """The steps so far, and what handlers add to them; ``node``: the one that is being handled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.registered = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.registered |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.steps: list[Step] = []
        self.tensors: list[TracedTensor] = []
        self.node: torch.fx.Node | None = None

    @property
    def path(self) -> str:
        """The path of the module the current node belongs to."""
        assert self.node is not None
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    @property
    def operation(self) -> str:
        """What the current node is called in the model's own words."""
        assert self.node is not None
        if self.node.op == "call_module":
            return type(self.modules[str(self.node.target)]).__name__
        return str(getattr(self.node.target, "__name__", self.node.target)).strip("_")

    def unsupported(self, reason: str = "no relevance rule") -> TraceError:
        """The error that names where the current node is and what it is."""
        where = self.path or f"{type(self.model).__name__}.forward"
        return TraceError(f"{where}: {self.operation} has {reason}. Supported: {SUPPORTED}")

    def live(self, tensor: Any) -> TracedTensor:
        """``tensor``, checked to be one of the network that nobody changed behind its back."""
        if not isinstance(tensor, TracedTensor):
            raise self.unsupported(f"no relevance rule for an operand that is {_describe(tensor)}")
        if tensor.stale:
            name = self.steps[tensor.step].name
            raise self.unsupported(f"an operand ({name}) whose memory was changed in place through another view of it")
        return tensor

    def parameter(self, path: str) -> str:
        """``path``, checked to be a parameter or buffer, not a tensor that hooks or the forward itself make."""
        if path not in self.registered:
            raise self.unsupported(f"weights that are computed from others ({path} is no parameter or buffer)")
        return path

    def add(self, layer: Layer, inputs: tuple[Any, ...], operation: str = "", name: str = "") -> TracedTensor:
        """Append a step and give its output."""
        sources = [self.live(tensor) for tensor in inputs]
        for value in arguments_of(layer):
            if isinstance(value, (TracedTensor, TracedParameter, Ignored)):
                raise self.unsupported(f"no relevance rule for an argument that is {_describe(value)}")
        steps = tuple(tensor.step for tensor in sources)
        nonnegative = isinstance(layer, ReLU) or (
            bool(steps)
            and not isinstance(layer, (Linear, BatchNorm))
            and all(self.steps[step].nonnegative for step in steps)
        )
        is_module = self._is_module(layer)
        module_type = type(self.modules[self.path]) if is_module else None
        unique = self._unique(name or self._name(is_module))
        self.steps.append(Step(unique, operation or self.operation, layer, steps, nonnegative, module_type))
        return self.tensor(len(self.steps) - 1, sources[0].memory if isinstance(layer, (Reshape, Slice)) else object())

    def tensor(self, step: int, memory: object) -> TracedTensor:
        """A tensor of its own that holds what ``step`` computes."""
        self.tensors.append(TracedTensor(step, memory))
        return self.tensors[-1]

    def _is_module(self, layer: Layer) -> bool:
        """Whether a layer is what a module does: one that is called, or whose own weight its forward uses."""
        assert self.node is not None
        called = self.node.op == "call_module" and isinstance(layer, MODULE_LAYERS)
        return called or (isinstance(layer, Linear) and bool(self.path) and layer.weight == f"{self.path}.weight")

    def _name(self, is_module: bool) -> str:
        assert self.node is not None
        if is_module or self.node.op == "call_module":
            return self.path
        return f"{self.path}.{self.operation}" if self.path else self.operation

    def _unique(self, name: str) -> str:
        taken = {step.name for step in self.steps}
        call, unique = 0, name
        while unique in taken:
            call += 1
            unique = f"{name}:{call}"
        return unique

    def overwrite(self, tensor: TracedTensor, result: TracedTensor) -> TracedTensor:
        """Write ``result`` into ``tensor``: from now on whoever holds it reads that."""
        tensor.step = result.step
        for other in self.tensors:
            if other is not tensor and other.memory is tensor.memory:
                other.stale = True
        return tensor

    def constant(self, value: Any, name: str, default: Any) -> Any:
        """Refuse any value of an argument but the default."""
        if value != default:
            raise self.unsupported(f"no relevance rule with {name}={value!r}")
        return value


def _describe(value: Any) -> str:
    """An operand that is no tensor of the network, in words."""
    if isinstance(value, TracedParameter):
        return f"the parameter {value.path}"
    return f"the number {value!r}" if isinstance(value, (int, float)) else "no activation"
