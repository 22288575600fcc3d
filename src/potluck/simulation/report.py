"""What runs cost to reach a target, counted as the paper counts it: tables and curves.

    best_t = max(accuracy of the evaluated rounds up to t)
    rounds to target: where the straight line between two neighbouring best_t meets the target

The paper evaluates after rounds 1, 2, …, 10, 20, …, 100, 200, …, so its large numbers are coarse;
"on the paper's grid" is the same count with the other evaluations left out. The score of a
regression is its test loss, the best is the smallest, and a target is reached from above.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from potluck.simulation.figures import COLOURS, save_figure
from potluck.simulation.runs import RunRecord

Curve: TypeAlias = Sequence[tuple[int, float]]  # (round, score), rounds ascending
Points: TypeAlias = Sequence[tuple[float, float]]  # the same, or (virtual hour, score)
Axis: TypeAlias = Literal["rounds", "hours"]

HEADER = (
    "experiment",
    "seed",
    "target",
    "rounds to target",
    "on paper's grid",
    "best",
    "rounds",
    "up / down to target",
    "up / down in all",
    "wall time",
)
_VIRTUAL = ("virtual time to target", "virtual time")  # where a run has simulated devices
_HELD = (
    "≈: the run ended before the next round of the paper's grid; "
    "its last score is taken to hold until there."
)

# What leaves the numbers of a run as they are, or only says when it stops.
_NOT_THE_EXPERIMENT = (
    "seed", "rounds", "target", "stop_at_target", "executor", "workers", "ray_address",
    "ray_local", "ray_gpus", "evaluate_train",
)  # fmt: skip


class Cost(NamedTuple):
    """What one run cost, and how far it came."""

    name: str
    seed: int
    directory: Path
    identity: str  # equal for runs of one experiment that differ in the seed
    metric: str  # that the run was judged by
    curve: Curve
    target: float | None
    to_target: float | None
    on_grid: float | None
    held: bool  # on_grid rests on a score that was held beyond the end of the run
    bytes_to_target: tuple[int, int] | None  # uplink, downlink
    bytes: tuple[int, int]
    best: float
    best_round: int
    final: float
    rounds: int
    seconds: float
    is_finished: bool
    hours: Points | None = None  # the curve over virtual hours, with simulated devices
    virtual_to_target: float | None = None  # seconds
    virtual_seconds: float | None = None  # in all


def rounds_to_target(curve: Points, target: float) -> float | None:
    """The round, interpolated, in which the best score so far reaches the target; None if never."""
    best = best_so_far(curve)
    if best and best[0][1] >= target:
        return float(best[0][0])
    for (before, low), (after, high) in pairwise(best):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return None


def best_so_far(curve: Points) -> list[tuple[float, float]]:
    """The curve made monotone: each score replaced by the largest up to it."""
    best = -math.inf
    return [(number, best := max(best, score)) for number, score in curve]


def on_paper_grid(curve: Curve) -> list[tuple[int, float]]:
    """What the paper would have evaluated: rounds 1…10, then every 10th to 100, then every 100th.

    A curve that ends between two of these rounds, as one that stopped at its target does, holds
    its last score until the next. Rounds of the grid that were not evaluated are missing.
    """
    kept = [(number, score) for number, score in curve if number > 0 and _is_on_grid(number)]
    if curve and curve[-1][0] > 0 and not _is_on_grid(curve[-1][0]):
        kept.append((_next_on_grid(curve[-1][0]), curve[-1][1]))
    return kept


def measure(record: RunRecord, target: float | None = None, *, metric: str | None = None) -> Cost:
    """The cost of one run.

    Args:
        target: instead of the experiment's own.
        metric: a name among those that were evaluated, by the rounds that have it; if None,
            "accuracy", or "loss" where there is none. The more the better, but for losses.

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
    if metric is None:
        metric = "accuracy" if "accuracy" in known else "loss"
    if metric not in known:
        raise ValueError(
            f"metric must be one of {', '.join(known)} for {str(record.directory)!r}, got "
            f"metric={metric!r}. Take one of these, or leave the run out."
        )
    scored = [line for line in scored if metric in line["metrics"]]
    sign = _sign(metric)
    if _is_accuracy(metric) and target is not None and not 0.0 < target < 1.0:
        raise ValueError(
            f"target must be an accuracy above 0 and below 1, got target={target:g}. "
            "For 97 % write 0.97."
        )
    curve = [(int(line["round"]), float(line["metrics"][metric])) for line in scored]
    rising = [(number, sign * score) for number, score in curve]
    target = manifest["experiment"]["run"]["target"] if target is None else target
    reached = None if target is None else rounds_to_target(rising, sign * target)
    grid = on_paper_grid(rising)
    reached_on_grid = None if target is None else rounds_to_target(grid, sign * target)
    best_round, best = max(rising, key=lambda point: point[1])
    last = int(record.rounds[-1]["round"])
    hours = _hours(scored, metric)
    to_target = None
    if hours is not None and target is not None:
        to_target = rounds_to_target([(x, sign * score) for x, score in hours], sign * target)
    return Cost(
        name=str(manifest["name"]),
        seed=int(manifest["seed"]),
        directory=record.directory,
        identity=_identity(manifest["experiment"]),
        metric=metric,
        curve=curve,
        target=target,
        to_target=reached,
        on_grid=reached_on_grid,
        held=reached_on_grid is not None and reached_on_grid > _last_on_grid(curve[-1][0]),
        bytes_to_target=None if reached is None else _bytes(record, _whole_rounds(reached)),
        bytes=_bytes(record, last),
        best=sign * best,
        best_round=best_round,
        final=curve[-1][1],
        rounds=last,
        seconds=sum(record.seconds),
        is_finished=record.is_finished,
        hours=hours,
        virtual_to_target=None if to_target is None else to_target * 3600.0,
        virtual_seconds=record.rounds[-1].get("virtual_seconds"),
    )


def _is_accuracy(metric: str) -> bool:
    return metric.startswith("accuracy")


def _sign(metric: str) -> float:
    """By what a score is multiplied so that more is better."""
    return -1.0 if metric.endswith("loss") else 1.0


def group(costs: Iterable[Cost]) -> list[list[Cost]]:
    """Runs of the same experiment together, by seed; experiments in order of appearance."""
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(cost.identity, []).append(cost)
    return [sorted(runs, key=lambda cost: cost.seed) for runs in groups.values()]


def header(costs: Iterable[Cost]) -> tuple[str, ...]:
    """The columns of `table`: `HEADER`, and virtual time where a run has any."""
    return HEADER + _VIRTUAL if any(cost.hours is not None for cost in costs) else HEADER


def table(costs: Iterable[Cost]) -> list[tuple[str, ...]]:
    """A row of cells, as in `header`, for every run and for the mean of every experiment."""
    costs = list(costs)
    width = len(header(costs))
    groups = group(costs)
    rows: list[tuple[str, ...]] = []
    for name, runs in zip(_labels(groups), groups, strict=True):
        rows += [_row(name, cost) for cost in runs]
        if len(runs) > 1:
            rows.append(_mean_row(name, runs))
    return [row[:width] for row in rows]


def notes(costs: Iterable[Cost]) -> list[str]:
    """What has to be said below the table."""
    return [_HELD] if any(cost.held for cost in costs) else []


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def mean_of_best(runs: Sequence[Cost], x: Axis = "rounds") -> list[tuple[float, float]]:
    """The mean of the seeds' best scores so far, over rounds or over virtual hours.

    A run that reached its target keeps its best after its end. Where one ends that has not, the
    mean ends too: with fewer seeds it would jump. Of rounds it takes those in which every run was
    evaluated that has not ended: between its evaluations a run's best is old.
    """
    sign = _sign(runs[0].metric)
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


def draw(costs: Iterable[Cost], paths: Sequence[Path], x: Axis = "rounds") -> None:
    """Draw score against rounds, or virtual hours, into each of `paths`.

    Their suffixes (.png, .svg) are the formats.

    A thin line is a run as it was evaluated; a thick line is what is counted: the best score so
    far, averaged over the seeds of an experiment.
    """
    groups = group(costs)
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    figure = figure_module.Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for target in sorted({run.target for runs in groups for run in runs if run.target is not None}):
        axes.axhline(target, color="0.6", linewidth=1.0, zorder=0)
        axes.annotate(
            f"{target:g}", (1.0, target), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", color="0.4", va="center", fontsize="small",
        )  # fmt: skip
    for i, (name, runs) in enumerate(zip(_labels(groups), groups, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        style = ("-", "--", ":")[i // len(COLOURS) % 3]
        for run in runs:
            axes.plot(*zip(*curve_of(run, x), strict=True), color=colour, linewidth=0.7, alpha=0.35)
        numbers, scores = zip(*mean_of_best(runs, x), strict=True)
        label = _legend(name, runs, x)
        axes.plot(numbers, scores, style, color=colour, linewidth=2.0, label=label)
    metrics = sorted({run.metric for runs in groups for run in runs})
    axes.set_xlabel("round" if x == "rounds" else "virtual hours")
    axes.set_ylabel(f"test {' and '.join(metrics)}")
    axes.set_xlim(left=0)
    rising = all(map(_is_accuracy, metrics))
    if rising:
        axes.set_ylim(_lowest_shown(groups), 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right" if rising else "upper right")
    save_figure(figure, paths)


def format_bytes(number: float) -> str:
    """Decimal units, three digits: 796840 is 797 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 999.5 else f"{number:.0f} TB"


def format_seconds(seconds: float) -> str:
    """4.2 s, 3 min 07 s or 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rounds(cost: Cost) -> str:
    """Rounds to the target, or how near the run came: `– (best 0.953 in 200)`."""
    if cost.target is None:
        return "no target"
    if cost.to_target is None:
        return f"– (best {cost.best:.4g} in {cost.rounds})"
    return f"{cost.to_target:.1f}"


def format_on_grid(cost: Cost) -> str:
    """The same on the paper's grid."""
    if cost.on_grid is None:
        return "–"
    return f"{'≈ ' if cost.held else ''}{cost.on_grid:.1f}"


def _hours(scored: Sequence[dict[str, Any]], metric: str) -> Points | None:
    """The curve over virtual hours; None where a run has no simulated devices."""
    if "virtual_seconds" not in scored[0]:
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
    """A round is paid for whole; the subtraction forgives the interpolation its rounding."""
    return math.ceil(rounds - 1e-9)


def _bytes(record: RunRecord, last: int) -> tuple[int, int]:
    lines = [line for line in record.rounds if line["round"] <= last]
    return sum(line["uplink_bytes"] for line in lines), sum(
        line["downlink_bytes"] for line in lines
    )


def _identity(experiment: dict[str, Any]) -> str:
    run = {k: v for k, v in experiment["run"].items() if k not in _NOT_THE_EXPERIMENT}
    return json.dumps(_given({**experiment, "run": run}), sort_keys=True)


def _given(value: Any) -> Any:
    """Without the keys that are None: runs that are older than a key lack it."""
    if not isinstance(value, dict):
        return value
    content = cast("dict[str, Any]", value)
    return {key: _given(inner) for key, inner in content.items() if inner is not None}


def _labels(groups: Sequence[Sequence[Cost]]) -> list[str]:
    """The experiments' names; where two share one, the folder of the runs too."""
    names = [runs[0].name for runs in groups]
    return [
        name if names.count(name) == 1 else f"{name} ({runs[0].directory.parent})"
        for name, runs in zip(names, groups, strict=True)
    ]


def _row(name: str, cost: Cost) -> tuple[str, ...]:
    return (
        name,
        str(cost.seed),
        "–" if cost.target is None else f"{cost.target:g}",
        format_rounds(cost),
        format_on_grid(cost),
        f"{cost.best:.4f}",
        f"{cost.rounds}" + ("" if cost.is_finished else " (unfinished)"),
        "–" if cost.bytes_to_target is None else _traffic(*cost.bytes_to_target),
        _traffic(*cost.bytes),
        format_seconds(cost.seconds),
        "–" if cost.virtual_to_target is None else format_seconds(cost.virtual_to_target),
        "–" if cost.virtual_seconds is None else format_seconds(cost.virtual_seconds),
    )


def _mean_row(name: str, runs: Sequence[Cost]) -> tuple[str, ...]:
    first = runs[0]
    one_target = all(run.target == first.target for run in runs)
    paid = [run.bytes_to_target for run in runs if run.bytes_to_target is not None]
    held = "≈ " if any(run.held for run in runs) else ""
    on_grid = _mean_of_reached([run.on_grid for run in runs])
    return (
        name,
        f"mean of {len(runs)}",
        f"{first.target:g}" if one_target and first.target is not None else "–",
        _mean_of_reached([run.to_target for run in runs]) if one_target else "–",
        (on_grid if on_grid.startswith("–") else held + on_grid) if one_target else "–",
        _mean([run.best for run in runs], ".4f"),
        _mean([run.rounds for run in runs], ".1f"),
        _mean_traffic(paid) if one_target and len(paid) == len(runs) else "–",
        _mean_traffic([run.bytes for run in runs]),
        format_seconds(statistics.fmean(run.seconds for run in runs)),
        _mean_seconds([run.virtual_to_target for run in runs]) if one_target else "–",
        _mean_seconds([run.virtual_seconds for run in runs]),
    )


def _mean(values: Sequence[float], digits: str) -> str:
    """Mean ± standard deviation of a sample."""
    mean = statistics.fmean(values)
    return f"{mean:{digits}} ± {statistics.stdev(values):{digits}}"


def _mean_of_reached(values: Sequence[float | None]) -> str:
    """No mean where a seed never reached the target: it would leave the worst out."""
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f"– (reached by {len(reached)} of {len(values)})"
    return _mean(reached, ".1f")


def _mean_seconds(values: Sequence[float | None]) -> str:
    """The mean, where every run has a value."""
    given = [value for value in values if value is not None]
    return format_seconds(statistics.fmean(given)) if len(given) == len(values) else "–"


def _mean_traffic(traffic: Sequence[tuple[int, int]]) -> str:
    uplink, downlink = (statistics.fmean(column) for column in zip(*traffic, strict=True))
    return _traffic(uplink, downlink)


def _traffic(uplink: float, downlink: float) -> str:
    up, down = format_bytes(uplink), format_bytes(downlink)
    if up.split()[1] == down.split()[1]:
        up = up.split()[0]
    return f"{up} / {down}"


def _at(curve: Points, number: float) -> float:
    """The score at a round, or at the last evaluated one before it."""
    return curve[max(bisect_right(curve, number, key=lambda point: point[0]) - 1, 0)][1]


def _legend(name: str, runs: Sequence[Cost], x: Axis) -> str:
    if x == "hours":
        seconds = _mean_seconds([run.virtual_to_target for run in runs])
        return name if seconds == "–" else f"{name}: {seconds}"
    if any(run.target is None or run.to_target is None for run in runs):
        return name
    reached = [run.to_target for run in runs]
    return f"{name}: {_mean_of_reached(reached) if len(runs) > 1 else f'{reached[0]:.1f}'} rounds"


def _lowest_shown(groups: Sequence[Sequence[Cost]]) -> float:
    """Near the targets, where the differences are; lower where a run did not come so far."""
    runs = [run for group in groups for run in group]
    targets = [run.target for run in runs if run.target is not None]
    if not targets:
        return 0.0
    lowest = min(targets) - 6.0 * (1.0 - min(targets))
    return max(0.0, min(lowest, *(run.best - 0.1 for run in runs)))
