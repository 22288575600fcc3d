"""Assignments and their leases.

A lease is extended by progress and by uploaded bytes, never beyond the report deadline. The leader
alone decides that it ran out (`state_machine.expire_leases`). Other processes read the state of the
assignment and compare no clocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select, update

from potluck.core import RefusedError
from potluck.protocol import Lease, Wait
from potluck.server.rounds.check_in import lease_seconds, wait
from potluck.server.rounds.enrolment import revoked, unknown_device
from potluck.server.rounds.leaving import REASONS, leave
from potluck.server.storage import fault_points
from potluck.server.storage.context import Context
from potluck.server.storage.database import one
from potluck.server.storage.database_tables import TAKING, assignments, devices, rounds, runs
from potluck.server.storage.stored_run import settings_of

_LOG = logging.getLogger("potluck.server")


def extend_lease(context: Context, device: str, assignment: str) -> Lease:
    """Notes progress. Returns how long the device may be silent from now on.

    Raises:
        RefusedError: not_found; late: the assignment is over.
    """
    now = context.now()
    with context.database.write() as db:
        found = _find_active(db, device, assignment)
        end = prolong(db, found, now)
        fault_points.reach("lease.inside")
    fault_points.reach("lease.after")
    return Lease(lease_seconds=lease_seconds(end - now))


def fail(context: Context, device: str, assignment: str, reason: str) -> Wait:
    """Takes an assignment back from a device that cannot do it: its slot is free, or not needed.

    Raises:
        RefusedError: not_found; late: the assignment is over.
    """
    if reason == "manifest_rollback":
        _LOG.warning(
            "a device has seen a newer model than this server has. If the server was restored "
            "from a backup, start it with --restored",
            extra={"device": device},
        )
    now = context.now()
    with context.database.write() as db:
        found = _find_active(db, device, assignment)
        values = {"state": "failed", "reason": reason[:500]}
        db.execute(update(assignments).where(assignments.c.id == found.id).values(values))
        if found.kind == "train" and reason in REASONS:
            leave(db, found, reason, now)
    if reason == "model_digest":
        context.suspect(found.run)
    return wait(context, device, "noted")


def find_device(db: Connection, device: str) -> tuple[Row[Any], Row[Any]]:
    """Returns a device that may take part, and its run."""
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
    """Returns a device's assignment that is not over; see `known_assignment`."""
    found = known_assignment(db, device, assignment, lock=lock)
    check_not_over(found)
    return found


def known_assignment(
    db: Connection, device: str, assignment: str, *, lock: bool = False
) -> Row[Any]:
    """Returns a device's assignment, with the columns of its round and the run's settings.

    With `lock` the round stays as it is until the transaction ends.
    """
    found = known_assignments(db, [assignment], lock=lock).get(assignment)
    if found is None or found.device != device:
        find_device(db, device)
        raise unknown_assignment(assignment)
    if found.revoked_ms is not None:
        raise revoked()
    return found


def unknown_assignment(assignment: str) -> RefusedError:
    """Returns the refusal of an assignment that is not the device's."""
    return RefusedError("not_found", f"got assignment={assignment!r}, which is none of yours.")


def check_place(found: Row[Any], round: int, attempt: int) -> None:
    """Refuses a message that names another round or attempt than its assignment's."""
    if (round, attempt) != (found.number, found.attempt):
        raise RefusedError(
            "malformed",
            f"round and attempt must be those of the assignment ({found.number}, "
            f"{found.attempt}), got round={round}, attempt={attempt}.",
        )


def check_not_over(found: Row[Any]) -> None:
    """Refuses a message for an assignment that expired or failed, or whose round closed."""
    if found.state in ("expired", "failed") or (
        found.state == "active" and found.round_state not in TAKING
    ):
        why = found.reason or "the round closed"
        raise RefusedError("late", f"this assignment is over ({why}). Check in again.")


def _find_active(db: Connection, device: str, assignment: str) -> Row[Any]:
    """Returns an assignment without a report, as a report that counts is not taken back."""
    found = find_assignment(db, device, assignment, lock=True)
    if found.state == "reported":
        raise RefusedError("late", "this assignment is over (it has reported). Check in again.")
    return found


def prolong(db: Connection, found: Row[Any], now: int) -> int:
    """Extends an assignment's lease, up to the report deadline. Returns its end."""
    settings = settings_of(found.settings)
    end = now + settings.lease_ms
    if found.report_deadline_ms is not None:
        end = min(end, found.report_deadline_ms)
    if end > found.lease_ms and found.state == "active":
        db.execute(update(assignments).where(assignments.c.id == found.id).values(lease_ms=end))
    return max(end, found.lease_ms)


def known_assignments(
    db: Connection, ids: Sequence[str], *, lock: bool = True
) -> dict[str, Row[Any]]:
    """Returns assignments of any device by their ids, as `known_assignment` gives them."""
    if lock and db.dialect.name == "postgresql":  # on SQLite a writer is alone
        mine = select(assignments.c.round).where(assignments.c.id.in_(ids))
        here = select(rounds.c.id).where(rounds.c.id.in_(mine)).order_by(rounds.c.id)
        db.execute(here.with_for_update())
    return {row.id: row for row in db.execute(_FOUND, {"ids": list(ids)})}


# Built once: putting a statement together costs more than running it.
_FOUND = (
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
    .where(assignments.c.id.in_(bindparam("ids", expanding=True)))
)
