"""The servers' common time, which no jump of a wall clock moves.

A process takes the wall clock once, when it starts, and counts on with the monotonic clock: while
it lives, deadlines hold in elapsed time, whatever happens to the wall clock. In the database they
are absolute. Every beat of the leader writes its time there; the other processes set theirs by it,
and one that starts never starts behind it. So time is common.

A clock may have been wrong at a start. So who takes the lead takes the wall clock of its machine,
and so does a leader whose wall clock has shown another time for ten minutes. What was written
ahead of that time is brought back (`lead`): no deadline is further away than when it was set, and
no invitation is valid for longer than it was to be.

What cannot be told apart is a long outage and a wall clock that jumped ahead between two lives of
the only process. Both look like deadlines that passed while nobody served; a round is then given
some more time instead of being abandoned (`rounds.rearm`).
"""

from __future__ import annotations

import time
from typing import Protocol

EARLIEST_MS = 1_672_531_200_000
"""The year 2023. A machine whose clock shows less has none, and is not followed."""
_OFF_MS, _OFF_FOR_MS = 60_000, 600_000


class TimeSource(Protocol):
    """Where time comes from: a test brings its own."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970, as the machine believes; may jump."""
        ...

    def elapsed_ms(self) -> int:
        """Milliseconds since some moment; never jumps."""
        ...


class SystemTimeSource:
    """The clocks of the machine."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def elapsed_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class CommonTime:
    """One process's reading of the common time."""

    def __init__(self, clock: TimeSource) -> None:
        self.clock = clock
        self._offset = clock.wall_ms() - clock.elapsed_ms()
        self._off_since: int | None = None

    def now(self) -> int:
        """The common time in milliseconds."""
        return self._offset + self.clock.elapsed_ms()

    def set(self, now_ms: int) -> None:
        """Agree with the leader."""
        self._offset = now_ms - self.clock.elapsed_ms()

    def follow_wall(self) -> None:
        """Take the time from the wall clock again, if the machine has one."""
        if self.clock.wall_ms() >= EARLIEST_MS:
            self.set(self.clock.wall_ms())

    def is_off(self) -> bool:
        """Whether the wall clock has shown another time for long; to be asked now and then."""
        wall, elapsed = self.clock.wall_ms(), self.clock.elapsed_ms()
        if wall < EARLIEST_MS or abs(wall - self.now()) < _OFF_MS:
            self._off_since = None
        elif self._off_since is None:
            self._off_since = elapsed
        return self._off_since is not None and elapsed - self._off_since >= _OFF_FOR_MS
