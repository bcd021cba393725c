"""Convolutions on a CPU by oneDNN, with weights packed once.

The library's own convolutions bring their weights into oneDNN's blocked layout at every call: a third of the time of a
single image. Here they are packed for one input shape when a program is bound, bias and ReLU join the convolution, and a
transposed convolution takes whichever form is fastest there (the same products, summed in another order).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_fast.layers import Convolution, Shape

Pair = tuple[int, int]
FEW_CHANNELS = 4
"""A strided transposed convolution onto so few channels is faster phase by phase (a stem: 3 times)."""


def packs(layer: Convolution, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs this layer's weights here."""
    if device.type != "cpu" or len(layer.stride) != 2 or any(layer.extra) or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class PackedConvolution:
    """A convolution, or its transpose, with packed weights: N × C × H × W of one shape to N × ``outputs``, channels last.

    ``rest``: of a transposed one, what its last windows leave over (torch's *output padding*).
    """

    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    outputs: Shape
    relu: bool = False
    rest: Pair | None = None

    def __call__(self, x: Tensor) -> Tensor:
        run = torch.ops.lrp_fast.packed_convolution if torch.compiler.is_compiling() else _convolve
        y: Tensor = run(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.relu, self.rest,
            self.outputs,
        )  # fmt: skip
        return y


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    relu: bool, rest: Pair | None, outputs: Shape,
) -> Tensor:  # fmt: skip
    operators = torch.ops.mkldnn
    after: tuple[Any, ...] = ("relu" if relu else "none", [], "")
    y: Tensor
    if rest is None:
        y = operators._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, *after)
    else:
        transposed = operators._convolution_transpose_pointwise
        y = transposed(x, weight, bias, padding, rest, stride, dilation, groups, *after)
    return y


def _shaped(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], *arguments[-1]).contiguous(memory_format=torch.channels_last)


# Of torch.compile's own lowering of these operators one trips over shapes; so it calls them as they are.
_library = torch.library.Library("lrp_fast", "FRAGMENT")
_library.define(
    "packed_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool relu, int[]? rest, int[] outputs) -> Tensor"
)
_library.impl("packed_convolution", _convolve, "CompositeExplicitAutograd")
torch.library.register_fake("lrp_fast::packed_convolution", _shaped, lib=_library)


def pack(
    weight: Tensor, bias: Tensor | None, layer: tuple[Pair, Pair, Pair, int], shape: Shape, relu: bool = False
) -> PackedConvolution:
    """Pack weights (out × in / groups × kh × kw) for inputs of ``shape`` (N, C, H, W).

    ``layer``: stride, padding, dilation and groups.
    """
    stride, padding, dilation, groups = layer
    sizes = zip(shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, shape)
    return PackedConvolution(packed, bias, *layer, (weight.shape[0], *spatial), relu)


def pack_forward(
    layer: Convolution, weight: Tensor, bias: Tensor | None, shape: Shape, relu: bool
) -> PackedConvolution:
    """A layer's convolution with these weights, for inputs of ``shape`` (N, C, H, W)."""
    stride, padding, dilation = _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation)
    return pack(weight, bias, (stride, padding, dilation, layer.groups), shape, relu)


# Transposed convolutions ----------------------------------------------------------------------------------------------


def pack_transposed(layer: Convolution, weight: Tensor, shape: Shape, outputs: Shape) -> Callable[[Tensor], Tensor]:
    """``Aᵀ(s, W)`` onto inputs of ``shape`` (N, C, H, W), from s of ``outputs`` (N, M, Ho, Wo); W is M × C / groups × ….

    At stride 1 a convolution with flipped weights; 1 × 1 weights at a stride, every s-th pixel of one; onto few channels,
    a convolution for each of the s² phases of the output; else oneDNN's transposed convolution.
    """
    kernel, stride, padding = _pair(weight.shape[2:]), _pair(layer.stride), _pair(layer.padding)
    dilation, groups = _pair(layer.dilation), layer.groups
    beyond = _pair([d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)])
    if stride == (1, 1) and min(beyond) >= 0:
        return pack(_flipped(weight, groups), None, (stride, beyond, dilation, groups), outputs)
    if kernel == (1, 1) and padding == (0, 0):
        inner = pack(_flipped(weight, groups), None, ((1, 1), padding, (1, 1), groups), outputs)
        return _Strided(inner, stride, shape[2:])
    if groups == 1 and dilation == (1, 1) and weight.shape[1] <= FEW_CHANNELS and stride[0] == stride[1] > 1:
        phases = _phases(weight, stride[0], padding, shape, outputs)
        if phases is not None:
            return phases
    sizes = zip(shape[2:], outputs[2:], stride, padding, dilation, kernel, strict=True)
    rest = _pair([n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, s, p, d, k in sizes])
    reorder: Any = torch.ops.mkldnn._reorder_convolution_transpose_weight
    packed = reorder(weight.contiguous(), padding, rest, stride, dilation, groups, outputs)
    return PackedConvolution(packed, None, stride, padding, dilation, groups, shape[1:], rest=rest)


@dataclass(frozen=True)
class _Strided:
    """A map whose outputs belong to every s-th row and column."""

    inner: PackedConvolution
    stride: Pair
    size: Shape

    def __call__(self, s: Tensor) -> Tensor:
        small = self.inner(s)
        whole = small.new_zeros(*small.shape[:2], *self.size).contiguous(memory_format=torch.channels_last)
        whole[:, :, :: self.stride[0], :: self.stride[1]] = small
        return whole


@dataclass(frozen=True)
class _Phases:
    """All pixels (i · step + a, j · step + b) of the result are one convolution each of s; ``lead``: pixels before the first."""

    inner: PackedConvolution
    step: int
    lead: Pair
    size: Shape

    def __call__(self, s: Tensor) -> Tensor:
        whole = F.pixel_shuffle(self.inner(s), self.step)
        (top, left), (height, width) = self.lead, self.size
        return whole[:, :, top : top + height, left : left + width]


def _phases(weight: Tensor, step: int, padding: Pair, shape: Shape, outputs: Shape) -> _Phases | None:
    """``r[q] = Σ_o s[o] W[q + p − step · o]``: with q + p = step · u + a, tap t of phase a is W[step · t + a] at o = u − t.

    None if the last pixels belong to no window: the phases end with the last that does.
    """
    taps = [-(-k // step) for k in weight.shape[2:]]
    sizes = zip(shape[2:], padding, outputs[2:], taps, strict=True)
    if any(n + p > step * (m + t - 1) for n, p, m, t in sizes):
        return None
    whole = F.pad(weight, (0, taps[1] * step - weight.shape[3], 0, taps[0] * step - weight.shape[2]))
    split = whole.unflatten(3, (taps[1], step)).unflatten(2, (taps[0], step))  # M × C × t × a × t' × a'
    arranged = split.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(2, 3)  # C · a · a' × M × t × t', s read backwards
    inner = pack(arranged, None, ((1, 1), _pair([t - 1 for t in taps]), (1, 1), 1), outputs)
    return _Phases(inner, step, padding, shape[2:])


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """The weights of the transposed map, groups of input and output channels exchanged: C × M / groups × …."""
    if groups == 1 and weight.shape[2:] == (1, 1):
        matrix = weight[:, :, 0, 0].t().contiguous()  # torch transposes matrices block by block, and nothing else
        return matrix[:, :, None, None]
    exchanged = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return exchanged.flip(2, 3)


def _pair(values: Any) -> Pair:
    first, second = values
    return int(first), int(second)
