"""The ViRelAy project: what its files hold, and (slow) that ViRelAy itself opens it and serves the maps and pictures."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lrp_fast.data import FileSource, Source, open_source
from lrp_fast.export import ExportError, analysis, export_store, selection
from lrp_fast.export.analysis import principal_components
from lrp_fast.export.numbering import number_classes
from lrp_fast.images import Preprocessing, read_image
from lrp_fast.store import DONE, Store, open_store
from stores import CLASSES, MODEL_CLASSES, write_store

pytest.importorskip("zarr")
h5py = pytest.importorskip("h5py")
yaml = pytest.importorskip("yaml")

VIRELAY = "virelay>=0.6.1,<=1.0.0"
MODEL_LABEL = np.array([5, 2, 0, -1])
"""The number that the model has for the class of a label; the last for -1."""
PREPROCESSING = Preprocessing(12, 8, (0.5, 0.25, 0.75), (1.0, 2.0, 0.5))
UNREACHABLE = ("NewConnectionError", "ConnectTimeout", "name resolution", "Connection refused", "connection broken")


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    """Eleven pictures of random noise, in the classes of the stores."""
    generator = np.random.default_rng()
    paths = []
    for index in range(11):
        paths.append(tmp_path / "pictures" / CLASSES[index % 3] / f"{index}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(13, 30, 2)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return FileSource("folder", paths, [f"{index}" for index in range(11)], [index % 3 for index in range(11)], CLASSES)


def test_an_interruption_that_hdf5_would_drop_ends_the_export(
    pictures: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5's library has Python called wherever it lets go of something, and what is raised there goes nowhere."""
    monkeypatch.setattr(selection, "SLICE_SAMPLES", 3)
    store = write_store(tmp_path / "store", 11, source=pictures, labels=pictures.labels.tolist())
    counts = []

    class Held:
        pass

    def interrupt(count: int, total: int) -> None:
        counts.append(count)
        if len(counts) == 1:
            held = Held()
            reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
            del held
            assert reference() is None

    with pytest.raises(KeyboardInterrupt):
        export_store(store, "virelay", tmp_path / "out", source=pictures, on_progress=interrupt)
    assert counts == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert {path.name for path in tmp_path.iterdir()} == {"store", "pictures"}


def test_the_files_of_a_project(pictures: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SLICE_SAMPLES", 3)
    store = write_store(
        tmp_path / "store", 11, failed=[0, 6], source=pictures, labels=pictures.labels.tolist(), signed=True
    )
    exported = export_store(store, "virelay", tmp_path / "project", source=pictures)
    assert (exported.samples, exported.left_out, exported.remarks) == (9, 2, ())
    places = np.flatnonzero(store.status[:] == DONE)
    target, label = store.target[:][places], MODEL_LABEL[store.label[:][places]]
    with h5py.File(tmp_path / "project" / "attribution.h5") as file:
        assert set(file) == {"attribution", "prediction", "label", "key", "channels"}
        assert (file["attribution"].shape, file["attribution"].dtype) == ((9, 3, 8, 8), np.float32)
        assert np.array_equal(file["attribution"][:].sum(1), store.heatmap[:][places])
        expected = np.zeros((9, len(MODEL_CLASSES)), np.float32)
        expected[np.arange(9), target] = store.probability[:][places]
        assert file["prediction"].dtype == np.float32
        assert np.array_equal(file["prediction"], expected)
        assert np.issubdtype(file["label"].dtype, np.integer)
        assert np.array_equal(file["label"], label)
        assert file["key"].asstr()[:].tolist() == store.key[:][places].tolist()
        for name in store.channels:
            assert np.array_equal(file["channels"][name], store.channels[name][:][places])
    with h5py.File(tmp_path / "project" / "dataset.h5") as file:
        assert np.array_equal(file["label"], label)
        for row, place in enumerate(places):
            expected = np.asarray(PREPROCESSING.frame(read_image(Path(pictures.paths[int(place)]))))  # type: ignore[attr-defined]
            assert np.array_equal(file["data"][row], expected.transpose(2, 0, 1))
    project = yaml.safe_load((tmp_path / "project" / "PROJECT.yaml").read_text())["project"]
    assert (project["name"], project["model"], project["label_map"]) == ("store", "resnet18", "label_map.json")
    assert (project["dataset"]["path"], project["dataset"]["input_width"]) == ("dataset.h5", 8)
    assert project["attributions"]["attribution_method"] == "otsuki2024"
    assert project["attributions"]["sources"] == ["attribution.h5"]
    labels = json.loads((tmp_path / "project" / "label_map.json").read_text())
    assert [(entry["index"], entry["word_net_id"], entry["name"]) for entry in labels] == [
        (number, "n01440764" if number == 2 else f"class-{number}", name) for number, name in enumerate(MODEL_CLASSES)
    ]


def test_without_labels_and_pictures(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 9, labels=[-1, 2, -1, 10**15, -1, 0, 1, 0, 1], classes=(), channels={})
    exported = export_store(store, "virelay", tmp_path / "project")
    assert "give the data set" in exported.remarks[0]
    assert "3 of 9 samples have no label" in exported.remarks[1]
    with h5py.File(tmp_path / "project" / "dataset.h5") as file:
        assert (file["data"].shape, file["data"].dtype) == ((9, 3, 8, 8), np.uint8)
        assert (file["data"][:] == 128).all()
        assert file["data"].id.get_storage_size() == 0
        assert np.array_equal(file["label"], store.label[:])
    labels = {
        entry["index"]: entry["name"] for entry in json.loads((tmp_path / "project" / "label_map.json").read_text())
    }
    assert labels == {**dict(enumerate(MODEL_CLASSES)), -1: "no label", 10**15: f"class-{10**15}"}


def test_classes_that_are_not_the_models_follow_after_them(tmp_path: Path) -> None:
    classes = ("n01440764", "crane", "wasp", "newt")
    store = write_store(tmp_path / "store", 9, labels=[-1, 0, 0, 1, 2, 0, 3, 0, 2], classes=classes)
    exported = export_store(store, "virelay", tmp_path / "project")
    assert "class 'crane' and 1 more is not the name of exactly one class of the model" in exported.remarks[1]
    assert exported.remarks[1].endswith("after the model's: class 0 as 7")
    expected = [-1, 7, 7, 8, 9, 7, 10, 7, 9]
    for name in ("attribution.h5", "dataset.h5"):
        with h5py.File(tmp_path / "project" / name) as file:
            assert file["label"][:].tolist() == expected
    with h5py.File(tmp_path / "project" / "attribution.h5") as file:
        assert file["prediction"].shape == (9, 7)
    with h5py.File(tmp_path / "project" / "analysis.h5") as file:
        assert set(file) == {"all", "class-7", "class-8", "class-9", "class-10"}
        assert file["class-7/index"][:].tolist() == [1, 2, 5, 7]
        assert file["all/cluster/label"][:].tolist() == expected
    labels = json.loads((tmp_path / "project" / "label_map.json").read_text())
    assert [(entry["index"], entry["name"]) for entry in labels] == [
        *enumerate([*MODEL_CLASSES, *classes]),
        (-1, "no label"),
    ]
    identifiers = [entry["word_net_id"] for entry in labels]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize(
    ("labels", "classes", "expected", "unmatched"),
    [
        ([0, 1, 2, -1], CLASSES, [5, 2, 0, -1], ()),
        ([0, 3, 4, 6], MODEL_CLASSES, [0, 3, 4, 6], ()),
        ([0, 3, 4, -1], (), [0, 3, 4, -1], ()),
        ([-1, -1, -1, -1], ("newt",), [-1, -1, -1, -1], ()),
        ([0, 2, 2, 0], ("moth", "newt", "wasp"), [6, 0, 0, 6], ()),
        ([0, 1, 2, -1], ("moth", "newt", "wasp"), [7, 8, 9, -1], ("newt",)),
        ([0, 1, 0, -1], ("moth", "crane"), [7, 8, 7, -1], ("crane",)),
        ([0, 1, 2, -1], ("moth", ""), [7, 8, 9, -1], ("1", "2")),
    ],
    ids=["names", "the model's", "numbers", "no label", "an unused one", "another", "an ambiguous one", "nameless"],
)
def test_number_classes(
    tmp_path: Path, labels: list[int], classes: tuple[str, ...], expected: list[int], unmatched: tuple[str, ...]
) -> None:
    store = write_store(tmp_path / "store", 4, labels=labels, classes=classes)
    numbering = number_classes(selection.Selection(store))
    assert (numbering.label.tolist(), numbering.unmatched) == (expected, unmatched)
    assert numbering.outputs == len(MODEL_CLASSES)
    names = [*MODEL_CLASSES, *(classes if unmatched else ())]
    assert [numbering.names[number] for number in range(len(names))] == names
    assert numbering.names.keys() >= {*expected} - {-1}


def test_the_classes_of_a_model_that_are_not_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 4, labels=[0, 1, -1, 10], classes=())
    del store.attributes["model_classes"]
    largest = int(store.target[:].max())
    numbering = number_classes(selection.Selection(store))
    assert (numbering.outputs, numbering.label.tolist()) == (largest + 1, [0, 1, -1, 10])
    assert numbering.names == {number: f"class-{number}" for number in {0, 1, 10, *store.target[:].tolist()}}


def test_pictures_that_are_others_or_gone_are_refused(pictures: FileSource, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 11, source=pictures)
    other = FileSource("folder", [Path(path) for path in pictures.paths], pictures.keys, [0] * 11, CLASSES)
    with pytest.raises(
        ExportError, match="not the data set of .*its keys, labels or classes are others.*'folder' with 11"
    ):
        export_store(store, "virelay", tmp_path / "project", source=other)
    Path(pictures.paths[4]).unlink()
    with pytest.raises(ExportError, match="4 was explained, but cannot be read now: no such file"):
        export_store(store, "virelay", tmp_path / "project", source=pictures)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "pictures"}


# The analysis.


@pytest.mark.parametrize(("rows", "columns"), [(40, 9), (5, 12), (1, 3)])
def test_principal_components(rows: int, columns: int) -> None:
    features = np.random.default_rng().normal(size=(rows, columns)) * np.arange(1, columns + 1) + 7
    found = principal_components(features, 4)
    assert found.shape == (rows, min(4, columns))
    left, variances, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    for component in range(min(rows - 1, 4, columns)):
        sign = np.sign(right[component, np.abs(right[component]).argmax()])
        assert np.allclose(found[:, component], sign * left[:, component] * variances[component], atol=1e-8)


@pytest.mark.parametrize("layers", [None, ["layer4.1", "layer3"], []])
def test_the_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: list[str] | None) -> None:
    monkeypatch.setattr(selection, "SLICE_SAMPLES", 3)
    monkeypatch.setattr(analysis, "MOST_POINTS", 10)
    store = write_store(tmp_path / "store", 23, signed=True, size=(20, 33))
    export_store(store, "virelay", tmp_path / "project", channels=layers)
    rows = np.array([0, 2, 5, 7, 10, 12, 15, 17, 20, 22])
    if layers == []:
        maps = torch.from_numpy(store.heatmap[:])[:, None]
        features = torch.nn.functional.adaptive_avg_pool2d(maps, 16).flatten(1).numpy()
    else:
        features = store.channels["layer4.1" if layers is None else "layer3"][:]
    shares = features[rows].astype(np.float64) / np.abs(features[rows].astype(np.float64)).sum(1, keepdims=True)
    embedding = principal_components(shares, 8)
    label, target = MODEL_LABEL[store.label[:][rows]], store.target[:][rows]
    with h5py.File(tmp_path / "project" / "analysis.h5") as file:
        assert list(file) == ["all", "class-0", "class-5", "n01440764"]
        for name, chosen in (("all", label > -2), ("class-5", label == 5), ("n01440764", label == 2)):
            category = file[name]
            assert np.array_equal(category["index"], rows[chosen])
            assert np.allclose(category["embedding/pca"], embedding[chosen], atol=1e-6)
            assert np.array_equal(category["cluster/label"], label[chosen])
            assert np.array_equal(category["cluster/target"], target[chosen])


def test_the_analysis_of_what_has_no_labels(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 5, labels=[-1] * 5)
    export_store(store, "virelay", tmp_path / "project")
    with h5py.File(tmp_path / "project" / "analysis.h5") as file:
        assert list(file) == ["all"]
        assert list(file["all/cluster"]) == ["target"]


# ViRelAy itself.


@pytest.fixture(scope="module")
def virelay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program, installed into an environment of its own; what it needs is none of ours."""
    folder = tmp_path_factory.mktemp("virelay")
    venv.create(folder)
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-compile", VIRELAY]
    installed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if installed.returncode and any(text in installed.stderr for text in UNREACHABLE):
        pytest.skip(f"pip reaches no package index: {installed.stderr.splitlines()[0]}")
    assert installed.returncode == 0, installed.stderr
    yield folder / "bin" / "virelay"
    shutil.rmtree(folder)


class Server:
    """ViRelAy serving a project on a free port of this machine."""

    def __init__(self, program: Path, project: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._log = f"http://127.0.0.1:{port}", log
        command = [str(program), str(project), "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "BROWSER": "true"}  # the program of that name, in place of a browser
        with open(log, "w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.get("/api/projects")
                return self
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"ViRelAy does not serve: {self._log.read_text()}") from error
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return bytes(answer.read())

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def image(self, path: str) -> Any:
        """A picture as float64 [H, W, 3] in [0, 1]."""
        with Image.open(io.BytesIO(self.get(path))) as image:
            return np.asarray(image.convert("RGB"), np.float64) / 255


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """Sixteen drawn pictures in folders of classes, explained on the command line with the embedded network."""
    folder = tmp_path_factory.mktemp("explained")
    drawn = open_source("embedded:16")
    for index in range(len(drawn)):
        file = folder / "pictures" / drawn.classes[drawn.labels[index]] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(drawn.read(index))
    command = [sys.executable, "-m", "lrp_fast", "attribute-dataset", "--source", folder / "pictures"]
    subprocess.run([*command, "--output", folder / "store", "--workers", "0"], check=True, timeout=120)
    return open_store(folder / "store"), folder / "pictures"


@pytest.mark.slow
def test_virelay_serves_the_maps_and_the_pictures(virelay: Path, explained: tuple[Store, Path], tmp_path: Path) -> None:
    store, pictures = explained
    command = [sys.executable, "-m", "lrp_fast", "export", store.path, "--format", "virelay", "--source", pictures]
    subprocess.run([*command, "--output", tmp_path / "project"], check=True, timeout=120)
    maps = store.heatmap[:].astype(np.float64)
    with Server(virelay, tmp_path / "project" / "PROJECT.yaml", tmp_path / "log") as server:
        assert [project["name"] for project in server.json("/api/projects")] == ["store"]
        (overview,) = server.json("/api/projects/0")["analysisMethods"]
        assert overview["embeddings"] == ["pca"]
        assert set(overview["clusterings"]) == {"label", "target"}
        points = server.json("/api/projects/0/analyses/relevance?category=all&clustering=target&embedding=pca")[
            "embedding"
        ]
        assert [point["attributionIndex"] for point in points] == list(range(16))
        assert [point["cluster"] for point in points] == store.target[:].tolist()
        points = server.json("/api/projects/0/analyses/relevance?category=all&clustering=label&embedding=pca")[
            "embedding"
        ]
        names, model_classes = [key.split("/")[0] for key in store.key[:]], store.attributes["model_classes"]
        assert model_classes != store.attributes["classes"]  # of folders, by the alphabet
        assert [model_classes[point["cluster"]] for point in points] == names
        for index in range(16):
            answer = server.json(f"/api/projects/0/attributions/{index}")
            assert (answer["width"], answer["height"]) == (224, 224)
            assert [(label["index"], label["name"]) for label in answer["labels"]] == [
                (model_classes.index(names[index]), names[index])
            ]
            assert (len(answer["prediction"]), np.argmax(answer["prediction"])) == (8, store.target[index])
            assert answer["prediction"][store.target[index]] == pytest.approx(store.probability[index])
            # Yellow is positive relevance over the largest: red and green; JPEG blurs what is one pixel wide.
            heatmap = server.image(f"/api/projects/0/attributions/{index}/heatmap?colorMap=black-yellow")
            scores = [np.corrcoef(heatmap[..., 1].ravel(), each.clip(0).ravel())[0, 1] for each in maps]
            assert np.argmax(scores) == index
            assert scores[index] > 0.95
            assert heatmap[..., 1].max() > 0.8
            picture = server.image(f"/api/projects/0/dataset/{index}/image")
            with Image.open(pictures / store.key[index]) as image:
                shown = np.asarray(image.convert("RGB"), np.float64) / 255
            assert np.abs(picture - shown).mean() < 0.03
        for colors in server.json("/api/color-maps"):
            for superimpose in ("true", "false"):
                path = f"/api/projects/0/attributions/0/heatmap?colorMap={colors['name']}&superimpose={superimpose}"
                assert server.image(path).shape == (224, 224, 3), path


@pytest.mark.slow
def test_virelay_serves_a_project_without_pictures_and_labels(virelay: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 9, labels=[-1, 2, -1, 10**15, -1, 0, 1, 0, 1], size=(40, 56))
    export_store(store, "virelay", tmp_path / "project")
    with Server(virelay, tmp_path / "project" / "PROJECT.yaml", tmp_path / "log") as server:
        for index in range(9):
            answer = server.json(f"/api/projects/0/attributions/{index}")
            # A label without a name is none of the model's classes, so all follow after those.
            expected = {-1: "no label", 10**15: f"class-{10**15 + len(MODEL_CLASSES)}"}
            label = int(store.label[index])
            assert [each["name"] for each in answer["labels"]] == [expected.get(label) or CLASSES[label]]
            assert (np.abs(server.image(f"/api/projects/0/dataset/{index}/image") - 128 / 255) <= 2 / 255).all()
            heatmap = server.image(f"/api/projects/0/attributions/{index}/heatmap?colorMap=black-yellow")[..., 1]
            assert heatmap.shape == (40, 56)
            assert np.corrcoef(heatmap.ravel(), store.heatmap[index].ravel())[0, 1] > 0.9
