"""The embedded data set, its committed pictures and network, and the script that makes them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lrp_fast.embedded import CLASSES, draw, draw_batch, embedded_network, embedded_pictures, network_input
from lrp_fast.embedded.drawing import _CLASS_SHAPES, _TEXTURES
from lrp_fast.embedded.network import WEIGHTS_PATH, load_weights, weights_metadata
from lrp_fast.embedded.pictures import PICTURE_SEED, PICTURES_FOLDER, write_embedded_pictures
from lrp_fast.embedded.training import VALIDATION_SEED, TrainingArguments, accuracy, train

TEST_SEED = 1_000_037  # neither trained on, validated on nor committed


def test_shape_or_texture_alone_never_decides() -> None:
    pairs = [name.split(" ") for name in CLASSES]
    for place, names in ((0, list(_TEXTURES)), (1, list(_CLASS_SHAPES))):
        for name in names:
            assert sum(pair[place] == name for pair in pairs) == 2, f"{name} must occur in exactly two classes"


def test_picture_depends_on_seed_and_index_only() -> None:
    alone = draw(TEST_SEED, 5)
    images, labels = draw_batch(TEST_SEED, [9, 5])
    assert np.array_equal(images[1], alone.image)
    assert labels[1] == alone.label == 5
    assert np.array_equal(draw(TEST_SEED, 5).mask, alone.mask)


def test_other_seed_or_index_is_another_picture() -> None:
    first = draw(TEST_SEED, 0).image.astype(int)
    for other in (draw(TEST_SEED + 1, 0), draw(TEST_SEED, len(CLASSES))):
        assert other.label == 0
        assert np.abs(other.image - first).mean() > 5.0, "the pictures differ by grain at most"


def test_same_scene_at_another_size() -> None:
    large, small = draw(TEST_SEED, 3), draw(TEST_SEED, 3, size=112)
    halved = large.mask.reshape(112, 2, 112, 2).mean((1, 3)) >= 0.5
    assert small.image.shape == (112, 112, 3)
    assert (halved != small.mask).sum() <= 0.05 * small.mask.sum(), "the labelled object moved with the size"


def test_masks_hold_one_whole_object() -> None:
    for index in range(32):
        mask = draw(TEST_SEED, index).mask
        assert 0.02 < mask.mean() < 0.3, f"picture {index}: the object covers {mask.mean():.3f} of the picture"
        frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not frame.any(), f"picture {index}: the object is cut off by the frame"


def test_mask_has_the_shape_its_class_names() -> None:
    """The share of its enclosing circle a shape fills, and its symmetry under a half turn, tell the four apart."""
    for index in range(8 * len(CLASSES)):
        picture = draw(TEST_SEED, index)
        rows, columns = np.nonzero(picture.mask)
        offsets = np.hypot(rows - rows.mean(), columns - columns.mean())
        filled = picture.mask.sum() / (np.pi * offsets.max() ** 2)
        turned = np.stack([2.0 * rows.mean() - rows, 2.0 * columns.mean() - columns])
        turned_rows, turned_columns = np.clip(np.rint(turned).astype(int), 0, 223)
        symmetric = picture.mask[turned_rows, turned_columns].mean()
        if filled > 0.8:
            recognised = "disc"
        elif symmetric > 0.9:
            recognised = "square"
        else:
            recognised = "heart" if filled > 0.54 else "star"
        assert CLASSES[picture.label].endswith(recognised), f"picture {index}: {filled=:.2f} {symmetric=:.2f}"


def test_classes_are_balanced() -> None:
    _, labels = draw_batch(TEST_SEED, range(3 * len(CLASSES)), size=32)
    assert np.bincount(labels, minlength=len(CLASSES)).tolist() == [3] * len(CLASSES)


@pytest.mark.parametrize(("seed", "index", "size"), [(-1, 0, 224), (0, -1, 224), (0, 0, 15)])
def test_impossible_pictures_are_refused(seed: int, index: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"got"):
        draw(seed, index, size)


def test_committed_pictures_equal_a_redraw(tmp_path: Path) -> None:
    committed = embedded_pictures()
    assert {picture.label for picture in committed} == set(range(len(CLASSES)))
    for index, (picture, remade) in enumerate(zip(committed, write_embedded_pictures(tmp_path), strict=True)):
        drawn = draw(PICTURE_SEED, index)
        assert (picture.label, picture.class_name) == (drawn.label, CLASSES[drawn.label])
        for path, mask_path in ((picture.path, picture.mask_path), (remade.path, remade.mask_path)):
            assert np.array_equal(np.asarray(Image.open(path)), drawn.image), path
            assert np.array_equal(np.asarray(Image.open(mask_path)), drawn.mask), mask_path


def test_committed_pictures_have_no_strays() -> None:
    expected = {path for picture in embedded_pictures() for path in (picture.path, picture.mask_path)}
    assert set(PICTURES_FOLDER.rglob("*.png")) == expected
    assert sum(path.stat().st_size for path in expected) < 1_200_000


def test_committed_weights_fit_and_are_finite() -> None:
    assert WEIGHTS_PATH.stat().st_size <= 4_000_000
    network = embedded_network()
    assert not network.training
    assert sum(parameter.numel() for parameter in network.parameters()) <= 1_000_000
    for name, tensor in network.state_dict().items():
        assert torch.isfinite(tensor.to(torch.float64)).all(), name
        assert tensor.dtype in (torch.float32, torch.int64), name


def test_committed_weights_say_what_they_are() -> None:
    metadata = weights_metadata()
    assert metadata["classes"] == list(CLASSES)
    assert metadata["arguments"].keys() == TrainingArguments.__dataclass_fields__.keys()
    assert metadata["validation_accuracy"] >= 0.95
    assert metadata["arguments"]["seed"] not in (TEST_SEED, VALIDATION_SEED, PICTURE_SEED)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        load_weights(nn.Linear(2, 2), WEIGHTS_PATH)
    with pytest.raises(FileNotFoundError, match="training"):
        load_weights(nn.Linear(2, 2), tmp_path / "absent.safetensors")


def test_network_recognises_fresh_pictures() -> None:
    assert accuracy(embedded_network(), TEST_SEED, 64) >= 0.9


def test_network_recognises_the_committed_pictures() -> None:
    images, labels = draw_batch(PICTURE_SEED, range(len(embedded_pictures())))
    with torch.inference_mode():
        predicted = embedded_network()(network_input(images)).argmax(1)
    assert (predicted.numpy() == labels).sum() >= len(labels) - 1


def test_network_sees_the_object_not_its_surroundings() -> None:
    """Painting the object over must cost the network its answer; painting over as much elsewhere must not."""
    pictures = [draw(TEST_SEED, index) for index in range(32)]
    labels = np.array([picture.label for picture in pictures])
    hidden: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    for picture in pictures:
        elsewhere = np.roll(picture.mask, 112, axis=(0, 1)) & ~picture.mask
        for images, mask in ((hidden, picture.mask), (moved, elsewhere)):
            images.append(np.where(mask[..., None], np.uint8(128), picture.image))
    network = embedded_network()
    with torch.inference_mode():
        right_hidden, right_moved = (
            (network(network_input(np.stack(images))).argmax(1).numpy() == labels).mean() for images in (hidden, moved)
        )
    assert right_hidden < 0.4 < 0.9 < right_moved, (right_hidden, right_moved)


def test_network_uses_both_kinds_of_block_and_of_skip() -> None:
    blocks = [block for stage in range(1, 5) for block in getattr(embedded_network(False), f"layer{stage}")]
    kinds = {(type(block).__name__, block.downsample is None) for block in blocks}
    assert kinds == {("BasicBlock", True), ("BasicBlock", False), ("Bottleneck", True), ("Bottleneck", False)}


def test_network_input_normalises_and_refuses_other_layouts() -> None:
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    image[..., 1] = 255
    inputs = network_input(image)
    assert inputs.shape == (1, 3, 4, 4)
    assert inputs[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225])
    wrongs: list[np.ndarray] = [image[0], image.astype(np.float32), image.transpose(0, 3, 1, 2)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\]"):
            network_input(wrong)


def test_training_runs_end_to_end_and_repeats(tmp_path: Path) -> None:
    arguments = TrainingArguments(seed=3, pictures=16, epochs=4, validation_pictures=8)
    paths = [tmp_path / name / "weights.safetensors" for name in ("first", "second")]
    networks = []
    for path in paths:
        validated = train(arguments, path)
        networks.append(embedded_network(pretrained=False))
        load_weights(networks[-1], path)
        assert validated == weights_metadata(path)["validation_accuracy"] == accuracy(networks[-1], VALIDATION_SEED, 8)
    torch.manual_seed(arguments.seed)
    fresh = embedded_network(pretrained=False).state_dict()
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), f"{name} differs between two trainings of one seed"
        assert not torch.equal(tensor, fresh[name]), f"training left {name} as it was initialised"


@pytest.mark.parametrize("seed", [VALIDATION_SEED, PICTURE_SEED])
def test_training_refuses_held_out_seeds(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held out"):
        train(TrainingArguments(seed=seed), tmp_path / "weights.safetensors")


def test_import_brings_in_no_heavy_dependency() -> None:
    """In a fresh interpreter, since other tests may have imported anything."""
    heavy = ("torchvision", "triton", "matplotlib", "rich", "lrp_fast.embedded.training")
    program = f"import sys, lrp_fast.embedded; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
