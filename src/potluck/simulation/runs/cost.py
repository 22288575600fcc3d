"""The cost of a run to reach a target, counted as in the paper.

    best_t = the best score of the evaluated rounds up to t
    rounds to target: where the straight line between two neighbouring best_t meets the target

The paper evaluates after rounds 1, 2, …, 10, 20, …, 100, 200, …, so its large numbers are coarse;
"on the paper's grid" is the same count with the other evaluations left out. Of a loss or an error
the best is the smallest, and a target is reached from above. A score that is not a finite number
is no result: it is not on the curve, and a run that has no other has no best.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from potluck.core import Target, higher_is_better, is_result, main_metric
from potluck.core.plain_json import to_json
from potluck.simulation.runs.directory import RunRecord

Curve: TypeAlias = Sequence[tuple[int, float]]  # (round, score), rounds ascending
Points: TypeAlias = Sequence[tuple[float, float]]  # the same, or (virtual hour, score)
Axis: TypeAlias = Literal["rounds", "hours"]

# What leaves the numbers of a run as they are, or only says when it stops.
_NOT_THE_EXPERIMENT = (
    "seed", "rounds", "target", "stop_at_target", "executor", "workers", "ray_address",
    "ray_local", "ray_gpus", "evaluate_train",
)  # fmt: skip


class Cost(NamedTuple):
    """The cost of one run and its best score."""

    name: str
    seed: int
    directory: Path
    identity: str  # equal for runs of one experiment that differ in the seed
    metric: str  # that the run was judged by
    curve: Curve  # the evaluated rounds that gave a result
    target: Target | None
    to_target: float | None
    on_grid: float | None
    held: bool  # on_grid rests on a score that was held beyond the end of the run
    bytes_to_target: tuple[int, int] | None  # uplink, downlink
    bytes: tuple[int, int]
    best: float  # NaN without any result
    best_round: int
    final: float  # NaN where the last evaluation gave no result
    rounds: int
    seconds: float
    is_finished: bool
    kernels: str | None = None  # compiled code; unknown of older runs
    hours: Points | None = None  # the curve over virtual hours, with simulated devices
    virtual_to_target: float | None = None  # seconds
    virtual_seconds: float | None = None  # in all
    classes: tuple[str, ...] = ()  # names, where labels are not their own codes

    def __repr__(self) -> str:
        best = f"best {self.metric} {self.best:.4f} in round {self.best_round} of {self.rounds}"
        return f"Cost({str(self.directory)!r}: {best})"

    @property
    def sign(self) -> float:
        """The factor that makes a score one of which more is better."""
        return _sign(self.target, self.metric)


def rounds_to_target(curve: Points, target: float) -> float | None:
    """The round, interpolated, in which the best score so far reaches the target; None if never.

    More is better here: of a loss, take the negative of both.
    """
    best = best_so_far(curve)
    if best and best[0][1] >= target:
        return float(best[0][0])
    for (before, low), (after, high) in pairwise(best):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return None


def best_so_far(curve: Points) -> list[tuple[float, float]]:
    """The curve made monotone: each score replaced by the largest up to it. Of what is not finite
    there is no score."""
    best = -math.inf
    return [(number, best := max(best, score)) for number, score in curve if is_result(score)]


def on_paper_grid(curve: Curve) -> list[tuple[int, float]]:
    """The curve in the rounds of the paper's grid: 1…10, then every 10th to 100, then every 100th.

    A curve that ends between two of these rounds, as one that stopped at its target does, holds
    its last score until the next. Rounds of the grid that were not evaluated are missing.
    """
    kept = [(number, score) for number, score in curve if number > 0 and _is_on_grid(number)]
    if curve and curve[-1][0] > 0 and not _is_on_grid(curve[-1][0]):
        kept.append((_next_on_grid(curve[-1][0]), curve[-1][1]))
    return kept


def measure(
    record: RunRecord, target: Target | float | None = None, *, metric: str | None = None
) -> Cost:
    """The cost of one run.

    Args:
        target: instead of the experiment's own. A number is a score of the metric, in the
            direction in which that is better.
        metric: a name among those that were evaluated, by the rounds that have it; if None, that
            of the target, or "accuracy", or "loss" where there is none.

    Raises:
        ValueError: the run has not been evaluated yet, or not by this metric; or the target is no
            accuracy.
    """
    manifest = record.manifest
    scored = [line for line in record.rounds if line["metrics"]]
    if not scored:
        raise ValueError(
            f"a run must have one evaluated round to be reported, got {str(record.directory)!r} "
            "with none. Run `potluck train` on, or leave it out."
        )
    known: list[str] = sorted({name for line in scored for name in line["metrics"]})
    wanted = _target(manifest["experiment"]["run"].get("target"), target, metric, known)
    if metric is None:
        metric = main_metric(known) if wanted is None else wanted.metric
    if metric not in known:
        raise ValueError(
            f"metric must be one of {', '.join(known)} for {str(record.directory)!r}, got "
            f"metric={metric!r}. Take one of these, or leave the run out."
        )
    sign = _sign(wanted, metric)
    scored = [line for line in scored if is_result(line["metrics"].get(metric))]
    curve = [(int(line["round"]), float(line["metrics"][metric])) for line in scored]
    rising = [(number, sign * score) for number, score in curve]
    aim = None if wanted is None else sign * wanted.value
    reached = None if aim is None else rounds_to_target(rising, aim)
    reached_on_grid = None if aim is None else rounds_to_target(on_paper_grid(rising), aim)
    best_round, best = max(rising, key=lambda point: point[1], default=(0, math.nan))
    last = int(record.rounds[-1]["round"])
    hours = _hours(scored, metric)
    to_target = None
    if hours is not None and aim is not None:
        to_target = rounds_to_target([(x, sign * score) for x, score in hours], aim)
    return Cost(
        name=str(manifest["name"]),
        seed=int(manifest["seed"]),
        directory=record.directory,
        identity=_identity(manifest["experiment"]),
        metric=metric,
        curve=curve,
        target=wanted,
        to_target=reached,
        on_grid=reached_on_grid,
        held=reached_on_grid is not None and reached_on_grid > _last_on_grid(curve[-1][0]),
        bytes_to_target=None if reached is None else _bytes(record, _whole_rounds(reached)),
        bytes=_bytes(record, last),
        best=sign * best,
        best_round=best_round,
        final=_final(record, metric),
        rounds=last,
        seconds=sum(record.seconds),
        is_finished=record.is_finished,
        kernels=manifest.get("kernels"),
        hours=hours,
        virtual_to_target=None if to_target is None else to_target * 3600.0,
        virtual_seconds=record.rounds[-1].get("virtual_seconds"),
        classes=tuple(map(str, manifest.get("classes") or ())),
    )


def group(costs: Iterable[Cost]) -> list[list[Cost]]:
    """Groups the runs of each experiment, by seed; experiments are in order of appearance."""
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(cost.identity, []).append(cost)
    return [sorted(runs, key=lambda cost: cost.seed) for runs in groups.values()]


def mean_of_best(runs: Sequence[Cost], x: Axis = "rounds") -> list[tuple[float, float]]:
    """The mean of the seeds' best scores so far, over rounds or over virtual hours.

    A run that reached its target keeps its best after its end. Where one ends that has not, the
    mean ends too: with fewer seeds it would jump. Of rounds it takes those in which every run was
    evaluated that has not ended: between its evaluations a run's best is old.
    """
    runs = [run for run in runs if run.curve]
    if not runs:
        return []
    sign = runs[0].sign
    shown = [curve_of(run, x) for run in runs]
    curves = [best_so_far([(n, sign * score) for n, score in curve]) for curve in shown]
    short = [curve[-1][0] for run, curve in zip(runs, shown, strict=True) if run.to_target is None]
    end = min(short, default=max(curve[-1][0] for curve in curves))
    numbers = sorted({n for curve in curves for n, _ in curve if n <= end})
    if x == "rounds":
        known = [({n for n, _ in curve}, curve[-1][0]) for curve in curves]
        common = [n for n in numbers if all(n in mine or n > last for mine, last in known)]
        numbers = common or numbers
    columns = [[_at(curve, n) for curve in curves] for n in numbers]
    means = [sign * statistics.fmean(column) for column in columns]
    return list(zip(numbers, means, strict=True))


def curve_of(run: Cost, x: Axis) -> Points:
    """The scores of a run over rounds, or over virtual hours.

    Raises:
        ValueError: over hours, and the run has no simulated devices.
    """
    if x == "rounds":
        return run.curve
    if run.hours is None:
        raise ValueError(
            f"curves over hours need simulated devices, got {str(run.directory)!r} without. "
            "Leave the run out, or draw over rounds."
        )
    return run.hours


def _target(
    own: Any, given: Target | float | None, metric: str | None, known: Sequence[str]
) -> Target | None:
    """Returns the target of a run: the given one, or else its own."""
    if isinstance(given, Target):
        return given if metric in (None, given.metric) else None
    mine = Target.read(own, known)
    if given is not None:
        named = metric or (main_metric(known) if mine is None else mine.metric)
        if mine is not None and mine.metric == named and isinstance(own, Mapping):
            return _moved(mine, given)
        return Target.of(given, named)
    if mine is None or metric in (None, mine.metric):
        return mine
    # A bare number is an accuracy, of whichever characters; of another metric it says nothing.
    is_kin = not isinstance(own, Mapping) and metric.startswith("accuracy_")
    return replace(mine, metric=metric) if is_kin and mine.metric == "accuracy" else None


def _sign(target: Target | None, metric: str) -> float:
    if target is not None:
        return target.sign
    return 1.0 if higher_is_better(metric) else -1.0


def _moved(target: Target, value: float) -> Target:
    """The same metric and direction with another score."""
    return replace(target, **{"at_most" if target.at_least is None else "at_least": value})


def _final(record: RunRecord, metric: str) -> float:
    """The score of the last evaluation by this metric."""
    found = [line["metrics"][metric] for line in record.rounds if metric in (line["metrics"] or {})]
    return float(found[-1]) if found and is_result(found[-1]) else math.nan


def _hours(scored: Sequence[dict[str, Any]], metric: str) -> Points | None:
    """The curve over virtual hours; None where a run has no simulated devices."""
    if not scored or "virtual_seconds" not in scored[0]:
        return None
    return [
        (float(line["virtual_seconds"]) / 3600.0, float(line["metrics"][metric])) for line in scored
    ]


def _is_on_grid(number: int) -> bool:
    return number <= 10 or (number <= 100 and number % 10 == 0) or number % 100 == 0


def _next_on_grid(number: int) -> int:
    while not _is_on_grid(number):
        number += 1
    return number


def _last_on_grid(number: int) -> int:
    while not _is_on_grid(number):
        number -= 1
    return number


def _whole_rounds(rounds: float) -> int:
    """Rounds up to whole rounds; the subtraction allows for the interpolation's rounding."""
    return math.ceil(rounds - 1e-9)


def _bytes(record: RunRecord, last: int) -> tuple[int, int]:
    lines = [line for line in record.rounds if line["round"] <= last]
    return sum(line["uplink_bytes"] for line in lines), sum(
        line["downlink_bytes"] for line in lines
    )


def _identity(experiment: dict[str, Any]) -> str:
    run = {k: v for k, v in experiment["run"].items() if k not in _NOT_THE_EXPERIMENT}
    task = {k: v for k, v in experiment.get("task", {}).items() if k != "path"}  # it may move
    return to_json(_given({**experiment, "task": task, "run": run}), sort_keys=True)


def _given(value: Any) -> Any:
    """Returns a table without the keys that are None: runs that are older than a key lack it."""
    if not isinstance(value, dict):
        return value
    content = cast("dict[str, Any]", value)
    return {key: _given(inner) for key, inner in content.items() if inner is not None}


def _at(curve: Points, number: float) -> float:
    """The score at a round, or at the last evaluated one before it."""
    return curve[max(bisect_right(curve, number, key=lambda point: point[0]) - 1, 0)][1]
