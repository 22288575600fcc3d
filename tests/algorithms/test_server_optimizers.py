"""Server optimizers: by hand, against other formulas, and one contract for all of them."""

import json

import numpy as np
import pytest
import torch

from potluck import Adagrad, Adam, Average, FedAvg, Momentum, Nesterov, Yogi
from potluck.config.experiment import check_experiment
from potluck.simulation import train

OPTIMIZERS = [
    Average(),
    Average(server_lr=0.5),
    Momentum(),
    Nesterov(server_lr=0.3, momentum=0.5),
    Adagrad(server_lr=0.1),
    Adam(server_lr=0.1),
    Yogi(server_lr=0.1, tau=0.01),
    Adam(server_lr=np.float64(0.1), beta1=np.float64(0.5)),  # as numpy.geomspace gives them
]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)


def vectors(num, dim=50, seed=0):
    return list(np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32))


def walk(optimizer, start, deltas, scales=None):
    """The weights after each step, the start included, and the last state."""
    state, weights = optimizer.init(start), [start]
    for i, delta in enumerate(deltas):
        scale = 1.0 if scales is None else scales[i]
        state, after = optimizer.step(state, weights[-1], delta, scale)
        weights.append(after)
    return weights, state


def entries(*values):
    return np.array(values, np.float32)


def test_momentum_by_hand():
    # v = 0.5·0 + Δ = (1, −2, 0),            w = (0, 0, 1) + 0.1·v = (0.1, −0.2, 1)
    # v = 0.5·(1, −2, 0) + (1, 1, 4) = (1.5, 0, 4),              w = (0.25, −0.2, 1.4)
    deltas = [entries(1, -2, 0), entries(1, 1, 4)]
    weights, state = walk(Momentum(server_lr=0.1, momentum=0.5), entries(0, 0, 1), deltas)
    np.testing.assert_allclose(weights[1], [0.1, -0.2, 1.0], rtol=1e-6)
    np.testing.assert_allclose(weights[2], [0.25, -0.2, 1.4], rtol=1e-6)
    np.testing.assert_allclose(state["momentum"], [1.5, 0, 4], rtol=1e-6)


def test_nesterov_by_hand():
    # v = (1, −2, 0),  Δ + 0.5 v = (1.5, −3, 0),        w = (0, 0, 1) + 0.1·… = (0.15, −0.3, 1)
    # v = (1.5, 0, 4), Δ + 0.5 v = (1.75, 1, 6),                   w = (0.325, −0.2, 1.6)
    deltas = [entries(1, -2, 0), entries(1, 1, 4)]
    weights, _ = walk(Nesterov(server_lr=0.1, momentum=0.5), entries(0, 0, 1), deltas)
    np.testing.assert_allclose(weights[1], [0.15, -0.3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(weights[2], [0.325, -0.2, 1.6], rtol=1e-6)


def test_adagrad_by_hand():
    # τ = 1: v = 1 + (9, 0, 63) = (10, 1, 64); then + (15, 3, 0) = (25, 4, 64)
    # w = Δ / (√v + 1): (3/4.1623, 0, 7.9373/9); then + (√15/6, √3/3, 0)
    deltas = [entries(3, 0, np.sqrt(63)), entries(np.sqrt(15), -np.sqrt(3), 0)]
    weights, state = walk(Adagrad(server_lr=1.0, tau=1.0), entries(0, 0, 0), deltas)
    first = np.array([3 / (np.sqrt(10) + 1), 0, np.sqrt(63) / 9])
    np.testing.assert_allclose(state["v"], [25, 4, 64], rtol=1e-6)
    np.testing.assert_allclose(weights[1], first, rtol=1e-6)
    np.testing.assert_allclose(
        weights[2], first + np.array([np.sqrt(15) / 6, -np.sqrt(3) / 3, 0]), rtol=1e-6
    )


def test_adam_by_hand():
    # β₁ = β₂ = 0.5, τ = 1. Δ = (4, 0, −2): m = Δ/2 = (2, 0, −1), v = (1 + Δ²)/2 = (8.5, 0.5, 2.5)
    # Δ = (0, 0, 2): m = (1, 0, 0.5), v = (4.25, 0.25, 3.25)
    deltas = [entries(4, 0, -2), entries(0, 0, 2)]
    adam = Adam(server_lr=0.1, beta1=0.5, beta2=0.5, tau=1.0)
    weights, state = walk(adam, entries(0, 0, 0), deltas)
    first = 0.1 * np.array([2, 0, -1]) / (np.sqrt([8.5, 0.5, 2.5]) + 1)
    second = 0.1 * np.array([1, 0, 0.5]) / (np.sqrt([4.25, 0.25, 3.25]) + 1)
    np.testing.assert_allclose(weights[1], first, rtol=1e-6)
    np.testing.assert_allclose(weights[2], first + second, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(state["v"], [4.25, 0.25, 3.25], rtol=1e-6)


def test_yogi_by_hand():
    # β₁ = 0, β₂ = 0.5, τ = 1, v = 1: Δ = (2, 0.5, 1), Δ² = (4, 0.25, 1)
    # v < Δ² grows by half of Δ², v > Δ² falls by it: v = (1 + 2, 1 − 0.125, 1)
    # Δ = (1, 1, 1): v = (3 − 0.5, 0.875 + 0.5, 1)
    deltas = [entries(2, 0.5, 1), entries(1, 1, 1)]
    yogi = Yogi(server_lr=0.1, beta1=0.0, beta2=0.5, tau=1.0)
    weights, state = walk(yogi, entries(0, 0, 0), deltas)
    first = 0.1 * deltas[0] / (np.sqrt([3, 0.875, 1]) + 1)
    np.testing.assert_allclose(weights[1], first, rtol=1e-6)
    np.testing.assert_allclose(state["v"], [2.5, 1.375, 1], rtol=1e-6)
    second = 0.1 / (np.sqrt([2.5, 1.375, 1]) + 1)
    np.testing.assert_allclose(weights[2], first + second, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [Momentum(momentum=0.0), Nesterov(momentum=0.0)])
def test_without_momentum_it_is_the_average(optimizer):
    start, *deltas = vectors(6)
    ours, _ = walk(optimizer, start, deltas)
    average, _ = walk(Average(), start, deltas)
    assert np.array_equal(ours[-1], average[-1])


@pytest.mark.parametrize("kind", [Adam, Yogi])
def test_adam_that_keeps_v_is_an_average_at_another_rate(kind):
    """β₁ = 0 makes m = Δ, and β₂ = 1 keeps √v = τ: w ← w + server_lr Δ / (2 τ)."""
    start, *deltas = vectors(6)
    ours, _ = walk(kind(server_lr=0.3, beta1=0.0, beta2=1.0, tau=0.5), start, deltas)
    average, _ = walk(Average(server_lr=0.3), start, deltas)
    np.testing.assert_allclose(ours[-1], average[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "nesterov"), [(Momentum, False), (Nesterov, True)])
def test_momentum_is_sgd_of_pytorch_on_the_negative_update(kind, nesterov):
    start, *deltas = vectors(9)
    weights = torch.from_numpy(start.copy()).requires_grad_()
    sgd = torch.optim.SGD([weights], lr=0.2, momentum=0.8, nesterov=nesterov)
    for delta in deltas:
        weights.grad = torch.from_numpy(-delta)
        sgd.step()
    ours, _ = walk(kind(server_lr=0.2, momentum=0.8), start, deltas)
    np.testing.assert_allclose(ours[-1], weights.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_nesterov_is_momentum_that_looks_one_step_ahead():
    """With w̃ = w + η β v the look-ahead form is momentum that is told the update at w̃."""
    start, *deltas = vectors(9)
    lr, beta = 0.2, 0.8
    plain, velocity = start.astype(np.float64), np.zeros(len(start))
    for delta in deltas:
        velocity = beta * velocity + delta
        plain = plain + lr * velocity
    ours, state = walk(Nesterov(server_lr=lr, momentum=beta), start, deltas)
    np.testing.assert_allclose(
        ours[-1], plain + lr * beta * state["momentum"], rtol=1e-4, atol=1e-5
    )


def reference(name, start, deltas, lr, beta1, beta2, tau):
    """Reddi et al., Algorithm 2, in 64 bits."""
    w, m, v = start.astype(np.float64), 0.0, np.full(len(start), tau**2)
    for d in deltas:
        d = d.astype(np.float64)
        m = beta1 * m + (1 - beta1) * d
        v = {
            "adagrad": v + d**2,
            "yogi": np.where(v > d**2, v - (1 - beta2) * d**2, v + (1 - beta2) * d**2),
            "adam": beta2 * v + (1 - beta2) * d**2,
        }[name]
        w = w + lr * m / (v**0.5 + tau)
    return w


@pytest.mark.parametrize(
    ("name", "optimizer", "betas"),
    [
        ("adagrad", Adagrad(server_lr=0.1, tau=0.02), (0.0, 0.0)),
        ("adam", Adam(server_lr=0.1, tau=0.02), (0.9, 0.99)),
        ("yogi", Yogi(server_lr=0.1, beta1=0.8, beta2=0.95, tau=0.02), (0.8, 0.95)),
    ],
)
def test_adaptive_optimizers_follow_the_paper(name, optimizer, betas):
    start, *deltas = vectors(21)
    ours, _ = walk(optimizer, start, deltas)
    expected = reference(name, start, deltas, 0.1, *betas, 0.02)
    np.testing.assert_allclose(ours[-1], expected, rtol=1e-4, atol=1e-5)


@every_optimizer
def test_a_step_is_pure_and_stays_in_float32(optimizer):
    start, first, second = vectors(3)
    kept = [start.copy(), first.copy(), second.copy()]
    state = optimizer.init(start)
    before = {name: vector.copy() for name, vector in state.items()}
    one_state, one = optimizer.step(state, start, first)
    again_state, again = optimizer.step(state, start, first)
    assert np.array_equal(one, again)
    optimizer.step(one_state, one, second)
    for vector, copy in zip((start, first, second), kept, strict=True):
        assert np.array_equal(vector, copy)
    for name in state:
        assert np.array_equal(state[name], before[name])
        assert np.array_equal(one_state[name], again_state[name])
    for vector in (one, *one_state.values()):
        assert vector.dtype == np.float32
        assert vector.shape == start.shape
        assert not np.shares_memory(vector, start)
        assert not np.shares_memory(vector, first)


@every_optimizer
def test_the_scale_of_a_round_multiplies_the_rate_and_nothing_else(optimizer):
    start, first, second = vectors(3)
    full, state = walk(optimizer, start, [first, second])
    half, half_state = walk(optimizer, start, [first, second], scales=[0.5, 0.5])
    np.testing.assert_allclose(half[-1] - start, (full[-1] - start) / 2, rtol=1e-4, atol=1e-6)
    for name in state:
        assert np.array_equal(state[name], half_state[name])


@every_optimizer
def test_no_update_leaves_a_fresh_state_where_it_is(optimizer):
    start = vectors(1)[0]
    weights, _ = walk(optimizer, start, [np.zeros_like(start)] * 3)
    assert np.array_equal(weights[-1], start)


TABLES = [
    {"name": "average", "server_lr": 0.7},
    {"name": "momentum"},
    {"name": "nesterov", "momentum": 0.5},
    {"name": "adagrad", "server_lr": 0.01},
    {"name": "adam", "server_lr": 0.01},
    {"name": "yogi", "server_lr": 0.01},
]


@pytest.mark.parametrize("server", TABLES, ids=lambda table: table["name"])
def test_a_run_resumed_from_its_checkpoint_is_the_uninterrupted_one(server, tmp_path):
    experiment = check_experiment(
        {
            "name": "server",
            "task": {"data": "digits", "model": "logistic"},
            "partition": {"kind": "shards", "clients": 20},
            "algorithm": {
                "client_lr": 0.1,
                "server": server,
                "client_schedule": {"name": "cosine", "rounds": 8},
                "server_schedule": {"name": "warmup", "rounds": 4},
            },
            "run": {"rounds": 7, "cohort": 0.2, "executor": "loop"},
        },
        "test",
    )
    list(train(experiment, tmp_path / "whole"))
    for stop in (3, 5):
        for round in train(experiment, tmp_path / "parts"):
            if round.number == stop:
                break
    list(train(experiment, tmp_path / "parts"))
    for name in ("rounds.jsonl", "final.safetensors"):
        whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts
    lines = (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()
    losses = [json.loads(line)["metrics"]["loss"] for line in lines]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Momentum, {"server_lr": 0.0}, "server_lr must be above 0, got server_lr=0.0"),
        (Momentum, {"momentum": 1.0}, "momentum must be at least 0 and below 1, got momentum=1.0"),
        (Nesterov, {"momentum": -0.1}, "momentum=-0.1"),
        (Adagrad, {"server_lr": 1.0, "tau": 0.0}, "tau must be above 0, got tau=0.0"),
        (Adam, {"server_lr": 1.0, "beta1": 1.0}, "beta1=1.0"),
        (Adam, {"server_lr": float("nan")}, "server_lr=nan"),
        (
            Yogi,
            {"server_lr": 1.0, "beta2": 1.5},
            "at least 0 and at most 1, got beta2=1.5",
        ),
    ],
)
def test_hyperparameters_out_of_range_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_an_algorithm_hands_the_round_to_the_schedule():
    algorithm = FedAvg(client_lr=1.0, server_schedule=lambda t: 1.0 / t)
    start, delta = vectors(2)
    state = algorithm.server_update(algorithm.server_init(start), delta, round=4)
    np.testing.assert_allclose(state.weights, start + delta / 4, rtol=1e-6)
