"""What the leader does at every tick: everything that is due in every run, one step at a time.

A step looks first, without a lock, and writes only where something is due: an idle server writes
nothing but its leader's beat. What is then done is decided again inside the transaction that does
it, alone with the round, by a leader that still leads.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import and_, select

from potluck.algorithms import Algorithm
from potluck.experiment import Experiment
from potluck.server import faults
from potluck.server.commit import Works, commit_round
from potluck.server.leaving import note_silent
from potluck.server.look import open_round_of
from potluck.server.rounds import (
    abandon_round,
    close_round,
    count,
    due,
    expire_leases,
    open_round,
    rearm,
    start_training,
)
from potluck.server.settings import settings_of
from potluck.server.stored import experiment_of
from potluck.server.tables import ACTIVE, assignments, rounds, runs


def lead(works: Works, build: Callable[[Experiment], Algorithm], *, taken: bool) -> None:
    """Do all that is due, but for `sweep`. `taken`: nobody may have led for a while."""
    if taken:
        with works.database.write() as db:
            works.check(db)
            rearm(db, works.now())
    _expire(works)
    with works.database.read() as db:
        ids = db.scalars(select(runs.c.id).where(runs.c.state != "finished")).all()
    for id in ids:
        while _step(works, id, build):
            pass


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
        return run.state == "running" and _open(works, id)
    if round.state == "AGGREGATING":
        commit_round(works, run, round, build(experiment_of(run)))
        return True
    if due(round, counts, works.now())[0] == "wait":
        return False
    _move(works, id, round.id)
    return True


def _open(works: Works, id: str) -> bool:
    with works.database.write() as db:
        works.check(db)
        run = db.execute(select(runs).where(runs.c.id == id).with_for_update()).one()
        if run.state != "running":
            return False
        opened = open_round(db, run, works.now())
    if opened is not None:
        faults.reach("open.after")
        works.opened(opened)
    return opened is not None


def _move(works: Works, id: str, round_id: str) -> None:
    """Leave SELECTING or TRAINING, if that is still due."""
    now = works.now()
    with works.database.write() as db:
        works.check(db)
        run = db.execute(select(runs).where(runs.c.id == id).with_for_update()).one()
        here = select(rounds).where(rounds.c.id == round_id)
        round = db.execute(here.with_for_update()).one()
        step, reason = due(round, count(db, round), now)
        settings = settings_of(run.settings)
        silent = step in ("close", "abandon") and note_silent(db, round)
        if step == "train":
            start_training(db, round, settings, now)
        elif step == "close":
            close_round(db, round.id, "the round closed")
        elif step == "abandon":
            abandon_round(db, run, round, reason, now, excused=silent)
    if step != "wait":
        faults.reach(f"{step}.after")
