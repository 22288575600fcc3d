"""Who takes part: check-ins, assignments, leases, and when to come back.

A device that checks in is given a slot, or is told how long to wait: until the next round is
expected to begin, plus its own place in a window, so that a thousand devices do not come at once
(pace steering). What is expected is what was measured, and nothing at first. Checking in again is
answered with the same assignment: a device that was restarted goes on where it was.

A lease is extended by progress and by uploaded bytes, never beyond the report deadline. Whether it
ran out is the leader's decision alone (`rounds.expire_leases`): everyone else sees the state of the
assignment and compares no clocks.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Row, func, insert, select, update

from potluck.core import RefusedError, derive_seed
from potluck.server import faults
from potluck.server.database import Database, one
from potluck.server.settings import RoundSettings, milliseconds
from potluck.server.tables import assignments, devices, models, reports, rounds, runs

WaitReason = Literal[
    "no round", "slots taken", "not selected", "reported", "not eligible", "paused", "failed"
]
_TAKING = ("SELECTING", "TRAINING")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What a device says of its condition; None where it does not know."""

    charging: bool | None = None
    idle: bool | None = None
    unmetered: bool | None = None
    free_memory_bytes: int | None = None


class Assigned(NamedTuple):
    """A device's work in one round."""

    assignment: str
    round: str
    kind: Literal["train", "evaluate"]
    number: int
    attempt: int
    client: int  # the device's index in random streams
    seed: int
    version: int  # of the model to start from
    model_sha256: str
    lease_seconds: float
    deadline_ms: int | None


class Wait(NamedTuple):
    """No work now."""

    reason: WaitReason
    retry_after_seconds: float


class Finished(NamedTuple):
    """No work any more: the run is over."""

    version: int


def check_in(
    database: Database, device: str, attributes: Attributes, now: int
) -> Assigned | Wait | Finished:
    """Give a device a slot in the open round, its old assignment again, or a time to come back.

    Raises:
        RefusedError: unknown, revoked.
    """
    with database.read() as db:  # most check-ins end here, and write nothing
        answer = _look(db, device, attributes, now)
    if answer is not None:
        return answer
    with database.write() as db:
        member, run = find_device(db, device)
        round = _open_round(db, run, lock=True)
        answer = _look(db, device, attributes, now)
        if answer is None:
            assert round is not None
            answer = _assign(db, member, run, round, now)
            faults.reach("check-in.inside")
    faults.reach("check-in.after")
    return answer


def extend_lease(database: Database, device: str, assignment: str, now: int) -> float:
    """Note progress. Returns the seconds until the device must be heard of again.

    Raises:
        RefusedError: unknown; late: the assignment is over.
    """
    with database.write() as db:
        found = find_assignment(db, device, assignment, lock=True)
        lease = prolong(db, found, now)
        faults.reach("lease.inside")
    faults.reach("lease.after")
    return (lease - now) / 1000


def fail(database: Database, device: str, assignment: str, reason: str) -> None:
    """A device says that it cannot do its work: its slot is free again.

    Raises:
        RefusedError: unknown; late: the assignment is over.
    """
    with database.write() as db:
        found = find_assignment(db, device, assignment, lock=True)
        values = {"state": "failed", "reason": reason[:500]}
        db.execute(update(assignments).where(assignments.c.id == found.id).values(values))


def come_back(database: Database, device: str, now: int) -> float:
    """Seconds after which a device that is done should check in.

    Raises:
        RefusedError: unknown, revoked.
    """
    with database.read() as db:
        member, run = find_device(db, device)
        settings = RoundSettings.model_validate_json(run.settings)
        return _retry_after(db, member, run, _open_round(db, run), settings, now)


def find_device(db: Connection, device: str) -> tuple[Row[Any], Row[Any]]:
    """A device that may take part, and its run."""
    member = one(db, select(devices).where(devices.c.id == device))
    if member is None:
        raise RefusedError("unknown", f"a device must be enrolled, got device={device!r}. Enrol.")
    if member.revoked_ms is not None:
        raise RefusedError("revoked", "this device was revoked. Ask whoever runs the server.")
    run = one(db, select(runs).where(runs.c.id == member.run))
    assert run is not None
    return member, run


def find_assignment(
    db: Connection, device: str, assignment: str, *, lock: bool = False
) -> Row[Any]:
    """A device's active assignment, with the columns of its round and the run's settings.

    With `lock` the round stays as it is until the transaction ends.
    """
    member, _ = find_device(db, device)
    mine = (assignments.c.id == assignment) & (assignments.c.device == member.id)
    place = one(db, select(assignments.c.round).where(mine))
    if place is None:  # another device's looks like none
        raise RefusedError("unknown", f"got assignment={assignment!r}, which is none of yours.")
    if lock:
        db.execute(select(rounds.c.id).where(rounds.c.id == place.round).with_for_update())
    query = (
        select(
            assignments,
            rounds.c.state.label("round_state"),
            rounds.c.kind,
            rounds.c.number,
            rounds.c.attempt,
            rounds.c.goal,
            rounds.c.slots,
            rounds.c.report_deadline_ms,
            runs.c.id.label("run"),
            runs.c.settings,
            runs.c.spec,
        )
        .join(rounds, rounds.c.id == assignments.c.round)
        .join(runs, runs.c.id == rounds.c.run)
        .where(mine)
    )
    found = db.execute(query).one()
    if found.state in ("expired", "failed") or (
        found.state == "active" and found.round_state not in _TAKING
    ):
        why = found.reason or "the round closed"
        raise RefusedError("late", f"this assignment is over ({why}). Check in again.")
    return found


def prolong(db: Connection, found: Row[Any], now: int) -> int:
    """Extend an assignment's lease, up to the report deadline. Returns its end."""
    settings = RoundSettings.model_validate_json(found.settings)
    end = now + settings.lease_ms
    if found.report_deadline_ms is not None:
        end = min(end, found.report_deadline_ms)
    if end > found.lease_ms and found.state == "active":
        db.execute(update(assignments).where(assignments.c.id == found.id).values(lease_ms=end))
    return max(end, found.lease_ms)


def _look(
    db: Connection, device: str, attributes: Attributes, now: int
) -> Assigned | Wait | Finished | None:
    """The answer to a check-in, or None: give it a slot."""
    member, run = find_device(db, device)
    settings = RoundSettings.model_validate_json(run.settings)
    if run.state == "finished":
        return Finished(run.version)
    round = _open_round(db, run)
    if round is not None and round.state in _TAKING:
        active = select(assignments).where(
            assignments.c.round == round.id,
            assignments.c.device == device,
            assignments.c.state.in_(("active", "failed")),
        )
        mine = {row.state: row for row in db.execute(active)}
        if "active" in mine:
            return _describe(db, mine["active"], run, round, now)
        reason = _obstacle(db, member, settings, round, attributes, failed="failed" in mine)
    else:
        reason = "no round"
    if run.state == "paused":
        reason = "paused"
    if reason is None:
        return None
    return Wait(reason, _retry_after(db, member, run, round, settings, now))


def _obstacle(
    db: Connection,
    member: Row[Any],
    settings: RoundSettings,
    round: Row[Any],
    attributes: Attributes,
    *,
    failed: bool,
) -> WaitReason | None:
    done = select(reports.c.round).where(reports.c.round == round.id, reports.c.device == member.id)
    if one(db, done) is not None:
        return "reported"
    if failed:
        return "failed"
    if not _is_eligible(settings, attributes):
        return "not eligible"
    if round.cohort is not None:
        return None if member.client in json.loads(round.cohort) else "not selected"
    taken = select(func.count()).where(
        assignments.c.round == round.id, assignments.c.state.in_(("active", "reported"))
    )
    return "slots taken" if (db.scalar(taken) or 0) >= round.slots else None


def _is_eligible(settings: RoundSettings, attributes: Attributes) -> bool:
    return (
        (attributes.charging is True or not settings.needs_charging)
        and (attributes.idle is True or not settings.needs_idle)
        and (attributes.unmetered is True or not settings.needs_unmetered)
        and (attributes.free_memory_bytes or 0) >= settings.needs_memory_bytes
    )


def _assign(db: Connection, member: Row[Any], run: Row[Any], round: Row[Any], now: int) -> Assigned:
    settings = RoundSettings.model_validate_json(run.settings)
    if round.selection_deadline_ms is None:  # the first device starts the clock
        deadline = now + milliseconds(settings.selection_seconds)
        values = {"selection_deadline_ms": deadline, "started_ms": now}
        db.execute(update(rounds).where(rounds.c.id == round.id).values(values))
    end = now + settings.lease_ms
    if round.report_deadline_ms is not None:
        end = min(end, round.report_deadline_ms)
    values = {
        "id": secrets.token_hex(16),
        "round": round.id,
        "device": member.id,
        "client": member.client,
        "state": "active",
        "reason": "",
        "assigned_ms": now,
        "lease_ms": end,
    }
    db.execute(insert(assignments).values(values))
    given = db.execute(select(assignments).where(assignments.c.id == values["id"])).one()
    return _describe(db, given, run, round, now)


def _describe(
    db: Connection, assignment: Row[Any], run: Row[Any], round: Row[Any], now: int
) -> Assigned:
    version = (models.c.run == run.id) & (models.c.version == round.version)
    return Assigned(
        assignment=assignment.id,
        round=round.id,
        kind=round.kind,
        number=round.number,
        attempt=round.attempt,
        client=assignment.client,
        seed=run.seed,
        version=round.version,
        model_sha256=db.execute(select(models.c.sha256).where(version)).scalar_one(),
        lease_seconds=max(assignment.lease_ms - now, 0) / 1000,
        deadline_ms=round.report_deadline_ms,
    )


def _open_round(db: Connection, run: Row[Any], *, lock: bool = False) -> Row[Any] | None:
    query = select(rounds).where(
        rounds.c.run == run.id, rounds.c.state.in_(("SELECTING", "TRAINING", "AGGREGATING"))
    )
    return one(db, query.with_for_update() if lock else query)


def _retry_after(
    db: Connection,
    member: Row[Any],
    run: Row[Any],
    round: Row[Any] | None,
    settings: RoundSettings,
    now: int,
) -> float:
    """Seconds to the next round's expected start, plus U(0, window), the same at every asking.

    The window is as long as a round, and at most `pace_seconds`; but it grows with the population,
    so that at most a hundred devices check in in a second. Before rounds were measured there is
    nothing to wait for: a check-in may well be held until there is work.
    """
    length = _usual_seconds(db, run)
    start = 0.0
    if round is not None and round.state in _TAKING and round.started_ms is not None:
        start = max(length + (round.started_ms - now) / 1000, 0.0)
    population = db.scalar(select(func.max(devices.c.client)).where(devices.c.run == run.id)) or 0
    window = max(min(settings.pace_seconds, length), population / 100)
    number = 0 if round is None else round.number
    place = derive_seed(run.seed, "pace", number, member.client) / 2**63
    return round_up(start + place * window)


def _usual_seconds(db: Connection, run: Row[Any]) -> float:
    """The median length of the last five committed rounds; 0 before the second.

    A round begins with its first device: that nobody came says nothing. The first round is left
    out, in which devices import, load and compile what they will use.
    """
    lengths = (
        select(rounds.c.closed_ms - rounds.c.started_ms)
        .where(
            rounds.c.run == run.id,
            rounds.c.state == "COMMITTED",
            rounds.c.kind == "train",
            rounds.c.number > 1,
        )
        .order_by(rounds.c.number.desc())
        .limit(5)
    )
    measured = sorted(db.scalars(lengths))
    return measured[(len(measured) - 1) // 2] / 1000 if measured else 0.0


def round_up(seconds: float) -> float:
    """To a tenth of a second, and never zero: a device must not spin."""
    return max(round(seconds, 1), 0.1)
