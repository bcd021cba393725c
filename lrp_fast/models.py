"""Networks by name, with weights from their makers, from a local file, or from the package itself.

A file is read as data only: safetensors, or a PyTorch file that holds nothing but tensors and plain containers.
Whatever would have to run code to be read is refused. torchvision and timm are imported where they are used.
"""

from __future__ import annotations

import difflib
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrp_fast.images import Preprocessing

EMBEDDED = "embedded"
TIMM_PREFIX = "timm:"
TORCHVISION_MODELS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
)  # fmt: skip

WRAPPERS = ("state_dict", "model_state_dict", "model")
MOST_WRAPPERS = 8
"""A file can hold itself."""
PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5
"""How many keys of each kind an error lists before it only counts."""


class ModelError(Exception):
    """A model or its weights cannot be had; the message says why and what can be done."""


class UnknownModelError(ModelError):
    """A name that no known model has; the message lists those there are."""


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to be explained.

    ``model``: in eval mode, float32, on the CPU; ``classes``: one name per output; ``preprocessing``: the pictures it
    was trained on; ``name``: as the user names it; ``source``: where its weights come from.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    name: str
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds: tensors by their names in the network, and what it says of itself, if anything."""

    tensors: dict[str, Tensor]
    architecture: str | None
    classes: tuple[str, ...] | None


def list_models() -> dict[str, str]:
    """Every name :func:`load_model` knows, except timm's, with a one-line description."""
    from torchvision.models import get_model_weights

    listed = {EMBEDDED: "the package's own small ResNet, trained on shapes the package draws; needs no network"}
    for name in TORCHVISION_MODELS:
        weights = get_model_weights(name)["DEFAULT"]
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        millions = weights.meta["num_params"] / 1e6
        listed[name] = f"torchvision, {millions:.1f} M parameters, ImageNet top-1 {accuracy:.1f} %"
    listed[f"{TIMM_PREFIX}NAME"] = "any of timm's, such as timm:resnet50d (needs timm; residual networks have rules)"
    return listed


def load_model(name: str | None = None, weights: Path | None = None, size: int | None = None) -> LoadedModel:
    """A network by name, with its maker's weights or a file's.

    ``name``: one of :func:`list_models`, or ``None``: the architecture that the file's metadata names, without a file
    the embedded network. ``weights``: a state dict (``.safetensors`` or what ``torch.save`` writes), whose class count
    the network is built for; a head of 1000 classes without names is taken to be ImageNet's. ``size``: the crop, in
    pixels, instead of the network's own.

    Raises :class:`UnknownModelError` for an unknown name, and :class:`ModelError` for weights that cannot be read,
    downloaded or fitted, or a size below 32.
    """
    checkpoint = read_checkpoint(weights) if weights is not None else None
    if name is None:
        name = EMBEDDED if checkpoint is None else _named_architecture(checkpoint, weights)
    _check_size(size)
    if name == EMBEDDED:
        loaded = _embedded(checkpoint)
    elif name.startswith(TIMM_PREFIX):
        loaded = _from_timm(name, checkpoint, weights)
    elif name in TORCHVISION_MODELS:
        loaded = _from_torchvision(name, checkpoint, weights)
    else:
        raise UnknownModelError(_unknown_name(name))
    if size is None:
        return loaded
    resized = loaded.preprocessing.with_size(size)
    return LoadedModel(loaded.model, loaded.classes, resized, loaded.name, loaded.source)


def _check_size(size: int | None) -> None:
    if size is not None and size < 32:
        raise ModelError(f"the picture size must be at least 32 pixels (a ResNet halves it five times), got {size}")


def _unknown_name(name: str) -> str:
    known = (EMBEDDED, *TORCHVISION_MODELS)
    close = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown model {name!r}; {hint}known: {', '.join(known)}, and timm's as {TIMM_PREFIX}NAME"


def _named_architecture(checkpoint: Checkpoint, path: Path | None) -> str:
    if checkpoint.architecture is None:
        raise ModelError(f"{path} does not say what architecture it is for; name it with --model")
    return checkpoint.architecture


def _embedded(checkpoint: Checkpoint | None) -> LoadedModel:
    from lrp_fast import embedded

    if checkpoint is not None:
        raise ModelError("the embedded network brings its own weights; name the file's network with --model")
    preprocessing = Preprocessing(resize=224, crop=224, mean=embedded.MEAN, std=embedded.STD)
    network = embedded.embedded_network()
    return LoadedModel(network, tuple(embedded.CLASSES), preprocessing, EMBEDDED, "shipped with lrp_fast")


def _from_torchvision(name: str, checkpoint: Checkpoint | None, path: Path | None) -> LoadedModel:
    from torchvision.models import get_model, get_model_weights

    weights = get_model_weights(name)["DEFAULT"]
    transforms = weights.transforms()
    preprocessing = Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
    if checkpoint is None:
        tensors = _download(weights.url, lambda: weights.get_state_dict(progress=False, check_hash=True))
        checkpoint, source = Checkpoint(dict(tensors), None, tuple(weights.meta["categories"])), str(weights)
    else:
        source = str(path)
    with torch.device("meta"):
        head = _head_name(get_model(name))
    count = _class_count(checkpoint, head, name, source)
    model = get_model(name, num_classes=count)
    _fit(model, checkpoint.tensors, name, source)
    return LoadedModel(model.eval(), _class_names(checkpoint, count, source), preprocessing, name, source)


def _from_timm(name: str, checkpoint: Checkpoint | None, path: Path | None) -> LoadedModel:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"{name} needs timm, which is not installed: pip install 'lrp-fast[timm]'") from error
    architecture = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UnknownModelError(f"timm has no model {architecture!r}{hint}")
    if checkpoint is None:
        model = _download(f"timm's {architecture}", lambda: timm.create_model(architecture, pretrained=True))
        count, source = model.num_classes, f"timm, {model.pretrained_cfg.get('tag') or 'default'} weights"
        names = _timm_class_names(model)
        checkpoint = Checkpoint({}, None, names)
    else:
        source = str(path)
        count = _class_count(checkpoint, _timm_head(architecture), name, source)
        model = timm.create_model(architecture, num_classes=count)
        _fit(model, checkpoint.tensors, name, source)
    return LoadedModel(model.eval(), _class_names(checkpoint, count, source), _timm_preprocessing(model), name, source)


def _timm_head(architecture: str) -> str:
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not isinstance(config.classifier, str):
        raise ModelError(f"timm does not name one classifier for {architecture!r}, so no weights file can be fitted")
    return f"{config.classifier}.weight"


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    from timm.data import resolve_data_config

    config: dict[str, Any] = resolve_data_config({}, model=model)
    crop = config["input_size"][-1]
    return Preprocessing(
        resize=math.floor(crop / config["crop_pct"]),
        crop=crop,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )


def _timm_class_names(model: nn.Module) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


def _download(what: str, fetch: Any) -> Any:
    """Run a maker's own download; torch.hub raises OSError without a network and RuntimeError for damaged bytes."""
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the weights could not be downloaded ({what}): {reason}. Give a local file with --weights FILE, "
            f"or use --model {EMBEDDED}, which needs no network"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict from a ``.safetensors`` file or what ``torch.save`` wrote, on the CPU, running no code.

    Wrappers (``{"state_dict": ...}``, ``{"model": ...}``, ``{"model_state_dict": ...}``) are opened, the prefixes
    ``module.``, ``_orig_mod.`` and ``model.`` removed. ``arch`` and ``classes`` (a list, a JSON list, or names
    separated by commas) are taken from safetensors metadata or from beside the state dict.

    Raises :class:`ModelError` if the file is missing, damaged, would have to run code, or holds no state dict.
    """
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
    content, about = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        others = [key for key in content if key not in tensors]
        raise ModelError(
            f"{path} is not a state dict: expected tensors by name, or one of {', '.join(WRAPPERS)} holding them; "
            f"got {len(tensors)} tensors and {len(others)} other entries ({_some(map(str, others))})"
        )
    classes = _parse_classes(about.get("classes"), path)
    return Checkpoint(_strip_prefixes(tensors, path), _parse_text(about.get("arch")), classes)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is refused: it is damaged, or holds more than tensors and could run code when read. Save the "
            f"plain weights with torch.save(model.state_dict(), ...) or as safetensors. ({_reason(error)})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # What torch's readers raise on bytes that are neither its archive nor its older pickle.
        raise ModelError(
            f"{path} is not a readable PyTorch weights file ({type(error).__name__}: {_reason(error)})"
        ) from error
    about: Mapping[str, Any] = {}
    for _ in range(MOST_WRAPPERS):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return {str(key): value for key, value in content.items()}, about
        about, content = {**content, **about}, inner
    raise ModelError(f"{path} holds a {type(content).__name__}; expected a state dict (tensors by name)")


def _reason(error: BaseException) -> str:
    """The line of torch's message that names the cause; the rest is advice on how to let the file run its code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line or "global" in line]
    return (telling or lines or [type(error).__name__])[0][:300]


def _parse_text(value: object) -> str | None:
    """Metadata as text; safetensors' may be JSON."""
    if not isinstance(value, str):
        return None
    try:
        return str(json.loads(value)) if value.startswith('"') and value.endswith('"') else value
    except json.JSONDecodeError:
        return value


def _parse_classes(value: object, path: Path) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ModelError(f"{path}: its metadata `classes` is not a JSON list: {error}") from error
    elif isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ModelError(f"{path}: its metadata `classes` must be a list of names, got {value!r:.200}")
    return tuple(value)


def _strip_prefixes(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise ModelError(f"{path} holds {name!r} twice, with different prefixes ({', '.join(PREFIXES)})")
        stripped[name] = tensor
    return stripped


def _head_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1] + ".weight"


def _class_count(checkpoint: Checkpoint, head: str, name: str, source: str) -> int:
    weight = checkpoint.tensors.get(head)
    if weight is None or weight.ndim != 2:
        shape = "missing" if weight is None else f"of shape {list(weight.shape)}"
        raise ModelError(
            f"{source} does not fit {name}: its head {head!r}, expected as [classes, features], is {shape}; "
            f"the file holds {len(checkpoint.tensors)} tensors ({_some(checkpoint.tensors)})"
        )
    return weight.shape[0]


def _class_names(checkpoint: Checkpoint, count: int, source: str) -> tuple[str, ...]:
    if checkpoint.classes is not None:
        if len(checkpoint.classes) != count:
            raise ModelError(f"{source} names {len(checkpoint.classes)} classes, but its head has {count}")
        return checkpoint.classes
    return imagenet_classes() if count == 1000 else tuple(f"class {index}" for index in range(count))


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 ImageNet class names in torchvision's order, without a network."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def _fit(model: nn.Module, tensors: dict[str, Tensor], name: str, source: str) -> None:
    """Copy a state dict into a model, every key and shape required to match; raises :class:`ModelError`."""
    own = model.state_dict()
    # Files written before batch norm counted its batches lack this one, which evaluation never reads.
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in own]
    differing = [
        f"{key}: file {list(tensors[key].shape)}, model {list(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if missing or unexpected or differing:
        findings = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
        parts = [f"{len(keys)} {kind} ({_some(keys, '; ')})" for kind, keys in findings if keys]
        raise ModelError(f"{source} does not fit {name}: {', '.join(parts)}")
    _check_values(own, tensors, source)
    model.load_state_dict(tensors, strict=True)


def _check_values(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    for key, tensor in tensors.items():
        if own[key].is_floating_point() and not tensor.is_floating_point():
            raise ModelError(f"{source}: {key!r} holds {tensor.dtype} values, expected floating-point ones")
        # One pass without a mask: a sum is finite only if its terms are.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64)):
            raise ModelError(f"{source}: {key!r} holds values that are NaN or infinite")


def _some(keys: Any, separator: str = ", ") -> str:
    """The first few of many keys, and how many there are more."""
    listed = list(keys)
    rest = [f"and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
    return separator.join(listed[:_SHOWN] + rest)
