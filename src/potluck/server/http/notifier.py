"""The bell: tells requests that wait for work that something has changed, and the leader to look.

All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

_FIRST = asyncio.FIRST_COMPLETED


class Bell:
    """Rings when devices that wait may have work."""

    def __init__(self) -> None:
        self.closed = False
        self.rings = 0
        """So far: whoever looks and notes it can tell later whether to look again."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._woken = asyncio.Event()

    def ring(self) -> None:
        """Let all who wait look again."""
        self.rings += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def next_ring(self, seconds: float, *others: asyncio.Future[Any]) -> None:
        """Until it rings, or one of the others is done, or so long."""
        ring: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(ring)
        try:
            await asyncio.wait((ring, *others), timeout=seconds, return_when=_FIRST)
        finally:
            self._waiting.discard(ring)

    def wake(self) -> None:
        """Have the leader look at once instead of at its next tick."""
        self._woken.set()

    async def woken(self, seconds: float) -> None:
        """Until somebody wakes the leader, or so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        finally:
            self._woken.clear()

    def close(self) -> None:
        """Send all who wait home."""
        self.closed = True
        self.ring()
        self.wake()
