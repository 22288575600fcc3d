"""The rounds of a run as a state machine: one function per transition, one transaction each.

    SELECTING ──→ TRAINING ──→ AGGREGATING ──→ COMMITTED
        └─────────────┴──────→ ABANDONED(reason)

    SELECTING    devices that check in get a slot and start at once. It ends when the slots were
                 taken, or `selection_seconds` after the first device. A drawn cohort without any
                 check-in has as long as devices may have been told to wait, and
                 `selection_seconds`.
    TRAINING     ends `report_seconds` later. A slot whose lease ran out, or whose device failed,
                 goes to the next device that checks in.
    AGGREGATING  the accepted set is frozen; the model is made from it (`commit`).

Reports are accepted in SELECTING and TRAINING. A round closes with the report that reaches the
goal, in its transaction; and at its deadline when the minimum is reached. Otherwise it is
abandoned: the model stays as it was, and the same number is tried again with the next attempt and a
new id. After `attempts` in a row the run is paused, with the reason. A federated evaluation that
fails so often is given up instead.

Only the leader calls these functions, but for `close_round`. Each one names the state that it
leaves; where a round is in another one, nothing happens. `potluck.core.round_step.due` decides what
comes next.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from potluck.config.round_settings import RoundSettings, milliseconds
from potluck.config.round_step import Counts, Phase
from potluck.core import derive_seed, sample_cohort
from potluck.core.plain_json import to_json
from potluck.server.rounds.leaving import Present, goal_among, is_excused, present
from potluck.server.storage import audit, fault_points
from potluck.server.storage.database_tables import (
    ACTIVE,
    OPEN_ROUND,
    assignments,
    devices,
    reports,
    rounds,
    runs,
)
from potluck.server.storage.stored_run import settings_of

LEASE_RAN_OUT = "the lease ran out"
"""Why an assignment expired: its device was silent; and not: it was not needed any more."""
ENOUGH = "this round has all the reports it needs"
"""Why an assignment expired when its round closed at the goal."""
_GRACE_MS = 30_000


def open_round(db: Connection, run: Row[Any], now: int) -> str | None:
    """Moves ∅ → SELECTING, the next round of a run. Returns its id, or None if it must wait."""
    settings = settings_of(run.settings)
    population = db.scalar(select(func.count()).where(devices.c.run == run.id)) or 0
    if population < settings.population:
        return None
    kind, number = _next(run, settings)
    if number > settings.num_rounds:
        _finish_run(db, run, now)
        return None
    here = present(db, run.id)
    cohort = _cohort(run, settings, kind, number, here)
    goal = goal_among(settings, here) if cohort is None else len(cohort)
    if goal == 0:
        return None
    slots = settings.slots_of(goal) if cohort is None else goal
    id = secrets.token_hex(16)
    away = max(settings.pace_seconds, population / 100) + usual_seconds(db, run.id, settings)
    patience = milliseconds(settings.selection_seconds + away)
    values = {
        "id": id,
        "run": run.id,
        "kind": kind,
        "number": number,
        "attempt": run.attempt,
        "state": "SELECTING",
        "reason": "",
        "goal": goal,
        "minimum": settings.minimum_of(goal),
        "slots": slots,
        "version": run.version,
        "cohort": None if cohort is None else to_json(cohort),
        "selection_deadline_ms": None if cohort is None else now + patience,
        "opened_ms": now,
        "swept": False,
    }
    db.execute(insert(rounds).values(values))
    fault_points.reach("open.inside")
    return id


def start_training(db: Connection, round: Row[Any], settings: RoundSettings, now: int) -> None:
    """Moves SELECTING → TRAINING, and sets the report deadline."""
    deadline = now + milliseconds(settings.report_seconds)
    _move(db, round, "TRAINING", report_deadline_ms=deadline)
    fault_points.reach("train.inside")


def close_round(db: Connection, round: str, why: str = ENOUGH) -> None:
    """Moves SELECTING, TRAINING → AGGREGATING: no report is accepted any more."""
    here = (rounds.c.id == round) & rounds.c.state.in_(("SELECTING", "TRAINING"))
    if db.execute(update(rounds).where(here).values(state="AGGREGATING")).rowcount == 1:
        _end_assignments(db, round, why)
    fault_points.reach("close.inside")


def abandon_round(
    db: Connection,
    run: Row[Any],
    round: Row[Any],
    reason: str,
    now: int,
    *,
    excused: bool = False,
    actor: str = "leader",
) -> None:
    """Moves SELECTING, TRAINING, AGGREGATING → ABANDONED: the model stays as it was."""
    if not _move(db, round, "ABANDONED", reason=reason, closed_ms=now):
        return
    _end_assignments(db, round.id, "the round was abandoned")
    settings = settings_of(run.settings)
    # A pause or an operator is not the devices' fault. A device that is gone fails no further
    # round.
    excused = excused or actor != "leader" or run.state != "running" or is_excused(db, round.id)
    strikes = run.strikes + (not excused)
    changes: dict[str, Any] = {"attempt": round.attempt + 1, "strikes": strikes}
    if strikes >= settings.attempts and round.kind == "evaluate":
        changes = {"attempt": 1, "strikes": 0, "evaluated": round.number}
    elif strikes >= settings.attempts and run.state == "running":
        told = f"round {round.number} was abandoned {strikes} times in a row; the last time: "
        changes |= {"state": "paused", "reason": told + reason}
    db.execute(update(runs).where(runs.c.id == run.id).values(changes))
    name = {"round": round.number, "attempt": round.attempt, "kind": round.kind}
    audit.append(db, now, actor, "abandon", run=run.id, reason=reason, **name)
    if "state" in changes:
        audit.append(db, now, "leader", "pause", run=run.id, reason=changes["reason"])
    fault_points.reach("abandon.inside")


def lock_run(db: Connection, run: str) -> Row[Any]:
    """Locks a run until the end of the transaction; its round is locked after it."""
    return db.execute(select(runs).where(runs.c.id == run).with_for_update()).one()


def pause_run(db: Connection, run: str, reason: str, now: int) -> None:
    """Pauses a run in which no round can be opened before a person acts."""
    db.execute(update(runs).where(runs.c.id == run).values(state="paused", reason=reason))
    audit.append(db, now, "leader", "pause", run=run, reason=reason)


def expire_leases(db: Connection, now: int) -> None:
    """Frees the slots of devices that were silent for too long."""
    late = and_(ACTIVE, assignments.c.lease_ms <= now)
    theirs = rounds.c.id.in_(select(assignments.c.round).where(late))
    # The rounds first, as everywhere: reports write many assignments at once, too.
    db.execute(select(rounds.c.id).where(theirs).order_by(rounds.c.id).with_for_update()).all()
    values = {"state": "expired", "reason": LEASE_RAN_OUT}
    db.execute(update(assignments).where(late).values(values))


def rearm(db: Connection, now: int) -> None:
    """Moves deadlines after a time without a leader.

    None is further away than when it was set. One that passed leaves some time for the reports that
    could not be sent.
    """
    theirs = select(runs.c.settings).where(runs.c.id == rounds.c.run).scalar_subquery()
    open_ones = select(rounds, theirs.label("settings")).where(OPEN_ROUND)
    for round in db.execute(open_ones).all():
        settings = settings_of(round.settings)
        limits = {
            "selection_deadline_ms": milliseconds(settings.selection_seconds),
            "report_deadline_ms": milliseconds(settings.report_seconds),
        }
        changes = {
            name: _rearmed(getattr(round, name), now, limit)
            for name, limit in limits.items()
            if getattr(round, name) is not None
        }
        if changes:
            db.execute(update(rounds).where(rounds.c.id == round.id).values(changes))
        active = (assignments.c.round == round.id) & (assignments.c.state == "active")
        for lease in db.execute(select(assignments.c.id, assignments.c.lease_ms).where(active)):
            values = {"lease_ms": _rearmed(lease.lease_ms, now, settings.lease_ms)}
            db.execute(update(assignments).where(assignments.c.id == lease.id).values(values))


def phase_of(round: Row[Any]) -> Phase:
    """Returns the needs of a round in SELECTING or TRAINING, and until when."""
    return Phase(
        goal=round.goal,
        minimum=round.minimum,
        slots=round.slots,
        selection_deadline=round.selection_deadline_ms,
        report_deadline=round.report_deadline_ms,
        is_drawn=round.cohort is not None,
    )


def count(db: Connection, round: Row[Any]) -> Counts:
    """Counts the devices of a round."""
    active, reported, taken = db.execute(_COUNTS, {"round": round.id}).one()
    absent = len(_absent(db, round)) if round.cohort is not None else 0
    return Counts(active, reported, taken, absent)


_TAKEN = select(func.count()).where(assignments.c.round == bindparam("round"))
_ACTIVE = _TAKEN.where(assignments.c.state == "active")
_REPORTED = select(func.count()).where(reports.c.round == bindparam("round"))
_COUNTS = select(_ACTIVE.scalar_subquery(), _REPORTED.scalar_subquery(), _TAKEN.scalar_subquery())


def open_round_of(db: Connection, run: str, *, lock: bool = False) -> Row[Any] | None:
    """Returns the round of a run that is neither committed nor abandoned: there is at most one."""
    return db.execute(_OPEN_LOCKED if lock else _OPEN, {"run": run}).one_or_none()


def usual_seconds(db: Connection, run: str, settings: RoundSettings) -> float:
    """Returns the median length of the last five committed rounds; 0 before the second.

    A round begins with its first device: a wait without devices does not count. The first round is
    left out, in which devices import, load and compile what they will use. None is longer than its
    deadlines let it be, or the server's clock was set in the middle of it.
    """
    longest = milliseconds(settings.selection_seconds + settings.report_seconds)
    measured = sorted(min(max(ms, 0), longest) for ms in db.scalars(_LENGTHS, {"run": run}))
    return measured[(len(measured) - 1) // 2] / 1000 if measured else 0.0


# Built once: putting a statement together costs more than running it.
_OPEN = select(rounds).where(rounds.c.run == bindparam("run"), OPEN_ROUND)
_OPEN_LOCKED = _OPEN.with_for_update()
_LENGTHS = (
    select(rounds.c.closed_ms - rounds.c.started_ms)
    .where(
        rounds.c.run == bindparam("run"),
        rounds.c.state == "COMMITTED",
        rounds.c.kind == "train",
        rounds.c.number > 1,
    )
    .order_by(rounds.c.number.desc())
    .limit(5)
)


def settle(db: Connection, run: Row[Any], round: Row[Any], *, version: int) -> None:
    """Moves the run on to its next round, as a part of a commit."""
    changes: dict[str, Any] = {"attempt": 1, "strikes": 0, "version": version}
    changes["evaluated" if round.kind == "evaluate" else "round"] = round.number
    db.execute(update(runs).where(runs.c.id == run.id).values(changes))


def _next(run: Row[Any], settings: RoundSettings) -> tuple[str, int]:
    every = settings.federated_every
    if every and run.round and run.round % every == 0 and run.evaluated < run.round:
        return "evaluate", run.round
    return "train", run.round + 1


def _cohort(
    run: Row[Any], settings: RoundSettings, kind: str, number: int, here: Present
) -> list[int] | None:
    """Returns the client indices of a sampled round: for training, those of the simulation.

    They are drawn among the devices that are expected, and anew for another attempt.
    """
    if settings.selection == "open":
        return None
    seed = run.seed if kind == "train" else derive_seed(run.seed, "evaluate")
    expected = len(here.clients)
    size = min(settings.goal_of(expected), expected)
    if size == 0:
        return []
    if run.attempt > 1:
        seed = derive_seed(seed, "attempt", run.attempt)
    drawn = sample_cohort(expected, size, seed=seed, round=number)
    return [here.clients[place] for place in drawn]


def _absent(db: Connection, round: Row[Any]) -> list[int]:
    """Returns the drawn clients that failed in this round, without a report."""
    failed = select(assignments.c.client).where(
        assignments.c.round == round.id, assignments.c.state == "failed"
    )
    done = select(reports.c.client).where(reports.c.round == round.id)
    return sorted({*db.scalars(failed)} & {*json.loads(round.cohort)} - {*db.scalars(done)})


def _move(db: Connection, round: Row[Any], state: str, **changes: Any) -> bool:
    here = (rounds.c.id == round.id) & (rounds.c.state == round.state)
    moved = db.execute(update(rounds).where(here).values(state=state, **changes))
    return moved.rowcount == 1


def _end_assignments(db: Connection, round: str, reason: str) -> None:
    active = (assignments.c.round == round) & (assignments.c.state == "active")
    values = {"state": "expired", "reason": reason}
    db.execute(update(assignments).where(active).values(values))


def _finish_run(db: Connection, run: Row[Any], now: int) -> None:
    db.execute(update(runs).where(runs.c.id == run.id).values(state="finished"))
    audit.append(db, now, "leader", "finish", run=run.id, round=run.round, version=run.version)


def _rearmed(deadline: int, now: int, window: int) -> int:
    return min(max(deadline, now + min(_GRACE_MS, window)), now + window)
