"""What is set once for a process, by the machine that it runs on."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_TOP_PAD = 64 * 2**20  # bytes that the heap grows by at least


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free, for those of the next step; whether it does.

    glibc gives large blocks back to the system and gets them again as zeroed pages, hundreds of
    times in a step on a CPU: a quarter of its time. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(option, value) == 1 for option, value in options])
