"""The enrolment and revocation of devices: single-use tokens, keys, sequence numbers.

A token is 32 random bytes, shown once; the database keeps its SHA-256. Using it is one UPDATE that
finds it unused, so of any number of concurrent uses exactly one wins. The winner may repeat its
request, with the same key, and gets the same answer: its first answer may have been lost.

A device's id is the first 16 bytes of the SHA-256 of its public key, in hexadecimal: nobody can
choose another device's. Its `client` index is the order of enrolment.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from potluck.core import RefusedError
from potluck.protocol import fingerprint
from potluck.server.rounds import leaving
from potluck.server.storage import audit, fault_points
from potluck.server.storage.context import Context
from potluck.server.storage.database import one
from potluck.server.storage.database_tables import devices, runs, tokens
from potluck.server.storage.stored_run import run_of


def new_id() -> str:
    """Returns a random id."""
    return secrets.token_hex(16)


def issue_tokens(
    context: Context, run: str, count: int = 1, *, valid_seconds: float = 7 * 86400, actor: str
) -> list[str]:
    """Makes tokens, all in one transaction; each one lets one device enrol.

    They cannot be read again.
    """
    made = [secrets.token_urlsafe(32) for _ in range(count)]
    now = context.now()
    expires = now + round(valid_seconds * 1000)
    with context.database.write() as db:
        run_of(db, run)
        rows = [
            {"hash": _hash(token), "run": run, "expires_ms": expires, "created_ms": now}
            for token in made
        ]
        db.execute(insert(tokens), rows)
        for token in made:
            audit.append(db, now, actor, "token", run=run, token=_hash(token)[:16])
    return made


def enrol(
    context: Context,
    token: str,
    public_key: bytes,
    *,
    name: str = "",
    device_class: str = "",
    into: str | None = None,
) -> Row[Any]:
    """Uses a token and enrols a device. Returns its row.

    Args:
        into: the run that the device asks to be in; a token for another one is left as it is.

    Raises:
        RefusedError: token: unknown, used by another, expired or of another run; conflict: the key
            is known.
    """
    id, now = fingerprint(public_key), context.now()
    with context.database.write() as db:
        right = (tokens.c.hash == _hash(token)) & (tokens.c.run == (into or tokens.c.run))
        unused = right & tokens.c.device.is_(None)
        claim = update(tokens).where(unused & (tokens.c.expires_ms > now)).values(device=id)
        won = db.execute(claim).rowcount == 1
        used = one(db, select(tokens).where(right))
        if used is None or used.device != id:
            raise _not_usable()
        if won:
            _insert(db, used.run, id, public_key, now, name, device_class)
        enrolled = db.execute(select(devices).where(devices.c.id == id)).one()
        if enrolled.revoked_ms is not None:
            raise revoked()
        fault_points.reach("enrol.inside")
    fault_points.reach("enrol.after")
    return enrolled


def check_token(context: Context, token: str, public_key: bytes, *, into: str) -> None:
    """Refuses a token that this key could not enrol in a run with; it is left as it is.

    Raises:
        RefusedError: token; unknown: the device that used it was revoked.
    """
    id = fingerprint(public_key)
    unused = tokens.c.device.is_(None) & (tokens.c.expires_ms > context.now())
    usable = (tokens.c.hash == _hash(token)) & (tokens.c.run == into)
    found = select(tokens.c.hash).where(usable & (unused | (tokens.c.device == id)))
    gone = select(devices.c.id).where(devices.c.id == id, devices.c.revoked_ms.is_not(None))
    with context.database.read() as db:
        if one(db, found) is None:
            raise _not_usable()
        if one(db, gone) is not None:
            raise revoked()


def find_key(context: Context, device: str) -> Row[Any] | None:
    """Returns the row of a device that may take part: its key, sequence number and run."""
    query = select(devices).where(devices.c.id == device, devices.c.revoked_ms.is_(None))
    with context.database.read() as db:
        return one(db, query)


def revoke(context: Context, device: str, *, actor: str) -> None:
    """Revokes a device for good; its earlier reports stay."""
    now = context.now()
    with context.database.write() as db:
        there = (devices.c.id == device) & devices.c.revoked_ms.is_(None)
        if db.execute(update(devices).where(there).values(revoked_ms=now)).rowcount == 0:
            if one(db, select(devices.c.id).where(devices.c.id == device)) is None:
                raise RefusedError(
                    "not_found", f"no such device: {device!r}. `potluck devices` lists them."
                )
            return
        leaving.revoked(db, device, now)
        audit.append(db, now, actor, "revoke", device=device)


def claim_sequences(
    context: Context, claims: Sequence[tuple[str, int]]
) -> list[RefusedError | None]:
    """Notes many (device, sequence number) in one transaction.

    Returns for each one None, or the refusal: unknown (revoked, or never enrolled), replayed.
    """
    with context.database.write() as db:
        return note_sequences(db, claims, context.now())


def note_sequences(
    db: Connection, claims: Sequence[tuple[str, int]], now: int
) -> list[RefusedError | None]:
    """Notes sequence numbers in a transaction.

    On PostgreSQL the rows are locked from then on.
    """
    answers: list[RefusedError | None] = []
    new: dict[str, int] = {}
    names = sorted({device for device, _ in claims})
    last = {row.id: row.sequence for row in db.execute(_LAST, {"names": names})}
    for device, sequence in claims:
        if device not in last:
            told = f"the device must be enrolled, got device={device}. Enrol again."
            answers.append(RefusedError("unknown", told))
        elif sequence <= last[device]:
            told = "Potluck-Sequence must be above that of every earlier request, got "
            told += f"sequence={sequence}. Count on from the last one and sign again."
            answers.append(RefusedError("replayed", told))
        else:
            last[device] = new[device] = sequence
            answers.append(None)
    if new:
        values = [{"device": d, "number": n, "now": now} for d, n in new.items()]
        db.execute(_NOTE, values)
    return answers


# Not FOR UPDATE: the insert of an assignment, with the round locked, needs the device's key.
_LAST = (
    select(devices.c.id, devices.c.sequence)
    .where(
        devices.c.id.in_(bindparam("names", expanding=True)),
        devices.c.revoked_ms.is_(None),
    )
    .order_by(devices.c.id)
    .with_for_update(key_share=True)
)
_NOTE = (
    update(devices)
    .where(devices.c.id == bindparam("device"))
    .values(sequence=bindparam("number"), seen_ms=bindparam("now"))
)


def unknown_device(device: str) -> RefusedError:
    """Returns the refusal of a device that is not enrolled."""
    return RefusedError("not_found", f"a device must be enrolled, got device={device!r}. Enrol.")


def revoked() -> RefusedError:
    """Returns the refusal of a device that was revoked."""
    return RefusedError("unknown", "this device was revoked. Ask whoever runs the server.")


def _not_usable() -> RefusedError:
    return RefusedError(
        "token",
        "the token of the invitation must be unused, not expired and of this run, got another. Ask "
        "whoever runs the server for a new invitation (`potluck enroll`).",
    )


def _insert(
    db: Connection,
    run: str,
    id: str,
    public_key: bytes,
    now: int,
    name: str,
    device_class: str,
) -> None:
    db.execute(select(runs.c.id).where(runs.c.id == run).with_for_update())  # one after another
    if one(db, select(devices.c.id).where(devices.c.id == id)) is not None:
        raise RefusedError("conflict", "this key is enrolled already. Make another one.")
    count = db.scalar(select(func.count()).where(devices.c.run == run)) or 0
    values = {
        "id": id,
        "run": run,
        "client": count,
        "public_key": public_key,
        "name": name[:200],
        "device_class": device_class[:200],
        "sequence": 0,
        "enrolled_ms": now,
        "seen_ms": now,
    }
    db.execute(insert(devices).values(values))
    audit.append(db, now, f"device {id}", "enrol", run=run, client=count)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
