"""Layers: what a step of a plan computes, as frozen data.

A layer names its parameters by their path in the model and never holds tensors; ``forward`` evaluates it exactly as
the model does. How relevance leaves it is decided by its family: linear (:class:`Convolution`, :class:`Dense`), merge,
pool, or a mere rearrangement of elements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A shape known only once there is an input: that of step ``step``'s output."""

    step: int


@dataclass(frozen=True)
class SizeExpression:
    """A length of a shape, a part of it, or arithmetic on lengths, such as ``x.size(1) // 2``."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def resolve(value: Any, shapes: Sequence[Shape]) -> Any:
    """``value`` with every :class:`Size` in it replaced by its number under these shapes."""
    if isinstance(value, Size):
        return shapes[value.step]
    if isinstance(value, SizeExpression):
        return value.function(*resolve(value.arguments, shapes))
    if isinstance(value, tuple):
        return tuple(resolve(item, shapes) for item in value)
    if isinstance(value, slice):
        return slice(*(resolve(item, shapes) for item in (value.start, value.stop, value.step)))
    return value


@dataclass(frozen=True)
class Layer(ABC):
    """What one step computes."""

    @abstractmethod
    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        """The step's output, N×…, as the model computes it."""

    def outline(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        """A tensor of the output's shape, all being on the meta device; ``RuntimeError`` and others for what does not fit."""
        return self.forward(inputs, parameters)

    def resolved(self, shapes: Sequence[Shape]) -> Layer:
        """This layer with its input-dependent lengths filled in."""
        changed = {field.name: resolve(getattr(self, field.name), shapes) for field in fields(self)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Input(Layer):
    """The network's input."""

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return inputs[0]


@dataclass(frozen=True)
class BatchNorm(Layer):
    """``γ (x − μ) / sqrt(σ² + eps) + β`` per channel, with running statistics; parameters by path."""

    mean: str
    variance: str
    weight: str | None
    bias: str | None
    eps: float

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        scale, shift = self.scale_shift(parameters)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * scale.view(shape) + shift.view(shape)

    def outline(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        channels = parameters[self.mean].shape
        if x.shape[1:2] != channels:
            raise RuntimeError(f"a batch norm of {channels.numel()} channels gets {tuple(x.shape)}")
        return x

    def scale_shift(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """The layer as ``x · scale + shift``, each of shape (channels,)."""
        scale = (parameters[self.variance] + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * parameters[self.weight]
        shift = -parameters[self.mean] * scale
        return scale, shift if self.bias is None else shift + parameters[self.bias]


@dataclass(frozen=True)
class Linear(Layer, ABC):
    """A layer linear in its input, with the batch norm that follows it, if any, as part of it."""

    weight: str
    bias: str | None
    norm: BatchNorm | None

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        y = self.before_norm(inputs[0], parameters)
        return y if self.norm is None else self.norm.forward((y,), parameters)

    def outline(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        y = self.before_norm(inputs[0], parameters)
        return y if self.norm is None else self.norm.outline((y,), parameters)

    def before_norm(self, x: Tensor, parameters: Parameters) -> Tensor:
        """What the batch norm, if there is one, gets."""
        return self.apply(x, *self.raw(parameters))

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``A(x, weight) + bias``."""

    def folded(self, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm multiplied in."""
        weight, bias = self.raw(parameters)
        if self.norm is None:
            return weight, bias
        scale, shift = self.norm.scale_shift(parameters)
        weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift

    def raw(self, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer itself."""
        return parameters[self.weight], None if self.bias is None else parameters[self.bias]


@dataclass(frozen=True)
class Convolution(Linear):
    """Convolution over 1 to 3 spatial dimensions, weight (out, in / groups, *kernel), zero padding.

    ``extra``: zeros beyond ``padding`` at the end of each dimension, as ``padding="same"`` needs them for even kernels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    extra: tuple[int, ...] = ()

    def padded(self, x: Tensor) -> Tensor:
        """``x`` with the zeros that it has at one end alone."""
        return F.pad(x, [n for amount in reversed(self.extra) for n in (0, amount)]) if any(self.extra) else x

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, none = self.padded(x), (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)


@dataclass(frozen=True)
class Dense(Linear):
    """Fully connected layer, weight (out, in)."""

    def before_norm(self, x: Tensor, parameters: Parameters) -> Tensor:
        if self.norm is not None and x.ndim != 2:
            # Elsewhere dimension 1, which a batch norm works on, is not the layer's output.
            raise RuntimeError(f"a batch norm after a linear layer needs N x features, got {tuple(x.shape)}")
        return super().before_norm(x, parameters)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class ReLU(Layer):
    """``max(x, 0)``; relevance passes as it is."""

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return inputs[0].relu()

    def outline(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return inputs[0]


@dataclass(frozen=True)
class Merge(Layer):
    """``h = F + S``: ``inputs[skip]`` is the skip S, the other one the residual branch F.

    ``kind`` says whether the skip holds linear layers; ``ambiguous`` that both branches hold equally many, so that only
    a symmetric split is defined.
    """

    skip: int
    kind: Literal["identity", "projection"]
    ambiguous: bool

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        self.outline(inputs, parameters)
        return inputs[0] + inputs[1]

    def outline(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        first, second = inputs
        if first.shape != second.shape:
            raise RuntimeError(
                f"the branches differ in shape: {tuple(first.shape)} and {tuple(second.shape)}, and an addition that "
                "broadcasts one of them has no relevance rule"
            )
        return first


@dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum over windows."""

    kernel: tuple[Any, ...]
    stride: tuple[Any, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self.with_indices(inputs[0], indices=False)[0]

    def with_indices(self, x: Tensor, indices: bool = True) -> tuple[Tensor, Tensor | None]:
        """The maxima and, if asked for, where each lies in its flattened plane (int64)."""
        check_axes(x, len(self.kernel))
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.kernel) - 1]
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        return pool(x, *geometry, return_indices=True) if indices else (pool(x, *geometry), None)


@dataclass(frozen=True)
class AdaptiveMaxPool(Layer):
    """Maximum over as many windows as the output has elements; ``None`` keeps a length."""

    size: tuple[Any, ...]

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self.with_indices(inputs[0], indices=False)[0]

    def with_indices(self, x: Tensor, indices: bool = True) -> tuple[Tensor, Tensor | None]:
        """The maxima and, if asked for, where each lies in its flattened plane (int64)."""
        check_axes(x, len(self.size))
        pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(self.size) - 1]
        size = fill_sizes(self.size, x)
        return pool(x, size, return_indices=True) if indices else (pool(x, size), None)


class Average(Layer, ABC):
    """A linear pool: every output is a weighted mean of its window, with weights that depend on the shape alone."""


@dataclass(frozen=True)
class AveragePool(Average):
    """Mean over windows."""

    kernel: tuple[Any, ...]
    stride: tuple[Any, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        check_axes(x, len(self.kernel))
        geometry = (self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        if len(self.kernel) == 1:
            return F.avg_pool1d(x, *geometry)
        if len(self.kernel) == 2:
            return F.avg_pool2d(x, *geometry, self.divisor)
        wide = x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x  # where torch has none in bfloat16
        return F.avg_pool3d(wide, *geometry, self.divisor).to(x.dtype)


@dataclass(frozen=True)
class AdaptiveAveragePool(Average):
    """Mean over as many windows as the output has elements; ``None`` keeps a length."""

    size: tuple[Any, ...]

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        check_axes(x, len(self.size))
        pools: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        return pools[len(self.size) - 1](x, fill_sizes(self.size, x))


@dataclass(frozen=True)
class Mean(Average):
    """Mean over some of the spatial dimensions (2 and up, as given or counted from the end)."""

    dimensions: tuple[int, ...]
    keepdim: bool

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        if any(dimension % x.ndim < 2 for dimension in self.dimensions):
            raise RuntimeError(f"a mean has a relevance rule over space only, got dimensions {self.dimensions}")
        return x.mean(self.dimensions, self.keepdim)


@dataclass(frozen=True)
class Reshape(Layer):
    """Flatten, view, reshape, squeeze: the same elements under another shape; the batch stays first."""

    method: Literal["flatten", "reshape", "squeeze", "unsqueeze"]
    arguments: tuple[Any, ...]

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        y: Tensor = getattr(x, self.method)(*self.arguments)
        if y.shape[:1] != x.shape[:1]:
            raise RuntimeError(f"{self.method} from {tuple(x.shape)} to {tuple(y.shape)} does not keep the batch first")
        return y


@dataclass(frozen=True)
class Pad(Layer):
    """Zeros around (or, with negative amounts, elements removed from) the trailing dimensions, as ``F.pad``."""

    amounts: tuple[Any, ...]

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        if len(self.amounts) >= 2 * x.ndim:
            raise RuntimeError("padding along the batch has no relevance rule")
        return F.pad(x, self.amounts)


@dataclass(frozen=True)
class Slice(Layer):
    """Some of the elements: ``x[index]`` with a tuple of slices, numbers and ``...``."""

    index: tuple[Any, ...]

    def forward(self, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        (x,) = inputs
        first = self.index[0] if self.index else slice(None)
        whole = len(self.index) <= x.ndim if first is Ellipsis else first == slice(None)
        if not whole:
            raise RuntimeError(f"slicing along the batch has no relevance rule, got the index {self.index}")
        return x[self.index]


Rearrangement = (Reshape, Pad, Slice)
"""Layers that only move elements: relevance moves back with them."""


def check_axes(x: Tensor, axes: int) -> None:
    """Refuse what torch would read as one sample without a batch, and pool over its channels."""
    if x.ndim != axes + 2:
        raise RuntimeError(f"pooling over {axes} axes needs N x channels and these, got shape {tuple(x.shape)}")


def fill_sizes(size: tuple[Any, ...], x: Tensor) -> tuple[int, ...]:
    """An adaptive pool's output lengths with each ``None`` replaced by the input's own length."""
    spatial = x.shape[x.ndim - len(size) :]
    return tuple(have if want is None else want for want, have in zip(size, spatial, strict=True))


def arguments_of(layer: Layer) -> Iterator[Any]:
    """Everything in a layer's fields, also what is inside tuples, slices and expressions."""
    for field in fields(layer):
        yield from _leaves(getattr(layer, field.name))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, SizeExpression):
        value = value.arguments
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
