"""Conservation over a data set: the summary against its definitions, and audits of batches against one of all images."""

from __future__ import annotations

import pytest
import torch
from test_composites import SmallResNet
from torch import Tensor, nn

from lrp_fast import LRP
from lrp_fast.metrics import Conservation, audit_dataset, step_losses


def test_the_summary_is_its_definitions() -> None:
    start = torch.rand(50).double() + 0.1
    total = start * (1 + 0.1 * torch.randn(50))
    got = Conservation(start, total)
    leaks = [(s - t) / s for s, t in zip(start.tolist(), total.tolist(), strict=True)]
    magnitudes = sorted(abs(leak) for leak in leaks)
    assert got.leak.tolist() == pytest.approx(leaks, rel=1e-12)
    assert got.mean == pytest.approx(sum(magnitudes) / 50, rel=1e-12)
    assert got.largest == pytest.approx(magnitudes[-1], rel=1e-12)
    assert got.quantile(0) == pytest.approx(magnitudes[0], rel=1e-12)
    for share in (0.9, 0.14, 0.141, float(torch.rand(()))):  # 0.14 · 50 is a little more than 7
        value = got.quantile(share)
        enough = [each for each in magnitudes if sum(other <= each for other in magnitudes) >= 50 * share - 1e-9]
        assert value == pytest.approx(enough[0], rel=1e-12)
    assert got.quantile(1) == got.largest
    # The best line through the origin: no other slope is nearer to the points.
    errors = [float(((total - slope * start) ** 2).sum()) for slope in (got.slope, got.slope + 1e-3, got.slope - 1e-3)]
    assert errors[0] == min(errors)
    assert Conservation(start, start).slope == 1
    assert Conservation(start, 0.5 * start).slope == pytest.approx(0.5)


def test_images_without_relevance() -> None:
    got = Conservation(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert got.leak.tolist() == [0.0, -torch.inf, 0.5]
    assert got.mean == got.largest == got.quantile(1) == torch.inf
    assert got.quantile(0.5) == 0.5
    with pytest.raises(ValueError, match=r"a share of the images in \[0, 1\], got 50"):
        got.quantile(50)
    assert Conservation(torch.zeros(2), torch.zeros(2)).leak.tolist() == [0.0, 0.0]


def test_of_explained_batches() -> None:
    explainer, images = LRP(SmallResNet()), torch.randn(5, 3, 16, 12)
    batches = [
        explainer.explain(images[:2]),
        explainer.explain(images[2:]),
        explainer.explain(images[:2], [[0, 1], [2, 3]]),
    ]
    got = Conservation.of(batches)
    assert len(got.start) == 2 + 3 + 4
    assert torch.allclose(got.leak, torch.cat([each.leak.flatten() for each in batches]).double(), atol=1e-5)
    assert torch.equal(got.start[2:5].float(), batches[1].start)
    assert got.mean > 1e-3  # the published method loses some
    kept = Conservation.of([LRP(SmallResNet(), "conserving").explain(images)])
    assert kept.largest <= 1e-5
    assert kept.slope == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("targets", [None, [[0, 1]] * 3])
def test_of_signals_and_features(targets: list[list[int]] | None) -> None:
    signals = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)).eval()
    features = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    for model, x in ((signals, torch.randn(3, 2, 9)), (features, torch.randn(3, 6))):
        result = LRP(model).explain(x, targets)
        assert Conservation.of([result]).leak.tolist() == pytest.approx(result.leak.flatten().tolist(), abs=1e-5)


def test_conservation_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        Conservation(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="of each image"):
        Conservation(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="total is not finite in sample 1"):
        Conservation(torch.zeros(2), torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="at least one attribution"):
        Conservation.of([])


def _batches(images: Tensor) -> list[Tensor | tuple[Tensor, object]]:
    return [images[:2], (images[2:3], 1), (images[3:], [0, 4, 2])]


@pytest.mark.parametrize("composite", ["otsuki2024", "conserving", "epsilon_plus"])
def test_audits_of_batches_are_the_audit_of_all(composite: str) -> None:
    model, images = SmallResNet().double(), torch.randn(6, 3, 14, 11).double()
    explainer = LRP(model, composite)
    targets = [*model(images[:2]).argmax(1).tolist(), 1, 0, 4, 2]
    got, whole = audit_dataset(explainer, _batches(images)), explainer.audit(images, targets)
    assert torch.allclose(got.start, whole.start, rtol=1e-9)
    assert torch.allclose(got.leak, whole.leak, rtol=1e-6, atol=1e-9)
    assert [row.name for row in got.rows] == [row.name for row in whole.rows]
    for row, expected in zip(got.rows, whole.rows, strict=True):
        assert row.lost.keys() == expected.lost.keys()
        for mine, theirs in [(row.received, expected.received), (row.passed, expected.passed)] + [
            (row.lost[cause], expected.lost[cause]) for cause in row.lost
        ]:
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9 * float(whole.start.abs().max()))
    assert "mean of 6 images" in str(got)


def test_step_losses_sum_to_the_mean_leak() -> None:
    audit = audit_dataset(LRP(SmallResNet()), [torch.randn(3, 3, 16, 16), torch.randn(2, 3, 9, 13)])
    steps = step_losses(audit)
    assert [step.name for step in steps] == [row.name for row in audit.rows]
    assert steps[0].received == pytest.approx(1, abs=1e-12)
    lost = sum(sum(step.lost.values()) for step in steps)
    assert abs(lost) > 1e-3
    assert lost == pytest.approx(float(audit.leak.mean()), abs=1e-9)
    one = next(step for step in steps if step.lost.get("stabilizer", 0) != 0)
    row = next(row for row in audit.rows if row.name == one.name)
    shares = [float(x) / float(s) for x, s in zip(row.lost["stabilizer"], audit.start, strict=True)]
    assert one.lost["stabilizer"] == pytest.approx(sum(shares) / 5, rel=1e-12)


def test_audit_refuses_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        audit_dataset(LRP(SmallResNet()), [])
    with pytest.raises(ValueError, match="sample 0"):
        audit_dataset(LRP(SmallResNet()), [torch.full((1, 3, 16, 16), torch.nan)])
