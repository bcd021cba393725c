"""What the kernels are compiled, checked and timed on: every launch of an explanation, and what the others are for.

A case builds, on any device (``meta`` too), its tensors, the launch (``run``) and the same work in plain torch on the
same tensors (``eager``): library convolutions in the storage dtype, everything else in float32, as the torch backend
does it. Random data without poles: inputs, messages and gates are not negative. ``precision`` goes to ``run``; what
``eager`` computes float32 convolutions in is the caller's to set (:func:`lrp_fast.scopes.float32_precision`).

In float32 both agree within 1e-5. In bfloat16 ``eager`` rounds a convolution before its pass and is itself off by 5e-3,
and by 4e-2 where αβ adds two rounded stacks up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from builders import (
    ALPHA_BETA,
    APART,
    DIVIDED,
    EPSILON,
    GAMMA,
    GUARD,
    STEM,
    Z_PLUS,
    Arriving,
    Build,
    Convolution,
    Prepared,
    build_arrive,
    build_block_backward,
    build_channel_sum,
    build_gate,
    build_gated,
    build_image_maximum,
    build_max_pool,
    build_merge,
    build_merged,
    build_pointwise_backward,
    build_product_maximum,
    build_quantize,
    build_spatial_backward,
    build_spread,
    build_stem_heatmap,
    build_winner_backward,
)
from lrp_fast.kernels.common import CONSTANT_SPLITS


@dataclass(frozen=True)
class KernelCase:
    """A launch by name, its kernel (``file.launcher``), and how to build it: (device, dtype, batch, precision).

    ``count``: how often one explanation of a ResNet-50 under otsuki2024 launches it by default; 0 for what is an
    alternative there (a k×k kernel in place of library convolution and pass) or serves another composite or network.
    """

    name: str
    kernel: str
    count: int
    build: Build


@dataclass(frozen=True)
class Stage:
    """One of a ResNet-50's four, the ``last`` one? Bottlenecks from ``inputs`` channels at before² to 4 · ``width`` at size²."""

    before: int
    size: int
    inputs: int
    width: int
    blocks: int
    last: bool

    @property
    def outputs(self) -> int:
        """Channels at the merges."""
        return 4 * self.width

    @property
    def stride(self) -> int:
        """Of the first block."""
        return 1 if self.before == self.size else 2


@dataclass
class Collected:
    """Cases under names that say their shapes."""

    cases: list[KernelCase] = field(default_factory=list)

    def add(self, kernel: str, count: int, build: Callable[..., Prepared], what: str, **values: Any) -> None:
        """One more; of one name already there the counts add up."""
        name = f"{kernel} {what}"
        for place, case in enumerate(self.cases):
            if case.name == name:
                self.cases[place] = replace(case, count=case.count + count)
                return
        self.cases.append(KernelCase(name, kernel, count, partial(build, **values)))


def stages(side: int, width: int) -> list[Stage]:
    """Of a ResNet-50 whose first stage has ``width`` channels, on images of side × side."""
    size, inputs, found = halved(halved(side)), width, []
    for index, blocks in enumerate((3, 4, 6, 3)):
        out = size if index == 0 else halved(size)
        found.append(Stage(size, out, inputs, width << index, blocks, last=index == 3))
        size, inputs = out, found[-1].outputs
    return found


def halved(size: int) -> int:
    """The output of a 3×3 pool or convolution at stride 2 with padding 1."""
    return (size - 1) // 2 + 1


def projection(stage: Stage) -> tuple[Convolution, Convolution]:
    """The two 1×1 convolutions that meet in a stage's first block: the skip's, and the residual branch's."""
    skip = Convolution(stage.before, stage.inputs, stage.outputs, stage.stride)
    return skip, Convolution(stage.size, stage.width, stage.outputs)


def forward_cases(found: Collected, stage: Stage) -> None:
    """A stage's forward pass."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    for count, at, inputs in ((1, stage.before, stage.inputs), (stage.blocks - 1, size, outputs)):
        shape = Convolution(at, inputs, width)
        found.add("pointwise_conv.gated", count, build_gated, f"{at}² {inputs}→{width}", shape=shape)
    found.add("gate.gate", stage.blocks, build_gate, f"{size}² {width}", size=size, channels=width)
    shape, beside = projection(stage)
    what = f"{stage.before}² {stage.inputs}→{outputs} stride {stage.stride} + {size}² {width}→{outputs}"
    found.add("pointwise_conv.merged", 1, build_merged, what, shape=shape, beside=beside)
    shape = Convolution(size, width, outputs)
    add = partial(found.add, "pointwise_conv.merged", build=build_merged, shape=shape)
    what = f"{size}² {width}→{outputs}"
    add(stage.blocks - 1 - stage.last, what=f"{what}, divided", rule=DIVIDED, divided=True)
    add(int(stage.last), what=what)


def backward_cases(found: Collected, stage: Stage) -> None:
    """A stage's backward pass, as far as its inputs."""
    size, before, width, outputs = stage.size, stage.before, stage.width, stage.outputs
    add = partial(found.add, "pointwise_conv.backward")
    add(
        stage.blocks, build_pointwise_backward, f"{size}² {outputs}→{width}",
        size=size, inner=outputs, channels=width, arriving=Arriving(),
    )  # fmt: skip
    for count, at in ((1, before), (stage.blocks - 1, size)):
        found.add("merge.arrive", count, build_arrive, f"{at}² {width}", size=at, channels=width, arriving=Arriving())
    for count, what, split, divisor in (
        (stage.blocks - 2, "divided merge", "ratio", width),
        (1, "merge of two layers", "", 0),
        (0, "merge", "ratio", 0),
    ):
        arriving = Arriving((1, 1), value=True, dense=True, split=split, divisor=divisor)
        add(
            count, build_pointwise_backward, f"{size}² {width}→{outputs}, {what}",
            size=size, inner=width, channels=outputs, arriving=arriving,
        )  # fmt: skip
    if stage.stride == 1:
        add(
            1, build_pointwise_backward, f"{size}² {width}+{outputs}→{stage.inputs}",
            size=size, inner=width, second=outputs, channels=stage.inputs, arriving=Arriving(value=True),
        )  # fmt: skip
        return
    add(
        1, build_pointwise_backward, f"{size}² {outputs}→{stage.inputs}, projection",
        size=size, inner=outputs, channels=stage.inputs, arriving=Arriving((0,)),
    )  # fmt: skip
    add(
        1, build_pointwise_backward, f"{before}² {width}→{stage.inputs}, divided merge of stride 2",
        size=before, inner=width, channels=stage.inputs,
        arriving=Arriving((1, 1), value=True, previous_stride=stage.stride, split="ratio", divisor=stage.inputs // 4),
    )  # fmt: skip


def end_cases(found: Collected, side: int, first: Stage, last: Stage) -> None:
    """The stem, its pool and the global average."""
    stem, width = halved(side), first.width
    what = f"{stem}² {width}, stem"
    found.add("gate.gate", 1, build_gate, what, size=stem, channels=width, rule=STEM, fixed=True)
    found.add(
        "pool.max_pool_gated", 1, build_max_pool, f"{stem}² {width}", size=stem, channels=width, kind="max_pool_gated"
    )
    found.add(
        "merge.arrive", 1, build_arrive, f"1² {last.outputs}, dense",
        size=1, channels=last.outputs, arriving=Arriving(dense=True), message=False,
    )  # fmt: skip
    found.add(
        "pool.block_backward", 1, build_block_backward, f"{last.size}² {last.outputs}, global average",
        size=last.size, channels=last.outputs, stride=last.size, arriving=Arriving((1, 1), value=True, split="ratio"),
    )  # fmt: skip
    found.add(
        "pool.block_backward", 1, build_block_backward, f"{stem}² {width}, max-pool",
        size=stem, channels=width, stride=2, arriving=Arriving(),
    )  # fmt: skip
    found.add("spatial_conv.stem_heatmap", 1, build_stem_heatmap, f"{side}² {width}", size=side, channels=width)


def alternative_cases(found: Collected, every: Sequence[Stage]) -> None:
    """3×3 convolutions as kernels, where the default is the library's."""
    for stage in every:
        width = stage.width
        first, others = (
            Convolution(stage.before, width, width, stage.stride, 3),
            Convolution(stage.size, width, width, 1, 3),
        )
        for shape in dict.fromkeys((first, others)):
            what = f"{shape.size}² {width}→{width} stride {shape.stride}"
            found.add("spatial_conv.gated", 0, build_gated, what, shape=shape)
            found.add("spatial_conv.backward", 0, build_spatial_backward, what, shape=shape, arriving=Arriving())


def basic_cases(found: Collected, stage: Stage) -> None:
    """Merges of ResNet-18 and 34: behind library convolutions, and in the 3×3 kernel."""
    size, width = stage.size, stage.width
    for split, linear in (("ratio", False), ("ratio", True), ("signed", False), ("symmetric", False)):
        what = f"{size}² {width}, {split}{', projection' if linear else ''}"
        found.add("merge.merge", 0, build_merge, what, size=size, channels=width, split=split, linear=linear)
    shape = Convolution(size, width, width, 1, 3)
    for linear in (False, True):
        what = f"{size}² {width}→{width}{', projection' if linear else ''}"
        found.add("spatial_conv.merged", 0, build_merged, what, shape=shape, linear=linear)
    merging = Arriving((1, 1), value=True, dense=True, split="ratio")
    what = f"{size}² {width}→{width} stride 1, merge"
    found.add("spatial_conv.backward", 0, build_spatial_backward, what, shape=shape, arriving=merging)
    found.add("merge.arrive", 0, build_arrive, f"{size}² {width}, merge", size=size, channels=width, arriving=merging)


def rule_cases(found: Collected, stage: Stage) -> None:
    """The epilogues of the other composites."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    for name, rule in (("ε", EPSILON), ("z⁺", Z_PLUS), ("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add("gate.gate", 0, build_gate, f"{size}² {width}, {name}", size=size, channels=width, rule=rule)
        shape, wide = Convolution(size, outputs, width), Convolution(size, width, outputs)
        found.add("pointwise_conv.gated", 0, build_gated, f"{size}² {outputs}→{width}, {name}", shape=shape, rule=rule)
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, {name}, signed split",
            shape=wide, rule=rule, split="signed",
        )  # fmt: skip
        shape = Convolution(size, width, width, 1, 3)
        found.add("spatial_conv.gated", 0, build_gated, f"{size}² {width}→{width}, {name}", shape=shape, rule=rule)
    skip, beside = projection(stage)
    for name, rule in (("ε", EPSILON), ("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{stage.before}²+{size}²→{outputs}, {name}, projection",
            shape=skip, beside=beside, rule=rule, split="signed",
        )  # fmt: skip
    found.add(
        "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, beside a library's",
        shape=wide, linear=True,
    )  # fmt: skip
    for split in CONSTANT_SPLITS:
        found.add(
            "pointwise_conv.merged",
            0,
            build_merged,
            f"{size}² {width}→{outputs}, {split} split",
            shape=wide,
            split=split,
        )
    for name, rule in (("αβ", ALPHA_BETA), ("γ", GAMMA)):
        found.add(
            "pointwise_conv.merged", 0, build_merged, f"{size}² {width}→{outputs}, {name}, beside a library's",
            shape=wide, rule=rule, split="signed", linear=True,
        )  # fmt: skip
        found.add(
            "spatial_conv.merged", 0, build_merged, f"{size}² {width}→{width}, {name}, projection",
            shape=Convolution(size, width, width, 1, 3), rule=rule, split="signed", linear=True,
        )  # fmt: skip


def two_gate_cases(found: Collected, stage: Stage) -> None:
    """Backward through αβ and γ, which have two gates."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² 2·{outputs}→{width}, αβ",
        size=size, inner=2 * outputs, channels=width, arriving=Arriving((2,)),
    )  # fmt: skip
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² 2·{width}→{outputs}, αβ, merge",
        size=size, inner=2 * width, channels=outputs, arriving=Arriving((2, 1), value=True, dense=True, split="signed"),
    )  # fmt: skip
    found.add(
        "spatial_conv.backward", 0, build_spatial_backward, f"{size}² 2·{width}→{width}, αβ",
        shape=Convolution(size, width, 2 * width, 1, 3), arriving=Arriving((2,)),
    )  # fmt: skip
    found.add(
        "merge.arrive", 0, build_arrive, f"{size}² {width}, αβ", size=size, channels=width, arriving=Arriving((2,))
    )


def guard_cases(found: Collected, stage: Stage) -> None:
    """The zero-guard of ``conserving``."""
    size, width, outputs = stage.size, stage.width, stage.outputs
    found.add("gate.image_maximum", 0, build_image_maximum, f"{size}² {outputs}", size=size, channels=outputs)
    found.add("gate.gate", 0, build_gate, f"{size}² {width}, guard", size=size, channels=width, rule=GUARD)
    for linear in (False, True):
        what = f"{size}² {outputs}, guard{', projection' if linear else ''}"
        found.add("merge.merge", 0, build_merge, what, size=size, channels=outputs, rule=GUARD, linear=linear)
    wide, (skip, beside) = Convolution(size, width, outputs), projection(stage)
    add = partial(found.add, "pointwise_conv.merged", 0, build_merged)
    add(f"{size}² {width}→{outputs}, guard", shape=wide, rule=GUARD)
    add(f"{stage.before}²+{size}²→{outputs}, guard, projection", shape=skip, beside=beside, rule=GUARD)
    what = f"{size}² {outputs}→{width}, guard"
    found.add("pointwise_conv.gated", 0, build_gated, what, shape=Convolution(size, outputs, width), rule=GUARD)
    for shape in (wide, Convolution(size, outputs, width)):
        what = f"{size}² {shape.inputs}→{shape.outputs}"
        found.add("pointwise_conv.image_maximum", 0, build_product_maximum, what, shape=shape)
    found.add(
        "pointwise_conv.backward", 0, build_pointwise_backward, f"{size}² {width}→{outputs}, guard, merge",
        size=size, inner=width, channels=outputs, arriving=Arriving((1, 1), value=True, dense=True, even=True, guard=True),
    )  # fmt: skip
    arriving = Arriving(value=True, dense=True, even=True, guard=True)
    found.add("merge.arrive", 0, build_arrive, f"{size}² {width}, guard", size=size, channels=width, arriving=arriving)
    found.add("pool.spread", 0, build_spread, f"{size}² {width}", size=size, channels=width)


def rest_cases(found: Collected, side: int, stage: Stage) -> None:
    """Groups, pools of other composites, heatmaps."""
    stem, width, wide = halved(side), stage.width, max(32, 4 * stage.width)
    shape = Convolution(stage.size, wide, wide, 1, 3, wide // 16)
    found.add("spatial_conv.gated", 0, build_gated, f"{stage.size}² {wide}, groups of 16", shape=shape)
    found.add(
        "gate.gate", 0, build_gate, f"{stage.size}² {wide}, groups of 4", size=stage.size, channels=wide, group_width=4
    )
    add = partial(found.add, "gate.gate", 0, build_gate, size=stem, channels=width)
    add(f"{stem}² {width}, αβ of pixels", rule=APART)
    add(f"{stem}² {width}, box of pixels", rule=Z_PLUS, fixed=True)
    for kind in ("max_pool_average", "winner_pool"):
        found.add(f"pool.{kind}", 0, build_max_pool, f"{stem}² {width}", size=stem, channels=width, kind=kind)
    for what, arriving in (("", Arriving()), (", two ends", Arriving((1, 1)))):
        found.add(
            "pool.winner_backward", 0, build_winner_backward, f"{stem}² {width}{what}",
            size=stem, channels=width, arriving=arriving,
        )  # fmt: skip
    found.add("heatmap.channel_sum", 0, build_channel_sum, f"{side}² 3", size=side, channels=3)
    found.add("heatmap.channel_sum", 0, build_channel_sum, f"{stage.size}² {wide}", size=stage.size, channels=wide)
    found.add("heatmap.quantize", 0, build_quantize, f"{side}²", size=side)


def cases_of(side: int, width: int) -> list[KernelCase]:
    """All cases, of a network as wide and images as large as given."""
    found, every = Collected(), stages(side, width)
    for stage in every:
        forward_cases(found, stage)
    for stage in every:
        backward_cases(found, stage)
    end_cases(found, side, every[0], every[-1])
    alternative_cases(found, every)
    basic_cases(found, every[0])
    rule_cases(found, every[1])
    two_gate_cases(found, every[1])
    guard_cases(found, every[1])
    rest_cases(found, side, every[0])
    return found.cases


def kernel_cases() -> list[KernelCase]:
    """Every kernel at the layer shapes of ResNet-50 and 224 × 224 images."""
    return cases_of(224, 64)


def small_cases() -> list[KernelCase]:
    """The same cases, tiny and of odd sizes, for checks on a CPU."""
    return cases_of(34, 8)


def convolutions(network: str, side: int) -> dict[Convolution, int]:
    """A torchvision ResNet's convolutions on images of side × side, and how many it has of each."""
    import torchvision
    from torch import nn

    with torch.device("meta"):
        model = getattr(torchvision.models, network)().eval()
        images = torch.empty(1, 3, side, side)
    found: dict[Convolution, int] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps, stride = layer.kernel_size[0], layer.stride[0]
        shape = Convolution(inputs[0].shape[2], layer.in_channels, layer.out_channels, stride, taps, layer.groups)
        assert (layer.padding, output.shape[2]) == ((taps // 2,) * 2, shape.out), layer
        found[shape] = found.get(shape, 0) + 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    model(images)
    return found
