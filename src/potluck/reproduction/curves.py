"""The paper's figures 2, 3 and 8, drawn from run directories: a panel a model and division.

A thin line is one seed, a thick one the mean of the seeds; grey lines are the targets.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potluck.reproduction.comparison import Result, train_loss
from potluck.simulation.runs.figures import COLOURS, save_figure
from potluck.simulation.runs.report import Curve, Points, best_so_far, mean_of_best

_STYLES = ("-", "--", ":")


def draw_accuracy(results: Sequence[Result], paths: Sequence[Path]) -> None:
    """Figure 2: the best test accuracy so far, against rounds."""
    figure, panels = _panels(results)
    for axes, mine in panels:
        target = mine[0].cell.target
        axes.axhline(target, color="0.6", linewidth=1.0, zorder=0)
        for i, result in enumerate(mine):
            for cost in result.costs:
                _thin(axes, i, _from_round_1(best_so_far(cost.curve)))
            _thick(axes, i, _from_round_1(mean_of_best(result.costs)), result.cell.setting)
        axes.set_ylabel("test accuracy, best so far")
        axes.set_ylim(max(0.0, target - 6.0 * (1.0 - target)), 1.0 - 0.5 * (1.0 - target))
        axes.set_xscale("log")
        axes.set_xlim(left=1)
        _plain_numbers(axes.xaxis)
        axes.legend(frameon=False, fontsize="x-small", loc="lower right")
    save_figure(figure, paths)


def draw_train_loss(results: Sequence[Result], paths: Sequence[Path]) -> None:
    """Figures 3 and 8: the averaged model's loss on training examples, against rounds."""
    figure, panels = _panels(results)
    for axes, mine in panels:
        for i, result in enumerate(mine):
            losses = [curve for curve in map(train_loss, result.runs) if curve]
            for curve in losses:
                _thin(axes, i, curve)
            if losses:
                _thick(axes, i, _mean(losses), f"E {result.cell.epochs}")
        axes.set_ylabel("training loss")
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.legend(frameon=False, fontsize="x-small", loc="upper right")
    save_figure(figure, paths)


def _from_round_1(curve: Points) -> Points:
    """Drops the initial model, for which a logarithmic axis has no place."""
    return [(number, score) for number, score in curve if number > 0]


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean in the rounds that every curve has."""
    common = set[int].intersection(*({number for number, _ in curve} for curve in curves))
    values = [dict(curve) for curve in curves]
    return [(number, statistics.fmean(v[number] for v in values)) for number in sorted(common)]


def _panels(results: Sequence[Result]) -> tuple[Any, list[tuple[Any, list[Result]]]]:
    """A figure, and for each panel its axes and the results that have a round to show."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if any(cost.curve[-1][0] > 0 for cost in result.costs):
            groups.setdefault(result.cell.panel, []).append(result)
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    columns = min(2, len(groups))
    lines = -(-len(groups) // 2)
    figure = figure_module.Figure(figsize=(5.2 * columns, 3.9 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    panels: list[tuple[Any, list[Result]]] = []
    for axes, (name, mine) in zip(grid, groups.items(), strict=False):
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
        panels.append((axes, mine))
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    return figure, panels


def _plain_numbers(axis: Any) -> None:
    """0.05 and 200 on a logarithmic axis, not powers of ten."""
    ticker: Any = importlib.import_module("matplotlib.ticker")
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))


def _thin(axes: Any, i: int, curve: Points) -> None:
    axes.plot(*_columns(curve), color=COLOURS[i % len(COLOURS)], linewidth=0.6, alpha=0.4)


def _thick(axes: Any, i: int, curve: Points, label: str) -> None:
    style = _STYLES[i // len(COLOURS) % len(_STYLES)]
    colour = COLOURS[i % len(COLOURS)]
    axes.plot(*_columns(curve), style, color=colour, linewidth=1.8, label=label)


def _columns(curve: Points) -> tuple[list[float], list[float]]:
    return [number for number, _ in curve], [score for _, score in curve]
