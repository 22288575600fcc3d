"""The `workers` executor: one client per core, in processes that run until it is closed.

Kernels are single-threaded, because two clients on two cores do more than one client on both.
Each worker takes the next client of the cohort when it has finished one, largest first. It adds the
update to its own partial sum in shared memory. Once a round the parent adds up one sum per worker.
The weights and the sums lie in shared memory and the client data are shared with the parent, so
that a round sends a few bytes through a pipe. Since sums are exact in any order, it does not matter
which worker took which client.

With `chunk`, a worker takes so many clients at a time and trains them side by side, as `vmap` does.
A cohort is then cut into a multiple of as many chunks as there are workers, of about equal work.

Where an algorithm's clients keep a state, the parent writes those of the cohort to a file that
the workers share, and reads the new ones there. The room for what travels is that of one model,
until an algorithm that sends more is trained: then the processes are started again with more.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm, num_wide
from potluck.core import FixedPointMean, Vector
from potluck.core.allocator import keep_freed
from potluck.core.validate import as_count
from potluck.engine import Evaluator, Task, evaluation_batches, means, spec_of
from potluck.engine.native.kernels import kernels_of
from potluck.engine.precision import Precision, check_precision
from potluck.engine.task import Remade
from potluck.simulation.executors.client_state_file import ClientStateFile
from potluck.simulation.executors.executor import CohortResult, Outcome, RoundWork, summarise
from potluck.simulation.executors.loop import OneByOne
from potluck.simulation.executors.process_pool import ProcessPool, has_parent


class _Shared(NamedTuple):
    """Memory shared by the parent and all workers."""

    received: Any  # float32 [vectors · dim]
    next_job: Any  # int64, the number of jobs taken so far
    states: ClientStateFile | None  # the cohort's, by place; none until some are needed


class _Training(NamedTuple):
    """The request to the workers in a round."""

    work: RoundWork  # its cohort by place; without what was received and the states
    length: int  # of what was received, and of an update
    has_state: list[bool]  # by place
    state_length: int  # of those that have one
    jobs: list[tuple[int, int]]  # places from … to …


class _Trained(NamedTuple):
    """The answer of a worker; its sum is in shared memory."""

    total: float
    bound: float
    outcomes: list[Outcome]
    written: dict[int, int]  # the places with a new state, and its length


class Workers:
    """Persistent processes, each training one client at a time.

    Args:
        task: as for every executor.
        num_workers: processes; the number of cores this process may use if None.
        chunk: clients that a process trains side by side; if None, one at a time, with the bits of
            `Loop`.
        precision: of local training, one client at a time: "float32" or "bf16".
    """

    def __init__(
        self,
        task: Task,
        num_workers: int | None = None,
        *,
        chunk: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        if num_workers is not None:
            advice = "Leave it out to use every core."
            num_workers = as_count("num_workers", num_workers, 1, advice)
        if chunk is not None:
            chunk = as_count("chunk", chunk, 1, "Leave it out to train one at a time.")
        check_precision(precision, torch.device("cpu"))
        self._task, self._chunk = task, chunk
        self._precision: Precision = precision
        module = task.module()
        kernels_of(module)
        spec = spec_of(module)
        self._dim, self._wide = spec.dim, spec.dim - spec.num_parameters
        self._num_workers = num_workers or available_cores()
        if chunk is None:
            keep_freed()  # here too: a round's mean and weights go where those before them were
        self._start(vectors=1, states=None)

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort.

        Raises:
            WorkerError: a worker process exited. The executor is closed.
        """
        self._task.begin(work.seed)
        self._make_room(work.algorithm)
        sizes = self._task.data.sizes[work.cohort]
        order = np.argsort(-sizes, kind="stable")
        cohort = work.cohort[order]
        states = [work.states.get(client) for client in cohort.tolist()]
        file = self._shared.states
        for place, state in enumerate(states):
            if state is not None and file is not None:
                file.write(place, state)
        request = _Training(
            work._replace(cohort=cohort, received=work.received[:0], states={}),
            len(work.received),
            [state is not None for state in states],
            max((len(state) for state in states if state is not None), default=0),
            self._cut(sizes[order]),
        )
        replies: list[_Trained] = self._ask("train", work.received, request)
        wide = num_wide(work.algorithm)
        length = len(work.received) + wide
        partials = [
            FixedPointMean.of(sum[:length], reply.total, reply.bound, wide)
            for sum, reply in zip(self._sums, replies, strict=True)
        ]
        mean = partials[0]  # summed in place: no partial sum is used twice
        for other in partials[1:]:
            mean.merge(other)
        kept: dict[int, Vector] = {}
        for reply in replies:
            if file is not None:
                kept |= {int(cohort[p]): file.read(p, n) for p, n in reply.written.items()}
        outcomes = [outcome for reply in replies for outcome in reply.outcomes]
        return summarise(mean, [(outcome, kept.get(outcome.client)) for outcome in outcomes])

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, its batches shared out."""
        replies = self._ask("evaluate", weights, (self._task.last_seed(), len(weights)))
        numbered = sorted((pair for reply in replies for pair in reply), key=lambda pair: pair[0])
        return means(self._task, weights, [sums for _, sums in numbered])

    def close(self) -> None:
        """Ends the processes. May be called twice."""
        self._pool.close()
        if self._shared.states is not None:
            self._shared.states.close()
            self._shared = self._shared._replace(states=None)

    def _cut(self, sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Divides clients of these sizes into jobs, the largest first."""
        if self._chunk is None:
            return [(place, place + 1) for place in range(len(sizes))]
        rounds_of_jobs = -(-len(sizes) // (self._num_workers * self._chunk))
        return cut(sizes, rounds_of_jobs * self._num_workers, self._chunk)

    def _start(self, vectors: int, states: ClientStateFile | None) -> None:
        # A fork shares the data and the model as they are, whatever they are made of (lambdas,
        # classes of a notebook), and starts in milliseconds.
        context = mp.get_context("fork" if sys.platform == "linux" else "spawn")
        self._vectors = vectors
        received: Any = context.RawArray(ctypes.c_float, vectors * self._dim)
        self._shared = _Shared(received, context.Value(ctypes.c_int64, 0), states)
        self._received: Vector = np.frombuffer(received, np.float32)
        num_numbers = vectors * self._dim + self._wide
        sums: list[Any] = [
            context.RawArray(ctypes.c_int64, num_numbers) for _ in range(self._num_workers)
        ]
        self._sums: list[NDArray[np.int64]] = [np.frombuffer(sum, np.int64) for sum in sums]
        body = partial(_WorkerBody, self._task, self._chunk, self._precision, self._shared)
        self._pool = ProcessPool(context, [("a worker", partial(body, sum)) for sum in sums])

    def _make_room(self, algorithm: Algorithm) -> None:
        """Restarts the processes with more room, if this algorithm needs it."""
        has_file = self._shared.states is not None
        stateful = algorithm.client_vectors > 0 or has_file
        vectors = max(algorithm.vectors, self._vectors)
        if self._pool.processes and (vectors > self._vectors or stateful != has_file):
            self.close()
            self._start(vectors, ClientStateFile() if stateful else None)

    def _ask(self, method: str, received: Vector, argument: object) -> list[Any]:
        """Sends all workers the same request."""
        self._received[: len(received)] = received
        self._shared.next_job.value = 0
        return self._pool.ask(method, [argument] * self._num_workers)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else mp.cpu_count()


class _WorkerBody:
    """The methods of a worker process."""

    def __init__(
        self, task: Task, chunk: int | None, precision: Precision, shared: _Shared, sum: Any
    ) -> None:
        self._task, self._chunk, self._shared = task, chunk, shared
        self._precision: Precision = precision
        self._received: Vector = np.frombuffer(shared.received, np.float32)
        self._sum: NDArray[np.int64] = np.frombuffer(sum, np.int64)
        self._batches = evaluation_batches(task)
        self._model = Remade(task, self._make)

    def train(self, request: _Training) -> _Trained:
        """Trains clients until there are no more, and adds their updates to the partial sum."""
        work, file = request.work, self._shared.states
        self._model.begin(work.seed)
        work = work._replace(received=self._received[: request.length])
        wide = num_wide(work.algorithm)
        mean = FixedPointMean(request.length, self._sum[: request.length + wide], wide)
        outcomes: list[Outcome] = []
        written: dict[int, int] = {}
        for job in self._jobs(len(request.jobs)):
            first, end = request.jobs[job]
            clients = work.cohort[first:end]
            place_of = {client: first + i for i, client in enumerate(clients.tolist())}
            if file is not None:
                kept = {k: place for k, place in place_of.items() if request.has_state[place]}
                states = {k: file.read(place, request.state_length) for k, place in kept.items()}
                work = work._replace(states=states)
            for outcome, state in self._trainer.train_clients(work, clients, mean):
                outcomes.append(outcome)
                if state is not None and file is not None:
                    file.write(place_of[outcome.client], state)
                    written[place_of[outcome.client]] = len(state)
        return _Trained(mean.total, mean.bound, outcomes, written)

    def evaluate(self, seed_and_length: tuple[int, int]) -> list[tuple[int, Any]]:
        """Evaluates batches of a model of the run with this seed until there are no more."""
        seed, length = seed_and_length
        self._model.begin(seed)
        self._evaluator.load(self._received[:length])
        jobs = self._jobs(len(self._batches))
        return [(job, self._evaluator.sums(self._batches[job])) for job in jobs]

    def _make(self) -> None:
        if self._chunk is None:
            self._trainer = OneByOne(self._task, self._precision)
        else:
            from potluck.simulation.executors.vmap_executor import Vmap

            self._trainer = Vmap(self._task, self._chunk)
        self._evaluator = Evaluator(self._task)

    def _jobs(self, count: int) -> Iterator[int]:
        """Takes jobs from the common queue, while there are any and the parent runs."""
        while has_parent():
            with self._shared.next_job.get_lock():
                job = int(self._shared.next_job.value)
                self._shared.next_job.value = job + 1
            if job >= count:
                return
            yield job


def cut(sizes: NDArray[np.int64], parts: int, longest: int) -> list[tuple[int, int]]:
    """Divides a row into parts of about equal sums, none longer than `longest`: from … to … each.

    Args:
        sizes: > 0, descending.
        parts: at least so many, if there are so many to divide.
    """
    row = [float(size) for size in sizes.tolist()]
    cuts: list[tuple[int, int]] = []
    start, left = 0, sum(row)
    while start < len(row):
        share = left / max(parts - len(cuts), 1)
        stop, taken = start + 1, row[start]
        while stop < min(len(row), start + longest) and taken + row[stop] / 2 <= share:
            taken += row[stop]
            stop += 1
        cuts.append((start, stop))
        start, left = stop, left - taken
    return cuts
