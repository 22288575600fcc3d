"""Server-sent events: what changed on the dashboard, to everybody who looks at it.

A process looks at the database at most once in `LOOK_SECONDS`, however many look at the process,
and while nobody does, never. A stream holds no thread. It ends after `STREAM_SECONDS`, when the
browser comes again and shows its session anew; with the look that finds the session over; and at
once when the server stops.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from potluck.core import StorageError
from potluck.server.http.notifier import Bell

LOOK_SECONDS = 1.0
STREAM_SECONDS = 120.0
_QUIET_SECONDS = 15.0


class Snapshot(NamedTuple):
    """What the dashboard shows at some time."""

    id: str
    """The same for the same content, in every process."""
    sections: Mapping[str, str]
    """Name to HTML."""


class Watch:
    """The newest snapshot, shared by all viewers of a process. Belongs to one event loop."""

    def __init__(self, look: Callable[[], Snapshot], bell: Bell) -> None:
        """`look` reads the database and is called in a thread, one call at a time."""
        self._look = look
        self._bell = bell
        self._lock = asyncio.Lock()
        self._looked = -math.inf
        self._snapshot: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        """What the dashboard shows, at most `LOOK_SECONDS` old."""
        async with self._lock:
            if self._snapshot is None or time.monotonic() - self._looked >= LOOK_SECONDS:
                self._snapshot = await run_in_threadpool(self._look)
                self._looked = time.monotonic()
            return self._snapshot

    async def events(
        self, seen: str, may_see: Callable[[], bool] = lambda: True
    ) -> AsyncGenerator[bytes]:
        """The sections that changed since the snapshot `seen`, as they change, as long as the
        viewer `may_see` them when they were looked for."""
        sent: Mapping[str, str] = {}
        end = time.monotonic() + STREAM_SECONDS
        spoke = time.monotonic()
        yield b"retry: 1000\n\n"
        while not self._bell.closed and time.monotonic() < end:
            try:
                snapshot = await self.snapshot()
            except StorageError:  # the database is away: what was shown stays
                await self._pause()
                continue
            if not may_see():
                return
            if snapshot.id != seen:
                news = {n: s for n, s in snapshot.sections.items() if sent.get(n) != s}
                yield b"".join(event(name, section) for name, section in news.items())
                yield event("seen", snapshot.id, snapshot.id)
                seen, spoke = snapshot.id, time.monotonic()
            elif time.monotonic() - spoke >= _QUIET_SECONDS:
                yield b": still here\n\n"
                spoke = time.monotonic()
            sent = snapshot.sections
            await self._pause()

    async def _pause(self) -> None:
        """Until it is time to look again; the bell rings oftener than that."""
        end = time.monotonic() + LOOK_SECONDS
        while not self._bell.closed and (left := end - time.monotonic()) > 0:
            await self._bell.next_ring(left)


def event(name: str, data: str, id: str = "") -> bytes:
    """One event, as the HTML standard writes it."""
    lines = [f"id: {id}"] * bool(id) + [f"event: {name}"]
    lines += [f"data: {line}" for line in data.splitlines() or [""]]
    return ("\n".join(lines) + "\n\n").encode()
