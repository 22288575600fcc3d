"""Models with several inputs, in a tuple or a dictionary, on every executor."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potluck import (
    FedAvg,
    Loop,
    Task,
    Vmap,
    Workers,
    evaluate,
    fed_sgd,
    federated_evaluation,
    own_data,
    rounds,
)
from potluck.core import DataError, TaskError
from potluck.data.describe import describe
from potluck.engine import bind
from potluck.simulation import Auto

SIZES = {"a": 13, "b": 30, "c": 7}


class Tokens(nn.Module):
    """Means of embeddings under a mask, beside a number."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(11, 8), nn.Linear(9, 3)

    def forward(self, ids, mask, age):
        seen = (self.embedding(ids) * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return self.last(torch.cat([seen, age.unsqueeze(1)], 1))


def clients(kind, sizes=SIZES, seed=0):
    random = np.random.default_rng(seed)
    found = {}
    for name, size in sizes.items():
        mask = (random.random((size, 5)) < 0.7).astype(np.float32)
        mask[:, 0] = 1
        parts = {
            "ids": random.integers(0, 11, (size, 5)),
            "mask": mask,
            "age": random.standard_normal(size).astype(np.float32),
        }
        targets = np.arange(size) % 3
        found[name] = (parts if kind == "dictionary" else tuple(parts.values()), targets)
    return found


def executors():
    return {
        "loop": Loop,
        "vmap": Vmap,
        "workers": lambda task: Workers(task, 2),
        "auto": lambda task: Auto(task, 1, device="cpu"),
    }


@pytest.mark.parametrize("algorithm", [FedAvg(client_lr=0.2, batch_size=4), fed_sgd(client_lr=0.2)])
@pytest.mark.parametrize("kind", ["tuple", "dictionary"])
def test_every_executor_trains_it_as_one_array(kind, algorithm):
    """The model that takes the three from one array is the oracle: nothing there is several."""
    data = own_data.from_clients(clients(kind))
    parts = list(data.train.inputs.values() if kind == "dictionary" else data.train.inputs)
    tests = list(data.test.inputs.values() if kind == "dictionary" else data.test.inputs)

    def one(arrays):
        ids, mask, age = arrays
        return np.concatenate([ids, mask, age[:, None]], 1).astype(np.float32)

    class OneInput(Tokens):
        def forward(self, x):
            return super().forward(x[:, :5].long(), x[:, 5:10], x[:, 10])

    whole = dataclasses.replace(
        data,
        train=data.train._replace(inputs=one(parts)),
        test=data.test._replace(inputs=one(tests)),
    )
    task = Task(model=OneInput, data=whole)
    expected = list(rounds(algorithm, task, cohort=1.0, num_rounds=2))[-1]
    for name, make in executors().items():
        task = Task(model=Tokens, data=data)
        executor = make(task)
        try:
            last = list(rounds(algorithm, task, cohort=1.0, num_rounds=2, executor=executor))[-1]
        finally:
            executor.close()
        np.testing.assert_allclose(last.weights, expected.weights, atol=2e-6, err_msg=name)
        assert last.metrics == pytest.approx(expected.metrics, rel=1e-5), name


@pytest.mark.parametrize("kind", ["tuple", "dictionary"])
def test_it_is_packed_split_described_and_evaluated(kind):
    given = clients(kind)
    data = own_data.from_clients(given)
    again = own_data.from_clients(clients(kind))
    assert data.digest() == again.digest()
    assert data.digest() != own_data.from_clients(clients(kind, seed=1)).digest()
    assert [len(data.client(k).targets) for k in range(3)] == [11, 24, 6]
    rows = dict(describe(data).rows())
    key = "ids" if kind == "dictionary" else "0"
    assert rows[f"input {key}"] == "5 int64"
    task = Task(model=Tokens, data=data)
    weights = task.initial_weights(0)
    module = task.module()
    bind(module, torch.tensor(weights))
    inputs, targets = data.test
    arrays = inputs.values() if kind == "dictionary" else inputs
    outputs = module(*map(torch.tensor, arrays))
    expected = F.cross_entropy(outputs, torch.tensor(targets)).item()
    assert evaluate(task, weights)["loss"] == pytest.approx(expected, rel=1e-5)
    assert not np.isnan(federated_evaluation(task, weights)["accuracy"].per_client).any()


def test_each_input_keeps_its_rows_together():
    number = np.arange(40)
    data = own_data.from_clients({"a": ({"x": number.astype(np.float32), "y": number}, number % 2)})
    for part in (data.train, data.test):
        np.testing.assert_array_equal(part.inputs["x"], part.inputs["y"])
        np.testing.assert_array_equal(part.inputs["y"] % 2, part.targets)


@pytest.mark.parametrize("shared", [True, False])
def test_a_test_set_has_the_same_inputs(shared):
    extra = clients("dictionary", {"a": 9}, seed=4)
    test = extra["a"] if shared else extra
    data = own_data.from_clients(clients("dictionary"), test=test)
    np.testing.assert_array_equal(data.test.inputs["ids"], extra["a"][0]["ids"])
    bad = ({"ids": extra["a"][0]["ids"]}, extra["a"][1])
    with pytest.raises(DataError, match="none called 'mask'"):
        own_data.from_clients(clients("dictionary"), test=bad)


def test_a_row_of_numbers_is_one_input_and_not_several():
    data = own_data.from_clients({"a": (((1.0, 2.0), (3.0, 4.0), (5.0, 6.0)), [0, 1, 0])})
    assert data.train.inputs.shape[1:] == (2,)


def test_what_does_not_fit_is_refused_by_the_name_of_the_input():
    whole = clients("dictionary")
    one = {"a": whole["a"], "b": ({"ids": whole["b"][0]["ids"]}, whole["b"][1])}
    with pytest.raises(DataError, match=r"the inputs \['ids', 'mask', 'age'\] of client 'a'"):
        own_data.from_clients(one)
    whole["b"][0]["age"][3] = np.nan
    with pytest.raises(DataError, match=r"input 'age': .* client 'b'"):
        own_data.from_clients(whole)
    with pytest.raises(DataError, match="taken as they are"):
        own_data.from_clients(clients("tuple"), scale="pixels")


def test_a_model_that_takes_other_inputs_says_which_it_was_given():
    task = Task(model=lambda: nn.Linear(5, 3), data=own_data.from_clients(clients("dictionary")))
    with pytest.raises(TaskError, match=r"{ids: int64 \[.*, 5\], mask: .*unexpected keyword"):
        evaluate(task, task.initial_weights(0))


def test_a_gpu_takes_one_array_of_inputs_and_says_so():
    task = Task(model=Tokens, data=own_data.from_clients(clients("tuple")))
    with pytest.raises(TaskError, match="must be one array on a GPU"):
        Vmap(task, device=torch.device("cpu"))
