"""Models by name and weights from files: wrappings are opened, what does not fit is named, nothing is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, resnet18

from lrp_fast.models import (
    EMBEDDED,
    TORCHVISION_MODELS,
    ModelError,
    UnknownModelError,
    imagenet_classes,
    list_models,
    load_model,
    read_checkpoint,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
CLASSES = 3


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A ResNet-18 with three classes, and running statistics unlike a fresh one's."""
    model = resnet18(num_classes=CLASSES)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Every parameter and every running statistic is the same, bit for bit."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: renamed(state, "module."),
    "_orig_mod.": lambda state: renamed(state, "_orig_mod."),
    "lightning": lambda state: {"state_dict": renamed(state, "model.")},
    "all prefixes": lambda state: {"model": renamed(state, "module._orig_mod.model.")},
    "no batch counts": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_loads_the_same_network(network: nn.Module, tmp_path: Path, wrapping: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](network.state_dict()), path)
    loaded = load_model("resnet18", path)
    assert_same(loaded.model, network)
    assert not loaded.model.training
    assert loaded.classes == ("class 0", "class 1", "class 2")
    assert loaded.source == str(path)


def test_older_torch_files_load_too(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded = load_model("resnet18", tmp_path / "old.pt")
    assert torch.equal(loaded.model.get_parameter("fc.weight"), network.get_parameter("fc.weight"))


def test_half_precision_becomes_float32(network: nn.Module, tmp_path: Path) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    torch.save(halves, tmp_path / "half.pth")
    loaded = load_model("resnet18", tmp_path / "half.pth")
    weight = loaded.model.get_parameter("layer1.0.conv1.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, halves["layer1.0.conv1.weight"].float())


@pytest.mark.parametrize("form", ["json", "commas"])
def test_safetensors_metadata_names_architecture_and_classes(network: nn.Module, tmp_path: Path, form: str) -> None:
    names = ["ant", "bee", "wasp"]
    classes = json.dumps(names) if form == "json" else ", ".join(names)
    architecture = json.dumps("resnet18") if form == "json" else "resnet18"
    path = tmp_path / "weights.safetensors"
    about = {"classes": classes, "arch": architecture}
    safetensors.torch.save_file(renamed(network.state_dict(), "module."), path, about)
    loaded = load_model(None, path)
    assert loaded.name == "resnet18"
    assert loaded.classes == tuple(names)
    assert_same(loaded.model, network)


def test_architecture_and_classes_beside_a_state_dict(network: nn.Module, tmp_path: Path) -> None:
    about = {"state_dict": network.state_dict(), "arch": "resnet18", "classes": ["a", "b", "c"]}
    torch.save(about, tmp_path / "weights.pth")
    loaded = load_model(None, tmp_path / "weights.pth")
    assert (loaded.name, loaded.classes) == ("resnet18", ("a", "b", "c"))


class CreatesFile:
    """Unpickled, this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle"])
def test_code_in_a_file_is_refused_and_never_runs(tmp_path: Path, writer: str) -> None:
    created, path = tmp_path / "created", tmp_path / "weights.pth"
    content = {"conv1.weight": torch.randn(2, 2), "bomb": CreatesFile(created)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ModelError, match=r"is refused|not a readable"):
        load_model("resnet18", path)
    assert not created.exists()
    # The bomb is live: without the guard it would have gone off.
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert created.exists()


def test_a_pickled_module_is_refused(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "whole.pth")
    with pytest.raises(ModelError, match=r"(?s)is refused.*state_dict.*ResNet"):
        load_model("resnet18", tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pth", b""),
        ("weights.pth", b"neither an archive nor a pickle"),
        ("weights.pth", b"PK\x03\x04" + bytes(60)),
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 64),
    ],
)
def test_damaged_files_say_so(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"refused|not a readable"):
        load_model("resnet18", path)


def test_a_checkpoint_that_does_not_fit_says_what_differs(network: nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    removed = [key for key in state if key.startswith("layer4.1.") and "num_batches" not in key]
    for key in removed:
        del state[key]
    state["extra.weight"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError) as error:
        load_model("resnet18", tmp_path / "weights.pth")
    text = str(error.value)
    assert f"{len(removed)} missing ({removed[0]}; " in text
    assert f"and {len(removed) - 5} more" in text
    assert removed[5] not in text
    assert "1 unexpected (extra.weight)" in text
    assert "1 of another shape (conv1.weight: file [64, 3, 3, 3], model [64, 3, 7, 7])" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, r"head 'fc.weight'.* is missing"),
        ({"fc.weight": torch.zeros(5)}, r"of shape \[5\]"),
        ({"fc.weight": torch.full((CLASSES, 512), torch.nan)}, "'fc.weight' holds values that are NaN"),
        ({"fc.weight": torch.ones(CLASSES, 512, dtype=torch.int64)}, "int64"),
        ({"module.fc.bias": torch.zeros(CLASSES)}, "'fc.bias' twice"),
        ({"epoch": 4}, r"1 other entries \(epoch\)"),
    ],
)
def test_other_misfits(network: nn.Module, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {key: value for key, value in {**network.state_dict(), **change}.items() if value is not None}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=message):
        load_model("resnet18", tmp_path / "weights.pth")


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds a dict; expected a state dict"):
        load_model("resnet18", tmp_path / "w.pt")


def test_an_architecture_that_is_no_json(network: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors", {"arch": '"a\\"'})
    with pytest.raises(ModelError, match="unknown model"):
        load_model(None, tmp_path / "w.safetensors")


def test_wrong_class_names_and_missing_architecture(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, {"classes": "one,two"})
    with pytest.raises(ModelError, match="names 2 classes, but its head has 3"):
        load_model("resnet18", path)
    with pytest.raises(ModelError, match="does not say what architecture"):
        load_model(None, path)
    safetensors.torch.save_file(network.state_dict(), path, {"classes": '["one", 2, "three"]'})
    with pytest.raises(ModelError, match="list of names"):
        read_checkpoint(path)


def test_vgg_head_and_thousand_classes_are_imagenets(tmp_path: Path) -> None:
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_model("resnet18", tmp_path / "weights.pth")
    assert loaded.classes == imagenet_classes()
    assert (loaded.classes[0], len(loaded.classes)) == ("tench", 1000)
    with pytest.raises(ModelError, match=r"head 'classifier\.6\.weight'"):
        load_model("vgg11", tmp_path / "weights.pth")


def test_torchvision_weights_by_name(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    state = resnet18().state_dict()
    asked: list[str] = []

    def answer(url: str, *args: object, **kwargs: object) -> Mapping[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)
    loaded = load_model("resnet18", size=64)
    weights = get_model_weights("resnet18").DEFAULT
    assert asked == [weights.url]
    assert torch.equal(loaded.model.get_parameter("fc.weight"), state["fc.weight"])
    assert loaded.classes == tuple(weights.meta["categories"])
    assert (loaded.preprocessing.resize, loaded.preprocessing.crop) == (73, 64)
    assert loaded.source == "ResNet18_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"(?s)could not be downloaded.*(no route|hash).*--weights FILE.*embedded"):
        load_model("resnet50")


def test_preprocessing_is_the_weights_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    ours = load_model("resnet18", tmp_path / "weights.pth").preprocessing
    theirs = get_model_weights("resnet18").DEFAULT.transforms()
    assert [ours.resize] == theirs.resize_size
    assert [ours.crop] == theirs.crop_size
    assert list(ours.mean) == theirs.mean
    assert list(ours.std) == theirs.std


def test_every_listed_model_can_be_built() -> None:
    listed = list_models()
    assert list(listed) == [EMBEDDED, *TORCHVISION_MODELS, "timm:NAME"]
    assert "25.6 M parameters, ImageNet top-1 80.9 %" in listed["resnet50"]
    for name in TORCHVISION_MODELS:
        with torch.device("meta"):
            assert any(isinstance(module, nn.Conv2d) for module in get_model(name).modules())


def test_unknown_names_suggest_known_ones() -> None:
    with pytest.raises(UnknownModelError, match=r"did you mean .*resnet50.*known: embedded, resnet18"):
        load_model("resnet5O")
    with pytest.raises(ModelError, match="at least 32"):
        load_model("embedded", size=8)
    with pytest.raises(ModelError, match="no weights file at nowhere"):
        load_model("resnet18", Path("nowhere"))


def test_timm(network: nn.Module, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18", num_classes=4).state_dict()
    torch.save(renamed(state, "module."), tmp_path / "weights.pth")
    loaded = load_model("timm:resnet18", tmp_path / "weights.pth")
    assert torch.equal(loaded.model.get_parameter("fc.weight"), state["fc.weight"])
    assert len(loaded.classes) == 4
    assert loaded.preprocessing.interpolation == "bicubic"
    assert (loaded.preprocessing.resize, loaded.preprocessing.crop) == (235, 224)
    with pytest.raises(UnknownModelError, match="did you mean resnet50"):
        load_model("timm:resnet5")


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def refuse(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError, match=r"could not be downloaded .*cannot reach the hub.*--weights FILE"):
        load_model("timm:resnet18")


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'lrp-fast\[timm\]'"):
        load_model("timm:resnet18")


def test_embedded_is_the_default() -> None:
    loaded = load_model()
    assert loaded.name == EMBEDDED
    assert len(loaded.classes) == 8
    assert loaded.preprocessing.crop == loaded.preprocessing.resize == 224
    with torch.no_grad():
        assert loaded.model(torch.randn(1, 3, 64, 64)).shape == (1, 8)
    assert load_model(size=96).preprocessing.crop == 96


def test_embedded_takes_no_other_weights(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="brings its own weights"):
        load_model("embedded", tmp_path / "weights.pth")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no trained weights at {DATA}")
def test_the_trained_resnet18() -> None:
    loaded = load_model(None, DATA / "resnet18_imagenette.safetensors")
    assert loaded.name == "resnet18"
    folders = sorted(path.name for path in (DATA / "imagenette").iterdir())
    assert list(loaded.classes) == folders
    with pytest.raises(ModelError, match=r"does not fit resnet50: \d+ missing .* of another shape"):
        load_model("resnet50", DATA / "resnet18_imagenette.safetensors")


def test_importing_loads_neither_torchvision_nor_timm() -> None:
    program = "import sys, lrp_fast.models; print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
