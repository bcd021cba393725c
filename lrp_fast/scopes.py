"""What is set for the whole process, while something of ours runs and no longer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: where Triton launches kernels, and streams, events and graphs are made; else nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def watched() -> bool:
    """Whether somebody looks at torch's operations: ``torch.compile``, which makes a graph of them, or a dispatch mode."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


@contextmanager
def interruptions_heard_by(told: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C, and a termination that interrupts likewise, call ``told`` and interrupt nothing.

    Does nothing outside the main thread, where no signal arrives, and leaves handlers of the caller's own alone.
    """
    interrupting = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.default_int_handler
    ]
    for number in interrupting:
        signal.signal(number, lambda *_: told())
    try:
        yield
    finally:
        for number in interrupting:
            signal.signal(number, signal.default_int_handler)


@contextmanager
def interrupted_between() -> Iterator[Callable[[], None]]:
    """Have Ctrl-C interrupt only where what this gives is called; a second one at once.

    Where a library calls Python back, as HDF5's does whenever it lets go of something, an interruption would be dropped.
    """
    heard: list[bool] = []

    def pause() -> None:
        if heard:
            raise KeyboardInterrupt

    def told() -> None:
        pause()
        heard.append(True)

    with interruptions_heard_by(told):
        yield pause


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Run float32 convolutions and products in full precision, or in TF32 on a GPU if ``tf32``, and by the same steps each time.

    cuDNN uses TF32 and algorithms that add in any order unless told otherwise, and ``torch.set_float32_matmul_precision``
    may have chosen less everywhere; whatever was chosen before is chosen again afterwards. The settings are those of the
    process: where several scopes are under way, in one thread or in several, full precision wins, and the last to end restores.
    """
    scope = object()
    try:
        with _lock:
            _inside[scope] = tf32
            _choose()
        yield
    finally:
        with _lock:
            _inside.pop(scope, None)
            try:
                _choose()
            except BaseException:  # Ctrl-C, say, in the middle of it
                _choose()
                raise


_lock = threading.Lock()
_inside: dict[object, bool] = {}
"""Of every scope under way, whether it asks for TF32."""
_chosen: bool | str | None = None
"""For whom the settings are: TF32 or not, nobody of ours, or in between."""
_undo: list[Callable[[], object]] = []
"""What makes the settings the caller's again, last first; each may be done twice."""


def _choose() -> None:
    """May be interrupted anywhere, and is complete when it is called again."""
    global _chosen
    wanted = all(_inside.values()) if _inside else None
    if wanted is _chosen:
        return
    _chosen = "in between"
    while _undo:
        _undo[-1]()
        _undo.pop()
    if wanted is not None:
        _choose_all(wanted)
    _chosen = wanted


def _choose_all(wanted: bool) -> None:
    backends: Any = torch.backends  # its precision settings are made at run time
    on_gpu = "tf32" if wanted else "ieee"
    _choose_products(wanted, on_gpu)
    if _differs(backends.cudnn.conv, on_gpu):
        # In some releases cuDNN's two, untouched, follow what is set for it as a whole, and once set never again.
        _set(backends.cudnn, on_gpu)
    # They go together: PyTorch refuses to answer for cuDNN as a whole while they differ.
    for setting in (backends.cudnn.conv, backends.cudnn.rnn):
        if _differs(setting, on_gpu):
            _set(setting, on_gpu)
    for setting in (backends.mkldnn.conv, backends.mkldnn.matmul):
        if _differs(setting, "ieee"):
            _set(setting, "ieee")
    if not torch._C._get_cudnn_deterministic():
        _undo.append(partial(torch._C._set_cudnn_deterministic, False))
        torch._C._set_cudnn_deterministic(True)


def _choose_products(tf32: bool, on_gpu: str) -> None:
    """By the older setting too, which libraries still ask for, and PyTorch does not answer where the two differ."""
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in products]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # they differ already
        older = ""
    if not _differs(products[0], on_gpu) and older != "medium":  # which a CPU has its own idea of
        return
    if not older:
        _set(products[0], on_gpu)
        return

    def undo() -> None:
        torch.set_float32_matmul_precision(older)
        for setting, old in zip(products, before, strict=True):
            _restore(setting, old)

    _undo.append(undo)
    backends.cuda.matmul.allow_tf32 = tf32


def _differs(setting: Any, wanted: str) -> bool:
    """Whether a setting must be changed; "none" is full precision too."""
    found = setting.fp32_precision
    return bool(found != wanted and not (found == "none" and wanted == "ieee"))


def _set(setting: Any, wanted: str) -> None:
    _undo.append(partial(_restore, setting, setting.fp32_precision))
    setting.fp32_precision = wanted


def _restore(setting: Any, old: str) -> None:
    # What follows a wider setting reads as that one's value: let it follow again.
    setting.fp32_precision = "none"
    if setting.fp32_precision != old:
        setting.fp32_precision = old
