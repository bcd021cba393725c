"""Ceilings, what units move and compute, and their times: in miniature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import contenders
import limits
import records
from lrp_fast import LRP
from lrp_fast.engine import Program
from networks import CifarResNet

CPU = torch.device("cpu")
SMALL = limits.Sizes(2**22, (64, 128), ((1, 8, 17), (2, 16, 9)))
FOUND = limits.Ceilings(1e10, {"float32": 1e11, "bfloat16": 2e11}, {"float32": 3e11, "bfloat16": 1e11})


def bound(model: nn.Module, images: torch.Tensor, composite: str = "otsuki2024", backend: str = "torch") -> Program:
    """The program of a network's explanations."""
    return LRP(model, composite, backend=backend)._program(images, frozenset(), False).program


def chain(groups: int = 1) -> nn.Sequential:
    """Two convolutions of odd sizes, the second strided and perhaps grouped, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 5, padding=2), nn.ReLU(), nn.Conv2d(10, 6, 3, stride=2, padding=1, groups=groups), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7),
    ).eval()  # fmt: skip


def of(work: dict[limits.Place, limits.Work], unit: str, direction: str) -> limits.Work:
    """One unit's."""
    (found,) = (one for one in work.values() if (one.unit, one.direction) == (unit, direction))
    return found


def test_ceilings_are_plausible() -> None:
    found = limits.ceilings(CPU, SMALL, repeats=2)
    assert 1e8 < found.bandwidth < 1e13
    for rates in (found.products, found.convolutions):
        assert list(rates) == ["float32", "bfloat16"]
        assert all(1e6 < rate < 1e15 for rate in rates.values())


def test_the_roofline_is_the_slower_of_both() -> None:
    assert FOUND.rate("float32") == 3e11
    assert FOUND.seconds(1e10, 1.0, "float32") == 1.0
    assert FOUND.seconds(1.0, 6e11, "float32") == 2.0


@pytest.mark.parametrize(
    ("composite", "forward", "backward"),
    [("otsuki2024", 2, 1), ("epsilon_plus", 2, 1), ("epsilon", 1, 1), ("epsilon_alpha2_beta1", 2, 2)],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_a_convolution_are_its_maps(composite: str, forward: int, backward: int, groups: int) -> None:
    model, images = chain(groups), torch.randn(3, 3, 13, 9)
    work = limits.Counted(bound(model, images, composite), model).all()
    once = 2 * 3 * (7 * 5) * 6 * (10 // groups) * 9
    assert of(work, "2", "forward").flops == forward * once
    assert of(work, "2", "backward").flops == backward * once
    assert of(work, "2", "forward").kind == "3x3"
    assert of(work, "0", "forward").kind == "5x5"
    assert of(work, "6", "forward").kind == "dense"


def test_bytes_of_a_convolution_are_each_tensor_once() -> None:
    model, images = chain(), torch.randn(3, 3, 13, 9)
    work = limits.Counted(bound(model, images), model).all()
    inputs, outputs, weights = 3 * 10 * 13 * 9, 3 * 6 * 7 * 5, 6 * 10 * 9
    assert of(work, "2", "forward").bytes == 4 * (inputs + 2 * weights + outputs + outputs)  # and the gates
    assert of(work, "2", "backward").bytes == 4 * (
        outputs + outputs + weights + inputs
    )  # what arrives, gates; the message


def test_flops_are_those_torch_counts() -> None:
    model, images = CifarResNet(1).eval(), torch.randn(2, 3, 16, 16)
    explainer = LRP(model, backend="torch", dtype=torch.float64)  # never packed: the counter knows the operations
    model.double()
    explainer.explain(images)
    with FlopCounterMode(display=False) as counter:
        explainer.explain(images)
    program = explainer._program(images, frozenset(), False).program
    work = limits.Counted(program, model).all().values()
    assert sum(one.flops for one in work) == counter.get_total_flops()


def test_merges_and_pools_move_what_they_save() -> None:
    model, images = CifarResNet(1).eval(), torch.randn(2, 3, 16, 16)
    program = bound(model, images)
    work = limits.Counted(program, model).all()
    first = next(one for one in work.values() if one.kind == "merge" and one.direction == "forward")
    h = 2 * 16 * 16 * 16
    # Both branches, the residual's denominators; the sum, the gates made of those, and the skip's weight.
    assert (first.bytes, first.flops) == (4 * 6 * h, 0)
    assert of(work, "blocks.0.conv2", "forward").bytes == 4 * (h + 2 * 16 * 16 * 9 + 2 * h)
    reshaped = [one for one in work.values() if one.unit.startswith("view")]
    assert len(reshaped) == 2
    assert all(one.bytes == 0 for one in reshaped)


def test_every_unit_is_timed_and_the_map_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result: dict[str, Any] = limits.measure("cifar", 2, 16, "float32", CPU, FOUND, seconds=0.05)
    assert result["relative_error"] <= 1e-5
    rows = result["units"]
    assert len({(row["unit"], row["direction"]) for row in rows}) == len(rows)
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["unit"] for row in rows if row["direction"] == "backward"][-1] == "conv1"
    kinds = {row["kind"] for row in rows}
    assert kinds == {"input", "3x3", "merge", "pool", "dense", "other"}
    whole = result["whole"]
    assert 0 < whole["seconds_in_units"] < 20 * whole["seconds"]
    assert whole["floor_seconds"] == pytest.approx(sum(row["roofline_seconds"] for row in rows))
    assert whole["share_of_floor"] == pytest.approx(whole["floor_seconds"] / whole["seconds"])
    assert whole["forward_passes"] > 1
    assert 1 < whole["forward_passes_at_the_floor"] < 6
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert json.loads(records.save("limits-cifar", records.stamp() | result).read_text())["units"] == rows


def test_timing_leaves_the_program_as_it_was() -> None:
    model, images = CifarResNet(1).eval(), torch.randn(2, 3, 16, 16)
    explainer = LRP(model, backend="torch")
    before = explainer.explain(images).heatmap
    program = explainer._program(images, frozenset(), False).program
    clock = limits.UnitClock(program, CPU)
    with clock.watching():
        during = explainer.explain(images).heatmap
        clock.read()
    assert torch.equal(before, during)
    assert all(len(times) == 1 for times in clock.seconds.values())
    explainer.explain(images)
    clock.read()
    assert all(len(times) == 1 for times in clock.seconds.values())


def test_units_of_the_kernels_are_timed_too() -> None:
    pytest.importorskip("triton", reason="its kernels, interpreted")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no CUDA device")
    model, images = chain(), torch.randn(1, 3, 9, 9)
    explainer = LRP(model, backend="triton")
    explainer.explain(images)
    program = explainer._program(images, frozenset(), False).program
    assert any(passes is not None for passes in program.passes)
    clock = limits.UnitClock(program, CPU)
    with clock.watching():
        explainer.explain(images)
        clock.read()
    rows = limits.unit_rows(limits.Counted(program, model).all(), clock.seconds, FOUND)
    assert {row["unit"] for row in rows} >= {"0", "2", "6"}


def test_a_unit_without_a_time_is_an_error() -> None:
    work = {(1, "forward"): limits.Work("conv", "forward", "3x3", 1, 1, "float32")}
    with pytest.raises(ValueError, match="never timed: conv forward"):
        limits.unit_rows(work, {}, FOUND)  # type: ignore[arg-type]


def test_a_wrong_map_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "bound", lambda *given: 0.0)
    with pytest.raises(contenders.ParityError):
        limits.measure("cifar", 1, 16, "float32", CPU, FOUND, seconds=0.05)


def test_the_command_writes_what_it_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(limits, "ceilings", lambda device: FOUND)
    arguments = ["--network", "cifar", "--batch", "1", "--side", "16", "--seconds", "0.05"]
    ran = CliRunner().invoke(limits.application, arguments)
    assert ran.exit_code == 0, ran.output
    assert "copy: 10.0 GB/s" in ran.output
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"limits-cifar-{records.device_name()}-float32-torch")
    found = json.loads(file.read_text())
    assert found["ceilings"]["products"] == FOUND.products
    assert found["versions"]["torch"] == torch.__version__
    assert CliRunner().invoke(limits.application, ["--network", "nothing"]).exit_code == 2
