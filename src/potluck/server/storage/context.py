"""The context of every function of a server: its state, its clock, and its callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from sqlalchemy import Connection

from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.common_time import CommonTime
from potluck.server.storage.database import Database


@dataclass(kw_only=True, eq=False)
class Context:
    """One server process; any number of threads may use it."""

    database: Database
    blobs: BlobStore
    time: CommonTime
    now: Callable[[], int]
    """Milliseconds of the servers' common time."""
    check: Callable[[Connection], None]
    """Raises `FencedError` in a transaction of a process that does not lead any more."""
    on_goal: Callable[[], None] = lambda: None
    """Called, in any thread, when work for the leader is due."""
    on_open: Callable[[str], None] = lambda _: None
    """Called, in any thread, with the id of a round as soon as devices may come to it."""
    on_lost: Callable[[], None] = lambda: None
    """Called, in any thread, when something that was stored cannot be read any more."""
    suspects: set[str] = field(default_factory=set[str])
    """The runs whose newest model some device could not receive."""
    looked: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """Runs, and the occasions on which their model was read and found not to be lost."""
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _turns: WeakValueDictionary[str, threading.Lock] = field(
        default_factory=WeakValueDictionary[str, threading.Lock]
    )

    def suspect(self, run: str) -> None:
        """Makes the leader read the newest model of a run, which may be lost."""
        self.suspects.add(run)
        self.on_goal()

    def turn(self, upload: str) -> threading.Lock:
        """Returns the lock that completes an upload once, of any number of requests for it."""
        with self._guard:
            return self._turns.setdefault(upload, threading.Lock())
