"""Places for uploads: how many devices send at once, and who waits before sending.

A body that waits for a slot lies in memory, in the server's buffers and in those of TLS; a device
that waits for the answer to its report holds next to nothing. So of a thousand devices that report
at once, as many send as keep a core and a disk busy, and the others follow, first come, first
served. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from potluck.core import ProtocolError

PLACES = 64
WAIT_SECONDS = 25.0
"""For a place, before a device is told to come back: its own patience has an end."""
IDLE_SECONDS = 10.0
"""Without a chunk from a device that has a place, before another one gets it."""
_LOOK_SECONDS = 5.0


class Places:
    """Which devices upload, and when each was last heard of."""

    def __init__(self, places: int = PLACES, wait_seconds: float = WAIT_SECONDS) -> None:
        self._places = places
        self._wait_seconds = wait_seconds
        self._held: dict[str, float] = {}
        self._queue: deque[tuple[str, asyncio.Future[None]]] = deque()

    async def enter(self, device: str) -> None:
        """Wait for a place; a device has at most one.

        Raises:
            ProtocolError: overloaded: there was none in time.
        """
        if device in self._held or (not self._queue and self._has_room()):
            self._held[device] = time.monotonic()
            return
        end = time.monotonic() + self._wait_seconds
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((device, turn))
        try:
            while not turn.done():
                left = end - time.monotonic()
                if left <= 0:
                    raise ProtocolError(
                        "overloaded", "many devices upload at once. Come back later."
                    )
                await asyncio.wait((turn,), timeout=min(left, _LOOK_SECONDS))
                self._let_in()  # whoever had a place may be gone
        finally:
            if not turn.done():
                self._queue.remove((device, turn))

    def hear(self, device: str) -> None:
        """A device goes on sending."""
        if device in self._held:
            self._held[device] = time.monotonic()

    def leave(self, device: str) -> None:
        """A device is done, one way or the other."""
        self._held.pop(device, None)
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self._has_room():
            device, turn = self._queue.popleft()
            self._held[device] = time.monotonic()
            turn.set_result(None)

    def _has_room(self) -> bool:
        if len(self._held) >= self._places:
            oldest = time.monotonic() - IDLE_SECONDS
            self._held = {device: at for device, at in self._held.items() if at > oldest}
        return len(self._held) < self._places
