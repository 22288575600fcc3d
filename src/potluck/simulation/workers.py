"""The `workers` executor: one client per core, in processes that live as long as the run.

Kernels are single-threaded, because two clients on two cores do more than one client on both.
Each worker takes the next client of the cohort when it has finished one, largest first, and adds
the update to its own partial sum in shared memory; once a round the parent adds up one sum per
worker. The weights and the sums lie in shared memory and the client data are shared with the
parent, so that a round sends a few bytes through a pipe. Since sums are exact in any order, it
does not matter which worker took which client.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from pickle import PicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm
from potluck.core import FixedPointMean, Vector, WorkerError
from potluck.simulation.executors import CohortResult, Outcome, summarise, train_client
from potluck.tasks import Evaluator, Task, TorchRuntime, evaluation_batches, means, spec_of


class _Shared(NamedTuple):
    """Memory that the parent and all workers see."""

    weights: Any  # float32 [dim]
    next_job: Any  # int64, the number of jobs taken so far


class _Worker(NamedTuple):
    process: Any
    pipe: Connection
    sum: NDArray[np.int64]  # [dim], its partial sum


class Workers:
    """Persistent processes, each training one client at a time.

    Args:
        task: as for every executor.
        num_workers: processes; the number of cores this process may use if None.
    """

    def __init__(self, task: Task, num_workers: int | None = None) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(
                f"num_workers must be at least 1, got num_workers={num_workers}. "
                "Leave it out to use every core."
            )
        self._task = task
        self._dim = spec_of(task.module()).dim
        context = _context()
        self._shared = _Shared(
            context.RawArray(ctypes.c_float, self._dim), context.Value(ctypes.c_int64, 0)
        )
        self._weights: Vector = np.frombuffer(self._shared.weights, np.float32)
        self._workers: list[_Worker] = []
        for _ in range(num_workers or available_cores()):
            self._workers.append(self._start(context))

    def train(
        self,
        algorithm: Algorithm,
        weights: Vector,
        cohort: NDArray[np.int64],
        *,
        seed: int,
        round: int,
    ) -> CohortResult:
        """Local training of one cohort from the same weights.

        Raises:
            WorkerError: a worker process died. The executor is closed.
        """
        largest_first = cohort[np.argsort(-self._task.data.sizes[cohort], kind="stable")]
        replies = self._ask(weights, ("train", algorithm, largest_first, seed, round))
        mean = FixedPointMean(self._dim)
        outcomes: list[Outcome] = []
        for worker, (total, bound, trained) in zip(self._workers, replies, strict=True):
            partial = FixedPointMean.__new__(FixedPointMean)
            partial.sum, partial.total, partial.bound = worker.sum, total, bound
            mean.merge(partial)
            outcomes += trained
        return summarise(mean, outcomes)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, its batches shared out."""
        replies = self._ask(weights, ("evaluate",))
        numbered = sorted((pair for reply in replies for pair in reply), key=lambda pair: pair[0])
        return means([sums for _, sums in numbered])

    def close(self) -> None:
        """End the processes. May be called twice."""
        for worker in self._workers:
            worker.pipe.close()  # a worker that reads the end of its pipe leaves
        for worker in self._workers:
            worker.process.join(timeout=1.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def _start(self, context: ForkContext | SpawnContext) -> _Worker:
        partial = context.RawArray(ctypes.c_int64, self._dim)
        ours, theirs = context.Pipe()
        inherited = [worker.pipe for worker in self._workers] + [ours]
        if isinstance(context, SpawnContext):
            inherited = []  # a spawned process inherits nothing
        process = context.Process(
            target=_serve,
            args=(self._task, self._shared, partial, theirs, inherited, os.getpid()),
            daemon=True,
        )
        try:
            with warnings.catch_warnings():
                # Python ≥ 3.12 warns of a fork beside threads; the workers use none of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except (AttributeError, PicklingError) as error:
            raise WorkerError(
                "where processes cannot be forked, the task must be made of named functions and "
                f"classes of a module, got {error}. Move them into one, or use executor='loop'."
            ) from None
        theirs.close()
        return _Worker(process, ours, _int64(partial))

    def _ask(self, weights: Vector, request: tuple[Any, ...]) -> list[Any]:
        """Send one request to all workers and wait for all replies."""
        if not self._workers:
            raise WorkerError("the workers were closed. Make a new executor.")
        self._weights[...] = weights
        self._shared.next_job.value = 0
        replies: dict[int, Any] = {}
        try:
            for worker in self._workers:
                worker.pipe.send(request)
            waiting = {worker.pipe: i for i, worker in enumerate(self._workers)}
            while waiting:
                for pipe in wait(list(waiting)):
                    assert isinstance(pipe, Connection)
                    replies[waiting.pop(pipe)] = pipe.recv()
        except (EOFError, OSError):
            processes = [worker.process for worker in self._workers]
            self.close()
            codes = [process.exitcode for process in processes]
            raise WorkerError(
                f"worker processes must live as long as the run, got exit codes {codes} "
                "(-9: killed, often for want of memory). Use fewer workers, or executor='loop'."
            ) from None
        failed = [reply for reply in replies.values() if isinstance(reply, str)]
        if failed:
            raise WorkerError(failed[0])
        return [replies[i] for i in range(len(self._workers))]


def _int64(memory: Any) -> NDArray[np.int64]:
    return np.frombuffer(memory, np.int64)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else mp.cpu_count()


def _context() -> ForkContext | SpawnContext:
    # A fork shares the data and the model as they are, whatever they are made of (lambdas,
    # classes of a notebook), and starts in milliseconds. Elsewhere than on Linux it is not safe.
    return mp.get_context("fork" if sys.platform == "linux" else "spawn")


def _serve(
    task: Task,
    shared: _Shared,
    partial: Any,
    pipe: Connection,
    inherited: list[Connection],
    parent: int,
) -> None:
    """The life of a worker process."""
    for connection in inherited:
        connection.close()  # or the death of the parent would go unnoticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    weights: Vector = np.frombuffer(shared.weights, np.float32)
    runtime, evaluator = TorchRuntime(task), Evaluator(task)
    mean = FixedPointMean(len(weights), _int64(partial))
    batches = evaluation_batches(task)

    def jobs(count: int) -> Iterator[int]:
        while os.getppid() == parent:
            with shared.next_job.get_lock():
                job = int(shared.next_job.value)
                shared.next_job.value = job + 1
            if job >= count:
                return
            yield job

    while True:
        try:
            verb, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if verb == "train":
                algorithm, cohort, seed, round = arguments
                mean.reset()
                trained = [
                    train_client(
                        task, runtime, mean, algorithm, weights, int(cohort[job]), seed, round
                    )
                    for job in jobs(len(cohort))
                ]
                reply: Any = (mean.total, mean.bound, trained)
            else:
                evaluator.load(weights)
                reply = [(job, evaluator.sums(batches[job])) for job in jobs(len(batches))]
        except Exception as error:
            reply = f"a worker failed: {type(error).__name__}: {error}"
        try:
            pipe.send(reply)
        except OSError:
            return
