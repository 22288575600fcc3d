"""Compares the tables with the audit log: enrolled devices, revoked devices, released models.

The log is a chain of hashes and the tables are not. A device that is added, given another key or
readmitted by hand leaves a table that differs from the log. So does a model that is replaced by
hand, or a log whose end was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, select

from potluck.core.errors import LostError
from potluck.protocol import fingerprint
from potluck.server.storage.audit import Break, verify
from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import audit, devices, ledger, models, runs, tokens
from potluck.server.storage.vectors import read_vector, read_whole

_RELEASES = ("create", "commit", "fall back")
"""Actions that make a model the newest one."""


class _Log(NamedTuple):
    """The expected content of the tables by the log, with the number of the row for each."""

    enrolled: dict[str, tuple[int, tuple[str, int]]]
    revoked: dict[str, tuple[int, int]]
    tokens: set[str]
    commits: dict[tuple[Any, ...], int]
    models: dict[tuple[str, int], tuple[int, str]]
    newest: dict[str, tuple[int, int]]


def check(context: Context, since: str | None = None) -> Break | None:
    """Returns the first fault of the log from the hash `since` on, or difference to the tables.

    The newest models are compared, too. None: nothing was changed.
    """
    with context.database.snapshot() as db:
        broken = verify(db, since)
        if broken is not None:
            return broken
        log = _read(db)
        found = chain(_devices(db, log), _tokens(db, log), _ledger(db, log), _models(db, log))
        broken = next(found, None)
        query = select(models).join(runs, runs.c.id == models.c.run)
        newest = db.execute(query.where(models.c.version == runs.c.version)).all()
    return broken or next((b for row in newest if (b := _content(context.blobs, row))), None)


def _read(db: Connection) -> _Log:
    log = _Log({}, {}, set(), {}, {}, {})
    wanted = ("enrol", "revoke", "token", *_RELEASES)
    rows = select(audit).where(audit.c.action.in_(wanted)).order_by(audit.c.number)
    for row in db.execute(rows):
        told: dict[str, Any] = json.loads(row.detail)
        match row.action:
            case "enrol":
                id = row.actor.removeprefix("device ")
                log.enrolled[id] = row.number, (told["run"], told["client"])
            case "revoke":
                log.revoked[told["device"]] = row.number, row.time_ms
            case "token":
                log.tokens.add(told["token"])
            case _:
                version = told.get("version", 0)
                log.models[told["run"], version] = row.number, told["model"]
                if told.get("kind") != "evaluate":
                    log.newest[told["run"]] = row.number, version
                if row.action == "commit":
                    names = ("run", "kind", "number", "version", "model", "accepted")
                    log.commits[tuple(told[name] for name in names)] = row.number
    return log


def _devices(db: Connection, log: _Log) -> Iterator[Break]:
    missing = dict(log.enrolled)
    c = devices.c
    for row in db.execute(select(c.id, c.run, c.client, c.public_key, c.revoked_ms)):
        number, place = missing.pop(row.id, (0, None))
        revoked, time_ms = log.revoked.get(row.id, (number, None))
        if place is None:
            yield Break(0, f"device {row.id} is in the table, and nobody let it in")
        elif place != (row.run, row.client):
            yield Break(number, f"device {row.id} is client {row.client} of run {row.run} now")
        elif len(row.public_key) != 32 or fingerprint(bytes(row.public_key)) != row.id:
            yield Break(number, f"device {row.id} has another key now")
        elif row.revoked_ms is None and time_ms is not None:
            yield Break(revoked, f"device {row.id} takes part again, which was revoked")
        elif row.revoked_ms != time_ms:
            yield Break(revoked, f"device {row.id} was revoked at another time, or by nobody")
    for id, (number, _) in missing.items():
        yield Break(number, f"device {id} is not in the table any more")


def _tokens(db: Connection, log: _Log) -> Iterator[Break]:
    for hash in db.scalars(select(tokens.c.hash)):
        if hash[:16] not in log.tokens:
            yield Break(0, f"a token with hash {hash[:16]}… is in the table, and nobody issued it")


def _ledger(db: Connection, log: _Log) -> Iterator[Break]:
    missing, c = dict(log.commits), ledger.c
    names = (c.run, c.kind, c.number, c.version, c.model_sha256, c.accepted_sha256)
    for row in db.execute(select(*names).order_by(c.committed_ms)):
        if missing.pop(tuple(row), None) is None:
            yield Break(0, f"round {row.number} stands otherwise in the ledger, or nobody made it")
    for (_, _, round, *_), number in missing.items():
        yield Break(number, f"round {round} is not in the ledger as it was committed")


def _models(db: Connection, log: _Log) -> Iterator[Break]:
    c = models.c
    for row in db.execute(select(c.run, c.version, c.sha256)):
        number, sha256 = log.models.get((row.run, row.version), (0, None))
        if row.sha256 != sha256:
            yield Break(number, f"the model of version {row.version} is another one, or nobody's")
    for run, version in db.execute(select(runs.c.id, runs.c.version)):
        number, newest = log.newest.get(run, (0, None))
        if version != newest:
            yield Break(number, f"the newest model is of version {version} now, not {newest}")


def _content(blobs: BlobStore, model: Row[Any]) -> Break | None:
    try:
        read_whole(lambda: read_vector(blobs, model), model.sha256)
    except LostError:
        return Break(0, f"the newest model, of version {model.version}, is lost or was changed")
    return None
