"""Who takes part: check-ins, assignments, and leases.

What a device that checks in is told comes from one `Look`; here are the transactions around it.

A lease is extended by progress and by uploaded bytes, never beyond the report deadline. Whether it
ran out is the leader's decision alone (`rounds.expire_leases`): everyone else sees the state of the
assignment and compares no clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select, update

from potluck.core import RefusedError
from potluck.server.rounds.check_in import (
    Asked,
    Assigned,
    Attributes,
    Finished,
    Given,
    Look,
    Wait,
    revoked,
    unknown_device,
)
from potluck.server.rounds.enrolment import note_sequences
from potluck.server.rounds.leaving import REASONS, leave
from potluck.server.storage import fault_points
from potluck.server.storage.database import Database, one
from potluck.server.storage.database_tables import TAKING, assignments, devices, rounds, runs
from potluck.server.storage.stored_run import settings_of


def check_in(
    database: Database, device: str, attributes: Attributes, now: int
) -> Assigned | Wait | Finished:
    """Give a device a slot in the open round, its old assignment again, or a time to come back.

    Raises:
        RefusedError: unknown, revoked.
    """
    (given,) = check_ins(database, [Asked(device, attributes)], now)
    if isinstance(given, RefusedError):
        raise given
    assert given is not None
    return given


def check_ins(database: Database, asked: Sequence[Asked], now: int) -> list[Given | None]:
    """Answer many check-ins at once; the first come are the first to get a slot.

    None where only a sequence number was to be noted, and it is.
    """
    look = None
    names = [one.device for one in asked]
    if all(one.sequence is None for one in asked):
        with database.read() as db:  # most end here, and write nothing
            look = Look(db, names, now)
            answers = [_answer(look, one) for one in asked]
            left = look.left(asked)
        if None not in answers and not left:
            return answers
    with database.write() as db:
        turned = _turned_away(db, asked, now)
        look = Look(db, names, now, before=look)
        look.expect(asked)
        answers = [turned.get(n) or _answer(look, one) for n, one in enumerate(asked)]
        left = [n for n, one in enumerate(asked) if answers[n] is None and one.attributes]
        if left:
            look.lock()
        for number in left:
            answers[number] = _answer(look, asked[number]) or look.assign(asked[number].device)
        look.write()
        for _ in left:
            fault_points.reach("check-in.inside")
    if left:
        fault_points.reach("check-in.after")
    return answers


def _turned_away(db: Connection, asked: Sequence[Asked], now: int) -> dict[int, RefusedError]:
    """Note the sequence numbers that are new; why the others are refused, by their places."""
    places = [n for n, one in enumerate(asked) if one.sequence is not None]
    claims = [(asked[n].device, asked[n].sequence or 0) for n in places]
    refused = note_sequences(db, claims, now) if claims else []
    return {n: error for n, error in zip(places, refused, strict=True) if error is not None}


def _answer(look: Look, asked: Asked) -> Given | None:
    return None if asked.attributes is None else look.answer(asked.device, asked.attributes)


def extend_lease(database: Database, device: str, assignment: str, now: int) -> float:
    """Note progress. Returns the seconds until the device must be heard of again.

    Raises:
        RefusedError: unknown; late: the assignment is over.
    """
    with database.write() as db:
        found = _find_active(db, device, assignment)
        lease = prolong(db, found, now)
        fault_points.reach("lease.inside")
    fault_points.reach("lease.after")
    return (lease - now) / 1000


def fail(database: Database, device: str, assignment: str, reason: str, now: int) -> None:
    """A device says that it cannot do its work: its slot is free again, or needed no more.

    Raises:
        RefusedError: unknown; late: the assignment is over.
    """
    with database.write() as db:
        found = _find_active(db, device, assignment)
        values = {"state": "failed", "reason": reason[:500]}
        db.execute(update(assignments).where(assignments.c.id == found.id).values(values))
        if found.kind == "train" and reason in REASONS:
            leave(db, found, reason, now)


def come_back(database: Database, device: str, now: int) -> float:
    """Seconds after which a device that is done should check in.

    Raises:
        RefusedError: unknown, revoked.
    """
    with database.read() as db:
        look = Look(db, [device], now)
        return look.retry_after(device)


def find_device(db: Connection, device: str) -> tuple[Row[Any], Row[Any]]:
    """A device that may take part, and its run."""
    member = one(db, select(devices).where(devices.c.id == device))
    if member is None:
        raise unknown_device(device)
    if member.revoked_ms is not None:
        raise revoked()
    run = one(db, select(runs).where(runs.c.id == member.run))
    assert run is not None
    return member, run


def find_assignment(
    db: Connection, device: str, assignment: str, *, lock: bool = False
) -> Row[Any]:
    """A device's assignment that is not over; see `known_assignment`."""
    found = known_assignment(db, device, assignment, lock=lock)
    check_not_over(found)
    return found


def known_assignment(
    db: Connection, device: str, assignment: str, *, lock: bool = False
) -> Row[Any]:
    """A device's assignment, with the columns of its round and the run's settings.

    With `lock` the round stays as it is until the transaction ends.
    """
    place = {"assignment": assignment, "device": device}
    if lock and db.dialect.name == "postgresql":  # on SQLite a writer is alone
        round = select(assignments.c.round).where(assignments.c.id == assignment)
        here = rounds.c.id == round.scalar_subquery()
        db.execute(select(rounds.c.id).where(here).with_for_update())
    found = db.execute(_FOUND, place).one_or_none()
    if found is None:
        find_device(db, device)
        raise unknown_assignment(assignment)
    if found.revoked_ms is not None:
        raise revoked()
    return found


def unknown_assignment(assignment: str) -> RefusedError:
    """What is said of an assignment that is not the device's."""
    return RefusedError("unknown", f"got assignment={assignment!r}, which is none of yours.")


def check_place(found: Row[Any], round: int, attempt: int) -> None:
    """Refuse what names another round or attempt than its assignment is of."""
    if (round, attempt) != (found.number, found.attempt):
        raise RefusedError(
            "malformed",
            f"round and attempt must be those of the assignment ({found.number}, "
            f"{found.attempt}), got round={round}, attempt={attempt}.",
        )


def check_not_over(found: Row[Any]) -> None:
    """Refuse what comes for an assignment that expired or failed, or whose round closed."""
    if found.state in ("expired", "failed") or (
        found.state == "active" and found.round_state not in TAKING
    ):
        why = found.reason or "the round closed"
        raise RefusedError("late", f"this assignment is over ({why}). Check in again.")


def _find_active(db: Connection, device: str, assignment: str) -> Row[Any]:
    """An assignment that has not reported: a report that counts is not taken back."""
    found = find_assignment(db, device, assignment, lock=True)
    if found.state == "reported":
        raise RefusedError("late", "this assignment is over (it has reported). Check in again.")
    return found


def prolong(db: Connection, found: Row[Any], now: int) -> int:
    """Extend an assignment's lease, up to the report deadline. Returns its end."""
    settings = settings_of(found.settings)
    end = now + settings.lease_ms
    if found.report_deadline_ms is not None:
        end = min(end, found.report_deadline_ms)
    if end > found.lease_ms and found.state == "active":
        db.execute(update(assignments).where(assignments.c.id == found.id).values(lease_ms=end))
    return max(end, found.lease_ms)


def known_assignments(db: Connection, ids: Sequence[str]) -> dict[str, Row[Any]]:
    """Assignments by their ids, as `known_assignment` gives them, with their rounds locked."""
    if db.dialect.name == "postgresql":
        mine = select(assignments.c.round).where(assignments.c.id.in_(ids))
        here = select(rounds.c.id).where(rounds.c.id.in_(mine)).order_by(rounds.c.id)
        db.execute(here.with_for_update())
    return {row.id: row for row in db.execute(_THESE, {"ids": list(ids)})}


# Built once: putting a statement together costs more than running it.
_JOINED = (
    select(
        assignments,
        devices.c.revoked_ms,
        rounds.c.state.label("round_state"),
        rounds.c.kind,
        rounds.c.number,
        rounds.c.attempt,
        rounds.c.goal,
        rounds.c.slots,
        rounds.c.minimum,
        rounds.c.cohort,
        rounds.c.report_deadline_ms,
        runs.c.id.label("run"),
        runs.c.settings,
        runs.c.spec,
    )
    .join(devices, devices.c.id == assignments.c.device)
    .join(rounds, rounds.c.id == assignments.c.round)
    .join(runs, runs.c.id == rounds.c.run)
)
_FOUND = _JOINED.where(
    assignments.c.id == bindparam("assignment"), assignments.c.device == bindparam("device")
)
_THESE = _JOINED.where(assignments.c.id.in_(bindparam("ids", expanding=True)))
