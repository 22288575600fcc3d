"""The servers' common time, which no jump of a wall clock moves.

A process takes the wall clock once, when it starts, and counts on with the monotonic clock: while
it lives, deadlines hold in elapsed time, whatever happens to the wall clock. In the database they
are absolute. Every beat of the leader writes its time there; the other processes set theirs by it,
and one that starts never starts behind it. So time is common, and never goes back.

What cannot be told apart is a long outage and a wall clock that jumped ahead between two lives of
the only process. Both look like deadlines that passed while nobody served; a round is then given
some more time instead of being abandoned (`rounds.rearm`).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from: a test brings its own."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970, as the machine believes; may jump."""
        ...

    def elapsed_ms(self) -> int:
        """Milliseconds since some moment; never jumps."""
        ...


class SystemClock:
    """The clocks of the machine."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def elapsed_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class CommonTime:
    """One process's reading of the common time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._offset = clock.wall_ms() - clock.elapsed_ms()

    def now(self) -> int:
        """The common time in milliseconds."""
        return self._offset + self.clock.elapsed_ms()

    def set(self, now_ms: int) -> None:
        """Agree with the leader."""
        self._offset = now_ms - self.clock.elapsed_ms()
