"""Learning rates over the rounds: by hand."""

import pickle

import pytest

from potluck.algorithms import schedules
from potluck.algorithms.schedules import Constant, Cosine, Exponential, Linear, Step, Warmup


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), [1, 1, 1, 1, 1, 1]),
        (Exponential(0.5), [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (Step(2, 0.1), [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (Linear(4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Linear(4, floor=0.2), [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        # (1 + cos 0)/2, (1 + cos 60°)/2, (1 + cos 120°)/2, (1 + cos 180°)/2, …
        (Cosine(3), [1, 0.75, 0.25, 0, 0, 0]),
        (Cosine(3, floor=0.2), [1, 0.8, 0.4, 0.2, 0.2, 0.2]),
        (Warmup(3), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Warmup(1, then=Exponential(0.5)), [0.5, 1, 0.5, 0.25, 0.125, 0.0625]),
    ],
    ids=repr,
)
def test_factors_by_hand(schedule, factors):
    assert [schedule(t) for t in range(1, 7)] == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize(
    "schedule", [Exponential(0.99), Step(7, 0.5), Linear(50), Cosine(50), Warmup(3, then=Linear(9))]
)
def test_a_schedule_travels_to_other_processes(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0.0), "decay must be above 0 and at most 1, got decay=0.0"),
        (lambda: Exponential(1.5), "decay must be above 0 and at most 1, got decay=1.5"),
        (lambda: Step(0, 0.5), "every must be at least 1, got every=0"),
        (lambda: Step(5, 2.0), "factor=2.0"),
        (lambda: Linear(0), "rounds must be at least 1, got rounds=0"),
        (lambda: Cosine(5, floor=-0.1), "floor=-0.1"),
        (lambda: Warmup(0), "rounds=0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_schedule_starts_at_the_full_rate_but_for_a_warmup():
    kinds = [Constant(), Exponential(0.3), Step(1, 0.3), Linear(1), Cosine(1)]
    assert [kind(1) for kind in kinds] == [1.0] * 5
    assert schedules.Warmup(1)(1) == 0.5
