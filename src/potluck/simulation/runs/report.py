"""Tables and curves of the cost of runs to reach a target."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from potluck.core.formats import format_bytes, format_score, format_seconds
from potluck.core.formats import markdown as markdown
from potluck.simulation.runs.cost import Axis, Cost, curve_of, group, mean_of_best
from potluck.simulation.runs.cost import Curve as Curve
from potluck.simulation.runs.cost import Points as Points
from potluck.simulation.runs.cost import best_so_far as best_so_far
from potluck.simulation.runs.cost import measure as measure
from potluck.simulation.runs.cost import on_paper_grid as on_paper_grid
from potluck.simulation.runs.cost import rounds_to_target as rounds_to_target
from potluck.simulation.runs.figures import COLOURS, save_figure

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
_SHOWN = 20  # classes
_NO_RESULT = "no result: no evaluation of the run gave a finite number."


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
    """Returns the notes below the table."""
    costs = list(costs)
    named = dict.fromkeys((cost.name, cost.classes) for cost in costs if cost.classes)
    return (
        [_classes(name, classes) for name, classes in named]
        + _kernels(costs)
        + [
            note
            for note, said in (
                (_HELD, any(cost.held for cost in costs)),
                (_NO_RESULT, any(not cost.curve for cost in costs)),
            )
            if said
        ]
    )


def _kernels(costs: Sequence[Cost]) -> list[str]:
    """Returns a note on each experiment whose runs were trained by different compiled code."""
    groups = group(costs)
    used = [sorted({run.kernels for run in runs if run.kernels}) for runs in groups]
    return [
        f"the runs of {name} used different compiled code ({'; '.join(kernels)}): equal seeds may "
        "differ in their last bits."
        for name, kernels in zip(_labels(groups), used, strict=True)
        if len(kernels) > 1
    ]


def _classes(name: str, classes: Sequence[str]) -> str:
    shown = ", ".join(f"{code} {label}" for code, label in enumerate(classes[:_SHOWN]))
    return f"classes of {name}: {shown}" + (", …" if len(classes) > _SHOWN else "")


def draw(costs: Iterable[Cost], paths: Sequence[Path], x: Axis = "rounds") -> None:
    """Draws score against rounds, or virtual hours, into each of `paths`.

    Their suffixes (.png, .svg) are the formats. A line is a run as it was evaluated, and a dot its
    best score. What is counted is dashed: the best so far, averaged over an experiment's seeds.
    """
    groups = group(cost for cost in costs if cost.curve)
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    figure = figure_module.Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for target in sorted({run.target for runs in groups for run in runs if run.target}, key=str):
        axes.axhline(target.value, color="0.6", linewidth=1.0, zorder=0)
        axes.annotate(
            f"{target}", (1.0, target.value), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", color="0.4", va="center", fontsize="small",
        )  # fmt: skip
    for i, (name, runs) in enumerate(zip(_labels(groups), groups, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        marker = "os^"[i // len(COLOURS) % 3]
        for run in runs:
            points = curve_of(run, x)
            label = _legend(name, runs, x) if run is runs[0] else None
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label)
            best = points[[number for number, _ in run.curve].index(run.best_round)]
            axes.plot(*best, marker, color=colour, markersize=5)
        counted = mean_of_best(runs, x)
        axes.plot(*zip(*counted, strict=True), "--", color=colour, linewidth=1.2, alpha=0.7)
    metrics = sorted({run.metric for runs in groups for run in runs})
    axes.set_xlabel("round" if x == "rounds" else "virtual hours")
    axes.set_ylabel(f"test {' and '.join(metrics)}".replace("test train_loss", "train loss"))
    axes.set_xlim(left=0)
    rising = all(metric.startswith("accuracy") for metric in metrics)
    if groups and rising:
        axes.set_ylim(_lowest_shown(groups), 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    if groups:
        grey = {"color": "0.4", "linewidth": 1.2}
        axes.plot([], [], "--", label="best so far", **grey)
        axes.legend(frameon=False, loc="lower right" if rising else "upper right")
    save_figure(figure, paths)


def format_rounds(cost: Cost) -> str:
    """Rounds to the target, or how near the run came: `– (best 0.953 in 200)`."""
    if cost.target is None:
        return "no target"
    if cost.to_target is None:
        best = f"{cost.best:.4g}" if math.isfinite(cost.best) else "–"
        return f"– (best {best} in {cost.rounds})"
    return f"{cost.to_target:.1f}"


def format_on_grid(cost: Cost) -> str:
    """The same on the paper's grid."""
    if cost.on_grid is None:
        return "–"
    return f"{'≈ ' if cost.held else ''}{cost.on_grid:.1f}"


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
        "–" if cost.target is None else str(cost.target),
        format_rounds(cost),
        format_on_grid(cost),
        format_score(cost.best),
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
        str(first.target) if one_target and first.target is not None else "–",
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
    if not all(map(math.isfinite, values)):
        return "–"
    mean = statistics.fmean(values)
    return f"{mean:{digits}} ± {statistics.stdev(values):{digits}}"


def _mean_of_reached(values: Sequence[float | None]) -> str:
    """The mean, or none where a seed never reached the target: it would leave the worst out."""
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
    targets = [run.target.value for run in runs if run.target is not None]
    if not targets:
        return 0.0
    lowest = min(targets) - 6.0 * (1.0 - min(targets))
    return max(0.0, min(lowest, *(run.best - 0.1 for run in runs)))
