"""Devices that are no longer expected, and the rounds without them.

A device whose data do not fit the plan, or that has none, gives its assignment back with a
permanent reason, and ends. It is not expected any more: it is in no cohort and no goal, also of the
open round, which so does not wait for it. If that round is abandoned, it is no strike against the
run. A revoked device is treated alike.

Nor is a device expected that was silent in two drawn rounds in a row: it neither reported nor gave
a reason. A drawn round is no strike, either, if a device of it never asked for work.

A device that checks in again is expected again: its data were mended, or it was switched on.

A goal that the operator gave as a number falls by the devices that are gone, where there are no
others to replace them. Its minimum, which is a part of it, falls too. Devices that may still enrol
count.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, case, func, select, update

from potluck.config.round_settings import RoundSettings
from potluck.core.plain_json import to_json
from potluck.protocol import FailureReason
from potluck.server.storage import audit
from potluck.server.storage.database_tables import (
    OPEN_ROUND,
    TAKING,
    assignments,
    devices,
    reports,
    rounds,
    runs,
)
from potluck.server.storage.stored_run import settings_of

REASONS: tuple[FailureReason, ...] = ("unsupported", "no_data", "declined")
"""Why a device does not train, now and later."""
REVOKED = "the device was revoked"
"""Why its assignment failed."""
MISSED, SILENT = "missed", "silent"
"""Of a device that was silent in the last drawn round; and in the one before, too."""


class Present(NamedTuple):
    """The devices of a run."""

    clients: list[int]
    """The clients that are expected to take part, in order."""
    num_gone: int
    """The other clients: revoked, silent, or not able to."""


def present(db: Connection, run: str) -> Present:
    """Returns the expected devices among those that ever enrolled."""
    query = select(devices.c.client).where(devices.c.run == run)
    expected = list(db.scalars(query.where(_EXPECTED).order_by(devices.c.client)))
    enrolled = db.scalar(select(func.count()).where(devices.c.run == run)) or 0
    return Present(expected, enrolled - len(expected))


def counted(db: Connection, run: str) -> tuple[int, int]:
    """Returns how many are enrolled and not revoked, and how many of these are not expected."""
    here = (devices.c.run == run) & devices.c.revoked_ms.is_(None)
    enrolled = db.scalar(select(func.count()).where(here)) or 0
    expected = db.scalar(select(func.count()).where(here & _EXPECTED)) or 0
    return enrolled, enrolled - expected


def goal_among(settings: RoundSettings, here: Present) -> int:
    """Returns the goal of an open round among these devices."""
    expected = len(here.clients)
    goal = settings.goal_of(expected)
    return min(goal, max(expected, goal - here.num_gone))


def leave(db: Connection, found: Row[Any], reason: str, now: int) -> None:
    """Takes an assignment of training back for good; its round is locked."""
    db.execute(update(devices).where(devices.c.id == found.device).values(left=reason))
    here = select(rounds).where(rounds.c.id == found.round)
    _do_without(db, db.execute(here).one(), found.client, settings_of(found.settings), now)
    detail = {"reason": reason, "round": found.number}
    audit.append(db, now, f"device {found.device}", "leave", run=found.run, **detail)


def revoked(db: Connection, device: str, now: int) -> None:
    """Takes a revoked device out of the open round, which does not wait for it. Its reports
    count."""
    columns = (devices.c.client, runs.c.id, runs.c.settings)
    mine = select(*columns).select_from(devices.join(runs)).where(devices.c.id == device)
    client, run, settings = db.execute(mine).one()
    here = select(rounds).where(rounds.c.run == run, OPEN_ROUND)
    round = db.execute(here.with_for_update()).one_or_none()
    active = (assignments.c.device == device) & (assignments.c.state == "active")
    db.execute(update(assignments).where(active).values(state="failed", reason=REVOKED))
    if round is not None and round.state in TAKING:
        reported = (reports.c.round == round.id) & (reports.c.device == device)
        if db.execute(select(reports.c.device).where(reported)).one_or_none() is None:
            _do_without(db, round, client, settings_of(settings), now)


def note_silent(db: Connection, round: Row[Any]) -> bool:
    """Notes who of a drawn round's cohort was silent, and who was not, at its end.

    Returns whether one of them never asked for work.
    """
    if round.cohort is None:
        return False
    told = select(assignments.c.client).where(assignments.c.round == round.id)
    spoke = {*db.scalars(told.where(assignments.c.state.in_(("reported", "failed"))))}
    silent = {*json.loads(round.cohort)} - spoke
    mine = (devices.c.run == round.run) & devices.c.revoked_ms.is_(None)
    there = mine & devices.c.client.in_(silent) & _EXPECTED
    again = case((devices.c.left == MISSED, SILENT), else_=MISSED)
    db.execute(update(devices).where(there).values(left=again))
    return bool(silent - {*db.scalars(told)})


def is_excused(db: Connection, round: str) -> bool:
    """Returns whether a device left in this round, or was revoked."""
    left = (assignments.c.round == round) & (assignments.c.state == "failed")
    query = select(func.count()).where(left, assignments.c.reason.in_((*REASONS, REVOKED)))
    return bool(db.scalar(query))


def _do_without(
    db: Connection, round: Row[Any], client: int, settings: RoundSettings, now: int
) -> None:
    """Lets an open round's goal and minimum fall to those that are still expected."""
    changes: dict[str, Any] = {}
    if round.cohort is None:
        goal = min(round.goal, goal_among(settings, present(db, round.run)))
    else:
        cohort = [other for other in json.loads(round.cohort) if other != client]
        goal = len(cohort)
        changes = {"cohort": to_json(cohort), "slots": goal}
    changes |= {"goal": goal, "minimum": min(round.minimum, settings.minimum_of(goal))}
    if goal == 0:
        changes["report_deadline_ms"] = now  # no device is left to wait for
    db.execute(update(rounds).where(rounds.c.id == round.id).values(changes))


_EXPECTED = devices.c.revoked_ms.is_(None) & (devices.c.left.is_(None) | (devices.c.left == MISSED))
