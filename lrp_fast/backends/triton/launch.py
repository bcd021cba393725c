"""The kernels as custom ops ``lrp_fast::…``, which ``torch.compile`` and CUDA graphs take as they are.

Every op has one schema: tensors in, a configuration in, tensors out. The configuration is text, so that a compiled graph
that is kept on disk means the same in another process. Tensors are NHWC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lrp_fast.kernels import gate, heatmap, merge, pointwise_conv, pool, spatial_conv
from lrp_fast.kernels.common import Arrival, Branch, Denominators, Divisor, End, merge_outputs
from lrp_fast.kernels.pointwise_conv import Blocks
from lrp_fast.scopes import watched

Tensors = Sequence[Any]
"""Tensors, and None where an optional one is missing."""
Values = dict[str, Any]
ARRIVAL_TENSORS = 9
"""So many tensors of an arrival stand behind an op's own."""


def configuration(**values: object) -> str:
    """What a launch needs beside tensors, as text: dataclasses, numbers, texts and tuples of them."""
    return json.dumps(
        {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in values.items()
        }
    )


@lru_cache(maxsize=4096)
def _decoded(text: str) -> Values:
    values: Values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    for name, kind in (("denominators", Denominators), ("blocks", Blocks)):
        if values.get(name) is not None:
            values[name] = kind(**values[name])
    return values


class Operator:
    """A launcher as a custom op; ``like`` gives outputs of the right shape and dtype without computing them.

    Both get the op's own tensors and the values of its configuration, ``arrival`` among them where it settles one.
    """

    def __init__(self, name: str, run: Callable[..., Sequence[Tensor]], like: Callable[..., Sequence[Tensor]]) -> None:
        self.name, self.run = name, run

        def launch(tensors: Tensors, configuration: str, arrival: str) -> list[Tensor]:
            return list(run(*_given_to(tensors, configuration, arrival)))

        def fake(tensors: Tensors, configuration: str, arrival: str) -> list[Tensor]:
            return list(like(*_given_to(tensors, configuration, arrival)))

        schema = "(Tensor?[] tensors, str configuration, str arrival) -> Tensor[]"
        self._op = torch.library.custom_op(f"lrp_fast::{name}", launch, mutates_args=(), schema=schema)
        self._op.register_fake(fake)

    def __call__(self, tensors: Tensors, configuration: str, arrival: str) -> list[Tensor]:
        return self._op(list(tensors), configuration, arrival)


# Where relevance goes on to ---------------------------------------------------------------------------------------------


def arrival_tensors(arrival: Arrival) -> list[Tensor | None]:
    """An arrival's tensors in the order every op takes them."""
    gates, divisor = [end.gate for end in arrival.ends], arrival.divisor
    if all(end.splits for end in arrival.ends):  # both name one branch, which a compiled graph could take for two
        gates[1:] = []
    product = [None] * 3 if divisor is None else [divisor.x, divisor.weight, divisor.bias]
    return [arrival.value, arrival.previous, arrival.dense, arrival.even, *[*gates, None, None][:2], *product]


def arrival_text(arrival: Arrival) -> str:
    """The rest of an arrival; written without a library, so that torch.compile can follow."""
    divisor = "" if arrival.divisor is None else f"{arrival.divisor.epsilon},{arrival.divisor.stabilizer}"
    ends = ";".join([f"{end.groups},{end.scale},{end.part}" for end in arrival.ends])
    return f"{arrival.previous_stride};{divisor};{ends}"


def _ends(text: Sequence[str]) -> list[tuple[int, float, str]]:
    fields = [end.split(",") for end in text]
    return [(int(groups), float(scale), part) for groups, scale, part in fields]


def _arrival(tensors: Tensors, text: str) -> Arrival:
    value, previous, dense, even, *gates = tensors[:-3]
    stride, divisor, *fields = text.split(";")
    ends = [
        End(gate, groups, scale, part)  # type: ignore[arg-type]
        for gate, (groups, scale, part) in zip(gates, _ends(fields), strict=False)
    ]
    if all(end.splits for end in ends):
        ends = [replace(end, gate=gates[0]) for end in ends]
    if divisor:
        (x, weight, bias), (epsilon, stabilizer) = tensors[-3:], divisor.split(",")
        ends[0] = replace(ends[0], divisor=Divisor(x, weight, bias, float(epsilon), stabilizer))  # type: ignore[arg-type]
    return Arrival(tuple(ends), value, previous, int(stride), dense, even)


def _given_to(tensors: Tensors, configured: str, arrival: str) -> tuple[Tensors, Values]:
    """What an op's two functions get, from what the op gets."""
    values = dict(_decoded(configured))
    if not arrival:
        return tensors, values
    return tensors[:-ARRIVAL_TENSORS], values | {"arrival": _arrival(tensors[-ARRIVAL_TENSORS:], arrival)}


def _ends_like(like: Tensor, shape: Sequence[int], values: Values, divides: bool = False) -> list[Tensor]:
    return list(values["arrival"].prepared(like, tuple(shape), divides).outputs)


# Forward ----------------------------------------------------------------------------------------------------------------


def _run_gate(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    stacked, bias, limit, fixed = tensors
    return gate.gate(stacked, bias, limit=limit, fixed=fixed, **values)


def _like_gate(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return _gated_like(tensors[0], tensors[0].shape[:-1], tensors[0].shape[-1], values)


def _gated_like(like: Tensor, shape: Sequence[int], stacked: int, values: Values) -> list[Tensor]:
    denominators: Denominators = values["denominators"]
    channels = stacked // denominators.stacks
    return [like.new_empty(*shape, channels), like.new_empty(*shape, channels * denominators.groups)]


def _run_image_maximum(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [gate.image_maximum(*tensors, **values)]


def _like_image_maximum(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape[0], dtype=torch.float32)]


def _run_pointwise_maximum(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [pointwise_conv.image_maximum(*tensors, **values)]


def _merged_like(like: Tensor, shape: Sequence[int], stacked: int, values: Values) -> list[Tensor]:
    denominators: Denominators = values["denominators"]
    chosen = [values[name] for name in ("split", "other_linear", "keeps_weight")]
    chosen.append(values.get("keeps_gates", True))
    return _given(merge_outputs(like, (*shape, stacked // denominators.stacks), denominators, *chosen))


def _given(results: Sequence[Tensor | None]) -> list[Tensor]:
    return [result for result in results if result is not None]


def _run_merge(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    tensor, bias, limit, other, other_bias, other_limit = tensors
    second = Branch(other, values.pop("other_linear"), other_bias, other_limit)
    return _given(merge.merge(Branch(tensor, True, bias, limit), second, **values))


def _like_merge(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    tensor = tensors[0]
    return _merged_like(tensor, tensor.shape[:-1], tensor.shape[-1], values)


def _out_shape(x: Tensor, weight: Tensor, values: Values) -> tuple[int, ...]:
    """N × height × width of a convolution's output."""
    if weight.ndim == 2:
        return (x.shape[0], *((n - 1) // values["stride"] + 1 for n in x.shape[1:3]))
    geometry = zip(
        x.shape[1:3], weight.shape[1:3], values["stride"], values["padding"], values["dilation"], strict=True
    )
    return (x.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry))


def _limited(limit: Tensor | None = None) -> Values:
    """A zero-guard's limits, as an argument of the launchers that take one."""
    return {} if limit is None else {"limit": limit}


def _convolution(module: Any) -> tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]:
    """The ops of a convolution file: gated, merged."""

    def run_gated(tensors: Tensors, values: Values) -> Sequence[Tensor]:
        x, weight, bias, *limit = tensors
        return module.gated(x, weight, bias, **values, **_limited(*limit))

    def like_gated(tensors: Tensors, values: Values) -> Sequence[Tensor]:
        x, weight = tensors[:2]
        return _gated_like(x, _out_shape(x, weight, values), weight.shape[0], values)

    def run_merged(tensors: Tensors, values: Values) -> Sequence[Tensor]:
        x, weight, bias, other, other_bias, other_weight, limit, other_limit = tensors
        linear, stride = values.pop("other_linear"), values.pop("other_stride")
        branch = Branch(other, linear, other_bias, other_limit, other_weight, stride)
        return _given(module.merged(x, weight, bias, branch, **values, **_limited(limit)))

    def like_merged(tensors: Tensors, values: Values) -> Sequence[Tensor]:
        x, weight = tensors[:2]
        return _merged_like(x, _out_shape(x, weight, values), weight.shape[0], values)

    return (run_gated, like_gated), (run_merged, like_merged)


# Backward ---------------------------------------------------------------------------------------------------------------


def _run_arrive(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return merge.arrive(tensors[0], values["arrival"])


def _like_arrive(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    like = tensors[0] if tensors[0] is not None else values["arrival"].dense
    return _ends_like(like, like.shape, values)


def _run_pointwise_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    s, weight, second, second_weight = tensors
    return pointwise_conv.backward(s, weight, second=None if second is None else (second, second_weight), **values)


def _like_pointwise_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    s, weight = tensors[:2]
    return _ends_like(s, (*s.shape[:-1], weight.shape[0]), values, divides=True)


def _run_spatial_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return spatial_conv.backward(*tensors, **values)


def _like_spatial_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    s, weight = tensors[:2]
    return _ends_like(s, (s.shape[0], values["height"], values["width"], weight.shape[0]), values)


def _run_stem_heatmap(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [spatial_conv.stem_heatmap(*tensors, **values)]


def _like_stem_heatmap(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape[0], values["height"], values["width"], dtype=torch.float32)]


# Pools ------------------------------------------------------------------------------------------------------------------


def _run_max_pool(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return pool.max_pool_gated(tensors[0], **values)


def _run_max_pool_average(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return pool.max_pool_average(tensors[0], **values)


def _like_pool(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    x = tensors[0]
    shape = (x.shape[0], *values["out_size"], x.shape[-1])
    return [x.new_empty(shape), x.new_empty(shape)]


def _like_max_pool_average(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    maxima, second = _like_pool(tensors, values)
    return [maxima, second.float()]


def _run_winner_pool(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return pool.winner_pool(tensors[0], **values)


def _like_winner_pool(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    maxima, second = _like_pool(tensors, values)
    return [maxima, second.new_empty(second.shape, dtype=torch.uint8)]


def _run_winner_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return pool.winner_backward(*tensors, **values)


def _run_block_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return pool.block_backward(*tensors, **values)


def _like_pool_backward(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    s = tensors[0]
    return _ends_like(s, (s.shape[0], values["height"], values["width"], s.shape[-1]), values)


def _run_spread(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [pool.spread(tensors[0], **values)]


def _like_spread(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape[0], values["height"], values["width"], dtype=torch.float32)]


def _run_channel_sum(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [heatmap.channel_sum(tensors[0])]


def _like_channel_sum(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [tensors[0].new_empty(tensors[0].shape[:-1], dtype=torch.float32)]


def _run_quantize(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [heatmap.quantize(tensors[0], values["levels"])]


def _like_quantize(tensors: Tensors, values: Values) -> Sequence[Tensor]:
    return [torch.empty_like(tensors[0])]


_pointwise_gated, _pointwise_merged = _convolution(pointwise_conv)
_spatial_gated, _spatial_merged = _convolution(spatial_conv)

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("gate", _run_gate, _like_gate),
        Operator("image_maximum", _run_image_maximum, _like_image_maximum),
        Operator("pointwise_maximum", _run_pointwise_maximum, _like_image_maximum),
        Operator("merge", _run_merge, _like_merge),
        Operator("pointwise_gated", *_pointwise_gated),
        Operator("pointwise_merged", *_pointwise_merged),
        Operator("spatial_gated", *_spatial_gated),
        Operator("spatial_merged", *_spatial_merged),
        Operator("arrive", _run_arrive, _like_arrive),
        Operator("pointwise_backward", _run_pointwise_backward, _like_pointwise_backward),
        Operator("spatial_backward", _run_spatial_backward, _like_spatial_backward),
        Operator("stem_heatmap", _run_stem_heatmap, _like_stem_heatmap),
        Operator("max_pool", _run_max_pool, _like_pool),
        Operator("max_pool_average", _run_max_pool_average, _like_max_pool_average),
        Operator("winner_pool", _run_winner_pool, _like_winner_pool),
        Operator("winner_backward", _run_winner_backward, _like_pool_backward),
        Operator("block_backward", _run_block_backward, _like_pool_backward),
        Operator("spread", _run_spread, _like_spread),
        Operator("channel_sum", _run_channel_sum, _like_channel_sum),
        Operator("quantize", _run_quantize, _like_quantize),
    )
}


def launch(name: str, tensors: Tensors, configured: str = "{}", arrival: Arrival | None = None) -> list[Tensor]:
    """Run one of :data:`OPERATORS`; with an arrival, what is settled in it.

    Where nobody looks at operations, the launcher is called at once: as an op it takes 25 µs more of Python, several times
    what the kernel of a small batch takes.
    """
    operator = OPERATORS[name]
    if watched() or torch.autograd._profiler_enabled():
        if arrival is None:
            return operator(tensors, configured, "")
        return operator([*tensors, *arrival_tensors(arrival)], configured, arrival_text(arrival))
    values = dict(_decoded(configured))
    if arrival is not None:
        values["arrival"] = arrival
    return list(operator.run(tensors, values))
