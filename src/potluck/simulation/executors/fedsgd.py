"""A cohort whose clients all make one step from the same weights, as one large batch.

It is exact where the update of an algorithm is linear in the local weights: `FedAvg` and `FedProx`
with E = 1 and B = ∞, that is federated SGD. Then the mean of the updates is the update of the mean.
The first client gets the mean of all local weights as its answer, and its update counts for all.
Other cohorts are trained side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import reports_its_model
from potluck.core import PLAIN_SGD, FixedPointMean, Trained, Vector
from potluck.engine import Task, TorchRuntime
from potluck.engine.gpu.fedsgd_on_device import PooledOnDevice
from potluck.engine.local_run import LocalRun
from potluck.engine.vmap.fedsgd_step import PooledStep
from potluck.simulation.executors.executor import (
    Outcome,
    RoundClient,
    RoundWork,
    empty_mean,
    started,
)
from potluck.simulation.executors.parity import TOLERANCE, compare, tried, undrawn


class Pooling:
    """Trains such cohorts for one task; `plain` is what its first step is compared with."""

    def __init__(
        self,
        task: Task,
        plain: TorchRuntime,
        pooled: PooledStep | PooledOnDevice | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        self._task, self._plain, self._tolerance = task, plain, tolerance
        self._pooled = pooled or PooledStep(task)
        self._is_tried = self._is_refused = False

    def train(
        self, work: RoundWork, numbers: NDArray[np.int64], mean: FixedPointMean
    ) -> list[Outcome] | None:
        """Trains these clients into the mean. Returns None and leaves the mean alone if the clients
        or the model do not suit."""
        if self._is_refused or not reports_its_model(work.algorithm) or len(numbers) == 0:
            return None
        alone = empty_mean(work)
        try:
            clients: list[RoundClient] = []
            for client in started(self._task, work, numbers, alone):
                if client.run is None or not _is_one_step(client.run, work.received):
                    return None
                clients.append(client)
            outcomes = self._train(work.received, clients)
            if outcomes is not None:
                mean.add(alone.mean(), sum(outcome.weight for outcome in outcomes))
            return outcomes
        except Exception:  # the model mixes examples, or one client's data cannot be used
            self._is_refused = not self._is_tried
            return None

    def _train(self, received: Vector, clients: Sequence[RoundClient]) -> list[Outcome] | None:
        runs = [client.run for client in clients if client.run is not None]
        if not self._is_tried:
            few = runs[:2]
            with undrawn():
                both, _, shares = self._step(received, few)
            alone = np.stack([tried(self._plain, run).weights for run in few])
            expected = (shares @ alone).astype(np.float32)
            found, wanted = Trained(both, 0.0, 1), Trained(expected, 0.0, 1)
            self._is_tried = compare(self._plain.spec, received, found, wanted, self._tolerance)
        local, losses, shares = self._step(received, runs)
        new = local[local.view(np.int32) != received.view(np.int32)]
        if not (np.isfinite(losses).all() and np.isfinite(new).all()):
            return None  # side by side the client is named
        outcomes = [
            Outcome(client.number, float(n := client.num_examples), loss, n, 1)
            for client, loss in zip(clients, losses, strict=True)
        ]
        clients[0].answer(Trained(local, losses[0], 1))
        whole, _ = clients[0].result
        return outcomes if whole.failure is None and whole.weight == outcomes[0].weight else None

    def _step(
        self, received: Vector, runs: Sequence[LocalRun]
    ) -> tuple[Vector, list[float], NDArray[np.float64]]:
        """Returns the mean of the local weights, the losses, and the shares [clients]."""
        sizes = np.array([len(run.rows) for run in runs], np.float64)
        shares = sizes / sizes.sum()
        batches = [run.rows[run.steps[0][0]] for run in runs]
        local, losses = self._pooled.step(received, batches, shares, runs[0].steps[0][1])
        return local, losses, shares


def _is_one_step(run: LocalRun, received: Vector) -> bool:
    """True if a run is one plain step of SGD from the received weights; there a proximal term is
    0."""
    clip, _, drift = run.correction
    is_plain = run.optimizer == PLAIN_SGD and clip is None and drift is None
    return is_plain and len(run.steps) == 1 and run.start is received
