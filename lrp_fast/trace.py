"""From ``nn.Module`` to :class:`~lrp_fast.plan.Plan`, by torch.fx.

The graph is read node by node, in execution order, by one handler for each operation that has a relevance rule;
anything else is a :class:`~lrp_fast.plan.TraceError`. Changes in place are followed: whoever reads a tensor after it
was changed reads the changed value, as in the model, and a view of changed memory cannot be read.
"""

from __future__ import annotations

import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Input,
    Layer,
    Linear,
    MaxPool,
    Mean,
    Merge,
    Pad,
    ReLU,
    Reshape,
    Size,
    SizeExpression,
    Slice,
)
from lrp_fast.plan import Plan, Step, TraceError
from lrp_fast.watch import hooked

SUPPORTED = (
    "convolution (1-D to 3-D, grouped, dilated), linear, batch norm right after one of these, ReLU, max / average / "
    "adaptive pooling, mean over space, flatten / view / reshape / squeeze, zero padding, slicing, dropout and "
    "identity in eval mode, and the addition of two branches"
)

_TRACING = threading.RLock()
"""torch.fx changes ``nn.Module`` itself while it traces, and two traces would not change it back."""


@dataclass(eq=False)
class _Tensor:
    """A tensor of the network: the step that computes what it holds now, and the memory it shares with its views.

    ``stale``: a view of that memory was written to, so that it holds what no step computes.
    """

    step: int
    memory: object
    stale: bool = False


@dataclass(frozen=True)
class _Parameter:
    """A parameter or buffer, by its path."""

    path: str


@dataclass(frozen=True)
class _Ignored:
    """A value only assertions read."""


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
        return not replaced and (_module_handler(m) is not None or super().is_leaf_module(m, module_qualified_name))

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


def _module_handler(module: nn.Module) -> Callable[..., Any] | None:
    kind = type(module)
    frozen = (kind.__module__, kind.__name__) in _FROZEN_BATCH_NORMS
    return _batch_norm_module if frozen else _MODULES.get(kind)


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
    return _Builder(model, tracer.returned).build(graph)


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


class _Builder:
    """Reads an fx graph into steps."""

    def __init__(self, model: nn.Module, returned: Mapping[torch.fx.Node, list[tuple[str, torch.fx.Node]]]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.returned = returned
        self.registered = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.registered |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.values: dict[torch.fx.Node, Any] = {}
        self.layers: dict[str, list[int]] = {}
        self.steps: list[Step] = []
        self.tensors: list[_Tensor] = []
        self.node: torch.fx.Node | None = None

    def build(self, graph: torch.fx.Graph) -> Plan:
        for node in graph.nodes:
            self.node = node
            if node.op == "output":
                break
            self.values[node] = self._value(node)
            for path, result in self.returned.get(node, ()):
                if isinstance(value := self.values[result], _Tensor):
                    self.layers.setdefault(path, []).append(value.step)
        return _finish(self.steps, self._output(node.args[0]), self._names())

    def _names(self) -> dict[str, int]:
        names = {step.name: index for index, step in enumerate(self.steps)}
        for path, steps in self.layers.items():
            names[path] = steps[-1]
            names.update({f"{path}:{call}": step for call, step in enumerate(steps)})
        return names

    def _value(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return _Parameter(str(node.target))
        args = tuple(self._argument(value) for value in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            handler, args = _module_handler(module), (module, *args)
        else:
            table: Mapping[Any, Callable[..., Any]] = _FUNCTIONS if node.op == "call_function" else _METHODS
            handler = table.get(node.target)
        if handler is None:
            raise self.unsupported()
        if handler is not _ignore and any(isinstance(value, _Ignored) for value in (*args, *kwargs.values())):
            raise self.unsupported("no relevance rule where it depends on a comparison, a type or a device")
        try:
            return handler(self, *args, **kwargs)
        except TypeError as error:
            raise self.unsupported(f"arguments that are not understood ({error})") from error

    def _placeholder(self, node: torch.fx.Node) -> Any:
        if any(isinstance(step.layer, Input) for step in self.steps):
            return _Ignored()
        return self.add(Input(), (), "input", "input")

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
        if not isinstance(value, _Tensor):
            raise TraceError(f"{type(self.model).__name__}.forward must return one tensor of logits, got {node}")
        return self.live(value).step

    # What handlers use.

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
        where = self.path or f"{type(self.model).__name__}.forward"
        return TraceError(f"{where}: {self.operation} has {reason}. Supported: {SUPPORTED}")

    def live(self, tensor: Any) -> _Tensor:
        """``tensor``, checked to be one of the network that nobody changed behind its back."""
        if not isinstance(tensor, _Tensor):
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

    def add(self, layer: Layer, inputs: tuple[Any, ...], operation: str = "", name: str = "") -> _Tensor:
        """Append a step and give its output."""
        sources = [self.live(tensor) for tensor in inputs]
        for value in _leaves(tuple(getattr(layer, field.name) for field in fields(layer))):
            if isinstance(value, (_Tensor, _Parameter, _Ignored)):
                raise self.unsupported(f"no relevance rule for an argument that is {_describe(value)}")
        steps = tuple(tensor.step for tensor in sources)
        nonnegative = isinstance(layer, ReLU) or (
            bool(steps)
            and not isinstance(layer, (Linear, BatchNorm))
            and all(self.steps[step].nonnegative for step in steps)
        )
        is_module = self.node is not None and self.node.op == "call_module" and isinstance(layer, _MODULE_LAYERS)
        module_type = type(self.modules[self.path]) if is_module else None
        unique = self._unique(name or self._name())
        self.steps.append(Step(unique, operation or self.operation, layer, steps, nonnegative, module_type))
        return self.tensor(len(self.steps) - 1, sources[0].memory if isinstance(layer, (Reshape, Slice)) else object())

    def tensor(self, step: int, memory: object) -> _Tensor:
        """A tensor of its own that holds what ``step`` computes."""
        self.tensors.append(_Tensor(step, memory))
        return self.tensors[-1]

    def _name(self) -> str:
        assert self.node is not None
        if self.node.op == "call_module":
            return str(self.node.target)
        return f"{self.path}.{self.operation}" if self.path else self.operation

    def _unique(self, name: str) -> str:
        taken = {step.name for step in self.steps}
        call, unique = 0, name
        while unique in taken:
            call += 1
            unique = f"{name}:{call}"
        return unique

    def overwrite(self, tensor: _Tensor, result: _Tensor) -> _Tensor:
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
    if isinstance(value, _Parameter):
        return f"the parameter {value.path}"
    return f"the number {value!r}" if isinstance(value, (int, float)) else "no activation"


# Layers -------------------------------------------------------------------------------------------------------------


def _tuple(value: Any, dimensions: int) -> Any:
    if isinstance(value, tuple):
        return value * dimensions if len(value) == 1 else value
    part_of_shape = isinstance(value, SizeExpression) and isinstance(value.arguments[-1], slice)
    return value if part_of_shape or isinstance(value, Size) else (value,) * dimensions


def _parameter_path(builder: _Builder, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, _Parameter):
        raise builder.unsupported("weights that are computed from others")
    return builder.parameter(value.path)


def _module_path(builder: _Builder, module: nn.Module, name: str) -> str | None:
    return None if getattr(module, name) is None else builder.parameter(f"{builder.path}.{name}")


def _convolve(
    builder: _Builder, dimensions: int, x: _Tensor, weight: str, bias: str | None,
    stride: Any, padding: Any, dilation: Any, groups: int, kernel: tuple[int, ...] | None,
) -> _Tensor:  # fmt: skip
    dilation, stride = _tuple(dilation, dimensions), _tuple(stride, dimensions)
    if padding == "valid":
        padding = 0
    if padding == "same":
        if kernel is None:
            kernel = tuple(_attribute(builder.model, weight).shape[2:])
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):
            extra = tuple(amount for total in reversed(totals) for amount in (0, total % 2))
            x = builder.add(Pad(extra), (x,), "pad", f"{builder.path}.pad".lstrip("."))
    layer = Convolution(weight, bias, None, stride, _tuple(padding, dimensions), dilation, groups)
    return builder.add(layer, (x,))


def _convolution_module(builder: _Builder, module: Any, x: _Tensor) -> _Tensor:
    if module.padding_mode != "zeros":
        raise builder.unsupported(f"no relevance rule with padding_mode={module.padding_mode!r}")
    weight, bias = _module_path(builder, module, "weight"), _module_path(builder, module, "bias")
    assert weight is not None
    return _convolve(
        builder, len(module.kernel_size), x, weight, bias,
        module.stride, module.padding, module.dilation, module.groups, module.kernel_size,
    )  # fmt: skip


def _convolution_function(dimensions: int) -> Callable[..., _Tensor]:
    def handle(
        builder: _Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> _Tensor:  # fmt: skip
        path = _parameter_path(builder, weight)
        assert path is not None
        return _convolve(
            builder, dimensions, input, path, _parameter_path(builder, bias), stride, padding, dilation, groups, None
        )

    return handle


def _linear_module(builder: _Builder, module: nn.Linear, input: _Tensor) -> _Tensor:
    weight = _module_path(builder, module, "weight")
    assert weight is not None
    return builder.add(Dense(weight, _module_path(builder, module, "bias"), None), (input,))


def _linear_function(builder: _Builder, input: _Tensor, weight: Any, bias: Any = None) -> _Tensor:
    path = _parameter_path(builder, weight)
    assert path is not None
    return builder.add(Dense(path, _parameter_path(builder, bias), None), (input,))


def _batch_norm_module(builder: _Builder, module: Any, input: _Tensor) -> _Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return _normalise(builder, input, [_module_path(builder, module, name) for name in names], module.eps)


def _normalise(builder: _Builder, x: _Tensor, paths: list[str | None], eps: float) -> _Tensor:
    mean, variance, weight, bias = paths
    if mean is None or variance is None:
        raise builder.unsupported("no running statistics, and a batch's own have no relevance rule")
    return builder.add(BatchNorm(mean, variance, weight, bias, eps), (x,))


def _batch_norm_function(
    builder: _Builder, input: _Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = None, eps: float = 1e-5,
) -> _Tensor:  # fmt: skip
    builder.constant(training, "training", False)
    paths = [_parameter_path(builder, value) for value in (running_mean, running_var, weight, bias)]
    return _normalise(builder, input, paths, eps)


def _relu(builder: _Builder, input: _Tensor, inplace: bool = False) -> _Tensor:
    after = builder.add(ReLU(), (input,))
    return builder.overwrite(input, after) if inplace else after


def _relu_in_place(builder: _Builder, input: _Tensor) -> _Tensor:
    return _relu(builder, input, inplace=True)


def _relu_module(builder: _Builder, module: nn.ReLU, input: _Tensor) -> _Tensor:
    return _relu(builder, input, module.inplace)


def _identity(builder: _Builder, input: _Tensor) -> _Tensor:
    return builder.live(input)


def _alias(builder: _Builder, input: _Tensor, *, memory_format: Any = None) -> _Tensor:
    """The same values in the same memory or in a copy, as it happens."""
    return builder.tensor(builder.live(input).step, input.memory)


def _copy(builder: _Builder, input: _Tensor, *, memory_format: Any = None) -> _Tensor:
    return builder.tensor(builder.live(input).step, object())


def _identity_module(builder: _Builder, module: nn.Module, input: _Tensor) -> _Tensor:
    return builder.live(input)


def _dropout(
    builder: _Builder, input: _Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> _Tensor:
    builder.constant(training, "training", False)
    return builder.live(input)


def _add(builder: _Builder, first: Any, second: Any = None, *, other: Any = None, alpha: float = 1) -> Any:
    second = other if second is None else second
    if isinstance(first, (Size, SizeExpression)) or isinstance(second, (Size, SizeExpression)):
        return _arithmetic(operator.add)(builder, first, second)
    builder.constant(alpha, "alpha", 1)
    # sum([...]) starts with a plain 0
    if not isinstance(second, _Tensor) and second == 0:
        return _copy(builder, first)
    if not isinstance(first, _Tensor) and first == 0:
        return _copy(builder, second)
    return builder.add(Merge(1, "identity", False), (first, second))


def _add_in_place(builder: _Builder, first: Any, second: Any = None, **keywords: Any) -> Any:
    after = _add(builder, first, second, **keywords)
    return builder.overwrite(first, after) if isinstance(first, _Tensor) else after


# Pools --------------------------------------------------------------------------------------------------------------


def _max_pool(dimensions: int) -> Callable[..., _Tensor]:
    def handle(
        builder: _Builder, input: _Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> _Tensor:  # fmt: skip
        builder.constant(return_indices, "return_indices", False)
        stride = kernel_size if stride is None or stride == () else stride
        kernel, steps, pad, spread = (_tuple(value, dimensions) for value in (kernel_size, stride, padding, dilation))
        return builder.add(MaxPool(kernel, steps, pad, spread, bool(ceil_mode)), (input,))

    return handle


def _average_pool(dimensions: int) -> Callable[..., _Tensor]:
    def handle(
        builder: _Builder, input: _Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> _Tensor:  # fmt: skip
        stride = kernel_size if stride is None or stride == () else stride
        kernel, steps, pad = (_tuple(value, dimensions) for value in (kernel_size, stride, padding))
        layer = AveragePool(kernel, steps, pad, bool(ceil_mode), bool(count_include_pad), divisor_override)
        return builder.add(layer, (input,))

    return handle


def _pool_module(handle: Callable[..., _Tensor], *names: str) -> Callable[..., _Tensor]:
    def from_module(builder: _Builder, module: nn.Module, input: _Tensor) -> _Tensor:
        return handle(builder, input, **{name: getattr(module, name) for name in names})

    return from_module


def _adaptive_pool(layer: type[AdaptiveAveragePool] | type[AdaptiveMaxPool], dimensions: int) -> Callable[..., _Tensor]:
    def handle(builder: _Builder, input: _Tensor, output_size: Any, return_indices: bool = False) -> _Tensor:
        builder.constant(return_indices, "return_indices", False)
        return builder.add(layer(_tuple(output_size, dimensions)), (input,))

    return handle


def _mean(builder: _Builder, input: _Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> _Tensor:
    builder.constant(dtype, "dtype", None)
    if dim is None:
        raise builder.unsupported("no relevance rule over all dimensions")
    return builder.add(Mean(dim if isinstance(dim, tuple) else (dim,), bool(keepdim)), (input,))


# Shapes -------------------------------------------------------------------------------------------------------------


def _flatten(builder: _Builder, input: _Tensor, start_dim: int = 0, end_dim: int = -1) -> _Tensor:
    return builder.add(Reshape("flatten", (start_dim, end_dim)), (input,))


def _flatten_module(builder: _Builder, module: nn.Flatten, input: _Tensor) -> _Tensor:
    return _flatten(builder, input, module.start_dim, module.end_dim)


def _reshape(builder: _Builder, input: _Tensor, *lengths: Any, shape: Any = None) -> _Tensor:
    lengths = lengths if shape is None else (shape,)
    if any(isinstance(length, torch.dtype) for length in lengths):
        raise builder.unsupported("no relevance rule with another dtype")
    return builder.add(Reshape("reshape", lengths), (input,))


def _squeeze(builder: _Builder, input: _Tensor, *dimensions: Any, dim: Any = None) -> _Tensor:
    chosen = dimensions if dim is None else (dim,)
    return builder.add(Reshape("squeeze", chosen), (input,))


def _unsqueeze(builder: _Builder, input: _Tensor, dim: int) -> _Tensor:
    return builder.add(Reshape("unsqueeze", (dim,)), (input,))


def _pad(builder: _Builder, input: _Tensor, pad: Any, mode: str = "constant", value: Any = None) -> _Tensor:
    builder.constant(mode, "mode", "constant")
    builder.constant(value or 0, "value", 0)
    return builder.add(Pad(pad), (input,))


def _pad_module(builder: _Builder, module: Any, input: _Tensor) -> _Tensor:
    return _pad(builder, input, tuple(module.padding), value=module.value)


def _get_item(builder: _Builder, value: Any, index: Any) -> Any:
    if isinstance(value, (Size, SizeExpression)):
        return SizeExpression(operator.getitem, (value, index))
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(item, (slice, int)) or item is Ellipsis for item in index):
        raise builder.unsupported(f"no relevance rule for the index {index!r}")
    return builder.add(Slice(index), (value,), "slice", f"{builder.path}.slice".lstrip("."))


def _size(builder: _Builder, value: _Tensor, dim: int | None = None) -> Size | SizeExpression:
    shape = Size(builder.live(value).step)
    return shape if dim is None else SizeExpression(operator.getitem, (shape, dim))


def _get_attribute(builder: _Builder, value: Any, name: str) -> Any:
    if name == "shape" and isinstance(value, _Tensor):
        return _size(builder, value)
    if name in ("ndim", "dtype", "device", "is_cuda"):
        return _Ignored()
    raise builder.unsupported(f"no relevance rule for the attribute {name!r}")


def _ignore(builder: _Builder, *_: Any, **__: Any) -> _Ignored:
    return _Ignored()


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def handle(builder: _Builder, first: Any, second: Any) -> Any:
        lengths = [isinstance(value, (Size, SizeExpression)) for value in (first, second)]
        if not any(lengths) or any(isinstance(value, _Tensor) for value in (first, second)):
            raise builder.unsupported()
        return SizeExpression(function, (first, second))

    return handle


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_MODULE_LAYERS = (Linear, MaxPool, AdaptiveMaxPool, AveragePool, AdaptiveAveragePool, ReLU, BatchNorm)
_MAX_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_NAMES = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

_FROZEN_BATCH_NORMS = (
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
)
"""Classes with a batch norm's attributes, by name, for their packages are not imported here."""

_MODULES: dict[type, Callable[..., Any]] = {
    nn.Linear: _linear_module,
    nn.ReLU: _relu_module,
    nn.Identity: _identity_module,
    nn.Flatten: _flatten_module,
    **dict.fromkeys(_CONVOLUTIONS, _convolution_module),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm_module),
    **dict.fromkeys(_DROPOUTS, _identity_module),
    **dict.fromkeys(_PADS, _pad_module),
    nn.MaxPool1d: _pool_module(_max_pool(1), *_MAX_NAMES),
    nn.MaxPool2d: _pool_module(_max_pool(2), *_MAX_NAMES),
    nn.MaxPool3d: _pool_module(_max_pool(3), *_MAX_NAMES),
    nn.AvgPool1d: _pool_module(_average_pool(1), *_AVERAGE_NAMES),
    nn.AvgPool2d: _pool_module(_average_pool(2), *_AVERAGE_NAMES, "divisor_override"),
    nn.AvgPool3d: _pool_module(_average_pool(3), *_AVERAGE_NAMES, "divisor_override"),
    nn.AdaptiveAvgPool1d: _pool_module(_adaptive_pool(AdaptiveAveragePool, 1), "output_size"),
    nn.AdaptiveAvgPool2d: _pool_module(_adaptive_pool(AdaptiveAveragePool, 2), "output_size"),
    nn.AdaptiveAvgPool3d: _pool_module(_adaptive_pool(AdaptiveAveragePool, 3), "output_size"),
    nn.AdaptiveMaxPool1d: _pool_module(_adaptive_pool(AdaptiveMaxPool, 1), "output_size", "return_indices"),
    nn.AdaptiveMaxPool2d: _pool_module(_adaptive_pool(AdaptiveMaxPool, 2), "output_size", "return_indices"),
    nn.AdaptiveMaxPool3d: _pool_module(_adaptive_pool(AdaptiveMaxPool, 3), "output_size", "return_indices"),
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{f: _convolution_function(1) for f in (F.conv1d, torch.conv1d)},
    **{f: _convolution_function(2) for f in (F.conv2d, torch.conv2d)},
    **{f: _convolution_function(3) for f in (F.conv3d, torch.conv3d)},
    F.linear: _linear_function,
    F.batch_norm: _batch_norm_function,
    **dict.fromkeys((torch.relu, F.relu), _relu),
    **dict.fromkeys((torch.relu_, F.relu_), _relu_in_place),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
    **dict.fromkeys((operator.add, torch.add), _add),
    operator.iadd: _add_in_place,
    **{f: _max_pool(1) for f in (F.max_pool1d, torch.max_pool1d)},
    **{f: _max_pool(2) for f in (F.max_pool2d, torch.max_pool2d)},
    **{f: _max_pool(3) for f in (F.max_pool3d, torch.max_pool3d)},
    F.avg_pool1d: _average_pool(1),
    F.avg_pool2d: _average_pool(2),
    F.avg_pool3d: _average_pool(3),
    **{f: _adaptive_pool(AdaptiveAveragePool, 1) for f in (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)},
    F.adaptive_avg_pool2d: _adaptive_pool(AdaptiveAveragePool, 2),
    F.adaptive_avg_pool3d: _adaptive_pool(AdaptiveAveragePool, 3),
    **{f: _adaptive_pool(AdaptiveMaxPool, 1) for f in (F.adaptive_max_pool1d, torch.adaptive_max_pool1d)},
    F.adaptive_max_pool2d: _adaptive_pool(AdaptiveMaxPool, 2),
    F.adaptive_max_pool3d: _adaptive_pool(AdaptiveMaxPool, 3),
    torch.clone: _copy,
    torch.mean: _mean,
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    F.pad: _pad,
    operator.getitem: _get_item,
    getattr: _get_attribute,
    **dict.fromkeys((operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge), _ignore),
    **dict.fromkeys((torch._assert, torch.fx._symbolic_trace._assert_is_none), _ignore),
    **{f: _arithmetic(f) for f in (operator.sub, operator.mul, operator.floordiv)},
}

_METHODS: dict[str, Callable[..., Any]] = {
    "relu": _relu,
    "relu_": _relu_in_place,
    "add": _add,
    "add_": _add_in_place,
    "mean": _mean,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "contiguous": _alias,
    "clone": _copy,
    "detach": _identity,
    "size": _size,
    "dim": _ignore,
}


# Whole plan -----------------------------------------------------------------------------------------------------------


def _finish(steps: list[Step], output: int, names: Mapping[str, int]) -> Plan:
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
    leaves = _leaves(tuple(getattr(step.layer, field.name) for field in fields(step.layer)))
    yield from (value.step for value in leaves if isinstance(value, Size))


def _leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, slices and expressions."""
    if isinstance(value, SizeExpression):
        value = value.arguments
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


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


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value
