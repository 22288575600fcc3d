"""Settings of the C library's allocator under which training reuses its memory.

A step of training needs what the step before it freed. glibc would give large pieces back to the
system in between, which clears every page anew: up to a fifth of a step of the paper's LSTM.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MOST = (1 << 31) - 1  # that malloc's settings can be


def keep_freed() -> None:
    """Keeps what is freed in this process for the next step of training."""
    mallopt = of_libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, _MOST)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def of_libc(name: str) -> Any:
    """Returns a function of the C library, or None where there is none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
