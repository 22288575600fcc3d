"""FedProx: by hand, and against what it must be equal to."""

import numpy as np
import pytest

from potluck import FedAvg, FedProx, Task, TwoNN, datasets, partitions, rounds
from slope import slope_task


def last(algorithm, task, num_rounds=1, **kwargs):
    *_, final = rounds(algorithm, task, num_rounds=num_rounds, **({"cohort": 1.0} | kwargs))
    return final


@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_without_a_proximal_term_it_is_fedavg_to_the_bit(executor):
    data = partitions.shards(datasets.digits(), clients=10, seed=0)
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    kwargs = {"cohort": 0.5, "num_rounds": 3, "seed": 2, "executor": executor}
    fedavg = last(FedAvg(client_lr=0.1, local_epochs=2), task, **kwargs)
    fedprox = last(FedProx(client_lr=0.1, local_epochs=2, mu=0.0), task, **kwargs)
    assert fedprox.weights.tobytes() == fedavg.weights.tobytes()


def test_one_round_by_hand():
    # (1, 2), μ = 1: g = 2 (w − 2) + (w − 1). From w = 1 with rate 0.1:
    #   g = −2 + 0 = −2,      w = 1.2
    #   g = −1.6 + 0.2 = −1.4, w = 1.34
    final = last(FedProx(client_lr=0.1, local_epochs=2, mu=1.0), slope_task([(1, 2)]))
    assert final.weights[0] == pytest.approx(1.34, rel=1e-6)


def test_many_local_steps_reach_the_proximal_point():
    # argmin (w − 2)² + μ/2 (w − 1)² = (2·2 + μ·1) / (2 + μ); with μ = 6: 10/8
    final = last(FedProx(client_lr=0.05, local_epochs=100, mu=6.0), slope_task([(1, 2)]))
    assert final.weights[0] == pytest.approx(1.25, rel=1e-5)


def test_a_stronger_pull_keeps_clients_closer():
    data = partitions.shards(datasets.digits(), clients=10, seed=0)
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    start = task.initial_weights(0)
    moved = [
        np.linalg.norm(last(FedProx(client_lr=0.1, local_epochs=3, mu=mu), task).weights - start)
        for mu in (0.0, 0.1, 1.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_a_negative_pull_is_refused():
    with pytest.raises(ValueError, match=r"mu must be at least 0, got mu=-0\.1"):
        FedProx(client_lr=0.1, mu=-0.1)
    with pytest.raises(ValueError, match=r"client_lr=0\.0"):
        FedProx(client_lr=0.0, mu=0.1)
