"""Answers check-ins from one read of the devices, their run and its open round.

A device gets a slot, or the time to wait: until the next round is expected to begin, plus its own
part of a window. So a thousand devices do not come at once (pace steering). The expectation is what
was measured, and nothing at first. A device that checks in again gets the same assignment, so a
restarted one goes on where it was.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import BindParameter, Connection, Row, bindparam, func, insert, select, update

from potluck.config.round_settings import RoundSettings, milliseconds
from potluck.core import RefusedError, derive_seed
from potluck.protocol import Eligibility, Finished, Wait, WaitReason
from potluck.server.rounds.enrolment import note_sequences, revoked, unknown_device
from potluck.server.rounds.state_machine import open_round_of, usual_seconds
from potluck.server.storage import fault_points
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import (
    TAKING,
    assignments,
    devices,
    models,
    reports,
    rounds,
    runs,
)
from potluck.server.storage.stored_run import settings_of

_LONGEST_SECONDS = 86_400.0


class Assigned(NamedTuple):
    """A device's work in one round: the content of `protocol.Assignment`, with a manifest."""

    assignment: str
    round: str
    kind: Literal["train", "evaluate"]
    number: int
    attempt: int
    client: int  # the device's index in random streams
    seed: int
    version: int  # of the model to start from
    model_sha256: str
    lease_seconds: int
    deadline_ms: int
    epoch: int
    num_rounds: int  # of the run, as it is now
    model: bytes | None = None  # if it is small


CheckInAnswer: TypeAlias = Assigned | Wait | Finished | RefusedError


class CheckInRequest(NamedTuple):
    """A check-in."""

    device: str
    eligibility: Eligibility | None  # None: only the number is to be noted
    sequence: int | None = None  # of its request, where it was not noted before


class Member(NamedTuple):
    """A device of a run."""

    id: str
    run: str
    client: int
    revoked_ms: int | None
    left: str | None


class Slot(NamedTuple):
    """An active assignment, as far as its device needs it."""

    id: str
    client: int
    lease_ms: int


def check_ins(context: Context, asked: Sequence[CheckInRequest]) -> list[CheckInAnswer | None]:
    """Answers many check-ins at once; slots go in the order of arrival.

    None where only a sequence number was to be noted, and it is.
    """
    batch, now = None, context.now()
    names = [one.device for one in asked]
    if all(one.sequence is None for one in asked):
        with context.database.read() as db:  # most end here, and write nothing
            batch = CheckInBatch(db, names, now)
            answers = [_answer(batch, one) for one in asked]
            left = batch.left(asked)
        if None not in answers and not left:
            return answers
    with context.database.write() as db:
        turned = _turned_away(db, asked, now)
        batch = CheckInBatch(db, names, now, before=batch)
        batch.expect(asked)
        answers = [turned.get(n) or _answer(batch, one) for n, one in enumerate(asked)]
        left = [n for n, one in enumerate(asked) if answers[n] is None and one.eligibility]
        if left:
            batch.lock()
        for number in left:
            answers[number] = _answer(batch, asked[number]) or batch.assign(asked[number].device)
        batch.write()
        for _ in left:
            fault_points.reach("check-in.inside")
    if left:
        fault_points.reach("check-in.after")
    return answers


def _turned_away(
    db: Connection, asked: Sequence[CheckInRequest], now: int
) -> dict[int, RefusedError]:
    """Notes the sequence numbers that are new, and returns the refusals of the others by place."""
    places = [n for n, one in enumerate(asked) if one.sequence is not None]
    claims = [(asked[n].device, asked[n].sequence or 0) for n in places]
    refused = note_sequences(db, claims, now) if claims else []
    return {n: error for n, error in zip(places, refused, strict=True) if error is not None}


def _answer(batch: CheckInBatch, asked: CheckInRequest) -> CheckInAnswer | None:
    return None if asked.eligibility is None else batch.answer(asked.device, asked.eligibility)


def wait(context: Context, device: str, reason: WaitReason) -> Wait:
    """Returns when a device that is done, or cannot take part, should check in.

    Raises:
        RefusedError: not_found; unknown: it was revoked.
    """
    with context.database.read() as db:
        return CheckInBatch(db, [device], context.now()).wait(device, reason)


class CheckInBatch:
    """The devices of one run and its open round, read in one transaction."""

    def __init__(
        self, db: Connection, names: Sequence[str], now: int, *, before: CheckInBatch | None = None
    ) -> None:
        """`before`: a read of the same devices, just now; what hardly changes is taken from it."""
        self._db, self._now = db, now
        self._round: Row[Any] | None = None
        self._length = 0.0
        self._new: list[dict[str, Any]] = []
        self._has_seen = False  # who takes part: not needed to say when to come back
        found = [Member(*row) for row in db.execute(_MEMBERS, {"names": sorted(set(names))})]
        self._members = {member.id: member for member in found}
        if not found:
            return
        run = found[0].run
        self._run = db.execute(_RUN, {"run": run}).one()
        self._settings = settings_of(self._run.settings)
        self._round = open_round_of(db, run)
        cohort = None if self._round is None else self._round.cohort
        self._cohort = None if cohort is None else set(json.loads(cohort))
        self._length = usual_seconds(db, run, self._settings) if before is None else before._length
        self._start, self._window = self._pace()

    def lock(self) -> None:
        """Reads the round once more, which stays as it is until the end of the transaction."""
        if self._db.dialect.name == "postgresql":  # on SQLite a writer is alone
            self._round = open_round_of(self._db, self._run.id, lock=True)
            self._has_seen = False

    def left(self, asked: Sequence[CheckInRequest]) -> list[str]:
        """Returns those that were not expected, as they could not train or were silent, and now
        can."""
        return [
            device
            for device, eligibility, _ in asked
            if eligibility is not None
            and device in self._members
            and self._members[device].left
            and _is_eligible(self._settings, eligibility)
        ]

    def expect(self, asked: Sequence[CheckInRequest]) -> None:
        """Expects these again, as they ask for work."""
        back = self.left(asked)
        if back:
            self._db.execute(update(devices).where(devices.c.id.in_(back)).values(left=None))

    def member(self, device: str) -> Member:
        """Returns a device that may take part.

        Raises:
            RefusedError: not_found; unknown: it was revoked.
        """
        member = self._members.get(device)
        if member is None or member.run != self._run.id:  # those of another run look like none
            raise unknown_device(device)
        if member.revoked_ms is not None:
            raise revoked()
        return member

    def answer(
        self, device: str, eligibility: Eligibility
    ) -> Assigned | Wait | Finished | RefusedError | None:
        """Returns the answer to a check-in, or None if the device is to get a slot."""
        try:
            member = self.member(device)
        except RefusedError as error:
            return error
        if self._run.state == "finished":
            return Finished(run=self._run.name, rounds=self._run.version)
        reason: WaitReason | None = "between_rounds"
        if self._cohort is not None and member.client not in self._cohort:
            reason = "not_selected"
        if self._round is not None and self._round.state in TAKING:
            if not self._has_seen:
                self._see_round(self._round)
            if device in self._active:
                return self._describe(self._round, self._active[device])
            reason = self._obstacle(self._round, member, eligibility)
        if self._run.state == "paused":
            reason = "paused"
        return None if reason is None else self.wait(device, reason)

    def wait(self, device: str, reason: WaitReason) -> Wait:
        """Returns why a device has no work now, and when to come back."""
        return Wait(retry_after_seconds=self.retry_after(device), reason=reason)

    def assign(self, device: str) -> Assigned:
        """Gives a slot to a device that may have it, once `write` is called."""
        round, member = self._round, self.member(device)
        assert round is not None
        end = self._now + self._settings.lease_ms
        if round.report_deadline_ms is not None:
            end = min(end, round.report_deadline_ms)
        slot = Slot(secrets.token_hex(16), member.client, end)
        place = {"round": round.id, "device": device, "assigned_ms": self._now}
        self._new.append(slot._asdict() | place | {"state": "active", "reason": ""})
        self._active[device] = slot
        self._taken += 1
        return self._describe(round, slot)

    def write(self) -> None:
        """Writes the slots that were given."""
        round = self._round
        if not self._new or round is None:
            return
        if round.started_ms is None:  # the first device starts the clock
            deadline = self._now + milliseconds(self._settings.selection_seconds)
            self._db.execute(_START, {"round": round.id, "deadline": deadline, "now": self._now})
        self._db.execute(_ASSIGN, self._new)
        self._new = []

    def retry_after(self, device: str) -> float:
        """Returns the seconds to the next round's expected start, plus U(0, window).

        They are the same at every check-in.

        The window is as long as a round, and at most `pace_seconds`; but it grows with the
        population, so that at most a hundred devices check in in a second. Before rounds were
        measured there is nothing to wait for, and a check-in may be held until there is work.
        """
        number = 0 if self._round is None else self._round.number
        place = derive_seed(self._run.seed, "pace", number, self.member(device).client) / 2**63
        return min(round_up(self._start + place * self._window), _LONGEST_SECONDS)

    def _see_round(self, round: Row[Any]) -> None:
        self._has_seen = True
        here = {"round": round.id, "names": sorted(self._members)}
        mine = self._db.execute(_MINE, here).all()
        self._active = {
            row.device: Slot(row.id, row.client, row.lease_ms)
            for row in mine
            if row.state == "active"
        }
        self._failed = {row.device for row in mine if row.state == "failed"}
        self._done = set(self._db.scalars(_DONE, here))
        self._taken = self._db.scalar(_TAKEN, {"round": round.id}) or 0
        version = {"run": self._run.id, "version": round.version}
        self._model = self._db.execute(_MODEL, version).one()

    def _obstacle(
        self, round: Row[Any], member: Member, eligibility: Eligibility
    ) -> WaitReason | None:
        if member.id in self._done or member.id in self._failed:
            return "between_rounds"
        if not _is_eligible(self._settings, eligibility):
            return "ineligible"
        if self._cohort is not None:
            return None if member.client in self._cohort else "not_selected"
        return "full" if self._taken >= round.slots else None

    def _pace(self) -> tuple[float, float]:
        """Returns the seconds until the next expected round, and the window behind it."""
        run, round, start = self._run, self._round, 0.0
        if round is not None and round.state in TAKING and round.started_ms is not None:
            start = max(self._length + (round.started_ms - self._now) / 1000, 0.0)
        least = (run.last_client or 0) / 100
        return start, max(min(self._settings.pace_seconds, self._length), least)

    def _describe(self, round: Row[Any], slot: Slot) -> Assigned:
        rules = self._settings
        latest = self._now + milliseconds(rules.selection_seconds + rules.report_seconds)
        return Assigned(
            assignment=slot.id,
            round=round.id,
            kind=round.kind,
            number=round.number,
            attempt=round.attempt,
            client=slot.client,
            seed=self._run.seed,
            version=round.version,
            model_sha256=self._model.sha256,
            lease_seconds=lease_seconds(slot.lease_ms - self._now),
            deadline_ms=round.report_deadline_ms or latest,
            epoch=self._run.epoch,
            num_rounds=rules.num_rounds,
            model=self._model.content,
        )


def _is_eligible(settings: RoundSettings, eligibility: Eligibility) -> bool:
    return (
        (eligibility.charging is True or not settings.needs_charging)
        and (eligibility.idle is True or not settings.needs_idle)
        and (eligibility.unmetered is True or not settings.needs_unmetered)
        and (eligibility.free_memory_bytes or 0) >= settings.needs_memory_bytes
    )


def round_up(seconds: float) -> float:
    """Rounds up to a tenth of a second, and never to zero: a device must not spin."""
    return max(round(seconds, 1), 0.1)


def lease_seconds(left_ms: int) -> int:
    """Returns the rest of a lease, in whole seconds as the protocol has them."""
    return min(max(left_ms // 1000, 1), 604_800)


# Built once: putting a statement together costs more than running it.
_NAMES: BindParameter[Any] = bindparam("names", expanding=True)
_MEMBERS = select(
    devices.c.id, devices.c.run, devices.c.client, devices.c.revoked_ms, devices.c.left
).where(devices.c.id.in_(_NAMES))
_LAST = select(func.max(devices.c.client)).where(devices.c.run == runs.c.id)
_RUN = select(
    runs.c.id,
    runs.c.name,
    runs.c.state,
    runs.c.version,
    runs.c.seed,
    runs.c.epoch,
    runs.c.settings,
    _LAST.scalar_subquery().label("last_client"),
).where(runs.c.id == bindparam("run"))
_MINE = select(
    assignments.c.id,
    assignments.c.device,
    assignments.c.client,
    assignments.c.state,
    assignments.c.lease_ms,
).where(
    assignments.c.round == bindparam("round"),
    assignments.c.device.in_(_NAMES),
    assignments.c.state.in_(("active", "failed")),
)
_DONE = select(reports.c.device).where(
    reports.c.round == bindparam("round"), reports.c.device.in_(_NAMES)
)
_TAKEN = select(func.count()).where(
    assignments.c.round == bindparam("round"), assignments.c.state.in_(("active", "reported"))
)
_MODEL = select(models.c.sha256, models.c.content).where(
    models.c.run == bindparam("run"), models.c.version == bindparam("version")
)
_ASSIGN = insert(assignments)
_START = (
    update(rounds)
    .where(rounds.c.id == bindparam("round"), rounds.c.started_ms.is_(None))
    .values(selection_deadline_ms=bindparam("deadline"), started_ms=bindparam("now"))
)
