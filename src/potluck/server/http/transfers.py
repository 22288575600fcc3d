"""Large bodies in one direction: how many at once, and which are too slow to go on.

Each holds memory until it is complete, so their number is limited, and one that stands still must
not keep others waiting. A device has one at a time: a newer one ends the older, whose connection
may have broken unnoticed. All must move at the least rate. While others wait, the slowest of those
below the fair rate end first. Their devices send them again.

The rate of a transfer is a mean over about the last `_MEAN_SECONDS`. It starts at twice the fair
rate, so a pause of as long does not end it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from potluck.core import ProtocolError
from potluck.server.http.admission import Limiter

LEAST_RATE = 8_192.0
"""The least bytes a second of every body: a chunk of 1 MiB takes two minutes at most."""
FAIR_RATE = 16_384.0
"""The bytes a second from which on a body is never ended for others."""
_MEAN_SECONDS = 16.0
_CHECK_SECONDS = 1.0


class Transfer:
    """A body that the limiter has admitted."""

    num_bytes = 0
    """The bytes that were sent or received so far."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        """Of its request."""
        self.rate = 2.0 * FAIR_RATE
        self._seen = 0
        self._updated = asyncio.get_running_loop().time()
        self._timeout: asyncio.Timeout | None = None  # None: it is not moving

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncGenerator[None]:
        """Times the wait for the network in the block.

        Raises:
            ProtocolError: overloaded: the transfer was ended.
        """
        try:
            async with asyncio.timeout(None) as self._timeout:
                yield
        except TimeoutError:
            raise _ended() from None
        finally:
            self._timeout = None

    @property
    def is_moving(self) -> bool:
        return self._timeout is not None

    def end(self) -> None:
        """Makes `moving` raise, if it waits."""
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
            self._timeout = None

    def update(self) -> None:
        """Takes the bytes since the last update into the rate."""
        now = asyncio.get_running_loop().time()
        seconds = max(now - self._updated, 1e-3)
        share = min(seconds / _MEAN_SECONDS, 1.0)
        self.rate += share * ((self.num_bytes - self._seen) / seconds - self.rate)
        self.rate = min(self.rate, 2.0 * FAIR_RATE)
        self._seen, self._updated = self.num_bytes, now


class Transfers:
    """All bodies of one direction. Belongs to one event loop."""

    def __init__(self, limiter: Limiter) -> None:
        """`limiter` tells how many there are at once."""
        self._limiter = limiter
        self._under_way: dict[str, Transfer] = {}  # by device
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def of(self, device: str, sequence: int) -> AsyncGenerator[Transfer]:
        """Admits a body of this device, and ends its older one.

        Raises:
            ProtocolError: overloaded: there is none in time, or a newer one has it.
        """
        self._end_older(device, sequence)
        async with self._limiter:
            self._end_older(device, sequence)
            transfer = self._under_way[device] = Transfer(sequence)
            if self._timer is None:
                self._check_later()
            try:
                yield transfer
            finally:
                if self._under_way.get(device) is transfer:
                    del self._under_way[device]

    def _end_older(self, device: str, sequence: int) -> None:
        other = self._under_way.get(device)
        if other is None:
            return
        if other.sequence > sequence:
            raise _ended()
        del self._under_way[device]
        other.end()

    def _check_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._check)

    def _check(self) -> None:
        """Ends the bodies below the least rate, and slow ones that others wait for."""
        self._timer = None
        moving = [transfer for transfer in self._under_way.values() if transfer.is_moving]
        for transfer in moving:
            transfer.update()
        moving.sort(key=lambda transfer: transfer.rate)
        for number, transfer in enumerate(moving):
            if transfer.rate < (FAIR_RATE if number < self._limiter.waiting else LEAST_RATE):
                transfer.end()
        if self._under_way:
            self._check_later()


def _ended() -> ProtocolError:
    return ProtocolError(
        "overloaded",
        f"a body must move at {LEAST_RATE:.0f} bytes a second, at {FAIR_RATE:.0f} while others "
        "wait, and be the only one of its device, got a slower or an older one. Try again.",
    )
