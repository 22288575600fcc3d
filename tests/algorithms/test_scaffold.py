"""SCAFFOLD: by hand, against what it must be equal to, and what it is for."""

import numpy as np
import pytest
import torch

from potluck import Average, FedAvg, Loop, Scaffold, Task, TwoNN, datasets, partitions, rounds
from potluck.core import TrainingError
from potluck.engine.runtime import pure_loss
from potluck.simulation import RoundWork
from potluck.simulation.executors.client_state_file import ClientStateFile
from slope import slope_task


def history(algorithm, task, num_rounds, **kwargs):
    return list(rounds(algorithm, task, num_rounds=num_rounds, **({"cohort": 1.0} | kwargs)))


def control(round):
    return round.state.algorithm["control"]


def test_two_rounds_by_hand():
    # Client 0, (1, 2): gradient 2 (w − 2). Client 1, (1, −4): gradient 2 (w + 4). K = 2, rate 0.1.
    # Round 1 from w = 1 with c = c_i = 0:
    #   client 0: −2, 1.2; −1.6, 1.36.   Δ = 0.36,  c_0 = −0.36 / (2·0.1) = −1.8
    #   client 1: 10, 0; 8, −0.8.        Δ = −1.8,  c_1 = 1.8 / 0.2 = 9
    #   w = 1 − 1.44 / 2 = 0.28, c = (−1.8 + 9) / 2 = 3.6
    # Round 2:
    #   client 0, c − c_0 = 5.4: −3.44 + 5.4 = 1.96, 0.084; −3.832 + 5.4 = 1.568, −0.0728
    #       Δ = −0.3528, c_0 = −1.8 − 3.6 + 0.3528 / 0.2 = −3.636
    #   client 1, c − c_1 = −5.4: 8.56 − 5.4 = 3.16, −0.036; 7.928 − 5.4 = 2.528, −0.2888
    #       Δ = −0.5688, c_1 = 9 − 3.6 + 0.5688 / 0.2 = 8.244
    #   w = 0.28 − 0.9216 / 2 = −0.1808, c = 3.6 + (−1.836 − 0.756) / 2 = 2.304
    algorithm = Scaffold(client_lr=0.1, local_epochs=2)
    _, one, two = history(algorithm, slope_task([(1, 2)], [(1, -4)]), 2)
    assert one.weights[0] == pytest.approx(0.28, rel=1e-5)
    assert control(one)[0] == pytest.approx(3.6, rel=1e-5)
    assert [one.client_states[k][0] for k in (0, 1)] == pytest.approx([-1.8, 9.0], rel=1e-5)
    assert two.weights[0] == pytest.approx(-0.1808, rel=1e-5)
    assert control(two)[0] == pytest.approx(2.304, rel=1e-5)
    assert [two.client_states[k][0] for k in (0, 1)] == pytest.approx([-3.636, 8.244], rel=1e-5)


def test_the_control_moves_by_the_part_of_the_population_that_took_part():
    # One of two clients, K = 1: c_i is its gradient at w = 1, and c half of it.
    task = slope_task([(1, 2)], [(1, -4)])
    _, one = history(Scaffold(client_lr=0.1), task, 1, cohort=1, seed=1)
    (client,) = one.cohort
    gradient = (-2.0, 10.0)[client]
    assert set(one.client_states) == {client}
    assert one.client_states[client][0] == pytest.approx(gradient, rel=1e-5)
    assert control(one)[0] == pytest.approx(gradient / 2, rel=1e-5)
    assert one.weights[0] == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


@pytest.fixture(scope="module")
def digits():
    data = partitions.shards(datasets.digits(), clients=10, seed=0)
    return Task(model=lambda: TwoNN((1, 8, 8)), data=data)


def test_scaffold_from_zero_controls_is_fedavg_with_equal_weights(digits):
    start = digits.initial_weights(3)
    loop, fedavg = Loop(digits), FedAvg(client_lr=0.1, local_epochs=2)
    deltas = [
        loop.train(RoundWork(fedavg, start, np.array([k]), seed=3, round=1)).aggregate
        for k in range(10)
    ]
    _, one = history(Scaffold(client_lr=0.1, local_epochs=2), digits, 1, seed=3)
    np.testing.assert_allclose(one.weights, start + np.mean(deltas, axis=0), rtol=0, atol=1e-6)


def test_with_every_client_in_every_round_the_control_is_the_mean_of_theirs(digits):
    for round in history(Scaffold(client_lr=0.1, local_epochs=2), digits, 4)[1:]:
        mean = np.mean([round.client_states[k] for k in range(10)], axis=0)
        np.testing.assert_allclose(control(round), mean, rtol=0, atol=1e-5)
        assert np.abs(mean).max() > 1e-3


def test_with_some_clients_the_control_is_the_mean_over_the_population(digits):
    """Clients that never took part count as zero."""
    *_, final = history(Scaffold(client_lr=0.1), digits, 3, cohort=3)
    assert 3 < len(final.client_states) < 10
    mean = np.sum(list(final.client_states.values()), axis=0) / 10
    np.testing.assert_allclose(control(final), mean, rtol=0, atol=1e-5)


def test_after_one_full_batch_step_a_client_keeps_its_gradient(digits):
    """With K = 1 option II telescopes to option I: c_i is the gradient at the received weights."""
    _, one, two = history(Scaffold(client_lr=0.1, batch_size=None), digits, 2)
    gradient = torch.func.grad(pure_loss(digits))
    for client in (0, 7):
        inputs, targets = (torch.from_numpy(a.copy()) for a in digits.data.client(client))
        expected = gradient(torch.from_numpy(one.weights), inputs, targets).numpy()
        np.testing.assert_allclose(two.client_states[client], expected, rtol=0, atol=1e-5)
        assert np.abs(expected).max() > 1e-2


def test_scaffold_finds_the_optimum_that_client_drift_hides_from_fedavg():
    # (w − 2)² and 9 (w + 2)²: their sum is least where 2 (w − 2) + 18 (w + 2) = 0, at w = −1.6;
    # clients that each go to their own minimum pull FedAvg towards the middle of ±2.
    task = slope_task([(1, 2)], [(3, -6)])
    setting = {"client_lr": 0.02, "local_epochs": 10}
    fedavg = history(FedAvg(**setting), task, 150)[-1].weights[0]
    scaffold = history(Scaffold(**setting), task, 150)[-1].weights[0]
    assert scaffold == pytest.approx(-1.6, abs=1e-4)
    assert fedavg > -1.3


def test_scaffold_beats_fedavg_on_skewed_digits(digits):
    setting = {"client_lr": 0.1, "local_epochs": 3}
    losses = {
        kind: history(kind(**setting), digits, 8, evaluate_every=8)[-1].metrics["loss"]
        for kind in (FedAvg, Scaffold)
    }
    assert losses[Scaffold] < losses[FedAvg]


def test_the_server_rate_scales_the_model_and_not_the_control():
    task = slope_task([(1, 2)], [(1, -4)])
    whole = history(Scaffold(client_lr=0.1), task, 1)[-1]
    half = history(Scaffold(client_lr=0.1, server=Average(server_lr=0.5)), task, 1)[-1]
    assert half.weights[0] - 1 == pytest.approx((whole.weights[0] - 1) / 2, rel=1e-5)
    assert control(half)[0] == control(whole)[0]


def test_a_round_of_rate_zero_changes_nothing(digits):
    algorithm = Scaffold(client_lr=0.1, client_schedule=lambda t: 1.0 if t < 2 else 0.0)
    _, one, two = history(algorithm, digits, 2)
    assert np.array_equal(one.weights, two.weights)
    assert np.array_equal(control(one), control(two))


def test_resuming_without_client_states_is_refused(digits):
    algorithm = Scaffold(client_lr=0.1)
    _, one = history(algorithm, digits, 1)
    with pytest.raises(ValueError, match=r"resume must be \(number, state, client_states\)"):
        rounds(algorithm, digits, resume=(one.number, one.state))


@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_a_client_that_fails_keeps_what_it_had(executor):
    # Client 1 has a y that makes its loss infinite in float32.
    task = slope_task([(1, 2)], [(1, 1e30)], [(1, -4)])
    algorithm = Scaffold(client_lr=0.1)
    _, one = history(algorithm, task, 1, executor=executor, skip_failures=True)
    assert [failure.client for failure in one.failures] == [1]
    assert set(one.client_states) == {0, 2}
    assert one.uplink_bytes == 2 * 2 * 4
    assert one.downlink_bytes == 3 * 2 * 4
    # c = |S|/N · mean of c_i over the two that gave an update: (−2 + 10) / 3
    assert control(one)[0] == pytest.approx(8 / 3, rel=1e-5)
    with pytest.raises(TrainingError, match="client '1'"):
        history(algorithm, task, 1, executor=executor)


def test_the_file_of_client_states_gives_back_what_was_written():
    file = ClientStateFile()
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    for row in (2, 0):
        file.write(row, rows[row])
    assert np.array_equal(file.read(0, 1000), rows[0])
    assert np.array_equal(file.read(2, 1000), rows[2])
    with pytest.raises(OSError, match="row 3 must be written"):
        file.read(3, 1000)
    file.close()
