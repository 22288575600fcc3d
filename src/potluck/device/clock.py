"""A device's clock, and waits that a stop ends at once."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol


class Stopped(BaseException):
    """The device is to stop now. Not an `Exception`, so that no handler takes it for failed
    work."""


class Clock(Protocol):
    """The source of a device's time, and of its waits."""

    def now_ms(self) -> int:
        """Returns Unix time in milliseconds by this machine's clock."""
        ...

    def monotonic(self) -> float:
        """Returns seconds that never jump."""
        ...

    def wait(self, seconds: float) -> None:
        """Waits; 0 only checks for a stop.

        Raises:
            Stopped: now, or as soon as it is asked for.
        """
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Does the work in the block to its end, also if a stop is requested."""
        ...


class SystemClock:
    """The machine's clock. `stop` may be called from a signal handler or another thread."""

    def __init__(self) -> None:
        self._stop: SimpleQueue[None] = SimpleQueue()  # a signal handler may always put into it
        self._held = False

    def now_ms(self) -> int:
        """Returns Unix time in milliseconds by this machine's clock."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Returns seconds that never jump."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Waits; see `Clock`."""
        try:
            self._stop.get(seconds > 0, max(seconds, 0.0))
        except Empty:
            return
        self.stop()  # for the waits to come
        raise Stopped

    @contextmanager
    def hold(self) -> Generator[None]:
        """Puts `interrupt` off until the block is done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def stop(self) -> None:
        """Ends every wait, the present one and those to come."""
        self._stop.put(None)

    def interrupt(self) -> None:
        """Stops from a signal handler, wherever the program is, unless it is in `hold`."""
        self.stop()
        if not self._held:
            raise Stopped
