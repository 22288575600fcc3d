"""What the dashboard shows of a run, read from the database; any process of the run can.

A round that is over does not change any more: its devices are counted once (`Tallies`). So a look
costs the rounds that are new, not the history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, case, func, select

from potluck.core import higher_is_better
from potluck.core.plain_json import read_results
from potluck.server.database import as_dict
from potluck.server.leader import LEASE_SECONDS
from potluck.server.look import open_round_of
from potluck.server.rounds import LEASE_RAN_OUT
from potluck.server.settings import RoundSettings
from potluck.server.tables import (
    OPEN,
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

LATELY_MS = 15 * 60_000
SHOWN_ROUNDS = 15
SHOWN_DEVICES = 20
_BATCH = 500
_SILENT = (assignments.c.state == "expired") & (assignments.c.reason == LEASE_RAN_OUT)


class Tally(NamedTuple):
    """Assignments by what became of them."""

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

    def __add__(self, other: tuple[int, ...]) -> Tally:  # type: ignore[override]
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


class Tallies:
    """The tallies of rounds by device class; those of rounds that are over are kept."""

    def __init__(self) -> None:
        self._over: dict[str, dict[str, Tally]] = {}

    def read(self, db: Connection, found: Sequence[Row[Any]]) -> dict[str, dict[str, Tally]]:
        """Round id → device class → tally."""
        new = [row.id for row in found if row.id not in self._over]
        read: dict[str, dict[str, Tally]] = {id: {} for id in new}
        for start in range(0, len(new), _BATCH):
            for round, kind, what, count in _tally(db, new[start : start + _BATCH]):
                tally = read[round].get(kind, Tally())
                read[round][kind] = tally + Tally(**{what: count})
        over = {row.id for row in found if row.state not in OPEN}
        self._over |= {id: tally for id, tally in read.items() if id in over}
        return self._over | read


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One attempt at a round."""

    kind: str
    number: int
    attempt: int
    state: str
    reason: str
    goal: int
    minimum: int
    slots: int
    tally: Tally
    opened_ms: int
    closed_ms: int | None
    deadline_ms: int | None
    loss: float | None
    uplink_bytes: int | None
    downlink_bytes: int | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class ClassRow(NamedTuple):
    """The devices of one class, and what became of their assignments."""

    name: str
    enrolled: int
    lately: int
    revoked: int
    tally: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A run at some time."""

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
    history: list[RoundRow]
    """The committed ones of kind train, in order."""
    scores: dict[str, list[tuple[int, float]]]
    losses: dict[str, list[tuple[int, float]]]
    uplink_bytes: int
    downlink_bytes: int
    classes: list[ClassRow]
    devices: list[dict[str, Any]]
    dropouts: list[dict[str, Any]]


def read_mark(db: Connection, run: str) -> tuple[Any, ...]:
    """One cheap query, whose answer differs when something on the dashboard may."""
    current = rounds.c.run == run, rounds.c.state.in_(OPEN)
    here = select(rounds.c.id).where(*current).scalar_subquery()
    mine, done = assignments.c.round == here, reports.c.round == here
    judged = select(func.count()).where(evaluations.c.run == run)
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


def read_overview(db: Connection, run: str, now: int, tallies: Tallies) -> Overview:
    """All that changes on the dashboard."""
    row = db.execute(select(runs).where(runs.c.id == run)).one()
    entries = {
        entry.round: entry for entry in db.execute(select(ledger).where(ledger.c.run == run))
    }
    query = select(rounds).where(rounds.c.run == run).order_by(rounds.c.opened_ms, rounds.c.attempt)
    found = list(db.execute(query).all())
    counted = tallies.read(db, found)
    judged = _evaluations(db, run)
    scored = {(kind, number): metrics for kind, number, metrics in judged}
    every = [_round_row(round, entries.get(round.id), counted[round.id], scored) for round in found]
    current = open_round_of(db, run)
    given_up = [r for r in every if r.state == "ABANDONED"]
    history = [r for r in every if r.state == "COMMITTED" and r.kind == "train"]
    scores, losses = _curves(judged, history)
    recent = [round.id for round in found[-SHOWN_ROUNDS:]]
    heartbeat = db.scalar(select(func.max(leader.c.heartbeat_ms))) or 0
    return Overview(
        name=row.name,
        state=row.state,
        reason=row.reason,
        committed=row.round,
        num_rounds=RoundSettings.model_validate_json(row.settings).num_rounds,
        is_led=now - heartbeat < 2_000 * LEASE_SECONDS,
        current=None if current is None or not every or every[-1].state not in OPEN else every[-1],
        latest=every[: -SHOWN_ROUNDS - 1 : -1],
        abandoned=given_up[:-11:-1],
        num_abandoned=len(given_up),
        history=history,
        scores=scores,
        losses=losses,
        uplink_bytes=sum(entry.uplink_bytes for entry in entries.values()),
        downlink_bytes=sum(entry.downlink_bytes for entry in entries.values()),
        classes=_classes(db, run, now, counted),
        devices=_devices(db, run),
        dropouts=_dropouts(db, recent),
    )


def _tally(db: Connection, ids: Sequence[str]) -> list[tuple[str, str, str, int]]:
    what = case(
        (_SILENT, "silent"),
        (assignments.c.state == "expired", "unneeded"),
        else_=assignments.c.state,
    )
    query = (
        select(assignments.c.round, devices.c.device_class, what, func.count())
        .join(devices, devices.c.id == assignments.c.device)
        .where(assignments.c.round.in_(ids))
        .group_by(assignments.c.round, devices.c.device_class, what)
    )
    return [(id, name, kind, count) for id, name, kind, count in db.execute(query)]


def _round_row(
    round: Row[Any],
    entry: Row[Any] | None,
    tallies: Mapping[str, Tally],
    scored: Mapping[tuple[str, int], dict[str, float]],
) -> RoundRow:
    kind = "central" if round.kind == "train" else "federated"
    is_done = round.state == "COMMITTED"
    deadline = (
        round.selection_deadline_ms if round.state == "SELECTING" else round.report_deadline_ms
    )
    return RoundRow(
        kind=round.kind,
        number=round.number,
        attempt=round.attempt,
        state=round.state,
        reason=round.reason,
        goal=round.goal,
        minimum=round.minimum,
        slots=round.slots,
        tally=sum(tallies.values(), Tally()),
        opened_ms=round.opened_ms,
        closed_ms=round.closed_ms,
        deadline_ms=deadline,
        loss=None if entry is None else entry.loss,
        uplink_bytes=None if entry is None else entry.uplink_bytes,
        downlink_bytes=None if entry is None else entry.downlink_bytes,
        metrics=scored.get((kind, round.number), {}) if is_done else {},
    )


def _evaluations(db: Connection, run: str) -> list[tuple[str, int, dict[str, float]]]:
    query = select(evaluations).where(evaluations.c.run == run).order_by(evaluations.c.round)
    return [(row.kind, row.round, read_results(row.metrics)) for row in db.execute(query)]


def _curves(
    judged: Sequence[tuple[str, int, Mapping[str, float]]], history: Sequence[RoundRow]
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """Curves of what is better high, and of losses."""
    names = {"central": "test", "federated": "on devices"}
    scores: dict[str, list[tuple[int, float]]] = defaultdict(list)
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for kind, number, metrics in judged:
        for metric, value in metrics.items():
            name = names[kind] if metric in ("accuracy", "loss") else f"{metric}, {names[kind]}"
            (scores if higher_is_better(metric) else losses)[name].append((number, float(value)))
    trained = [(row.number, row.loss) for row in history if row.loss is not None]
    return dict(scores), dict(losses) | ({"training": trained} if trained else {})


def _classes(
    db: Connection, run: str, now: int, counted: Mapping[str, Mapping[str, Tally]]
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
    sums: dict[str, Tally] = defaultdict(Tally)
    for by_class in counted.values():
        for name, tally in by_class.items():
            sums[name] = sums[name] + tally
    return [
        ClassRow(name, enrolled, seen or 0, revoked, sums[name])
        for name, enrolled, seen, revoked in db.execute(query)
    ]


def _devices(db: Connection, run: str) -> list[dict[str, Any]]:
    """Those that were heard of last."""
    names = ("id", "name", "device_class", "seen_ms", "revoked_ms")
    query = select(*(devices.c[name] for name in names)).where(devices.c.run == run)
    newest = query.order_by(devices.c.seen_ms.desc(), devices.c.client).limit(SHOWN_DEVICES)
    found = [as_dict(row) for row in db.execute(newest)]
    at_work = select(assignments.c.device).where(
        assignments.c.device.in_([row["id"] for row in found]), assignments.c.state == "active"
    )
    busy = set(db.scalars(at_work))
    return [row | {"is_busy": row["id"] in busy} for row in found]


def _dropouts(db: Connection, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The newest of the rounds `ids`: device, round and reason."""
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
