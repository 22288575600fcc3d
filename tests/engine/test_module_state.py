"""Whatever a module holds and writes, in whatever way: a client starts from what it received."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from potluck import FedAvg, Loop, Task, fed_sgd, own_data, rounds
from potluck.core import derive_seed
from potluck.core.seeds import stream
from potluck.engine import averaged_tensors, spec_of
from potluck.engine.module.randomness import kept_randomness, seed_generators
from potluck.simulation import RoundWork, Vmap

ALGORITHM = FedAvg(client_lr=0.1, local_epochs=2, batch_size=5)
SIZE, HIDDEN, CLASSES = 6, 8, 3


def clients(sizes=(12, 20, 9)):
    generator = np.random.default_rng(0)
    return own_data.from_clients({
        f"c{k}": (
            generator.standard_normal((size, SIZE)).astype(np.float32),
            generator.integers(0, CLASSES, size),
        )
        for k, size in enumerate(sizes)
    })  # fmt: skip


DATA = clients()


class Net(nn.Module):
    """Two layers, between which a subclass keeps something."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.prepare()

    def prepare(self): ...

    def forward(self, inputs):
        hidden = self.first(inputs)
        if self.training:
            self.keep(hidden.detach())
        return self.last(self.use(hidden))

    def keep(self, hidden): ...

    def use(self, hidden):
        return hidden - self.mean

    def moved(self, hidden):
        return 0.5 * self.mean + 0.5 * (hidden.mean(0) + 1)


class InPlace(Net):
    def keep(self, hidden):
        self.mean.copy_(self.moved(hidden))


class Assigned(Net):
    def keep(self, hidden):
        self.mean = self.moved(hidden)


class ThroughData(Net):
    def keep(self, hidden):
        self.mean.data = self.moved(hidden)


class InPlaceThroughData(Net):
    def keep(self, hidden):
        self.mean.data.copy_(self.moved(hidden))


class InTheTable(Net):
    def keep(self, hidden):
        self._buffers["mean"] = self.moved(hidden)


class RegisteredAgain(Net):
    def keep(self, hidden):
        self.register_buffer("mean", self.moved(hidden))


class ByAnother(Net):
    """A part writes what belongs to the whole."""

    def prepare(self):
        self.first.register_forward_hook(self.hook)

    def hook(self, _module, _inputs, outputs):
        if self.training:
            self.mean = self.moved(outputs.detach())


class MomentumInPlace(Net):
    def prepare(self):
        self.slow = nn.Linear(SIZE, HIDDEN).requires_grad_(False)

    def pairs(self):
        return zip(self.slow.parameters(), self.first.parameters(), strict=True)

    def keep(self, hidden):
        with torch.no_grad():
            for slow, fast in self.pairs():
                slow.mul_(0.9).add_(fast, alpha=0.1)

    def use(self, hidden):
        return hidden + self.slow.bias


class MomentumThroughData(MomentumInPlace):
    def keep(self, hidden):
        for slow, fast in self.pairs():
            slow.data = 0.9 * slow.data + 0.1 * fast.data


class MomentumAssigned(MomentumInPlace):
    def keep(self, hidden):
        new = 0.9 * self.slow.bias + 0.1 * self.first.bias.detach()
        self.slow.bias = nn.Parameter(new.detach(), requires_grad=False)


class MomentumReplaced(MomentumInPlace):
    def keep(self, hidden):
        new = copy.deepcopy(self.slow)
        with torch.no_grad():
            new.bias.mul_(0.9).add_(self.first.bias, alpha=0.1)
        self.slow = new


class Counter(Net):
    def prepare(self):
        self.count = 0

    def keep(self, hidden):
        self.count += 1

    def use(self, hidden):
        return hidden * (1 + 0.1 * self.count)


class CountedOnTheClass(Counter):
    count = 0

    def prepare(self): ...


class CountedInABuffer(Net):
    def prepare(self):
        self.register_buffer("count", torch.tensor(0))

    def keep(self, hidden):
        self.count = self.count + 1

    def use(self, hidden):
        return hidden * (1 + 0.1 * self.count)


class CountedInPlace(CountedInABuffer):
    def keep(self, hidden):
        self.count += 1


class TensorAttribute(Net):
    def prepare(self):
        self.last_mean = torch.zeros(HIDDEN)

    def keep(self, hidden):
        self.last_mean.copy_(hidden.mean(0))

    def use(self, hidden):
        return hidden + self.last_mean


class Cached(Net):
    def prepare(self):
        self.cache = None

    def use(self, hidden):
        if self.cache is None:
            self.cache = hidden.detach().mean(0)
        return hidden + self.cache


class Appended(Net):
    def prepare(self):
        self.seen = []

    def keep(self, hidden):
        self.seen.append(float(hidden.mean()))

    def use(self, hidden):
        return hidden * (1 + 0.1 * len(self.seen))


class Queue(Net):
    def prepare(self):
        self.queue = deque([torch.zeros(HIDDEN)], maxlen=3)

    def keep(self, hidden):
        self.queue.append(hidden.mean(0))

    def use(self, hidden):
        return hidden + torch.stack(list(self.queue)).mean(0)


class Table(Net):
    def prepare(self):
        self.table = {"sum": np.zeros(HIDDEN, np.float32)}

    def keep(self, hidden):
        self.table["sum"] += hidden.mean(0).numpy()

    def use(self, hidden):
        return hidden + 0.1 * torch.tensor(self.table["sum"])


class Meter:
    def __init__(self):
        self.total, self.of = 0.0, []


class Object(Net):
    def prepare(self):
        self.meter = self.first.meter = Meter()  # shared

    def keep(self, hidden):
        self.meter.total += float(hidden.mean())
        self.first.meter.of.append(1)

    def use(self, hidden):
        return hidden + 0.1 * self.meter.total + 0.1 * len(self.meter.of)


class OwnGenerators(Net):
    def prepare(self):
        self.torch = torch.Generator().manual_seed(3)
        self.numpy, self.python = np.random.default_rng(3), random.Random(3)

    def keep(self, hidden):
        noise = torch.randn(HIDDEN, generator=self.torch)
        self.noise = noise * float(self.numpy.random()) + self.python.random()

    def use(self, hidden):
        return hidden + 0.1 * self.noise if self.training else hidden


class Unfreezing(Net):
    def prepare(self):
        self.count = 0

    def keep(self, hidden):
        self.count += 1
        self.first.weight.requires_grad_(self.count < 3)


class Hooking(Net):
    def keep(self, hidden):
        self.first.register_forward_hook(lambda _module, _inputs, outputs: 1.1 * outputs)


class Stateful(Net):
    """Keeps its hidden state from batch to batch."""

    def prepare(self):
        self.cell, self.state = nn.GRUCell(HIDDEN, HIDDEN), None

    def use(self, hidden):
        if self.state is not None and len(self.state) != len(hidden):
            self.state = None
        out = self.cell(hidden, self.state)
        self.state = out.detach()
        return out


class NumpyNoise(Net):
    def use(self, hidden):
        if self.training:
            noise = np.random.standard_normal(hidden.shape)  # noqa: NPY002
            hidden = hidden + 0.1 * torch.from_numpy(noise).float()
        return hidden


class PythonFlip(Net):
    def use(self, hidden):
        return hidden.flip(-1) if self.training and random.random() < 0.5 else hidden


class Dropped(Net):
    def use(self, hidden):
        return functional.dropout(hidden, 0.3, self.training)


AVERAGED = [
    InPlace, Assigned, ThroughData, InPlaceThroughData, InTheTable, RegisteredAgain, ByAnother,
    MomentumInPlace, MomentumThroughData, MomentumAssigned, MomentumReplaced,
]  # fmt: skip
KEPT = [
    Counter, CountedOnTheClass, CountedInABuffer, CountedInPlace, TensorAttribute, Cached, Appended,
    Queue, Table, Object, OwnGenerators, Unfreezing, Hooking, Stateful,
]  # fmt: skip
DRAWING = [NumpyNoise, PythonFlip, Dropped]
MODELS = [*AVERAGED, *KEPT, *DRAWING]
SIDE_BY_SIDE = {  # what vmap may train
    InPlace,
    InPlaceThroughData,
    CountedInPlace,
    MomentumInPlace,
    Dropped,
}


def by_hand(task, num_rounds):
    """Averaging as it is written in textbooks: a fresh module for every client."""
    module = task.module(seed=0)
    data = task.data
    for round in range(1, num_rounds + 1):
        total = {name: np.zeros(t.shape) for name, t in averaged_tensors(module)}
        for client in range(data.num_clients):
            examples = data.client(client)
            local = task.module(seed=0).train()
            with torch.no_grad():
                for (_, mine), (_, start) in zip(
                    averaged_tensors(local), averaged_tensors(module), strict=True
                ):
                    mine.copy_(start)
            order = stream(0, "batches", round, client).permutation(examples.num_examples)
            inputs = torch.from_numpy(np.array(examples.inputs)[order])
            targets = torch.from_numpy(np.array(examples.targets)[order])
            trained = [p for p in local.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=ALGORITHM.client_lr)
            with kept_randomness():
                seed_generators(derive_seed(0, "model", round, client))
                for _ in range(ALGORITHM.local_epochs):
                    for i in range(0, len(inputs), 5):
                        optimizer.zero_grad()
                        loss = functional.cross_entropy(
                            local(inputs[i : i + 5]), targets[i : i + 5]
                        )
                        loss.backward()
                        optimizer.step()
            share = examples.num_examples / data.train.num_examples
            for name, tensor in averaged_tensors(local):
                total[name] += share * tensor.detach().double().numpy()
        with torch.no_grad():
            for name, tensor in averaged_tensors(module):
                tensor.copy_(torch.from_numpy(total[name]))
    return spec_of(module).flatten({n: t.detach() for n, t in averaged_tensors(module)})


@pytest.mark.parametrize("model", MODELS)
def test_every_executor_averages_what_modules_made_anew_give(model, caplog):
    task = Task(model=model, data=DATA)
    expected = by_hand(task, 2)
    for executor in ("loop", "workers", "vmap"):
        *_, last = rounds(ALGORITHM, task, cohort=1.0, num_rounds=2, executor=executor)
        np.testing.assert_allclose(last.weights, expected, atol=1e-5)
    refused = "vmap cannot train this model" in caplog.text
    assert refused is (model not in SIDE_BY_SIDE)


@pytest.mark.parametrize("model", MODELS)
def test_the_order_of_clients_does_not_matter(model):
    task = Task(model=model, data=DATA)
    weights, loop = task.initial_weights(0), Loop(task)

    def train(*cohort):
        found = loop.train(RoundWork(ALGORITHM, weights, np.array(cohort), seed=0, round=1))
        assert not found.failures
        return found.aggregate.copy()

    first = train(1)
    train(0)
    np.testing.assert_array_equal(train(1), first)
    np.testing.assert_array_equal(train(2, 0, 1), train(0, 1, 2))


@pytest.mark.parametrize("model", [Assigned, Counter, Stateful, NumpyNoise, PythonFlip, Queue])
def test_federated_sgd_does_not_pool_what_keeps_or_draws(model):
    task = Task(model=model, data=DATA)
    algorithm = fed_sgd(client_lr=0.1)
    for seed in (0, 1):
        loop, vmap = (
            list(rounds(algorithm, task, cohort=1.0, num_rounds=2, seed=seed, executor=executor))
            for executor in ("loop", "vmap")
        )
        np.testing.assert_allclose(vmap[-1].weights, loop[-1].weights, atol=1e-5)


@pytest.mark.parametrize("model", [Assigned, Counter, Stateful, PythonFlip])
def test_programs_for_devices_leave_such_models_to_the_loop(model, caplog):
    task = Task(model=model, data=DATA)
    weights = task.initial_weights(0)
    arguments = {"seed": 0, "round": 1}
    expected = Loop(task).train(RoundWork(ALGORITHM, weights, np.arange(3), **arguments)).aggregate
    program = Vmap(task, device="cpu")
    found = program.train(RoundWork(ALGORITHM, weights, np.arange(3), **arguments)).aggregate
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert program.refused is not None
    assert "vmap cannot train this model" in caplog.text


class Growing(Net):
    def keep(self, hidden):
        self.mean = torch.zeros(HIDDEN + 1)


def test_a_tensor_that_changes_its_shape_is_named():
    task = Task(model=Growing, data=DATA)
    found = Loop(task).train(
        RoundWork(ALGORITHM, task.initial_weights(0), np.array([0]), seed=0, round=1)
    )
    assert "mean must have shape (8,), got (9,)" in found.failures[0].reason or (
        "size" in found.failures[0].reason
    )


class DrawsWhenEvaluated(Net):
    def prepare(self):
        self.calls = 0

    def use(self, hidden):
        self.calls += 1
        noise = np.random.standard_normal(HIDDEN) + random.random() + self.calls  # noqa: NPY002
        return hidden + torch.from_numpy(noise).float() * torch.rand(HIDDEN)


def test_evaluation_repeats_whatever_the_model_draws_or_counts():
    data = clients((150, 160))
    task = Task(model=DrawsWhenEvaluated, data=data)
    expected = None
    for executor in ("loop", "workers", "loop"):
        first = next(rounds(ALGORITHM, task, num_rounds=0, executor=executor))
        expected = expected or first.metrics
        assert first.metrics == expected
        torch.rand(2)


def test_evaluation_keeps_the_callers_randomness():
    task = Task(model=DrawsWhenEvaluated, data=DATA)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    loop = Loop(task)
    for _ in range(2):
        loop.evaluate(task.initial_weights(0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
