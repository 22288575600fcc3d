"""The election of a leader among the server processes: one row, a beat, and a fencing number.

The leader alone moves rounds from state to state. It beats at least every third of `LEASE_SECONDS`.
When another process has seen no new beat for that long, by its own monotonic clock, it takes over
with the next fencing number. Every transition checks, in its own transaction, that its number is
still the newest, so a leader that was suspended changes nothing. A process that replaces one that
has certainly ended (its `predecessor`) does not wait for that one's lease.
"""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from potluck.core import PotluckError
from potluck.server.storage import fault_points
from potluck.server.storage.common_time import CommonTime
from potluck.server.storage.database import Database, one
from potluck.server.storage.database_tables import leader

LEASE_SECONDS = 2.0


class FencedError(PotluckError):
    """Another process leads now. Never leaves the server: `Service.tick` returns False."""


class Candidate:
    """A process that takes part in the election."""

    def __init__(
        self,
        time: CommonTime,
        lease_seconds: float = LEASE_SECONDS,
        *,
        id: str | None = None,
        predecessor: str = "",
    ) -> None:
        self.id = id or secrets.token_hex(16)
        self._nobody = ("", predecessor)  # holders that do not lead any more
        self.fence: int = 0  # ours, while we lead
        self.taken = False  # whether the last `beat` took over, or the time was set
        self._time = time
        self._lease_ms = round(lease_seconds * 1000)
        self._seen: tuple[int, int] | None = None  # (fence, beat) of another leader
        self._seen_ms = 0  # when we first saw it
        self._beat_ms = 0  # our last one

    def beat(self, database: Database) -> bool:
        """Leads on, or takes over if there is no leader. Returns whether this process leads."""
        self.taken = False
        if self.fence and self._time.now() - self._beat_ms < self._lease_ms // 3:
            return True
        if self.fence == 0 and not self._is_vacant(database):
            return False
        try:
            with database.write() as db:
                self._hold(db)
        except (FencedError, IntegrityError):  # another one was faster
            self.fence = 0
            return False
        self._beat_ms = self._time.now()
        if self.taken:
            fault_points.reach("leader.taken")
        return True

    def check(self, db: Connection) -> None:
        """Refuses a transition of a leader that is none any more.

        On PostgreSQL the row stays locked until the transition is committed: no process takes over
        in the middle of it.
        """
        row = one(db, select(leader.c.holder, leader.c.fence).with_for_update(read=True))
        if row is None or (row.holder, row.fence) != (self.id, self.fence):
            raise FencedError("another process leads")

    def resign(self, database: Database) -> None:
        """Lets another process take over at once."""
        if self.fence:
            with database.write() as db:
                mine = (leader.c.holder == self.id) & (leader.c.fence == self.fence)
                db.execute(update(leader).where(mine).values(holder=""))
            self.fence = 0

    def _is_vacant(self, database: Database) -> bool:
        """Returns whether there is no leader, and otherwise sets the time by the leader's."""
        with database.read() as db:
            row = one(db, select(leader))
        if row is None or row.holder in self._nobody:
            return True
        if (row.fence, row.heartbeat_ms) != self._seen:
            first = self._seen is None
            self._seen, self._seen_ms = (row.fence, row.heartbeat_ms), self._time.now()
            if first and self._seen_ms - row.heartbeat_ms >= self._lease_ms:
                return True  # it ended before this process was started
            self._time.set(row.heartbeat_ms)
            self._seen_ms = row.heartbeat_ms
        return self._time.now() - self._seen_ms >= self._lease_ms

    def _hold(self, db: Connection) -> None:
        row = one(db, select(leader).with_for_update())
        if row is None:
            self.fence, self.taken = 1, True
            db.execute(
                insert(leader).values(id=1, holder=self.id, fence=1, heartbeat_ms=self._time.now())
            )
            return
        if row.holder != self.id or row.fence != self.fence:
            seen = (row.fence, row.heartbeat_ms) == self._seen
            if self.fence or not (seen or row.holder in self._nobody):
                raise FencedError("another process leads")
            self.fence, self.taken = row.fence + 1, True
        if self.taken or self._time.is_off():
            self._time.follow_wall()
            self.taken = True
        values = {"holder": self.id, "fence": self.fence, "heartbeat_ms": self._time.now()}
        db.execute(update(leader).values(values))


def follow(database: Database, time: CommonTime) -> None:
    """Starts at no time before the leader's last beat, until this process leads."""
    with database.read() as db:
        row = one(db, select(leader.c.heartbeat_ms))
    if row is not None and row.heartbeat_ms > time.now():
        time.set(row.heartbeat_ms)
