"""Keep memory that was freed: on Linux, large tensors otherwise fault in fresh pages at every step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from the heap and not to give freed ones back.

    MiniLM trained at 234 instead of 203 examples/s dense, at 139 instead of 115 with int8 and distillation (batch 32,
    two Zen 4 cores). Does nothing (and returns False) where malloc is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
