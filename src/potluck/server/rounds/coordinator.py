"""What the leader does at every tick: everything that is due in every run, one step at a time.

A step looks first, without a lock, and writes only where something is due: an idle server writes
nothing but its leader's beat. What is then done is decided again inside the transaction that does
it, alone with the round, by a leader that still leads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Row, and_, select, update

from potluck.algorithms import Algorithm
from potluck.config.experiment import Experiment
from potluck.config.round_step import due
from potluck.core.errors import LostError
from potluck.server.rounds.check_in import open_round_of
from potluck.server.rounds.commit import Works, abandon, commit_round, load_version
from potluck.server.rounds.leaving import note_silent
from potluck.server.rounds.state_machine import (
    abandon_round,
    close_round,
    count,
    expire_leases,
    lock_run,
    open_round,
    pause_run,
    phase_of,
    rearm,
    start_training,
)
from potluck.server.storage import fault_points
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
from potluck.server.storage.stored_run import experiment_of, settings_of
from potluck.server.storage.vectors import tries


def lead(works: Works, build: Callable[[Experiment], Algorithm], *, taken: bool) -> None:
    """Do all that is due, but for `sweep`. `taken`: nobody may have led for a while."""
    if taken:
        with works.database.write() as db:
            works.check(db)
            _bring_back(db, works.now())
            rearm(db, works.now())
    _expire(works)
    with works.database.read() as db:
        ids = db.scalars(select(runs.c.id).where(runs.c.state != "finished")).all()
    for id in ids:
        while _step(works, id, build):
            pass


def _bring_back(db: Connection, now: int) -> None:
    """After a clock that was ahead: what it wrote begins now, and lasts as long as it was to."""
    for table in (tokens, sign_ins):
        c, ahead = table.c, table.c.created_ms > now
        lasting = {"created_ms": now, "expires_ms": c.expires_ms - c.created_ms + now}
        db.execute(update(table).where(ahead).values(lasting))
    db.execute(update(devices).where(devices.c.seen_ms > now).values(seen_ms=now))
    open_ones = and_(OPEN_ROUND, rounds.c.started_ms > now)
    db.execute(update(rounds).where(open_ones).values(started_ms=now))


def _expire(works: Works) -> None:
    now = works.now()
    late = and_(ACTIVE, assignments.c.lease_ms <= now)
    with works.database.read() as db:
        if db.execute(select(assignments.c.id).where(late).limit(1)).first() is None:
            return
    with works.database.write() as db:
        works.check(db)
        expire_leases(db, now)


def _step(works: Works, id: str, build: Callable[[Experiment], Algorithm]) -> bool:
    """One transition of one run. Returns whether there was one."""
    with works.database.read() as db:
        run = db.execute(select(runs).where(runs.c.id == id)).one()
        round = open_round_of(db, id)
        counts = None if round is None else count(db, round)
    if round is None or counts is None:
        return run.state == "running" and _open(works, run)
    if _is_lost(works, run, round):
        return True
    if round.state == "AGGREGATING":
        commit_round(works, run, round, build(experiment_of(run)))
        return True
    if due(phase_of(round), counts, works.now())[0] == "wait":
        return False
    _move(works, id, round.id)
    return True


def _open(works: Works, run: Row[Any]) -> bool:
    lost = _lost_model(works, run.id, run.version, f"{run.version}, attempt {run.attempt}")
    with works.database.write() as db:
        works.check(db)
        current = lock_run(db, run.id)
        if (current.state, current.version) != ("running", run.version):
            return False
        if lost:
            pause_run(db, run.id, lost, works.now())
        opened = None if lost else open_round(db, current, works.now())
    if lost:
        works.lost()
    if opened is not None:
        fault_points.reach("open.after")
        works.opened(opened)
    return opened is not None


def _lost_model(works: Works, run: str, version: int, occasion: str) -> str:
    """What to do about a model, if it is lost; on each occasion it is read once.

    A round that follows a commit begins with what was just written, and is opened there.
    """
    if (run, occasion) in works.looked:
        return ""
    with works.database.read() as db:
        here = (models.c.run == run) & (models.c.version == version)
        row = db.execute(select(models).where(here)).one()
    try:
        tries(lambda: load_version(works.blobs, row))
    except LostError as error:
        return f"{error} Put it back, or take an older model (potluck fall-back)"
    works.looked.add((run, occasion))
    return ""


def _is_lost(works: Works, run: Row[Any], round: Row[Any]) -> bool:
    """Abandon an attempt whose devices cannot receive their model, as it is lost."""
    if run.id not in works.suspects:
        return False
    works.suspects.discard(run.id)
    lost = _lost_model(works, run.id, round.version, round.id)
    if lost:
        abandon(works, run, round, lost)
    return lost != ""


def _move(works: Works, id: str, round_id: str) -> None:
    """Leave SELECTING or TRAINING, if that is still due."""
    now = works.now()
    with works.database.write() as db:
        works.check(db)
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
