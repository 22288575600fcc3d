"""Choosing a learning rate: by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck.core import Target
from potluck.reproduction import tuning
from potluck.reproduction.tuning import Trial
from potluck.simulation.runs.report import Cost


def cost(to_target: float | None, *, best: float = 0.9, rounds: int = 100) -> Cost:
    return Cost(
        name="x",
        seed=0,
        directory=Path("x"),
        identity="x",
        metric="accuracy",
        curve=[(0, 0.1), (rounds, best)],
        target=Target.of(0.9, "accuracy"),
        to_target=to_target,
        on_grid=to_target,
        held=False,
        bytes_to_target=None,
        bytes=(0, 0),
        best=best,
        best_round=rounds,
        final=best,
        rounds=rounds,
        seconds=1.0,
        is_finished=True,
    )


def trial(rate: float, to_target: float | None, **other: float) -> Trial:
    return Trial(rate, cost(to_target, **other), False)  # type: ignore[arg-type]


DIVERGED = Trial(1.0, cost(None, rounds=3), True)


def test_rates_are_steps_of_a_third_of_a_decade_from_the_middle_outwards():
    # 0.1 · 10^(1/3) = 0.21544, 0.1 · 10^(−1/3) = 0.046416, and two steps 0.46416, 0.021544.
    assert tuning.rates(0.1, 1) == [0.1]
    assert tuning.rates(0.1, 3) == [0.1, 0.2154, 0.04642]
    assert tuning.rates(0.1, 5) == [0.1, 0.2154, 0.04642, 0.4642, 0.02154]
    assert tuning.rates(0.215, 1) == [0.215]


@pytest.mark.parametrize("number", [0, 2, -1])
def test_an_even_number_of_rates_has_no_middle(number):
    with pytest.raises(ValueError, match=rf"odd number, .* got rates={number}"):
        tuning.rates(0.1, number)


def test_the_fewest_rounds_to_the_target_win():
    trials = [trial(0.1, 40.5), trial(0.2, 30.2), trial(0.4, 60.0)]
    assert tuning.choose(0.1, trials).rate == 0.2
    assert not tuning.choose(0.1, trials).at_edge
    assert tuning.choose(0.1, trials[:2]).at_edge  # 0.4 might be better still


def test_a_rate_that_reached_the_target_beats_one_that_did_not():
    assert tuning.choose(0.1, [trial(0.1, 90.0), trial(0.2, None, best=0.99)]).rate == 0.1


def test_where_none_reached_the_target_the_best_score_wins():
    trials = [trial(0.1, None, best=0.7), trial(0.2, None, best=0.8), trial(0.4, None, best=0.6)]
    assert tuning.choose(0.1, trials).rate == 0.2


def test_of_equal_rates_the_smallest_wins():
    assert tuning.choose(0.1, [trial(0.2, 30.0), trial(0.1, 30.0)]).rate == 0.1


def test_a_rate_that_diverged_is_not_chosen():
    assert tuning.choose(0.1, [DIVERGED, trial(0.1, None, best=0.1)]).rate == 0.1
    hopeless = tuning.choose(0.1, [DIVERGED, DIVERGED._replace(rate=2.0)])
    assert hopeless.is_hopeless
    assert hopeless.rate == 0.1


def test_one_trial_is_no_choice():
    assert tuning.choose(0.1, [trial(0.2, 30.0)]) == tuning.Choice(0.1)


def test_a_run_stops_once_it_can_no_longer_win():
    # The best so far needed 30.2 rounds: a rate that has not arrived in round 31 needs more.
    before = [trial(0.1, 40.5), trial(0.2, 30.2), trial(0.4, None), DIVERGED]
    assert tuning.limit(before, 100) == 31
    assert tuning.limit([], 100) == 100
    assert tuning.limit([trial(0.1, 30.0)], 100) == 30
    assert tuning.is_tried(trial(0.05, None, rounds=31), before, 100)
    assert not tuning.is_tried(trial(0.05, None, rounds=30), before, 100)
    assert tuning.is_tried(trial(0.05, 12.0, rounds=12), before, 100)
    assert tuning.is_tried(DIVERGED, before, 100)
    assert not tuning.is_tried(Trial(0.05, None, False), before, 100)
