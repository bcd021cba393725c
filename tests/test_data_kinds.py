"""Data sets with layouts of their own, made small here: what is listed, read, masked, and refused; and in other processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lrp_fast.data import KINDS, Source, SourceError, open_source
from lrp_fast.embedded import CLASSES, draw, embedded_network, network_input
from lrp_fast.images import ImageError, decode_image
from lrp_fast.models import imagenet_classes

WNIDS = ("n01440764", "n01443537", "n02102040")


def put(path: Path, content: bytes = b"-") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
    pixels = np.random.default_rng().integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(put(path))
    return path


def listed(source: Source) -> list[tuple[str, int]]:
    return list(zip(source.keys, source.labels.tolist(), strict=True))


# ImageNet.


def make_imagenet(root: Path, wnids: tuple[str, ...] = WNIDS, split: str = "val") -> Path:
    synonyms = {wnid: (f"name of {wnid}", f"Nomen {wnid}") for wnid in reversed(wnids)}
    root.mkdir(parents=True, exist_ok=True)
    torch.save((synonyms, list(wnids)), root / "meta.bin")
    for number, wnid in enumerate(WNIDS):
        for index in range(number + 1):
            picture(root / split / wnid / f"ILSVRC2012_{split}_{index}.JPEG")
    put(root / split / WNIDS[0] / "notes.txt")
    return root


def test_imagenet_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageNet

    root = make_imagenet(tmp_path / "imagenet")
    source, theirs = open_source(root), ImageNet(root, "val")
    assert source.kind == "imagenet"
    assert [str(root / key) for key in source.keys] == [path for path, _ in theirs.samples]
    assert source.labels.tolist() == theirs.targets == [0, 1, 1, 2, 2, 2]
    assert source.classes == tuple(f"name of {wnid}" for wnid in WNIDS)
    assert source.keys[0] == f"val/{WNIDS[0]}/ILSVRC2012_val_0.JPEG"
    assert [source.read(index) for index in range(6)] == [Path(path).read_bytes() for path, _ in theirs.samples]
    assert not source.has_masks
    make_imagenet(root, split="train")
    train = open_source(root, split="train")
    assert len(train) == 6
    assert train.keys[0] == f"train/{WNIDS[0]}/ILSVRC2012_train_0.JPEG"
    assert train.fingerprint() != source.fingerprint()


def test_labels_count_all_of_imagenets_classes(tmp_path: Path) -> None:
    """A part of the folders keeps the numbers that a network of all classes answers with."""
    wnids = tuple(sorted({*WNIDS, *(f"n{number:08d}" for number in range(1_441_000, 1_441_997))}))
    source = open_source(make_imagenet(tmp_path, wnids))
    assert sorted(set(source.labels.tolist())) == [wnids.index(wnid) for wnid in WNIDS] == [0, 998, 999]
    assert source.classes == imagenet_classes()


class Explosive:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_imagenet_that_is_none_is_refused(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "imagenet")
    with pytest.raises(SourceError, match=r"no folder 'train'; torchvision\.datasets\.ImageNet\(.*'train'\) in Python"):
        open_source(root, split="train")
    put(tmp_path / "archives" / "ILSVRC2012_devkit_t12.tar.gz")
    with pytest.raises(SourceError, match="no folder 'val'"):
        open_source(tmp_path / "archives")
    (tmp_path / "archives" / "val").mkdir()
    with pytest.raises(SourceError, match=r"not ImageNet.*RuntimeError: The archive ILSVRC2012_devkit_t12\.tar\.gz"):
        open_source(tmp_path / "archives")
    put(root / "val" / "n99999999" / "x.JPEG")
    with pytest.raises(SourceError, match="not ImageNet as torchvision keeps it: KeyError: 'n99999999'"):
        open_source(root)
    bomb = pickle.dumps(Explosive(tmp_path / "unpickled"), protocol=2)
    for content in (bomb, b"no meta file", b"", pickle.dumps(3, protocol=2)):
        put(root / "meta.bin", content)
        with pytest.raises(SourceError, match="not ImageNet as torchvision keeps it"):
            open_source(root)
    for content in (torch.zeros(2), ({"n1": 3}, []), {}, (["n1"], [])):
        torch.save(content, root / "meta.bin")
        with pytest.raises(SourceError, match="not ImageNet as torchvision keeps it"):
            open_source(root)
    torch.save((Explosive(tmp_path / "unpickled"), []), root / "meta.bin")
    with pytest.raises(SourceError, match="not ImageNet as torchvision keeps it: UnpicklingError"):
        open_source(root)
    assert not (tmp_path / "unpickled").exists()
    for file in (root / "val").rglob("*.JPEG"):
        file.unlink()
    make_imagenet(tmp_path / "other").joinpath("meta.bin").replace(root / "meta.bin")
    with pytest.raises(SourceError, match="cannot be read: Found no valid file"):
        open_source(root)


# CIFAR-10.


def make_cifar10(folder: Path, records: int = 7) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Batches by name: labels [N], pixels [N, 3, 32, 32]."""
    generator = np.random.default_rng()
    put(folder / "batches.meta.txt", b"airplane\nautomobile\nbird\n\n")
    batches = {}
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        labels = generator.integers(0, 3, records, dtype=np.uint8)
        pixels = generator.integers(0, 256, (records, 3, 32, 32), dtype=np.uint8)
        put(folder / f"{name}.bin", np.concatenate([labels[:, None], pixels.reshape(records, -1)], axis=1).tobytes())
        batches[name] = (labels, pixels)
    return batches


def test_cifar10_in_its_binary_version(tmp_path: Path) -> None:
    batches = make_cifar10(tmp_path / "cifar-10-batches-bin")
    splits = {"test": ["test_batch"], "train": [f"data_batch_{number}" for number in range(1, 6)]}
    for split, names in splits.items():
        source = open_source(tmp_path, split=split)
        assert source.kind == "cifar10"
        assert source.classes == ("airplane", "automobile", "bird")
        assert list(source.keys) == [f"{name}/{number:05d}" for name in names for number in range(7)]
        assert source.labels.tolist() == np.concatenate([batches[name][0] for name in names]).tolist()
        pixels = np.concatenate([batches[name][1] for name in names])
        for index in range(len(source)):
            assert np.array_equal(np.asarray(decode_image(source.read(index))), pixels[index].transpose(1, 2, 0))
        with pytest.raises(IndexError):
            source.read(-1)
    assert listed(open_source(tmp_path)) == listed(open_source(tmp_path / "cifar-10-batches-bin", split="test"))


def test_cifar10_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (put(tmp_path / "py" / "cifar-10-batches-py" / "batches.meta").parent, tmp_path / "py"):
        with pytest.raises(SourceError, match=r"pickles could run code.* is at https://.*cifar-10-binary\.tar\.gz"):
            open_source(path)
    folder = tmp_path / "cifar-10-batches-bin"
    make_cifar10(folder)
    source = open_source(folder)
    batch = (folder / "test_batch.bin").read_bytes()
    put(folder / "test_batch.bin", batch[:-1])
    with pytest.raises(ImageError, match="its batch ends after 3071 of 3072 bytes"):
        source.read(6)
    with pytest.raises(SourceError, match=r"test_batch\.bin is of 21510 bytes; expected a multiple of 3073"):
        open_source(folder)
    put(folder / "test_batch.bin", b"")
    with pytest.raises(SourceError, match="is of 0 bytes"):
        open_source(folder)
    put(folder / "test_batch.bin", batch[: 3 * 3073] + b"\x03" + batch[3 * 3073 + 1 :])
    with pytest.raises(SourceError, match="record 3 has label 3, and there are 3 classes"):
        open_source(folder)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(SourceError, match=r"lacks data_batch_2\.bin of CIFAR-10's binary version"):
        open_source(folder, split="train")
    put(folder / "batches.meta.txt", b"\xff\n")
    with pytest.raises(SourceError, match="not text in UTF-8"):
        open_source(folder)
    (folder / "batches.meta.txt").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(folder, "cifar10")


# CUB-200-2011.


def make_cub(root: Path) -> tuple[list[str], np.ndarray]:
    """Five pictures of three species, the even ones for training; returns names and boxes."""
    names = ["001.Black/c.jpg", "001.Black/a.jpg", "002.Crow/x y.jpg", "010.Wren/b.jpg", "010.Wren/d.jpg"]
    species = [1, 1, 2, 10, 10]
    boxes = np.array([[2.0 + number, 1.0, 5.0, 4.0 + number] for number in range(5)])
    boxes[:2, :2] += 0.5  # edges that meet the centres of pixels: the first is inside, the one behind the last is not
    tables = {
        "images": names,
        "image_class_labels": species,
        "train_test_split": [number % 2 for number in range(5)],
        "bounding_boxes": [" ".join(map(str, box)) for box in boxes.tolist()],
    }
    for name, values in tables.items():
        lines = [f"{number} {value}" for number, value in enumerate(values, start=1)]
        put(root / f"{name}.txt", "\n".join([*lines, ""]).encode())
    put(root / "classes.txt", b"1 001.Black\n2 002.Crow\n10 010.Wren\n")
    for name in names:
        picture(root / "images" / name)
    return names, boxes


def test_cub_has_labels_splits_and_boxes(tmp_path: Path) -> None:
    names, boxes = make_cub(tmp_path)
    expected = {"test": ([0, 2, 4], [0, 1, 2]), "train": ([1, 3], [0, 2])}
    for split, (numbers, labels) in expected.items():
        source = open_source(tmp_path, split=split)
        assert source.kind == "cub"
        assert source.classes == ("001.Black", "002.Crow", "010.Wren")
        assert listed(source) == [(names[number], label) for number, label in zip(numbers, labels, strict=True)]
        for index, number in enumerate(numbers):
            assert source.read(index) == (tmp_path / "images" / names[number]).read_bytes()
            left, top, width, height = boxes[number].astype(int).tolist()
            mask = np.zeros((10, 20), dtype=np.uint8)
            mask[top : top + height, left : left + width] = 255
            assert np.array_equal(np.asarray(source.mask(index, (20, 10))), mask)
    assert listed(open_source(tmp_path)) == listed(open_source(tmp_path, split="test"))


def test_cubs_segmentations_replace_its_boxes(tmp_path: Path) -> None:
    names, _ = make_cub(tmp_path)
    graded = np.random.default_rng().choice([0, 51, 102, 153, 204, 255], (10, 20)).astype(np.uint8)
    graded[0, 0] = 255
    Image.fromarray(graded).save(put(tmp_path / "segmentations" / names[2].replace(".jpg", ".png")))
    (tmp_path / "bounding_boxes.txt").unlink()
    source = open_source(tmp_path)
    assert np.array_equal(np.asarray(source.mask(1, (20, 10))), np.where(graded > 127, 255, 0))
    assert source.mask(0, (20, 10)) is None


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "001.Black/c.jpg", "../../secret.jpg", "'../../secret.jpg' lies outside the data set"),
        ("images.txt", "001.Black/c.jpg", "a/../../b.jpg", "'a/../../b.jpg' lies outside the data set"),
        ("images.txt", "001.Black/c.jpg", "/etc/passwd", "'/etc/passwd' lies outside the data set"),
        ("images.txt", "1 001.Black/c.jpg", "1", "line 1: expected a number of its own and a text, got '1'"),
        ("images.txt", "2 001", "1 001", "line 2: expected a number of its own"),
        ("images.txt", "5 010", "6 010", "train_test_split.txt lacks image 6"),
        ("images.txt", "001.Black/c.jpg", "002.Crow/x y.jpg", "'002.Crow/x y.jpg' comes 2 times"),
        ("train_test_split.txt", "1 0", "1 2", "says '2' of an image; expected one of 0, 1"),
        ("image_class_labels.txt", "5 10", "5 3", "says '3' of an image; expected one of 1, 2, 10"),
        ("image_class_labels.txt", "5 10\n", "", "image_class_labels.txt lacks image 5"),
        ("bounding_boxes.txt", "5 6.0", "5 six", "not a table of image, left, top, width and height"),
        ("bounding_boxes.txt", "5 6.0", "5", "not a table of image, left, top, width and height"),
        ("bounding_boxes.txt", "5 6.0 1.0 5.0", "5 6.0 1.0 0.0", "box 3 of 3 has no area"),
        ("train_test_split.txt", " 0", " 1", "holds no pictures"),
    ],
)
def test_cub_that_is_none_is_refused(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    make_cub(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    put(tmp_path / file, text.replace(old, new).encode())
    with pytest.raises(SourceError) as error:
        open_source(tmp_path)
    assert message in str(error.value)


def test_cub_with_a_missing_or_binary_table_is_refused(tmp_path: Path) -> None:
    make_cub(tmp_path)
    put(tmp_path / "classes.txt", b"1 \xff\n")
    with pytest.raises(SourceError, match=r"classes\.txt is not text in UTF-8"):
        open_source(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(SourceError, match=r"cannot be read: .*classes\.txt"):
        open_source(tmp_path)


# Drawn pictures.


def test_drawn_pictures_have_labels_and_masks() -> None:
    source = open_source("embedded:24:7")
    assert source.kind == "embedded"
    assert source.classes == CLASSES
    assert listed(source) == [(f"7/{index:06d}", index % len(CLASSES)) for index in range(24)]
    images = [decode_image(source.read(index)) for index in range(24)]
    predicted = embedded_network()(network_input(np.stack([np.asarray(image) for image in images]))).argmax(1)
    assert int((predicted.numpy() == source.labels).sum()) >= 22
    for index in (0, 13):
        drawn = draw(7, (1 << 31) + index)
        assert np.array_equal(np.asarray(images[index]), drawn.image)
        mask = source.mask(index, images[index].size)
        assert mask is not None
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), drawn.mask * 255)
    for index in (-1, 24):
        with pytest.raises(IndexError):
            source.read(index)


def test_no_drawn_picture_is_one_of_the_training() -> None:
    """Every (seed, index) below 2**32 starts NumPy's generator in a state of its own, and these indices are apart."""
    source, default = open_source("embedded:2:0"), open_source("embedded:2")
    assert default.fingerprint() == source.fingerprint() != open_source("embedded:2:1").fingerprint()
    trained = [draw(0, index).image for index in range(16)]
    for index in range(2):
        pixels = np.asarray(decode_image(source.read(index)))
        assert not any(np.array_equal(pixels, image) for image in trained)
    seeds = [0, 1, 7, 1_000_003, (1 << 32) - 1]
    indices = [0, 1, 2, 9_999, 1 << 31, (1 << 31) + 1, (1 << 32) - 1]
    states = {np.random.default_rng((seed, index)).bytes(16) for seed in seeds for index in indices}
    assert len(states) == len(seeds) * len(indices)


@pytest.mark.parametrize(
    "text", ["embedded:", "embedded:x", "embedded:5:", "embedded:5:-1", "embedded:5:1:2", "embedded:-3", "embedded:٣"]
)
def test_drawn_pictures_asked_for_wrongly(text: str) -> None:
    with pytest.raises(SourceError, match="expected embedded:COUNT or embedded:COUNT:SEED, got 'embedded:"):
        open_source(text)


@pytest.mark.parametrize("text", ["embedded:0", "embedded:3000000000", "embedded:3:4294967296"])
def test_drawn_pictures_beyond_the_range(text: str) -> None:
    with pytest.raises(SourceError, match=r"expected 1 to 2\*\*31 drawn pictures of a seed below 2\*\*32"):
        open_source(text)


# All kinds.


def make_folder(root: Path) -> Path:
    picture(root / "a.jpg")
    Image.new("1", (20, 10), 1).save(put(root / "masks" / "a.png"))
    return root


def make_manifest(root: Path) -> Path:
    picture(root / "a.png")
    return put(root / "list.csv", b"path,label\na.png,3\n")


def make_shard(root: Path) -> Path:
    picture(root / "a.png")
    with tarfile.open(root / "0.tar", "w") as tar:
        tar.add(root / "a.png", "a.png")
    return root / "0.tar"


def make_bin(root: Path) -> Path:
    make_cifar10(root)
    return root


def make_birds(root: Path) -> Path:
    make_cub(root)
    return root


MAKERS: dict[str, Callable[[Path], str | Path]] = {
    "folder": make_folder,
    "manifest": make_manifest,
    "imagenet": make_imagenet,
    "cifar10": make_bin,
    "cub": make_birds,
    "webdataset": make_shard,
    "embedded": lambda root: "embedded:1:3",
}


def test_sources_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    assert MAKERS.keys() == KINDS.keys()
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        for kind, make in MAKERS.items():
            masks = tmp_path / kind / "masks" if kind == "folder" else None
            source = open_source(make(tmp_path / kind), masks=masks)
            assert source.kind == kind
            copy: Source = pickle.loads(pickle.dumps(source))
            size = decode_image(source.read(0)).size
            read, masked = pool.submit(source.read, 0), pool.submit(source.mask, 0, size)
            assert source.read(0) == copy.read(0) == read.result()
            assert (copy.kind, copy.classes, copy.fingerprint()) == (kind, source.classes, source.fingerprint())
            assert source.mask(0, size) == masked.result()
            assert source.has_masks == (source.mask(0, size) is not None) == (kind in ("folder", "cub", "embedded"))


def test_kinds_recognise_only_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "x.jpg")
    picture(tmp_path / "test_batch" / "x.jpg")
    put(tmp_path / "list.csv", b"path\n")
    assert open_source(tmp_path).kind == "folder"
    assert io.BytesIO(open_source(str(tmp_path)).read(0)).read(2) == b"\xff\xd8"
