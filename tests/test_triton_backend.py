"""The triton backend, whole: kernels ran, what they did not serve is said, and the maps are the reference's.

Without a GPU the kernels run in Triton's interpreter, so networks and images are small.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrp_fast.backends.triton as backend
from lrp_fast import LRP, Composite, Splits, heat_quantize, list_composites
from lrp_fast.backends.triton import choice as choice_module
from lrp_fast.backends.triton.choice import Choice, Choices, Task
from lrp_fast.backends.triton.launch import OPERATORS, Operator
from lrp_fast.backends.triton.linear import FusedLinear
from lrp_fast.backends.triton.merges import FusedMerge
from lrp_fast.backends.triton.tune import milliseconds
from lrp_fast.batches import BatchExplainer, Decoded, on_device
from lrp_fast.engine import Program
from lrp_fast.kernels import spatial_conv
from lrp_fast.kernels.common import Arrival, End
from lrp_fast.kernels.pointwise_conv import Blocks
from lrp_fast.rules import AlphaBeta, Flat, Gamma, Rule, WSquare, ZBox, ZPlus
from lrp_fast.scopes import float32_precision
from lrp_fast.store import DONE, FAILED, Layout
from networks import Block, CifarResNet, SmallResNet, calibrated, relative_error


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test for a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 3, 25, 27)
COMPOSITES = [name for name in list_composites() if name != "epsilon"]
"""All but the one that plain float32 has no more right on a random network."""


class Shallow(SmallResNet):
    """A stem and one block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = self.layer1[:1], nn.Sequential(), nn.Sequential()


class Launched(TorchDispatchMode):
    """Counts the package's kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lrp_fast":
            self.counts[func._schema.name.removeprefix("lrp_fast::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> nn.Module:
    groups = getattr(request, "param", 1)
    return calibrated(SmallResNet(groups), int(torch.randint(10**6, ())), (8, 3, 25, 27)).to(DEVICE)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(SHAPE).to(DEVICE)  # the same on every device


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """k×k convolutions by their kernels too, which is otherwise for a measurement to decide."""
    monkeypatch.setattr(Choices, "of", lambda self, task: Choice("divided" if task.direction == "gates" else "fused"))


def bound(composite: str) -> float:
    return 1e-5 if composite in ("otsuki2024", "conserving") else 1e-3


def compared(
    model: nn.Module, images: Tensor, composite: str | Composite, **options: Any
) -> tuple[float, Counter[str]]:
    """The larger error of the triton backend's map and of its heatmap alone, and what it launched for the former."""
    expected = LRP(model, composite, backend="reference", **options).explain(images, start="one")
    explainer = LRP(model, composite, backend="triton", **options)
    with Launched() as launched:
        got = explainer.explain(images, start="one")
    assert explainer.backend == "triton"
    assert got.relevance is not None
    assert expected.relevance is not None
    direct = explainer.explain(images, start="one", relevance=False)
    assert relative_error(direct.heatmap, got.heatmap) <= 1e-5
    alone = relative_error(direct.heatmap, expected.heatmap)
    return max(relative_error(got.relevance, expected.relevance), alone), launched.counts


@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_small_resnet_is_the_references(model: nn.Module, images: Tensor, composite: str) -> None:
    error, launched = compared(model, images, composite)
    assert error <= bound(composite)
    guarded = composite == "conserving"
    assert launched["pointwise_gated"] == 3
    assert launched["pointwise_maximum"] == (9 if guarded else 0)
    assert launched["pointwise_merged"] == 4  # three bottlenecks, and one basic block's projection
    assert launched["merge"] == 1
    assert launched["pointwise_backward"] >= 7
    assert launched["gate"] >= 5
    assert launched["arrive"] >= 5
    assert launched["spread"] == (16 if guarded else 0)


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize("composite", ["otsuki2024", "epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box"])
def test_spatial_kernels_in_a_network(model: nn.Module, images: Tensor, composite: str) -> None:
    error, launched = compared(model, images, composite)
    assert error <= bound(composite)
    assert launched["spatial_gated"] == 5
    assert launched["spatial_merged"] == 1
    assert launched["spatial_backward"] == 7
    assert launched["gate"] == 1  # the stem
    assert launched["merge"] == 0


@pytest.mark.parametrize(
    "split",
    [
        "ratio",
        "symmetric",
        "residual-only",
        "signed",
        Splits("residual-only", "symmetric"),
        Splits("symmetric", "ratio"),
    ],
    ids=str,
)
@pytest.mark.parametrize("composite", ["otsuki2024", "conserving"])
def test_every_split(model: nn.Module, images: Tensor, composite: str, split: str | Splits) -> None:
    error, launched = compared(model, images, composite, split=split)
    assert error <= (1e-3 if split == "signed" else 1e-5)
    # A zero-guard codes what is dead by sign, which a split with negative weights does not leave it.
    assert launched["pointwise_merged"] + launched["merge"] == (
        0 if (composite, split) == ("conserving", "signed") else 5
    )


@pytest.mark.parametrize("composite", ["otsuki2024", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_and_the_branch_it_meets_are_one_kernel(
    model: nn.Module, images: Tensor, composite: str, dtype: torch.dtype
) -> None:
    """Of three bottlenecks two have projections; a 3×3 convolution that meets one is the library's."""
    explainer = LRP(model, composite, backend="triton", dtype=dtype)
    table = {line.split()[0]: line for line in explainer.describe(SHAPE).splitlines()[1:]}
    for name in ("layer1.0.add", "layer2.0.add"):
        assert table[name].endswith("triton: pointwise_conv, for both branches")
    assert table["layer1.1.add"].endswith("triton: pointwise_conv")
    rounds = (composite, dtype) == ("epsilon_alpha2_beta1", torch.bfloat16)
    beside = (
        "torch: the parts of its output would be rounded" if rounds else "triton: pointwise_conv, beside the library"
    )
    assert beside in table["layer3.0.add"]
    assert "triton: in its merge / pointwise_conv" in table["layer1.0.branch.6"]


class PooledResNet(SmallResNet):
    """A max-pool reads the last merge."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.max_pool2d(self.layer3(self.layer2(x)), 2).flatten(1))


@pytest.mark.parametrize(
    ("composite", "split", "found"),
    [
        ("otsuki2024", "ratio", 2),
        ("otsuki2024", "signed", 2),
        ("otsuki2024", "symmetric", 0),
        ("conserving", "ratio", 0),
        ("epsilon_plus", "signed", 1),
    ],
)
def test_weights_of_identity_skips_are_found_again(images: Tensor, composite: str, split: str, found: int) -> None:
    """But where relevance may reach what a ReLU has cut off: by a zero-guard, or a pool that hands it to a winner."""
    model = calibrated(PooledResNet(), 5, (8, 3, 25, 27)).to(DEVICE)
    explainer = LRP(model, composite, backend="triton", split=split)
    program = explainer._program(images, frozenset(), False).program
    merges = [passes for passes in program.passes if isinstance(passes, FusedMerge)]
    assert len(merges) == 5
    assert sum(merge.again is not None for merge in merges) == found
    error, _ = compared(model, images, composite, split=split)
    assert error <= (1e-3 if split == "signed" else bound(composite))


class SkipFirst(Block):
    """The skip is the sum's first operand, as in torchvision's RegNets."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.branch(x))


class Open(Block):
    """No ReLU behind the sum, so that the next layer's input has both signs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.skip(x)


class Bottlenecks(SmallResNet):
    """Identity skips read by a projection's block, by their like, and by the average pool."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(*(block("bottleneck", inputs, 12, 1, 1) for inputs in (16, 24)))
        self.layer2 = nn.Sequential(
            *(block("bottleneck", *shape, 1) for shape in ((24, 20, 2), (40, 20, 1), (40, 20, 1)))
        )
        self.layer3 = nn.Sequential()
        self.fc = nn.Linear(40, 7)


@pytest.mark.parametrize(
    ("composite", "split", "block", "found"),
    [
        ("otsuki2024", "ratio", Block, 2),
        ("otsuki2024", "signed", Block, 2),
        ("otsuki2024", "symmetric", Block, 2),
        ("otsuki2024", "residual-only", Block, 2),
        ("epsilon_plus", "ratio", Block, 2),
        ("epsilon_alpha2_beta1", "ratio", Block, 0),
        ("epsilon", "ratio", Block, 0),
        ("conserving", "ratio", Block, 0),
        ("otsuki2024", "ratio", SkipFirst, 1),  # of the other the last message is a strided projection's
        ("epsilon_plus", "symmetric", SkipFirst, 1),
    ],
)
def test_merges_whose_denominators_are_multiplied_again(
    images: Tensor, composite: str, split: str, block: type[Block], found: int
) -> None:
    """Of positive products alone, and where a 1×1 convolution sends the last message: not at the last merge, before a pool."""
    model = calibrated(Bottlenecks(block), 5, (8, 3, 25, 27)).to(DEVICE)
    explainer = LRP(model, composite, backend="triton", split=split)
    program = explainer._program(images, frozenset(), False).program
    divided = [passes for passes in program.passes if isinstance(passes, FusedMerge) and passes.divides]
    assert len(divided) == found
    if composite != "epsilon":
        error, _ = compared(model, images, composite, split=split)
        assert error <= (1e-3 if split == "signed" else bound(composite))


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_plus"])
def test_merges_without_a_relu(images: Tensor, composite: str) -> None:
    error, launched = compared(calibrated(Bottlenecks(Open), 5, (8, 3, 25, 27)).to(DEVICE), images, composite)
    assert launched["pointwise_merged"]
    assert error <= bound(composite)


def test_parts_that_do_not_add_up_to_a_layers_output(images: Tensor) -> None:
    """Of the convolution alone, where the batch norm is passed through."""
    model = calibrated(Bottlenecks(), 5, (8, 3, 25, 27)).to(DEVICE)
    composite = Composite.named("otsuki2024").with_rule("layer1.1.branch.0", AlphaBeta())
    error, _ = compared(model, images, composite)
    assert error <= 1e-5
    lines = LRP(model, composite, backend="triton").describe(SHAPE).splitlines()
    (line,) = (line for line in lines if line.startswith("layer1.1.branch.0 "))
    assert "triton: library + gate / library" in line


@pytest.mark.parametrize("layer", [5, 6], ids=["alone", "before a pool"])
def test_parts_that_do_not_add_up_to_the_output_of_a_layer_in_series(images: Tensor, layer: int) -> None:
    """Its input is read by it alone, and so is multiplied where it was made."""
    model = calibrated(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
            *([nn.MaxPool2d(2)] if layer == 6 else []), nn.Conv2d(16, 20, 3), nn.BatchNorm2d(20), nn.ReLU(),
            nn.Conv2d(20, 24, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7),
        ), 5, (8, 3, 25, 27),
    ).to(DEVICE)  # fmt: skip
    composite = Composite.named("otsuki2024").with_rule(str(layer - 2), AlphaBeta()).with_rule(str(layer + 1), AlphaBeta())
    error, launched = compared(model, images, composite)
    assert error <= 1e-5
    assert launched["gate"] == 3


@pytest.mark.parametrize("composite", COMPOSITES)
def test_layers_without_a_bias(images: Tensor, composite: str) -> None:
    """No batch norm gives them one: those of αβ are the kernels' too."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False), nn.ReLU(), nn.Conv2d(16, 24, 1, bias=False), nn.ReLU(),
        nn.Conv2d(24, 24, 3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7, bias=False),
    ).eval().to(DEVICE)  # fmt: skip
    error, launched = compared(model, images, composite)
    assert error <= bound(composite)
    assert launched["pointwise_gated"] == 1
    assert launched["pointwise_backward"] == 1


def test_gates_that_are_measured_to_be_kept_are_kept(images: Tensor) -> None:
    model = calibrated(Bottlenecks(), 5, (8, 3, 25, 27)).to(DEVICE)
    choices = Choices()

    def timed(work: Any) -> float:
        """The later in a task, the faster: gates are kept."""
        nonlocal count
        count -= 1
        return count

    count = 0.0
    tuned(model, "otsuki2024", choices, timed)
    assert [choice.way for key, choice in choices.measured.items() if "-gates-" in key] == ["kept", "kept"]
    expected = LRP(model, backend="triton").explain(images, start="one")
    explainer = LRP(model, backend="triton")
    explainer._choices = lambda: choices  # type: ignore[method-assign]
    program = explainer._program(images, frozenset(), False).program
    assert not any(passes.divides for passes in program.passes if isinstance(passes, FusedMerge))
    assert relative_error(explainer.explain(images, start="one").heatmap, expected.heatmap) <= 1e-5
    measured = len(choices.measured)
    tuned(model, "otsuki2024", choices, timed)
    assert len(choices.measured) == measured


@pytest.mark.parametrize("composite", ["otsuki2024", "epsilon_gamma_box"])
@pytest.mark.parametrize("model", [4], indirect=True)
def test_narrow_groups_go_to_the_library(model: nn.Module, images: Tensor, composite: str) -> None:
    """Their stacked outputs lie group by group, and the gate pass finds them there."""
    error, launched = compared(model, images, composite)
    assert error <= bound(composite)
    assert launched["gate"] >= 3
    assert launched["spatial_gated"] == 0


@pytest.mark.usefixtures("fused_everywhere")
def test_wide_groups_have_kernels(images: Tensor) -> None:
    model = calibrated(SmallResNet(groups=1, width=32), 3, (8, 3, 25, 27)).to(DEVICE)
    for block in model.layer1:
        old = block.branch[3]
        block.branch[3] = nn.Conv2d(32, 32, 3, old.stride, 1, groups=2, bias=False).to(DEVICE)
    error, launched = compared(model.eval(), images, "epsilon_alpha2_beta1")
    assert error <= 1e-3
    assert launched["spatial_gated"] == 5


@pytest.mark.usefixtures("fused_everywhere")
def test_no_two_groups_share_a_sum_of_dead_relevance(images: Tensor) -> None:
    """Groups of 20 channels behind a layer whose zero-guard sums every eight of them."""
    model = calibrated(SmallResNet(groups=2, width=40), 3, (8, 3, 25, 27)).to(DEVICE)
    composite = Composite.named("conserving").with_rule("layer1.0.branch.3", ZPlus())
    error, launched = compared(model, images, composite)
    assert error <= 1e-5
    assert launched["spatial_gated"] == 1
    assert launched["spatial_backward"] > 0


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving"])
def test_bfloat16(model: nn.Module, images: Tensor, composite: str) -> None:
    expected = LRP(model, composite, backend="reference").explain(images, start="one")
    got = LRP(model, composite, backend="triton", dtype=torch.bfloat16).explain(images, start="one")
    assert relative_error(got.heatmap, expected.heatmap) <= 2e-2


def test_tf32_is_used_where_it_is_asked_for(model: nn.Module, images: Tensor) -> None:
    expected = LRP(model, backend="reference").explain(images, start="one")
    got = LRP(model, backend="triton", tf32=True).explain(images, start="one")
    assert 1e-5 < relative_error(got.heatmap, expected.heatmap) <= 1e-2


def test_conserving_conserves(model: nn.Module, images: Tensor) -> None:
    result = LRP(model, "conserving", backend="triton").explain(images, start="one")
    assert float(result.leak.abs().max()) <= 1e-5


def test_what_has_no_kernel_runs_in_torch_and_says_why(images: Tensor) -> None:
    model = calibrated(CifarResNet(blocks=1), 5).to(DEVICE)
    error, launched = compared(model, images, "otsuki2024")
    assert error <= 1e-5
    assert launched["merge"] == 1  # of three: two have option-A shortcuts
    explainer = LRP(model, backend="triton")
    assert "chosen for an input shape" in explainer.describe()
    table = {line.split()[0]: line for line in explainer.describe(SHAPE).splitlines()[1:]}
    assert "torch: a branch is constant in places" in table["blocks.1.iadd"]
    assert "torch: its merge runs in torch" in table["blocks.1.conv2"]
    assert "triton: library + gate / library + arrive" in table["blocks.1.conv1"]
    assert "torch: a linear layer is too small to gain" in table["linear"]
    explainer.explain(images)
    assert explainer.describe() == explainer.describe(SHAPE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_gamma_box"])
def test_a_convolution_padded_at_one_end_runs_in_torch(images: Tensor, composite: str) -> None:
    model = calibrated(CifarResNet(blocks=1), 5, SHAPE)
    model.blocks[0].conv1 = nn.Conv2d(16, 16, (4, 2), padding="same")
    error, launched = compared(model.to(DEVICE).eval(), images, composite)
    assert error <= bound(composite)
    assert launched["gate"] > 0
    table = LRP(model, composite, backend="triton").describe(SHAPE)
    assert "torch: its input is padded further at one end" in table


def test_several_targets_and_layers(model: nn.Module, images: Tensor) -> None:
    names = ("bn1", "layer1.0", "layer1.1", "layer2.0.branch.4", "layer3.1.branch.1", "layer3.0")
    target = torch.randint(7, (len(images), 2), device=DEVICE)
    for composite in ("otsuki2024", "conserving"):
        expected = LRP(model, composite, backend="reference").explain(images, target, layers=names)
        got = LRP(model, composite, backend="triton").explain(images, target, layers=names)
        assert torch.equal(got.target, target)
        assert got.relevance is not None
        assert expected.relevance is not None
        assert relative_error(got.relevance.flatten(0, 1), expected.relevance.flatten(0, 1)) <= 1e-5
        for name in names:
            assert relative_error(got.layers[name].flatten(0, 1), expected.layers[name].flatten(0, 1)) <= 1e-5, name


def test_one_image_alone_and_equal_bits(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model, backend="triton")
    together, again = explainer.explain(images), explainer.explain(images)
    assert torch.equal(together.heatmap, again.heatmap)
    alone = torch.cat([explainer.explain(image[None]).heatmap for image in images])
    assert relative_error(alone, together.heatmap) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [ZPlus(), AlphaBeta(2.0, 1.0), ZBox(), WSquare(), Flat(), Gamma(0.25)], ids=str)
def test_rules_of_pixels(images: Tensor, rule: Rule, dtype: torch.dtype) -> None:
    """The first layer, whose rule looks at parts of its input or at none of it; γ there, which masks them, is torch's."""
    model = calibrated(Shallow(), 5, (8, 3, 25, 27)).to(DEVICE)
    composite = Composite.named("otsuki2024").with_rule("conv1", rule)
    expected = LRP(model, composite, backend="reference").explain(images, start="one")
    explainer = LRP(model, composite, backend="triton", dtype=dtype)
    (line,) = (line for line in explainer.describe(SHAPE).splitlines() if line.startswith("conv1 "))
    assert "triton: library + gate / " in line or rule.name == "gamma"
    for relevance in (True, False):
        got = explainer.explain(images, start="one", relevance=relevance)
        assert relative_error(got.heatmap, expected.heatmap) <= (1e-5 if dtype == torch.float32 else 3e-2)


class Odd(nn.Module):
    """Older designs: strides in the first 1×1 convolutions, pooled shortcuts, a mean over space, a sum of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.first = nn.Conv2d(16, 24, 1, 2)
        self.second = nn.Conv2d(24, 24, 3, 1, 1)
        self.skip = nn.Conv2d(16, 24, 1, 2)
        self.pooled = nn.Conv2d(24, 32, 1)
        self.third = nn.Conv2d(24, 32, 3, 2, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.second(F.relu(self.first(x))) + self.skip(x))
        x = F.relu(self.third(x) + self.pooled(F.avg_pool2d(x, 2, 2, ceil_mode=True)))
        x = F.relu(x + self.scaled(x))
        return self.fc(x.mean((2, 3)))

    def scaled(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 1)


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_plus"])
@pytest.mark.parametrize("size", [(17, 19), (16, 20)])
def test_other_designs(composite: str, size: tuple[int, int]) -> None:
    torch.manual_seed(int(torch.randint(10**6, ())))
    model = Odd().eval().to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.abs() if parameter.ndim == 1 else parameter)
    images = torch.randn(2, 3, *size, device=DEVICE)
    error, launched = compared(model, images, composite)
    assert error <= bound(composite)
    assert launched["block_backward"] >= 1


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_plus"])
@pytest.mark.parametrize("layer", [nn.MaxPool2d(16, 16), nn.Conv2d(16, 16, 16, 16)], ids=["pool", "convolution"])
def test_windows_of_more_positions_than_a_byte_counts(composite: str, layer: nn.Module) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip
    model = network.eval().to(DEVICE)
    error, _ = compared(model, torch.randn(2, 3, 33, 35, device=DEVICE), composite)
    assert error <= bound(composite)


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_alpha2_beta1"])
def test_launchers_are_called_at_once_where_nobody_looks(
    model: nn.Module, images: Tensor, composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op of torch costs more Python than a small kernel takes; what is seen through one is the same to the bit."""
    explainer = LRP(model, composite, backend="triton")
    with Launched() as launched:
        seen = explainer.explain(images)
    assert launched.counts["pointwise_backward"]

    def refused(self: Operator, *_: Any) -> None:
        raise AssertionError(f"the op {self.name} was called")

    monkeypatch.setattr(Operator, "__call__", refused)
    assert torch.equal(explainer.explain(images).heatmap, seen.heatmap)
    with Launched(), pytest.raises(AssertionError, match=r"the op \w+ was called"):
        explainer.explain(images)


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_gamma_box"])
def test_one_graph(model: nn.Module, images: Tensor, composite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes both passes without a break."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    explainer = LRP(model, composite, backend="triton", compile=True)
    expected = LRP(model, composite, backend="triton").explain(images, start="one")
    assert torch.equal(explainer.explain(images, start="one").heatmap, expected.heatmap)


def test_one_graph_where_a_merge_is_settled_alone(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is whose relevance is reported."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    model, layers = calibrated(Bottlenecks(), 5, (8, 3, 25, 27)).to(DEVICE), ("layer1.1", "layer2.1")
    expected = LRP(model, backend="triton").explain(images, start="one", layers=layers)
    got = LRP(model, backend="triton", compile=True).explain(images, start="one", layers=layers)
    for name in layers:
        assert torch.equal(got.layers[name], expected.layers[name])
    assert torch.equal(got.heatmap, expected.heatmap)


def test_compiled(images: Tensor) -> None:
    model = calibrated(CifarResNet(blocks=1), 5).to(DEVICE)
    images = images[..., :16, :16]
    expected = LRP(model, backend="reference").explain(images, start="one")
    got = LRP(model, backend="triton", compile=True).explain(images, start="one")
    assert relative_error(got.heatmap, expected.heatmap) <= 1e-5


def test_operators_fit_their_fake_implementations(model: nn.Module, images: Tensor) -> None:
    """Shapes and dtypes under fake tensors are those of a run: what compiled graphs rely on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: set[str] = set()

    class Checked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            if func.namespace == "lrp_fast":
                with FakeTensorMode() as mode:
                    tensors = [x if x is None else mode.from_tensor(x) for x in args[0]]
                    faked = func(tensors, *args[1:])
                assert [(x.shape, x.dtype, x.device) for x in faked] == [(x.shape, x.dtype, x.device) for x in results]
                seen.add(func._schema.name.removeprefix("lrp_fast::"))
            return results

    with Checked():
        for composite in ("otsuki2024", "conserving", "epsilon_gamma_box"):
            LRP(model, composite, backend="triton").explain(images, relevance=False)
        backend.quantize(torch.randn(2, 5, 7, device=DEVICE), 8)
    assert seen == {name for name in OPERATORS if not name.startswith("spatial")}


@pytest.mark.parametrize("shape", [(5, 7), (2, 13, 11), (2, 3, 6, 5)])
def test_heat_quantization_is_the_packages(shape: tuple[int, ...]) -> None:
    heatmap = torch.randn(shape)
    assert torch.equal(backend.quantize(heatmap.to(DEVICE), 5).cpu(), heat_quantize(heatmap, 5))


def test_refusals(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float64"):
        LRP(model, backend="triton", dtype=torch.float64)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"cuda_graph=True needs .* on cpu"):
            LRP(model, cuda_graph=True)
        with pytest.raises(ValueError, match=r"tune\(\) measures the triton backend on a CUDA device"):
            LRP(model).tune(torch.randn(SHAPE))
        assert LRP(model).backend == "torch"


def test_what_no_kernel_computes_is_refused_after_the_model_has_changed_too(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model, backend="triton")
    explainer.explain(images)
    model.double()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float64"):
            explainer.explain(images)
    model.float()
    explainer.explain(images)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are not interpreted on a GPU")
def test_an_interpreter_that_multiplies_bfloat16_wrong_is_refused() -> None:
    """In a process of its own: tests run in an interpreter that multiplies it right."""
    code = (
        "import torch; from lrp_fast import LRP; model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2));"
        "LRP(model.eval(), backend='triton'); LRP(model, backend='triton', dtype=torch.bfloat16)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Triton's interpreter (TRITON_INTERPRET=1) takes the bits of bfloat16 for whole numbers" in ended.stderr
    assert ended.returncode == 1


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrp_fast.backends.triton.binding.interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu; use backend='torch'"):
        backend.check_device(torch.device("cpu"), torch.float32)


# Choices --------------------------------------------------------------------------------------------------------------


def task(**changes: Any) -> Task:
    values: dict[str, Any] = {
        "kernel": "spatial", "direction": "forward", "batch": 2, "inputs": (16, 9, 9), "outputs": (24, 9, 9),
        "size": (3, 3, 1, 1, 1, 1, 1, 1), "groups": 1, "stacks": 2, "dtype": "float32", "precision": "ieee",
    }  # fmt: skip
    return Task(**(values | changes))


def test_choices_are_kept_on_disk(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cache" / "choices.json"
    choices = Choices(path)
    assert choices.of(task()) == Choice("library")
    assert choices.of(task(kernel="pointwise")) == Choice("fused")
    choices.keep(task(), Choice("fused", Blocks(64, 64, 32, 4, 3)))
    choices.keep(task(batch=8), Choice("library"))
    assert Choices.read(path).measured == choices.measured
    beside = Choices(path)  # another process, which had read the file before
    beside.keep(task(batch=4), Choice("library"))
    assert Choices.read(path).measured == choices.measured | beside.measured
    assert Choices.read(path).of(task()) == Choice("fused", Blocks(64, 64, 32, 4, 3))
    assert [entry.name for entry in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": {"way": "x", "blocks": null}}', '{"a": {"way": "fused"}}']
)
def test_a_damaged_cache_is_named(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"choices\.json does not hold measured choices .* delete it"):
        Choices.read(path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("LRP_FAST_CACHE", str(tmp_path))
    assert choice_module.cache_folder() == tmp_path
    monkeypatch.delenv("LRP_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert choice_module.cache_folder() == tmp_path / "x" / "lrp_fast"


def program_of(model: nn.Module, composite: str = "otsuki2024", **options: Any) -> Program:
    explainer = LRP(model, composite, backend="triton", **options)
    return explainer._program(torch.randn(SHAPE, device=DEVICE), frozenset(), False).program


def tuned(model: nn.Module, composite: str, choices: Choices, timed: Any, **options: Any) -> str:
    program = program_of(model, composite, **options)
    return backend.tune(program.units, program.passes, SHAPE[0], choices, timed)


def test_a_copy_runs_in_the_same_kernels(model: nn.Module) -> None:
    explainer = LRP(model, backend="triton")
    assert copy.deepcopy(explainer).describe(SHAPE) == explainer.describe(SHAPE)


def test_tuning_keeps_the_fastest_and_stays_right(model: nn.Module, images: Tensor, tmp_path: pathlib.Path) -> None:
    """With made-up times: the work of every candidate is run once and must be right afterwards."""
    expected = LRP(model, backend="reference").explain(images, start="one")
    choices = Choices(tmp_path / "choices.json")
    times: list[float] = []

    def timed(work: Any) -> float:
        if len(times) % 3 == 0:
            work()
        times.append(float(torch.rand(())))
        return times[-1]

    report = tuned(model, "otsuki2024", choices, timed)
    assert len(report.splitlines()) == len(choices.measured)
    tiles = {choice.way for key, choice in choices.measured.items() if "-gates-" not in key}
    assert tiles == {"fused", "library"}
    merges = [key for key in choices.measured if "-merge-" in key]
    assert len(merges) == 6
    assert sum("+ratio-()" in key for key in merges) == 2  # of five merges three have a projection
    assert sum("+ratio+divided12-()" in key for key in merges) == 1
    assert sum("-gates-" in key for key in choices.measured) == 1
    before = len(times)
    tuned(model, "otsuki2024", choices, timed)
    assert len(times) == before
    kept = json.loads((tmp_path / "choices.json").read_text())
    assert set(kept) == set(choices.measured)
    again = LRP(model, backend="triton")
    again._choices = lambda: choices  # type: ignore[method-assign]
    assert relative_error(again.explain(images, start="one").heatmap, expected.heatmap) <= 1e-5


def test_rules_and_splits_are_measured_apart(model: nn.Module) -> None:
    """Their epilogues differ, and which tiles hold them."""
    choices, measured = Choices(), []
    directions = ("-forward-", "-backward-", "-merge-")
    for composite, split in (("otsuki2024", "ratio"), ("otsuki2024", "symmetric"), ("conserving", "ratio")):
        tuned(model, composite, choices, lambda work: 1.0, split=split)
        measured.append([sum(direction in key for key in choices.measured) for direction in directions])
    forward, backward, merges = measured[0]
    before_merges = sum("+symmetric" in key for key in choices.measured if "-backward-" in key)
    assert 0 < before_merges < backward
    assert merges == 6  # five, and of one both ways: its gates kept or not
    assert measured[1] == [forward, backward + before_merges, 12]
    assert measured[2][::2] == [2 * forward, 17]


@pytest.mark.parametrize("ends", [1, 2])
def test_tiles_tried_backward_are_those_that_hold_its_ends(model: nn.Module, ends: int) -> None:
    layer = next(one for one in program_of(model).passes if isinstance(one, FusedLinear) and not one.pointwise)
    gates = torch.ones(SHAPE[0], *layer.x_shape[1:], layer.x_shape[0], device=DEVICE)
    tuning = importlib.import_module("lrp_fast.backends.triton.tune")
    tried = [choice.blocks for choice, _ in tuning._of_backward(layer, SHAPE[0], lambda: Arrival((End(gates),) * ends))]
    columns, inner = layer.x_shape[0], layer.shape[0]
    assert tried == [None, *spatial_conv.candidates(columns, inner, ends, torch.float32, "ieee")]


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving"])
def test_what_is_timed_backward_is_what_runs(
    model: nn.Module, images: Tensor, composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels behind which as much is read and written, not the product alone."""
    linear = importlib.import_module("lrp_fast.backends.triton.linear")
    launch, seen = linear.launch, set()

    def watched(name: str, tensors: list[Tensor | None], configured: str, arrival: Arrival | None = None) -> Any:
        if arrival is not None:
            s, weight, *product = tensors
            before = any(other is not None for other in (arrival.previous, arrival.dense, *product))
            ends = tuple((end.part, end.gate is not None, end.groups) for end in arrival.ends)
            seen.add((name, s.shape[1:], weight.shape, ends, arrival.value is not None, before))
        return launch(name, tensors, configured, arrival)

    monkeypatch.setattr(linear, "launch", watched)
    choices = Choices(defaults={"pointwise": "fused", "spatial": "fused"})
    explainer = LRP(model, composite, backend="triton")
    explainer._choices = lambda: choices  # type: ignore[method-assign]
    explainer.explain(images)
    run, seen = seen, set()
    tuned(model, composite, choices, lambda work: work() and 1.0)
    assert any(len(found[3]) == 2 for found in run)
    assert run <= seen


@pytest.mark.parametrize("how", ["drawing", "running"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_what_does_not_fit_while_tuning_keeps_its_default(
    model: nn.Module, how: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise error

    if how == "drawing":
        monkeypatch.setattr(importlib.import_module("lrp_fast.backends.triton.tune"), "_random", full)
    choices = Choices()
    report = tuned(model, "otsuki2024", choices, milliseconds if how == "drawing" else lambda work: milliseconds(full))
    assert not choices.measured
    assert "fused" in report
    assert "library" in report


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinities
@pytest.mark.parametrize("composite", COMPOSITES)
def test_an_image_that_overflows_has_no_map_and_the_others_have_theirs(
    model: nn.Module, images: Tensor, composite: str
) -> None:
    explainer = LRP(model, composite, backend="triton")
    expected = explainer.explain(images)
    bright = torch.cat([images, torch.finfo(torch.float32).max * images[:1].sign()])
    got = explainer.explain(bright)
    assert relative_error(got.heatmap[:-1], expected.heatmap) <= 1e-6
    assert bool(got.output[-1].isnan().any())
    assert bool(got.heatmap[-1].isnan().any())
    assert bool(got.leak[-1].isnan())


# On a GPU -------------------------------------------------------------------------------------------------------------


@gpu
def test_cuda_graph_is_the_same_map(model: nn.Module, images: Tensor) -> None:
    plain = LRP(model, backend="triton")
    recorded = LRP(model, backend="triton", cuda_graph=True)
    names = ("layer1.0", "layer3")
    for batch in (images, torch.randn_like(images), images[:1]):
        for target in (None, [[1, 2]] * len(batch)):
            expected = plain.explain(batch, target, layers=names)
            got = recorded.explain(batch, target, layers=names)
            assert torch.equal(got.output, expected.output)
            assert torch.equal(got.heatmap, expected.heatmap)
            for name in names:
                assert torch.equal(got.layers[name], expected.layers[name])
    first = recorded.explain(images)
    recorded.explain(torch.randn_like(images))
    assert torch.equal(first.heatmap, plain.explain(images).heatmap)


@gpu
@pytest.mark.parametrize("composite", ["epsilon_alpha2_beta1", "epsilon_gamma_box"])
def test_two_gates_on_the_device(model: nn.Module, images: Tensor, composite: str) -> None:
    test_a_small_resnet_is_the_references(model, images, composite)


@gpu
@pytest.mark.parametrize("composite", ["otsuki2024", "conserving"])
def test_bfloat16_on_the_device(model: nn.Module, images: Tensor, composite: str) -> None:
    test_bfloat16(model, images, composite)


@gpu
def test_bad_inputs_and_targets_on_the_device(model: nn.Module, images: Tensor) -> None:
    """They are looked at while the GPU works."""
    for options in ({}, {"cuda_graph": True}):
        explainer = LRP(model, backend="triton", **options)
        expected = explainer.explain(images, 1).heatmap
        bad = torch.cat([images, images, images])
        bad[1, 2, 3, 4], bad[-1, 0, 0, 0] = math.nan, -math.inf
        for target in (None, 1):
            with pytest.raises(ValueError, match=rf"not finite .* in sample 1, {len(bad) - 1}$"):
                explainer.explain(bad, target)
        for target in (1000, torch.full((len(images),), 1000), torch.full((len(images),), -1, device=DEVICE)):
            with pytest.raises(ValueError, match="out of range"):
                explainer.explain(images, target)
        for target in (1, torch.ones(len(images), dtype=torch.int32, device=DEVICE)):
            assert torch.equal(explainer.explain(images, target).heatmap, expected)


@gpu
def test_tune_on_the_device(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("LRP_FAST_CACHE", str(tmp_path))
    explainer = LRP(model, backend="triton")
    expected = explainer.explain(images)
    assert explainer.tune(images)
    assert list(tmp_path.glob("*.json"))
    assert relative_error(explainer.explain(images).heatmap, expected.heatmap) <= 1e-5


@gpu
def test_auto_is_triton_on_a_gpu(model: nn.Module) -> None:
    assert LRP(model).backend == "triton"


@gpu
def test_a_model_that_moves_is_explained_where_it_is(model: nn.Module, images: Tensor) -> None:
    explainer = LRP(model)
    expected = explainer.explain(images).heatmap
    model.cpu()
    got = explainer.explain(images.cpu()).heatmap
    assert explainer.backend == "torch"
    assert relative_error(got, expected.cpu()) <= 1e-5
    model.to(DEVICE)
    assert relative_error(explainer.explain(images).heatmap, expected) <= 1e-6
    assert explainer.backend == "triton"


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_plus"])
def test_two_runs_give_the_same_bits(composite: str, dtype: torch.dtype) -> None:
    """Though cuDNN has algorithms that add in any order."""
    model = calibrated(SmallResNet(width=64), 5, (8, 3, 25, 27)).to(DEVICE)
    x = torch.randn(*((32, 3, 224, 224) if DEVICE.type == "cuda" else SHAPE), device=DEVICE)
    first, second = (LRP(model, composite, backend="triton", dtype=dtype).explain(x).heatmap for _ in range(2))
    assert torch.equal(first, second)


@gpu
@pytest.mark.parametrize("size", [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_a_library_s_convolution_of_zeros_is_zero(size: tuple[int, int]) -> None:
    """A zero-guard and ε take it for granted; an algorithm that transforms tiles (Winograd's) would leave their rounding."""
    channels, side = size
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(DEVICE, memory_format=torch.channels_last)
    x = torch.rand(32, channels, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[..., : side // 2] = 0
    with torch.no_grad(), float32_precision(False):
        stacked = F.conv2d(x, torch.cat([conv.weight, conv.weight.clamp(min=0)]), padding=1)
        back = F.conv_transpose2d(x, conv.weight, padding=1)
    for found in (stacked, back):
        assert not bool(found[..., : side // 2 - 1].any())


@gpu
def test_rows_of_a_store_from_the_device(model: nn.Module) -> None:
    """Copied to the host by a stream of their own while the next batch is computed."""
    layout = Layout(24, 8, 25, 25, relevance={"layer1": (24, 7, 7)}, channels={"layer2": 40})
    batches = [Decoded(index, torch.randn(8, 3, 25, 25), [""] * 8) for index in range(3)]
    batches[1].reasons[3] = "not a picture"
    found = []
    for device in (torch.device("cpu"), DEVICE):
        explainer = BatchExplainer(LRP(copy.deepcopy(model).to(device), dtype=torch.float32), layout)
        explained = [explainer.explain(batch) for batch in on_device(batches, device)]
        found.append([one.rows(layout) for one in explained])
    for expected, rows in zip(*found, strict=True):
        for name in ("status", "reason", "target"):
            assert rows[name].tolist() == expected[name].tolist()
        for name in ("heatmap", "channels/layer2", "relevance/layer1"):
            largest = abs(expected[name]).max()
            assert abs(rows[name].astype(float) - expected[name]).max() <= 2e-3 * largest  # float16 of a scale
        assert rows["status"].tolist() == [FAILED if reason else DONE for reason in rows["reason"]]
