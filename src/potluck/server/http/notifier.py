"""Tells requests that wait for work that something has changed, and the leader to look at once."""

from __future__ import annotations

import asyncio
from typing import Any

_FIRST = asyncio.FIRST_COMPLETED


class Notifier:
    """Notifies of changes by which devices that wait may have work. Belongs to one event loop."""

    def __init__(self) -> None:
        self.closed = False
        self.generation = 0
        """Of what there is to see: whoever notes it before a look knows whether to look again."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._woken = asyncio.Event()

    def notify(self) -> None:
        """Let all who wait look again."""
        self.generation += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seconds: float, *others: asyncio.Future[Any]) -> None:
        """Until the next notification, or one of the others is done, or so long."""
        notified: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(notified)
        try:
            await asyncio.wait((notified, *others), timeout=seconds, return_when=_FIRST)
        finally:
            self._waiting.discard(notified)

    def wake(self) -> None:
        """Have the leader look at once instead of at its next tick."""
        self._woken.set()

    async def wait_for_wake(self, seconds: float) -> None:
        """Until the leader is to look, or so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        finally:
            self._woken.clear()

    def close(self) -> None:
        """Have all who wait end."""
        self.closed = True
        self.notify()
        self.wake()
