"""The acceptance of reports: one for each device and round, whichever way its update came.

A report is identified by device and round, and an attempt is a round of its own. The same digest
again is answered as the first time, also when the round is over. Another digest is a conflict.
Uploads (`uploads`), updates inside messages (`inline_reports`) and metrics are all accepted here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from potluck.core import CodedError, RefusedError, update_bytes
from potluck.core.plain_json import to_json
from potluck.protocol import Accepted, Codec, Evaluation, Report
from potluck.server.rounds.aggregate import Norms, check_claims, check_update
from potluck.server.rounds.check_in import CheckInBatch
from potluck.server.rounds.leases import check_not_over, check_place, known_assignment
from potluck.server.rounds.scoring import checked_sums
from potluck.server.rounds.state_machine import ENOUGH, close_round
from potluck.server.storage import audit
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import assignments, reports, runs
from potluck.server.storage.stored_run import settings_of
from potluck.server.storage.vectors import read_spec

CLAIMED = ("sha256", "num_bytes", "codec", "weight", "loss", "num_steps")
"""The columns of a device's claims about its update."""


class Intake:
    """The reports of one transaction: those that count, and their rows."""

    def __init__(self, db: Connection, found: Iterable[Row[Any]], now: int) -> None:
        """`found`: all assignments that are reported for, as `known_assignment` gives them."""
        self._db, self._now = db, now
        rows = list(found)
        rounds, devices = ({row.round for row in rows}, {row.device for row in rows})
        self._rounds = {"rounds": sorted(rounds)}
        earlier = db.execute(_EARLIER, self._rounds | {"devices": sorted(devices)})
        self._earlier = {(row.round, row.device): row.sha256 for row in earlier}
        self._counts: Counter[str] | None = None
        self._new: list[dict[str, Any]] = []
        self._bad: dict[str, tuple[Row[Any], str]] = {}
        self.closed: set[str] = set()
        """The rounds that have their goal with these reports."""

    def check(
        self, found: Row[Any], message: Report, codec: Codec, fault: CodedError | None = None
    ) -> bool:
        """Returns whether this report counts already. If not, its claims are checked.

        Args:
            codec: the run's.
            fault: of the update inside the message, if it has one.

        Raises:
            RefusedError: malformed, wrong_length, conflict, late, bounds.
        """
        check_place(found, message.round, message.attempt)
        if message.codec != codec:
            raise RefusedError("malformed", f"codec must be {codec}, got {message.codec}")
        expected = _update_bytes(codec, found.spec)
        if message.length_bytes != expected:
            raise RefusedError(
                "wrong_length",
                f"an update must have {expected} bytes, got length_bytes="
                f"{message.length_bytes}. Encode the whole vector.",
            )
        if fault is not None:
            raise fault
        if self.has(found, message.sha256):
            return True
        if found.id in self._bad:
            raise RefusedError("late", "this assignment is over. Check in again.")
        if found.kind != "train":
            raise RefusedError("malformed", "this assignment asks for metrics.")
        rules = settings_of(found.settings)
        check_claims(rules, weight=message.weight, loss=message.loss, num_steps=message.num_steps)
        return False

    def has(self, found: Row[Any], sha256: str) -> bool:
        """Returns whether this report counts already.

        It may count by another assignment of its device in the round, after the lease of this one
        ran out.

        Raises:
            RefusedError: conflict: another one counts; late: none does, and the assignment is over.
        """
        earlier = self._earlier.get((found.round, found.device))
        if earlier is None:
            check_not_over(found)
        elif earlier != sha256:
            raise RefusedError("conflict", "another report of this device counts in this round.")
        return earlier is not None

    def add(self, found: Row[Any], values: Mapping[str, Any]) -> None:
        """Lets a report count, once `conclude` is called.

        Raises:
            RefusedError: late: the round has all it needs.
        """
        if self._counts is None:
            counts = self._db.execute(_COUNTS, self._rounds)
            self._counts = Counter({row.round: row.taken for row in counts})
        if self._counts[found.round] >= found.goal:
            raise RefusedError("late", f"{ENOUGH}. Check in again.")
        place = {"round": found.round, "device": found.device, "assignment": found.id}
        self._new.append({**values, **place, "client": found.client, "accepted_ms": self._now})
        self._earlier[found.round, found.device] = values["sha256"]
        self._counts[found.round] += 1
        if self._counts[found.round] == found.goal:
            self.closed.add(found.round)

    def reject(self, found: Row[Any], reason: str) -> None:
        """Ends an assignment whose update can be part of no model, once `conclude` is called."""
        self._bad[found.id] = (found, reason)

    def conclude(self, counting: Iterable[Row[Any]]) -> list[Accepted]:
        """Writes the decisions, and closes the rounds that have their goal.

        Returns the answers to the devices whose reports count, now or since earlier.
        """
        if self._new:
            self._db.execute(insert(reports), self._new)
            self._db.execute(_DONE, {"ids": sorted(row["assignment"] for row in self._new)})
        over = [one for one in self._bad.values() if _fail(self._db, *one)]
        for round in sorted(self.closed):
            close_round(self._db, round)
        for found, reason in over:  # last, as the audit log's lock is held from then on
            told = {"round": found.round, "reason": reason}
            audit.append(self._db, self._now, f"device {found.device}", "bad update", **told)
        rows = list(counting)
        if not rows:
            return []
        batch = CheckInBatch(self._db, [row.device for row in rows], self._now)
        return [
            Accepted(
                round=row.number,
                attempt=row.attempt,
                sha256=self._earlier[row.round, row.device],
                retry_after_seconds=batch.retry_after(row.device),
            )
            for row in rows
        ]


def earlier_answer(db: Connection, found: Row[Any], sha256: str, now: int) -> Accepted | None:
    """Returns the answer of the first time, if this report counts already.

    Raises:
        RefusedError: as `Intake.has`.
    """
    intake = Intake(db, [found], now)
    return intake.conclude([found])[0] if intake.has(found, sha256) else None


def report_metrics(context: Context, device: str, message: Evaluation, sha256: str) -> Accepted:
    """Reports a federated evaluation; `sha256` is that of the message's bytes.

    Raises:
        RefusedError: not_found, malformed, late, conflict, bounds.
    """
    metrics = {k: (float(s), float(n)) for k, (s, n) in sorted(message.metrics.items())}
    digest = hashlib.sha256(to_json(metrics).encode()).hexdigest()
    with context.database.write() as db:
        found = known_assignment(db, device, message.assignment, lock=True)
        check_place(found, message.round, message.attempt)
        intake = Intake(db, [found], context.now())
        if not intake.has(found, digest):
            if found.kind != "evaluate":
                raise RefusedError("malformed", "this assignment asks for an update.")
            plan = db.execute(select(runs.c.plan).where(runs.c.id == found.run)).scalar_one()
            text = to_json(checked_sums(metrics, plan))
            values = {"sha256": digest, "num_bytes": len(text), "codec": "json", "metrics": text}
            intake.add(found, values | {"weight": 1.0, "loss": 0.0, "num_steps": 0})
        [answer] = intake.conclude([found])
    if intake.closed:
        context.on_goal()
    return answer.model_copy(update={"sha256": sha256})


def columns_of(message: Report) -> dict[str, Any]:
    """Returns a device's claims about its update, by the names of the columns."""
    return {
        name: message.length_bytes if name == "num_bytes" else getattr(message, name)
        for name in CLAIMED
    }


def check_content(found: Row[Any], claims: Report | Row[Any], pieces: Iterator[bytes]) -> Norms:
    """Reads an update that was claimed for an assignment; `claims` may be the row of an upload.

    Raises:
        RefusedError: as `check_update`.
    """
    return check_update(
        pieces,
        claims.codec,
        read_spec(found.spec),
        claims.sha256,
        weight=claims.weight,
        slots=found.slots,
        settings=settings_of(found.settings),
    )


@lru_cache(maxsize=64)
def _update_bytes(codec: Codec, spec: str) -> int:
    return update_bytes(codec, read_spec(spec))


def _fail(db: Connection, found: Row[Any], reason: str) -> bool:
    """Ends an assignment, if it is still active."""
    active = (assignments.c.id == found.id) & (assignments.c.state == "active")
    values = {"state": "failed", "reason": reason[:500]}
    return db.execute(update(assignments).where(active).values(values)).rowcount == 1


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
