"""The servers' common time, which no jump of a wall clock moves.

A process takes the wall clock once, when it starts, and counts on with the monotonic clock. While
it runs, deadlines hold in elapsed time, whatever happens to the wall clock. In the database they
are absolute. Every beat of the leader writes its time there. The other processes set theirs by it,
and one that starts never starts behind it. So time is common.

A clock may have been wrong at a start. So a new leader takes the wall clock of its machine, and so
does a leader whose wall clock has shown another time for ten minutes. Times that were written ahead
are brought back (`coordinator`). No deadline is further away than when it was set. No invitation is
valid for longer than it was to be.

A long outage looks like a wall clock that jumped ahead between two runs of the only process. In
both, deadlines passed without a server. A round is then given some more time instead of being
abandoned (`state_machine.rearm`).
"""

from __future__ import annotations

import time
from typing import Protocol

EARLIEST_MS = 1_672_531_200_000
"""The year 2023. A machine whose clock shows less has none, and is not followed."""
_OFF_MS, _OFF_FOR_MS = 60_000, 600_000


class TimeSource(Protocol):
    """The source of time, which a test replaces."""

    def wall_ms(self) -> int:
        """Returns milliseconds since 1970 by the machine's clock; may jump."""
        ...

    def elapsed_ms(self) -> int:
        """Returns milliseconds since some moment; never jumps."""
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
        """Returns the common time in milliseconds."""
        return self._offset + self.clock.elapsed_ms()

    def set(self, now_ms: int) -> None:
        """Sets the time by the leader's."""
        self._offset = now_ms - self.clock.elapsed_ms()

    def follow_wall(self) -> None:
        """Takes the time from the wall clock again, if the machine has one."""
        if self.clock.wall_ms() >= EARLIEST_MS:
            self.set(self.clock.wall_ms())

    def is_off(self) -> bool:
        """Returns whether the wall clock has long shown another time; to be called now and then."""
        wall, elapsed = self.clock.wall_ms(), self.clock.elapsed_ms()
        if wall < EARLIEST_MS or abs(wall - self.now()) < _OFF_MS:
            self._off_since = None
        elif self._off_since is None:
            self._off_since = elapsed
        return self._off_since is not None and elapsed - self._off_since >= _OFF_FOR_MS
