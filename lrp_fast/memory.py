"""How this process keeps memory."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensors, and say whether it does.

    An explanation on a CPU frees hundreds of megabytes at its end. glibc hands them back to the system, which fills them
    with zeros when the next explanation asks for them again: 5 to 20 % of its time, depending on the batch. Afterwards the
    process keeps what it needed at its peak.

    It changes the whole process, so a program is to call it, once, at its start; the command line does. Nothing is changed,
    and False returned, where the C library is another one or the environment has chosen already (``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ENVIRONMENT):
        return False
    change = ctypes.CDLL(None).mallopt
    return bool(change(_MMAP_THRESHOLD, _LARGEST)) and bool(change(_TRIM_THRESHOLD, _LARGEST))
