"""The contract of a client half: a generator that asks for training and ends with an Update."""

import pickle

import numpy as np
import pytest
from torch import nn

from potluck import FedAvg, Task, datasets, partitions, rounds
from potluck.algorithms import ClientHalf, client_update, with_statistics
from potluck.core import (
    ClientContext,
    ClientSGD,
    Correction,
    LocalSGD,
    Trained,
    TrainingError,
    Update,
)
from potluck.engine import TorchRuntime, run_of, spec_of
from potluck.simulation.compression import compressed
from slope import slope_task

CLIENT = ClientContext(seed=0, round=1, client=0, num_examples=5)
RECEIVED = np.array([1.0], np.float32)


class NoGenerator(FedAvg):
    def client_update(self, received, client):
        return Update(received, 1.0, 0.0, 1)


class YieldsWeights(FedAvg):
    def client_update(self, received, client):
        yield received
        return Update(received, 1.0, 0.0, 1)


class ReturnsDelta(FedAvg):
    def client_update(self, received, client):
        local = yield self.local_sgd(received, client.round)
        return local.weights - received


class ReturnsNothing(FedAvg):
    def client_update(self, received, client):
        yield self.local_sgd(received, client.round)


BROKEN = {
    NoGenerator: r"NoGenerator\.client_update must be a generator, got Update\. .*yield LocalSGD",
    YieldsWeights: r"YieldsWeights\.client_update must yield LocalSGD\(…\), got ndarray",
    ReturnsDelta: r"ReturnsDelta\.client_update must return an Update, got ndarray\. End it",
    ReturnsNothing: r"ReturnsNothing\.client_update must return an Update, got None\. End it",
}
every_broken = pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)


def trained(request):
    return Trained(request.start + 1, 0.5, 1)


@every_broken
def test_a_client_half_that_breaks_the_contract_is_named(kind):
    with pytest.raises(TypeError, match=BROKEN[kind]):
        client_update(kind(client_lr=0.1), RECEIVED, CLIENT, trained)


@every_broken
@pytest.mark.parametrize("executor", ["loop", "workers", "vmap"])
def test_in_a_round_client_and_round_are_named_too(kind, executor):
    task = slope_task([(1, 2)], [(1, -4)])
    message = rf"^client '0' \(number 0\), round 1: .*{BROKEN[kind]}"
    with pytest.raises(TrainingError, match=message):
        list(rounds(kind(client_lr=0.1), task, cohort=1.0, num_rounds=1, executor=executor))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, inputs):
        return self.out(self.norm(inputs.flatten(1)))


@every_broken
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_what_wraps_an_algorithm_checks_the_one_inside(kind, codec):
    data = partitions.iid(datasets.digits(), clients=10, seed=0)
    task = Task(model=Normed, data=data)
    with pytest.raises(TrainingError, match=BROKEN[kind]):
        list(rounds(kind(client_lr=0.1), task, cohort=2, num_rounds=1, codec=codec))


class Untrained(FedAvg):
    """Asks for nothing."""

    def client_update(self, received, client):
        yield from ()
        return Update(np.ones_like(received), 1.0, 0.0, 0)


@pytest.mark.parametrize("executor", ["loop", "workers", "vmap"])
def test_a_client_half_may_ask_for_nothing(executor):
    task = slope_task([(1, 2)], [(1, -4)])
    before, after = rounds(
        Untrained(client_lr=0.1), task, cohort=1.0, num_rounds=1, executor=executor
    )
    assert after.weights[0] == before.weights[0] + 1.0


class Halved(FedAvg):
    """Trains again at half the rate from where it was, as often as the loss says."""

    def client_update(self, received, client):
        start, lr, local = received, self.client_lr_at(client.round), None
        while local is None or (local.loss > 1e-3 and lr > 0.01):
            local = yield LocalSGD(start=start, lr=lr)
            start, lr = local.weights.copy(), lr / 2
        return Update(start - received, float(client.num_examples), local.loss, local.num_steps)


@pytest.mark.parametrize("executor", ["workers", "vmap"])
def test_clients_may_ask_differently_often(executor):
    task = slope_task([(1, 2)], [(1, 1.01)], [(1, -4)], [(0.5, 1)])
    run = {"cohort": 1.0, "num_rounds": 3}
    loop = list(rounds(Halved(client_lr=0.2), task, **run))
    other = list(rounds(Halved(client_lr=0.2), task, executor=executor, **run))
    for one, two in zip(loop, other, strict=True):
        np.testing.assert_allclose(one.weights, two.weights, rtol=1e-5)
    assert len({round.weights[0] for round in loop}) == 4


def test_a_request_is_a_plain_value():
    half = ClientHalf(FedAvg(client_lr=0.1, local_epochs=2, gradient_clip=1.0), RECEIVED, CLIENT)
    again = pickle.loads(pickle.dumps(half.request))
    assert again.start.tobytes() == RECEIVED.tobytes()
    assert again[1:] == half.request[1:] == (0.1, 2, 10, Correction(gradient_clip=1.0), ClientSGD())


def test_a_stage_passes_requests_through():
    algorithm = FedAvg(client_lr=0.1)
    plain = client_update(algorithm, RECEIVED, CLIENT, trained)
    for codec in ("bfloat16", "int8"):
        found = client_update(compressed(algorithm, codec), RECEIVED, CLIENT, trained)
        assert found.delta[0] == pytest.approx(plain.delta[0], rel=1e-2)
        assert found[1:4] == plain[1:4]


def test_an_algorithm_sees_the_parameters_and_not_the_statistics():
    data = partitions.iid(datasets.digits(), clients=10, seed=0)
    task = Task(model=Normed, data=data)
    spec, start = spec_of(task.module()), task.initial_weights(0)
    seen = []

    class Looks(FedAvg):
        def client_update(self, received, client):
            seen.append(len(received))
            return (yield from FedAvg.client_update(self, received, client))

    runtime, client = TorchRuntime(task), CLIENT._replace(num_examples=int(data.sizes[0]))
    update = client_update(
        with_statistics(Looks(client_lr=0.1), spec),
        start,
        client,
        lambda request: runtime.train(run_of(task, request, client)),
    )
    assert seen == [spec.num_parameters]
    assert len(update.delta) == len(start) > spec.num_parameters
