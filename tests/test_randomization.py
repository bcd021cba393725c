"""Parameter randomization: which layers become random, and similarity against plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_composites import SmallResNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lrp_fast import LRP
from lrp_fast.metrics import parameter_randomization

STAGES = ("fc", "layer2.downsample.0", "layer2.conv2", "layer2.conv1", "layer1.conv2", "layer1.conv1", "conv1")
"""Of :class:`SmallResNet`, in the order in which it runs them, reversed."""


def gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Input times gradient, summed over channels."""
    leaf = images.detach().clone().requires_grad_()
    model(leaf).gather(1, target[:, None]).sum().backward()
    model.zero_grad(set_to_none=True)
    return (leaf.grad * images).sum(1)


def trained(model: nn.Module) -> nn.Module:
    """Statistics and weights unlike a new model's, so that what is initialised afresh can be told."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.1 + 0.05 * torch.rand_like(value))
    return model


def slow_spearman(a: list[float], b: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    pairs = torch.tensor([ranks(a), ranks(b)], dtype=torch.float64)
    return float(torch.corrcoef(pairs)[0, 1])


class Recorder:
    """A method that keeps the weights of every network that it is given, and answers with maps drawn beforehand."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.maps = maps
        self.states: list[dict[str, Tensor]] = []
        self.targets: list[Tensor] = []

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        self.targets.append(target)
        return self.maps[len(self.states) - 1]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def names_of(model: nn.Module, modules: set[str]) -> set[str]:
    """What the state holds of these modules, but for counters."""
    return {
        name
        for name in model.state_dict()
        if name.rpartition(".")[0] in modules and not name.endswith("num_batches_tracked")
    }


OWN = {
    "fc": {"fc"},
    "layer2.downsample.0": {"layer2.downsample.0", "layer2.downsample.1"},
    "layer2.conv2": {"layer2.conv2", "layer2.bn2"},
    "layer2.conv1": {"layer2.conv1", "layer2.bn1"},
    "layer1.conv2": {"layer1.conv2", "layer1.bn2"},
    "layer1.conv1": {"layer1.conv1", "layer1.bn1"},
    "conv1": {"conv1", "bn1"},
}


@pytest.mark.parametrize("cascading", [True, False])
def test_layers_become_random_from_the_output_to_the_input(cascading: bool) -> None:
    model, images, target = trained(SmallResNet()), torch.randn(2, 3, 12, 12), torch.tensor([3, 1])
    recorder = Recorder([torch.randn(2, 12, 12) for _ in range(8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = parameter_randomization(model, images, target, recorder, cascading=cascading)
    assert got.stages == STAGES
    assert changed(before, recorder.states[0]) == set()
    random: set[str] = set()
    for stage, state in zip(STAGES, recorder.states[1:], strict=True):
        random = (random if cascading else set()) | OWN[stage]
        assert changed(before, state) == names_of(model, random)
        for name in OWN[stage]:
            if f"{name}.running_var" in state:  # a new batch norm
                assert state[f"{name}.running_var"].unique().tolist() == [1.0]
                assert state[f"{name}.running_mean"].unique().tolist() == [0.0]
                assert state[f"{name}.weight"].unique().tolist() == [1.0]
                assert state[f"{name}.bias"].unique().tolist() == [0.0]
    assert changed(before, model.state_dict()) == set()
    assert all(torch.equal(given, target) for given in recorder.targets)


def test_weights_are_those_of_the_seed_whether_cascading_or_not() -> None:
    model, images, target = trained(SmallResNet()), torch.randn(1, 3, 12, 12), torch.tensor([3])

    def states(cascading: bool, seed: int) -> list[dict[str, Tensor]]:
        recorder = Recorder([torch.randn(1, 4, 4) for _ in range(8)])
        parameter_randomization(model, images, target, recorder, cascading=cascading, seed=seed)
        return recorder.states

    before = torch.random.get_rng_state()
    cascading, alone, other = states(True, 5), states(False, 5), states(True, 6)
    for number, stage in enumerate(STAGES, 1):
        weight = f"{stage}.weight"
        assert torch.equal(cascading[number][weight], alone[number][weight])
        assert not torch.equal(cascading[number][weight], other[number][weight])
    first, second = (cascading[-1][f"layer1.conv{each}.weight"] for each in (1, 2))
    assert not torch.equal(first, second)
    torch.random.set_rng_state(before)
    parameter_randomization(model, images, target, lambda *_: torch.ones(1, 2, 2))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers go on as they would have


def test_similarity_equals_plain_definitions() -> None:
    model, images, target = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(),
        torch.randn(4, 3, 2, 2),
        torch.zeros(4).long(),
    )
    maps = [torch.randn(4, 5, 6).double(), torch.randn(4, 5, 6).double()]
    maps[1][1] = torch.randint(-2, 3, (5, 6))  # ties
    maps[1][2] = maps[0][2].exp()  # the same order
    maps[1][3] = -maps[0][3]
    got = parameter_randomization(model, images, target, Recorder(maps))
    assert got.stages == ("1",)
    for index in range(4):
        a, b = (each[index].flatten() for each in maps)
        assert float(got.spearman[0, index]) == pytest.approx(slow_spearman(a.tolist(), b.tolist()), abs=1e-12)
        magnitude = slow_spearman(a.abs().tolist(), b.abs().tolist())
        assert float(got.spearman_magnitude[0, index]) == pytest.approx(magnitude, abs=1e-12)
        assert float(got.cosine[0, index]) == pytest.approx(float(F.cosine_similarity(a, b, 0)), abs=1e-12)
    assert float(got.spearman[0, 2]) == pytest.approx(1)
    assert float(got.spearman[0, 3]) == pytest.approx(-1)
    assert float(got.spearman_magnitude[0, 3]) == pytest.approx(1)
    assert got.spearman.dtype == torch.float64


def test_constant_maps_cannot_be_compared() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    maps = [torch.randn(3, 7, 3), torch.stack([torch.full((7, 3), 0.1), torch.zeros(7, 3), torch.rand(7, 3)])]
    got = parameter_randomization(model, torch.randn(3, 3, 2, 2), torch.zeros(3).long(), Recorder(maps))
    assert got.spearman.isnan().tolist() == [[True, True, False]]
    assert got.spearman_magnitude.isnan().tolist() == [[True, True, False]]
    assert got.cosine.isnan().tolist() == [[False, True, False]]


def test_tells_a_method_that_explains_from_one_that_looks_at_the_picture() -> None:
    model, images = trained(SmallResNet()), torch.randn(6, 3, 16, 16)
    target = model(images).argmax(1)
    edges = parameter_randomization(
        model, images, target, lambda model, images, target: images.diff(dim=3).abs().sum(1)
    )
    assert torch.allclose(edges.spearman, torch.ones(7, 6).double())
    assert torch.allclose(edges.cosine, torch.ones(7, 6).double())
    explained = parameter_randomization(model, images, target, gradient)
    assert float(explained.spearman[-1].abs().mean()) < 0.6


def test_our_own_explainer_sees_the_new_weights() -> None:
    model, images = trained(SmallResNet()), torch.randn(2, 3, 16, 16)
    target = model(images).argmax(1)
    explainers: dict[int, LRP] = {}

    def kept(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return explainers.setdefault(id(model), LRP(model)).explain(images, target, "one").heatmap

    def fresh(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return LRP(model).explain(images, target, "one").heatmap

    first, second = (parameter_randomization(model, images, target, method) for method in (kept, fresh))
    assert len(explainers) == 2
    assert torch.allclose(first.cosine, second.cosine, atol=1e-6)
    assert float(first.cosine[-1].max()) < 0.999


def test_layers_in_the_order_they_run_and_leading_normalisations() -> None:
    class Backwards(nn.Module):
        """Defined from the output to the input, with a layer that runs twice and one that never does."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.unused = nn.Linear(4, 4)
            self.norm = nn.GroupNorm(2, 4)
            self.twice = nn.Conv2d(4, 4, 1)
            self.between = nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 1)
            self.entry = nn.BatchNorm2d(3, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.first(self.entry(x)))
            return self.head(self.norm(self.twice(self.between(x))).mean((2, 3)))

    model = trained(Backwards()).eval()
    recorder = Recorder([torch.randn(1, 2, 2) for _ in range(6)])
    got = parameter_randomization(model, torch.randn(1, 3, 4, 4), torch.tensor([0]), recorder)
    assert got.stages == ("head", "twice", "between", "first", "entry")
    assert changed(recorder.states[1], recorder.states[2]) == names_of(model, {"twice", "norm"})
    assert changed(recorder.states[4], recorder.states[5]) == {"entry.running_mean", "entry.running_var"}
    assert torch.equal(recorder.states[5]["unused.weight"], model.unused.weight)


def test_progress_counts_stages() -> None:
    told: list[tuple[float, int]] = []
    maps = Recorder([torch.randn(1, 2, 2) for _ in range(8)])
    parameter_randomization(
        SmallResNet(), torch.randn(1, 3, 12, 12), torch.tensor([0]), maps, progress=lambda *done: told.append(done)
    )
    assert told == [(number, 7) for number in range(1, 8)]


def test_refuses() -> None:
    images, target = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="training mode"):
        parameter_randomization(linear, images, target, gradient)
    linear.eval()
    with pytest.raises(ValueError, match="seed"):
        parameter_randomization(linear, images, target, gradient, seed=-1)
    bad = torch.zeros(2, 8, 8)
    bad[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="of the trained model: .* not finite .* in sample 1"):
        parameter_randomization(linear, images, target, lambda *_: bad)
    with pytest.raises(
        ValueError, match=r"of the trained model: expected heatmaps of shape \[2, 8, 8\], got \[1, 8, 8\]"
    ):
        parameter_randomization(linear, images, target, Recorder([torch.ones(1, 8, 8)]))
    with pytest.raises(ValueError, match=r"randomised at 1: expected .* \[2, 8, 8\], got \[2, 4, 4\]"):
        parameter_randomization(linear, images, target, Recorder([torch.ones(2, 8, 8), torch.ones(2, 4, 4)]))
    with pytest.raises(TypeError, match="of the trained model: .* got NoneType"):
        parameter_randomization(linear, images, target, lambda *_: None)
    with pytest.raises(ValueError, match="nothing to randomise"):
        parameter_randomization(nn.Flatten().eval(), images, target, gradient)
    attention = nn.Sequential(nn.Flatten(1, 2), nn.MultiheadAttention(8, 2)).eval()
    with pytest.raises(ValueError, match=r"no known initialisation of 1 \(MultiheadAttention\)"):
        parameter_randomization(attention, images, target, lambda *_: torch.ones(2, 8, 8))
    normed = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 3, bias=False))).eval()
    with pytest.raises(ValueError, match="parametrizations.weight"):
        parameter_randomization(normed, images, target, lambda *_: torch.ones(2, 8, 8))
