"""The audit: every step's account balances, and each cause of loss, provoked alone, is found where it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_composites import ParallelStems, SmallResNet
from torch import Tensor, nn

from lrp_fast import LRP, Composite, list_composites
from lrp_fast.audit import Audit, AuditRow
from lrp_fast.reference import CAUSES
from lrp_fast.rules import Epsilon, Flat, PositiveProducts, Rule, Stabilizer, ZPlus
from lrp_fast.splits import list_splits
from networks import CifarResNet


class OnThePixels(nn.Module):
    """A padding of its own, a pool over padding, a wide slice and linear layers: what may lose relevance anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.conv = nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(3, 6, 3, 2, 1, groups=3)
        self.pool, self.after = nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 6, (2, 1), dilation=2)
        self.hidden, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv(self.pad(x))))[:, 1:5]
        return self.fc(torch.relu(self.hidden(torch.relu(self.after(x)).mean((2, 3)))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small resnet": SmallResNet,
    "option a": lambda: CifarResNet(blocks=1).eval(),
    "parallel stems": lambda: ParallelStems().eval(),
    "on the pixels": lambda: OnThePixels().eval(),
}


def close(got: Tensor, expected: Tensor, size: Tensor | float = 1.0, bound: float = 1e-12) -> bool:
    """Equal to so many parts of ``size``; never for NaN."""
    return float(((got - expected) / size).abs().max()) <= bound


def turnover(row: AuditRow) -> Tensor:
    """What goes through a row, with no sign cancelled among its sums."""
    return row.received.abs() + row.passed.abs() + sum((lost.abs() for lost in row.lost.values()), torch.tensor(1.0))


def lost_at(audit: Audit) -> dict[tuple[str, str], float]:
    """Step and cause of every loss above rounding, in parts of the start, of the first image."""
    return {
        (row.name, cause): float(lost[0] / audit.start[0])
        for row in audit.rows
        for cause, lost in row.lost.items()
        if abs(float(lost[0] / audit.start[0])) > 1e-9
    }


# Every account balances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", list_composites())
@pytest.mark.parametrize("network", NETWORKS)
def test_received_is_passed_and_lost(network: str, composite: str) -> None:
    chosen = Composite.named(composite)
    # Where contributions of both signs share a denominator, rounding grows with what cancels.
    cancels = chosen.batch_norm == "fold"
    explainer, x = LRP(NETWORKS[network](), chosen), torch.randn(3, 3, 12, 10)
    audit = explainer.audit(x, target=[0, 1, 0])
    bound = 1e-8 if cancels else 1e-12
    assert [row.name for row in audit.rows] == [step.name for step in reversed(explainer.plan.steps[1:])]
    for row in audit.rows:
        assert close(row.unexplained, torch.zeros_like(row.received), turnover(row), bound), row.name
        assert set(row.lost) <= set(CAUSES)
    assert close(audit.rows[0].received, audit.start)
    total = sum(audit.lost().values(), torch.zeros_like(audit.start))
    size = max(float(turnover(row).max()) for row in audit.rows)
    assert close(total, audit.start - audit.arrived, size, bound)
    assert close(audit.leak, (audit.start - audit.arrived) / audit.start)


@pytest.mark.parametrize("composite", list_composites())
def test_leak_is_that_of_the_explanation(composite: str) -> None:
    model, x = SmallResNet(), torch.randn(3, 3, 9, 10)
    audit = LRP(model, composite).audit(x, target=2)
    explained = LRP(model, composite, backend="reference").explain(x, target=2)
    assert close(audit.leak, explained.leak, 1 + explained.leak.abs())
    assert close(audit.start, explained.start)
    assert close(audit.arrived, explained.heatmap.sum((1, 2)), 1 + audit.arrived.abs())


@pytest.mark.parametrize("split", [name for name in list_splits() if name != "signed"])
@pytest.mark.parametrize("network", ["small resnet", "option a", "parallel stems"])
def test_conserving_loses_nothing(network: str, split: str) -> None:
    if (network, split) == ("parallel stems", "residual-only"):
        return  # undefined there, says test_composites.py
    audit = LRP(NETWORKS[network](), "conserving", split=split).audit(torch.randn(3, 3, 12, 10), target=1)
    assert close(audit.leak, torch.zeros_like(audit.leak))
    for cause, lost in audit.lost().items():
        assert close(lost, torch.zeros_like(lost), audit.start), cause
    assert str(audit).count("\n") == 2  # no step to name


def test_a_dead_image_conserves_too() -> None:
    audit = LRP(SmallResNet(), "conserving").audit(torch.zeros(2, 3, 9, 10))
    assert close(audit.leak, torch.zeros_like(audit.leak))


# Each cause, provoked -------------------------------------------------------------------------------------------------


def one_rule(rule: Rule) -> Composite:
    return replace(Composite.named("epsilon"), convolution=rule, dense=rule, stem=rule, start="one")


def test_a_bias_takes_its_part() -> None:
    """``R b / stab(z)``, at the layer that has the bias."""
    head = nn.Linear(6, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.ReLU(), head).double().eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    audit = LRP(model, one_rule(Epsilon(1e-12))).audit(x, target=1)
    assert close(audit.lost()["bias"], (head.bias[1] / model(x)[:, 1]).detach(), bound=1e-9)
    assert set(lost_at(audit)) == {("3", "bias")}


def test_a_stabilizer_takes_its_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3, bias=False)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    rule = PositiveProducts(Stabilizer(0.5, signed=False), bias=False)
    audit = LRP(model, one_rule(rule)).audit(x, target=0)
    assert set(lost_at(audit)) == {("0", "stabilizer"), ("2", "stabilizer")}
    head = next(row for row in audit.rows if row.name == "2")
    assert close(head.lost["stabilizer"], (0.5 / (model(x)[:, 0] + 0.5)).detach())


def test_outputs_that_nothing_adds_to_are_dead_windows() -> None:
    first, head = nn.Linear(4, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, head).double().eval()
    with torch.no_grad():
        first.weight.abs_()
        first.weight[1].neg_()  # positive inputs never raise it: its relevance has nowhere to go
        first.bias.fill_(0.25)
        head.weight.abs_()
        head.bias.zero_()
    x = torch.rand(2, 4, dtype=torch.float64)
    composite = one_rule(ZPlus(1e-12)).with_rule("1", Flat(1e-12))
    audit = LRP(model, composite).audit(x, target=0)
    lost = lost_at(audit)
    assert lost["0", "dead windows"] == pytest.approx(1 / 3)
    assert set(lost) == {("0", "dead windows"), ("0", "bias")}


def test_cancelling_branches_are_dead_windows_of_a_signed_merge() -> None:
    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
            with torch.no_grad():
                self.conv.weight.zero_()
                for channel in range(3):
                    self.conv.weight[channel, channel] = -1.0 if channel == 0 else 1.0
                self.fc.weight.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) + x).mean((2, 3)))

    x = torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.1
    composite = one_rule(Epsilon(1e-12)).with_rule("fc", Flat(1e-12))
    composite = replace(composite, average_pool=replace(composite.average_pool, stabilizer=Stabilizer(1e-12)))
    signed = lost_at(LRP(Cancels().double().eval(), composite).audit(x, target=0))
    # The pool already refuses the channel that is zero, so that nothing reaches the merge there.
    assert [cause for _, cause in signed] == ["dead windows", "stabilizer"]
    assert next(iter(signed.values())) == pytest.approx(1 / 3)


@pytest.mark.parametrize("padded", ["pixels", "activations"])
def test_relevance_on_padding_is_lost_to_constants(padded: str) -> None:
    """The flat rule hands relevance to the zeros of a padding of its own; in a convolution's padding it does not."""
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    first: list[nn.Module] = (
        [nn.ZeroPad2d(2)] if padded == "pixels" else [nn.Conv2d(3, 3, 1, bias=False), nn.ZeroPad2d(2)]
    )
    model = nn.Sequential(*first, convolution, nn.Flatten(), nn.Linear(4 * 64, 2, bias=False)).double().eval()
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    audit = LRP(model, one_rule(Flat(1e-12))).audit(x, target=1)
    lost = lost_at(audit)
    assert {cause for _, cause in lost} == {"constants"}
    assert len(lost) == 1
    inner = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    inner[..., 2:-2, 2:-2] = 0.0
    window = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    every = nn.functional.conv2d(torch.ones_like(inner), window, padding=1)
    expected = (nn.functional.conv2d(inner, window, padding=1) / every).mean()
    assert next(iter(lost.values())) == pytest.approx(float(expected))


# What a person sees ---------------------------------------------------------------------------------------------------


def test_the_table_names_what_loses_and_how_much() -> None:
    audit = LRP(SmallResNet(), "otsuki2024").audit(torch.randn(3, 3, 9, 10))
    text = str(audit)
    head, *rows, total, leak = text.splitlines()
    assert head.split("  ")[0] == "step"
    assert [name for name in CAUSES if name in head] == list(CAUSES)
    losing = {
        row.name for row in audit.rows if any(float((v / audit.start).abs().max()) > 1e-9 for v in row.lost.values())
    }
    assert {row.split()[0] for row in rows} == losing
    assert "conv1" in losing
    assert "nan" not in text
    shown = re.fullmatch(r"leak (-?\d+\.\d{4}) % \(mean of 3 images\)", leak)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * float(audit.leak.mean()), abs=1e-4)
    percents = [float(cell) for cell in total.removeprefix("all steps").split()]
    assert percents[0] == 100.0
    assert sum(percents[1:]) == pytest.approx(float(shown[1]), abs=1e-3)


def test_a_start_of_nothing_leaks_nothing() -> None:
    audit = LRP(SmallResNet()).audit(torch.randn(2, 3, 8, 8), start=torch.zeros(2, 5))
    assert audit.leak.tolist() == [0.0, 0.0]
    assert "nan" not in str(audit)


def test_several_targets_are_refused() -> None:
    explainer, x = LRP(SmallResNet()), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="one target or start for each image"):
        explainer.audit(x, target=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="one target or start for each image"):
        explainer.audit(x, start=torch.rand(2, 3, explainer.explain(x).output.shape[1]))
    with pytest.raises(ValueError, match="out of range"):
        explainer.audit(x, target=9)


def test_an_override_shows_in_the_row() -> None:
    composite = Composite.named("otsuki2024").with_rule("layer1.conv2", Epsilon(0.5))
    audit = LRP(SmallResNet(), composite).audit(torch.randn(1, 3, 8, 8))
    rules = {row.name: row.rule for row in audit.rows}
    assert rules["layer1.conv2"] == "epsilon(epsilon=0.5)"
    assert {"ratio", "blocks", "proportional", "passing"} <= set(rules.values())
