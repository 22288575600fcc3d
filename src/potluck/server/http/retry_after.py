"""How long those wait who are refused for want of room: the longer, the more of them come.

Refusing costs about half of answering. If everybody came back after the same two seconds, ten times
too many devices would cost a third of what can be answered. So there are added as many seconds as
those who are away, which are those refused within the time that they are told, could be refused in.
A thousand too many cost little then, and ten thousand that a restart cut off are soon back. Each is
told its own time, around that one: who was refused together must not come again together.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

_CHANCE = random.SystemRandom()  # local training seeds the global generator

LEAST_SECONDS = 2.0
MOST_SECONDS = 60.0
REFUSALS = 600
"""In a second: fewer come, unless so many are away that the most is too short for them."""
_LOOK_SECONDS = 1.0


class Pressure:
    """Counts refusals, and sets the time by them. Belongs to one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        part: Callable[[], float] = _CHANCE.random,
    ) -> None:
        """`clock` in seconds; `part` draws from [0, 1)."""
        self._clock, self._part = clock, part
        self._since = clock()
        self._count = 0
        self._past: deque[tuple[float, int]] = deque()  # seconds of refusals: their end, how many
        self._seconds = LEAST_SECONDS

    def refuse(self) -> float:
        """One more is refused. Returns the seconds after which it may come again."""
        self._count += 1
        now = self._clock()
        if now - self._since >= _LOOK_SECONDS:
            self._past.append((now, self._count))
            self._since, self._count = now, 0
            while self._past[0][0] <= now - MOST_SECONDS:
                self._past.popleft()
            away = sum(count for at, count in self._past if at > now - self._seconds)
            self._seconds = min(LEAST_SECONDS + away / REFUSALS, MOST_SECONDS)
        return self._seconds * (0.5 + self._part())
