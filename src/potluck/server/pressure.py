"""How long those wait who are refused for want of room: the longer, the more of them come.

Refusing costs about half of answering. If everybody came back after the same two seconds, ten times
too many devices would cost a third of what can be answered; so the time grows until what is refused
in a second is a small part of it. It falls again by itself. Each is told its own time, around that
one: who was refused together must not come again together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

LEAST_SECONDS = 2.0
MOST_SECONDS = 60.0
REFUSALS = 200
"""In a second, that the time is set for: one for ten that one core answers."""
_LOOK_SECONDS = 1.0


class Pressure:
    """Counts refusals, and sets the time by them. Belongs to one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        part: Callable[[], float] = random.random,
    ) -> None:
        """`clock` in seconds; `part` draws from [0, 1)."""
        self._clock, self._part = clock, part
        self._since = clock()
        self._count = 0
        self._seconds = LEAST_SECONDS

    def refuse(self) -> float:
        """One more is refused. Returns the seconds after which it may come again."""
        self._count += 1
        passed = self._clock() - self._since
        if passed >= _LOOK_SECONDS:
            change = min(max(self._count / passed / REFUSALS, 0.5), 2.0)
            self._seconds = min(max(self._seconds * change, LEAST_SECONDS), MOST_SECONDS)
            self._since, self._count = self._clock(), 0
        return self._seconds * (0.5 + self._part())
