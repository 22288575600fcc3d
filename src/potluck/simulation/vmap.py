"""The `vmap` executor: a cohort as one program.

The clients of a cohort are recorded (`recording`), trained side by side in chunks
(`CohortRuntime`), and the algorithm's own lines make the updates. Clients of similar size share a
chunk, so that they are done together. Where all make one step from the same weights, the cohort is
one large batch (`pooling`).

A model is first tried on two clients for a few steps (`trial`). One that cannot be vectorised, or
that gives something else then, is trained by the plain loop, and a line of the log "potluck" says
why. When a chunk fails later, its clients are trained one by one, which names the one whose data
it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm
from potluck.core import FixedPointMean, Vector
from potluck.simulation.executors import (
    NO_STATES,
    CohortResult,
    Outcome,
    kernel_threads,
    summarise,
)
from potluck.simulation.pooling import Pooling
from potluck.simulation.recording import Answer, Recorder, Unanswered, Work
from potluck.simulation.trial import compare, play, shortened
from potluck.tasks import (
    CohortRuntime,
    Evaluator,
    LocalRun,
    Task,
    TorchRuntime,
    evaluation_batches,
    means,
)

_LOG = logging.getLogger("potluck")
_CHUNK = 256  # clients, beyond which a larger chunk gains nothing
_CHUNK_BYTES = 4 * 2**20  # of the models of a chunk, which the caches of a processor hold
_COPIES = 8  # of each model: weights, gradient, result, what pulls, temporaries
Trained: TypeAlias = tuple[Outcome, Vector | None]  # as `train_client` gives it


class Vmap:
    """All clients of a chunk as one program, in this process.

    Args:
        task: as for every executor.
        chunk: clients that are trained side by side; by the size of the model if None.
        num_threads: of PyTorch's kernels.
        compiles: compile a step that takes long, where a C++ compiler is at hand. When that is
            depends on the clock, so the bits of a run do not repeat.
    """

    def __init__(
        self,
        task: Task,
        chunk: int | None = None,
        num_threads: int = 1,
        compiles: bool = False,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"chunk must be at least 1, got chunk={chunk}. Leave it out to fit the model."
            )
        self._task = task
        self._num_threads = num_threads
        self._plain = TorchRuntime(task)
        self._cohort = CohortRuntime(task, compiles=compiles)
        self._pooling = Pooling(task, self._plain)
        self._evaluator = Evaluator(task)
        self._test = evaluation_batches(task)
        self._tried: set[object] = set()  # kinds of corrections that agreed with the plain loop
        self.chunk = chunk or chunk_for(self._plain.spec.num_bytes)
        self.refused: str | None = None
        """Why the plain loop trains this task; None if it does not."""

    def train(
        self,
        algorithm: Algorithm,
        received: Vector,
        cohort: NDArray[np.int64],
        *,
        seed: int,
        round: int,
        states: Mapping[int, Vector] = NO_STATES,
    ) -> CohortResult:
        """Local training of one cohort, each client of which received the same."""
        offsets = self._task.data.offsets
        sizes = offsets[cohort + 1] - offsets[cohort]
        cohort = cohort[np.argsort(-sizes, kind="stable")]
        mean = FixedPointMean(len(received))
        work = Work(self._task, algorithm, received, seed, round, states, mean)
        outcomes: list[Outcome] = []
        kept: dict[int, Vector] = {}
        with torch.random.fork_rng(devices=[]), kernel_threads(self._num_threads):
            for outcome, state in self.train_clients(work, cohort):
                outcomes.append(outcome)
                if state is not None:
                    kept[outcome.client] = state
        return summarise(mean, outcomes, kept)

    def train_clients(self, work: Work, clients: NDArray[np.int64]) -> Iterator[Trained]:
        """The client halves of these clients, into the mean of `work`; neighbours side by side."""
        pooled = self._pooling.train(work, clients)
        if pooled is not None:
            yield from ((outcome, None) for outcome in pooled)
            return
        for i in range(0, len(clients), self.chunk):
            yield from self._train(work, clients[i : i + self.chunk])

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        self._evaluator.load(weights)
        with kernel_threads(self._num_threads):
            return means([self._evaluator.sums(b) for b in self._test])

    def close(self) -> None:
        """Nothing is held."""

    def _train(self, work: Work, chunk: NDArray[np.int64]) -> list[Trained]:
        """Run the client halves of a chunk until each has its answers."""
        waiting = [Recorder(self._task, client) for client in map(int, chunk)]
        done: list[Trained] = []
        while waiting and self.refused is None:
            asking: list[Recorder] = []
            for recorder in waiting:
                try:
                    done.append(work.train(recorder.client, recorder))
                except Unanswered:
                    asking.append(recorder)
            waiting = asking
            try:
                for alike in _alike(asking):
                    self._answer(alike)
            except Exception as error:  # of the model, or of one client's data
                plain = self._train_plain(work, asking)
                if all(outcome.failure is None for outcome, _ in plain):
                    self._refuse(error)
                return done + plain
        return done + self._train_plain(work, waiting)

    def _train_plain(self, work: Work, recorders: Sequence[Recorder]) -> list[Trained]:
        return [work.train(recorder.client, self._plain) for recorder in recorders]

    def _answer(self, recorders: Sequence[Recorder]) -> None:
        """Train side by side what was recorded, with corrections of one kind.

        Raises:
            Exception: it cannot be.
        """
        kind = _kind(recorders[0].run)
        if kind not in self._tried and self._try(recorders[:2]):
            self._tried.add(kind)
        weights, losses = self._cohort.train([recorder.run for recorder in recorders])
        for recorder, row, loss in zip(recorders, weights, losses.tolist(), strict=True):
            recorder.answers.append(Answer(row, loss))

    def _try(self, recorders: Sequence[Recorder]) -> bool:
        """Compare a few steps with the plain loop's; whether anything could be said.

        Raises:
            DisagreesError: they differ.
        """
        runs = [shortened(recorder.run) for recorder in recorders]
        expected = [play(self._plain, recorder) for recorder in recorders]
        weights, losses = self._cohort.train(runs)
        found = [Answer(row, loss) for row, loss in zip(weights, losses.tolist(), strict=True)]
        said = [
            compare(run.start, one, other)
            for run, one, other in zip(runs, found, expected, strict=True)
        ]
        return all(said)

    def _refuse(self, error: Exception) -> None:
        self.refused = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOG.warning("vmap cannot train this model, so loop does. %s", self.refused)


def chunk_for(model_bytes: int) -> int:
    """How many clients are trained side by side: a function of the machine, not of the moment,
    since the same chunks give the same bits."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = physical // 8 // (_COPIES * model_bytes)
    return int(max(min(_CHUNK, max(_CHUNK_BYTES // model_bytes, 4), fits), 1))


def _kind(run: LocalRun) -> tuple[float | None, float, bool, int]:
    """What runs must have in common to be trained side by side."""
    clip, proximal, drift = run.correction
    return clip, proximal, drift is None, len(run.start)


def _alike(recorders: Sequence[Recorder]) -> Iterable[list[Recorder]]:
    """The clients by the kind of their corrections; of one kind almost always."""
    kinds: dict[object, list[Recorder]] = {}
    for recorder in recorders:
        kinds.setdefault(_kind(recorder.run), []).append(recorder)
    return kinds.values()
