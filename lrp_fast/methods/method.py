"""What a method is, and what all of them have in common: arguments checked, the model left alone, work done once."""

from __future__ import annotations

import contextlib
import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lrp_fast.trace import check_eval

State = TypeVar("State")
Result = TypeVar("Result")


class Method(Protocol):
    """Anything that explains a batch: ``method(model, images, target) → heatmaps``.

    ``model``: a classifier in eval mode, N×C×H×W → N × classes, which is left as it was. ``images``: N×C×H×W floating,
    normalised as in training, on the model's device. ``target``: N int64, the class to explain, on the same device.
    Returns N×H×W float32 on that device: signed, of the images' size, larger where more speaks for the class. What a
    library gives that is not finite is handed on; the metrics refuse such a map and name it.
    """

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor: ...


def check_arguments(model: nn.Module, images: Tensor, target: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a :class:`Method` can take these arguments.

    The text says what was got and what is expected; images that are not finite are named by their place in the batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_eval(model)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"expected images as a floating-point tensor, normalised as in training, got {got}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"expected images N x C x H x W, at least one, got shape {list(images.shape)}")
    finite = images.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"image {int((~finite).nonzero()[0])} of the batch holds values that are NaN or infinite")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"expected target as an int64 tensor, one class for each image, got {got}")
    if target.shape != images.shape[:1]:
        raise ValueError(f"expected {images.shape[0]} targets, one for each image, got shape {list(target.shape)}")
    devices = {images.device, target.device, *(parameter.device for parameter in model.parameters())}
    if len(devices) > 1:
        found = f"images on {images.device}, target on {target.device}, in all {', '.join(sorted(map(str, devices)))}"
        raise ValueError(f"model, images and target must be on one device, got {found}")


def checked_heatmaps(heatmaps: Tensor, images: Tensor) -> Tensor:
    """What a method returned, detached and float32 on the images' device; finite or not.

    Raises ``TypeError`` if it is no tensor, ``ValueError`` if it is not N×H×W of the images' size.
    """
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"expected the method to return a tensor N x H x W, got {type(heatmaps).__name__}")
    expected = (images.shape[0], *images.shape[-2:])
    if tuple(heatmaps.shape) != expected:
        raise ValueError(f"expected heatmaps of shape {list(expected)}, got {list(heatmaps.shape)}")
    return heatmaps.detach().to(images.device, torch.float32)


def check_counts(**counts: int) -> None:
    """Raise ``ValueError`` naming the first of the options that is not a number of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


@dataclass(frozen=True)
class _Prepared(Generic[State]):
    """What was made of a model. ``state`` is built on a copy that shares the model's storage, which is thus never
    freed and given to others: equal addresses in ``signature`` mean the same weights."""

    model: weakref.ref[nn.Module]
    signature: object
    classes: int
    state: State


@dataclass(eq=False)
class _Memory(Generic[State]):
    """The model seen last; forgotten when that model dies."""

    prepared: _Prepared[State] | None = None

    def forget(self, model: object = None) -> None:
        self.prepared = None


@dataclass(frozen=True)
class PreparedMethod(ABC, Generic[State]):
    """A :class:`Method` that works on a private copy of the model and keeps what it made of it for the next batch.

    The copy shares the weights' memory but has modules and parameters of its own, so that what a library hooks, flags
    or replaces there is not the user's. It is made anew when the model's modules or weights have changed.
    """

    _memory: _Memory[State] = field(default_factory=_Memory, init=False, repr=False, compare=False)

    @abstractmethod
    def prepare(self, model: nn.Module) -> State:
        """What is worked out once for a model, given as the private copy."""

    @abstractmethod
    def heatmaps(self, state: State, images: Tensor, target: Tensor) -> Tensor:
        """The maps N×H×W of checked arguments, with gradients enabled; the images are a copy."""

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        return checked_heatmaps(self._run(self.heatmaps, model, images, target), images)

    def forget(self) -> None:
        """Release what was prepared for the last model; for our own methods that is a packed copy of its weights.

        Our own methods also need it after writes through ``.data``, which leave no trace.
        """
        self._memory.forget()

    def _run(
        self, function: Callable[[State, Tensor, Tensor], Result], model: nn.Module, images: Tensor, target: Tensor
    ) -> Result:
        """``function`` of the model's state and the arguments, whatever modes the caller is in."""
        check_arguments(model, images, target)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            prepared = self._prepared(model, images)
            bad = (target < 0) | (target >= prepared.classes)
            if bool(bad.any()):
                classes = f"the model has classes 0 to {prepared.classes - 1}"
                raise ValueError(f"target {int(target[bad][0])} is out of range: {classes}")
            try:
                # Cloned: tensors made in inference mode cannot be differentiated by, and some models write on their input.
                return function(prepared.state, images.detach().clone(), target.clone())
            except BaseException:
                self._memory.forget()  # a library that was interrupted may have left its hooks on the copy
                raise

    def _prepared(self, model: nn.Module, images: Tensor) -> _Prepared[State]:
        signature = _signature(model)
        known = self._memory.prepared
        if known is None or known.model() is not model or known.signature != signature:
            self._memory.forget()
            private = _private_copy(model)
            classes = _count_classes(private, images)
            known = _Prepared(weakref.ref(model, self._memory.forget), signature, classes, self.prepare(private))
            self._memory.prepared = known
        return known


def _signature(model: nn.Module) -> object:
    """Equal as long as the model has the same modules and weights (writes through ``.data`` show in no counter)."""
    modules = tuple((name, id(module)) for name, module in model.named_modules())
    tensors = tuple(
        (value.data_ptr(), 0 if value.is_inference() else value._version, value.dtype, value.device, value.shape)
        for value in (*model.parameters(), *model.buffers())
    )
    return modules, tensors


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy with modules, hooks and parameters of its own over the same memory; no parameter needs gradients."""
    shared: dict[int, Tensor] = {id(buffer): buffer.data for buffer in model.buffers()}
    for parameter in model.parameters():
        # .data and not detach(): a library that writes a weight's own values back must not count as a change of it.
        shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    return copy.deepcopy(model, dict(shared))


def _count_classes(model: nn.Module, images: Tensor) -> int:
    with torch.no_grad():
        output = model(images[:1].detach().clone())
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != 1:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected a model that returns logits N x classes, got {got} for one image")
    return output.shape[1]


@contextlib.contextmanager
def importing(library: str) -> Iterator[None]:
    """Around the imports of an optional library: raise an ``ImportError`` that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"this method needs {library}, which cannot be imported ({error}): pip install 'lrp-fast[baselines]'"
        ) from error
