"""Measures the cost of a local step, in the plain loop and side by side, on copies of first steps.

The time of few steps is subtracted from that of more, so that the fixed cost of a client cancels.
In a round it is spread over many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.engine import Task, TorchRuntime
from potluck.engine.devices import kernel_threads
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.local_run import LocalRun
from potluck.engine.module.randomness import kept_randomness
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.simulation.executors.executor import RoundWork, empty_mean, started
from potluck.simulation.executors.parity import shortened
from potluck.simulation.executors.vmap_executor import chunk_for

_FEW, _MORE = 1, 4  # steps
_REPEATS = 3  # of which the fastest counts, the first of all being no measure
_LONG_SECONDS = 0.2  # of a few steps, which then need no repeating
# What a program saves of a step is the calls around its arithmetic, some tenths of a millisecond.
_LONGEST_STEP_SECONDS = 0.005
_HOPELESS = 1.5  # times the loop's time, from which on a program is not timed any further


class Estimate(NamedTuple):
    """The cost of a local step of one client."""

    loop: float  # seconds
    vmap: float  # seconds; infinite where clients cannot be trained side by side, or need not be
    chunk: int  # clients that are trained side by side at that cost
    num_steps: float = 0.0  # of a round like this one, about


def estimate(
    task: Task,
    work: RoundWork,
    clock: Callable[[], float],
    placed: DeviceCohort | None = None,
) -> Estimate:
    """Times the first steps of a cohort's largest clients. Their results are dropped.

    Args:
        placed: what trains clients side by side instead of this processor.
    """
    cohort = work.cohort
    if placed is not None:
        cohort = np.array([k for k in cohort if int(k) not in placed.misfits], np.int64)
    cohort = cohort[np.argsort(-task.data.sizes[cohort], kind="stable")]
    with kept_randomness(), kernel_threads(1):
        plain = TorchRuntime(task, one_thread=True)
        usual = chunk_for(plain.spec.num_bytes) if placed is None else placed.chunk
        usual = min(usual, len(cohort))
        runs = _runs(task, work, cohort[:usual])
        if not runs:
            return Estimate(0.0, np.inf, usual)
        num_steps = len(cohort) * sum(len(run.steps) for run in runs) / len(runs)

        def alone(some: Sequence[LocalRun], steps: int) -> None:
            for run in some:
                plain.train(shortened(run, steps))

        loop = vmap = np.inf
        chunk = usual
        try:
            loop = _per_step(alone, runs[:1], clock)
            if placed is None and loop > _LONGEST_STEP_SECONDS:
                return Estimate(loop, np.inf, usual, num_steps)
            together = placed or CohortRuntime(task)

            def side_by_side(some: Sequence[LocalRun], steps: int) -> None:
                together.train([shortened(run, steps) for run in some])

            for clients in sorted({max(usual // 4, 2), usual}):
                seconds = _per_step(side_by_side, runs[:clients], clock, _HOPELESS * loop)
                if seconds < vmap:
                    chunk, vmap = clients, seconds
                if vmap > _HOPELESS * loop:
                    return Estimate(loop, vmap, usual, num_steps)
        except Exception:  # not to be vectorised, or bad data: the round reports it
            return Estimate(loop, np.inf, usual, num_steps)
    return Estimate(loop, vmap, chunk, num_steps)


def _runs(task: Task, work: RoundWork, numbers: NDArray[np.int64]) -> list[LocalRun]:
    """Returns the first requests of clients that have steps."""
    runs = (client.run for client in started(task, work, numbers, empty_mean(work)))
    return [run for run in runs if run is not None]


def _per_step(
    train: Callable[[Sequence[LocalRun], int], None],
    runs: Sequence[LocalRun],
    clock: Callable[[], float],
    hopeless: float = np.inf,
) -> float:
    """Returns the seconds of a step of one client, where these are trained at a time. One
    measurement is enough if it is long and beyond `hopeless`."""

    def seconds(steps: int) -> float:
        started = clock()
        train(runs, steps)
        return clock() - started

    def best(steps: int) -> float:
        fastest, until = np.inf, clock() + _LONG_SECONDS
        for _ in range(_REPEATS):
            fastest = min(fastest, seconds(steps))
            if clock() > until:
                break
        return fastest

    seconds(_FEW)
    longest = max(len(run.steps) for run in runs)
    few = sum(min(len(run.steps), _FEW) for run in runs)
    more = sum(min(len(run.steps), _MORE) for run in runs)
    whole = seconds(_MORE)
    if whole > _LONG_SECONDS and whole / more > hopeless:
        return whole / more
    whole = min(whole, best(_MORE))
    if longest <= _FEW:
        return whole / more
    slope = (whole - best(_FEW)) / (more - few)
    return slope if slope > 0.0 else whole / more
