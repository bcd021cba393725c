"""A GPU that is none: tensors that say they are on ``cuda:0``, keep their values on the CPU, and do not mix with the host's.

It shows without a GPU what one would: whether an operation gets tensors of two devices, where results lie, and where Python
waits for a value. Nothing else of a GPU: no streams, no kernels of its own, no autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
HOST = torch.device("cpu")
COPIES = ("aten::_to_copy", "aten::copy_")

waits: list[str] = []
"""What has waited for a value since a simulation began."""


class DeviceTensor(Tensor):
    """A tensor on the simulated device; ``values`` are its own. What torch's bindings do under a guard of the device is here."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        about = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **about)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    is_cuda = property(lambda self: True)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        there = self.is_contiguous(memory_format=memory_format)
        return self if there else self.clone(memory_format=memory_format)

    def __getitem__(self, index: Any) -> DeviceTensor:
        with _disable_current_modes():
            return DeviceTensor(self.values[_values(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        with _disable_current_modes():
            self.values[_values(index)] = _values(value)

    def __invert__(self) -> Tensor:
        return self.bitwise_not()

    def nonzero(self) -> DeviceTensor:  # type: ignore[override]
        with _disable_current_modes():
            return DeviceTensor(self._waited("nonzero").nonzero())

    def item(self) -> Any:
        with _disable_current_modes():
            return self._waited("item").item()

    def tolist(self) -> Any:
        with _disable_current_modes():
            return self._waited("tolist").tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def record_stream(self, stream: object) -> None:
        pass

    def _waited(self, what: str) -> Tensor:
        waits.append(what)
        return self.values


def _values(tree: Any) -> Any:
    return tree_map(lambda x: x.values if isinstance(x, DeviceTensor) else x, tree)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation on the CPU's values; its results lie where its operands do, or where it is told to put them."""
    name, device = func._schema.name, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, DeviceTensor) for x in tensors]
    host = [tuple(x.shape) for x, on_device in zip(tensors, there, strict=True) if not on_device and x.ndim > 0]
    if any(there) and host and name not in COPIES:
        raise RuntimeError(f"{name} got tensors of two devices; on the host {host}")
    if name == "aten::_to_copy" and any(there) and device == HOST and not kwargs.get("non_blocking"):
        waits.append("to the host")
    if name == "aten::equal" and any(there):
        waits.append("equal")
    stays = any(there[:1] if name == "aten::copy_" else there) if device is None else device.type == "cuda"
    options = dict(kwargs)
    if device is not None:
        options["device"] = HOST
    options.pop("pin_memory", None)
    result = func(*_values(args), **_values(options))
    written = {id(_values(x)): x for x in tensors}  # an operation in place, or into out=, gives what it was given

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return written[id(x)] if id(x) in written else DeviceTensor(x) if stays else x

    return tree_map(placed, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _made_on_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return make(*args, **options) if device is None else make(*args, **options).to(device)

    return made


@contextmanager
def simulated_device() -> Iterator[None]:
    """Inside, ``.to("cuda:0")`` and ``device="cuda:0"`` make tensors of the simulated device."""
    cuda = {
        "_lazy_init": lambda: None, "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "simulated",
        "current_stream": lambda *_: mock.MagicMock(), "Stream": lambda *_: mock.MagicMock(), "empty_cache": lambda: None,
        "stream": lambda *_: nullcontext(), "device": lambda *_: nullcontext(),
    }  # fmt: skip
    waits.clear()
    cudnn = torch.backends.cudnn.flags(enabled=False)  # whose operators a CPU does not have
    tensor = mock.patch.object(torch, "tensor", _made_on_the_host(torch.tensor))
    with mock.patch.multiple(torch.cuda, **cuda), tensor, cudnn, _Mode():
        yield


def on_simulated_device(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers put on the simulated device."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None:
                    table[key] = DeviceTensor(value.detach())  # type: ignore[assignment]
    return model
