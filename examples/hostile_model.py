"""What one update can show: a server that is no friend reads rows of a table out of it.

The plan is ordinary. The model is not: its 200 first units ask one question of a row ("is this sum
of your columns above t?"), each with another t, and what follows moves so little that the answers
stay. So the difference of neighbouring units in the update is the rows between their thresholds,
and most often that is one. After L. Fowl et al., "Robbing the Fed", ICLR 2022. The device trains on
80 rows of scikit-learn's 569 tumours; the server knows how the others are distributed, but no row.
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer

from potluck import TwoNN
from potluck.config.plan import read_plan
from potluck.core import ConfigError
from potluck.data.own_data import from_clients
from potluck.device import Policy, TorchTrainer
from potluck.engine.task import spec_of

UNITS, COLUMNS = 200, 30
table = load_breast_cancer()
cells = ((table.data - table.data.mean(0)) / table.data.std(0)).astype(np.float32)
order = np.random.default_rng(0).permutation(len(cells))
others = order[100:]
data = from_clients({"ward": (cells[order[:100]], table.target[order[:100]])})  # 20 to test on
rows = data.train.inputs


def thresholds(question: np.ndarray) -> np.ndarray:
    """Between which equally many of the others are."""
    return np.quantile(cells[others] @ question, (np.arange(UNITS) + 0.5) / UNITS)


def hostile_model(ask: float, move: float, answer: float) -> np.ndarray:
    """Weights that the server hands out as the round's model; the sizes of its three layers."""
    chance = np.random.default_rng(1)
    question = max(chance.normal(size=(100, COLUMNS)), key=lambda q: num_alone(q, others[:80]))
    first = [np.tile(ask * question, (UNITS, 1)), -ask * thresholds(question)]
    second = [np.full((UNITS, UNITS), move), np.full(UNITS, 0.001)]
    last = [np.outer([-answer, answer], np.ones(UNITS)), np.zeros(2)]
    return np.concatenate([part.ravel() for part in first + second + last]).astype(np.float32)


def num_alone(question: np.ndarray, some: np.ndarray) -> int:
    """How many of these rows have two neighbouring thresholds to themselves."""
    between = np.searchsorted(thresholds(question), cells[some] @ question)
    return int((np.bincount(between) == 1).sum())


def rows_read(delta: np.ndarray) -> int:
    """How many rows an update shows, every column to a twentieth of its standard deviation."""
    ends = UNITS * COLUMNS, UNITS * (COLUMNS + 1)
    weights = -np.diff(delta[: ends[0]].reshape(UNITS, COLUMNS), axis=0, append=0).astype(float)
    biases = -np.diff(delta[ends[0] : ends[1]], append=0).astype(float)
    guesses = weights[biases != 0] / biases[biases != 0, None]
    return int((np.abs(guesses[:, None] - rows).max(2).min(0) < 0.05).sum())  # [guesses, rows, ·]


def attack(what: str, work: dict[str, Any], model: np.ndarray, policy: Policy) -> None:
    """One round on the device, with what its owner allows."""
    plan = read_plan({"task": {"model": "2nn", "num_classes": 2}, "algorithm": work})
    spec, where = spec_of(TwoNN((COLUMNS,), 2)), {"seed": 0, "round": 1, "client": 0}
    try:
        policy.check_work(plan, len(rows))
        update = TorchTrainer(lambda _: data).train(plan, spec, model, check=lambda: None, **where)
        print(f"{what}: {rows_read(policy.bound(update).delta)} of {len(rows)} rows read")
    except ConfigError:
        print(f"{what}: refused")


step = {"client_lr": 0.1, "local_epochs": 1, "batch_size": "full"}, hostile_model(2**-12, 2**-7, 1)
ordinary = step[0] | {"local_epochs": 5, "batch_size": 10}, hostile_model(2**-8, 2**-14, 2**-14)
attack("one step", *step, Policy())
attack("one step, min_steps = 10", *step, Policy(min_steps=10))
attack("five epochs in batches of 10, min_steps = 10", *ordinary, Policy(min_steps=10))
attack("one step, clip_norm = 0.1", *step, Policy(clip_norm=0.1))
noisy = Policy(clip_norm=0.1, noise_multiplier=0.01)
attack("one step, clip_norm = 0.1, noise_multiplier = 0.01", *step, noisy)
