"""Contracts of models and losses in local training: kept or refused in words, on any executor."""

import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potluck import FedAvg, Loop, Task, Vmap, Workers, evaluate, fed_sgd, own_data, rounds
from potluck.core import TaskError, TrainingError, stream
from potluck.data import Examples
from potluck.data.federated import FederatedData
from potluck.engine import bind
from potluck.engine.first_batch import checked_loss
from potluck.engine.local_run import batches_of
from potluck.models import mean_squared_error
from potluck.simulation import RoundWork

SIZES = (7, 12, 3)
EXECUTORS = {"loop": Loop, "vmap": Vmap, "workers": lambda task: Workers(task, 2)}


def made(targets, num_classes, inputs=None, sizes=SIZES, **rest):
    """Data of clients of these sizes, with a test set that is theirs."""
    offsets = np.cumsum([0, *sizes])
    if inputs is None:
        random = np.random.default_rng(0)
        inputs = random.standard_normal((offsets[-1], 6)).astype(np.float32)
    examples = Examples(inputs, targets)
    return FederatedData(
        name="made",
        train=examples,
        test=examples,
        offsets=offsets,
        clients=tuple(f"c{k}" for k in range(len(sizes))),
        num_classes=num_classes,
        **rest,
    )


def labels(seed=0):
    return np.random.default_rng(seed).integers(0, 3, sum(SIZES))


def numbers(*shape):
    return np.random.default_rng(1).standard_normal((sum(SIZES), *shape)).astype(np.float32)


def one_round(task, executor, algorithm=None):
    """The weights after a round of all clients, and its result, without an evaluation."""
    algorithm = algorithm or FedAvg(client_lr=0.1, batch_size=4)
    weights = task.initial_weights(0)
    runner = {**EXECUTORS, "bf16": lambda task: Loop(task, precision="bf16")}[executor](task)
    try:
        result = runner.train(
            RoundWork(algorithm, weights, np.arange(task.data.num_clients), seed=0, round=1)
        )
    finally:
        runner.close()
    return result


CLASSES = F.cross_entropy
WRONG = {
    "a value per example": (nn.CrossEntropyLoss(reduction="none"), "got one of shape"),
    "a number": (lambda o, t: CLASSES(o, t).item(), "got float"),
    "a NumPy number": (lambda o, t: CLASSES(o, t).detach().numpy(), "got float32"),
    "a tuple": (lambda o, t: (CLASSES(o, t), o), r"got \(float32 \[\], float32"),
    "a dictionary": (lambda o, t: {"loss": CLASSES(o, t)}, "got {loss: float32"),
    "nothing": (lambda o, t: None, "got NoneType"),
    "detached": (lambda o, t: CLASSES(o, t).detach(), "without a gradient"),
    "made anew": (lambda o, t: torch.tensor(CLASSES(o, t).item()), "without a gradient"),
    "whole": (lambda o, t: CLASSES(o, t).long(), "got dtype=torch.int64"),
    "elsewhere": (lambda o, t: CLASSES(o, t).to("meta"), "device of the outputs"),
    "not a number": (lambda o, t: CLASSES(o, t) * float("nan"), "must be a number, got loss=nan"),
    "targets first": (lambda t, o: CLASSES(o, t), "the loss must take a batch of these data"),
    "an assertion": (partial(nn.functional.nll_loss, weight=torch.ones(2)), "weight"),
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_breaks_its_contract_is_refused_in_words(name, executor):
    loss, words = WRONG[name]
    task = Task(model=lambda: nn.Linear(6, 3), data=made(labels(), 3), loss=loss)
    failures = one_round(task, executor).failures
    assert len(failures) == len(SIZES)
    for failure in failures:
        assert re.search(words, failure.reason)
    with pytest.raises((TaskError, TrainingError)):
        list(rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=1, executor=Loop(task)))


class Fields(OrderedDict):
    """A dictionary with attributes, as libraries of language models give."""

    def __getattr__(self, name):
        return self[name]


@dataclass
class Heads:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


Named = namedtuple("Named", "logits hidden")
OUTPUTS = {
    "dataclass": lambda y: Heads(y),
    "dataclass of two": lambda y: Heads(y, y * 2),
    "dictionary with attributes": lambda y: Fields(logits=y, hidden=None),
    "named tuple": lambda y: Named(y, None),
    "one number beside": lambda y: Named(y, y.square().mean()),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weights"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_be_of_any_make(name, weighted):
    class Model(nn.Linear):
        def forward(self, x):
            return OUTPUTS[name](super().forward(x))

    weight = torch.tensor([1.0, 2.0, 5.0]) if weighted else None
    plain = nn.CrossEntropyLoss(weight=weight)
    inner = lambda o, t: CLASSES(o.logits, t, weight=weight)  # noqa: E731
    right = lambda o, t: (o.logits.argmax(1) == t).float()  # noqa: E731
    data = made(labels(), 3)
    task = Task(model=lambda: Model(6, 3), data=data, loss=inner, metrics={"accuracy": right})
    expected = Task(model=lambda: nn.Linear(6, 3), data=data, loss=plain)
    for executor in EXECUTORS:
        found, wanted = one_round(task, executor), one_round(expected, executor)
        assert found.failures == ()
        np.testing.assert_allclose(found.aggregate, wanted.aggregate, atol=1e-6)
    assert one_round(task, "bf16").failures == ()
    weights = task.initial_weights(0)
    if not (weighted and name == "one number beside"):  # which is of a batch, as the model says
        assert evaluate(task, weights) == pytest.approx(evaluate(expected, weights), rel=1e-5)


@pytest.mark.parametrize("outputs", [None, "y"])
def test_outputs_that_are_nothing_are_refused(outputs):
    class Odd(nn.Linear):
        def forward(self, x):
            return outputs

    task = Task(model=lambda: Odd(6, 3), data=made(labels(), 3))
    failures = one_round(task, "loop").failures
    words = "must give what the loss needs" if outputs is None else "got outputs=str"
    assert all(words in failure.reason for failure in failures)
    assert len(failures) == len(SIZES)


BROADCAST = {
    "mse": F.mse_loss,
    "module": nn.MSELoss(),
    "l1": F.l1_loss,
    "huber": nn.HuberLoss(),
    "by hand": lambda o, t: ((o - t) ** 2).mean(),
    "root": lambda o, t: ((o - t) ** 2).mean().sqrt(),
    "absolute": lambda o, t: (t - o).abs().sum() / len(t),
}
PAIRED = {
    "default": mean_squared_error,
    "squeezed": lambda o, t: F.mse_loss(o.squeeze(), t.squeeze()),
    "flattened": lambda o, t: F.l1_loss(o.reshape(-1), t.reshape(-1)),
    "first column": lambda o, t: F.mse_loss(o[:, 0] if o.ndim > 1 else o, t.reshape(-1)),
    "ranking": lambda o, t: (
        ((o.ravel()[:, None] - o.ravel()) - (t.ravel()[:, None] - t.ravel())).square().mean()
    ),
}


def shaped(model_column, target_column, loss):
    def model():
        return nn.Linear(6, 1) if model_column else nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))

    targets = numbers(1) if target_column else numbers()
    return Task(model=model, data=made(targets, 0), loss=loss)


@pytest.mark.parametrize(
    "columns", [(True, False), (False, True)], ids=["[n, 1]-[n]", "[n]-[n, 1]"]
)
@pytest.mark.parametrize("name", BROADCAST)
def test_outputs_that_meet_each_target_are_refused(name, columns):
    task = shaped(*columns, BROADCAST[name])
    failures = one_round(task, "loop").failures
    assert all("compares each with all" in failure.reason for failure in failures)
    assert len(failures) == len(SIZES)
    with pytest.raises(TaskError, match="compares each with all"):
        next(rounds(FedAvg(client_lr=0.1), task, cohort=1.0))


ALIKE = [(True, True), (False, False)]
ANY = [*ALIKE, (True, False), (False, True)]


@pytest.mark.parametrize(
    ("name", "columns"),
    [(name, one) for name in [*BROADCAST, *PAIRED] for one in (ANY if name in PAIRED else ALIKE)],
)
def test_outputs_that_meet_their_own_targets_train(name, columns):
    task = shaped(*columns, {**BROADCAST, **PAIRED}[name])
    assert one_round(task, "loop").failures == ()


def test_shapes_that_only_hold_as_many_numbers_are_no_pairs():
    turned = Task(
        model=lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3))),
        data=made(numbers(3, 2), 0),
    )
    failures = one_round(turned, "loop").failures
    assert "one output for each target" in failures[0].reason


def test_cross_entropy_over_one_class_is_refused():
    task = Task(model=lambda: nn.Linear(6, 1), data=made(labels() % 2, 2))
    assert "for which it is always 0" in one_round(task, "loop").failures[0].reason


def test_a_model_that_cannot_be_given_its_inputs_says_what_they_are():
    task = Task(model=lambda: nn.Linear(5, 3), data=made(labels(), 3))
    for executor in EXECUTORS:
        failure = one_round(task, executor).failures[0]
        assert "the model must take a batch of these data, got inputs=float32 [" in failure.reason
        assert "mat1 and mat2" in failure.reason  # PyTorch's own words are kept
        assert "first layer" in failure.reason


def by_hand(task, algorithm, ignored):
    """One round of plain PyTorch that makes no step where nothing counts, and averages the clients
    that made one."""
    start, total, mean = task.initial_weights(0), 0, 0.0
    for client in range(task.data.num_clients):
        inputs, targets = map(torch.tensor, task.data.client(client))
        order = stream(0, "batches", 1, client).permutation(len(targets))
        module = task.module()
        vector = torch.tensor(start)
        bind(module, vector)
        steps = 0
        for _ in range(algorithm.local_epochs):
            for batch in batches_of(len(targets), algorithm.batch_size):
                rows = order[batch]
                if (targets[rows] == ignored).all():
                    continue
                module.zero_grad()
                task.loss(module(inputs[rows]), targets[rows]).backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= algorithm.client_lr * parameter.grad
                steps += 1
        if steps:
            total += len(targets)
            mean = mean + len(targets) * vector.numpy().astype(np.float64)
    return mean / total


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("how", ["ignored", "ignored in a lambda", "class 2", "weight 0", "plain"])
@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(client_lr=0.1, batch_size=2, local_epochs=2),
        FedAvg(client_lr=0.1, batch_size=4),
        fed_sgd(client_lr=0.1),
    ],
    ids=["B 2", "B 4", "SGD"],
)
def test_there_is_no_step_where_nothing_counts(algorithm, how, executor):
    ignored = 2 if how in ("class 2", "weight 0") else -100
    targets = labels() % 2
    targets[np.random.default_rng(5).random(len(targets)) < 0.5] = ignored
    targets[-SIZES[-1] :] = ignored  # a client of which nothing counts
    loss = {
        "ignored": nn.CrossEntropyLoss(),
        "ignored in a lambda": lambda o, t: CLASSES(o, t),
        "class 2": nn.CrossEntropyLoss(ignore_index=2),
        "weight 0": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.0])),
        "plain": CLASSES,
    }[how]
    task = Task(model=lambda: nn.Linear(6, 3), data=made(targets, 3), loss=loss)
    result = one_round(task, executor, algorithm)
    assert result.failures == ()
    assert np.isfinite(result.loss)
    found = task.initial_weights(0) + result.aggregate
    np.testing.assert_allclose(found, by_hand(task, algorithm, ignored), atol=2e-6)


def test_a_round_of_which_nothing_counts_changes_nothing():
    task = Task(model=lambda: nn.Linear(6, 3), data=made(np.full(sum(SIZES), -100), 3))
    *_, last = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=2)
    np.testing.assert_array_equal(last.weights, task.initial_weights(0))
    assert np.isnan(last.metrics["loss"])
    assert np.isnan(last.metrics["accuracy"])


def test_a_loss_is_looked_at_once_and_without_a_trace():
    calls = []

    def loss(outputs, targets):
        calls.append(torch.rand(()))
        return F.mse_loss(outputs.squeeze(1), targets)

    outputs, targets = torch.randn(5, 1, requires_grad=True), torch.randn(5)
    torch.manual_seed(0)
    checked_loss(loss, outputs, targets, trains=True)
    after = torch.rand(())
    torch.manual_seed(0)
    torch.rand(())
    assert torch.rand(()) == after  # as if it had been called once


def test_operations_that_bfloat16_does_not_have_are_told_in_words():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.both = nn.Linear(6, 4), nn.Bilinear(4, 4, 3)

        def forward(self, inputs):
            hidden = self.first(inputs)
            return self.both(hidden, hidden)

    task = Task(model=Both, data=made(labels(), 3))
    assert one_round(task, "loop").failures == ()
    reason = one_round(task, "bf16").failures[0].reason
    assert "Leave precision='bf16' out, or give that operation tensors of one type." in reason


def test_a_model_of_one_argument_is_told_that_dictionaries_are_given_by_name():
    class Whole(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["numbers"])

    data = made(labels(), 3)
    clients = {
        name: ({"numbers": data.client(k).inputs, "more": data.client(k).inputs}, data.client(k)[1])
        for k, name in enumerate(data.clients)
    }
    task = Task(model=lambda: Whole(6, 3), data=own_data.from_clients(clients, kind="classes"))
    with pytest.raises(TaskError, match=r"by name: def forward\(self, numbers, more\)\.") as told:
        evaluate(task, task.initial_weights(0))
    assert "<locals>" not in str(told.value)
