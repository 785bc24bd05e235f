"""What glibc's malloc does with memory that is freed: keep it for the next step, or give it back to the system.

Elsewhere (other systems, another malloc preloaded) both functions do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

# from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed() -> bool:
    """Let malloc keep large blocks that are freed; return whether it does so from now on.

    By default it hands them back to the kernel, and the next step faults the same pages in again: 20,000 page faults a
    step of VGG-16 at half width, 13 % of its time (2 cores, batch 128, 2026-11). No number that is computed changes. A
    process whose environment says how malloc should behave keeps that.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Give what is free back to the system, so that a measured peak is that of memory in use."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ:
        return None
    return ctypes.CDLL(None)
