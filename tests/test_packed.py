"""Packed convolutions and their transposes against the library's own, over every geometry."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lrp_fast import LRP
from lrp_fast.backends.torch import LinearOperation, transposed_convolution
from lrp_fast.backends.torch.linear import PackedMaps
from lrp_fast.backends.torch.packed import PackedConvolution, pack_forward, pack_transposed, packs
from lrp_fast.layers import Convolution, Shape
from lrp_fast.rules import AlphaBeta, Rule
from networks import CifarResNet, calibrated, relative_error

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN, which packs the weights"
)

GEOMETRIES = {  # inputs, outputs, groups, kernel, stride, padding, dilation, height, width
    "3 x 3": (5, 7, 1, (3, 3), (1, 1), (1, 1), (1, 1), 9, 11),
    "3 x 3, no padding": (8, 16, 1, (3, 3), (1, 1), (0, 0), (1, 1), 9, 11),
    "1 x 1": (6, 20, 1, (1, 1), (1, 1), (0, 0), (1, 1), 7, 5),
    "1 x 1, more padding than kernel": (6, 4, 1, (1, 1), (1, 1), (2, 1), (1, 1), 7, 5),
    "projection": (12, 20, 1, (1, 1), (2, 2), (0, 0), (1, 1), 9, 8),
    "projection, one axis": (12, 20, 1, (1, 1), (2, 1), (0, 0), (1, 1), 9, 8),
    "3 x 3, stride 2": (9, 6, 1, (3, 3), (2, 2), (1, 1), (1, 1), 12, 11),
    "3 x 3, stride 2, groups": (8, 12, 4, (3, 3), (2, 2), (1, 1), (1, 1), 12, 11),
    "groups": (8, 12, 4, (3, 3), (1, 1), (1, 1), (1, 1), 12, 11),
    "depthwise": (6, 12, 6, (3, 3), (1, 1), (1, 1), (1, 1), 8, 9),
    "dilation": (4, 6, 1, (3, 3), (1, 1), (2, 2), (2, 2), 10, 9),
    "dilation and stride": (4, 6, 1, (3, 3), (2, 2), (2, 2), (2, 2), 11, 10),
    "stem": (3, 16, 1, (7, 7), (2, 2), (3, 3), (1, 1), 21, 24),
    "stem of stride 4": (3, 8, 1, (11, 11), (4, 4), (2, 2), (1, 1), 35, 35),
    "patches": (3, 8, 1, (4, 4), (4, 4), (0, 0), (1, 1), 16, 12),
    "pixels no window sees": (1, 8, 1, (5, 3), (3, 3), (0, 1), (1, 1), 20, 18),
    "grey, kernel below stride": (1, 8, 1, (2, 2), (3, 3), (0, 0), (1, 1), 14, 12),
    "uneven kernel": (2, 5, 1, (1, 7), (1, 1), (0, 3), (1, 1), 9, 10),
}


@pytest.mark.parametrize("name", list(GEOMETRIES))
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_maps_are_the_library_s(name: str, precision: torch.dtype) -> None:
    inputs, outputs, groups, kernel, stride, padding, dilation, height, width = GEOMETRIES[name]
    layer = Convolution("weight", None, None, stride, padding, dilation, groups)
    if not packs(layer, torch.device("cpu"), precision):
        pytest.skip("this processor's oneDNN has no bfloat16")
    bound = 1e-6 if precision == torch.float32 else 1e-2
    x = torch.randn(random.randint(1, 3), inputs, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs // groups, *kernel), torch.randn(outputs)
    x, weight, bias = (value.to(precision) for value in (x, weight, bias))
    y = layer.apply(x.double(), weight.double(), bias.double())
    for relu in (False, True):
        got = pack_forward(layer, weight, bias, tuple(x.shape), relu)(x)
        assert got.dtype == precision
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got, y.relu() if relu else y) <= bound
    s = torch.randn(y.shape).to(precision).contiguous(memory_format=torch.channels_last)
    expected = transposed_convolution(s.double(), weight.double(), layer, tuple(x.shape[1:]), groups)
    back = pack_transposed(layer, weight, tuple(x.shape), tuple(y.shape))
    assert back(s).shape == x.shape
    assert relative_error(back(s), expected) <= bound
    twice = torch.cat([s, -2 * s])  # two maps of each image
    assert relative_error(back(twice), torch.cat([expected, -2 * expected])) <= bound


def test_compiled_maps_are_the_same() -> None:
    layer = Convolution("weight", None, None, (2, 2), (1, 1), (1, 1), 1)
    x = torch.randn(2, 6, 9, 10).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 6, 3, 3)
    onward = pack_forward(layer, weight, None, (2, 6, 9, 10), True)
    back = pack_transposed(layer, weight, (2, 6, 9, 10), (2, 4, 5, 5))

    def both(x: Tensor) -> Tensor:
        return back(onward(x) * 2) + 1

    with torch.no_grad():
        got = torch.compile(both, fullgraph=True)(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, both(x)) <= 1e-6


def test_what_is_packed() -> None:
    cpu = torch.device("cpu")
    flat = Convolution("weight", None, None, (1, 1), (0, 0), (1, 1), 1)
    assert packs(flat, cpu, torch.float32)
    assert not packs(flat, cpu, torch.float64)
    assert not packs(flat, torch.device("cuda"), torch.float32)
    assert not packs(Convolution("weight", None, None, (1,), (0,), (1,), 1), cpu, torch.float32)


def test_weights_are_packed_for_the_maps_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any other number of maps oneDNN would bring the weights into another layout at every call."""
    packed: list[int] = []
    pack = PackedMaps.of

    def recorded(operation: LinearOperation, shape: Shape, message: Shape, relu: bool) -> PackedMaps:
        packed.append(message[0])
        return pack(operation, shape, message, relu)

    monkeypatch.setattr(PackedMaps, "of", recorded)
    model = calibrated(CifarResNet(1), 3, (8, 3, 16, 16))
    x = torch.randn(3, 3, 16, 16)
    explainer, exact = LRP(model, backend="torch"), LRP(model, backend="reference")
    requests = [({}, 3), ({"target": [[0, 1]] * 3}, 6), ({"start": torch.rand(3, 4, 10)}, 12)]
    for request, rows in [*requests, *requests]:
        packed.clear()
        got = explainer.explain(x, **request)
        assert set(packed) <= {rows}
        assert relative_error(got.relevance, exact.explain(x, **request).relevance) <= 1e-5
        assert {key[-1] for key in explainer._programs} >= {rows // 3}  # type: ignore[index]
    assert not packed
    assert len(explainer._programs) == 3


def test_explanations_run_on_packed_weights() -> None:
    """What the other tests of explanations on a CPU check is this."""
    explainer = LRP(calibrated(CifarResNet(), 0))
    explainer.explain(torch.randn(2, 3, 16, 16))
    (runner,) = explainer._programs.values()
    linears = [operation for operation in runner.program.operations if isinstance(operation, LinearOperation)]
    convolutions = [operation for operation in linears if isinstance(operation.layer, Convolution)]
    for operation in convolutions:
        assert operation.packed is not None
        assert all(isinstance(apply, PackedConvolution) for apply in operation.packed.forward.values())
        assert "stacks" not in operation.__dict__  # nothing is kept twice
    body = [operation for operation in convolutions if operation.factored]
    assert all(operation.packed is not None and operation.packed.stabilized for operation in body)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "rule", [AlphaBeta(2.0, 1.0, 1e-3), AlphaBeta(1.5, 0.5, 1e-3), AlphaBeta(2.0, 1.0, 0.5)], ids=str
)
def test_negative_products_are_the_rest(rule: Rule, biased: bool, relu: bool) -> None:
    """αβ takes two convolutions in float32: the layer's own and the positive products, whose ε has its sign."""
    layer = Convolution("weight", "bias" if biased else None, None, (2, 1), (1, 1), (1, 1), 1)
    parameters = {"weight": torch.randn(9, 6, 3, 3), "bias": torch.randn(9)}
    parameters["weight"][4].abs_()  # no negative products, beside positive ones whose rounding exceeds ε
    parameters["bias"][4] = 3e5 if biased else 0.0
    x = torch.rand(2, 6, 11, 8).contiguous(memory_format=torch.channels_last)
    whole = LinearOperation(layer, rule, True, parameters, True, torch.float32, "layer")
    outputs = tuple(layer.apply(x, parameters["weight"], None).shape)
    operation = whole.placed(tuple(x.shape), outputs, relu, True)
    assert operation.packed is not None
    assert (len(operation.packed.forward), len(operation.packed.derived)) == (2, 1)
    value, z, output = operation.forward(x, relu)
    gates = operation.gates(z, output, 1.0).groups

    bias = parameters["bias"].double() if biased else torch.zeros(9, dtype=torch.float64)
    own = layer.apply(x.double(), parameters["weight"].double(), bias)
    assert relative_error(value, own.relu() if relu else own) <= 1e-6
    assert bool((gates[1] < 0).all())
    for gate, sign in zip(gates, (1, -1), strict=True):
        parts = [(sign * v).clamp(min=0) * sign for v in (parameters["weight"].double(), bias)]
        z_part = layer.apply(x.double(), *parts)
        expected = 1 / (z_part + sign * rule.stabilizer.epsilon)
        # Where there are no products, any gate will do that is not 1 / 0.
        some = [o for o in range(9) if o != 4 or sign > 0]
        assert relative_error(gate[:, some], expected[:, some]) <= 1e-4


def test_faint_negative_products_have_a_convolution() -> None:
    """The difference of two large sums would leave them no digits."""
    layer = Convolution("weight", None, None, (1, 1), (1, 1), (1, 1), 1)
    weight = torch.randn(9, 6, 3, 3)
    weight[4] = torch.where(weight[4] < 0, 1e-4 * weight[4], weight[4])
    x = torch.rand(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)
    whole = LinearOperation(layer, AlphaBeta(2.0, 1.0), True, {"weight": weight}, True, torch.float32, "layer")
    operation = whole.placed(tuple(x.shape), (2, 9, 9, 7), True, True)
    assert operation.packed is not None
    assert (len(operation.packed.forward), operation.packed.derived) == (3, {})
    _, z, output = operation.forward(x, True)
    expected = 1 / (layer.apply(x.double(), weight.double().clamp(max=0)) - 1e-6)
    assert relative_error(operation.gates(z, output, 1.0).groups[1], expected) <= 1e-5


def test_in_bfloat16_each_product_has_a_convolution() -> None:
    layer = Convolution("weight", None, None, (1, 1), (1, 1), (1, 1), 1)
    if not packs(layer, torch.device("cpu"), torch.bfloat16):
        pytest.skip("this processor's oneDNN has no bfloat16")
    operation = LinearOperation(
        layer, AlphaBeta(2.0, 1.0), True, {"weight": torch.randn(9, 6, 3, 3)}, True, torch.bfloat16, "layer"
    ).placed((2, 6, 9, 7), (2, 9, 9, 7), True, True)
    assert operation.packed is not None
    assert (len(operation.packed.forward), operation.packed.derived) == (3, {})
