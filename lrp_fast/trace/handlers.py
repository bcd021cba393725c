"""A handler for each operation that has a relevance rule: it adds the operation's layers to the plan.

Each takes the builder, then what the operation is called with (a module's handler the module and its input).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lrp_fast.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
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
from lrp_fast.trace.builder import Builder, Ignored, TracedParameter, TracedTensor


def _tuple(value: Any, dimensions: int) -> Any:
    if isinstance(value, tuple):
        return value * dimensions if len(value) == 1 else value
    part_of_shape = isinstance(value, SizeExpression) and isinstance(value.arguments[-1], slice)
    return value if part_of_shape or isinstance(value, Size) else (value,) * dimensions


def _parameter_path(builder: Builder, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, TracedParameter):
        raise builder.unsupported("weights that are computed from others")
    return builder.parameter(value.path)


def _module_path(builder: Builder, module: nn.Module, name: str) -> str | None:
    return None if getattr(module, name) is None else builder.parameter(f"{builder.path}.{name}")


def _convolve(
    builder: Builder, dimensions: int, x: TracedTensor, weight: str, bias: str | None,
    stride: Any, padding: Any, dilation: Any, groups: int,
) -> TracedTensor:  # fmt: skip
    kernel = tuple(operator.attrgetter(weight)(builder.model).shape[2:])
    stride, extra = _tuple(stride, dimensions), (0,) * dimensions
    # Where a kernel has one element a dilation means nothing, and torch's convolutions of images die of some.
    dilation = tuple(d if k > 1 else 1 for d, k in zip(_tuple(dilation, dimensions), kernel, strict=True))
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding, extra = tuple(total // 2 for total in totals), tuple(total % 2 for total in totals)
    layer = Convolution(weight, bias, None, stride, _tuple(padding, dimensions), dilation, groups, extra)
    return builder.add(layer, (x,))


def _convolution_module(builder: Builder, module: Any, x: TracedTensor) -> TracedTensor:
    if module.padding_mode != "zeros":
        raise builder.unsupported(f"no relevance rule with padding_mode={module.padding_mode!r}")
    weight, bias = _module_path(builder, module, "weight"), _module_path(builder, module, "bias")
    assert weight is not None
    return _convolve(
        builder, len(module.kernel_size), x, weight, bias,
        module.stride, module.padding, module.dilation, module.groups,
    )  # fmt: skip


def _convolution_function(dimensions: int) -> Callable[..., TracedTensor]:
    def handle(
        builder: Builder, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> TracedTensor:  # fmt: skip
        path = _parameter_path(builder, weight)
        assert path is not None
        return _convolve(
            builder, dimensions, input, path, _parameter_path(builder, bias), stride, padding, dilation, groups
        )

    return handle


def _linear_module(builder: Builder, module: nn.Linear, input: TracedTensor) -> TracedTensor:
    weight = _module_path(builder, module, "weight")
    assert weight is not None
    return builder.add(Dense(weight, _module_path(builder, module, "bias"), None), (input,))


def _linear_function(builder: Builder, input: TracedTensor, weight: Any, bias: Any = None) -> TracedTensor:
    path = _parameter_path(builder, weight)
    assert path is not None
    return builder.add(Dense(path, _parameter_path(builder, bias), None), (input,))


def _batch_norm_module(builder: Builder, module: Any, input: TracedTensor) -> TracedTensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return _normalise(builder, input, [_module_path(builder, module, name) for name in names], module.eps)


def _normalise(builder: Builder, x: TracedTensor, paths: list[str | None], eps: float) -> TracedTensor:
    mean, variance, weight, bias = paths
    if mean is None or variance is None:
        raise builder.unsupported("no running statistics, and a batch's own have no relevance rule")
    return builder.add(BatchNorm(mean, variance, weight, bias, eps), (x,))


def _batch_norm_function(
    builder: Builder, input: TracedTensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = None, eps: float = 1e-5,
) -> TracedTensor:  # fmt: skip
    builder.constant(training, "training", False)
    paths = [_parameter_path(builder, value) for value in (running_mean, running_var, weight, bias)]
    return _normalise(builder, input, paths, eps)


def _relu(builder: Builder, input: TracedTensor, inplace: bool = False) -> TracedTensor:
    after = builder.add(ReLU(), (input,))
    return builder.overwrite(input, after) if inplace else after


def _relu_in_place(builder: Builder, input: TracedTensor) -> TracedTensor:
    return _relu(builder, input, inplace=True)


def _relu_module(builder: Builder, module: nn.ReLU, input: TracedTensor) -> TracedTensor:
    return _relu(builder, input, module.inplace)


def _identity(builder: Builder, input: TracedTensor) -> TracedTensor:
    return builder.live(input)


def _alias(builder: Builder, input: TracedTensor, *, memory_format: Any = None) -> TracedTensor:
    """The same values in the same memory or in a copy, as it happens."""
    return builder.tensor(builder.live(input).step, input.memory)


def _copy(builder: Builder, input: TracedTensor, *, memory_format: Any = None) -> TracedTensor:
    return builder.tensor(builder.live(input).step, object())


def _identity_module(builder: Builder, module: nn.Module, input: TracedTensor) -> TracedTensor:
    return builder.live(input)


def _dropout(
    builder: Builder, input: TracedTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> TracedTensor:
    builder.constant(training, "training", False)
    return builder.live(input)


def _add(builder: Builder, first: Any, second: Any = None, *, other: Any = None, alpha: float = 1) -> Any:
    second = other if second is None else second
    if isinstance(first, (Size, SizeExpression)) or isinstance(second, (Size, SizeExpression)):
        return _arithmetic(operator.add)(builder, first, second)
    builder.constant(alpha, "alpha", 1)
    # sum([...]) starts with a plain 0
    if not isinstance(second, TracedTensor) and second == 0:
        return _copy(builder, first)
    if not isinstance(first, TracedTensor) and first == 0:
        return _copy(builder, second)
    return builder.add(Merge(1, "identity", False), (first, second))


def _add_in_place(builder: Builder, first: Any, second: Any = None, **keywords: Any) -> Any:
    after = _add(builder, first, second, **keywords)
    return builder.overwrite(first, after) if isinstance(first, TracedTensor) else after


# Pools --------------------------------------------------------------------------------------------------------------


def _max_pool(dimensions: int) -> Callable[..., TracedTensor]:
    def handle(
        builder: Builder, input: TracedTensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> TracedTensor:  # fmt: skip
        builder.constant(return_indices, "return_indices", False)
        stride = kernel_size if stride is None or stride == () else stride
        kernel, steps, pad, spread = (_tuple(value, dimensions) for value in (kernel_size, stride, padding, dilation))
        return builder.add(MaxPool(kernel, steps, pad, spread, bool(ceil_mode)), (input,))

    return handle


def _average_pool(dimensions: int) -> Callable[..., TracedTensor]:
    def handle(
        builder: Builder, input: TracedTensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> TracedTensor:  # fmt: skip
        stride = kernel_size if stride is None or stride == () else stride
        kernel, steps, pad = (_tuple(value, dimensions) for value in (kernel_size, stride, padding))
        layer = AveragePool(kernel, steps, pad, bool(ceil_mode), bool(count_include_pad), divisor_override)
        return builder.add(layer, (input,))

    return handle


def _pool_module(handle: Callable[..., TracedTensor], *names: str) -> Callable[..., TracedTensor]:
    def from_module(builder: Builder, module: nn.Module, input: TracedTensor) -> TracedTensor:
        return handle(builder, input, **{name: getattr(module, name) for name in names})

    return from_module


def _adaptive_pool(
    layer: type[AdaptiveAveragePool] | type[AdaptiveMaxPool], dimensions: int
) -> Callable[..., TracedTensor]:
    def handle(builder: Builder, input: TracedTensor, output_size: Any, return_indices: bool = False) -> TracedTensor:
        builder.constant(return_indices, "return_indices", False)
        return builder.add(layer(_tuple(output_size, dimensions)), (input,))

    return handle


def _mean(
    builder: Builder, input: TracedTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> TracedTensor:
    builder.constant(dtype, "dtype", None)
    if dim is None:
        raise builder.unsupported("no relevance rule over all dimensions")
    return builder.add(Mean(dim if isinstance(dim, tuple) else (dim,), bool(keepdim)), (input,))


# Shapes -------------------------------------------------------------------------------------------------------------


def _flatten(builder: Builder, input: TracedTensor, start_dim: int = 0, end_dim: int = -1) -> TracedTensor:
    return builder.add(Reshape("flatten", (start_dim, end_dim)), (input,))


def _flatten_module(builder: Builder, module: nn.Flatten, input: TracedTensor) -> TracedTensor:
    return _flatten(builder, input, module.start_dim, module.end_dim)


def _reshape(builder: Builder, input: TracedTensor, *lengths: Any, shape: Any = None) -> TracedTensor:
    lengths = lengths if shape is None else (shape,)
    if any(isinstance(length, torch.dtype) for length in lengths):
        raise builder.unsupported("no relevance rule with another dtype")
    return builder.add(Reshape("reshape", lengths), (input,))


def _squeeze(builder: Builder, input: TracedTensor, *dimensions: Any, dim: Any = None) -> TracedTensor:
    chosen = dimensions if dim is None else (dim,)
    return builder.add(Reshape("squeeze", chosen), (input,))


def _unsqueeze(builder: Builder, input: TracedTensor, dim: int) -> TracedTensor:
    return builder.add(Reshape("unsqueeze", (dim,)), (input,))


def _pad(builder: Builder, input: TracedTensor, pad: Any, mode: str = "constant", value: Any = None) -> TracedTensor:
    builder.constant(mode, "mode", "constant")
    builder.constant(value or 0, "value", 0)
    return builder.add(Pad(pad), (input,))


def _pad_module(builder: Builder, module: Any, input: TracedTensor) -> TracedTensor:
    return _pad(builder, input, tuple(module.padding), value=module.value)


def _get_item(builder: Builder, value: Any, index: Any) -> Any:
    if isinstance(value, (Size, SizeExpression)):
        return SizeExpression(operator.getitem, (value, index))
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(item, (slice, int)) or item is Ellipsis for item in index):
        raise builder.unsupported(f"no relevance rule for the index {index!r}")
    return builder.add(Slice(index), (value,), "slice", f"{builder.path}.slice".lstrip("."))


def _size(builder: Builder, value: TracedTensor, dim: int | None = None) -> Size | SizeExpression:
    shape = Size(builder.live(value).step)
    return shape if dim is None else SizeExpression(operator.getitem, (shape, dim))


def _get_attribute(builder: Builder, value: Any, name: str) -> Any:
    if name == "shape" and isinstance(value, TracedTensor):
        return _size(builder, value)
    if name in ("ndim", "dtype", "device", "is_cuda"):
        return Ignored()
    raise builder.unsupported(f"no relevance rule for the attribute {name!r}")


def ignore(builder: Builder, *_: Any, **__: Any) -> Ignored:
    return Ignored()


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def handle(builder: Builder, first: Any, second: Any) -> Any:
        lengths = [isinstance(value, (Size, SizeExpression)) for value in (first, second)]
        if not any(lengths) or any(isinstance(value, TracedTensor) for value in (first, second)):
            raise builder.unsupported()
        return SizeExpression(function, (first, second))

    return handle


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
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

FUNCTIONS: dict[Any, Callable[..., Any]] = {
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
    **dict.fromkeys((operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge), ignore),
    **dict.fromkeys((torch._assert, torch.fx._symbolic_trace._assert_is_none), ignore),
    **{f: _arithmetic(f) for f in (operator.sub, operator.mul, operator.floordiv)},
}

METHODS: dict[str, Callable[..., Any]] = {
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
    "dim": ignore,
}


def module_handler(module: nn.Module) -> Callable[..., Any] | None:
    """The handler of a module that is one operation, if it has one."""
    kind = type(module)
    frozen = (kind.__module__, kind.__name__) in _FROZEN_BATCH_NORMS
    return _batch_norm_module if frozen else _MODULES.get(kind)
