"""Losses and models that count in variables of functions."""

from collections import defaultdict

import numpy as np
import pytest
from torch import nn
from torch.nn import functional

from potluck import FedAvg, Task, evaluate, own_data, rounds
from potluck.engine.module.variables import Variables

calls = 0
table = {"calls": 0}
tally = defaultdict(int)
last = None
words = {"last": "none"}


def in_a_global(outputs, targets):
    global calls
    calls += 1
    return functional.cross_entropy(outputs, targets) * calls


def on_a_function(outputs, targets):
    on_a_function.calls += 1
    return functional.cross_entropy(outputs, targets) * on_a_function.calls


on_a_function.calls = 0


def in_another(outputs, targets):
    return in_a_global(outputs, targets) / 2


def in_a_table(outputs, targets):
    table["calls"] += 1
    return functional.cross_entropy(outputs, targets) * table["calls"]


def made_by_the_first_call(outputs, targets):
    tally["calls"] += 1
    if not hasattr(made_by_the_first_call, "calls"):
        made_by_the_first_call.calls = 0
    made_by_the_first_call.calls += 1
    both = made_by_the_first_call.calls + tally["calls"]
    return functional.cross_entropy(outputs, targets) * both


def from_none(outputs, targets):
    global last
    last = 1 if last is None else last + 1
    words["last"] = len(words["last"]) if isinstance(words["last"], str) else words["last"] + 1
    return functional.cross_entropy(outputs, targets) * last


def of_a_mean():
    mean = None

    def loss(outputs, targets):
        nonlocal mean
        value = functional.cross_entropy(outputs, targets)
        mean = value.detach() if mean is None else 0.9 * mean + 0.1 * value.detach()
        return value / mean

    return loss


def in_a_cell():
    count, one = 0, [0]

    def loss(outputs, targets):
        nonlocal count
        count += 1
        one[0] += 1
        return functional.cross_entropy(outputs, targets) * (count + one[0])

    return loss


class Counts(nn.Linear):
    def forward(self, inputs):
        global calls
        calls += 1
        return super().forward(inputs) * calls


class InAnObject:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return functional.cross_entropy(outputs, targets) * self.calls


LOSSES = {
    "a global variable": in_a_global,
    "a function's attribute": on_a_function,
    "a function that it calls": in_another,
    "a table": in_a_table,
    "what the first call makes": made_by_the_first_call,
    "what was None": from_none,
    "a tensor that was None": of_a_mean(),
    "a closure": in_a_cell(),
    "the model's code": functional.cross_entropy,
}


def task_of(loss, model=nn.Linear):
    random = np.random.default_rng(0)
    clients = {
        name: (random.normal(size=(20, 6)).astype(np.float32), random.integers(0, 3, 20))
        for name in "ab"
    }
    return Task(model=lambda: model(6, 3), data=own_data.from_clients(clients), loss=loss)


def history(task, executor):
    algorithm = FedAvg(client_lr=0.05, batch_size=7)
    return list(rounds(algorithm, task, cohort=1.0, num_rounds=2, executor=executor))


@pytest.mark.parametrize("where", LOSSES)
def test_a_client_starts_from_what_was_counted_before_any(where):
    model = Counts if where == "the model's code" else nn.Linear
    task = task_of(LOSSES[where], model)
    expected = history(task, "loop")
    if where in ("a global variable", "a table"):
        same = history(task_of(InAnObject()), "loop")
        np.testing.assert_allclose(expected[-1].weights, same[-1].weights, atol=1e-6)
    for executor in ("loop", "workers", "vmap"):
        found = history(task, executor)
        assert found[-1].weights.tobytes() == expected[-1].weights.tobytes()
        assert found[-1].metrics == expected[-1].metrics
    assert evaluate(task, expected[-1].weights) == expected[-1].metrics
    assert last is None
    assert calls == table["calls"] == on_a_function.calls == 0


def test_what_the_caller_changes_between_rounds_stays_and_logs_grow():
    share, log = {"of the loss": 1.0}, []

    def loss(outputs, targets):
        value = functional.cross_entropy(outputs, targets) * share["of the loss"]
        log.append(float(value.detach()))
        return value

    first = task_of(loss)
    running = rounds(FedAvg(client_lr=0.05), first, cohort=1.0)
    start, one = next(running), next(running)
    share["of the loss"] = 0.0
    two = next(running)
    assert (start.weights != one.weights).any()
    assert two.weights.tobytes() == one.weights.tobytes()
    assert len(log) >= 4


def test_a_number_that_is_not_one_and_an_unset_variable_are_no_change():
    missing = float("nan")

    def loss():
        return missing, late

    held = Variables([loss])
    held.keep()
    assert held.put_back() is None
    late = 1
