"""Chooses a learning rate on one seed, for others.

    rates    the file's rate times 10^(k/3), k = 0, ±1, ±2, …, as many as are asked for
    a rate   is as good as the rounds to target of its run with the tuning seed
    best     the fewest rounds; where no rate reached the target, the best score

The rates are tried from the middle outwards. A run stops after as many rounds as the best rate so
far needed to the target: from there on it cannot become the best, so stopping changes no choice.
A run that diverged is not chosen.

The scores are those of the test set, as in the paper: the seed is another than those reported, the
test examples are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from potluck.simulation.runs.report import Cost

SEED = 0  # of the runs that choose; never among the reported ones


class Trial(NamedTuple):
    """One rate, and the cost so far of its run with the tuning seed."""

    rate: float
    cost: Cost | None  # None: not evaluated once
    diverged: bool


class Choice(NamedTuple):
    """The rate for the reported seeds, and its source."""

    rate: float
    trials: tuple[Trial, ...] = ()  # that it was chosen from; none: it is the file's

    @property
    def is_hopeless(self) -> bool:
        """True if every rate that was tried diverged."""
        return bool(self.trials) and all(trial.diverged for trial in self.trials)

    @property
    def at_edge(self) -> bool:
        """True if a rate beyond those that were tried may be better still."""
        tried = [trial.rate for trial in self.trials]
        return len(tried) > 1 and self.rate in (min(tried), max(tried))


def rates(rate: float, number: int) -> list[float]:
    """The grid around a rate, from its middle outwards.

    Raises:
        ValueError: the number is even or below 1, so that there is no middle.
    """
    if number < 1 or number % 2 == 0:
        raise ValueError(
            f"rates must be an odd number, so that the file's rate is the middle one, got "
            f"rates={number}. Take 1, 3 or 5."
        )
    steps = sorted(range(-(number // 2), number // 2 + 1), key=lambda k: (abs(k), -k))
    return [float(f"{rate * 10 ** (k / 3):.4g}") for k in steps]


def limit(trials: Sequence[Trial], num_rounds: int) -> int:
    """Returns the number of rounds after which a rate has lost against those that were tried."""
    reached = [t.cost.to_target for t in trials if t.cost is not None and not t.diverged]
    return min([num_rounds, *(math.ceil(r - 1e-9) for r in reached if r is not None)])


def is_tried(trial: Trial, others: Sequence[Trial], num_rounds: int) -> bool:
    """True if more rounds of this trial cannot change the choice."""
    if trial.diverged:
        return True
    if trial.cost is None:
        return False
    return trial.cost.to_target is not None or trial.cost.rounds >= limit(others, num_rounds)


def choose(file_rate: float, trials: Sequence[Trial]) -> Choice:
    """The best of the rates that were tried, the smallest of equal ones; the file's if there are
    not two to choose from, or all diverged."""
    good = [(trial.rate, trial.cost) for trial in trials if trial.cost and not trial.diverged]
    if len(trials) < 2:
        return Choice(file_rate)
    best = min(good, key=lambda pair: (*_badness(pair[1]), pair[0]), default=(file_rate, None))
    return Choice(best[0], tuple(trials))


def _badness(cost: Cost) -> tuple[float, float]:
    rounds = math.inf if cost.to_target is None else cost.to_target
    return rounds, -cost.sign * cost.best if math.isfinite(cost.best) else math.inf
