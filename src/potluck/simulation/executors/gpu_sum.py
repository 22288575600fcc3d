"""A cohort whose updates are summed on the device that trains it, so that one sum comes back.

It is exact where an algorithm's update is the difference of the weights and its weight the number
of examples: `FedAvg` and `FedProx`. Then the lines of the algorithm have said all when they have
asked for their steps, and the sum is made of the same integers as elsewhere
(`potluck.engine.gpu.reduce`). For other algorithms, and for updates in a codec, the local weights
come back and the algorithm's own lines make the update.

A client whose loss is not finite, or whose update cannot be summed, is left out and handed back: it
is trained where the reason can be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from potluck.algorithms import Algorithm, FedAvg, FedProx, without_statistics
from potluck.core import FixedPointMean
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.gpu.reduce import DeviceSum
from potluck.simulation.executors.executor import Outcome
from potluck.simulation.executors.recording import Recorder, Work

_LINEAR = (FedAvg, FedProx)  # Δ is the local weights less those received; the weight is n


def is_reducible(algorithm: Algorithm, cohort: DeviceCohort) -> bool:
    """Whether `reduce` may be asked for the updates of an algorithm."""
    return type(without_statistics(algorithm)) in _LINEAR and cohort.is_pure


def reduce(
    work: Work, recorders: Sequence[Recorder], cohort: DeviceCohort
) -> tuple[list[Outcome], list[Recorder]]:
    """Train what was recorded, and add the sum of the updates to the mean of `work`.

    Returns:
        The clients that are in it, and those that are not.

    Raises:
        RuntimeError: and others, if the model cannot be vectorised. The mean is then as it was.
    """
    total = DeviceSum(cohort.spec, work.received, cohort.device)
    partial = FixedPointMean(len(work.received))
    partial.bound = work.mean.bound
    done: list[Outcome] = []
    left: list[Recorder] = []
    for first, clients, program in cohort.chunks([recorder.run for recorder in recorders]):
        largest, sums = total.largest(program, clients), program.losses(clients).cpu().numpy()
        weights = np.zeros(clients)
        for k, recorder in enumerate(recorders[first : first + clients]):
            steps, weight = len(recorder.run.steps), float(recorder.examples.num_examples)
            loss = float(sums[k] / np.float32(max(steps, 1)))
            entry = float(largest[k]) * weight * FixedPointMean.scale
            if not (math.isfinite(loss) and partial.has_room(entry)):
                left.append(recorder)
                continue
            weights[k] = weight
            partial.bound += entry
            partial.total += weight
            examples = recorder.examples.num_examples
            done.append(Outcome(recorder.client, weight, loss, examples, steps))
        total.add(program, weights)
    partial.bound -= work.mean.bound
    partial.sum[...] = total.take()
    work.mean.merge(partial)
    return done, left
