"""A cohort whose clients all make one step from the same weights, as one large batch.

It is exact where the update of an algorithm is linear in the local weights: `FedAvg` and `FedProx`
with E = 1 and B = ∞, that is federated SGD. Then the mean of the updates is the update of the
mean, and the algorithm makes that one itself; it counts as much as all of them. Elsewhere clients
are trained side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import FedAvg, FedProx, without_statistics
from potluck.core import Vector
from potluck.engine import Task, TorchRuntime
from potluck.engine.gpu.fedsgd_on_device import PooledOnDevice
from potluck.engine.vmap.cohort_trainer import LocalRun
from potluck.engine.vmap.fedsgd_step import PooledStep
from potluck.simulation.executors.executor import Outcome, empty_mean
from potluck.simulation.executors.parity import TOLERANCE, compare, tried, undrawn
from potluck.simulation.executors.recording import Answer, Recorder, Unanswered, Work

_LINEAR = (FedAvg, FedProx)  # Δ is the local weights less those received; the weight is n


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

    def train(self, work: Work, clients: NDArray[np.int64]) -> list[Outcome] | None:
        """Train these clients into the mean of `work`; None, and nothing in the mean, if they are
        none of these, or not for this model."""
        if (
            self._is_refused
            or type(without_statistics(work.algorithm)) not in _LINEAR
            or len(clients) == 0
        ):
            return None
        alone = work._replace(mean=empty_mean(work.algorithm, len(work.received)))
        try:
            recorders = self._recorded(alone, clients)
            if recorders is None:
                return None
            outcomes = self._train(alone, recorders)
            if outcomes is not None:
                work.mean.add(alone.mean.mean(), sum(outcome.weight for outcome in outcomes))
            return outcomes
        except Exception:  # the model mixes examples, or one client's data cannot be used
            self._is_refused = not self._is_tried
            return None

    def _recorded(self, work: Work, clients: NDArray[np.int64]) -> list[Recorder] | None:
        """The clients, if each asks for one step from what it received."""
        recorders: list[Recorder] = []
        for client in map(int, clients):
            recorder = Recorder(self._task, client)
            try:
                work.train(client, recorder)
                return None  # without asking
            except Unanswered:
                if not _is_one_step(recorder.run, work.received):
                    return None
            recorders.append(recorder)
        return recorders

    def _train(self, work: Work, recorders: Sequence[Recorder]) -> list[Outcome] | None:
        if not self._is_tried:
            few = recorders[:2]
            with undrawn():
                both, _, shares = self._step(work.received, few)
            alone = np.stack([tried(self._plain, recorder).weights for recorder in few])
            expected = (shares @ alone).astype(np.float32)
            self._is_tried = compare(
                self._plain.spec,
                work.received,
                Answer(both, 0.0),
                Answer(expected, 0.0),
                self._tolerance,
            )
        local, losses, shares = self._step(work.received, recorders)
        new = local[local.view(np.int32) != work.received.view(np.int32)]
        if not (np.isfinite(losses).all() and np.isfinite(new).all()):
            return None  # side by side, whoever it was is named
        outcomes = [
            Outcome(recorder.client, float(n := len(recorder.run.rows)), loss, n, 1)
            for recorder, loss in zip(recorders, losses, strict=True)
        ]
        first, first_weight = recorders[0], outcomes[0].weight
        first.answers.append(Answer(local, losses[0]))
        outcome, _ = work.train(first.client, first)
        return outcomes if outcome.failure is None and outcome.weight == first_weight else None

    def _step(
        self, received: Vector, recorders: Sequence[Recorder]
    ) -> tuple[Vector, list[float], NDArray[np.float64]]:
        """The mean of the local weights, the losses, and the shares [clients]."""
        runs = [recorder.run for recorder in recorders]
        sizes = np.array([len(run.rows) for run in runs], np.float64)
        shares = sizes / sizes.sum()
        batches = [run.rows[run.steps[0][0]] for run in runs]
        local, losses = self._pooled.step(received, batches, shares, runs[0].steps[0][1])
        return local, losses, shares


def _is_one_step(run: LocalRun, received: Vector) -> bool:
    """One step from what was received, of the plain gradient: a pull towards where it starts
    from is none."""
    clip, _, drift = run.correction
    return len(run.steps) == 1 and run.start is received and clip is None and drift is None
