"""What a local step costs, in the plain loop and side by side: a few copies of the first steps.

The time of few steps is taken from that of more, so that what surrounds the steps of a client
cancels: in a round it is spread over many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.engine import TorchRuntime
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.module.randomness import kept_randomness
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.simulation.executors.executor import kernel_threads
from potluck.simulation.executors.parity import play, shortened
from potluck.simulation.executors.recording import Recorder, Unanswered, Work
from potluck.simulation.executors.vmap_executor import chunk_for

_FEW, _MORE = 1, 4  # steps
_REPEATS = 3  # of which the fastest counts, the first of all being no measure
_LONG_SECONDS = 0.2  # of a few steps, which then need no repeating
# What a program saves of a step is the calls around its arithmetic, some tenths of a millisecond.
_LONGEST_STEP_SECONDS = 0.005
_HOPELESS = 1.5  # times the loop's time, from which on a program is not timed any further


class Estimate(NamedTuple):
    """What a local step of one client costs."""

    loop: float  # seconds
    vmap: float  # seconds; infinite where clients cannot be trained side by side, or need not be
    chunk: int  # clients that are trained side by side at that cost
    num_steps: float = 0.0  # of a round like this one, about


def estimate(
    work: Work,
    cohort: NDArray[np.int64],
    clock: Callable[[], float],
    placed: DeviceCohort | None = None,
) -> Estimate:
    """Time the first steps of a cohort's largest clients. Nothing of it is kept.

    Args:
        placed: what trains clients side by side instead of this processor.
    """
    if placed is not None:
        cohort = np.array([k for k in cohort if int(k) not in placed.misfits], np.int64)
    offsets = work.task.data.offsets
    sizes = offsets[cohort + 1] - offsets[cohort]
    cohort = cohort[np.argsort(-sizes, kind="stable")]
    with kept_randomness(), kernel_threads(1):
        plain = TorchRuntime(work.task, one_thread=True)
        usual = chunk_for(plain.spec.num_bytes) if placed is None else placed.chunk
        usual = min(usual, len(cohort))
        recorders = _recorded(work, cohort[:usual])
        if not recorders:
            return Estimate(0.0, np.inf, usual)
        num_steps = len(cohort) * sum(len(r.run.steps) for r in recorders) / len(recorders)

        def alone(some: Sequence[Recorder], steps: int) -> None:
            for recorder in some:
                play(plain, recorder, steps)

        loop = vmap = np.inf
        chunk = usual
        try:
            loop = _per_step(alone, recorders[:1], clock)
            if placed is None and loop > _LONGEST_STEP_SECONDS:
                return Estimate(loop, np.inf, usual, num_steps)
            together = placed or CohortRuntime(work.task)

            def side_by_side(some: Sequence[Recorder], steps: int) -> None:
                together.train([shortened(recorder.run, steps) for recorder in some])

            for clients in sorted({max(usual // 4, 2), usual}):
                seconds = _per_step(side_by_side, recorders[:clients], clock, _HOPELESS * loop)
                if seconds < vmap:
                    chunk, vmap = clients, seconds
                if vmap > _HOPELESS * loop:
                    return Estimate(loop, vmap, usual, num_steps)
        except Exception:  # not to be vectorised, or somebody's data: the round will tell
            return Estimate(loop, np.inf, usual, num_steps)
    return Estimate(loop, vmap, chunk, num_steps)


def _recorded(work: Work, clients: NDArray[np.int64]) -> list[Recorder]:
    """What clients with steps ask for first."""
    recorders: list[Recorder] = []
    for client in map(int, clients):
        recorder = Recorder(work.task, client)
        try:
            work.train(client, recorder)
        except Unanswered:
            recorders.append(recorder)
    return recorders


def _per_step(
    train: Callable[[Sequence[Recorder], int], None],
    recorders: Sequence[Recorder],
    clock: Callable[[], float],
    hopeless: float = np.inf,
) -> float:
    """Seconds of a step of one client, where these are trained at a time; by one look, if that is
    long and beyond `hopeless`."""

    def seconds(steps: int) -> float:
        started = clock()
        train(recorders, steps)
        return clock() - started

    def best(steps: int) -> float:
        fastest, until = np.inf, clock() + _LONG_SECONDS
        for _ in range(_REPEATS):
            fastest = min(fastest, seconds(steps))
            if clock() > until:
                break
        return fastest

    seconds(_FEW)
    longest = max(len(recorder.run.steps) for recorder in recorders)
    few = sum(min(len(recorder.run.steps), _FEW) for recorder in recorders)
    more = sum(min(len(recorder.run.steps), _MORE) for recorder in recorders)
    whole = seconds(_MORE)
    if whole > _LONG_SECONDS and whole / more > hopeless:
        return whole / more
    whole = min(whole, best(_MORE))
    if longest <= _FEW:
        return whole / more
    slope = (whole - best(_FEW)) / (more - few)
    return slope if slope > 0.0 else whole / more
