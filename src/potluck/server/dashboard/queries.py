"""The queries of the dashboard, which any process of the run can make.

A round that is over does not change any more: it is read once (`Past`). So the cost of a query
depends on the new rounds alone, not on the history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, case, func, select

from potluck.core import higher_is_better
from potluck.core.plain_json import read_results
from potluck.server.rounds.bounds import read_lowered
from potluck.server.rounds.election import LEASE_SECONDS
from potluck.server.rounds.state_machine import LEASE_RAN_OUT
from potluck.server.storage.database import as_dict
from potluck.server.storage.database_tables import (
    OPEN,
    OPEN_ROUND,
    assignments,
    audit,
    devices,
    evaluations,
    leader,
    ledger,
    reports,
    rounds,
    runs,
)
from potluck.server.storage.stored_run import settings_of

LATELY_MS = 15 * 60_000
SHOWN_ROUNDS = 15
SHOWN_DEVICES = 20
_BATCH = 500
_SILENT = (assignments.c.state == "expired") & (assignments.c.reason == LEASE_RAN_OUT)


class AssignmentCounts(NamedTuple):
    """The assignments of a round by their outcome."""

    active: int = 0
    reported: int = 0
    silent: int = 0  # the lease ran out
    failed: int = 0  # the device gave up, or sent what cannot be used
    unneeded: int = 0  # the round was over first

    @property
    def assigned(self) -> int:
        return sum(self)

    @property
    def dropped(self) -> int:
        return self.silent + self.failed

    def __add__(self, other: tuple[int, ...]) -> AssignmentCounts:  # type: ignore[override]
        return AssignmentCounts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One attempt at a round."""

    id: str
    kind: str
    number: int
    attempt: int
    state: str
    reason: str
    goal: int
    minimum: int
    slots: int
    tally: AssignmentCounts
    opened_ms: int
    closed_ms: int | None
    deadline_ms: int | None
    loss: float | None
    median_loss: float | None
    uplink_bytes: int | None
    downlink_bytes: int | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of a committed one, as soon as they are there."""


class Past:
    """The rounds of a run that are over, in order, and what was evaluated; each read once."""

    def __init__(self) -> None:
        self.rounds: list[RoundRow] = []
        self.abandoned: list[RoundRow] = []
        self.history: list[RoundRow] = []
        self.tallies: dict[str, AssignmentCounts] = defaultdict(AssignmentCounts)
        self.scores: dict[str, list[tuple[int, float]]] = {}
        self.losses: dict[str, list[tuple[int, float]]] = {}
        self.bytes = (0, 0)  # up, down
        self._ids: set[str] = set()
        self._metrics: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        self._last_evaluated: dict[str, int] = {}  # kind: the last round

    def read(self, db: Connection, run: str) -> tuple[RoundRow, dict[str, AssignmentCounts]] | None:
        """Reads what is new. Returns the open round, with its tallies by device class."""
        self._read_evaluations(db, run)
        known = self.rounds[-1].number if self.rounds else 0
        found = [row for row in _rounds_from(db, run, known) if row.id not in self._ids]
        everything = select(func.count()).where(rounds.c.run == run)
        if self._ids and len(self._ids) + len(found) != db.scalar(everything):
            self.__init__()  # an earlier number again: the run went back to an older model
            return self.read(db, run)
        tallies = _tally(db, [row.id for row in found])
        current = None
        for row in found:
            made = self._made(row, tallies[row.id])
            if row.state in OPEN:
                current = (made, tallies[row.id])
            else:
                self._keep(made, tallies[row.id])
        return current

    def _made(self, row: Row[Any], tallies: Mapping[str, AssignmentCounts]) -> RoundRow:
        names = ("id", "kind", "number", "attempt", "state", "reason", "goal", "minimum", "slots")
        names += ("opened_ms", "closed_ms", "loss", "median_loss")
        names += ("uplink_bytes", "downlink_bytes")
        selecting = row.state == "SELECTING"
        kind = "central" if row.kind == "train" else "federated"
        return RoundRow(
            **{name: getattr(row, name) for name in names},
            tally=sum(tallies.values(), AssignmentCounts()),
            deadline_ms=row.selection_deadline_ms if selecting else row.report_deadline_ms,
            metrics=self._metrics[kind, row.number] if row.state == "COMMITTED" else {},
        )

    def _keep(self, row: RoundRow, tallies: Mapping[str, AssignmentCounts]) -> None:
        self._ids.add(row.id)
        self.rounds.append(row)
        for name, tally in tallies.items():
            self.tallies[name] += tally
        self.bytes = (
            self.bytes[0] + (row.uplink_bytes or 0),
            self.bytes[1] + (row.downlink_bytes or 0),
        )
        if row.state == "ABANDONED":
            self.abandoned.append(row)
        elif row.kind == "train":
            self.history.append(row)
            for name, loss in (("training", row.loss), ("training, median", row.median_loss)):
                if loss is not None:
                    self.losses.setdefault(name, []).append((row.number, loss))

    def _read_evaluations(self, db: Connection, run: str) -> None:
        """Reads new evaluations; those of either kind are in the order of their rounds."""
        here = evaluations.c.run == run
        for kind in ("central", "federated"):
            new = here & (evaluations.c.kind == kind)
            new &= evaluations.c.round > self._last_evaluated.get(kind, -1)
            for row in db.execute(select(evaluations).where(new).order_by(evaluations.c.round)):
                self._last_evaluated[kind] = row.round
                metrics = read_results(row.metrics)
                self._metrics[kind, row.round].update(metrics)
                where = {"central": "test", "federated": "on devices"}[kind]
                self._note_scores(where, row.round, metrics)
                self._note_scores(f"{where}, median", row.round, read_results(row.medians or "{}"))

    def _note_scores(self, where: str, number: int, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            name = where if metric in ("accuracy", "loss") else f"{metric}, {where}"
            curves = self.scores if higher_is_better(metric) else self.losses
            curves.setdefault(name, []).append((number, float(value)))


class ClassRow(NamedTuple):
    """The devices of one class, and the outcomes of their assignments."""

    name: str
    enrolled: int
    lately: int
    revoked: int
    tally: AssignmentCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The state of a run at one time."""

    name: str
    state: str
    reason: str
    committed: int
    num_rounds: int
    is_led: bool
    current: RoundRow | None
    latest: list[RoundRow]
    """The newest first."""
    abandoned: list[RoundRow]
    num_abandoned: int
    over: list[RoundRow]
    """All that are committed or abandoned, in order."""
    history: list[RoundRow]
    """The committed ones of kind train, in order."""
    scores: dict[str, list[tuple[int, float]]]
    losses: dict[str, list[tuple[int, float]]]
    uplink_bytes: int
    downlink_bytes: int
    classes: list[ClassRow]
    devices: list[dict[str, Any]]
    dropouts: list[dict[str, Any]]
    lowered: list[dict[str, Any]]


def read_mark(db: Connection, run: str) -> tuple[Any, ...]:
    """Reads a mark in one cheap query; it differs when something on the dashboard may have
    changed."""
    current = rounds.c.run == run, OPEN_ROUND
    here = select(rounds.c.id).where(*current).scalar_subquery()
    mine, done = assignments.c.round == here, reports.c.round == here
    central = evaluations.c.run == run, evaluations.c.kind == "central"
    judged = select(func.max(evaluations.c.round)).where(*central)
    query = select(
        runs.c.state,
        runs.c.round,
        runs.c.version,
        runs.c.attempt,
        select(func.max(audit.c.number)).scalar_subquery(),
        here,
        select(rounds.c.state).where(*current).scalar_subquery(),
        select(rounds.c.selection_deadline_ms).where(*current).scalar_subquery(),
        select(func.count()).where(mine).scalar_subquery(),
        select(func.count()).where(mine, assignments.c.state == "active").scalar_subquery(),
        select(func.count()).where(done).scalar_subquery(),
        judged.scalar_subquery(),
    ).where(runs.c.id == run)
    return tuple(db.execute(query).one())


def read_overview(db: Connection, run: str, now: int, past: Past) -> Overview:
    """Returns all that changes on the dashboard; `past` is what an earlier query has read."""
    row = db.execute(select(runs).where(runs.c.id == run)).one()
    opened = past.read(db, run)
    current, tallies = opened or (None, {})
    recent = past.rounds[-SHOWN_ROUNDS:] + ([] if current is None else [current])
    latest = recent[: -SHOWN_ROUNDS - 1 : -1]
    heartbeat = db.scalar(select(func.max(leader.c.heartbeat_ms))) or 0
    return Overview(
        name=row.name,
        state=row.state,
        reason=row.reason,
        committed=row.round,
        num_rounds=settings_of(row.settings).num_rounds,
        is_led=now - heartbeat < 2_000 * LEASE_SECONDS,
        current=current,
        latest=latest,
        abandoned=past.abandoned[:-11:-1],
        num_abandoned=len(past.abandoned),
        over=past.rounds,
        history=past.history,
        scores=past.scores,
        losses=past.losses,
        uplink_bytes=past.bytes[0],
        downlink_bytes=past.bytes[1],
        classes=_classes(db, run, now, past.tallies, tallies),
        devices=_devices(db, run, None if current is None else current.id),
        dropouts=_dropouts(db, [row.id for row in latest]),
        lowered=read_lowered(db, run),
    )


def _rounds_from(db: Connection, run: str, number: int) -> list[Row[Any]]:
    """Returns the rounds from this number on, in the order in which they were opened."""
    told = (ledger.c.loss, ledger.c.median_loss, ledger.c.uplink_bytes, ledger.c.downlink_bytes)
    kinds = rounds.c.kind.in_(("train", "evaluate"))
    query = (
        select(rounds, *told)
        .outerjoin(ledger, ledger.c.round == rounds.c.id)
        .where(rounds.c.run == run, kinds, rounds.c.number >= number)
        .order_by(rounds.c.opened_ms, rounds.c.attempt)
    )
    return list(db.execute(query).all())


def _tally(db: Connection, ids: Sequence[str]) -> dict[str, dict[str, AssignmentCounts]]:
    """Returns round id → device class → counts."""
    what = case(
        (_SILENT, "silent"),
        (assignments.c.state == "expired", "unneeded"),
        else_=assignments.c.state,
    )
    query = (
        select(assignments.c.round, devices.c.device_class, what, func.count())
        .join(devices, devices.c.id == assignments.c.device)
        .group_by(assignments.c.round, devices.c.device_class, what)
    )
    read: dict[str, dict[str, AssignmentCounts]] = {id: defaultdict(AssignmentCounts) for id in ids}
    for start in range(0, len(ids), _BATCH):
        these = assignments.c.round.in_(ids[start : start + _BATCH])
        for id, name, kind, count in db.execute(query.where(these)):
            read[id][name] += AssignmentCounts(**{kind: count})
    return read


def _classes(
    db: Connection,
    run: str,
    now: int,
    over: Mapping[str, AssignmentCounts],
    current: Mapping[str, AssignmentCounts],
) -> list[ClassRow]:
    here = devices.c.revoked_ms.is_(None)
    lately = case((here & (devices.c.seen_ms > now - LATELY_MS), 1), else_=0)
    query = (
        select(
            devices.c.device_class,
            func.count(),
            func.sum(lately),
            func.count(devices.c.revoked_ms),
        )
        .where(devices.c.run == run)
        .group_by(devices.c.device_class)
        .order_by(devices.c.device_class)
    )
    return [
        ClassRow(
            name,
            enrolled,
            seen or 0,
            revoked,
            over.get(name, AssignmentCounts()) + current.get(name, AssignmentCounts()),
        )
        for name, enrolled, seen, revoked in db.execute(query)
    ]


def _devices(db: Connection, run: str, round: str | None) -> list[dict[str, Any]]:
    """Returns the devices with the latest requests; those in the open round are at work."""
    names = ("id", "name", "device_class", "seen_ms", "revoked_ms")
    query = select(*(devices.c[name] for name in names)).where(devices.c.run == run)
    newest = query.order_by(devices.c.seen_ms.desc(), devices.c.client).limit(SHOWN_DEVICES)
    found = [as_dict(row) for row in db.execute(newest)]
    at_work = select(assignments.c.device).where(
        assignments.c.round == round, assignments.c.state == "active"
    )
    busy = set(db.scalars(at_work))
    return [row | {"is_busy": row["id"] in busy} for row in found]


def _dropouts(db: Connection, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the newest of the rounds `ids`: device, round and reason."""
    a = assignments.c
    shown = (devices.c.name, devices.c.id, rounds.c.number, rounds.c.attempt, a.reason)
    query = (
        select(*shown)
        .join(devices, devices.c.id == a.device)
        .join(rounds, rounds.c.id == a.round)
        .where(a.round.in_(ids), _SILENT | (a.state == "failed"))
        .order_by(a.assigned_ms.desc(), a.id)
        .limit(10)
    )
    return [dict(row) for row in db.execute(query).mappings()]
