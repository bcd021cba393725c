"""What every kernel shares: denominators and gates, splits, and where relevance goes once it has arrived.

Activations are NHWC and contiguous: a tensor of C channels is a matrix of ``rows`` (images · height · width) × C.

A linear layer's convolution runs once with S weights stacked (S = 1 to 3), so that its raw output has S · C channels:
``first``, ``second`` and ``third``, each plus its bias. ``first`` is the layer's own output, never a sum of parts that cancel;
from them come the denominators of its rule's G groups (G = 1 or 2), by the kind of :class:`Denominators`::

    kind       S  G   z_1                      z_2
    "own"      1  1   first                                                     ε
    "stacked"  2  1   second                                                    z⁺, positive products
    "signs"    2  2   second                   first − second, below zero       αβ
    "gamma"    2  2   first + γ · second       (1 + γ) · first − γ · second     γ
    "apart"    3  2   second                   third                            αβ of pixels, behind a library's convolution

and from a denominator its gate, ``gate_g = numerator · mask_g / stab(z_g)``. The gates of one layer lie side by side,
G · C channels. Under a zero-guard what counts as dead is coded by sign: the gate is ``numerator / z`` where the
denominator lives and ``−numerator`` where it is dead; numerators are then never negative.

Everything is computed in float32 and stored in the dtype of the tensor it is stored to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

SPLITS = ("ratio", "symmetric", "residual-only", "signed")
CONSTANT_SPLITS = {"symmetric": (0.5, 0.5), "residual-only": (1.0, 0.0)}
"""Splits whose weights (residual, skip) do not depend on the branches."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Compiler options of every launch: the default of this one flips in Triton 3.10."""

APPROXIMATE = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether :func:`quotient` is a GPU's approximation; Triton's interpreter knows none, and divides."""

SMALLEST = tl.constexpr(2.0**-126)
"""The smallest normal float32: below it :func:`quotient` takes a denominator for zero."""

EIGHTH = 8
"""Channels whose dead relevance is summed where it is settled: what a thread holds of a row."""


@dataclass(frozen=True)
class Denominators:
    """How a linear layer's stacked output becomes its own output, its denominators and its gates."""

    kind: Literal["own", "stacked", "signs", "gamma", "apart"]
    epsilon: float = 0.0
    stabilizer: Literal["signed", "plain", "vanishing", "guard"] = "signed"
    """``z ± ε`` by sign; ``z + ε``; ``z + ε`` with ε in place of zero; or none, and z ≤ limit counts as zero."""
    gamma: float = 0.0
    """γ, whose group 1 counts only where the layer's own output is above zero and group 2 only where it is below."""

    @property
    def stacks(self) -> int:
        """S: how many weights are stacked in the convolution."""
        return {"own": 1, "apart": 3}.get(self.kind, 2)

    @property
    def groups(self) -> int:
        """G: how many gates the layer has."""
        return 1 if self.kind in ("own", "stacked") else 2

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of a kernel that calls :func:`gates_of`."""
        return {
            "epsilon": self.epsilon, "gamma": self.gamma, "KIND": self.kind, "STABILIZER": self.stabilizer,
        }  # fmt: skip


def check_one_denominator(denominators: Denominators) -> None:
    """Raise ``ValueError`` for rules of two denominators: a zero-guard looks at one."""
    if denominators.groups != 1:
        raise ValueError(f"got denominators {denominators.kind!r} of two groups, and expected 'own' or 'stacked'")


def check_two_stacks(denominators: Denominators) -> None:
    """Raise ``ValueError`` for the kind "apart"."""
    if denominators.stacks > 2:
        raise ValueError(
            "got denominators 'apart', of three stacks, which only gate.gate takes, and expected at most two"
        )


@dataclass(frozen=True)
class Divisor:
    """A denominator that is not kept: where relevance is settled it is multiplied again, ``z = x weightᵀ + bias``.

    Of a 1×1 convolution: x (N, H, W, K), weight (C, K), bias (C,). What it divides is C channels wide, its own input x often
    a quarter of that, so that x is sooner read than a gate is written and read.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    stabilizer: Literal["signed", "plain", "vanishing"]


@dataclass(frozen=True)
class End:
    """Where relevance goes on to: ``R · gate`` (rows × groups · C), or ``R · scale`` if there is no gate.

    ``part``: of a zero-guarded gate, coded by sign, what is ``"alive"`` or what is ``"dead"``: ``R · gate⁺`` or ``R · gate⁻``;
    or ``"guarded"``: what is alive, and beside it what is dead summed over every eight channels, rows × ⌈C / 8⌉ float32.
    ``"ratio"``, ``"signed"``: relevance is that of a merge, ``gate`` the value S of one of its branches, and what leaves is
    ``R`` times the branch's weight under that split. The other branch is F = h − S, where the merge's output h, the
    ``value`` of the arrival, is not cut off by its ReLU; where it is, R must be zero. ``"ratio rest"``, ``"signed rest"``:
    what leaves is ``R`` times the weight of F. Ends under a split name the same S.
    ``divisor``: what leaves is divided by it, ``R · gate / stab(z)``.
    """

    gate: Tensor | None = None
    groups: int = 1
    scale: float = 1.0
    part: Literal["whole", "alive", "dead", "guarded", "ratio", "signed", "ratio rest", "signed rest"] = "whole"
    divisor: Divisor | None = None

    @property
    def splits(self) -> bool:
        """Whether ``gate`` is the value of a branch."""
        return self.part.startswith(SPLITS)

    def outputs(self, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """What there is to write to for relevance of ``shape`` (…, C), in the dtype of ``like``: one tensor, guarded two."""
        out = like.new_empty(*shape[:-1], self.groups * shape[-1])
        if self.part != "guarded":
            return (out,)
        return out, like.new_empty(*shape[:-1], cdiv(shape[-1], EIGHTH), dtype=torch.float32)


@dataclass(frozen=True)
class Branch:
    """One of the two branches that meet at a merge.

    ``linear``: ``tensor`` is the raw stacked output (…, S · C) of the branch's last layer, without its ``bias`` (S · C,);
    otherwise it is the branch's value (…, C). ``limit`` (N,) float32: what counts as zero, under a zero-guard.
    ``weight`` (S · C, K) and ``stride``: that layer is a 1×1 convolution that the kernel is to compute, ``tensor`` its input.
    """

    tensor: Tensor
    linear: bool = False
    bias: Tensor | None = None
    limit: Tensor | None = None
    weight: Tensor | None = None
    stride: int = 1


def merge_outputs(
    like: Tensor, shape: tuple[int, ...], denominators: Denominators, split: str, other_linear: bool, keeps_weight: bool,
    keeps_gates: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What a merge of ``shape`` (…, C) writes: its value, the linear branch's gates, the other's gates, weight or nothing."""
    gates = (*shape[:-1], shape[-1] * denominators.groups)
    weighs = keeps_weight and split not in CONSTANT_SPLITS
    end = like.new_empty(gates) if other_linear else like.new_empty(shape) if weighs else None
    return like.new_empty(shape), like.new_empty(gates) if keeps_gates else None, end


@dataclass(frozen=True)
class Arrival:
    """What arrives at a layer beside the message ``acc`` a kernel computes, and where it goes on to::

        R = value · (acc + previous) + dense + even        out_e = R · gate_e

    ``value``: the layer's output x, rows × C, or None for one. ``previous``: another message, rows × C, or, with
    ``previous_stride`` (s, s), N × ⌈H/s⌉ × ⌈W/s⌉ × C: it belongs to the rows with y and x divisible by s. ``dense``:
    relevance that arrives as it is, rows × C; ``even``: relevance that is equal in all channels, rows.
    Relevance may hold several maps of each image, one after another: value and gates then have a divisor of its rows.
    Only the first end may have a :class:`Divisor`, and only ``pointwise_conv.backward`` multiplies it.
    """

    ends: tuple[End, ...]
    value: Tensor | None = None
    previous: Tensor | None = None
    previous_stride: int = 1
    dense: Tensor | None = None
    even: Tensor | None = None
    written: tuple[tuple[Tensor, ...], ...] = field(default=(), compare=False)
    """The outputs of each end, made by :meth:`prepared`."""

    @property
    def divisor(self) -> Divisor | None:
        """That of the first end."""
        return self.ends[0].divisor

    def prepared(self, like: Tensor, shape: tuple[int, ...], divides: bool = False) -> Arrival:
        """With outputs allocated, for relevance of ``shape`` (…, C), on the device of ``like``.

        ``ValueError`` for a divisor that is not the first end's, or that the kernel does not multiply (``divides``).
        """
        if any(end.divisor is not None for end in self.ends[0 if not divides else 1 :]):
            raise ValueError(
                "got an end with a divisor, and expected one at the first end of pointwise_conv.backward alone"
            )
        return replace(self, written=tuple(end.outputs(like, shape) for end in self.ends))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Those of all ends, one after another."""
        return tuple(output for outputs in self.written for output in outputs)

    def tile(self, channels: int) -> tuple[int, int]:
        """Of an element-wise pass that settles it: :func:`tile`, and where channels are summed at least eight columns."""
        guarded = any(end.part == "guarded" for end in self.ends)
        return tile(max(channels, EIGHTH) if guarded else channels)

    def arguments(self, rows: int, height: int = 1, width: int = 1) -> dict[str, Any]:
        """The keyword arguments of a kernel that calls :func:`settle`, for ``rows`` rows of relevance."""
        branches = [end.gate for end in self.ends if end.splits]
        if self.value is None and branches:
            raise ValueError("got an end under a split and no value, and expected the merge's")
        if any(branch is None or branch is not branches[0] for branch in branches):
            raise ValueError("got ends under a split with two gates, and expected the value of one branch")
        ends = [*self.ends, End()][:2]
        outputs = [*self.written, self.written[0]][:2]
        product = None if self.divisor is None else self.divisor.x
        known = [x for x in (self.value, product, *(end.gate for end in self.ends)) if x is not None]
        nothing = outputs[0][0]  # stands in for pointers that are never used
        return {
            "value_ptr": nothing if self.value is None else self.value,
            "previous_ptr": nothing if self.previous is None else self.previous,
            "dense_ptr": nothing if self.dense is None else self.dense,
            "even_ptr": nothing if self.even is None else self.even,
            "gate_a_ptr": nothing if ends[0].gate is None else ends[0].gate,
            "gate_b_ptr": nothing if ends[1].gate is None else ends[1].gate,
            "out_a_ptr": outputs[0][0],
            "out_b_ptr": outputs[1][0],
            "dead_a_ptr": outputs[0][-1],
            "dead_b_ptr": outputs[1][-1],
            "scale_a": ends[0].scale,
            "scale_b": ends[1].scale,
            "gate_rows": min((x.numel() // x.shape[-1] for x in known), default=rows),
            "height": height,
            "width": width,
            "HAS_VALUE": self.value is not None,
            "HAS_PREVIOUS": self.previous is not None,
            "PREVIOUS_STRIDE": self.previous_stride,
            "HAS_DENSE": self.dense is not None,
            "HAS_EVEN": self.even is not None,
            "GATE_A": ends[0].gate is not None,
            "GROUPS_A": ends[0].groups,
            "PART_A": ends[0].part,
            "END_B": len(self.ends) > 1,
            "GATE_B": ends[1].gate is not None,
            "GROUPS_B": ends[1].groups,
            "PART_B": ends[1].part,
        }


def pack(x: Tensor) -> Tensor:
    """N × C × H × W as N × H × W × C, contiguous; a view where the channels lie last in memory already."""
    return x.permute(0, *range(2, x.ndim), 1).contiguous()


def unpack(x: Tensor) -> Tensor:
    """N × H × W × C as N × C × H × W with the channels last in memory; a view."""
    return x.permute(0, -1, *range(1, x.ndim - 1))


def cdiv(numerator: int, denominator: int) -> int:
    """⌈numerator / denominator⌉, as ``triton.cdiv``, which can be called in kernels too and so takes 1.5 µs."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less than ``number`` ≥ 1, as ``triton.next_power_of_2``."""
    return 1 << (number - 1).bit_length()


def tile(channels: int, elements: int = 1024) -> tuple[int, int]:
    """Rows × columns of a tile of an element-wise pass over ``channels`` columns: whole rows, up to 256 columns."""
    columns = min(next_power_of_2(channels), 256)
    return max(elements // columns, 1), columns


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` was set before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def tile_at(program, C, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tile of an element-wise pass's program: rows [BM, 1] int64 and columns [1, BN], row by row of tiles."""
    across = tl.cdiv(C, BLOCK_COLUMNS)
    rows = (program // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return rows[:, None], columns[None, :]


@triton.jit
def pixel_of(row, height, width):
    """Image, y and x of the int32 ``row = (image · height + y) · width + x``, in two divisions."""
    line = row // width
    image = line // height
    return image, line - image * height, row - line * width


@triton.jit
def divisible(C, EIGHTH: tl.constexpr):
    """C, which the compiler may take for a multiple of 8 if ``EIGHTH``: 16-byte vectors of 16-bit numbers."""
    return C // 8 * 8 if EIGHTH else C


@triton.jit
def quotient(numerator, denominator):
    """``numerator / denominator``, float32, within two units in the last place for 2⁻¹²⁶ ≤ |denominator| ≤ 2¹²⁶.

    A reciprocal and a product, where a division is eight instructions, which scale what is outside; that is a tenth to a
    fifth of all that an epilogue issues. Above 2¹²⁶ it is zero, and below 2⁻¹²⁶ the denominator counts as zero.
    """
    if APPROXIMATE:
        return libdevice.fast_dividef(numerator, denominator)
    else:
        return numerator / denominator


@triton.jit
def rectified(x):
    """ReLU; of NaN it is NaN, as torch's: an image that overflows must not come out as if it was in order."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_denominator(first, second, gamma, KIND: tl.constexpr):
    if KIND == "own" or KIND == "apart":  # which has come with its two denominators alone
        return first
    elif KIND == "gamma":
        return first + gamma * second
    else:
        return second


@triton.jit
def second_denominator(first, second, gamma, KIND: tl.constexpr):
    if KIND == "gamma":
        return first + gamma * (first - second)
    elif KIND == "signs":
        # What is not below zero is so by rounding, and ε has its sign.
        rest = first - second
        return tl.where(rest > -SMALLEST, -SMALLEST, rest)
    else:
        return second


@triton.jit
def gate_of(z, numerator, epsilon, limit, STABILIZER: tl.constexpr):
    """``numerator / stab(z)``; under a zero-guard ``numerator / z`` where z > limit and ``−numerator`` elsewhere."""
    if STABILIZER == "guard":
        dead = z <= tl.maximum(limit, SMALLEST)
        return tl.where(dead, -numerator, quotient(numerator, tl.where(dead, 1.0, z)))
    elif STABILIZER == "signed":
        return quotient(numerator, tl.where(z < 0, z - epsilon, z + epsilon))
    elif STABILIZER == "vanishing":
        shifted = z + epsilon
        return quotient(numerator, tl.where(shifted == 0, epsilon, shifted))
    else:
        return quotient(numerator, z + epsilon)


@triton.jit
def store_gates(
    gate_ptr, first, second, numerator, rows, columns, inside, C,
    epsilon, limit, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr,
):  # fmt: skip
    """Write a tile's gates, rows × G · C. ``rows`` [BM, 1] int64, ``columns`` [1, BN]; first, second [BM, BN] float32."""
    gate = gate_of(first_denominator(first, second, gamma, KIND), numerator, epsilon, limit, STABILIZER)
    if KIND == "signs" or KIND == "gamma" or KIND == "apart":
        other = gate_of(second_denominator(first, second, gamma, KIND), numerator, epsilon, limit, STABILIZER)
        if KIND == "gamma":
            gate = tl.where(first <= 0, 0.0, gate)
            other = tl.where(first >= 0, 0.0, other)
        tl.store(gate_ptr + rows * (2 * C) + columns, gate, mask=inside)
        tl.store(gate_ptr + rows * (2 * C) + C + columns, other, mask=inside)
    else:
        tl.store(gate_ptr + rows * C + columns, gate, mask=inside)


@triton.jit
def split_weights(residual, skip, merged, SPLIT: tl.constexpr):
    """The weights of the residual branch and of the skip, from their float32 values and their sum before the ReLU."""
    if SPLIT == "ratio":
        magnitude = tl.abs(residual) + 1e-30  # 0/0 is one half
        weight = quotient(magnitude, tl.abs(skip) + 1e-30 + magnitude)
        return weight, rectified(1.0 - weight)  # a GPU's quotient may be above one in its last place
    elif SPLIT == "signed":
        denominator = tl.where(merged < 0, merged - 1e-6, merged + 1e-6)
        return quotient(residual, denominator), quotient(skip, denominator)
    elif SPLIT == "symmetric":
        return tl.full(residual.shape, 0.5, tl.float32), tl.full(residual.shape, 0.5, tl.float32)
    else:
        return tl.full(residual.shape, 1.0, tl.float32), tl.full(residual.shape, 0.0, tl.float32)


@triton.jit
def load_stack(
    stacked_ptr, bias_ptr, rows, columns, inside, column_inside, C, STACKS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """A tile of a raw convolution output, rows × S · C, plus its bias: first and second (the same where S is 1)."""
    first = tl.load(stacked_ptr + rows * (STACKS * C) + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    second = first
    if STACKS == 2:
        second = tl.load(stacked_ptr + rows * (STACKS * C) + C + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            second += tl.load(bias_ptr + C + columns, mask=column_inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_merge(
    first, second, other_first, other_second, merged_ptr, gate_ptr, other_ptr, rows, columns, inside, C,
    epsilon, limit, other_limit, gamma,
    KIND: tl.constexpr, STABILIZER: tl.constexpr,
    SPLIT: tl.constexpr, RELU: tl.constexpr, IS_RESIDUAL: tl.constexpr, OTHER_LINEAR: tl.constexpr,
    HAS_GATES: tl.constexpr, HAS_OTHER_END: tl.constexpr,
):  # fmt: skip
    """A tile where two branches meet: write ``h = ReLU(this + other)`` and how relevance leaves for both.

    ``first``, ``second``: the stacked outputs of this branch's last, linear layer; ``IS_RESIDUAL``: it is the residual
    branch and not the skip. Its gates (``HAS_GATES``) get the weight of the split in the numerator. The other branch is linear
    too (gates are written to ``other_ptr``) or a plain value ``other_first`` (its weight is written there, with
    ``HAS_OTHER_END``).
    """
    merged = first + other_first
    tl.store(merged_ptr + rows * C + columns, rectified(merged) if RELU else merged, mask=inside)
    if IS_RESIDUAL:
        weight, other_weight = split_weights(first, other_first, merged, SPLIT)
    else:
        other_weight, weight = split_weights(other_first, first, merged, SPLIT)
    if HAS_GATES:
        store_gates(gate_ptr, first, second, weight, rows, columns, inside, C, epsilon, limit, gamma, KIND, STABILIZER)
    if OTHER_LINEAR:
        store_gates(
            other_ptr, other_first, other_second, other_weight, rows, columns, inside, C,
            epsilon, other_limit, gamma, KIND, STABILIZER,
        )  # fmt: skip
    elif HAS_OTHER_END:
        tl.store(other_ptr + rows * C + columns, other_weight, mask=inside)


@triton.jit
def store_end(
    out_ptr, dead_ptr, gate_ptr, relevance, value, branch, rows, gate_rows, columns, inside, C, scale,
    GATE: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    if PART == "ratio" or PART == "signed":
        weight, _ = split_weights(branch, value - branch, value, PART)
        tl.store(out_ptr + rows * C + columns, relevance * weight, mask=inside)
    elif PART == "ratio rest" or PART == "signed rest":
        weight, _ = split_weights(value - branch, branch, value, "ratio" if PART == "ratio rest" else "signed")
        tl.store(out_ptr + rows * C + columns, relevance * weight, mask=inside)
    elif GATE:
        for group in tl.static_range(GROUPS):
            gate = tl.load(gate_ptr + gate_rows * (GROUPS * C) + group * C + columns, mask=inside, other=0.0).to(
                tl.float32
            )
            if PART == "guarded":
                store_eighths(dead_ptr, relevance * rectified(-gate), rows, columns, inside, C)
            if PART == "alive" or PART == "guarded":
                gate = rectified(gate)
            elif PART == "dead":
                gate = rectified(-gate)
            tl.store(out_ptr + rows * (GROUPS * C) + group * C + columns, relevance * gate, mask=inside)
    else:
        tl.store(out_ptr + rows * C + columns, relevance * scale, mask=inside)


@triton.jit
def store_eighths(dead_ptr, dead, rows, columns, inside, C):
    """Write the sums of every eight columns of a tile [BM, BN], rows × ⌈C / 8⌉. The tile begins at a multiple of eight."""
    EIGHTHS: tl.constexpr = dead.shape[1] // 8
    sums = tl.sum(tl.reshape(tl.where(inside, dead, 0.0), (dead.shape[0], EIGHTHS, 8)), 2)
    eighths = tl.min(tl.reshape(columns, (1, EIGHTHS, 8)), 2) // 8
    there = tl.max(tl.reshape(inside.to(tl.int32), (dead.shape[0], EIGHTHS, 8)), 2) > 0
    tl.store(dead_ptr + rows * ((C + 7) // 8) + eighths, sums, mask=there)


@triton.jit
def settle(
    acc, share, rows, columns, inside, C,
    value_ptr, previous_ptr, dense_ptr, even_ptr, gate_a_ptr, gate_b_ptr, out_a_ptr, out_b_ptr, dead_a_ptr, dead_b_ptr,
    scale_a, scale_b, gate_rows, height, width,
    HAS_VALUE: tl.constexpr, HAS_PREVIOUS: tl.constexpr, PREVIOUS_STRIDE: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_EVEN: tl.constexpr,
    GATE_A: tl.constexpr, GROUPS_A: tl.constexpr, PART_A: tl.constexpr,
    END_B: tl.constexpr, GATE_B: tl.constexpr, GROUPS_B: tl.constexpr, PART_B: tl.constexpr,
):  # fmt: skip
    """A tile of relevance has arrived: total it and send it on (:class:`Arrival`).

    ``acc`` [BM, BN] float32; ``rows`` [BM, 1] int64 (n · H + y) · W + x; ``columns`` [1, BN]; ``inside`` [BM, BN]. ``share``:
    1 / stab(z) of the first end's divisor, [BM, BN], or one.
    """
    row = rows.to(tl.int32)
    of_image = (row % gate_rows).to(tl.int64)
    if HAS_PREVIOUS:
        if PREVIOUS_STRIDE == 1:
            acc += tl.load(previous_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            image, y, x = pixel_of(row, height, width)
            small_width = (width + PREVIOUS_STRIDE - 1) // PREVIOUS_STRIDE
            small_height = (height + PREVIOUS_STRIDE - 1) // PREVIOUS_STRIDE
            small = ((image * small_height + y // PREVIOUS_STRIDE) * small_width + x // PREVIOUS_STRIDE).to(tl.int64)
            there = inside & (y % PREVIOUS_STRIDE == 0) & (x % PREVIOUS_STRIDE == 0)
            acc += tl.load(previous_ptr + small * C + columns, mask=there, other=0.0).to(tl.float32)
    value = acc
    if HAS_VALUE:
        value = tl.load(value_ptr + of_image * C + columns, mask=inside, other=0.0).to(tl.float32)
        acc *= value
    if HAS_DENSE:
        acc += tl.load(dense_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_EVEN:
        acc += tl.load(even_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    SPLIT_A: tl.constexpr = PART_A == "ratio" or PART_A == "signed" or PART_A == "ratio rest" or PART_A == "signed rest"
    SPLIT_B: tl.constexpr = PART_B == "ratio" or PART_B == "signed" or PART_B == "ratio rest" or PART_B == "signed rest"
    branch = value
    if SPLIT_A:
        branch = tl.load(gate_a_ptr + of_image * C + columns, mask=inside, other=0.0).to(tl.float32)
    store_end(
        out_a_ptr, dead_a_ptr, gate_a_ptr, acc * share, value, branch, rows, of_image, columns, inside, C, scale_a,
        GATE_A, GROUPS_A, PART_A,
    )  # fmt: skip
    if END_B:
        if SPLIT_B and not SPLIT_A:
            branch = tl.load(gate_b_ptr + of_image * C + columns, mask=inside, other=0.0).to(tl.float32)
        store_end(
            out_b_ptr, dead_b_ptr, gate_b_ptr, acc, value, branch, rows, of_image, columns, inside, C, scale_b,
            GATE_B, GROUPS_B, PART_B,
        )  # fmt: skip
