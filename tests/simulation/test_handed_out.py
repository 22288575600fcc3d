"""What a run hands out is the caller's: nothing that is done to it changes the run."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from potluck import Adam, FedAvg, Momentum, Scaffold, Task, own_data, rounds
from potluck.config.experiment import load_experiment
from potluck.simulation import discard_run, read_weights, train

GENERATOR = np.random.default_rng(0)
DATA = own_data.from_clients({
    name: (GENERATOR.standard_normal((size, 6)).astype(np.float32), GENERATOR.integers(0, 3, size))
    for name, size in (("a", 20), ("b", 30), ("c", 25))
})  # fmt: skip
ALGORITHMS = {
    "fedavg": (FedAvg(client_lr=0.1), "float32"),
    "momentum": (FedAvg(client_lr=0.1, server=Momentum()), "float32"),
    "adam": (FedAvg(client_lr=0.1, server=Adam(server_lr=0.1)), "float32"),
    "scaffold": (Scaffold(client_lr=0.1), "float32"),
    "codec": (FedAvg(client_lr=0.1), "int8"),
}


def subtracted(round):
    weights = round.weights
    weights -= 0.5


def fine_tuned(round):
    module, vector = nn.Linear(6, 3), torch.from_numpy(round.weights)
    module.weight.data, module.bias.data = vector[:18].view(3, 6), vector[18:]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    outputs = module(torch.tensor(DATA.test.inputs))
    functional.cross_entropy(outputs, torch.tensor(DATA.test.targets)).backward()
    optimizer.step()


def states_cleared(round):
    for array in round.state:
        if isinstance(array, np.ndarray):
            array[...] = 0.0
        elif isinstance(array, dict):
            for inner in array.values():
                inner *= 0.0
    for state in round.client_states.values():
        state *= 0.0


def everything(round):
    subtracted(round)
    states_cleared(round)
    round.cohort[...] = 0
    if round.metrics:
        round.metrics.clear()


CHANGES = [subtracted, fine_tuned, states_cleared, everything]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_do_not_reach_the_run(name, change):
    algorithm, codec = ALGORITHMS[name]
    task = Task(model=lambda: nn.Linear(6, 3), data=DATA)

    def run(num_rounds, **arguments):
        return rounds(algorithm, task, cohort=1.0, num_rounds=num_rounds, codec=codec, **arguments)

    expected = [round.weights for round in run(4)]
    last = None
    for number, round in enumerate(run(4)):
        last = round.weights.copy()
        np.testing.assert_array_equal(last, expected[number])
        change(round)
    half = list(run(2))[-1]
    resume = (half.number, half.state, half.client_states)
    going_on = run(4, resume=resume)
    next(going_on)
    states_cleared(half)
    *_, rest = going_on
    np.testing.assert_array_equal(rest.weights, last)


@pytest.mark.parametrize("executor", ["workers", "vmap"])
def test_changes_in_place_do_not_reach_executors(executor):
    task = Task(model=lambda: nn.Linear(6, 3), data=DATA)
    arguments = {"cohort": 1.0, "num_rounds": 3, "executor": executor}
    *_, expected = rounds(Scaffold(client_lr=0.1), task, **arguments)
    for round in rounds(Scaffold(client_lr=0.1), task, **arguments):
        last = round.weights.copy()
        everything(round)
    np.testing.assert_array_equal(last, expected.weights)


def test_changes_in_place_do_not_reach_checkpoints(tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file)
    list(train(experiment, tmp_path / "whole"))
    directory = tmp_path / "changed"
    for round in train(experiment, directory):
        everything(round)
        if round.number == 1:
            break  # a checkpoint is written, and read by the next
    for round in train(experiment, directory):
        everything(round)
    np.testing.assert_array_equal(read_weights(directory), read_weights(tmp_path / "whole"))
    discard_run(directory)


EXPERIMENT = """
name = "handed-out"
[task]
data = "digits"
model = "logistic"

[partition]
kind = "iid"
clients = 10

[algorithm]
name = "scaffold"
client_lr = 0.1

[run]
rounds = 3
cohort = 0.5
"""
