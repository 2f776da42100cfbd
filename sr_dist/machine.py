"""What this process uses of its machine, and what is set once for it."""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGEST = 2**31 - 1
_LARGE = 32 * 2**20  # bytes; glibc's greatest threshold
_TOP_PAD = 64 * 2**20  # bytes that the heap grows by at least


def megabytes_in_use() -> dict[str, float]:
    """`resident`: of this process. `gpu_peak`: of its tensors there, since it began, if any."""
    found = {}
    status = Path("/proc/self/statm")
    if status.exists():  # Linux
        found["resident"] = int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    if torch.cuda.is_available():
        found["gpu_peak"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16; those that do not emulate it, slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # Which also says so of x86 processors with AVX-512 alone. A torch that cannot be asked more is
    # believed: what is told of emulation may then be missing.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return not x86 or any(getattr(torch.cpu, name, lambda: True)() for name in asked)


def commit() -> str | None:
    """Of the checkout that this code is run from, as `git describe` names it, if it is one."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # without git, nobody knows
        return None
    return described.stdout.strip() or None


def keep_freed_memory(*, large_too: bool = True) -> bool:
    """Let the C library keep what tensors free, for those of the next step; whether it does.

    glibc gives large blocks back to the system and gets them again as zeroed pages, hundreds of
    times in a step on a CPU: a quarter of its time. Other C libraries are left as they are.
    `large_too`: also blocks of 32 MiB and more. Kept ones are used again only where they fit, so
    that more may be held than is ever in use.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    way = (_M_MMAP_MAX, 0) if large_too else (_M_MMAP_THRESHOLD, _LARGE)
    options = (way, (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(option, value) == 1 for option, value in options])
