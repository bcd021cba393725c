"""Insertion and Deletion against a slow, obvious implementation for one image at a time, in NumPy."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from lrp_fast.heatmap import heat_quantize
from lrp_fast.metrics import insertion_deletion
from lrp_fast.metrics.insertion_deletion import BASELINES, ORDERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)
Floats = npt.NDArray[np.float64]


class Network(nn.Module):
    """A small classifier that feels where its pixels are; it notes the pictures that it was shown."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.head = nn.Linear(36, classes)
        self.shown: list[Tensor] = []
        with torch.no_grad():
            self.head.weight.mul_(12)
        self.to(DEVICE, torch.float64).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x)
        return self.head(self.pool(torch.relu(self.conv(x))).flatten(1))


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, height, width, dtype=torch.float64).to(DEVICE)


# The slow implementation ----------------------------------------------------------------------------------------------


def patches_of(size: tuple[int, int], patch: int) -> list[list[tuple[int, int]]]:
    """The pixels of every patch, row by row."""
    height, width = size
    return [
        [(y, x) for y in range(top, min(top + patch, height)) for x in range(left, min(left + patch, width))]
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]


def masks_of(
    image: Tensor, heatmap: Floats, patch: int, step: int, order: str, seed: int
) -> list[npt.NDArray[np.bool]]:
    """The masks of one image, [H, W] each, from the protocols' definitions."""
    size = tuple(image.shape[1:])
    patches = patches_of(size, patch)
    scale = heatmap.shape[0] / size[0], heatmap.shape[1] / size[1]
    # The small addition only keeps 2 * (2 / 4) from falling below 1 by rounding.
    value = {(y, x): heatmap[int(y * scale[0] + 1e-9), int(x * scale[1] + 1e-9)] for p in patches for y, x in p}
    relevance = [max(value[pixel] for pixel in pixels) for pixels in patches]
    count = len(patches)
    if order == "rank":
        checksum = zlib.crc32(image.cpu().numpy().tobytes())
        entering = np.random.default_rng([seed, checksum]).permutation(count).tolist()
        strict = sorted(range(count), key=lambda index: (-relevance[index], entering.index(index)))
        sizes = [*range(0, count, step), count]
        chosen = [set(strict[:held]) for held in sizes]
    else:
        falling = sorted(relevance, reverse=True)
        chosen = []
        for index in range(-(-count // step)):
            threshold = falling[min(step * (index + 1), count - 1)]
            chosen.append({index for index in range(count) if relevance[index] >= threshold})
    masks = []
    for held in chosen:
        mask = np.zeros(size, dtype=bool)
        for index in held:
            for pixel in patches[index]:
                mask[pixel] = True
        masks.append(mask)
    return masks


def blurred(image: Floats) -> Floats:
    """One picture under a Gaussian, a pixel at a time."""
    _, height, width = image.shape
    radius = 10 / 224 * min(height, width)
    reach = min(int(np.ceil(3 * radius)), min(height, width) - 1)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * radius**2))
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    out = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            window = padded[:, y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            out[:, y, x] = (window * weights).sum((1, 2)) / weights.sum()
    return out


def hidden_of(image: Floats, baseline: str) -> Floats:
    if baseline == "blur":
        return blurred(image)
    black = -np.array(MEAN) / np.array(STD) if baseline == "black" else np.zeros(3)
    return np.broadcast_to(black[:, None, None], image.shape)


def slow_curves(
    model: nn.Module,
    image: Tensor,
    heatmap: Tensor,
    label: int,
    patch: int,
    step: int,
    order: str,
    baseline: str,
    seed: int,
) -> tuple[list[float], list[float]]:
    pixels = image.cpu().numpy()
    hidden = hidden_of(pixels, baseline)
    curves: tuple[list[float], list[float]] = ([], [])
    for mask in masks_of(image, heatmap.cpu().numpy(), patch, step, order, seed):
        for curve, shown in zip(curves, (mask, ~mask), strict=True):
            picture = torch.from_numpy(np.where(shown, pixels, hidden)).to(DEVICE)
            with torch.no_grad():
                logits = model(picture[None])[0].cpu().numpy()
            curve.append(float(np.exp(logits[label]) / np.exp(logits).sum()))
    return curves


def slow_area(curve: list[float], places: list[float]) -> float:
    ends = zip(itertools.pairwise(curve), itertools.pairwise(places), strict=True)
    return sum((a + b) / 2 * (right - left) for (a, b), (left, right) in ends)


def slow_places(order: str, patches: int, step: int, points: int) -> list[float]:
    """Where the points lie: by the patches held (rank), or one as far from the next as any other (threshold)."""
    if order == "rank":
        return [min(step * point, patches) / patches for point in range(points)]
    return [point / (points - 1) for point in range(points)]


MAPS: dict[str, Callable[[int, int, int], Tensor]] = {
    "distinct": lambda n, h, w: torch.randn(n, h, w),
    "quantized": lambda n, h, w: heat_quantize(torch.rand(n, h, w) ** 3, 4),
    "constant": lambda n, h, w: torch.randn(n, 1, 1).expand(n, h, w),
    "two-level": lambda n, h, w: (torch.rand(n, h, w) > 0.9).float(),
    "signed zeros": lambda n, h, w: torch.tensor([-0.0, 0.0, 1.0])[torch.randint(3, (n, h, w))],
    "coarse": lambda n, h, w: torch.randn(n, 4, 3).double(),
    "one row": lambda n, h, w: torch.randn(n, 1, w),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("patch", "step"), [(1, 31), (3, 1), (3, 7), (5, 4), (16, 3), (9, 1)])
def test_equals_the_slow_one(kind: str, order: str, patch: int, step: int) -> None:
    model, seed = Network(), int(torch.randint(1000, ()))
    height, width = (13, 10) if patch < 16 else (20, 37)
    images, labels = pictures(2, height, width), torch.randint(5, (2,))
    heatmaps = MAPS[kind](2, height, width)
    baseline = BASELINES[(len(kind) + patch) % 3]
    got = insertion_deletion(model, images, heatmaps, labels, patch, step, order, baseline, MEAN, STD, seed=seed)
    for index in range(2):
        insertion, deletion = slow_curves(
            model, images[index], heatmaps[index], int(labels[index]), patch, step, order, baseline, seed
        )
        assert got.insertion_curve.shape[1] == len(insertion)
        assert np.abs(got.insertion_curve[index].numpy() - insertion).max() <= 1e-9
        assert np.abs(got.deletion_curve[index].numpy() - deletion).max() <= 1e-9
        places = slow_places(order, -(-height // patch) * -(-width // patch), step, len(insertion))
        areas = slow_area(insertion, places), slow_area(deletion, places)
        assert abs(float(got.insertion[index]) - areas[0]) <= 1e-9
        assert abs(float(got.deletion[index]) - areas[1]) <= 1e-9
        assert abs(float(got.id[index]) - (areas[0] - areas[1])) <= 1e-9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_equals_the_slow_one(order: str, baseline: str) -> None:
    model, images, labels = Network(), pictures(1, 41, 30), torch.randint(5, (1,))
    heatmaps = heat_quantize(torch.rand(1, 41, 30), 8)
    got = insertion_deletion(model, images, heatmaps, labels, 2, 20, order, baseline, MEAN, STD)
    insertion, deletion = slow_curves(model, images[0], heatmaps[0], int(labels[0]), 2, 20, order, baseline, 0)
    assert np.abs(got.insertion_curve[0].numpy() - insertion).max() <= 1e-9
    assert np.abs(got.deletion_curve[0].numpy() - deletion).max() <= 1e-9
    assert float((got.insertion_curve - got.insertion_curve[:, :1]).abs().max()) > 1e-3  # the pictures do differ


@pytest.mark.parametrize(("order", "largest"), [("rank", 11), ("threshold", 10)])
def test_a_step_that_shows_all_is_refused(order: str, largest: int) -> None:
    """Of twelve patches; every map would score alike."""
    arguments = Network(), pictures(2, 6, 7), torch.randn(2, 6, 7), torch.randint(5, (2,))
    for step in (largest + 1, 5000):
        with pytest.raises(ValueError, match=f"step {step}: .*6 x 7 pixels, 12 patches .* at most {largest} "):
            insertion_deletion(*arguments, 2, step, order)
    assert float(insertion_deletion(*arguments, 2, largest, order).insertion_curve.diff(dim=1).abs().max()) > 1e-6
    with pytest.raises(ValueError, match="1 patch of 7 x 7; expected a smaller patch"):
        insertion_deletion(*arguments, 7, 1, order)


def test_fractions_are_the_shares_of_the_masks() -> None:
    arguments = Network(), pictures(1, 9, 8), torch.randn(1, 9, 8), torch.tensor([2])
    rank = insertion_deletion(*arguments, step=np.int64(20)).fractions
    assert rank.tolist() == pytest.approx([0, 20 / 72, 40 / 72, 60 / 72, 1])
    threshold = insertion_deletion(*arguments, step=20, order="threshold").fractions
    assert threshold.tolist() == pytest.approx([21 / 72, 41 / 72, 61 / 72, 1])


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_an_image_scores_the_same_in_any_batch(order: str) -> None:
    model, images, labels = Network(), pictures(5, 12, 9), torch.randint(5, (5,))
    heatmaps = heat_quantize(torch.rand(5, 12, 9), 5)
    whole = insertion_deletion(model, images, heatmaps, labels, 2, 3, order, "blur", MEAN, STD)
    for size in (1, 2, 7, 1000):
        model.shown.clear()
        other = insertion_deletion(model, images, heatmaps, labels, 2, 3, order, "blur", MEAN, STD, batch_size=size)
        assert max(map(len, model.shown)) <= size
        assert torch.allclose(other.insertion_curve, whole.insertion_curve, rtol=1e-12)
        assert torch.allclose(other.deletion_curve, whole.deletion_curve, rtol=1e-12)
        assert other.forward_passes == whole.forward_passes
    turned = torch.tensor([3, 0, 4])
    alone = insertion_deletion(
        model, images[turned.to(DEVICE)], heatmaps[turned], labels[turned], 2, 3, order, "blur", MEAN, STD
    )
    assert torch.allclose(alone.id, whole.id[turned], rtol=1e-12)


def test_no_picture_is_shown_twice() -> None:
    model, images, labels = Network(), pictures(3, 10, 10), torch.randint(5, (3,))

    def passes(heatmaps: Tensor, order: str) -> int:
        model.shown.clear()
        got = insertion_deletion(model, images, heatmaps, labels, step=8, order=order, baseline="blur", batch_size=16)
        shown = torch.cat(model.shown)
        assert got.forward_passes == len(shown) == len(shown.flatten(1).unique(dim=0))
        return got.forward_passes

    points = 14  # of 0, 8, ..., 96 and 100 patches
    assert passes(torch.randn(3, 10, 10), "rank") == 3 * (2 * points - 2)
    assert passes(torch.randn(3, 10, 10), "threshold") == 3 * 2 * 13
    assert passes(torch.ones(3, 10, 10), "threshold") == 3 * 2
    assert passes(heat_quantize(torch.rand(3, 10, 10), 4), "threshold") <= 3 * 2 * 4


def test_ties_enter_in_an_order_of_the_image_and_the_seed() -> None:
    model, images, labels = Network(), pictures(2, 8, 8), torch.tensor([1, 1])

    def curve(images: Tensor, seed: int) -> Tensor:
        return insertion_deletion(
            model, images, torch.zeros(len(images), 8, 8), labels, step=5, seed=seed
        ).insertion_curve

    assert torch.equal(curve(images, 3), curve(images, 3))
    assert not torch.allclose(curve(images, 3), curve(images, 4))
    same = curve(images[[0, 0]], 3)
    assert torch.equal(same[0], same[1])
    model.shown.clear()
    curve(images, 3)
    held = [(torch.cat(model.shown)[26 * index + 1] == images[index]).all(0) for index in range(2)]
    assert [int(mask.sum()) for mask in held] == [5, 5]
    assert not torch.equal(*held)


def test_tied_patches_give_no_advantage_under_the_rank_protocol() -> None:
    """The mean ID of maps that say nothing lies within its own error of 0; under threshold two levels need not."""
    model, images = Network(), pictures(200, 8, 8)
    labels = model(images).argmax(1)
    got = insertion_deletion(model, images, torch.ones(200, 8, 8), labels, step=8)
    assert abs(float(got.id.mean())) <= 5 * float(got.id.std()) / 200**0.5
    assert float(got.id.std()) > 0


def test_finds_what_the_model_looks_at() -> None:
    """A model that sums one corner: the map of that corner inserts it first and deletes it first."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x[:, :, :4, :4].sum((1, 2, 3))
            return torch.stack([total, torch.zeros_like(total)], 1)

    images = torch.ones(1, 3, 16, 16, device=DEVICE)
    heatmap = torch.zeros(1, 16, 16)
    heatmap[:, :4, :4] = 1.0
    right = insertion_deletion(Corner().eval(), images, heatmap, torch.tensor([0]), step=16)
    wrong = insertion_deletion(Corner().eval(), images, -heatmap, torch.tensor([0]), step=16)
    # From the second of 17 points on the corner is there, or gone.
    assert float(right.insertion) == pytest.approx(1 - 0.5 / 16, abs=1e-6)
    assert float(right.deletion) == pytest.approx(0.5 / 16, abs=1e-6)
    assert float(wrong.id) == pytest.approx(-float(right.id), abs=1e-6)


# The model and its tensors --------------------------------------------------------------------------------------------


def test_leaves_model_and_arguments_alone() -> None:
    model, images, heatmaps, labels = Network(), pictures(2, 9, 9), torch.randn(2, 9, 9), torch.randint(5, (2,))
    before = [x.clone() for x in (images, heatmaps, labels, *model.parameters())]
    heatmaps.requires_grad_()
    with torch.inference_mode():
        got = insertion_deletion(model, images, heatmaps, labels, step=20, baseline="blur")
    assert all(map(torch.equal, before, (images, heatmaps, labels, *model.parameters())))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for result in (got.insertion, got.deletion, got.id, got.insertion_curve, got.deletion_curve, got.fractions):
        assert result.dtype == torch.float64
        assert result.device.type == "cpu"
        assert not result.is_inference()
        assert not result.requires_grad


@pytest.mark.parametrize("where", ["images", "model"])
def test_channels_last_reaches_the_model(where: str) -> None:
    model, images, labels = Network(), pictures(2, 9, 9), torch.randint(5, (2,))
    expected = insertion_deletion(model, images, torch.ones(2, 9, 9), labels, step=20)
    assert all(shown.is_contiguous() for shown in model.shown)
    model.shown.clear()
    if where == "images":
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        model.to(memory_format=torch.channels_last)
    got = insertion_deletion(model, images, torch.ones(2, 9, 9), labels, step=20)
    assert all(shown.is_contiguous(memory_format=torch.channels_last) for shown in model.shown)
    assert torch.allclose(got.insertion_curve, expected.insertion_curve, rtol=1e-12)  # the order of ties too


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_dtypes(dtype: torch.dtype, bound: float) -> None:
    model, labels = Network(), torch.randint(5, (3,))
    images, heatmaps = pictures(3, 8, 8).to(dtype), torch.randperm(64).view(1, 8, 8).repeat(3, 1, 1).to(dtype)
    expected = insertion_deletion(model, images.double(), heatmaps, labels, step=6)
    got = insertion_deletion(model.to(dtype), images, heatmaps, labels, step=6)
    assert float((got.insertion_curve - expected.insertion_curve).abs().max()) <= bound
    assert float((got.deletion_curve - expected.deletion_curve).abs().max()) <= bound


def test_other_numbers_of_channels() -> None:
    model, images = Network(channels=1), pictures(2, 8, 8, channels=1)
    got = insertion_deletion(model, images, torch.randn(2, 8, 8), torch.tensor([0, 1]), step=16, mean=[0.5], std=[0.5])
    model.shown.clear()
    blank = model(torch.full((1, 1, 8, 8), -1.0, dtype=torch.float64, device=DEVICE)).softmax(1)[0].cpu()
    assert torch.allclose(got.insertion_curve[:, 0], blank[:2], rtol=1e-12)
    with pytest.raises(ValueError, match="1 channels"):
        insertion_deletion(model, images, torch.randn(2, 8, 8), torch.tensor([0, 1]), step=16)


def test_progress_grows_to_the_number_of_images() -> None:
    told: list[tuple[float, int]] = []
    insertion_deletion(
        Network(), pictures(5, 8, 8), torch.randn(5, 8, 8), torch.randint(5, (5,)), step=9, batch_size=3,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    done = [each for each, _ in told]
    assert done == sorted(set(done))
    assert done[0] < 1
    assert told[-1] == (5, 5)
    assert {total for _, total in told} == {5}


# What does not fit ----------------------------------------------------------------------------------------------------


def _with_nan(shape: tuple[int, ...], sample: int, value: float = torch.nan) -> Tensor:
    x = torch.zeros(shape, dtype=torch.float64)
    x[sample, ..., 1] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, ValueError, r"N x C x H x W.*\[3, 8, 8\]"),
        ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "at least one"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"images": None}, TypeError, "NoneType"),
        ({"images": _with_nan((2, 3, 8, 8), 1)}, ValueError, "images are not finite .* in sample 1"),
        ({"heatmaps": torch.zeros(1, 8, 8)}, ValueError, r"2 heatmaps .*\[1, 8, 8\]"),
        ({"heatmaps": torch.zeros(2, 9, 8)}, ValueError, "at most 8 x 8"),
        ({"heatmaps": torch.zeros(2, 1, 8, 8)}, ValueError, r"N x H x W.*\[2, 1, 8, 8\]"),
        ({"heatmaps": torch.zeros(2, 0, 8)}, ValueError, "empty"),
        ({"heatmaps": torch.zeros(2, 8, 8, dtype=torch.int64)}, TypeError, "int64"),
        ({"heatmaps": np.zeros((2, 8, 8))}, TypeError, "ndarray"),
        ({"heatmaps": _with_nan((2, 8, 8), 1)}, ValueError, "heatmaps are not finite .* in sample 1"),
        ({"heatmaps": _with_nan((2, 8, 8), 0, torch.inf)}, ValueError, "in sample 0"),
        ({"labels": torch.tensor([0])}, ValueError, "2 labels"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "float32"),
        ({"labels": [0, 1]}, TypeError, "list"),
        ({"labels": torch.tensor([0, 5])}, ValueError, "label 5 .* classes 0 to 4"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, "label -1"),
        ({"patch": 0}, ValueError, "patch must be at least 1"),
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"step": 2.0}, TypeError, "step must be an integer"),
        ({"batch_size": -3}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"order": "ranks"}, ValueError, "unknown order 'ranks'; known: rank, threshold"),
        ({"baseline": "white"}, ValueError, "unknown baseline 'white'; known: black, mean, blur"),
        ({"mean": (0.5, 0.5)}, ValueError, "3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "positive std"),
    ],
)
def test_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    valid = {
        "images": torch.zeros(2, 3, 8, 8).double(),
        "heatmaps": torch.zeros(2, 8, 8),
        "labels": torch.tensor([0, 1]),
        "step": 9,
    }
    given = valid | arguments
    if isinstance(given["images"], Tensor):
        given["images"] = given["images"].to(DEVICE)
    with pytest.raises(error, match=message):
        insertion_deletion(Network(), **given)


def test_refuses_models() -> None:
    images, heatmaps, labels = pictures(1, 8, 8), torch.zeros(1, 8, 8), torch.tensor([0])
    with pytest.raises(ValueError, match="training mode"):
        insertion_deletion(Network().train(), images, heatmaps, labels)
    with pytest.raises(ValueError, match="the model is on meta"):
        insertion_deletion(Network().to("meta"), images, heatmaps, labels)
    with pytest.raises(ValueError, match=r"logits 26 x classes, got \[26, 3, 8, 8\]"):
        insertion_deletion(nn.Identity().eval(), images, heatmaps, labels, step=5)
    broken = Network()
    with torch.no_grad():
        broken.head.bias[2] = torch.nan
    with pytest.raises(ValueError, match="probabilities are not finite .* in sample 0"):
        insertion_deletion(broken, images, heatmaps, labels, step=5)


def test_a_shorter_last_step_does_not_favour_noise() -> None:
    """A random map has ID 0 in expectation only if every stretch counts by its length."""
    model, images, labels = Network(), pictures(4, 12, 12), torch.randint(5, (4,))
    heatmaps = torch.randn(4, 12, 12)
    fine = insertion_deletion(model, images, heatmaps, labels, step=1, mean=MEAN, std=STD)
    coarse = insertion_deletion(model, images, heatmaps, labels, step=100, mean=MEAN, std=STD)
    assert coarse.fractions.tolist() == [0, 100 / 144, 1]
    first, second, third = coarse.insertion_curve.T
    expected = (first + second) / 2 * 100 / 144 + (second + third) / 2 * 44 / 144
    assert torch.allclose(coarse.insertion, expected, rtol=0, atol=1e-12)
    assert float(fine.weights.sum()) == pytest.approx(1)
