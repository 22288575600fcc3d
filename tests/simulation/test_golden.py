"""Runs whose numbers are exact on every processor, pinned: what is rearranged computes the same.

Inputs, targets and rates are small multiples of powers of two and batches have four examples, so
that sums in float32 have no rounding, in whatever order they are made. What the built-in models
compute depends on the processor; `benchmarks/golden` compares it between two trees.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

from potluck import (
    Adagrad,
    Adam,
    Average,
    Cluster,
    FedAvg,
    FedProx,
    Loop,
    Momentum,
    Nesterov,
    Scaffold,
    Task,
    Vmap,
    Workers,
    Yogi,
    fed_sgd,
    own_data,
    rounds,
)

LOCAL = {"client_lr": 0.125, "batch_size": 4}
ALGORITHMS = {
    "fedsgd": fed_sgd(client_lr=0.125),
    "fedavg": FedAvg(**LOCAL, local_epochs=2),
    "fedprox": FedProx(**LOCAL, mu=0.5, local_epochs=2),
    "scaffold": Scaffold(**LOCAL),
    "average": FedAvg(**LOCAL, server=Average(server_lr=0.5)),
    "momentum": FedAvg(**LOCAL, server=Momentum(server_lr=0.5, momentum=0.5)),
    "nesterov": FedAvg(**LOCAL, server=Nesterov(server_lr=0.5, momentum=0.5)),
    "adagrad": FedAvg(**LOCAL, server=Adagrad(server_lr=0.25)),
    "adam": FedAvg(**LOCAL, server=Adam(server_lr=0.25)),
    "yogi": FedAvg(**LOCAL, server=Yogi(server_lr=0.25)),
}
ADAPTIVE = ("adagrad", "adam", "yogi")  # their second round begins with weights that are rounded
EXECUTORS = {"loop": Loop, "workers": lambda task: Workers(task, 2), "vmap": Vmap}
PINNED = {
    "fedsgd": "b5f5af81210299f7",
    "fedavg": "4a358e6da4780fa9",
    "fedprox": "c74b702dc6b38529",
    "scaffold": "695a1bab9ff8fe37",
    "average": "6cd3d555fdd0a302",
    "momentum": "04fe62500bcfffbe",
    "nesterov": "5487f2b0154f02b5",
    "adagrad": "6c46c1731b76e8d4",
    "adam": "dbf213fc8b1f17de",
    "yogi": "33a24097ef2819b2",
}


class Line(nn.Linear):
    """Weights that draw nothing."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        with torch.no_grad():
            self.weight.copy_(self.weight.new_tensor([[0.5, -0.25, 1.0]]))
            self.bias.fill_(-0.5)


@pytest.fixture(scope="module")
def task() -> Task:
    make = np.random.default_rng(0)
    # Of five examples one is held out.
    clients = {
        f"c{k}": (make.integers(-2, 3, (5, 3)) / 2.0, make.integers(-4, 5, 5) / 4.0)
        for k in range(4)
    }
    return Task(model=Line, data=own_data.from_clients(clients, kind="regression"))


def digest(algorithm: str, task: Task, executor: object) -> str:
    num_rounds = 1 if algorithm in ADAPTIVE else 2
    values = {"cohort": 2, "num_rounds": num_rounds, "seed": 1, "executor": executor}
    run = rounds(ALGORITHMS[algorithm], task, **values)
    return hashlib.sha256(list(run)[-1].weights.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_algorithm_ends_with_the_pinned_weights(task: Task, name: str) -> None:
    with contextlib.closing(EXECUTORS[name](task)) as executor:
        assert {name: digest(name, task, executor) for name in ALGORITHMS} == PINNED


def test_ray_ends_with_the_pinned_weights(task: Task) -> None:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with contextlib.closing(Cluster(task, 2)) as executor:
        assert {name: digest(name, task, executor) for name in ALGORITHMS} == PINNED
    ray.shutdown()
