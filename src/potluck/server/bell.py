"""The bell: tells requests that wait for work that something has changed, and the leader to look.

All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio


class Bell:
    """Rings when devices that wait may have work."""

    def __init__(self) -> None:
        self.closed = False
        self._change: asyncio.Future[None] | None = None
        self._woken = asyncio.Event()

    def next_change(self) -> asyncio.Future[None]:
        """A future that is done at the next ring. Take it before looking: so none is missed."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        return self._change

    def ring(self) -> None:
        """Let all who wait look again."""
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

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
