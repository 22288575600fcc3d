"""Changes of the dashboard as server-sent events, for all its viewers.

A process reads the database at most once in `POLL_SECONDS`, however many viewers it has, and never
without one. A stream holds no thread. It ends after `STREAM_SECONDS`, when the browser connects
again and shows its session anew. It ends earlier when the session is over, and at once when the
server stops.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import NamedTuple

from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from potluck.core import StorageError
from potluck.server.http.notifier import Notifier

POLL_SECONDS = 1.0
STREAM_SECONDS = 120.0


class Snapshot(NamedTuple):
    """The content of the dashboard at one time."""

    id: str
    """Its digest: the same for the same content, in every process."""
    sections: Mapping[str, str]
    """Name to HTML."""


class SnapshotFeed:
    """The newest snapshot, shared by all viewers of a process. Belongs to one event loop."""

    def __init__(self, read: Callable[[], Snapshot], notifier: Notifier) -> None:
        """`read` reads the database and is called in a thread, one call at a time."""
        self._read = read
        self._notifier = notifier
        self._lock = asyncio.Lock()
        self._read_at = -math.inf
        self._snapshot: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        """Returns the content of the dashboard, at most `POLL_SECONDS` old."""
        async with self._lock:
            if self._snapshot is None or time.monotonic() - self._read_at >= POLL_SECONDS:
                self._snapshot = await run_in_threadpool(self._read)
                self._read_at = time.monotonic()
            return self._snapshot

    async def events(
        self, seen: str, may_see: Callable[[], bool] = lambda: True
    ) -> AsyncGenerator[ServerSentEvent]:
        """Yields the sections that changed since the snapshot `seen`, as they change.

        It ends when the viewer may not see them any more, by `may_see` of the latest read.
        """
        sent: Mapping[str, str] = {}
        end = time.monotonic() + STREAM_SECONDS
        yield ServerSentEvent(retry=1000)
        while not self._notifier.closed and time.monotonic() < end:
            try:
                snapshot = await self.snapshot()
            except StorageError:  # the database is away: what was shown stays
                await self._pause()
                continue
            if not may_see():
                return
            if snapshot.id != seen:
                for name, section in snapshot.sections.items():
                    if sent.get(name) != section:
                        yield ServerSentEvent(section, event=name)
                yield ServerSentEvent(snapshot.id, event="seen", id=snapshot.id)
                seen = snapshot.id
            sent = snapshot.sections
            await self._pause()

    async def _pause(self) -> None:
        """Waits until it is time to read again; notifications come oftener than that."""
        end = time.monotonic() + POLL_SECONDS
        while not self._notifier.closed and (left := end - time.monotonic()) > 0:
            await self._notifier.wait(left)
