"""Memory that is given back: what a burst of a thousand devices needed is needed once.

glibc keeps what was freed, in a heap for each thread and between what is still in use; the peak of
a server would be the sum of what its phases needed, instead of the most that one of them needs.
Elsewhere than on glibc nothing of this does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROWTH_BYTES = 1 << 24
"""Since memory was last given back; giving back takes some hundredths of a second of a core."""
_M_ARENA_MAX = -8  # of malloc.h
_STATM = Path("/proc/self/statm")


def share_heaps() -> None:
    """Let all threads share two heaps."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


class Trimmer:
    """Gives memory back whenever the process has grown."""

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        trim: Callable[[int], object] | None = None,
    ) -> None:
        """`resident` tells how much the process has, `trim` gives back; None: the system's."""
        self._resident = resident or resident_bytes
        self._trim = trim or _of_libc("malloc_trim")
        self._kept = 0

    def look(self) -> bool:
        """Give back, if it is time to. Returns whether it was."""
        if self._trim is None or self._resident() < self._kept + GROWTH_BYTES:
            return False
        self._trim(0)
        self._kept = self._resident()
        return True


def resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
