"""The sign-in of an operator's browser: a key that works once, then a session.

    key       32 random bytes in a link, printed by `potluck dashboard`; valid for an hour, until
              the next one is made or it is used, which the first sign-in does
    session   32 other random bytes in a cookie, valid for a week, or until it is signed out

The database keeps the SHA-256 of both, so every process of a run can check them. Using a key is one
DELETE that finds it, so of concurrent uses exactly one wins.

A right key is accepted after any number of wrong ones. They may have come through the same proxy,
and nobody guesses 256 bits.

Guarantee: a reader of the database cannot sign in. A secret is looked up by its hash and never
compared with a stored one, so the time of an answer tells nothing about any secret.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection

from sqlalchemy import ColumnElement, and_, delete, insert, select

from potluck.server.storage import audit
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import sign_ins

KEY_SECONDS = 3_600
SESSION_SECONDS = 7 * 86_400

_FORM = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_ADDRESSES = 10_000


def issue_key(database: Database, run: str, now: int, *, actor: str) -> str:
    """Makes a key for one sign-in. It is the only one from now on; expired ones are deleted."""
    key = secrets.token_urlsafe(32)
    older = (sign_ins.c.run == run) & (sign_ins.c.kind == "key")
    with database.write() as db:
        db.execute(delete(sign_ins).where(older | (sign_ins.c.expires_ms <= now)))
        db.execute(insert(sign_ins).values(_row(key, run, "key", now, KEY_SECONDS)))
        audit.append(db, now, actor, "dashboard key", run=run)
    return key


def sign_in(database: Database, run: str, key: str, now: int) -> str | None:
    """Returns a session for a key, which is used up; None: the key is unknown, used or expired."""
    if not _found(database, run, "key", [key], now):  # many wrong ones take no turn to write
        return None
    session = secrets.token_urlsafe(32)
    with database.write() as db:
        if db.execute(delete(sign_ins).where(_valid(key, run, "key", now))).rowcount != 1:
            return None
        db.execute(insert(sign_ins).values(_row(session, run, "session", now, SESSION_SECONDS)))
        audit.append(db, now, "dashboard", "sign in", run=run)
    return session


def is_session(database: Database, run: str, session: str, now: int) -> bool:
    """Returns whether a cookie is a session of this run."""
    return bool(sessions_of(database, run, [session], now))


def sessions_of(database: Database, run: str, cookies: Collection[str], now: int) -> set[str]:
    """Returns those of the cookies that are sessions of this run, and not signed out."""
    return _found(database, run, "session", cookies, now)


def sign_out(database: Database, run: str, session: str, now: int) -> None:
    """Ends a session."""
    if _FORM.fullmatch(session) is None:
        return
    with database.write() as db:
        db.execute(delete(sign_ins).where(_valid(session, run, "session", now)))


class Throttle:
    """Wrong keys of one address: `tries` at once, and one more every `seconds`."""

    def __init__(self, now: Callable[[], float], *, tries: int = 5, seconds: float = 12.0) -> None:
        self._now, self._tries, self._seconds = now, tries, seconds
        self._full: dict[str, float] = {}  # when the address has all its tries again

    def left(self, address: str) -> bool:
        """Returns whether the address may try now."""
        behind = self._full.get(address, 0.0) - self._now()
        return behind <= (self._tries - 1) * self._seconds

    def wrong(self, address: str) -> None:
        """Notes a wrong key."""
        now = self._now()
        self._full[address] = max(self._full.pop(address, now), now) + self._seconds
        if len(self._full) > _MAX_ADDRESSES:  # the one that was wrong longest ago
            del self._full[next(iter(self._full))]


def _found(database: Database, run: str, kind: str, secrets: Collection[str], now: int) -> set[str]:
    hashes = {_hash(secret): secret for secret in secrets if _FORM.fullmatch(secret)}
    if not hashes:
        return set()
    c = sign_ins.c
    valid = and_(c.hash.in_(hashes), c.run == run, c.kind == kind, c.expires_ms > now)
    with database.read() as db:
        return {hashes[hash] for hash in db.scalars(select(c.hash).where(valid))}


def _valid(secret: str, run: str, kind: str, now: int) -> ColumnElement[bool]:
    c = sign_ins.c
    return and_(c.hash == _hash(secret), c.run == run, c.kind == kind, c.expires_ms > now)


def _row(secret: str, run: str, kind: str, now: int, seconds: int) -> dict[str, str | int]:
    times = {"created_ms": now, "expires_ms": now + seconds * 1000}
    return {"hash": _hash(secret), "run": run, "kind": kind, **times}


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
