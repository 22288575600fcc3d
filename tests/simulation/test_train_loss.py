"""The averaged model's loss on training examples, beside its test metrics."""

from __future__ import annotations

import pytest

from potluck.config.experiment import check_experiment
from potluck.engine import evaluate
from potluck.simulation import build_data, build_task, read_run, read_weights, train


def experiment(**run):
    content = {
        "name": "small",
        "task": {"data": "digits", "model": "2nn"},
        "partition": {"kind": "shards", "clients": 20},
        "algorithm": {"client_lr": 0.1},
        "run": {"rounds": 4, "executor": "loop", "cohort": 0.2, **run},
    }
    return check_experiment(content, "test")


def test_with_all_examples_it_is_the_loss_of_the_model_on_them(tmp_path):
    setup = experiment(evaluate_train=1_000_000)
    list(train(setup, tmp_path))
    task = build_task(setup, build_data(setup))
    expected = evaluate(task, read_weights(tmp_path), task.data.train)["loss"]
    got = read_run(tmp_path).rounds[-1]["metrics"]["train_loss"]
    assert got == pytest.approx(expected, rel=1e-6)


def test_it_changes_nothing_else_and_no_executor_changes_it(tmp_path):
    runs = {
        "without": experiment(),
        "loop": experiment(evaluate_train=300),
        "workers": experiment(evaluate_train=300, executor="workers", workers=2),
    }
    logs = {}
    for name, setup in runs.items():
        list(train(setup, tmp_path / name))
        logs[name] = read_run(tmp_path / name).rounds
    assert logs["loop"] == logs["workers"]
    for line in logs["loop"]:
        assert line["metrics"].pop("train_loss") > 0.0
    assert logs["loop"] == logs["without"]


def test_every_run_takes_the_same_sample(tmp_path):
    small, smaller = (experiment(evaluate_train=n, rounds=1) for n in (200, 100))
    losses = []
    for i, (setup, seed) in enumerate([(small, 1), (small, 1), (smaller, 1), (small, 2)]):
        first = next(iter(train(setup, tmp_path / str(i), seed=seed)))
        losses.append(first.metrics["train_loss"])
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
