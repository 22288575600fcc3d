"""The notifier of waiting requests, when something has changed, and of the leader, when work is
due."""

from __future__ import annotations

import asyncio
from typing import Any

_FIRST = asyncio.FIRST_COMPLETED


class Notifier:
    """Notifies waiting devices of changes that may mean work. Belongs to one event loop."""

    def __init__(self) -> None:
        self.closed = False
        self.generation = 0
        """The number of notifications; one that grew during a query asks for another query."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._woken = asyncio.Event()

    def notify(self) -> None:
        """Lets all waiting requests check again."""
        self.generation += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seconds: float, *others: asyncio.Future[Any]) -> None:
        """Waits for the next notification, or one of the others, at most so long."""
        notified: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(notified)
        try:
            await asyncio.wait((notified, *others), timeout=seconds, return_when=_FIRST)
        finally:
            self._waiting.discard(notified)

    def wake(self) -> None:
        """Makes the leader check at once instead of at its next tick."""
        self._woken.set()

    async def wait_for_wake(self, seconds: float) -> None:
        """Waits until the leader is to check, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        finally:
            self._woken.clear()

    def close(self) -> None:
        """Ends all waits."""
        self.closed = True
        self.notify()
        self.wake()
