"""Composites: the registry, what each assigns to a residual network, overrides, stems, and merges nobody can split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lrp_fast import LRP, Composite, Splits, composites, list_composites, register_composite
from lrp_fast.composites import Assignment
from lrp_fast.layers import Average, Convolution, MaxPool, Merge
from lrp_fast.rules import AlphaBeta, Epsilon, Flat, Gamma, PositiveProducts, Rule, Stabilizer, ZBox, ZeroGuard, ZPlus
from lrp_fast.splits import list_splits
from lrp_fast.trace import trace


class SmallResNet(nn.Module):
    """A stem, a basic block with an identity skip, one with a projection, and a head."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -0.3, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


def assigned(model: nn.Module, composite: Composite) -> dict[str, Assignment]:
    """What each step got, by its name."""
    plan = trace(model.eval())
    return {step.name: got for step, got in zip(plan.steps, composite.assign(plan), strict=True)}


def rules_of(model: nn.Module, composite: Composite) -> dict[str, Rule]:
    return {name: got.rule for name, got in assigned(model, composite).items() if got.rule is not None}


# The registry ---------------------------------------------------------------------------------------------------------


def test_an_unknown_composite_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown composite 'epsilon_pluss'; known: ") as error:
        Composite.named("epsilon_pluss")
    assert all(name in str(error.value) for name in list_composites())
    with pytest.raises(TypeError, match="a composite is a name or a Composite"):
        Composite.named(Epsilon())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list_composites())
def test_names_are_known_with_hyphens_and_described(name: str) -> None:
    composite = Composite.named(name.replace("_", "-"))
    assert composite == Composite.named(name)
    assert composite.name == name
    assert list_composites()[name] == composite.description != ""


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrp_fast.composites._REGISTRY", dict(composites._REGISTRY))

    def tests_own(gamma: float = 0.1) -> Composite:
        return replace(Composite.named("epsilon"), name="tests_own", convolution=Gamma(gamma))

    register_composite(tests_own)
    assert "tests_own" in list_composites()
    assert Composite.named("tests-own", gamma=0.5).convolution == Gamma(0.5)
    with pytest.raises(ValueError, match="'tests_own' is registered already"):
        register_composite(tests_own)


def test_parameters_of_a_composite() -> None:
    composite = Composite.named("epsilon-gamma-box", gamma=0.5, low=-1.0, high=2.0)
    assert composite.convolution == Gamma(0.5)
    assert composite.stem == ZBox(-1.0, 2.0)
    with pytest.raises(ValueError, match="'epsilon_gamma_box' has no parameter gama; it has: gamma, low, high"):
        Composite.named("epsilon_gamma_box", gama=0.5)


# What each composite assigns ------------------------------------------------------------------------------------------

PUBLISHED, GUARD = Stabilizer(1e-5, signed=False), ZeroGuard()
OWN = Stabilizer(1e-6)

ASSIGNED: dict[str, tuple[Rule, Rule, Rule, str]] = {  # stem, other convolutions, linear layers, batch norm
    "otsuki2024": (
        PositiveProducts(PUBLISHED, pixels=False), PositiveProducts(PUBLISHED), PositiveProducts(PUBLISHED, bias=False),
        "pass",
    ),
    "conserving": (
        PositiveProducts(GUARD, bias=False, pixels=False), PositiveProducts(GUARD, bias=False),
        PositiveProducts(GUARD, bias=False), "pass",
    ),
    "epsilon": (Epsilon(1e-6), Epsilon(1e-6), Epsilon(1e-6), "fold"),
    "epsilon_plus": (ZPlus(), ZPlus(), Epsilon(1e-6), "fold"),
    "epsilon_plus_flat": (Flat(), ZPlus(), Epsilon(1e-6), "fold"),
    "epsilon_alpha2_beta1": (AlphaBeta(2.0, 1.0), AlphaBeta(2.0, 1.0), Epsilon(1e-6), "fold"),
    "epsilon_alpha2_beta1_flat": (Flat(), AlphaBeta(2.0, 1.0), Epsilon(1e-6), "fold"),
    "epsilon_gamma_box": (ZBox(), Gamma(0.25), Epsilon(1e-6), "fold"),
}  # fmt: skip


def test_whatever_differs_in_a_composite_differs_in_its_record() -> None:
    composite = Composite.named("otsuki2024").with_rule("layer1.*", Gamma(0.25))
    changes: dict[str, object] = {
        "name": "mine", "convolution": replace(composite.convolution, stabilizer=Stabilizer(1e-4)), "dense": Epsilon(),
        "stem": None, "max_pool": replace(composite.max_pool, stabilizer=Stabilizer(1e-4)),
        "average_pool": composite.max_pool, "batch_norm": "fold", "splits": Splits("ratio", "signed"), "start": "one",
        "overrides": (("layer1.*", Gamma(0.5)),),
    }  # fmt: skip
    assert {*changes, "description"} == {field.name for field in fields(Composite)}
    others = [replace(composite, **{name: value}) for name, value in changes.items()]  # type: ignore[arg-type]
    first, second = ("layer1.*", Gamma(0.25)), (nn.Linear, Gamma(0.5))
    others += [replace(composite, overrides=both) for both in ((first, second), (second, first))]
    records = [json.dumps(each.record(), sort_keys=True) for each in (composite, *others)]
    assert len(set(records)) == len(records)
    assert "torch.nn.modules.linear.Linear: Rule(name='gamma'" in records[-1]
    assert Composite.named("otsuki2024").with_rule("layer1.*", Gamma(0.25)).record() == composite.record()


def test_the_table_holds_every_composite() -> None:
    assert set(ASSIGNED) == set(list_composites())


@pytest.mark.parametrize("name", ASSIGNED)
def test_what_a_composite_assigns(name: str) -> None:
    model, composite = SmallResNet(), Composite.named(name)
    stem, convolution, dense, batch_norm = ASSIGNED[name]
    positive = name in ("otsuki2024", "conserving")
    assert (composite.batch_norm, composite.start) == (batch_norm, "probability" if positive else "one")
    found = rules_of(model, composite)
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert found == dict.fromkeys(convolutions, convolution) | {"conv1": stem, "fc": dense}
    plan = trace(model)
    for step, got in zip(plan.steps, composite.assign(plan), strict=True):
        if isinstance(step.layer, Merge):
            assert got.split is not None
            assert got.split.name == ("ratio" if positive else "signed")
        elif isinstance(step.layer, (MaxPool, Average)):
            assert got.pool is not None
            on_max = "blocks" if positive else "winner"
            stabilizer = {"otsuki2024": PUBLISHED, "conserving": GUARD}.get(name, OWN)
            assert got.pool.kind == (on_max if isinstance(step.layer, MaxPool) else "proportional")
            assert got.pool.kind == "winner" or got.pool.stabilizer == stabilizer
        elif not isinstance(step.layer, Convolution) and step.name != "fc":
            assert got == Assignment()
    assert sum(got.pool is not None for got in composite.assign(plan)) == 2
    assert sum(got.split is not None for got in composite.assign(plan)) == 2


# Overrides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("layer1.conv2", {"layer1.conv2"}),
        ("layer1.*", {"layer1.conv1", "layer1.conv2"}),
        ("*conv1", {"conv1", "layer1.conv1", "layer2.conv1"}),
        ("layer2.downsample.0", {"layer2.downsample.0"}),
        (nn.Linear, {"fc"}),
        (nn.Conv2d, {"conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2", "layer2.downsample.0"}),
    ],
)
def test_a_rule_for_some_layers(pattern: str | type, fitting: set[str]) -> None:
    model, base, own = SmallResNet(), Composite.named("epsilon_plus_flat"), Gamma(0.125)
    found = rules_of(model, base.with_rule(pattern, own))
    assert {name for name, rule in found.items() if rule == own} == fitting
    untouched = {name: rule for name, rule in rules_of(model, base).items() if name not in fitting}
    assert {name: rule for name, rule in found.items() if name not in fitting} == untouched
    assert own not in rules_of(model, base).values()


def test_the_last_rule_that_fits_wins() -> None:
    base = Composite.named("epsilon_plus")
    several = (
        base.with_rule("layer*", Gamma(0.1)).with_rule("layer1.conv1", Gamma(0.2)).with_rule("*.conv*", Gamma(0.3))
    )
    found = rules_of(SmallResNet(), several)
    assert found["layer1.conv1"] == found["layer2.conv2"] == Gamma(0.3)
    assert found["layer2.downsample.0"] == Gamma(0.1)
    again = several.with_rule("layer1.conv1", Gamma(0.4))
    assert rules_of(SmallResNet(), again)["layer1.conv1"] == Gamma(0.4)


def test_a_module_called_twice_is_one_layer_to_its_user() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))

    found = rules_of(Twice(), Composite.named("epsilon").with_rule("conv", Gamma(0.5)))
    assert found == {"conv": Gamma(0.5), "conv:1": Gamma(0.5), "fc": Epsilon()}
    second = rules_of(Twice(), Composite.named("epsilon").with_rule("conv:1", Gamma(0.5)))
    assert second == {"conv": Epsilon(), "conv:1": Gamma(0.5), "fc": Epsilon()}


class Standardized(nn.Conv2d):
    """A convolution of a class of its own."""


class Functional(nn.Module):
    """A layer whose forward is a function of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight).relu()


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [(nn.Conv2d, {"0", "4"}), (Standardized, {"0"}), ("0", {"0"}), (Functional, {"2"}), ("2", {"2"}), ("*", {"0", "2", "4", "6"})],
)  # fmt: skip
def test_rules_find_modules_of_classes_that_torch_does_not_know(pattern: str | type, fitting: set[str]) -> None:
    model = nn.Sequential(
        Standardized(3, 4, 3),
        nn.ReLU(),
        Functional(),
        nn.Identity(),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    found = rules_of(model.eval(), Composite.named("epsilon").with_rule(pattern, Gamma(0.125)))
    assert {name for name, rule in found.items() if rule == Gamma(0.125)} == fitting
    assert LRP(model).explain(torch.randn(2, 3, 8, 8), layers=("0", "2")).layers["2"].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("pattern", ["layer3.*", "layer1", "bn1", nn.Conv3d])
def test_a_rule_that_fits_nothing_is_an_error(pattern: str | type) -> None:
    composite = Composite.named("epsilon_plus").with_rule(pattern, Gamma())
    with pytest.raises(ValueError, match=r"fits no linear layer of the model; there are: conv1, layer1\.conv1"):
        LRP(SmallResNet(), composite)


def test_a_rule_must_be_one() -> None:
    with pytest.raises(TypeError, match="a name pattern or a module class"):
        Composite.named("epsilon").with_rule(3, Gamma())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a rule such as Gamma\(0.25\)"):
        Composite.named("epsilon").with_rule("conv1", Gamma)  # type: ignore[arg-type]


def test_an_override_changes_the_map_as_the_reference_says() -> None:
    model, x = SmallResNet(), torch.randn(2, 3, 9, 11)
    composite = Composite.named("epsilon_plus").with_rule("layer1.*", Gamma(0.25)).with_split("ratio")
    target = torch.tensor([0, 1])
    without = composite.with_rule("layer1.*", ZPlus())
    plain, fast, exact = (
        LRP(model, chosen, backend=backend, dtype=torch.float64).explain(x, target).relevance
        for chosen, backend in ((without, "torch"), (composite, "torch"), (composite, "reference"))
    )
    assert plain is not None
    assert fast is not None
    assert exact is not None
    assert float((fast - exact).norm() / exact.norm()) <= 1e-8
    assert float((fast - plain).norm() / exact.norm()) > 1e-3


# Stems ----------------------------------------------------------------------------------------------------------------


class DeepStem(nn.Module):
    """Three convolutions before anything else, as in resnet50d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)
        )
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.stem(x)).mean((2, 3)))


class ParallelStems(nn.Module):
    """Two convolutions that both see the pixels, one of them behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(3, 6, 1)
        self.pool, self.after, self.fc = nn.AvgPool2d(2), nn.Conv2d(6, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        merged = torch.relu(self.wide(x) + self.narrow(self.pool(x)))
        return self.fc(torch.relu(self.after(merged)).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "stems"), [(SmallResNet, {"conv1"}), (DeepStem, {"stem.0"}), (ParallelStems, {"wide", "narrow"})]
)
def test_stems_are_the_layers_that_see_the_pixels(network: Callable[[], nn.Module], stems: set[str]) -> None:
    composite = replace(Composite.named("epsilon_plus_flat"), splits=Splits("ratio", "ratio"))
    found = rules_of(network(), composite)
    assert {name for name, rule in found.items() if rule == Flat()} == stems
    assert found["fc"] == Epsilon()


def test_a_network_of_linear_layers_alone_has_a_stem_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert rules_of(model, Composite.named("epsilon_plus_flat")) == {"0": Flat(), "2": Epsilon()}


def test_pixel_bounds_for_other_channels_name_the_layer() -> None:
    model, x = SmallResNet(channels=1), torch.randn(2, 1, 8, 8)
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="3 values for 'low' but the layer has 1 input channels"):
            LRP(model, "epsilon_gamma_box", backend=backend).explain(x)
    relevance = LRP(model, Composite.named("epsilon_gamma_box", low=-3.0, high=3.0)).attribute(x)
    assert isinstance(relevance, Tensor)
    assert bool(relevance.isfinite().all())


# Merges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", list_splits())
def test_a_merge_of_equals_needs_a_symmetric_split(split: str) -> None:
    composite = Composite.named("conserving").with_split(split)
    if split == "residual-only":
        with pytest.raises(ValueError, match=r"both branches hold equally many linear layers.*'ratio' or 'symmetric'"):
            LRP(ParallelStems().eval(), composite)
    else:
        found = [got.split.name for got in assigned(ParallelStems(), composite).values() if got.split is not None]
        assert found == [split]


def test_identity_and_projection_skips_get_their_own_split() -> None:
    splits = Splits(identity="residual-only", projection="symmetric")
    plan = trace(SmallResNet())
    explainer = LRP(SmallResNet(), "otsuki2024", split=splits)
    merges = {
        step.layer.kind: got.split.name
        for step, got in zip(plan.steps, explainer.composite.assign(plan), strict=True)
        if isinstance(step.layer, Merge) and got.split is not None
    }
    assert merges == {"identity": "residual-only", "projection": "symmetric"}
    assert Composite.named("otsuki2024").with_split(splits) == explainer.composite


def test_only_boxes_are_told_the_range_of_the_inputs() -> None:
    low, high = (-1.0, -2.0, -3.0), (1.0, 2.0, 3.0)
    assert Composite.for_range("epsilon-gamma-box", low, high) == Composite.named(
        "epsilon_gamma_box", low=low, high=high
    )
    for name in composites.list_composites():
        same = Composite.for_range(name, low, high) == Composite.named(name)
        assert same == (name != "epsilon_gamma_box"), name
    with pytest.raises(ValueError, match="unknown composite 'none'"):
        Composite.for_range("none", low, high)
