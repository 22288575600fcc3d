"""Estimates the remaining cost of a grid from the work of a round and the rounds that were timed.

work of a round   cohort · examples of a client · E local examples, each a step forward and back,
                  and the test examples, a third of that
seconds           of a unit of work: the median over the model's rounds that were run; before
                  there are any, what one core of a laptop takes, shared by two
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from potluck.reproduction.grid import (
    Grid,
    choice,
    find,
    is_complete,
    load_cell,
    rates_with,
    tuning_jobs,
)
from potluck.reproduction.paper import Cell
from potluck.reproduction.tuning import SEED

_CLIENTS = {"LSTM": (1144, 74.0)}  # clients, training examples of a client (lines)
_MNIST = (100, 600.0)
_TESTED = {"LSTM": 21_000.0}  # test examples
_MNIST_TESTED = 10_000.0
_SECONDS = {"2NN": 45e-6, "CNN": 1.7e-3, "LSTM": 5.2e-3}  # of an example, on one core
_CORES = 2
_QUICK = "quick-"  # a fortieth of the examples


class Left(NamedTuple):
    """The runs of a grid that are done and to do, with the time they may take."""

    done: int  # runs
    total: int
    seconds: float  # that the others may take


def work(cell: Cell) -> float:
    """Examples' worth of computation in one round."""
    clients, examples = _CLIENTS.get(cell.model, _MNIST)
    tested = _TESTED.get(cell.model, _MNIST_TESTED)
    cohort = max(cell.fraction * clients, 1.0)
    total = cohort * examples * cell.epochs + tested / 3
    return total / 40 if cell.name.startswith(_QUICK) else total


def seconds_per_round(grid: Grid) -> dict[str, float]:
    """Returns the seconds of a round of each cell, from its own runs or others of its model."""
    own = {cell.name: _seconds_per_work(grid, cell) for cell in grid.cells}
    models: dict[str, list[float]] = {}
    for cell in grid.cells:
        models.setdefault(cell.model, []).extend(own[cell.name])
    seconds: dict[str, float] = {}
    for cell in grid.cells:
        known = own[cell.name] or models[cell.model] or [_SECONDS[cell.model] / _CORES]
        seconds[cell.name] = work(cell) * statistics.median(known)
    return seconds


def left(grid: Grid) -> Left:
    """Runs done and to do.

    A cell is expected to need as many rounds as in the paper, or where the paper gives none as
    many as its file allows.
    """
    per_round = seconds_per_round(grid)
    done, total, seconds = 0, 0, 0.0
    for cell in grid.cells:
        experiment = load_cell(grid, cell)
        most = experiment.run.rounds
        rate = choice(grid, cell, experiment.algorithm.client_lr).rate
        wanted = [(rate, seed) for seed in grid.seeds]
        if grid.num_rates > 1:
            missing = [job.experiment.algorithm.client_lr for job in tuning_jobs(
                grid, cell, experiment)]  # fmt: skip
            done += grid.num_rates - len(missing)
            total += grid.num_rates - len(missing)
            wanted += [(other, SEED) for other in missing]
        for other, seed in wanted:
            record = find(grid, cell, other, seed)
            complete = seed != SEED and is_complete(record, most)
            made = 0 if record is None else int(record.rounds[-1]["round"])
            expected = min(cell.paper or most, most)
            more = expected - made if made < expected else most - made
            total, done = total + 1, done + complete
            seconds += 0.0 if complete else more * per_round[cell.name]
    return Left(done, total, seconds)


def _seconds_per_work(grid: Grid, cell: Cell) -> list[float]:
    found: list[float] = []
    seeds = (SEED, *grid.seeds)
    for rate in rates_with(grid, cell, *seeds):
        records = [find(grid, cell, rate, seed) for seed in seeds]
        times = [s for record in records if record is not None for s in record.seconds[1:]]
        if times:
            found.append(statistics.median(times) / work(cell))
    return found
