"""An operator's actions on a round or a model that is of no more use."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, insert, select, update

from potluck.core import RefusedError
from potluck.core.errors import LostError
from potluck.server.rounds.commit import load_version
from potluck.server.rounds.state_machine import abandon_round, lock_run, open_round_of
from potluck.server.storage import audit
from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.context import Context
from potluck.server.storage.database import as_dict, one
from potluck.server.storage.database_tables import models, runs


def abandon(context: Context, run: str, reason: str, *, actor: str) -> None:
    """Ends the open attempt without a model; the same round is tried again.

    Raises:
        RefusedError: conflict: there is none.
    """
    with context.database.write() as db:
        current = lock_run(db, run)
        round = open_round_of(db, run, lock=True)
        if round is None:
            raise RefusedError("conflict", "a round must be open, got none. See `potluck status`.")
        abandon_round(db, current, round, reason, context.now(), actor=actor)


def fall_back(
    context: Context, run: str, version: int | None = None, *, actor: str
) -> tuple[int, int]:
    """Goes on with an older model: the newest that can be read, or this version.

    It becomes the newest version, since devices take no version below one that they saw. Rounds go
    on counting: what the lost model had learnt since is not learnt again.

    Returns:
        The version, and its new number.

    Raises:
        RefusedError: conflict: the newest can be read, and no version was named; not_found.
    """
    blobs, now = context.blobs, context.now()
    with context.database.read() as db:
        newest = db.execute(select(runs.c.version).where(runs.c.id == run)).scalar_one()
    if version is None and _is_whole(blobs, _version(context, run, newest)):
        raise RefusedError(
            "conflict",
            f"the newest model must be lost, got version {newest}, which can be read. "
            "To go on with an older one all the same, name it with --version.",
        )
    wanted = newest - 1 if version is None else version
    found = _version(context, run, wanted) if wanted < newest else None
    while found is None or not _is_whole(blobs, found):
        wanted -= 1
        if version is not None or wanted < 0:
            raise RefusedError(
                "not_found",
                f"the model must be one from 0 to {newest - 1} that can be read, "
                f"got version={version}. Restore it from a backup.",
            )
        found = _version(context, run, wanted)
    with context.database.write() as db:
        current = lock_run(db, run)
        if current.version != newest:
            told = f"the newest model must be version {newest}, got {current.version}. Try again."
            raise RefusedError("conflict", told)
        round = open_round_of(db, run, lock=True)
        if round is not None:
            why = f"the run falls back to the model of version {wanted}"
            abandon_round(db, current, round, why, now, actor=actor)
        place = {"version": newest + 1, "round": current.round, "created_ms": now}
        db.execute(insert(models).values(as_dict(found) | place))
        db.execute(update(runs).where(runs.c.id == run).values(version=newest + 1))
        told = {"of": wanted, "version": newest + 1, "model": found.sha256}
        audit.append(db, now, actor, "fall back", run=run, **told)
    return wanted, newest + 1


def _version(context: Context, run: str, version: int) -> Row[Any] | None:
    query = select(models).where(models.c.run == run, models.c.version == version)
    with context.database.read() as db:
        return one(db, query)


def _is_whole(blobs: BlobStore, version: Row[Any] | None) -> bool:
    if version is None:
        return False
    try:
        load_version(blobs, version)
    except LostError:
        return False
    return True
