"""Ours beside the paper: results read from run directories, as tables and as a page.

A mean is given only when no run that ended failed to reach the target: it would leave the worst
out. Runs that are still going are named, and are in no mean.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from potluck.reproduction.estimates import seconds_per_round
from potluck.reproduction.grid import (
    DIVERGED,
    Grid,
    choice,
    find,
    has_diverged,
    is_complete,
    load_cell,
    place,
    rates_with,
)
from potluck.reproduction.paper import TITLES, Cell
from potluck.reproduction.tuning import SEED, Choice, Trial
from potluck.simulation.runs.directory import RunRecord
from potluck.simulation.runs.report import Cost, Curve, markdown, measure

LOSS_FIGURES = ("figure3", "figure8")  # of the training loss; the others are of test accuracy
HEADER = (
    "cell",
    "client_lr",
    "paper",
    "ours, mean ± std",
    "on its grid",
    "each seed",
    "ours/paper",
)
LOSS_HEADER = ("cell", "client_lr", "rounds", "training loss then", "lowest", "best accuracy")
_TUNING_HEADER = ("cell", "client_lr: rounds to target with seed 0", "chosen")
_RUN_HEADER = ("run", "rounds", "hours", "products", "commit", "machine")
_COPIED = ("manifest.json", "rounds.jsonl", "timings.jsonl", DIVERGED)

_COUNTED = """\
Rounds to the target test accuracy, counted as the paper counts them: the curve is made monotone
(best so far) and its crossing of the target is interpolated. "On its grid" is the same count from
the rounds alone that the paper evaluates (1 to 10, then every 10th, then every 100th); ours are
evaluated after every round. ≈ marks a run that ended before the next round of that grid. The paper
gives no spread, and its own tables differ by up to 25 % for the same cell: a smaller difference is
no evidence of anything.
"""
_LOSS = """\
The loss of the averaged model on one fixed sample of all clients' training examples, after every
round. The means and standard deviations are over the seeds.
"""
_RATES = """\
client_lr is the rate of the cell's experiment file where it says "file": the paper's, where its
figures show one, and otherwise a guess, or what the file says of it. "Best of N" is the best of N
rates in steps of 10^(1/3), chosen with seed 0, which is not among the reported seeds. The choice
looks at the same test examples that are then reported, as the paper's does; only the seed is
another.
"""
_BEYOND = """\
The rows of plain averaging are those of table 2. The paper's number is of plain averaging too: it
has no other. A rate "with its optimizer" was set together with it, with seed 0 and on training
examples alone (benchmarks/LOG.md).
"""
_AFTER_FIRST = """\
The paper's model predicts the next character after reading each one, and so none before the first;
whether its accuracy counts that one, it does not say. The table above does: it follows nothing, and
is seldom right. These are the same runs without the first character of each line.
"""
_MINIATURE = """\
This is the miniature that `--quick` makes, of scikit-learn's digits and of the standard library's
source code: the paper has no such cells.
"""


class Result(NamedTuple):
    """One cell with its runs."""

    cell: Cell
    choice: Choice | None  # None: there are no runs
    runs: tuple[RunRecord, ...]  # of the reported seeds, at the chosen rate
    costs: tuple[Cost, ...]
    num_seeds: int  # wanted
    seconds_expected: float | None  # of one seed

    @property
    def ended(self) -> list[Cost]:
        """The costs of the runs that have ended."""
        pairs = zip(self.runs, self.costs, strict=True)
        return [cost for run, cost in pairs if cost.to_target is not None or _has_ended(run)]

    @property
    def mean(self) -> float | None:
        """Mean rounds to target; None where a run ended without, or none has ended."""
        reached = [cost.to_target for cost in self.ended if cost.to_target is not None]
        return statistics.fmean(reached) if reached and len(reached) == len(self.ended) else None


def gather(grid: Grid, metric: str | None = None) -> list[Result]:
    """Returns the results of every cell of a grid. With a metric they are judged by it, and limited
    to the cells with runs that have it."""
    seconds = seconds_per_round(grid)
    results = [_gather(grid, cell, seconds[cell.name], metric) for cell in grid.cells]
    return [result for result in results if metric is None or result.runs]


def keep(grid: Grid) -> None:
    """Copies the files that tables need from the runs to the copies; a longer copy stays."""
    for cell in grid.cells:
        for rate in rates_with(grid, cell, SEED, *grid.seeds):
            for seed in (SEED, *grid.seeds):
                source = find(grid, cell, rate, seed)
                copy = grid.copies / place(cell, rate, seed)
                if source is None or source.directory == copy:
                    continue
                copy.mkdir(parents=True, exist_ok=True)
                for name in _COPIED:
                    if (source.directory / name).exists():
                        shutil.copy(source.directory / name, copy / name)


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table of rounds to target, as in `HEADER`."""
    return [_row(result) for result in results]


def loss_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table of training losses, as in `LOSS_HEADER`."""
    return [_loss_row(result) for result in results]


def train_loss(run: RunRecord) -> Curve:
    """The averaged model's loss on training examples, after every round that took it."""
    return [
        (int(line["round"]), float(line["metrics"]["train_loss"]))
        for line in run.rounds
        if line["metrics"] and "train_loss" in line["metrics"]
    ]


def page(
    what: str,
    results: Sequence[Result],
    command: str,
    pictures: Sequence[str],
    after_first: Sequence[Result] = (),
) -> str:
    """The README of a table or of a figure that is drawn from runs; `after_first` are those of its
    cells that are judged without first characters too."""
    quick = any(result.cell.name.startswith("quick-") for result in results)
    parts = [f"# {TITLES[what]}\n", f"Made by `{command}`, from the runs in [../runs](../runs).\n"]
    parts += [_MINIATURE] * quick
    if what in LOSS_FIGURES:
        parts += [_LOSS, _RATES, markdown(LOSS_HEADER, loss_rows(results))]
    else:
        parts += [_COUNTED, *[_BEYOND] * (what == "beyond"), _RATES]
        parts.append(markdown(HEADER, rows(results)))
    if after_first:
        parts += ["## Without first characters\n", _AFTER_FIRST]
        parts.append(markdown(HEADER, rows(after_first)))
    parts += [f"![{TITLES[what]}]({name})\n" for name in pictures]
    tuned = [_tuning_row(r.cell, r.choice) for r in results if r.choice and r.choice.trials]
    if tuned:
        parts += ["## How the rates were chosen\n", markdown(_TUNING_HEADER, tuned)]
    made = [_run_row(run) for result in results for run in result.runs]
    if made:
        parts += ["## The runs\n", markdown(_RUN_HEADER, made)]
    return "\n".join(parts)


def title(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.panel}, {100 * cell.target:g} %: {cell.setting}"


def _gather(grid: Grid, cell: Cell, seconds_per_round: float, metric: str | None = None) -> Result:
    expected = None if cell.paper is None else cell.paper * seconds_per_round
    chosen = _reported(grid, cell)
    if chosen is None:
        return Result(cell, None, (), (), len(grid.seeds), expected)
    found = [find(grid, cell, chosen.rate, seed) for seed in grid.seeds]
    runs = tuple(run for run in found if run is not None and (metric is None or _has(run, metric)))
    costs = tuple(measure(run, metric=metric) for run in runs)
    return Result(cell, chosen, runs, costs, len(grid.seeds), expected)


def _reported(grid: Grid, cell: Cell) -> Choice | None:
    """The rate whose runs are reported: the chosen one, once there are runs of it."""
    found = rates_with(grid, cell, *grid.seeds)
    trials = rates_with(grid, cell, SEED)
    if not found and len(trials) < 2:
        return None
    one = len(found) == 1 and len(trials) < 2
    file_rate = found[0] if one else load_cell(grid, cell).algorithm.client_lr
    chosen = choice(grid, cell, file_rate)
    return chosen if chosen.rate in found or not found else Choice(file_rate)


def _has(run: RunRecord, metric: str) -> bool:
    return any(metric in line["metrics"] for line in run.rounds if line["metrics"])


def _has_ended(run: RunRecord) -> bool:
    return is_complete(run, int(run.manifest["experiment"]["run"]["rounds"]))


def _row(result: Result) -> tuple[str, ...]:
    cell, mean = result.cell, result.mean
    held = "≈ " if any(cost.held for cost in result.ended) else ""
    return (
        title(cell),
        "–" if result.choice is None else _rate(result.cell, result.choice),
        "–" if cell.paper is None else str(cell.paper),
        _ours(result),
        "–" if mean is None else held + _mean_std([cost.on_grid for cost in result.ended]),
        ", ".join(_each(*pair) for pair in zip(result.runs, result.costs, strict=True)) or "–",
        "–" if mean is None or cell.paper is None else f"{mean / cell.paper:.2f}",
    )


def _loss_row(result: Result) -> tuple[str, ...]:
    name = f"{result.cell.panel}: {result.cell.setting}"
    curves = [curve for curve in map(train_loss, result.runs) if curve]
    if result.choice is None or not curves:
        return (name, "–", "not run", "–", "–", "–")
    ended = all(_has_ended(run) for run in result.runs)
    return (
        name,
        _rate(result.cell, result.choice),
        ", ".join(str(curve[-1][0]) for curve in curves) + " (unfinished)" * (not ended),
        _mean_std([curve[-1][1] for curve in curves], ".4f"),
        _mean_std([min(loss for _, loss in curve) for curve in curves], ".4f"),
        _mean_std([cost.best for cost in result.costs], ".4f"),
    )


def _rate(cell: Cell, choice: Choice) -> str:
    origin = "with its optimizer" if cell.optimizer else "file"
    if choice.trials:
        origin = f"best of {len(choice.trials)}"
    if choice.is_hopeless:
        origin = f"all {len(choice.trials)} diverged"
    return f"{choice.rate:.4g} ({origin}{', at the edge' * choice.at_edge})"


def _ours(result: Result) -> str:
    ended, wanted = result.ended, result.num_seeds
    if not result.costs:
        cost = result.seconds_expected
        about = "" if cost is None else f" ({_about(cost)} a seed)"
        return f"not run{about}"
    if not ended:
        return f"unfinished ({len(result.costs)} of {wanted} seeds begun)"
    reached = [cost.to_target for cost in ended]
    if result.mean is None:
        num = sum(value is not None for value in reached)
        return f"– (reached by {num} of {len(ended)} seeds)"
    so_far = "" if len(ended) == wanted else f" of {wanted}"
    return f"{_mean_std(reached)} ({len(ended)}{so_far} seeds)"


def _about(seconds: float) -> str:
    """Returns an estimate in words, with two digits."""
    if seconds < 60:
        return "under 1 min"
    return f"about {seconds / 60:.0f} min" if seconds < 3600 else f"about {seconds / 3600:.2g} h"


def _mean_std(values: Sequence[float | None], digits: str = ".1f") -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):{digits}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{digits}}{spread}"


def _each(run: RunRecord, cost: Cost) -> str:
    if cost.to_target is not None:
        return f"{cost.to_target:.1f}"
    state = "" if _has_ended(run) else ", unfinished"
    if has_diverged(run):
        state = ", then diverged"
    return f"– (best {cost.best:.4f} in {cost.rounds}{state})"


def _tuning_row(cell: Cell, choice: Choice) -> tuple[str, ...]:
    tried = "; ".join(f"{trial.rate:.4g}: {_tried(trial)}" for trial in choice.trials)
    return title(cell), tried, f"{choice.rate:.4g}{' (at the edge)' * choice.at_edge}"


def _tried(trial: Trial) -> str:
    if trial.diverged:
        return "diverged"
    if trial.cost is None:
        return "–"
    if trial.cost.to_target is not None:
        return f"{trial.cost.to_target:.1f}"
    return f"– ({trial.cost.best:.4f} in {trial.cost.rounds})"


def _run_row(run: RunRecord) -> tuple[str, ...]:
    manifest = run.manifest
    where = Path(*run.directory.parts[-3:])
    return (
        str(where),
        str(run.rounds[-1]["round"]),
        f"{sum(run.seconds) / 3600:.2f}",
        str(manifest["experiment"]["run"].get("precision") or "float32"),
        str(manifest["commit"]),
        f"{manifest['machine']}, torch {manifest['versions']['torch']}",
    )
