"""Single layers of ResNet-18 and 50 under our rules, beside their own forward pass; on a GPU the kernels beside eager torch.

A layer is a network of its own: ReLU (so that its input is known not to be negative, as inside a ResNet), convolution, batch
norm, ReLU, mean over space. A merge is the same with the input added before the last ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import cases
from builders import Convolution, Prepared
from cases import KernelCase
from contenders import relative_error
from kernel_bench import Row, difference, poisoned_outputs
from lrp_fast import LRP
from tables import Measured

BATCH, KERNEL_BATCH = 8, 256
BOUND = 1e-4
"""The largest relative L2 error of a float32 map against float64."""
LAUNCHES = 20
"""Of a kernel in one sample, so that waiting for the device counts for little. The caches stay warm."""


@dataclass(frozen=True)
class LayerRule:
    """A composite that gives the layer its rule. ``products``: convolutions of an explanation; ``gates``: of each output."""

    name: str
    composite: str
    products: int
    gates: int
    split: str | None = None


RULES = (
    LayerRule("z+", "epsilon_plus", 3, 1), LayerRule("epsilon", "epsilon", 2, 1),
    LayerRule("alpha-beta", "epsilon_alpha2_beta1", 4, 2),
)  # fmt: skip
"""Costs in convolutions forward and backward."""
MERGES = (
    LayerRule("z+, signed split", "epsilon_plus", 3, 2), LayerRule("z+, ratio split", "epsilon_plus", 3, 2, "ratio"),
)  # fmt: skip
FORWARD = LayerRule("forward", "", 1, 0)


class Layer(nn.Module):
    """One layer as a classifier of its channels."""

    def __init__(self, shape: Convolution, merges: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            shape.inputs, shape.outputs, shape.taps, shape.stride, shape.taps // 2, groups=shape.groups, bias=False
        )
        self.norm = nn.BatchNorm2d(shape.outputs)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias, 0.1, 0.1)
        self.merges = merges

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        own = self.norm(self.convolution(x))
        return (own + x if self.merges else own).relu().mean((2, 3))


@dataclass(frozen=True)
class LayerCase:
    """One call: of a layer, by a rule or forward, at its turn."""

    turn: int
    shape: Convolution
    rule: LayerRule
    merges: bool

    @property
    def layer(self) -> str:
        """By name."""
        shape = self.shape
        stride = f" stride {shape.stride}" if shape.stride > 1 else ""
        merge = ", merge" if self.merges else ""
        return f"{shape.size}² {shape.inputs}→{shape.outputs} {shape.taps}x{shape.taps}{stride}{merge}"

    def __str__(self) -> str:
        return f"turn {self.turn}-{self.layer}-{self.rule.name}"

    def counted(self) -> dict[str, int]:
        """FLOPs of the convolutions, and bytes with each tensor moved once, in float32."""
        shape, rule = self.shape, self.rule
        read = BATCH * shape.inputs * shape.size**2
        written = BATCH * shape.outputs * shape.out**2
        weight = shape.outputs * math.prod(shape.inner)
        elements = read + weight + written
        if rule is not FORWARD:  # forward: stacked weights, gates; backward: gates, relevance in, x, relevance out
            elements += (rule.products - 1) * weight + (2 * rule.gates + 1) * written + 2 * read
        return {"flops": shape.flops(BATCH, rule.products), "bytes": 4 * elements}


@dataclass(frozen=True)
class LaunchCase:
    """One sample: of a kernel, or of eager torch in its place, at its turn."""

    turn: int
    kernel: KernelCase
    way: str

    def __str__(self) -> str:
        return f"turn {self.turn}-{self.kernel.name}-{self.way}"


def layer_cases(network: str, side: int, turns: int) -> list[LayerCase]:
    """All calls, turn by turn; a forward pass stands beside the rules of its layer. ``cifar`` has but one small layer."""
    if network == "cifar":
        shapes, widths = {Convolution(side, 16, 16, 1, 3): 1}, {Convolution(side, 16, 16): 1}
    else:
        shapes = cases.convolutions("resnet18", side) | cases.convolutions("resnet50", side)
        widths = {Convolution(stage.size, stage.outputs, stage.outputs): 1 for stage in cases.stages(side, 64)}
    return [
        LayerCase(turn, shape, rule, merges)
        for turn in range(turns)
        for found, rules, merges in ((shapes, RULES, False), (widths, MERGES, True))
        for shape in found
        for rule in (FORWARD, *rules)
    ]


def launch_cases(kernels: Sequence[KernelCase], turns: int) -> list[LaunchCase]:
    """All samples, kernel by kernel, each in turn with eager torch: the tensors of all together would not fit."""
    return [LaunchCase(turn, kernel, way) for kernel in kernels for turn in range(turns) for way in ("kernel", "eager")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if metafunc.definition.name == "test_layer":
        metafunc.parametrize("case", layer_cases(option("network"), option("side"), option("turns")), ids=str)
    if metafunc.definition.name == "test_kernel":
        every = cases.kernel_cases() if torch.cuda.is_available() else []
        metafunc.parametrize("case", launch_cases(every, option("turns")), ids=str)


@pytest.fixture(scope="session")
def ready() -> dict[str, Callable[[], Any]]:
    """What is timed, by its row's name."""
    return {}


@pytest.fixture(scope="session")
def built() -> dict[KernelCase, Prepared]:
    """The kernel at work, alone."""
    return {}


def test_layer(
    case: LayerCase, device: torch.device, ready: dict[str, Callable[[], Any]], measured: Measured,
    benchmark: BenchmarkFixture,
) -> None:  # fmt: skip
    """A rule's map of a layer, or its forward pass: checked and warmed up at the first turn, one call a turn."""
    name = f"{case.layer}, {case.rule.name}"
    row = measured.layer(
        name, layer=case.layer, rule=case.rule.name, beside="forward", batch=BATCH, dtype="float32", **case.counted()
    )
    if name not in ready:
        if case.turn > 0:
            pytest.skip("it was not ready at the first turn")
        run = prepare_layer(case, device, row)
        run()
        ready[name] = run
    run_timed(row, ready[name], benchmark)


def prepare_layer(case: LayerCase, device: torch.device, row: dict[str, Any]) -> Callable[[], Any]:
    """The call, its first map checked."""
    torch.manual_seed(0)
    model = Layer(case.shape, case.merges).eval().to(device)
    x = torch.randn(BATCH, case.shape.inputs, case.shape.size, case.shape.size, device=device)
    if case.rule is FORWARD:
        model, last = (value.to(memory_format=torch.channels_last) for value in (model, x))
        return torch.no_grad()(lambda: model(last))
    rules = (case.rule.composite, case.rule.split)
    explainer = LRP(model, *rules)

    def run() -> Tensor:
        # Relevance as a ReLU network sends it, of all channels and in proportion to the outputs: no poles.
        relevance = explainer.explain(x, start=torch.relu).relevance
        assert relevance is not None
        return relevance

    reference = LRP(model, *rules, backend="reference").explain(x[:1], start=torch.relu).relevance
    error = relative_error(run()[:1], reference)
    row |= {"relative_error": error, "bound": BOUND}
    assert error <= BOUND, f"relative error {error:.1e}, bound {BOUND:.0e}"
    return run


def run_timed(row: dict[str, Any], run: Callable[[], Any], benchmark: BenchmarkFixture, calls: int = 1) -> None:
    """One sample, of so many calls."""
    benchmark.extra_info.update({name: row[name] for name in ("flops", "bytes")})

    def sample() -> None:
        for _ in range(calls):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(sample)
    row["seconds"].append(benchmark.stats.stats.data[0] / calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels need a CUDA device")
def test_kernel(
    case: LaunchCase, device: torch.device, built: dict[KernelCase, Prepared], measured: Measured,
    benchmark: BenchmarkFixture,
) -> None:  # fmt: skip
    """A kernel in bfloat16 beside the same work in eager torch: checked at its first sample, both warmed up there."""
    prepared = prepare_kernel(case.kernel, device, built)
    row = measured.layer(
        f"{case.kernel.name}, {case.way}", layer=case.kernel.name, rule=case.way, beside="eager", batch=KERNEL_BATCH,
        dtype="bfloat16", flops=prepared.flops, bytes=prepared.bytes,
    )  # fmt: skip
    if case.turn == 0 and case.way == "kernel":
        with poisoned_outputs():
            got = prepared.run()
        error = difference(got, prepared.eager())
        bound = Row(case.kernel, "bfloat16", compiled=False).bound
        row |= {"relative_error": error, "bound": bound}
        assert error <= bound, f"relative error {error:.1e}, bound {bound:.0e}"
    run_timed(row, prepared.run if case.way == "kernel" else prepared.eager, benchmark, LAUNCHES)


def prepare_kernel(kernel: KernelCase, device: torch.device, built: dict[KernelCase, Prepared]) -> Prepared:
    """The kernel's tensors on the device, in place of those of the one before."""
    if kernel not in built:
        built.clear()
        torch.manual_seed(0)
        built[kernel] = kernel.build(device, torch.bfloat16, KERNEL_BATCH, "ieee")
    return built[kernel]
