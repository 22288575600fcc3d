"""The leader's work at every tick: everything that is due in every run, one step at a time.

A step reads first, without a lock, and writes only where something is due: an idle server writes
nothing but its leader's beat. The decision is made again inside the transaction that acts on it,
which has the round locked, by a leader that still leads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Row, and_, select, update

from potluck.algorithms import Algorithm
from potluck.config.round_step import due
from potluck.core.errors import LostError
from potluck.server.rounds.commit import abandon, commit_round, load_version
from potluck.server.rounds.leaving import note_silent
from potluck.server.rounds.state_machine import (
    abandon_round,
    close_round,
    count,
    expire_leases,
    lock_run,
    open_round,
    open_round_of,
    pause_run,
    phase_of,
    rearm,
    start_training,
)
from potluck.server.storage import fault_points
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import (
    ACTIVE,
    OPEN_ROUND,
    assignments,
    devices,
    models,
    rounds,
    runs,
    sign_ins,
    tokens,
)
from potluck.server.storage.stored_run import settings_of
from potluck.server.storage.vectors import tries


def lead(context: Context, algorithm_of: Callable[[Row[Any]], Algorithm], *, taken: bool) -> None:
    """Does all that is due, but for `sweep`. `taken`: there may have been no leader for a while."""
    if taken:
        with context.database.write() as db:
            context.check(db)
            _bring_back(db, context.now())
            rearm(db, context.now())
    _expire(context)
    with context.database.read() as db:
        ids = db.scalars(select(runs.c.id).where(runs.c.state != "finished")).all()
    for id in ids:
        while _step(context, id, algorithm_of):
            pass


def _bring_back(db: Connection, now: int) -> None:
    """Corrects times from a clock that was ahead: they begin now, and last as long as before."""
    for table in (tokens, sign_ins):
        c, ahead = table.c, table.c.created_ms > now
        lasting = {"created_ms": now, "expires_ms": c.expires_ms - c.created_ms + now}
        db.execute(update(table).where(ahead).values(lasting))
    db.execute(update(devices).where(devices.c.seen_ms > now).values(seen_ms=now))
    open_ones = and_(OPEN_ROUND, rounds.c.started_ms > now)
    db.execute(update(rounds).where(open_ones).values(started_ms=now))


def _expire(context: Context) -> None:
    now = context.now()
    late = and_(ACTIVE, assignments.c.lease_ms <= now)
    with context.database.read() as db:
        if db.execute(select(assignments.c.id).where(late).limit(1)).first() is None:
            return
    with context.database.write() as db:
        context.check(db)
        expire_leases(db, now)


def _step(context: Context, id: str, algorithm_of: Callable[[Row[Any]], Algorithm]) -> bool:
    """Makes one transition of one run. Returns whether there was one."""
    with context.database.read() as db:
        run = db.execute(select(runs).where(runs.c.id == id)).one()
        round = open_round_of(db, id)
        counts = None if round is None else count(db, round)
    if round is None or counts is None:
        return run.state == "running" and _open(context, run)
    if _is_lost(context, run, round):
        return True
    if round.state == "AGGREGATING":
        commit_round(context, run, round, algorithm_of(run))
        return True
    if due(phase_of(round), counts, context.now())[0] == "wait":
        return False
    _move(context, id, round.id)
    return True


def _open(context: Context, run: Row[Any]) -> bool:
    lost = _lost_model(context, run.id, run.version, f"{run.version}, attempt {run.attempt}")
    with context.database.write() as db:
        context.check(db)
        current = lock_run(db, run.id)
        if (current.state, current.version) != ("running", run.version):
            return False
        if lost:
            pause_run(db, run.id, lost, context.now())
        opened = None if lost else open_round(db, current, context.now())
    if lost:
        context.on_lost()
    if opened is not None:
        fault_points.reach("open.after")
        context.on_open(opened)
    return opened is not None


def _lost_model(context: Context, run: str, version: int, occasion: str) -> str:
    """Returns what to do about a model, if it is lost; on each occasion it is read once.

    A round that follows a commit begins with what was just written, and is opened there.
    """
    if (run, occasion) in context.looked:
        return ""
    with context.database.read() as db:
        here = (models.c.run == run) & (models.c.version == version)
        row = db.execute(select(models).where(here)).one()
    try:
        tries(lambda: load_version(context.blobs, row))
    except LostError as error:
        return f"{error} Put it back, or take an older model (potluck fall-back)"
    context.looked.add((run, occasion))
    return ""


def _is_lost(context: Context, run: Row[Any], round: Row[Any]) -> bool:
    """Abandons an attempt whose model is lost, so that no device can receive it."""
    if run.id not in context.suspects:
        return False
    context.suspects.discard(run.id)
    lost = _lost_model(context, run.id, round.version, round.id)
    if lost:
        abandon(context, run, round, lost)
    return lost != ""


def _move(context: Context, id: str, round_id: str) -> None:
    """Leaves SELECTING or TRAINING, if that is still due."""
    now = context.now()
    with context.database.write() as db:
        context.check(db)
        run = lock_run(db, id)
        here = select(rounds).where(rounds.c.id == round_id)
        round = db.execute(here.with_for_update()).one()
        step, reason = due(phase_of(round), count(db, round), now)
        settings = settings_of(run.settings)
        silent = step in ("close", "abandon") and note_silent(db, round)
        if step == "train":
            start_training(db, round, settings, now)
        elif step == "close":
            close_round(db, round.id, "the round closed")
        elif step == "abandon":
            abandon_round(db, run, round, reason, now, excused=silent)
    if step != "wait":
        fault_points.reach(f"{step}.after")
