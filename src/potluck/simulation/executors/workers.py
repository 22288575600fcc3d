"""The `workers` executor: one client per core, in processes that live as long as the run.

Kernels are single-threaded, because two clients on two cores do more than one client on both.
Each worker takes the next client of the cohort when it has finished one, largest first, and adds
the update to its own partial sum in shared memory; once a round the parent adds up one sum per
worker. The weights and the sums lie in shared memory and the client data are shared with the
parent, so that a round sends a few bytes through a pipe. Since sums are exact in any order, it
does not matter which worker took which client.

With `chunk`, a worker takes so many clients at a time and trains them side by side, as `vmap` does.
A cohort is then cut into a multiple of as many chunks as there are workers, of about equal work.

Where an algorithm's clients keep a state, the parent lays those of the cohort out in a file that
the workers share (`Slots`), and takes the new ones from there. The room for what travels is that
of one model, until an algorithm that sends more is trained: then the processes are started again
with more.
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

from potluck.algorithms import Algorithm, num_wide
from potluck.core import FixedPointMean, PotluckError, Vector, WorkerError
from potluck.core.allocator import keep_freed
from potluck.core.validate import as_count
from potluck.engine import Evaluator, Task, evaluation_batches, means, spec_of
from potluck.engine.native.kernels import kernels_of
from potluck.engine.precision import Precision, check_precision
from potluck.engine.task import Remade
from potluck.simulation.executors.client_state_file import Slots
from potluck.simulation.executors.executor import CohortResult, Outcome, RoundWork, summarise
from potluck.simulation.executors.loop import OneByOne


class _Shared(NamedTuple):
    """Memory that the parent and all workers see."""

    received: Any  # float32 [vectors · dim]
    next_job: Any  # int64, the number of jobs taken so far
    slots: Slots | None  # the cohort's states, by place; none until some are needed


class _Training(NamedTuple):
    """What the workers are asked in a round; a seed alone asks to evaluate a model of its run."""

    work: RoundWork  # its cohort by place; without what was received and the states
    length: int  # of what was received, and of an update
    has_state: list[bool]  # by place
    state_length: int  # of those that have one
    jobs: list[tuple[int, int]]  # places from … to …


class _Trained(NamedTuple):
    """What a worker answers; its sum is in shared memory."""

    total: float
    bound: float
    outcomes: list[Outcome]
    written: dict[int, int]  # the places whose slots hold a new state, and its length


class _Worker(NamedTuple):
    process: Any
    pipe: Connection
    sum: NDArray[np.int64]  # its partial sum, and room for that of an algorithm's vectors


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
        self._workers: list[_Worker] = []
        self._start(vectors=1, slots=None)

    def begin(self, seed: int) -> None:
        """A run with this seed begins, or goes on."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort.

        Raises:
            WorkerError: a worker process died. The executor is closed.
        """
        self._task.begin(work.seed)
        self._make_room(work.algorithm)
        states, received = work.states, work.received
        sizes = self._task.data.sizes[work.cohort]
        order = np.argsort(-sizes, kind="stable")
        largest_first = work.cohort[order]
        has_state = [int(client) in states for client in largest_first]
        slots = self._shared.slots
        for place, client in enumerate(map(int, largest_first)):
            if has_state[place] and slots is not None:
                slots.write(place, states[client])
        kept_length = max((len(states[int(k)]) for k in work.cohort if int(k) in states), default=0)
        sent = work._replace(cohort=largest_first, received=received[:0], states={})
        request = _Training(sent, len(received), has_state, kept_length, self._cut(sizes[order]))
        replies: list[_Trained] = self._ask(received, request)
        wide = num_wide(work.algorithm)
        length = len(received) + wide
        partials = [
            FixedPointMean.of(worker.sum[:length], reply.total, reply.bound, wide)
            for worker, reply in zip(self._workers, replies, strict=True)
        ]
        mean = partials[0]  # where it lies: what a worker summed is not asked for twice
        for partial in partials[1:]:
            mean.merge(partial)
        kept: dict[int, Vector] = {}
        for reply in replies:
            if slots is not None:
                read = slots.read
                kept |= {int(largest_first[p]): read(p, n) for p, n in reply.written.items()}
        outcomes = [outcome for reply in replies for outcome in reply.outcomes]
        return summarise(mean, [(outcome, kept.get(outcome.client)) for outcome in outcomes])

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, its batches shared out."""
        replies = self._ask(weights, self._task.last_seed())
        numbered = sorted((pair for reply in replies for pair in reply), key=lambda pair: pair[0])
        return means(self._task, weights, [sums for _, sums in numbered])

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
        if self._shared.slots is not None:
            self._shared.slots.close()
            self._shared = self._shared._replace(slots=None)

    def _cut(self, sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Clients of these sizes, the largest first, as jobs."""
        if self._chunk is None:
            return [(place, place + 1) for place in range(len(sizes))]
        rounds_of_jobs = -(-len(sizes) // (self._num_workers * self._chunk))
        return cut(sizes, rounds_of_jobs * self._num_workers, self._chunk)

    def _start(self, vectors: int, slots: Slots | None) -> None:
        context = _context()
        self._vectors = vectors
        self._shared = _Shared(
            context.RawArray(ctypes.c_float, vectors * self._dim),
            context.Value(ctypes.c_int64, 0),
            slots,
        )
        self._received: Vector = np.frombuffer(self._shared.received, np.float32)
        for _ in range(self._num_workers):
            self._workers.append(self._start_one(context))

    def _make_room(self, algorithm: Algorithm) -> None:
        """Start again with more room, if this algorithm needs it."""
        stateful = algorithm.client_vectors > 0 or self._shared.slots is not None
        vectors = max(algorithm.vectors, self._vectors)
        grown = vectors > self._vectors or stateful != (self._shared.slots is not None)
        if self._workers and grown:
            self.close()
            self._start(vectors, Slots() if stateful else None)

    def _start_one(self, context: ForkContext | SpawnContext) -> _Worker:
        partial = context.RawArray(ctypes.c_int64, self._vectors * self._dim + self._wide)
        ours, theirs = context.Pipe()
        inherited = [worker.pipe for worker in self._workers] + [ours]
        if isinstance(context, SpawnContext):
            inherited = []  # a spawned process inherits nothing
        process = context.Process(
            target=_serve,
            args=(
                self._task,
                self._dim,
                self._chunk,
                self._precision,
                self._shared,
                partial,
                theirs,
                inherited,
                os.getpid(),
            ),
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

    def _ask(self, received: Vector, request: _Training | int) -> list[Any]:
        """Send one request to all workers and wait for all replies."""
        if not self._workers:
            raise WorkerError("the workers were closed. Make a new executor.")
        self._received[: len(received)] = received
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
        except (AttributeError, PicklingError) as error:  # nobody has been asked yet
            raise WorkerError(
                "an algorithm must be made of named functions and classes of a module to reach the "
                f"workers, got {error}. Take a schedule of potluck.schedules, or executor='loop'."
            ) from None
        except (EOFError, OSError):
            processes = [worker.process for worker in self._workers]
            self.close()
            codes = [process.exitcode for process in processes]
            raise WorkerError(
                f"worker processes must live as long as the run, got exit codes {codes} "
                "(-9: killed, often for want of memory). Use fewer workers, or executor='loop'."
            ) from None
        for reply in replies.values():
            if isinstance(reply, PotluckError):  # in the words of who raised it
                raise reply
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
    dim: int,
    chunk: int | None,
    precision: Precision,
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
    labour = _Labour(task, dim, chunk, precision, shared, _int64(partial), parent)
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if isinstance(request, int):
                reply: Any = labour.evaluate(request)
            else:
                reply = labour.train(request)
        except PotluckError as error:
            reply = error
        except Exception as error:
            reply = WorkerError(f"a worker failed: {type(error).__name__}: {error}")
        try:
            pipe.send(reply)
        except OSError:
            return


class _Labour:
    """What a worker does when it is asked."""

    def __init__(
        self,
        task: Task,
        dim: int,
        chunk: int | None,
        precision: Precision,
        shared: _Shared,
        partial: NDArray[np.int64],
        parent: int,
    ) -> None:
        self._task, self._dim, self._shared, self._parent = task, dim, shared, parent
        self._received: Vector = np.frombuffer(shared.received, np.float32)
        self._partial = partial
        self._chunk = chunk
        self._precision: Precision = precision
        self._batches = evaluation_batches(task)
        self._model = Remade(task, self._make)

    def train(self, request: _Training) -> _Trained:
        """Train clients until there are no more, and add their updates to the partial sum."""
        self._model.begin(request.work.seed)
        received = self._received[: request.length]
        work = request.work._replace(received=received)
        wide = num_wide(work.algorithm)
        mean = FixedPointMean(request.length, self._partial[: request.length + wide], wide)
        outcomes: list[Outcome] = []
        written: dict[int, int] = {}
        for job in self._jobs(len(request.jobs)):
            places = range(*request.jobs[job])
            clients = work.cohort[places.start : places.stop]
            place_of = dict(zip(clients.tolist(), places, strict=True))
            work = work._replace(states=self._states(request, places))
            for outcome, state in self._trainer.train_clients(work, clients, mean):
                outcomes.append(outcome)
                if state is not None and self._shared.slots is not None:
                    self._shared.slots.write(place_of[outcome.client], state)
                    written[place_of[outcome.client]] = len(state)
        return _Trained(mean.total, mean.bound, outcomes, written)

    def evaluate(self, seed: int) -> list[tuple[int, Any]]:
        """Evaluate batches until there are no more."""
        self._model.begin(seed)
        self._evaluator.load(self._received[: self._dim])
        jobs = self._jobs(len(self._batches))
        return [(job, self._evaluator.sums(self._batches[job])) for job in jobs]

    def _make(self) -> None:
        if self._chunk is None:
            self._trainer = OneByOne(self._task, self._precision)
        else:
            from potluck.simulation.executors.vmap_executor import Vmap

            self._trainer = Vmap(self._task, self._chunk)
        self._evaluator = Evaluator(self._task)

    def _states(self, request: _Training, places: range) -> dict[int, Vector]:
        """What the clients in these places keep."""
        slots = self._shared.slots
        if slots is None:
            return {}
        kept = [place for place in places if request.has_state[place]]
        read, length = slots.read, request.state_length
        return {int(request.work.cohort[place]): read(place, length) for place in kept}

    def _jobs(self, count: int) -> Iterator[int]:
        """Take the next job of all workers, while there are any and the parent lives."""
        while os.getppid() == self._parent:
            with self._shared.next_job.get_lock():
                job = int(self._shared.next_job.value)
                self._shared.next_job.value = job + 1
            if job >= count:
                return
            yield job


def cut(sizes: NDArray[np.int64], parts: int, longest: int) -> list[tuple[int, int]]:
    """Divide a row into parts of about equal sums, none longer than `longest`: from … to … each.

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
