"""The loss is part of the model: what it holds of it is what trains, and what else trains is not
left at its start."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from potluck import FedAvg, Loop, Task, evaluate, own_data, rounds
from potluck.core import TrainingError, derive_seed
from potluck.core.seeds import stream
from potluck.engine import averaged_tensors, spec_of
from potluck.simulation import RoundWork

SIZE, CLASSES = 6, 3
ALGORITHM = FedAvg(client_lr=0.1, local_epochs=2, batch_size=5)
EXECUTORS = ("loop", "workers", "vmap")
GENERATOR = np.random.default_rng(0)
DATA = own_data.from_clients({
    name: (GENERATOR.standard_normal((n, SIZE)).astype(np.float32), GENERATOR.integers(0, 3, n))
    for name, n in (("a", 12), ("b", 20), ("c", 9))
})  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(SIZE, 300), nn.Linear(300, CLASSES)
        self.strength = 0.3

    def forward(self, inputs):
        return self.head(self.body(inputs).tanh())

    def penalised(self, outputs, targets):
        return functional.cross_entropy(outputs, targets) + self.strength * self.squares()

    def squares(self):
        return sum(parameter.square().mean() for parameter in self.parameters())


def penalised(outputs, targets, model):
    return model.penalised(outputs, targets)


NET = Net()


def by_global(outputs, targets):
    return NET.penalised(outputs, targets)


def by_helper(outputs, targets):
    return by_global(outputs, targets)


def by_closure(net):
    return lambda outputs, targets: net.penalised(outputs, targets)


def by_parts(net):
    parameters = list(net.parameters())

    def loss(outputs, targets):
        squares = sum(parameter.square().mean() for parameter in parameters)
        return functional.cross_entropy(outputs, targets) + net.strength * squares

    return loss


def by_default(net):
    def loss(outputs, targets, model=net):
        return model.penalised(outputs, targets)

    return loss


class Holding:
    def __init__(self, net):
        self.held = {"models": [net]}

    def __call__(self, outputs, targets):
        return self.held["models"][0].penalised(outputs, targets)


class HoldingModule(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, outputs, targets):
        return self.net.penalised(outputs, targets)


LOSSES = {
    "global": lambda net: by_global,
    "helper": lambda net: by_helper,
    "closure": by_closure,
    "parts": by_parts,
    "default": by_default,
    "method": lambda net: net.penalised,
    "partial": lambda net: partial(penalised, model=net),
    "object": Holding,
    "method of an object": lambda net: Holding(net).__call__,
    "module": HoldingModule,
}


def trained_by_hand(net):
    """One round of averaging, with the penalty on the module that trains."""
    total = 0.0
    for client in range(DATA.num_clients):
        examples = DATA.client(client)
        local = Net()
        local.load_state_dict(net.state_dict())
        order = stream(0, "batches", 1, client).permutation(examples.num_examples)
        inputs = torch.from_numpy(np.array(examples.inputs)[order])
        targets = torch.from_numpy(np.array(examples.targets)[order])
        optimizer = torch.optim.SGD(local.parameters(), lr=ALGORITHM.client_lr)
        torch.manual_seed(derive_seed(0, "model", 1, client))
        for _ in range(ALGORITHM.local_epochs):
            for i in range(0, len(inputs), 5):
                optimizer.zero_grad()
                outputs = local(inputs[i : i + 5])
                local.penalised(outputs, targets[i : i + 5]).backward()
                optimizer.step()
        weights = spec_of(local).flatten({n: t.detach() for n, t in averaged_tensors(local)})
        total = total + weights.astype(np.float64) * examples.num_examples
    return total / DATA.train.num_examples


EXPECTED = trained_by_hand(NET)


@pytest.mark.parametrize("name", LOSSES)
def test_a_penalty_on_the_module_that_was_handed_over_acts_on_the_one_that_trains(name, caplog):
    task = Task(model=NET, data=DATA, loss=LOSSES[name](NET))
    before = [parameter.clone() for parameter in NET.parameters()]
    for executor in EXECUTORS:
        *_, last = rounds(ALGORITHM, task, cohort=1.0, num_rounds=1, executor=executor)
        np.testing.assert_allclose(last.weights, EXPECTED, atol=2e-6)
    assert all(map(torch.equal, before, NET.parameters()))
    assert all(parameter.grad is None for parameter in NET.parameters())
    # A list of parameters is not given those of each client, so vmap disagrees with the loop.
    assert ("vmap cannot" in caplog.text) is (name == "parts")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_metric_that_holds_the_module_holds_the_one_that_is_evaluated(executor):
    metrics = {"norm": lambda outputs, targets: NET.squares().expand(len(targets))}
    task = Task(model=NET, data=DATA, metrics=metrics)
    for round in rounds(ALGORITHM, task, cohort=1.0, num_rounds=1, executor=executor):
        norm = float(task.module(round.weights).squares().detach())
        assert round.metrics["norm"] == pytest.approx(norm, rel=1e-5)
        assert evaluate(task, round.weights)["norm"] == pytest.approx(norm, rel=1e-5)


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, outputs, targets):
        return functional.cross_entropy(-torch.cdist(outputs, self.centres), targets)


def with_tensor():
    scale = torch.ones((), requires_grad=True)
    return lambda outputs, targets: scale * functional.cross_entropy(outputs, targets)


class InAList(nn.Module):
    """A layer that PyTorch does not know of, and that never trains."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = [nn.Linear(SIZE, SIZE)], nn.Linear(SIZE, CLASSES)

    def forward(self, inputs):
        return self.head(self.layers[0](inputs))


def small():
    return nn.Linear(SIZE, CLASSES)


UNTRAINED = {
    "parameters of a loss": (small, Centres()),
    "a partial of them": (small, partial(Centres())),
    "a tensor": (small, with_tensor()),
    "another module": (small, by_closure(Net())),
    "a list": (InAList, functional.cross_entropy),
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", UNTRAINED)
def test_weights_that_nobody_would_train_are_refused_in_words(name, executor):
    model, loss = UNTRAINED[name]
    task = Task(model=model, data=DATA, loss=loss)
    with pytest.raises(TrainingError, match="no other weights than the parameters of the model"):
        list(rounds(ALGORITHM, task, cohort=1.0, num_rounds=1, executor=executor))


class Frozen(Centres):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Differentiating(nn.Module):
    """Needs gradients of its inputs, which are made anew for every batch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(SIZE, CLASSES)

    def forward(self, inputs):
        inputs = inputs.clone().requires_grad_()
        with torch.enable_grad():
            outputs = self.head(inputs.tanh())
            slope = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0]
        return outputs + slope.square().mean()


@pytest.mark.parametrize(("model", "loss"), [
    (small, Frozen()),
    (small, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))),
    (Differentiating, functional.cross_entropy),
])  # fmt: skip
def test_constants_of_a_loss_and_gradients_of_inputs_are_no_weights(model, loss):
    task = Task(model=model, data=DATA, loss=loss)
    list(rounds(ALGORITHM, task, cohort=1.0, num_rounds=1))


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, outputs, targets):
        self.steps += 1
        return functional.cross_entropy(outputs / (1 + self.steps), targets)


class AnnealedObject:
    steps = 0

    def __call__(self, outputs, targets):
        self.steps += 1
        return functional.cross_entropy(outputs / (1 + self.steps), targets)


@pytest.mark.parametrize("wrapped", [lambda x: x, partial, lambda x: x.__call__])
@pytest.mark.parametrize("loss", [Annealed, AnnealedObject])
def test_what_a_loss_counts_starts_anew_for_every_client(loss, wrapped, caplog):
    mine = loss()
    task = Task(model=small, data=DATA, loss=wrapped(mine))
    weights, loop = task.initial_weights(0), Loop(task)

    def train(*cohort):
        return loop.train(
            RoundWork(ALGORITHM, weights, np.array(cohort), seed=0, round=1)
        ).aggregate.copy()

    first = train(1)
    train(0)
    np.testing.assert_array_equal(train(1), first)
    *_, vmap = rounds(ALGORITHM, task, cohort=1.0, num_rounds=1, executor="vmap")
    *_, plain = rounds(ALGORITHM, task, cohort=1.0, num_rounds=1)
    np.testing.assert_allclose(vmap.weights, plain.weights, atol=1e-6)
    assert "vmap cannot train this model" in caplog.text
    assert mine.steps == 0
