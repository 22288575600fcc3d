"""The audit log: appended to, never changed, and chained so that a change shows.

    hash_n = SHA-256(canonical JSON of [n, time, actor, action, detail, hash_{n−1}]),  hash_0 = 0…0

Guarantee: a row that was changed, removed or inserted without rewriting every later hash is found
by `verify`, which names the first row that does not fit. A rewrite of the whole table, or a cut
end, is found by a hash that was kept elsewhere. `head` gives it, and each signed manifest carries
it, so every device keeps one.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select

from potluck.core.plain_json import to_json
from potluck.server.storage.database import lock
from potluck.server.storage.database_tables import audit

_START = "0" * 64


class Break(NamedTuple):
    """The first row of the log that does not fit, and why."""

    number: int
    """0: there is no such row."""
    reason: str


def append(db: Connection, now: int, actor: str, action: str, **detail: Any) -> None:
    """Adds a row inside the transaction that does what the row says.

    Appending is the last thing that a transaction does: it holds the log's lock until the end.
    """
    lock(db)
    number, previous = head(db)
    text = _canonical(detail)
    row = (number + 1, now, actor, action, text, previous)
    values = dict(zip(audit.c.keys(), (*row, _hash(row)), strict=True))
    db.execute(insert(audit).values(values))


def head(db: Connection) -> tuple[int, str]:
    """Returns number and hash of the last row: keep it elsewhere to detect a log that was
    rewritten."""
    last = db.execute(
        select(audit.c.number, audit.c.hash).order_by(audit.c.number.desc()).limit(1)
    ).one_or_none()
    return (0, _START) if last is None else (last.number, last.hash)


def verify(db: Connection, since: str | None = None) -> Break | None:
    """Reads the whole log, and returns its first fault.

    None: every row fits the one before it, and one has the hash `since`, which was kept elsewhere.
    """
    previous, expected, is_found = _START, 1, since in (None, _START)
    for row in db.execute(select(audit).order_by(audit.c.number)):
        if row.number != expected:
            return Break(expected, f"row {expected} is missing: row {row.number} follows")
        if row.previous != previous:
            return Break(row.number, "does not follow the row before it")
        if row.hash != _hash(tuple(row)[:-1]):
            return Break(row.number, "was changed")
        previous, expected = row.hash, expected + 1
        is_found = is_found or row.hash == since
    if is_found:
        return None
    return Break(0, f"no row has the hash {since} any more: the end was cut off, or all rewritten")


def _hash(row: tuple[Any, ...]) -> str:
    return hashlib.sha256(_canonical(row).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return to_json(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
