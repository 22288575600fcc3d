"""The metrics of devices on their own examples: their bounds, means and medians.

A metric comes as a sum over examples and their number. One that the run's plan does not have is
left out; its mean must be within `MAX_SCORE`, that of an accuracy from 0 to 1. A device counts with
at most `COUNT_TIMES` the median of the round's numbers of examples, as a report does with its
weight. A mean that is no share still follows the device with the largest number, so the median over
the devices stands beside it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert

from potluck.config.plan import metrics_of, read_plan
from potluck.core import ConfigError, RefusedError
from potluck.core.plain_json import to_json
from potluck.server.storage.database_tables import evaluations

MAX_SCORE = 1e15
"""The bound on a loss, or the mean of a metric, in both directions."""
MAX_EXAMPLES = 10**9
"""Of one device."""
COUNT_TIMES = 5.0

Sums = Mapping[str, Sequence[float]]


class Measured(NamedTuple):
    """The metrics of the devices of a round, by name."""

    means: dict[str, float]  # over all examples
    medians: dict[str, float]  # over the devices


def checked_sums(metrics: Sums, plan: str) -> Sums:
    """Returns the metrics of the run's plan among those that a device sent.

    Raises:
        RefusedError: bounds: there is none, or one that cannot be right.
    """
    known = _known(plan)
    kept = {name: pair for name, pair in metrics.items() if known is None or name in known}
    if not kept:
        wanted = ", ".join(sorted(known or ()))
        raise RefusedError("bounds", f"metrics must be of the plan ({wanted}), got none.")
    for name, (total, count) in kept.items():
        if not 0 < count <= MAX_EXAMPLES:
            raise RefusedError(
                "bounds",
                f"the count of {name!r} must be above 0 and at most {MAX_EXAMPLES}, got {count!r}.",
            )
        low, high = (0.0, 1.0) if name.startswith("accuracy") else (-MAX_SCORE, MAX_SCORE)
        if not low <= total / count <= high:
            raise RefusedError(
                "bounds",
                f"the mean of {name!r} must be from {low:g} to {high:g}, got {total / count:g}.",
            )
    return kept


def measured(reported: Sequence[Sums]) -> Measured:
    """Returns means and medians of the metrics that most devices reported, in any order the
    same."""
    found: dict[str, list[Sequence[float]]] = {}
    for metrics in reported:
        for name, pair in metrics.items():
            found.setdefault(name, []).append(pair)
    means: dict[str, float] = {}
    medians: dict[str, float] = {}
    for name in sorted(found):
        pairs = found[name]
        if 2 * len(pairs) <= len(reported):
            continue
        most = COUNT_TIMES * statistics.median_low(count for _, count in pairs)
        counted = [(t, n) if n <= most else (t * (most / n), most) for t, n in pairs]
        total, examples = (math.fsum(column) for column in zip(*counted, strict=True))
        means[name] = total / examples
        medians[name] = statistics.median(total / count for total, count in pairs)
    return Measured(means, medians)


def insert_evaluation(
    db: Connection,
    run: str,
    round: int,
    kind: str,
    metrics: Mapping[str, float],
    now: int,
    *,
    num_devices: int = 0,
    medians: Mapping[str, float] | None = None,
) -> None:
    """Inserts the row of an evaluation, central or federated."""
    values: dict[str, Any] = {"run": run, "round": round, "kind": kind, "created_ms": now}
    values |= {"metrics": to_json(metrics), "num_devices": num_devices}
    values["medians"] = None if medians is None else to_json(medians)
    db.execute(insert(evaluations).values(values))


@lru_cache(maxsize=64)
def _known(plan: str) -> Collection[str] | None:
    """Returns the metrics of a plan as it is stored; None where its task is none of ours."""
    try:
        return metrics_of(read_plan(json.loads(plan)).task)
    except ConfigError:
        return None
