"""Bounds on how far one report may move a model: its weight is lowered to what others have.

    pull k    = weight k · ‖Δ k‖₂, by which a report moves the weighted sum of its round
    counted k = weight k, where these two allow it:
                counted k ≤ max_weight_times · the median of the round's weights
                counted k · ‖Δ k‖ ≤ max_pull_times · the median pull =: limit
    share k   = pull k / the sum of the round's pulls: what the report asked for

The median pull is over the newest `WINDOW` reports: this round's, and those of as many rounds
before as it takes. Beyond `FAR_TIMES` the limit a report counts for less again, in proportion: an
update that no honest device sends moves nothing. The mean's norm is at most `MEAN_TIMES` the median
norm, which matters where a round has one or two reports. Statistics (running means and variances)
have norms and pulls of their own.

Guarantee: while more than half of these reports are honest, the part of a report in the sum is at
most `max_pull_times` that of a usual one. All follows from the accepted reports of this round and
of those before. So the order of arrival and a restart change no bit. Where no report exceeds a
limit, the limits change none either. Medians are the lower ones, of values above 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    bindparam,
    func,
    select,
    update,
)

from potluck.config.round_settings import RoundSettings
from potluck.core import Vector
from potluck.server.storage.database_tables import devices, ledger, reports, rounds

WINDOW = 50
"""The least number of reports for the median pull, as far as there are so many."""
FAR_TIMES, MEAN_TIMES = 5.0, 3.0
ALARM_SHARE, _ALARM_REPORTS = 0.5, 3
"""A report that asks for more of a round, where so many report, raises an alarm."""
_SHOWN = 10


class Weighed(NamedTuple):
    """A report as it is measured: its weight, and the norms of its parts."""

    weight: float
    norm: float
    statistics_norm: float


class Counted(NamedTuple):
    """A report as it counts."""

    weight: float
    share: float


class Limits(NamedTuple):
    """The limits of a round; infinite where there is nothing to measure by.

    Pairs are of what is trained and of statistics.
    """

    weight: float
    pulls: tuple[float, float]
    mean_norms: tuple[float, float]


def limits_of(
    reports: Sequence[Weighed], earlier: Iterable[Weighed], settings: RoundSettings
) -> Limits:
    """Returns the limits of a round with these reports.

    `earlier` are the newest reports of the rounds before.
    """
    pool = [*reports, *earlier]
    norms = [[r.norm for r in pool], [r.statistics_norm for r in pool]]
    pulls = [[r.weight * norm for r, norm in zip(pool, part, strict=True)] for part in norms]
    trained, statistics = (settings.max_pull_times * _median(part) for part in pulls)
    longest, widest = (MEAN_TIMES * _median(part) for part in norms)
    weight = settings.max_weight_times * _median(r.weight for r in reports)
    return Limits(weight, (trained, statistics), (longest, widest))


def counted(reports: Sequence[Weighed], limits: Limits) -> list[Counted]:
    """Returns the weights with which the reports of a round count."""
    total = sum(sorted(r.weight * r.norm for r in reports)) or 1.0
    return [Counted(_lowered(r, limits), r.weight * r.norm / total) for r in reports]


def weighed(report: Any) -> Weighed:
    """Reads a row of the table of reports; one of an older version has its weight alone."""
    return Weighed(report.weight, report.norm or 0.0, report.statistics_norm or 0.0)


def earlier_reports(db: Connection, run: str, number: int, wanted: int) -> list[Weighed]:
    """Returns `wanted` reports, or fewer, of the newest committed rounds before a number."""
    here = (rounds.c.run == run) & (rounds.c.kind == "train")
    here &= rounds.c.number.between(number - WINDOW, number - 1)
    newest = select(rounds.c.id, ledger.c.accepted).join(ledger, ledger.c.round == rounds.c.id)
    ids: list[str] = []
    order = rounds.c.number.desc(), rounds.c.attempt.desc()
    for id, accepted in db.execute(newest.where(here).order_by(*order)):
        if wanted <= 0:
            break
        ids.append(id)
        wanted -= accepted
    query = select(reports.c.weight, reports.c.norm, reports.c.statistics_norm)
    return [weighed(row) for row in db.execute(query.where(reports.c.round.in_(ids)))]


def note(
    db: Connection, round: Row[Any], accepted: Sequence[Row[Any]], counts: Sequence[Counted]
) -> list[dict[str, Any]]:
    """Writes which reports of a round were lowered, and which asked for too large a share.

    Returns what the log says of them.
    """
    told: list[dict[str, Any]] = []
    for row, (weight, share) in zip(accepted, counts, strict=True):
        is_alarm = share > ALARM_SHARE and len(accepted) >= _ALARM_REPORTS
        if weight < row.weight or is_alarm:
            said = {"device": row.device, "weight": row.weight, "norm": row.norm}
            told.append(said | {"counted": weight, "share": share, "alarm": is_alarm})
    if told:
        of: BindParameter[Any] = bindparam("of")
        to: BindParameter[Any] = bindparam("to")
        them = [{"of": one["device"], "to": one["counted"]} for one in told]
        mine = (reports.c.round == round.id) & (reports.c.device == of)
        db.execute(update(reports).where(mine).values(counted=to), them)
        them = [{"of": one["device"], "to": one["share"]} for one in told]
        changes = {"lowered": devices.c.lowered + 1, "lowered_round": round.number}
        db.execute(
            update(devices).where(devices.c.id == of).values(changes | {"lowered_share": to}), them
        )
    return told


def count_alarms(db: Connection, run: str) -> int:
    """Returns the number of devices whose last lowered report asked for too much."""
    here = (devices.c.run == run) & devices.c.revoked_ms.is_(None) & _is_alarm()
    return db.scalar(select(func.count()).where(here)) or 0


def read_lowered(db: Connection, run: str) -> list[dict[str, Any]]:
    """Returns the devices whose reports counted for less, those first that asked for most."""
    names = ("id", "name", "lowered", "lowered_round", "lowered_share")
    here = (devices.c.run == run) & (devices.c.lowered > 0) & devices.c.revoked_ms.is_(None)
    order = devices.c.lowered_share.desc(), devices.c.lowered.desc(), devices.c.client
    columns = *(devices.c[name] for name in names), _is_alarm().label("is_alarm")
    query = select(*columns).where(here).order_by(*order).limit(_SHOWN)
    told = map(dict[str, Any], db.execute(query).mappings())
    return [one | {"lowered_share": one["lowered_share"] or 0.0} for one in told]


def _is_alarm() -> ColumnElement[bool]:
    """Returns the condition that a device's last lowered report was of three or more, and an
    alarm."""
    at = (rounds.c.run == devices.c.run) & (rounds.c.kind == "train")
    at &= (rounds.c.number == devices.c.lowered_round) & (ledger.c.accepted >= _ALARM_REPORTS)
    committed = select(rounds.c.id).join(ledger, ledger.c.round == rounds.c.id).where(at)
    return (devices.c.lowered_share > ALARM_SHARE) & committed.exists()


def shortened(mean: Vector, num_parameters: int, limits: Limits) -> Vector:
    """Returns the mean update, with parts that are no longer than they may be."""
    parts = np.split(mean, [num_parameters])
    for n, limit in enumerate(limits.mean_norms):
        norm = float(np.linalg.norm(parts[n].astype(np.float64)))
        if norm > limit:
            parts[n] = (parts[n] * (limit / norm)).astype(np.float32)
    return np.concatenate(parts)


def _lowered(report: Weighed, limits: Limits) -> float:
    weight = min(report.weight, limits.weight)
    for norm, limit in zip((report.norm, report.statistics_norm), limits.pulls, strict=True):
        pull = weight * norm
        if pull > limit:
            weight = limit / norm * min(1.0, FAR_TIMES * limit / pull)
    return weight or sys.float_info.min


def _median(values: Iterable[float]) -> float:
    found = sorted(value for value in values if value > 0.0)
    return found[(len(found) - 1) // 2] if found else math.inf
