"""The Quantus adapter: its call signature, and three of its metrics on our maps."""

from __future__ import annotations

import importlib.util
import pathlib
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrp_fast import LRP, heat_quantize
from lrp_fast.embedded import draw, embedded_network, network_input
from lrp_fast.integrations import quantus as adapter
from lrp_fast.integrations.quantus import explain
from lrp_fast.methods import RandomMap

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "quantus_metrics.py"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return embedded_network()


def drawn(count: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures float32 [N, 3, size, size], classes int64 [N] and masks bool [N, 1, size, size]."""
    pictures = [draw(77, index, size) for index in range(count)]
    inputs = network_input(np.stack([picture.image for picture in pictures])).numpy()
    labels = np.array([picture.label for picture in pictures])
    return inputs, labels, np.stack([picture.mask for picture in pictures])[:, None]


def test_explain_is_the_method(network: nn.Module) -> None:
    inputs, labels, _ = drawn(3)
    kept = inputs.copy()
    got = explain(model=network, inputs=inputs, targets=labels)
    expected = LRP(network).explain(torch.from_numpy(inputs), torch.from_numpy(labels), relevance=False).heatmap
    assert got.dtype == np.float32
    assert got.shape == (3, 1, 64, 64)
    assert np.array_equal(got[:, 0], expected.numpy())
    assert np.array_equal(inputs, kept)
    quantized = explain(model=network, inputs=inputs, targets=labels, method="otsuki2024+quantized", device="cpu")
    assert np.array_equal(quantized[:, 0], heat_quantize(expected).numpy())
    other = explain(model=network, inputs=inputs, targets=labels.astype(np.int32), method=RandomMap(3))
    assert np.array_equal(
        other[:, 0], RandomMap(3)(network, torch.from_numpy(inputs), torch.from_numpy(labels)).numpy()
    )
    # Quantus hands over float64 where it has added noise.
    assert np.array_equal(explain(model=network, inputs=inputs.astype(np.float64), targets=labels), got)


def test_models_that_quantus_changes(network: nn.Module) -> None:
    """Its randomisation metrics hand over other weights, which a method kept from call to call must see."""
    inputs, labels, _ = drawn(2)
    first = explain(model=network, inputs=inputs, targets=labels)
    changed = embedded_network(pretrained=False)
    assert not np.allclose(explain(model=changed, inputs=inputs, targets=labels), first)
    changed.load_state_dict(network.state_dict())
    assert np.array_equal(explain(model=changed, inputs=inputs, targets=labels), first)


def test_errors(network: nn.Module) -> None:
    inputs, labels, _ = drawn(2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'metod'"):
        explain(model=network, inputs=inputs, targets=labels, metod="otsuki2024")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="did you mean 'otsuki2024'"):
        explain(model=network, inputs=inputs, targets=labels, method="otsuki2023")
    with pytest.raises(ValueError, match="the model is on cpu, but the device asked for is cuda:1"):
        explain(model=network, inputs=inputs, targets=labels, device="cuda:1")
    with pytest.raises(ValueError, match="a device such as 'cpu' or 'cuda:0', got 'gpu'"):
        explain(model=network, inputs=inputs, targets=labels, device="gpu")
    with pytest.raises(TypeError, match="targets as integers.*got float64"):
        explain(model=network, inputs=inputs, targets=labels.astype(np.float64))
    with pytest.raises(ValueError, match="expected 2 targets"):
        explain(model=network, inputs=inputs, targets=labels[:1])
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        explain(model="resnet", inputs=inputs, targets=labels)  # type: ignore[arg-type]

    def broken(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        maps = images.mean(1)
        maps[1, 0, 0] = torch.nan
        return maps

    with pytest.raises(ValueError, match="the heatmap of input 1 holds values that are NaN"):
        explain(model=network, inputs=inputs, targets=labels, method=broken)
    with pytest.raises(ValueError, match=r"heatmaps of shape \[2, 64, 64\], got \[2, 3, 64, 64\]"):
        explain(model=network, inputs=inputs, targets=labels, method=lambda model, images, target: images)


def test_methods_are_kept_from_call_to_call() -> None:
    assert adapter._named("otsuki2024") is adapter._named("otsuki2024")


def test_metrics_of_quantus(network: nn.Module) -> None:
    """Through Quantus' own call: the numbers are those of its definitions, evaluated here on our maps."""
    quantus = pytest.importorskip("quantus", reason="needs quantus")
    inputs, labels, masks = drawn(6)
    heatmaps = np.abs(explain(model=network, inputs=inputs, targets=labels, method="conserving"))[:, 0]
    call = {
        "model": network, "x_batch": inputs, "y_batch": labels, "s_batch": masks, "explain_func": explain,
        "explain_func_kwargs": {"method": "conserving"}, "device": "cpu",
    }  # fmt: skip
    got = quantus.PointingGame(disable_warnings=True)(**call)
    assert list(map(bool, got)) == [bool(m[0].flat[h.argmax()]) for h, m in zip(heatmaps, masks, strict=True)]
    expected = []
    for heatmap, mask in zip(heatmaps, masks, strict=True):
        top = np.argsort(heatmap.flat)[::-1][: mask.sum()]
        expected.append(mask[0].flat[top].mean())
    assert quantus.RelevanceRankAccuracy(disable_warnings=True)(**call) == pytest.approx(expected)
    gini = []
    for heatmap in heatmaps.reshape(6, -1).astype(np.float64):
        ordered = np.sort(heatmap / heatmap.max() + 1e-7)  # Quantus normalises first
        n = len(ordered)
        gini.append(np.sum((2 * np.arange(1, n + 1) - n - 1) * ordered) / (n * ordered.sum()))
    assert quantus.Sparseness(disable_warnings=True)(**call) == pytest.approx(gini, rel=1e-5)


def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("quantus_metrics", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("quantus", reason="needs quantus")
    program = example()
    found = program.scores("conserving", size=64)
    assert list(found) == ["Sparseness", "Pointing game", "Relevance rank accuracy"]
    assert all(len(scores) == 12 and np.isfinite(scores).all() for scores in found.values())
    controls = program.scores("random", size=64)
    for name in found:
        assert found[name].mean() > controls[name].mean()
    program.METHODS = ("edges",)
    program.main()
    assert capsys.readouterr().out.splitlines()[1].startswith("edges ")
