"""Federated averaging: by hand, and against what it must be equal to."""

import numpy as np
import pytest
import torch

from potluck import FedAvg, Loop, Task, TwoNN, fed_sgd, partitions, rounds, schedules
from potluck.algorithms import Average
from potluck.data import Examples
from potluck.engine import TorchRuntime
from potluck.engine.local_run import batches_of
from potluck.engine.runtime import pure_loss
from potluck.models import accuracy
from potluck.simulation import RoundWork
from slope import slope_task


def last(algorithm, task, num_rounds, **kwargs):
    *_, final = rounds(algorithm, task, num_rounds=num_rounds, cohort=1.0, **kwargs)
    return final


def test_one_round_by_hand():
    # ∂/∂w (w x − y)² = 2 x (w x − y).
    # Client 0, (1, 3) and (2, 0): two steps of B = 1 depend on the order, one of B = ∞ does not:
    #   gradient at w = 1: (2·1·(1 − 3) + 2·2·(2 − 0)) / 2 = (−4 + 8) / 2 = 2, w' = 1 − 0.1·2 = 0.8
    # Client 1, (1, 2):  gradient 2·1·(1 − 2) = −2,                          w' = 1 + 0.1·2 = 1.2
    # weights 2 and 1:  w = (2·0.8 + 1·1.2) / 3 = 2.8 / 3
    task = slope_task([(1, 3), (2, 0)], [(1, 2)])
    final = last(fed_sgd(client_lr=0.1), task, 1)
    assert final.weights[0] == pytest.approx(2.8 / 3, rel=1e-6)
    # losses before the step: (4 + 4) / 2 = 4 and 1, weighted (2·4 + 1·1) / 3 = 3
    assert final.loss == pytest.approx(3.0, rel=1e-6)
    assert final.num_examples == 3


def test_two_local_epochs_by_hand():
    # one client, (1, 2): w ← w − 0.1·2·(w − 2): 1 → 1.2 → 1.36
    final = last(FedAvg(client_lr=0.1, local_epochs=2), slope_task([(1, 2)]), 1)
    assert final.weights[0] == pytest.approx(1.36, rel=1e-6)


def test_the_client_rate_decays_by_rounds():
    # (1, 2) again, rate 0.1 then 0.05: 1 → 1.2 → 1.2 + 0.05·2·0.8 = 1.28
    algorithm = FedAvg(client_lr=0.1, client_schedule=schedules.Exponential(0.5))
    assert last(algorithm, slope_task([(1, 2)]), 2).weights[0] == pytest.approx(1.28, rel=1e-6)


def test_a_server_rate_goes_part_of_the_way():
    algorithm = FedAvg(client_lr=0.1, server=Average(server_lr=0.5))
    assert last(algorithm, slope_task([(1, 2)]), 1).weights[0] == pytest.approx(1.1, rel=1e-6)


@pytest.fixture(scope="module")
def digits_task():
    from potluck import datasets

    data = partitions.unbalanced(datasets.digits(), clients=7, sigma=1.0, seed=0)
    return Task(model=lambda: TwoNN((1, 8, 8)), data=data)


def test_fedavg_with_one_full_batch_step_is_sgd_on_the_union(digits_task):
    """Σ n_k/n (w − η ∇F_k(w)) = w − η ∇F(w)."""
    lr, num_rounds = 0.5, 10
    federated = last(fed_sgd(client_lr=lr), digits_task, num_rounds, seed=4)
    module = digits_task.module()
    weights = torch.from_numpy(digits_task.initial_weights(4).copy())
    inputs, targets = (torch.from_numpy(array) for array in digits_task.data.train)
    loss = pure_loss(digits_task)
    for _ in range(num_rounds):
        weights = weights - lr * torch.func.grad(loss)(weights, inputs, targets)
    assert module is not None
    np.testing.assert_allclose(federated.weights, weights.numpy(), rtol=0, atol=2e-6)


def test_a_runtime_step_is_the_pure_local_step(digits_task):
    inputs, targets = digits_task.data.client(0)
    start = digits_task.initial_weights(0)
    runtime = TorchRuntime(digits_task)
    runtime.take(Examples(inputs, targets))
    runtime.begin(start, np.arange(len(inputs)), seed=0)
    pure = torch.from_numpy(start.copy())
    gradient = torch.func.grad(pure_loss(digits_task))
    x, y = torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy())
    for i in range(0, min(len(inputs), 50), 10):
        runtime.step(slice(i, i + 10), 0.1)
        pure = pure - 0.1 * gradient(pure, x[i : i + 10], y[i : i + 10])
    np.testing.assert_allclose(runtime.end()[0], pure.numpy(), rtol=0, atol=1e-6)
    assert np.abs(runtime.end()[0] - start).max() > 1e-3


def test_the_pure_step_can_be_vectorised_over_clients(digits_task):
    gradient = torch.func.grad(pure_loss(digits_task))
    clients = [digits_task.data.client(k) for k in range(3)]
    size = min(c.num_examples for c in clients)
    x = torch.stack([torch.from_numpy(c.inputs[:size].copy()) for c in clients])
    y = torch.stack([torch.from_numpy(c.targets[:size].copy()) for c in clients])
    w = torch.from_numpy(np.stack([digits_task.initial_weights(k) for k in range(3)]))

    def step(w, x, y):
        return w - 0.1 * gradient(w, x, y)

    together = torch.func.vmap(step)(w, x, y)
    one_by_one = torch.stack([step(w[k], x[k], y[k]) for k in range(3)])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)


def test_batches_cover_every_example_once_and_the_last_may_be_short():
    assert batches_of(25, 10) == (slice(0, 10), slice(10, 20), slice(20, 25))
    assert batches_of(25, None) == (slice(0, 25),)
    assert batches_of(1, 10) == (slice(0, 1),)


def test_a_client_with_one_example_trains():
    final = last(FedAvg(client_lr=0.1), slope_task([(1, 2)], [(1, 2), (2, 4), (3, 6)]), 5)
    assert abs(final.weights[0] - 2.0) < 0.2


def test_fedavg_learns(digits_task):
    final = last(FedAvg(client_lr=0.1, local_epochs=5), digits_task, 5)
    assert final.metrics["accuracy"] > 0.9


def test_a_cohort_is_all_that_moves_the_model():
    """With C = 0 one client is trained, and the result is that client's model alone."""
    task = slope_task([(1, 2)], [(1, -2)])
    *_, final = rounds(FedAvg(client_lr=0.1), task, cohort=0.0, num_rounds=1, seed=1)
    assert len(final.cohort) == 1
    expected = 1.2 if final.cohort[0] == 0 else 0.4  # 1 − 0.1·2·(1 ∓ 2)
    assert final.weights[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"client_lr": 0.0}, "client_lr=0.0"),
        ({"client_lr": float("nan")}, "client_lr=nan"),
        ({"client_lr": 0.1, "local_epochs": 0}, "local_epochs=0"),
        ({"client_lr": 0.1, "batch_size": 0}, "batch_size=0"),
        ({"client_lr": 0.1, "gradient_clip": 0.0}, "gradient_clip=0.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FedAvg(**arguments)


def test_server_rate_must_be_positive():
    with pytest.raises(ValueError, match="server_lr=0"):
        Average(server_lr=0)


def test_accuracy_of_logits():
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(outputs, torch.tensor([1, 0, 0])).tolist() == [1.0, 1.0, 0.0]


def test_training_leaves_global_randomness_and_threads_alone(digits_task):
    torch.manual_seed(5)
    expected = torch.rand(3)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    Loop(digits_task).train(
        RoundWork(
            FedAvg(client_lr=0.1), digits_task.initial_weights(0), np.array([0]), seed=0, round=1
        )
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
