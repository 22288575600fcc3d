"""Devices that said that they cannot train in this run, and what becomes of rounds without them.

A device whose data do not fit the plan, or that has none, gives its assignment back with a reason
that does not pass, and ends. It is not expected any more: it is in no cohort and no goal, also of
the round that is open, which so does not wait for it. That such a round is abandoned is no strike
against the run. A device that checks in again is expected again: somebody mended its data.

A goal that the operator gave as a number falls by the devices that left, where no other is there to
take their place; its minimum, which is a part of it, falls too. Devices that may still enrol count.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, func, select, update

from potluck.core.plain_json import to_json
from potluck.protocol import FailureReason
from potluck.server import audit
from potluck.server.settings import RoundSettings, settings_of
from potluck.server.tables import assignments, devices, rounds

REASONS: tuple[FailureReason, ...] = ("unsupported", "no_data")
"""Why a device cannot train, now and later."""


class Present(NamedTuple):
    """The devices of a run."""

    clients: list[int]
    """Of those that are expected to take part, in order."""
    num_left: int
    """That said that they cannot."""


def present(db: Connection, run: str) -> Present:
    """Who is enrolled and was not revoked, and of these who has left."""
    query = select(devices.c.client, devices.c.left).where(
        devices.c.run == run, devices.c.revoked_ms.is_(None)
    )
    rows = db.execute(query.order_by(devices.c.client)).all()
    expected = [client for client, left in rows if left is None]
    return Present(expected, len(rows) - len(expected))


def counted(db: Connection, run: str) -> tuple[int, int]:
    """How many are enrolled and were not revoked, and how many of these have left."""
    here = (devices.c.run == run) & devices.c.revoked_ms.is_(None)
    query = select(func.count(), func.count(devices.c.left)).where(here)
    enrolled, left = db.execute(query).one()
    return enrolled, left


def goal_among(settings: RoundSettings, here: Present) -> int:
    """The goal of an open round among these devices."""
    expected = len(here.clients)
    goal = settings.goal_of(expected)
    return min(goal, max(expected, goal - here.num_left))


def leave(db: Connection, found: Row[Any], reason: str, now: int) -> None:
    """A device gives an assignment of training back for good; its round is locked."""
    db.execute(update(devices).where(devices.c.id == found.device).values(left=reason))
    settings = settings_of(found.settings)
    changes: dict[str, Any] = {}
    if found.cohort is None:
        goal = min(found.goal, goal_among(settings, present(db, found.run)))
    else:
        cohort = [client for client in json.loads(found.cohort) if client != found.client]
        goal = len(cohort)
        changes = {"cohort": to_json(cohort), "slots": goal}
    changes |= {"goal": goal, "minimum": min(found.minimum, settings.minimum_of(goal))}
    if goal == 0:
        changes["report_deadline_ms"] = now  # nobody is left to wait for
    db.execute(update(rounds).where(rounds.c.id == found.round).values(changes))
    detail = {"reason": reason, "round": found.number}
    audit.append(db, now, f"device {found.device}", "leave", run=found.run, **detail)


def is_left(db: Connection, round: str) -> bool:
    """Whether a device left in this round."""
    left = (assignments.c.round == round) & (assignments.c.state == "failed")
    query = select(func.count()).where(left, assignments.c.reason.in_(REASONS))
    return bool(db.scalar(query))
