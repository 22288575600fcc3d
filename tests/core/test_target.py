"""Targets of any metric, in both directions: for stopping, reporting and searching."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from potluck.cli.progress import outcome
from potluck.config.experiment import check_experiment
from potluck.core import ConfigError, Target
from potluck.reproduction.tuning import Trial, choose
from potluck.simulation import build_data, read_run, train
from potluck.simulation.runs.cost import best_so_far, measure, rounds_to_target
from potluck.simulation.runs.report import draw, notes, table


def regression(folder, target, *, bomb=1.0, rounds=12, **run):
    """Six clients whose targets are linear; the test targets of the first are times `bomb`."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal(5)
    (folder / "data").mkdir(exist_ok=True)
    for k in range(6):
        inputs = generator.standard_normal((40, 5)).astype(np.float32)
        targets = (inputs @ weights * 3).astype(np.float32)
        targets *= 1.0 if k else bomb
        np.savez(folder / "data" / f"c{k}.npz", inputs=inputs, targets=targets)
    return check_experiment(
        {
            "name": "regression",
            "task": {"data": "folder", "model": "logistic", "path": str(folder / "data")},
            "partition": {"kind": "own"},
            "algorithm": {"client_lr": 0.02, "batch_size": 10},
            "run": {
                "rounds": rounds, "cohort": 1.0, "executor": "loop", "target": target, **run,
            },
        },
        "test",
    )  # fmt: skip


def losses(directory):
    return [line["metrics"]["loss"] for line in read_run(directory).rounds]


@pytest.mark.parametrize("target", [2.0, 0.5, {"metric": "loss", "at_most": 2.0}])
def test_a_regression_stops_at_the_first_loss_at_or_below_the_target(tmp_path, target):
    list(train(regression(tmp_path, target), tmp_path / "run"))
    bound = target["at_most"] if isinstance(target, dict) else target
    got = losses(tmp_path / "run")
    assert got[-1] <= bound < min(got[:-1])
    cost = measure(read_run(tmp_path / "run"))
    assert cost.target == Target(metric="loss", at_most=bound)
    assert len(got) - 2 < cost.to_target <= len(got) - 1
    assert dict(outcome(cost))[f"rounds to loss ≤ {bound:g}"] == f"{cost.to_target:.1f}" + (
        f" (on the paper's grid {cost.on_grid:.1f})"
    )
    assert list(train(regression(tmp_path, target), tmp_path / "run")) == []


@pytest.mark.parametrize(
    "target", [{"metric": "rmse", "at_most": 1.0}, {"metric": "r2", "at_least": 0.9}]
)
def test_a_regression_stops_by_any_of_its_metrics(tmp_path, target):
    list(train(regression(tmp_path, target, rounds=20), tmp_path / "run"))
    wanted = Target(**target)
    record = read_run(tmp_path / "run")
    scores = [line["metrics"][wanted.metric] for line in record.rounds]
    assert [wanted.is_reached(score) for score in scores] == [False] * (len(scores) - 1) + [True]
    cost = measure(record)
    assert (cost.metric, cost.target, cost.best) == (wanted.metric, wanted, scores[-1])
    assert cost.best_round == len(scores) - 1
    assert len(scores) - 2 < cost.to_target <= len(scores) - 1
    # Another metric has no target of its own; a number is one in the direction of the metric.
    assert measure(record, metric="mae").target is None
    assert measure(record, 1.5, metric="mae").target == Target(metric="mae", at_most=1.5)


def test_a_run_that_reached_its_target_goes_on_to_a_harder_one(tmp_path):
    list(train(regression(tmp_path, 2.0), tmp_path / "run"))
    before = len(losses(tmp_path / "run"))
    list(train(regression(tmp_path, {"metric": "loss", "at_most": 0.5}), tmp_path / "run"))
    assert losses(tmp_path / "run")[-1] <= 0.5
    assert len(losses(tmp_path / "run")) > before


def test_a_target_that_is_met_by_falling_metrics_is_not_met_by_rising_ones():
    content = {"metric": "rmse", "at_most": 1.5}
    assert Target.read(content, ["rmse"]).is_reached(1.5)
    assert not Target.read(content, ["rmse"]).is_reached(1.51)
    at_least = Target.read({"metric": "r2", "at_least": 0.5}, ["r2"])
    assert at_least.is_reached(0.5)
    assert not at_least.is_reached(0.49)
    for target in (at_least, Target.read(content, [])):
        for score in (math.nan, math.inf, -math.inf, None):
            assert not target.is_reached(score)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"metric": "loss"}, "at_least or at_most"),
        ({"metric": "loss", "at_least": 1.0, "at_most": 2.0}, "at_least or at_most"),
        ({"metric": "loss", "at_most": math.nan}, "run.target.*finite number"),
        ({"metric": "loss", "below": 1.0}, "unknown key run.target.below"),
        ({"at_most": 1.0}, "run.target.metric is missing"),
        ("0.9", "run.target must be a number or a table"),
        (-1.0, "run.target must be above 0"),
        (math.inf, "run.target must be .*finite"),
    ],
)
def test_a_target_that_is_none_is_refused_in_words(tmp_path, target, words):
    with pytest.raises(ConfigError, match=words):
        regression(tmp_path, target)


def test_a_metric_that_the_run_does_not_have_is_refused_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"one of .*loss, got metric = 'f1'"):
        list(train(regression(tmp_path, {"metric": "f1", "at_least": 0.5}), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_accuracy_is_no_percentage(tmp_path):
    content = regression(tmp_path, None).model_dump()
    content["task"] = {"data": "digits", "model": "logistic"}
    content["partition"] = {"kind": "iid", "clients": 5}
    content["run"]["target"] = 97.0
    with pytest.raises(ConfigError, match=r"run\.target must be an accuracy .* write 0\.97"):
        list(train(check_experiment(content, "test"), tmp_path / "run"))


def test_rounds_to_a_target_are_those_of_a_walk_along_the_monotone_curve():
    """By brute force, on random curves: accuracies and (negated) losses, ties and gaps."""
    generator = np.random.default_rng(0)
    for trial in range(300):
        count = generator.integers(1, 30)
        numbers = (np.cumsum(generator.integers(1, 6, count)) - 1).tolist()
        scores = generator.normal(0.5, 0.2, count).round(generator.integers(1, 5))
        if trial % 2:
            scores = -np.abs(scores)
        scores[generator.random(count) < 0.1] = math.nan
        results = [s for s in scores.tolist() if math.isfinite(s)] or [0.5]
        exact = trial % 4 == 0
        target = float(generator.choice(results) if exact else generator.uniform(-1, 1))
        curve = list(zip(numbers, scores.tolist(), strict=True))
        got, expected = rounds_to_target(curve, target), walked(curve, target)
        assert (got is None) == (expected is None), curve
        assert got is None or got == pytest.approx(expected, abs=0.01), curve


def walked(curve, target):
    best, before = -math.inf, None
    for number, score in curve:
        if math.isnan(score):
            continue
        new = max(best, score)
        if new >= target:
            if before is None:
                return float(number)
            steps = np.linspace(0, 1, 2001)
            reached = best + (new - best) * steps >= target - 1e-12
            return before + (number - before) * steps[np.argmax(reached)]
        best, before = new, number
    return None


def test_a_score_that_is_no_number_is_no_result():
    curve = [(0, math.nan), (1, 0.2), (2, math.inf), (3, 0.5), (4, math.nan)]
    assert best_so_far(curve) == [(1, 0.2), (3, 0.5)]
    assert rounds_to_target(curve, 0.35) == pytest.approx(2.0)


@pytest.mark.parametrize("bomb", [1.0e25])
def test_a_run_whose_scores_are_infinite_leaves_json_and_is_reported(tmp_path, bomb):
    # Training skips the bad client; its test examples make the loss infinite.
    setup = regression(tmp_path, {"metric": "loss", "at_most": 0.5}, bomb=bomb, rounds=2,
                       skip_failures=True)  # fmt: skip
    list(train(setup, tmp_path / "run"))
    for name in ("rounds.jsonl", "timings.jsonl", "manifest.json"):
        text = (tmp_path / "run" / name).read_text()
        for line in text.splitlines() if name.endswith("l") else [text]:
            json.loads(line, parse_constant=pytest.fail)
    assert losses(tmp_path / "run") == [None, None, None]
    cost = measure(read_run(tmp_path / "run"))
    assert (cost.to_target, cost.curve) == (None, [])
    (row,) = table([cost])
    assert "nan" not in " ".join(row)
    assert notes([cost])[0].startswith("no result")
    draw([cost], [tmp_path / "none.png"])
    assert dict(outcome(cost))["loss"].startswith("no result")
    good = cost._replace(best=1.0, curve=[(0, 1.0)])
    trials = [Trial(0.1, cost, False), Trial(0.2, good, False)]
    assert choose(0.1, trials).rate == 0.2


def test_the_rate_with_the_lower_error_is_chosen():
    directory_less = {"directory": None, "seed": 0, "name": "x", "identity": "x"}
    one = measure_of(0.5, **directory_less)
    two = measure_of(0.3, **directory_less)
    assert choose(1.0, [Trial(0.1, one, False), Trial(0.2, two, False)]).rate == 0.2


def measure_of(score, **other):
    from potluck.simulation.runs.cost import Cost

    return Cost(
        metric="rmse", curve=[(1, score)], target=None, to_target=None, on_grid=None, held=False,
        bytes_to_target=None, bytes=(0, 0), best=score, best_round=1, final=score, rounds=1,
        seconds=1.0, is_finished=True, **other,
    )  # fmt: skip


def test_a_moved_project_goes_on(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    list(train(regression(here, None, rounds=3), here / "run"))
    here.rename(there)
    moved = regression(tmp_path, None, rounds=5)
    task = moved.task.model_copy(update={"path": str(there / "data")})
    moved = moved.model_copy(update={"task": task})
    assert [r.number for r in train(moved, there / "run")] == [4, 5]
    assert read_run(there / "run").manifest["experiment"]["task"]["path"] == str(there / "data")
    assert build_data(moved).num_clients == 6
