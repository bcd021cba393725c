"""How this process keeps memory, and whether it has run out of it."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_LARGEST = 2**31 - 1
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20
"""What glibc's thresholds grow to by themselves (64-bit); 32 MiB is also the most that glibc before 2.35 takes."""
_NO_MEMORY = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""What the host's allocator, a GPU's driver (for a kernel's code, too) and its libraries say where memory is used up."""
_lock = threading.RLock()  # a finalizer may run inside of either function
_owners = 0


def keep_freed_memory(owner: object) -> bool:
    """Have the C library keep freed memory for the next tensors, as long as ``owner`` lives, and say whether it does.

    An explanation on a CPU frees hundreds of megabytes at its end. glibc hands them back to the system, which fills them
    with zeros when the next explanation asks for them again: 10 to 40 % of its time, depending on batch and composite.
    Instead the process keeps what it needed at its peak. When the last owner is gone, the memory is given back, and from
    then on glibc does what it does by default once tensors of 32 MiB have been freed.

    Nothing is changed, and False returned, where the C library is another one or the environment has chosen already
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    global _owners
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ENVIRONMENT):
        return False
    with _lock:
        if _owners == 0:
            change = ctypes.CDLL(None).mallopt
            if not (change(_MMAP_THRESHOLD, _LARGEST) or change(_MMAP_THRESHOLD, _USUAL_MMAP)):
                return False
            change(_TRIM_THRESHOLD, _LARGEST)
        _owners += 1
    weakref.finalize(owner, _release).atexit = False
    return True


def _release() -> None:
    """An owner is gone."""
    global _owners
    with _lock:
        _owners -= 1
        if _owners == 0:
            library = ctypes.CDLL(None)
            library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
            library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
            library.malloc_trim(0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether there is an error that says that memory, of the device or the host, is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


@contextmanager
def out_of_memory_suppressed() -> Iterator[None]:
    """End what is inside where memory is used up, and go on behind it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
