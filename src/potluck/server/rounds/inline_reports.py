"""Reports that bring their update with them: many at once, in one transaction.

    note the sequence numbers of the requests
    for each, as they came: whose is it, was it here before, what is in it?
    then all rows at once: reports with their updates, assignments; and the round closes at its goal

What holds of an update that is uploaded (`reports`) holds of these. An update stands in the row of
its report, so that one commit, and one fsync, makes everything of a batch durable; nobody is
answered before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from potluck.core import ProtocolError, RefusedError
from potluck.server.rounds.aggregate import Norms
from potluck.server.rounds.check_in import Look
from potluck.server.rounds.enrolment import note_sequences
from potluck.server.rounds.leases import (
    check_not_over,
    check_place,
    known_assignments,
    unknown_assignment,
)
from potluck.server.rounds.state_machine import close_round
from potluck.server.rounds.uploads import (
    Claims,
    check_claimed,
    check_content,
    conflict,
    end_part,
    enough,
    note_bad,
)
from potluck.server.storage import fault_points
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import assignments, reports


class Arrival(NamedTuple):
    """A report with its update, as it came in a request that was signed."""

    device: str
    sequence: int  # of the request; not noted before
    assignment: str
    round: int
    attempt: int
    claims: Claims
    body: bytes
    fault: ProtocolError | None = None  # what is wrong with it whatever the server knows


class Taken(NamedTuple):
    """A report that counts."""

    round: int
    attempt: int
    sha256: str
    retry_after_seconds: float
    is_goal: bool


Outcome: TypeAlias = Taken | RefusedError | ProtocolError


def take_in(database: Database, arrivals: Sequence[Arrival], now: int) -> list[Outcome]:
    """For each report whether it counts, or the RefusedError: replayed, revoked, unknown, late,
    conflict, digest: send it again; bad_update, not_finite, malformed: the device's part in this
    round is over. A `fault` is given back as it is."""
    with database.write() as db:
        intake = _Intake(db, arrivals, now)
        outcomes = intake.take(arrivals)
        fault_points.reach("arrive.inside")
    fault_points.reach("arrive.after")
    if intake.closed:
        fault_points.reach("close.after")
    return outcomes


class _Intake:
    """A batch inside its transaction."""

    def __init__(self, db: Connection, arrivals: Sequence[Arrival], now: int) -> None:
        self._db, self._now = db, now
        claims = [(arrival.device, arrival.sequence) for arrival in arrivals]
        self._turned_away = note_sequences(db, claims, now)
        self._found = known_assignments(db, sorted({a.assignment for a in arrivals}))
        places = {"rounds": sorted({row.round for row in self._found.values()})}
        names = {"devices": sorted({arrival.device for arrival in arrivals})}
        earlier = db.execute(_EARLIER, places | names)
        self._earlier = {(row.round, row.device): row.sha256 for row in earlier}
        self._count = Counter({row.round: row.taken for row in db.execute(_COUNTS, places)})
        self._new: dict[str, dict[str, Any]] = {}  # by assignment
        self._bad: dict[str, tuple[Row[Any], str]] = {}
        self.closed: set[str] = set()

    def take(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Decide about all of them, and write what follows."""
        outcomes: list[Outcome | Row[Any]] = []
        for arrival, error in zip(arrivals, self._turned_away, strict=True):
            try:
                if error is not None:
                    raise error
                outcomes.append(self._take(arrival))
            except (RefusedError, ProtocolError) as refused:
                outcomes.append(refused)
        self._write()
        return self._answers(arrivals, outcomes)

    def _take(self, arrival: Arrival) -> Row[Any]:
        found = self._found.get(arrival.assignment)
        if found is None or found.device != arrival.device:
            raise unknown_assignment(arrival.assignment)
        check_place(found, arrival.round, arrival.attempt)
        if arrival.fault is not None:
            raise arrival.fault
        place = (found.round, found.device)
        if place in self._earlier:
            if self._earlier[place] != arrival.claims.sha256:
                raise conflict()
            return found
        check_not_over(found)
        if found.id in self._bad:
            raise RefusedError("late", "this assignment is over. Check in again.")
        check_claimed(found, arrival.claims)
        norms = self._check(arrival, found)
        if self._count[found.round] >= found.goal:
            raise enough()
        self._accept(arrival, found, norms)
        return found

    def _check(self, arrival: Arrival, found: Row[Any]) -> Norms:
        try:
            return check_content(found, arrival.claims, iter((arrival.body,)))
        except RefusedError as error:
            if error.code != "digest":
                self._bad[found.id] = (found, str(error))
            raise

    def _accept(self, arrival: Arrival, found: Row[Any], norms: Norms) -> None:
        place = {"round": found.round, "device": found.device, "assignment": found.id}
        place |= {"client": found.client, "accepted_ms": self._now, "content": arrival.body}
        self._new[found.id] = place | asdict(arrival.claims) | norms._asdict()
        self._earlier[found.round, found.device] = arrival.claims.sha256
        self._count[found.round] += 1
        if self._count[found.round] == found.goal:
            self.closed.add(found.round)

    def _write(self) -> None:
        fault_points.reach("arrive.before-row")
        if self._new:
            self._db.execute(insert(reports), list(self._new.values()))
            self._db.execute(_DONE, {"ids": sorted(self._new)})
        over = [found for found, reason in self._bad.values() if end_part(self._db, found, reason)]
        for round in sorted(self.closed):
            close_round(self._db, round)
        for found in over:  # last, as the audit log's lock is held from then on
            note_bad(self._db, found, self._bad[found.id][1], self._now)

    def _answers(
        self, arrivals: Sequence[Arrival], outcomes: Sequence[Outcome | Row[Any]]
    ) -> list[Outcome]:
        names = [row.device for row in outcomes if isinstance(row, Row)]
        look = Look(self._db, names, self._now) if names else None
        answers: list[Outcome] = []
        for arrival, row in zip(arrivals, outcomes, strict=True):
            if isinstance(row, Row) and look is not None:
                seconds, is_goal = look.retry_after(row.device), row.round in self.closed
                told = (row.number, row.attempt, arrival.claims.sha256, seconds, is_goal)
                answers.append(Taken(*told))
            elif not isinstance(row, Row):
                answers.append(row)
        return answers


# Built once: putting a statement together costs more than running it.
_EARLIER = select(reports.c.round, reports.c.device, reports.c.sha256).where(
    reports.c.round.in_(bindparam("rounds", expanding=True)),
    reports.c.device.in_(bindparam("devices", expanding=True)),
)
_COUNTS = (
    select(reports.c.round, func.count().label("taken"))
    .where(reports.c.round.in_(bindparam("rounds", expanding=True)))
    .group_by(reports.c.round)
)
_DONE = (
    update(assignments)
    .where(assignments.c.id.in_(bindparam("ids", expanding=True)))
    .values(state="reported")
)
