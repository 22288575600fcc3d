"""Who is worked on, who waits for it, and who is refused.

Under more load than can be borne most requests wait, so waiting must cost next to nothing: the
line is one queue with one timer, since who came first is also whose patience ends first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque

from starlette.types import Scope

from potluck.core import ProtocolError
from potluck.server.http.listening import prove

DEVICE_REQUESTS = 6
"""Of one device at once. It should have one; what broke off may not have been noticed yet."""


class Slots:
    """Requests that are worked on at once, and those that wait for a slot; the rest is refused.

        async with slots:  # raises ProtocolError, overloaded
            …

    Whoever came first is first served. Belongs to one event loop.
    """

    def __init__(self, slots: int, waiting: int, seconds: float) -> None:
        """`waiting` requests may wait, each for `seconds`."""
        self._free = slots
        self._may_wait = waiting
        self._seconds = seconds
        self._line: deque[tuple[float, asyncio.Future[None]]] = deque()  # until when
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        if len(self._line) >= self._may_wait:
            raise _overloaded()
        loop = asyncio.get_running_loop()
        until, turn = loop.time() + self._seconds, loop.create_future()
        self._line.append((until, turn))
        if self._timer is None:
            self._timer = loop.call_at(until, self._lose_patience)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # it was passed over
                    self._line.remove((until, turn))
            elif turn.exception() is None:  # it was given a slot, and is gone
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        """Give the slot to who waits longest."""
        while self._line:
            _, turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _lose_patience(self) -> None:
        """Refuse those whose time is over: they are at the head of the line."""
        loop, self._timer = asyncio.get_running_loop(), None
        while self._line:
            until, turn = self._line[0]
            if until > loop.time():
                self._timer = loop.call_at(until, self._lose_patience)
                return
            self._line.popleft()
            if not turn.done():
                turn.set_exception(_overloaded())


class Shares:
    """How many requests each device has under way: none can take all slots, or all polls."""

    def __init__(self, limit: int = DEVICE_REQUESTS) -> None:
        self._limit = limit
        self._count: Counter[str] = Counter()

    def enter(self, scope: Scope, device: str) -> None:
        """One more, which is noted in the request's scope.

        Raises:
            ProtocolError: overloaded.
        """
        if self._count[device] >= self._limit:
            raise ProtocolError(
                "overloaded",
                f"a device has at most {self._limit} requests under way, got one more. "
                "Wait for the answers.",
            )
        self._count[device] += 1
        scope["device"] = device
        prove(scope, device)

    def leave(self, scope: Scope) -> None:
        """The request of this scope is over, however it ended; it may have been nobody's."""
        device = scope.get("device")
        if device is not None:
            self._count[device] -= 1
            if not self._count[device]:
                del self._count[device]


def _overloaded() -> ProtocolError:
    return ProtocolError("overloaded", "there are too many requests at once. Come back later.")
