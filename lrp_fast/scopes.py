"""What is set for the whole process, while something of ours runs and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: where Triton launches kernels, and streams, events and graphs are made; else nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def watched() -> bool:
    """Whether somebody looks at torch's operations: ``torch.compile``, which makes a graph of them, or a dispatch mode."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Run float32 convolutions and products in full precision, or in TF32 on a GPU if ``tf32``.

    cuDNN uses TF32 unless told otherwise, and ``torch.set_float32_matmul_precision`` may have chosen less everywhere;
    whatever was chosen before is chosen again afterwards.
    """
    backends: Any = torch.backends  # its precision settings are made at run time
    on_gpu = "tf32" if tf32 else "ieee"
    # cuDNN's two go together: PyTorch refuses to answer for cuDNN as a whole while they differ.
    wanted = [(setting, on_gpu) for setting in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]
    wanted += [(setting, "ieee") for setting in (backends.mkldnn.conv, backends.mkldnn.matmul)]
    before = [setting.fp32_precision for setting, _ in wanted]
    # "none" is full precision too, and need not be touched
    changes = [
        (setting, old, new)
        for (setting, new), old in zip(wanted, before, strict=True)
        if old != new and not (old == "none" and new == "ieee")
    ]
    try:
        for setting, _, new in changes:
            setting.fp32_precision = new
        yield
    finally:
        for setting, old, _ in changes:
            # What follows a wider setting reads as that one's value: let it follow again.
            setting.fp32_precision = "none"
            if setting.fp32_precision != old:
                setting.fp32_precision = old
