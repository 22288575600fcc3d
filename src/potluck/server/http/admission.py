"""Admission control: the limits on requests at once and on waiting ones, and when others may
retry."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable

from starlette.types import Scope

from potluck.core import ProtocolError
from potluck.server.http.listening import prove

DEVICE_REQUESTS = 6
"""Of one device at once. It should have one; what broke off may not have been noticed yet."""
LEAST_SECONDS = 2.0
MOST_SECONDS = 60.0
REFUSALS = 600
"""In a second: fewer come, unless the most is too short for as many as are away."""
_UPDATE_SECONDS = 1.0
_CHANCE = random.SystemRandom()  # local training seeds the global generator


class Limiter:
    """At most `capacity` holders at once; others wait in the order of arrival, or are refused.

        async with limiter:  # raises ProtocolError, overloaded
            …
        await limiter.lease(device)  # the device is a holder until `end`, or until it is idle

    Belongs to one event loop.
    """

    waiting = 0
    """How many wait."""

    def __init__(
        self, capacity: int, *, waiting: int, seconds: float, idle_seconds: float = 0.0
    ) -> None:
        """`waiting` may wait, each for `seconds`; a lease ends after `idle_seconds` without use."""
        # A request that waits takes 13 µs and 1.8 KB, with anyio's CapacityLimiter 33 and 4.8; a
        # check-in of an overloaded server (X7) takes 600 µs in all.
        self._semaphore = asyncio.Semaphore(capacity)
        self._may_wait, self._seconds = waiting, seconds
        self._idle_seconds = idle_seconds
        self._leases: dict[str, asyncio.TimerHandle] = {}  # by device, what ends it

    async def __aenter__(self) -> None:
        if not self._semaphore.locked():
            await self._semaphore.acquire()
            return
        if self.waiting >= self._may_wait:
            raise _overloaded()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                await self._semaphore.acquire()
        except TimeoutError:
            raise _overloaded() from None
        finally:
            self.waiting -= 1

    async def __aexit__(self, *_: object) -> None:
        self._semaphore.release()

    async def lease(self, device: str) -> None:
        """Lets a device be one holder, however often it asks.

        Raises:
            ProtocolError: overloaded.
        """
        if device in self._leases:
            self.renew(device)
            return
        await self.__aenter__()
        self.end(device)  # another request of it waited too
        self._leases[device] = self._expiry(device)

    def renew(self, device: str) -> None:
        """Notes that the lease of a device, if it has one, is in use."""
        if device in self._leases:
            self._leases[device].cancel()
            self._leases[device] = self._expiry(device)

    def end(self, device: str) -> None:
        """Ends the lease of a device, if it has one."""
        if device in self._leases:
            self._leases.pop(device).cancel()
            self._semaphore.release()

    def _expiry(self, device: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._idle_seconds, self.end, device)


class DeviceRequests:
    """The requests of each device that are under way: none takes all of the limit, or all polls."""

    def __init__(self, limit: int = DEVICE_REQUESTS) -> None:
        self._limit = limit
        self._count: Counter[str] = Counter()

    def enter(self, scope: Scope, device: str) -> None:
        """Counts one more request, which is noted in its scope.

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
        """Counts the request of this scope no more, however it ended; it may have had no device."""
        device = scope.get("device")
        if device is not None:
            self._count[device] -= 1
            if not self._count[device]:
                del self._count[device]


class RetryAfter:
    """The delay for refused requests, which grows with the number of devices that are away.

    A refusal costs about half of an answer, so the delay is chosen such that at most `REFUSALS`
    come in a second. Each device gets its own time around it, so that those that were refused
    together do not come again together.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        part: Callable[[], float] = _CHANCE.random,
    ) -> None:
        """`clock` in seconds; `part` draws from [0, 1)."""
        self._clock, self._part = clock, part
        self._update = clock() + _UPDATE_SECONDS  # when to, again
        self._away: deque[float] = deque(maxlen=round((MOST_SECONDS - LEAST_SECONDS) * REFUSALS))
        self._seconds = LEAST_SECONDS

    def seconds(self) -> float:
        """Returns the delay for one more refused request."""
        now = self._clock()
        self._away.append(now)
        if now >= self._update:
            self._update = now + _UPDATE_SECONDS
            while self._away[0] <= now - self._seconds:
                self._away.popleft()
            self._seconds = LEAST_SECONDS + len(self._away) / REFUSALS
        return self._seconds * (0.5 + self._part())


def _overloaded() -> ProtocolError:
    return ProtocolError("overloaded", "there are too many requests at once. Come back later.")
