"""Recording a model's forward by torch.fx."""

from __future__ import annotations

import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lrp_fast.plan import Plan, TraceError
from lrp_fast.trace.builder import SUPPORTED
from lrp_fast.trace.handlers import module_handler
from lrp_fast.trace.reader import Reader
from lrp_fast.watch import hooked

_TRACING = threading.RLock()
"""torch.fx changes ``nn.Module`` itself while it traces, and two traces would not change it back."""


class _Proxy(torch.fx.Proxy):
    """Records ``x += y`` as the change in place that it is; fx itself would take it for ``x = x + y``."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(torch.fx.Tracer):
    """Records leaf modules and functions; calls ``forward`` itself, so that the user's hooks see nothing of it."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[torch.fx.Node, list[tuple[str, torch.fx.Node]]] = {}
        """Modules' paths and what they returned, by the latest node there was: what follows may change it in place."""
        self._thread = threading.get_ident()

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        replaced = "forward" in vars(m)  # on the instance: not what its class says
        return not replaced and (module_handler(m) is not None or super().is_leaf_module(m, module_qualified_name))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, torch.fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:  # while it traces, torch.fx has all modules of the process ask
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        try:
            output = super().call_module(m, m.forward, args, kwargs)
        except TraceError:
            raise
        except Exception as error:  # whatever the user's forward raises when its input is a proxy
            raise _untraceable(f"{path} ({type(m).__name__})", error) from error
        if isinstance(output, torch.fx.Proxy):
            self.returned.setdefault(next(iter(reversed(self.graph.nodes))), []).append((path, output.node))
        return output


def _untraceable(where: str, error: Exception) -> TraceError:
    return TraceError(
        f"{where}: forward cannot be traced by torch.fx: {error}. Supported: a forward(x) of one tensor whose control "
        f"flow does not depend on values or shapes, made of {SUPPORTED}"
    )


def trace(model: nn.Module) -> Plan:
    """The plan of a model in eval mode; the model is left as it was.

    Raises ``TypeError`` if it is no module and :class:`TraceError` where it is in training mode, cannot be traced, or
    holds an operation without a relevance rule (the text names its module path and what is supported).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TraceError(f"{type(model).__name__} runs replicas of a model; give the model itself, its .module")
    exported = isinstance(model, torch.fx.GraphModule) and "eval" in vars(model)  # which torch.export replaces
    if isinstance(model, torch.jit.ScriptModule) or "forward" in vars(model) or exported:
        raise TraceError(
            f"{type(model).__name__}: its forward is compiled, exported or was replaced on the object, so what it computes "
            "cannot be traced; give the plain module (before torch.compile, torch.jit or torch.export)"
        )
    check_eval(model)
    hooks = hooked(model)
    if hooks:
        warnings.warn(
            f"forward hooks at {', '.join(hooks[:5])} are not run, so the explanation leaves out what they change",
            stacklevel=5,  # where LRP or explain was called
        )
    _check_questions(model)
    tracer = _Tracer()
    with _TRACING, restored(model):
        try:
            graph = tracer.trace(model, _constant_arguments(model))
        except TraceError:
            raise
        except Exception as error:  # whatever the user's forward raises when its input is a proxy
            raise _untraceable(type(model).__name__, error) from error
    return Reader(model, tracer.returned).read(graph)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward stores on its modules, which under tracing would be proxies."""
    modules = list(model.modules())
    tables = [table for m in modules for table in (vars(m), m._parameters, m._buffers, m._modules)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            if [(key, id(value)) for key, value in table.items()] != [(key, id(value)) for key, value in kept.items()]:
                table.clear()
                table.update(kept)


def check_eval(model: nn.Module) -> None:
    """Raise :class:`TraceError` if any module of a model is in training mode."""
    modules = model.named_modules()
    # torch.fx holds what it keeps in plain modules, made in training mode, which compute nothing.
    training = [path or type(model).__name__ for path, one in modules if one.training and type(one) is not nn.Module]
    if training:
        raise TraceError(
            f"the model is in training mode ({', '.join(training[:5])}{', ...' if len(training) > 5 else ''}): "
            "call model.eval() first"
        )


def _check_questions(model: nn.Module) -> None:
    """Refuse code that asks ``isinstance(x, Tensor)``: a proxy is none, so a trace could go another way."""
    for path, module in model.named_modules():
        classes = [kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] not in ("torch", "builtins")]
        for function, names in _reached(classes):
            if "is_tensor" in names or {"isinstance", "Tensor"} <= names:
                raise TraceError(
                    f"{path or 'the model'} ({type(module).__name__}) asks whether something is a tensor, which "
                    f"torch.fx cannot answer ({function.__qualname__}). Supported: a forward without such questions"
                )


def _reached(classes: Sequence[type]) -> Iterator[tuple[FunctionType, set[str]]]:
    """The methods of these classes that ``forward`` may call, by name, and the names that each reads."""
    waiting, seen = {"forward"}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for value in (vars(kind).get(name) for kind in classes):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(function):
                names = _names_in(inspect.unwrap(function).__code__)
                yield function, names
                waiting |= names - seen


def _names_in(code: CodeType) -> set[str]:
    """What a function's code reads by name, with the functions and comprehensions inside it."""
    return set(code.co_names).union(*(_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _constant_arguments(model: nn.Module) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    given = [p.name for p in plain[:1] if p.kind is not p.KEYWORD_ONLY]
    if not given or needed != given or len(plain) < len(parameters):
        raise TraceError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)}: expected one tensor and, after it, "
            "only arguments with defaults"
        )
    return {p.name: p.default for p in plain[1:]}
