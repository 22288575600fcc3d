"""Memory that a server returns to the system after a load peak, and when it collects garbage.

CPython runs a full garbage collection each time the number of long-lived objects has grown by 25 %.
With ten thousand connections each one stops the process for half a second. Most of what a server
drops is in no cycle, or in a young one. So a server collects when it has grown, and mostly what is
new.

glibc keeps what was freed, in a heap for each thread and between what is still in use. The peak of
a server would be the sum of what its phases need, instead of the most that one of them needs.
Elsewhere than on glibc nothing is returned.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

from potluck.core.allocator import M_MMAP_THRESHOLD, of_libc

GROWTH_BYTES = 1 << 23
"""Since memory was last returned; at least, since the last collection."""
COLLECT_PART = 1 / 40
"""Of the time, at most, in which the process stands still to collect."""
_HOUR = 3600.0
_M_ARENA_MAX = -8  # of malloc.h
_LARGE_BYTES = 1 << 18
_NEVER = 1 << 30
_STATM = Path("/proc/self/statm")


def share_heaps() -> None:
    """Lets all threads share two heaps, and returns large blocks to the system.

    glibc would keep what is large in its heaps too, once a large piece was freed.
    """
    mallopt = of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, _LARGE_BYTES)


class Trimmer:
    """Gives memory back whenever the process has grown."""

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        trim: Callable[[int], object] | None = None,
    ) -> None:
        """`resident` tells how much the process has, `trim` gives back; None: the system's."""
        self._resident = resident or resident_bytes
        self._trim = trim or of_libc("malloc_trim")
        self._kept = 0

    def poll(self) -> bool:
        """Gives back, if it is time to. Returns whether it was."""
        if self._trim is None or self._resident() < self._kept + GROWTH_BYTES:
            return False
        self._trim(0)
        self._kept = self._resident()
        return True


@contextlib.contextmanager
def only_young_collections() -> Generator[None]:
    """Collects young objects alone in the block. A `GcScheduler` does the rest."""
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()


class GcScheduler:
    """Collects what is new since the last collection when the process has grown by a tenth, and
    everything, which takes long, when it has doubled, or an hour has passed."""

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`resident` tells how much memory the process has; `clock` in seconds."""
        self._resident, self._clock = resident or resident_bytes, clock
        self._next, self._hour = clock(), clock() + _HOUR
        self._kept = self._kept_of_all = self._resident()

    def poll(self) -> bool:
        """Collects, if it is time to. Returns whether it was."""
        start, size = self._clock(), self._resident()
        at_all = size >= 2 * self._kept_of_all or start >= self._hour
        has_grown = size >= self._kept + max(GROWTH_BYTES, self._kept // 10)
        if start < self._next or not (at_all or has_grown):
            return False
        if at_all:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._kept = self._resident()
        end = self._clock()
        if at_all:
            self._kept_of_all, self._hour = self._kept, end + _HOUR
        self._next = end + (end - start) / COLLECT_PART
        return True


def resident_bytes() -> int:
    """Returns the memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
