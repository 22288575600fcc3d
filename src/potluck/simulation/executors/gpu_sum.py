"""A cohort whose updates are summed on the device that trains it, so that one sum comes back.

It is exact where an algorithm's update is the difference of the weights and its weight the number
of examples: `FedAvg` and `FedProx`. Then the request for local training determines the update, and
the sum is made of the same integers as elsewhere (`potluck.engine.gpu.reduce`). For other
algorithms, and for updates in a codec, the local weights come back and the algorithm's own lines
make the update.

A client whose loss is not finite, or whose update cannot be summed, is left out and returned. It is
then trained by the path that names the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from potluck.algorithms import Algorithm, reports_its_model
from potluck.core import FixedPointMean, Vector
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.gpu.reduce import DeviceSum
from potluck.engine.local_run import LocalRun
from potluck.simulation.executors.executor import Outcome


def is_reducible(algorithm: Algorithm, cohort: DeviceCohort) -> bool:
    """True if `reduce` can sum the updates of an algorithm."""
    return reports_its_model(algorithm) and cohort.is_pure


def reduce(
    numbers: Sequence[int],
    runs: Sequence[LocalRun],
    received: Vector,
    cohort: DeviceCohort,
    mean: FixedPointMean,
) -> tuple[list[Outcome], list[int]]:
    """Trains these clients, given by their runs, and adds the sum of their updates to the mean.

    Returns:
        The clients that are in it, and the numbers of those that are not.

    Raises:
        RuntimeError: and others, if the model cannot be vectorised. The mean is then as it was.
    """
    total = DeviceSum(cohort.spec, received, cohort.device)
    partial = FixedPointMean(len(received))
    partial.bound = mean.bound
    done: list[Outcome] = []
    left: list[int] = []
    for first, clients, program in cohort.chunks(runs):
        largest, sums = total.largest(program, clients), program.losses(clients).cpu().numpy()
        weights = np.zeros(clients)
        for k, run in enumerate(runs[first : first + clients]):
            steps, weight = len(run.steps), float(len(run.rows))
            loss = float(sums[k] / np.float32(max(steps, 1)))
            entry = float(largest[k]) * weight * FixedPointMean.scale
            if not (math.isfinite(loss) and partial.has_room(entry)):
                left.append(numbers[first + k])
                continue
            weights[k] = weight
            partial.bound += entry
            partial.total += weight
            done.append(Outcome(numbers[first + k], weight, loss, len(run.rows), steps))
        total.add(program, weights)
    partial.bound -= mean.bound
    partial.sum[...] = total.take()
    mean.merge(partial)
    return done, left
