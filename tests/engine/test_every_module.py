"""Modules of PyTorch and of adapter libraries, on every executor: as averaged in plain PyTorch."""

from __future__ import annotations

import contextlib
import logging
import sys

import numpy as np
import pytest
from torch import Tensor
from torch.nn import functional

import modules
from modules import CLASSES, INPUTS, MODELS, Zoo
from potluck import FedAvg, Task, fed_sgd, rounds
from potluck.data import Examples, FederatedData
from potluck.engine import spec_of
from potluck.simulation import Cluster, Loop, Workers
from reference import State, averaged, evaluated

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")
SIZES = (13, 8, 7)  # no batch of one, which batch normalization refuses
PLAIN = FedAvg(client_lr=0.1, local_epochs=2, batch_size=5)


def data_of() -> FederatedData:
    random = np.random.default_rng(0)
    total = sum(SIZES)
    inputs = random.standard_normal((total, INPUTS)).astype(np.float32)
    labels = random.integers(0, CLASSES, total)
    examples = Examples(inputs, labels)
    return FederatedData(
        name="random",
        train=examples,
        test=Examples(inputs[:9], labels[:9]),
        offsets=np.array([0, *np.cumsum(SIZES)]),
        clients=("a", "b", "c"),
        num_classes=CLASSES,
    )


def gap(task: Task, weights: np.ndarray, expected: State) -> float:
    """The largest difference of a tensor from the expected one."""
    spec = spec_of(task.module())
    found = spec.unflatten(np.asarray(weights))
    assert set(found) == set(expected)
    return max(float(np.abs(found[n] - expected[n].numpy()).max(initial=0)) for n in found)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What `vmap` leaves to the loop is no matter here."""
    caplog.set_level(logging.CRITICAL, logger="potluck")


def test_there_are_enough_modules():
    assert len(MODELS) >= 60


@pytest.mark.parametrize("name", MODELS)
def test_a_module_trains_as_in_plain_pytorch(name):
    task = Task(model=MODELS[name], data=data_of())
    for algorithm in (PLAIN, fed_sgd(client_lr=0.1)):
        expected = averaged(MODELS[name], task.data, algorithm, 2)
        start = task.initial_weights(0)
        assert gap(task, start, expected) > 1e-4
        for executor in ("loop", "vmap"):
            *_, last = rounds(algorithm, task, cohort=1.0, num_rounds=2, executor=executor)
            assert gap(task, last.weights, expected) < 2e-5, executor
            loss = evaluated(MODELS[name], expected, task.data)
            assert last.metrics["loss"] == pytest.approx(loss, abs=1e-4), executor


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of the models' losses, of logits [batch, CLASSES, models]."""
    many = targets[:, None].expand(-1, outputs.shape[2])
    return functional.cross_entropy(outputs, many) * outputs.shape[2]


def cluster(task: Task) -> Cluster:
    ray = pytest.importorskip("ray")
    for module in (sys.modules[__name__], modules):  # tests are no package that workers know
        ray.cloudpickle.register_pickle_by_value(module)
    return Cluster(task, 2)


@pytest.fixture(scope="module")
def zoo() -> tuple[Task, State]:
    """All modules as one task, and what plain PyTorch makes of it."""
    names = list(MODELS)
    task = Task(model=lambda: Zoo(names), data=data_of(), loss=summed, metrics={})
    return task, averaged(task.model, task.data, PLAIN, 2, summed)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Loop, id="loop", marks=pytest.mark.soak),
        pytest.param(lambda task: Workers(task, 2), id="workers"),
        pytest.param(cluster, id="ray"),
    ],
)
def test_all_modules_at_once_train_as_in_plain_pytorch(zoo, make):
    task, expected = zoo
    with contextlib.closing(make(task)) as executor:
        *_, last = rounds(PLAIN, task, cohort=1.0, num_rounds=2, executor=executor)
    if make is cluster:
        sys.modules["ray"].shutdown()
    assert gap(task, last.weights, expected) < 2e-5
