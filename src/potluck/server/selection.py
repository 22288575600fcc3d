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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from potluck.core import RefusedError, derive_seed
from potluck.server import faults
from potluck.server.database import Database, one
from potluck.server.settings import RoundSettings, milliseconds, settings_of
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


Given: TypeAlias = Assigned | Wait | Finished | RefusedError


def check_in(
    database: Database, device: str, attributes: Attributes, now: int
) -> Assigned | Wait | Finished:
    """Give a device a slot in the open round, its old assignment again, or a time to come back.

    Raises:
        RefusedError: unknown, revoked.
    """
    (given,) = check_ins(database, [(device, attributes)], now)
    if isinstance(given, RefusedError):
        raise given
    return given


def check_ins(database: Database, asked: Sequence[tuple[str, Attributes]], now: int) -> list[Given]:
    """Answer many check-ins at once; the first come are the first to get a slot."""
    with database.read() as db:  # most check-ins end here, and write nothing
        look = Look(db, [device for device, _ in asked], now)
        answers = [look.answer(*one) for one in asked]
    left = [number for number, answer in enumerate(answers) if answer is None]
    if left:
        with database.write() as db:
            look = Look(db, [asked[number][0] for number in left], now, lock=True)
            for number in left:
                answers[number] = look.answer(*asked[number]) or look.assign(asked[number][0])
                faults.reach("check-in.inside")
        faults.reach("check-in.after")
    return [cast("Given", answer) for answer in answers]


def extend_lease(database: Database, device: str, assignment: str, now: int) -> float:
    """Note progress. Returns the seconds until the device must be heard of again.

    Raises:
        RefusedError: unknown; late: the assignment is over.
    """
    with database.write() as db:
        found = _find_active(db, device, assignment)
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
        found = _find_active(db, device, assignment)
        values = {"state": "failed", "reason": reason[:500]}
        db.execute(update(assignments).where(assignments.c.id == found.id).values(values))


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
        raise _unknown_device(device)
    if member.revoked_ms is not None:
        raise _revoked()
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
        raise RefusedError("unknown", f"got assignment={assignment!r}, which is none of yours.")
    if found.revoked_ms is not None:
        raise _revoked()
    return found


def check_not_over(found: Row[Any]) -> None:
    """Refuse what comes for an assignment that expired or failed, or whose round closed."""
    if found.state in ("expired", "failed") or (
        found.state == "active" and found.round_state not in _TAKING
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
        rounds.c.report_deadline_ms,
        runs.c.id.label("run"),
        runs.c.settings,
        runs.c.spec,
    )
    .join(devices, devices.c.id == assignments.c.device)
    .join(rounds, rounds.c.id == assignments.c.round)
    .join(runs, runs.c.id == rounds.c.run)
    .where(assignments.c.id == bindparam("assignment"), assignments.c.device == bindparam("device"))
)


class Look:
    """What check-ins are answered from: devices of one run and its open round, seen once."""

    def __init__(
        self, db: Connection, names: Sequence[str], now: int, *, lock: bool = False
    ) -> None:
        """With `lock` the round stays as it is until the transaction ends."""
        self._db, self._now = db, now
        found = db.execute(select(devices).where(devices.c.id.in_(set(names)))).all()
        self._members = {row.id: row for row in found}
        if not found:
            return
        self._run = db.execute(select(runs).where(runs.c.id == found[0].run)).one()
        self._settings = settings_of(self._run.settings)
        self._round = _open_round(db, self._run, lock=lock)
        self._start, self._window = self._pace()
        self._mine: dict[str, dict[str, Row[Any]]] = {}
        self._has_seen = False  # who takes part: not needed to say when to come back

    def member(self, device: str) -> Row[Any]:
        """A device that may take part.

        Raises:
            RefusedError: unknown, revoked.
        """
        member = self._members.get(device)
        if member is None or member.run != self._run.id:  # those of another run look like none
            raise _unknown_device(device)
        if member.revoked_ms is not None:
            raise _revoked()
        return member

    def answer(
        self, device: str, attributes: Attributes
    ) -> Assigned | Wait | Finished | RefusedError | None:
        """The answer to a check-in, or None: give it a slot."""
        try:
            member = self.member(device)
        except RefusedError as error:
            return error
        if self._run.state == "finished":
            return Finished(self._run.version)
        reason: WaitReason | None = "no round"
        if self._round is not None and self._round.state in _TAKING:
            if not self._has_seen:
                self._see_round(self._round)
            mine = self._mine.get(device, {})
            if "active" in mine:
                return self._describe(self._round, mine["active"])
            reason = self._obstacle(self._round, member, attributes)
        if self._run.state == "paused":
            reason = "paused"
        return None if reason is None else Wait(reason, self.retry_after(device))

    def assign(self, device: str) -> Assigned:
        """Give a slot to a device that nothing keeps from it."""
        round, member = self._round, self.member(device)
        assert round is not None
        if round.selection_deadline_ms is None:  # the first device starts the clock
            deadline = self._now + milliseconds(self._settings.selection_seconds)
            first = (rounds.c.id == round.id) & rounds.c.selection_deadline_ms.is_(None)
            values = {"selection_deadline_ms": deadline, "started_ms": self._now}
            self._db.execute(update(rounds).where(first).values(values))
        end = self._now + self._settings.lease_ms
        if round.report_deadline_ms is not None:
            end = min(end, round.report_deadline_ms)
        id = secrets.token_hex(16)
        values = {
            "id": id,
            "round": round.id,
            "device": device,
            "client": member.client,
            "state": "active",
            "reason": "",
            "assigned_ms": self._now,
            "lease_ms": end,
        }
        self._db.execute(insert(assignments).values(values))
        given = self._db.execute(select(assignments).where(assignments.c.id == id)).one()
        self._mine.setdefault(device, {})["active"] = given
        self._taken += 1
        return self._describe(round, given)

    def retry_after(self, device: str) -> float:
        """Seconds to the next round's expected start, plus U(0, window), the same at every asking.

        The window is as long as a round, and at most `pace_seconds`; but it grows with the
        population, so that at most a hundred devices check in in a second. Before rounds were
        measured there is nothing to wait for: a check-in may well be held until there is work.
        """
        number = 0 if self._round is None else self._round.number
        place = derive_seed(self._run.seed, "pace", number, self.member(device).client) / 2**63
        return round_up(self._start + place * self._window)

    def _see_round(self, round: Row[Any]) -> None:
        self._has_seen = True
        active = select(assignments).where(
            assignments.c.round == round.id,
            assignments.c.device.in_(self._members),
            assignments.c.state.in_(("active", "failed")),
        )
        for row in self._db.execute(active):
            self._mine.setdefault(row.device, {})[row.state] = row
        done = select(reports.c.device).where(
            reports.c.round == round.id, reports.c.device.in_(self._members)
        )
        self._done = set(self._db.scalars(done))
        taken = select(func.count()).where(
            assignments.c.round == round.id, assignments.c.state.in_(("active", "reported"))
        )
        self._taken = self._db.scalar(taken) or 0
        self._cohort = None if round.cohort is None else set(json.loads(round.cohort))
        version = (models.c.run == self._run.id) & (models.c.version == round.version)
        self._model = self._db.execute(select(models.c.sha256).where(version)).scalar_one()

    def _obstacle(
        self, round: Row[Any], member: Row[Any], attributes: Attributes
    ) -> WaitReason | None:
        if member.id in self._done:
            return "reported"
        if "failed" in self._mine.get(member.id, {}):
            return "failed"
        if not _is_eligible(self._settings, attributes):
            return "not eligible"
        if self._cohort is not None:
            return None if member.client in self._cohort else "not selected"
        return "slots taken" if self._taken >= round.slots else None

    def _pace(self) -> tuple[float, float]:
        """When the next round is expected, in seconds from now, and the window behind it."""
        run, round, start = self._run, self._round, 0.0
        length = _usual_seconds(self._db, run)
        if round is not None and round.state in _TAKING and round.started_ms is not None:
            start = max(length + (round.started_ms - self._now) / 1000, 0.0)
        last = select(func.max(devices.c.client)).where(devices.c.run == run.id)
        population = self._db.scalar(last) or 0
        return start, max(min(self._settings.pace_seconds, length), population / 100)

    def _describe(self, round: Row[Any], assignment: Row[Any]) -> Assigned:
        return Assigned(
            assignment=assignment.id,
            round=round.id,
            kind=round.kind,
            number=round.number,
            attempt=round.attempt,
            client=assignment.client,
            seed=self._run.seed,
            version=round.version,
            model_sha256=self._model,
            lease_seconds=max(assignment.lease_ms - self._now, 0) / 1000,
            deadline_ms=round.report_deadline_ms,
        )


def _is_eligible(settings: RoundSettings, attributes: Attributes) -> bool:
    return (
        (attributes.charging is True or not settings.needs_charging)
        and (attributes.idle is True or not settings.needs_idle)
        and (attributes.unmetered is True or not settings.needs_unmetered)
        and (attributes.free_memory_bytes or 0) >= settings.needs_memory_bytes
    )


def _open_round(db: Connection, run: Row[Any], *, lock: bool = False) -> Row[Any] | None:
    query = select(rounds).where(
        rounds.c.run == run.id, rounds.c.state.in_(("SELECTING", "TRAINING", "AGGREGATING"))
    )
    return one(db, query.with_for_update() if lock else query)


def _unknown_device(device: str) -> RefusedError:
    return RefusedError("unknown", f"a device must be enrolled, got device={device!r}. Enrol.")


def _revoked() -> RefusedError:
    return RefusedError("revoked", "this device was revoked. Ask whoever runs the server.")


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
