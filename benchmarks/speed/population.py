"""Does a round's time depend on the clients that are not in it? 10,000, 100,000, 1,000,000 clients.

1,000 a round, ten examples of 64 features each, a model of 650 parameters, with `vmap`. The three
populations take turns round by round in one process, so that a change in the machine's speed meets
all of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from potluck import FedAvg, LogisticRegression, Task, Vmap
from potluck.core import sample_cohort
from potluck.data import Examples, FederatedData
from potluck.simulation import RoundWork

SIZES = (10_000, 100_000, 1_000_000)
COHORT, EXAMPLES, ROUNDS, SEED = 1000, 10, 30, 1


def measure(sizes: tuple[int, ...] = SIZES, num_rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of a round for each population: the median, and all of them."""
    algorithm = FedAvg(client_lr=0.05)
    tasks = [Task(model=lambda: LogisticRegression((64,)), data=noise(n)) for n in sizes]
    executors = [Vmap(task) for task in tasks]
    states = [algorithm.server_init(task.initial_weights(SEED)) for task in tasks]
    seconds: list[list[float]] = [[] for _ in sizes]
    for number in range(1, num_rounds + 2):  # the first warms up
        for i, executor in enumerate(executors):
            before = time.perf_counter()
            cohort = sample_cohort(sizes[i], COHORT, seed=SEED, round=number)
            weights = algorithm.broadcast(states[i])
            result = executor.train(RoundWork(algorithm, weights, cohort, seed=SEED, round=number))
            states[i] = algorithm.server_update(states[i], result.aggregate, round=number)
            seconds[i].append(round(time.perf_counter() - before, 5))
    medians = {n: statistics.median(s[1:]) for n, s in zip(sizes, seconds, strict=True)}
    return {
        "cohort": COHORT,
        "seconds_a_round": {str(n): round(m, 5) for n, m in medians.items()},
        "largest_to_smallest": round(medians[sizes[-1]] / medians[sizes[0]], 3),
        "rounds": {str(n): s for n, s in zip(sizes, seconds, strict=True)},
        "seed": SEED,
    }


def noise(num_clients: int) -> FederatedData:
    """Random examples; beyond 100,000 they repeat."""
    random = np.random.default_rng(0)
    n, made = num_clients * EXAMPLES, min(num_clients * EXAMPLES, 100_000)
    inputs, targets = random.random((made, 64), np.float32), random.integers(0, 10, made)
    times = -(-n // made)
    train = Examples(np.tile(inputs, (times, 1))[:n], np.tile(targets, times)[:n])
    return FederatedData(
        name="noise",
        train=train,
        test=Examples(train.inputs[:1], train.targets[:1]),
        offsets=np.arange(0, n + 1, EXAMPLES),
        clients=tuple(map(str, range(num_clients))),
        num_classes=10,
    )
