"""A device's time: what it is, by whose clock, and waiting that a stop ends at once."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol


class Stopped(BaseException):
    """The device is to stop now. Not an `Exception`: nothing may take it for a failure of work."""


class Clock(Protocol):
    """Where a device gets its time from, and how it waits."""

    def now_ms(self) -> int:
        """Unix time in milliseconds, as this machine counts it."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait; 0 only looks whether to stop.

        Raises:
            Stopped: now, or as soon as it is asked for.
        """
        ...

    def hold(self) -> AbstractContextManager[None]:
        """What is done inside is done to its end, whoever asks to stop."""
        ...


class SystemClock:
    """The machine's clock. `stop` may be called from a signal handler or another thread."""

    def __init__(self) -> None:
        self._stop: SimpleQueue[None] = SimpleQueue()  # a signal handler may put into it, always
        self._held = False

    def now_ms(self) -> int:
        """Unix time in milliseconds, as this machine counts it."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Wait; see `Clock`."""
        try:
            self._stop.get(seconds > 0, max(seconds, 0.0))
        except Empty:
            return
        self.stop()  # for the waits to come
        raise Stopped

    @contextmanager
    def hold(self) -> Generator[None]:
        """Put `interrupt` off until this is done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def stop(self) -> None:
        """End every wait, the present one and those to come."""
        self._stop.put(None)

    def interrupt(self) -> None:
        """Stop from a signal handler: wherever the program is, unless it holds."""
        self.stop()
        if not self._held:
            raise Stopped
