"""From ``nn.Module`` to :class:`~lrp_fast.plan.Plan`, by torch.fx.

The graph is read node by node, in execution order, by one handler for each operation that has a relevance rule; anything
else is a :class:`~lrp_fast.plan.TraceError`. Changes in place are followed: whoever reads a tensor after it was changed
reads the changed value, as in the model.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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

SUPPORTED = (
    "convolution (1-D to 3-D, grouped, dilated), linear, batch norm right after one of these, ReLU, max / average / "
    "adaptive pooling, mean over space, flatten / view / reshape / squeeze, zero padding, slicing, dropout and identity "
    "in eval mode, and the addition of two branches"
)


class _Value(int):
    """The index of a step: a tensor of the network, as told from plain numbers."""


@dataclass(frozen=True)
class _Shape:
    """What ``x.size()`` or ``x.shape`` stands for while tracing."""

    step: int


@dataclass(frozen=True)
class _Parameter:
    """A parameter or buffer, by its path."""

    path: str


@dataclass(frozen=True)
class _Ignored:
    """A value only assertions read."""


class _Tracer(torch.fx.Tracer):
    """Records leaf modules and functions; calls ``forward`` itself, so that the user's hooks see nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.module_outputs: dict[str, list[torch.fx.Node]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _MODULES or _is_frozen_batch_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(m)
        output = super().call_module(m, m.forward, args, kwargs)
        if isinstance(output, torch.fx.Proxy):
            self.module_outputs.setdefault(path, []).append(output.node)
        return output


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    # torchvision's and detectron2's are separate classes of one name and one layout.
    return type(module).__name__ == "FrozenBatchNorm2d"


def trace(model: nn.Module) -> Plan:
    """The plan of a model in eval mode; the model is left as it was.

    Raises ``TypeError`` if it is no module and :class:`TraceError` where it is in training mode, cannot be traced, or
    holds an operation without a relevance rule (the text names its module path and what is supported).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_eval(model)
    hooked = [name or "the model" for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        warnings.warn(
            f"forward hooks at {', '.join(hooked[:5])} are not run and not part of the explanation", stacklevel=3
        )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model, _constant_arguments(model))
    except TraceError:
        raise
    except Exception as error:  # whatever the user's forward raises when its input is a proxy
        raise TraceError(
            f"{type(model).__name__}.forward cannot be traced by torch.fx: {error}. Supported: a forward(x) of one "
            f"tensor whose control flow does not depend on values or shapes, made of {SUPPORTED}"
        ) from error
    return _Builder(model, tracer.module_outputs).build(graph)


def check_eval(model: nn.Module) -> None:
    """Raise :class:`TraceError` if any module of the model is in training mode."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise TraceError(
            f"the model is in training mode ({', '.join(training[:5])}{', ...' if len(training) > 5 else ''}): "
            "call model.eval() first"
        )


def _constant_arguments(model: nn.Module) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    if len(needed) != 1 or plain[0].name != needed[0] or len(plain) < len(parameters):
        raise TraceError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)}: expected one tensor and, after it, only "
            "arguments with defaults"
        )
    return {p.name: p.default for p in plain[1:]}


class _Builder:
    """Reads an fx graph into steps."""

    def __init__(self, model: nn.Module, module_outputs: Mapping[str, list[torch.fx.Node]]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.module_outputs = module_outputs
        self.values: dict[torch.fx.Node, Any] = {}
        self.originals: dict[torch.fx.Node, int] = {}
        self.steps: list[Step] = []
        self.storage: list[int] = []
        self.stale: set[int] = set()
        self.node: torch.fx.Node | None = None

    def build(self, graph: torch.fx.Graph) -> Plan:
        output = None
        for node in graph.nodes:
            self.node = node
            if node.op == "output":
                output = self.step_of(node.args[0])
            else:
                self.values[node] = self._value(node)
                if isinstance(self.values[node], _Value):
                    self.originals[node] = self.values[node]
        if output is None:
            raise TraceError(f"{type(self.model).__name__}.forward returns nothing")
        return _finish(self.steps, output, self._names())

    def _names(self) -> dict[str, int]:
        names = {step.name: index for index, step in enumerate(self.steps)}
        for path, nodes in self.module_outputs.items():
            steps = [self.originals[node] for node in nodes if node in self.originals]
            if steps:
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
            handler = _frozen_batch_norm if _is_frozen_batch_norm(module) else _MODULES.get(type(module))
            if handler is None:
                raise self.unsupported()
            return handler(self, module, *args, **kwargs)
        table: Mapping[Any, Callable[..., Any]] = _FUNCTIONS if node.op == "call_function" else _METHODS
        handler = table.get(node.target)
        if handler is None:
            raise self.unsupported()
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

    def step_of(self, node: Any) -> _Value:
        value = self.values.get(node) if isinstance(node, torch.fx.Node) else None
        if not isinstance(value, _Value):
            raise TraceError(f"{type(self.model).__name__}.forward must return one tensor of logits, got {node}")
        return self.live(value)

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

    def live(self, step: Any) -> _Value:
        """``step``, checked to be a tensor of the network that nobody changed behind its back."""
        if not isinstance(step, _Value):
            raise self.unsupported(f"no relevance rule for an operand that is {_describe(step)}")
        if step in self.stale:
            raise self.unsupported(f"an operand ({self.steps[step].name}) whose memory was changed in place meanwhile")
        return step

    def add(self, layer: Layer, inputs: tuple[Any, ...], operation: str = "", name: str = "") -> _Value:
        """Append a step and give its index."""
        sources = tuple(self.live(step) for step in inputs)
        nonnegative = isinstance(layer, ReLU) or (
            bool(sources)
            and not isinstance(layer, (Linear, BatchNorm))
            and all(self.steps[step].nonnegative for step in sources)
        )
        is_module = self.node is not None and self.node.op == "call_module" and isinstance(layer, _MODULE_LAYERS)
        module_type = type(self.modules[self.path]) if is_module else None
        step = Step(self._unique(name or self._name()), operation or self.operation, layer, sources, nonnegative, module_type)
        self.steps.append(step)
        is_view = isinstance(layer, (Reshape, Slice))
        self.storage.append(self.storage[sources[0]] if is_view else len(self.steps) - 1)
        return _Value(len(self.steps) - 1)

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

    def changed(self, before: _Value, after: _Value) -> _Value:
        """Note that ``after`` was written into the memory of ``before``."""
        root = self.storage[before]
        self.storage[after] = root
        self.stale.update(
            step for step, storage in enumerate(self.storage) if storage == root and step not in (before, after)
        )
        for node, value in self.values.items():
            if isinstance(value, _Value) and value == before:
                self.values[node] = after
        return after

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


def _tuple(value: Any, dimensions: int) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value * dimensions if len(value) == 1 else value
    return (value,) * dimensions


def _parameter_path(builder: _Builder, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, _Parameter):
        raise builder.unsupported("weights that are computed from others")
    return value.path


def _module_path(builder: _Builder, module: nn.Module, name: str) -> str | None:
    return None if getattr(module, name) is None else f"{builder.path}.{name}".lstrip(".")


def _convolve(
    builder: _Builder, dimensions: int, x: _Value, weight: str, bias: str | None,
    stride: Any, padding: Any, dilation: Any, groups: int, kernel: tuple[int, ...] | None,
) -> _Value:  # fmt: skip
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
            x = builder.add(Pad(extra), (x,), "pad", f"{builder.path}.pad")
    layer = Convolution(weight, bias, None, stride, _tuple(padding, dimensions), dilation, groups)
    return builder.add(layer, (x,))


def _convolution_module(builder: _Builder, module: Any, x: _Value) -> _Value:
    if module.padding_mode != "zeros":
        raise builder.unsupported(f"no relevance rule with padding_mode={module.padding_mode!r}")
    weight, bias = f"{builder.path}.weight".lstrip("."), _module_path(builder, module, "bias")
    return _convolve(
        builder, len(module.kernel_size), x, weight, bias,
        module.stride, module.padding, module.dilation, module.groups, module.kernel_size,
    )  # fmt: skip


def _convolution_function(dimensions: int) -> Callable[..., _Value]:
    def handle(
        builder: _Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> _Value:  # fmt: skip
        path = _parameter_path(builder, weight)
        assert path is not None
        return _convolve(
            builder, dimensions, input, path, _parameter_path(builder, bias), stride, padding, dilation, groups, None
        )

    return handle


def _linear_module(builder: _Builder, module: nn.Linear, input: _Value) -> _Value:
    weight = f"{builder.path}.weight".lstrip(".")
    return builder.add(Dense(weight, _module_path(builder, module, "bias"), None), (input,))


def _linear_function(builder: _Builder, input: _Value, weight: Any, bias: Any = None) -> _Value:
    path = _parameter_path(builder, weight)
    assert path is not None
    return builder.add(Dense(path, _parameter_path(builder, bias), None), (input,))


def _batch_norm_module(builder: _Builder, module: Any, input: _Value) -> _Value:
    if module.running_mean is None or module.running_var is None:
        raise builder.unsupported("no running statistics, and a batch's own have no relevance rule")
    return builder.add(_norm(builder, module, module.eps), (input,))


def _frozen_batch_norm(builder: _Builder, module: Any, x: _Value) -> _Value:
    # detectron2 keeps eps as an attribute too
    return builder.add(_norm(builder, module, module.eps), (x,))


def _norm(builder: _Builder, module: Any, eps: float) -> BatchNorm:
    path = f"{builder.path}.".lstrip(".")
    weight, bias = _module_path(builder, module, "weight"), _module_path(builder, module, "bias")
    return BatchNorm(f"{path}running_mean", f"{path}running_var", weight, bias, eps)


def _batch_norm_function(
    builder: _Builder, input: _Value, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = None, eps: float = 1e-5, *_: Any,
) -> _Value:  # fmt: skip
    builder.constant(training, "training", False)
    mean, variance = _parameter_path(builder, running_mean), _parameter_path(builder, running_var)
    if mean is None or variance is None:
        raise builder.unsupported("no running statistics, and a batch's own have no relevance rule")
    norm = BatchNorm(mean, variance, _parameter_path(builder, weight), _parameter_path(builder, bias), eps)
    return builder.add(norm, (input,))


def _relu(builder: _Builder, input: _Value, inplace: bool = False) -> _Value:
    after = builder.add(ReLU(), (input,))
    return builder.changed(input, after) if inplace else after


def _relu_in_place(builder: _Builder, input: _Value) -> _Value:
    return _relu(builder, input, inplace=True)


def _relu_module(builder: _Builder, module: nn.ReLU, input: _Value) -> _Value:
    return _relu(builder, input, module.inplace)


def _identity(builder: _Builder, input: _Value, *_: Any, **__: Any) -> _Value:
    return builder.live(input)


def _identity_module(builder: _Builder, module: nn.Module, input: _Value) -> _Value:
    return builder.live(input)


def _dropout(builder: _Builder, input: _Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Value:
    builder.constant(training, "training", False)
    return builder.live(input)


def _add(builder: _Builder, first: Any, second: Any = None, *, other: Any = None, alpha: float = 1) -> Any:
    second = other if second is None else second
    if isinstance(first, (_Ignored, Size, SizeExpression)) or isinstance(second, (_Ignored, Size, SizeExpression)):
        return _arithmetic(operator.add)(builder, first, second)
    builder.constant(alpha, "alpha", 1)
    # sum([...]) starts with a plain 0
    if not isinstance(second, _Value) and second == 0:
        return builder.live(first)
    if not isinstance(first, _Value) and first == 0:
        return builder.live(second)
    return builder.add(Merge(1, "identity", False), (first, second))


def _add_in_place(builder: _Builder, first: Any, second: Any = None, **keywords: Any) -> Any:
    after = _add(builder, first, second, **keywords)
    return builder.changed(first, after) if isinstance(first, _Value) and after != first else after


# Pools --------------------------------------------------------------------------------------------------------------


def _max_pool(dimensions: int) -> Callable[..., _Value]:
    def handle(
        builder: _Builder, input: _Value, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> _Value:  # fmt: skip
        builder.constant(return_indices, "return_indices", False)
        stride = kernel_size if stride is None or stride == () else stride
        geometry = (_tuple(value, dimensions) for value in (kernel_size, stride, padding, dilation))
        return builder.add(MaxPool(*geometry, bool(ceil_mode)), (input,))

    return handle


def _average_pool(dimensions: int) -> Callable[..., _Value]:
    def handle(
        builder: _Builder, input: _Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> _Value:  # fmt: skip
        stride = kernel_size if stride is None or stride == () else stride
        geometry = (_tuple(value, dimensions) for value in (kernel_size, stride, padding))
        layer = AveragePool(*geometry, bool(ceil_mode), bool(count_include_pad), divisor_override)
        return builder.add(layer, (input,))

    return handle


def _pool_module(handle: Callable[..., _Value], *names: str) -> Callable[..., _Value]:
    def from_module(builder: _Builder, module: nn.Module, input: _Value) -> int:
        return handle(builder, input, **{name: getattr(module, name) for name in names})

    return from_module


def _adaptive_pool(layer: type[AdaptiveAveragePool] | type[AdaptiveMaxPool], dimensions: int) -> Callable[..., _Value]:
    def handle(builder: _Builder, input: _Value, output_size: Any, return_indices: bool = False) -> _Value:
        builder.constant(return_indices, "return_indices", False)
        return builder.add(layer(_tuple(output_size, dimensions)), (input,))

    return handle


def _mean(builder: _Builder, input: _Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> _Value:
    builder.constant(dtype, "dtype", None)
    if dim is None:
        raise builder.unsupported("no relevance rule over all dimensions")
    return builder.add(Mean(dim if isinstance(dim, tuple) else (dim,), bool(keepdim)), (input,))


# Shapes -------------------------------------------------------------------------------------------------------------


def _flatten(builder: _Builder, input: _Value, start_dim: int = 0, end_dim: int = -1) -> _Value:
    return builder.add(Reshape("flatten", (start_dim, end_dim)), (input,))


def _flatten_module(builder: _Builder, module: nn.Flatten, input: _Value) -> _Value:
    return _flatten(builder, input, module.start_dim, module.end_dim)


def _reshape(builder: _Builder, input: _Value, *shape: Any, **keywords: Any) -> _Value:
    shape = keywords.get("shape", shape)
    return builder.add(Reshape("reshape", shape[0] if shape and isinstance(shape[0], tuple) else shape), (input,))


def _squeeze(builder: _Builder, input: _Value, *dimensions: Any, dim: Any = None) -> _Value:
    chosen = dimensions if dim is None else (dim,)
    return builder.add(Reshape("squeeze", chosen), (input,))


def _unsqueeze(builder: _Builder, input: _Value, dim: int) -> _Value:
    return builder.add(Reshape("unsqueeze", (dim,)), (input,))


def _pad(builder: _Builder, input: _Value, pad: Any, mode: str = "constant", value: Any = None) -> _Value:
    builder.constant(mode, "mode", "constant")
    builder.constant(value or 0, "value", 0)
    return builder.add(Pad(pad), (input,))


def _pad_module(builder: _Builder, module: Any, input: _Value) -> _Value:
    return _pad(builder, input, tuple(module.padding), value=module.value)


def _get_item(builder: _Builder, value: Any, index: Any) -> Any:
    if isinstance(value, _Shape):
        if isinstance(index, int):
            return Size(value.step, index)
        raise builder.unsupported("an index other than a number into a shape")
    if isinstance(value, _Ignored):
        return value
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(item, (slice, int)) or item is Ellipsis for item in index):
        raise builder.unsupported(f"no relevance rule for the index {index!r}")
    return builder.add(Slice(index), (value,), "slice", f"{builder.path}.slice".lstrip("."))


def _size(builder: _Builder, value: _Value, dim: int | None = None) -> _Shape | Size:
    return _Shape(builder.live(value)) if dim is None else Size(builder.live(value), dim)


def _get_attribute(builder: _Builder, value: Any, name: str) -> Any:
    if name == "shape" and isinstance(value, _Value):
        return _Shape(value)
    if name in ("ndim", "dtype", "device", "is_cuda"):
        return _Ignored()
    raise builder.unsupported(f"no relevance rule for the attribute {name!r}")


def _ignore(builder: _Builder, *_: Any, **__: Any) -> _Ignored:
    return _Ignored()


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def handle(builder: _Builder, first: Any, second: Any) -> Any:
        lengths = [isinstance(value, (Size, SizeExpression)) for value in (first, second)]
        if not any(lengths) or any(isinstance(value, _Value) for value in (first, second)):
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
    torch.mean: _mean,
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    F.pad: _pad,
    operator.getitem: _get_item,
    getattr: _get_attribute,
    **dict.fromkeys((operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge), _ignore),
    **dict.fromkeys((torch._assert, isinstance, len), _ignore),
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
    "contiguous": _identity,
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
    resized = [_renumber(step, place) for step in kept]
    final = _classify_merges(resized)
    return Plan(tuple(final), position[followers.get(output, output)], {k: v for k, v in placed.items() if v is not None})


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
    yield from step.inputs
    pending: list[Any] = [getattr(step.layer, name) for name in step.layer.__dataclass_fields__]
    while pending:
        value = pending.pop()
        if isinstance(value, Size):
            yield value.step
        elif isinstance(value, SizeExpression):
            pending.extend(value.arguments)
        elif isinstance(value, tuple):
            pending.extend(value)
        elif isinstance(value, slice):
            pending.extend((value.start, value.stop, value.step))


def _renumber(step: Step, place: Callable[[int], int | None]) -> Step:
    def moved(value: Any) -> Any:
        if isinstance(value, Size):
            return Size(place(value.step), value.dimension)  # type: ignore[arg-type]
        if isinstance(value, SizeExpression):
            return SizeExpression(value.function, moved(value.arguments))
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, slice):
            return slice(moved(value.start), moved(value.stop), moved(value.step))
        return value

    changes = {name: moved(getattr(step.layer, name)) for name in step.layer.__dataclass_fields__}
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
            kind = "projection" if counts[skip] else "identity"
            step = replace(step, layer=Merge(skip, kind, counts[0] == counts[1]))
        result.append(step)
    return result


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def parameter_table(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors a plan's layers name, by path, detached; they share the model's memory."""
    paths: set[str] = set()
    for step in plan.steps:
        if isinstance(step.layer, Linear):
            norm = step.layer.norm
            of_norm = (norm.mean, norm.variance, norm.weight, norm.bias) if norm is not None else ()
            paths.update(path for path in (step.layer.weight, step.layer.bias, *of_norm) if path is not None)
    return {path: _attribute(model, path).detach() for path in sorted(paths)}
