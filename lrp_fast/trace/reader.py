"""Reading a traced graph, node by node, into a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lrp_fast.layers import Input
from lrp_fast.plan import Plan, TraceError
from lrp_fast.trace.builder import Builder, Ignored, TracedParameter, TracedTensor
from lrp_fast.trace.finish import finished
from lrp_fast.trace.handlers import FUNCTIONS, METHODS, ignore, module_handler


class Reader:
    """Has each node of a model's graph handled in execution order, and remembers what it gave.

    ``returned``: modules' paths and the nodes that they returned, by the latest node there was.
    """

    def __init__(self, model: nn.Module, returned: Mapping[torch.fx.Node, list[tuple[str, torch.fx.Node]]]) -> None:
        self.builder = Builder(model)
        self.returned = returned
        self.values: dict[torch.fx.Node, Any] = {}
        self.layers: dict[str, list[int]] = {}  # of each module the steps of what it returned, call by call

    def read(self, graph: torch.fx.Graph) -> Plan:
        """The plan; raises :class:`TraceError` at the first node without a handler that accepts it."""
        for node in graph.nodes:
            self.builder.node = node
            if node.op == "output":
                break
            self.values[node] = self._value(node)
            for path, result in self.returned.get(node, ()):
                if isinstance(value := self.values[result], TracedTensor):
                    self.layers.setdefault(path, []).append(value.step)
        return finished(self.builder.steps, self._output(node.args[0]), self._names())

    def _names(self) -> dict[str, int]:
        names = {step.name: index for index, step in enumerate(self.builder.steps)}
        for path, steps in self.layers.items():
            names[path] = steps[-1]
            names.update({f"{path}:{call}": step for call, step in enumerate(steps)})
        return names

    def _value(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return TracedParameter(str(node.target))
        args = tuple(self._argument(value) for value in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        if node.op == "call_module":
            module = self.builder.modules[str(node.target)]
            handler, args = module_handler(module), (module, *args)
        else:
            table: Mapping[Any, Callable[..., Any]] = FUNCTIONS if node.op == "call_function" else METHODS
            handler = table.get(node.target)
        if handler is None:
            raise self.builder.unsupported()
        if handler is not ignore and any(isinstance(value, Ignored) for value in (*args, *kwargs.values())):
            raise self.builder.unsupported("no relevance rule where it depends on a comparison, a type or a device")
        try:
            return handler(self.builder, *args, **kwargs)
        except TypeError as error:
            raise self.builder.unsupported(f"arguments that are not understood ({error})") from error

    def _placeholder(self, node: torch.fx.Node) -> Any:
        if any(isinstance(step.layer, Input) for step in self.builder.steps):
            return Ignored()
        return self.builder.add(Input(), (), "input", "input")

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, (tuple, list)):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, slice):
            return slice(*(self._argument(item) for item in (value.start, value.stop, value.step)))
        return value

    def _output(self, node: Any) -> int:
        value = self.values.get(node) if isinstance(node, torch.fx.Node) else None
        if not isinstance(value, TracedTensor):
            raise TraceError(
                f"{type(self.builder.model).__name__}.forward must return one tensor of logits, got {node}"
            )
        return self.builder.live(value).step
