"""Choosing by the clock: any choice gives the same results, and it is said and recorded."""

import json
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from potluck import Auto, FedAvg, LogisticRegression, Loop, Scaffold, Task, datasets, partitions
from potluck import rounds as run_rounds
from potluck.cli.progress import ProgressLines
from potluck.config.experiment import check_experiment
from potluck.core import DivergedError
from potluck.simulation import make_executor, read_run, train
from potluck.simulation.executors.auto import Estimate


@pytest.fixture(scope="module")
def data():
    return partitions.unbalanced(datasets.digits(), clients=60, sigma=0.6, seed=0)


@pytest.fixture(scope="module")
def task(data):
    return Task(model=lambda: LogisticRegression((1, 8, 8)), data=data)


def history(task, executor, algorithm=None, **kwargs):
    kwargs = {"cohort": 0.8, "num_rounds": 8, "seed": 3, "evaluate_every": 8} | kwargs
    try:
        return list(
            run_rounds(algorithm or FedAvg(client_lr=0.1), task, executor=executor, **kwargs)
        )
    finally:
        executor.close()


def children():
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("algorithm", [FedAvg(client_lr=0.1), Scaffold(client_lr=0.1)])
def test_auto_is_loop_and_leaves_no_process(algorithm, task):
    before = children()
    # A clock that runs fast: processes are tried after a few rounds.
    auto = Auto(task, num_workers=2, clock=lambda: 1000 * time.perf_counter())
    ours, theirs = history(task, auto, algorithm), history(task, Loop(task), algorithm)
    assert any("workers, 2 processes" in round.executor for round in ours)
    assert all(round.executor for round in ours[1:])
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, rtol=0, atol=1e-5)
        assert one.cohort.tolist() == other.cohort.tolist()
    assert auto._is_settled
    assert children() == before


def test_a_short_run_starts_no_process(task):
    before = children()
    auto = Auto(task, num_workers=2, clock=lambda: time.perf_counter() / 1000)
    results = run_rounds(FedAvg(client_lr=0.1), task, executor=auto, num_rounds=6)
    for _ in results:
        assert children() == before
    assert "workers" not in auto._executors


def test_tiny_models_are_trained_side_by_side(task):
    ours = history(task, Auto(task, num_workers=1), num_rounds=6)
    assert ours[-1].executor.startswith("vmap in chunks of ")
    assert "loop" in ours[-1].executor


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        hidden = inputs.flatten(1)
        return self.layer(hidden if hidden.sum() > 1e9 else 2 * hidden)


def test_what_cannot_be_vectorised_is_not_tried(data, caplog):
    task = Task(model=Branches, data=data)
    ours = history(task, Auto(task, num_workers=1), num_rounds=3)
    assert all(round.executor.startswith("loop") for round in ours[1:])
    assert not caplog.records


def test_timing_leaves_no_trace(task):
    auto = Auto(task, num_workers=1)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    history(task, auto, num_rounds=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_last_of_two_rounds_counts_and_the_far_slower_gets_none(task):
    seconds = iter([])
    auto = Auto(task, num_workers=1, clock=lambda: next(seconds))
    algorithm = FedAvg(client_lr=0.1)
    auto._begin(algorithm, Estimate(loop=10e-6, vmap=15e-6, chunk=4))
    names = []
    for spent in (9.0, 0.002, 9.0, 0.001):  # twice loop, twice vmap
        names.append(auto._name)
        auto._learn(spent, 100)
    assert names == ["loop", "loop", "vmap", "vmap"]
    assert auto._name == "vmap"
    assert auto._per_step == {"loop": 0.002 / 100, "vmap": 0.001 / 100}
    auto._begin(algorithm, Estimate(loop=10e-6, vmap=4e-6, chunk=4))
    for spent in (0.1, 0.1, 0.1, 0.8, 0.1):
        assert auto._name == "vmap"
        auto._learn(spent, 100)
    assert auto._name == "vmap"
    assert auto._is_settled
    auto.close()


def test_long_rounds_start_with_processes_and_stay_there_if_those_are_clearly_faster(task):
    costs = Estimate(loop=1e-3, vmap=np.inf, chunk=4, num_steps=1000.0)
    for per_step, names in ((0.6e-3, ["workers"] * 2), (0.9e-3, ["workers"] * 2 + ["loop"] * 2)):
        auto = Auto(task, num_workers=2)
        auto._begin(FedAvg(client_lr=0.1), costs)
        seen = []
        while not auto._is_settled:
            seen.append(auto._name)
            auto._learn(1000 * (per_step if auto._name == "workers" else 0.8e-3), 1000)
        assert seen == names
        assert auto._name == ("workers" if len(names) == 2 else "loop")
        assert ("workers" in auto._executors) == (auto._name == "workers")
        auto.close()


def test_another_algorithm_is_another_choice(task):
    auto = Auto(task, num_workers=1)
    list(run_rounds(FedAvg(client_lr=0.1), task, executor=auto, num_rounds=2))
    first = auto._algorithm
    list(run_rounds(Scaffold(client_lr=0.1), task, executor=auto, num_rounds=2))
    assert auto._algorithm != first
    auto.close()


def test_an_algorithm_that_does_not_reach_other_processes_is_trained_in_this_one(task):
    algorithm = FedAvg(client_lr=0.1, client_schedule=lambda t: 1 / t)
    auto = Auto(task, num_workers=2, clock=lambda: 1000 * time.perf_counter())
    ours = history(task, auto, algorithm)
    assert auto._is_settled
    assert len(ours) == 9
    assert not any("processes" in round.executor for round in ours)


def test_a_failing_client_is_named(data):
    inputs = data.train.inputs.copy()
    inputs[int(data.offsets[4])] = np.nan
    train_examples = data.train._replace(inputs=inputs)
    broken = type(data)(
        **{name: getattr(data, name) for name in data.__slots__} | {"train": train_examples}
    )
    task = Task(model=lambda: LogisticRegression((1, 8, 8)), data=broken)
    with pytest.raises(DivergedError, match="client '4'"):
        history(task, Auto(task), cohort=1.0)


def test_the_choice_is_recorded_and_printed(tmp_path, capsys):
    experiment = check_experiment(
        {
            "name": "chosen",
            "task": {"data": "digits", "model": "logistic"},
            "partition": {"kind": "iid", "clients": 50},
            "algorithm": {"client_lr": 0.1},
            "run": {"rounds": 4, "cohort": 0.5, "executor": "auto", "workers": 1},
        },
        "test",
    )
    with ProgressLines(4, [], sys.stdout) as shown:
        for round in train(experiment, tmp_path):
            shown.show(round)
    printed = capsys.readouterr().out
    assert "executor: " in printed
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert "executor" not in timings[0]
    assert all("a local step" in timing["executor"] for timing in timings[1:])
    assert "executor" not in (tmp_path / "rounds.jsonl").read_text()
    assert len(read_run(tmp_path).seconds) == 5
    list(train(experiment.model_copy(update={
        "run": experiment.run.model_copy(update={"executor": "loop", "rounds": 5})
    }), tmp_path))  # fmt: skip
    assert len(read_run(tmp_path).rounds) == 6


def test_it_is_made_by_name(task):
    executor = make_executor("auto", task, 1)
    assert isinstance(executor, Auto)
    executor.close()
