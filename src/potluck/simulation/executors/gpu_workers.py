"""`vmap` on several devices, or several times on one: a process for each, and a sum from each.

Each process has the task, a device and a `Vmap` on it. In a round it trains its part of the cohort
and sends the sum of its updates, in the integers in which means are kept, so that the sums of all
give the mean that one process would give. Parts are of similar numbers of examples, and follow from
the cohort alone.

Processes that use a GPU are spawned, because CUDA does not survive a fork: their task must be made
of named functions and classes of a module, as an experiment's is.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import FixedPointMean, Vector, WorkerError
from potluck.engine import Task
from potluck.engine.precision import Precision
from potluck.simulation.executors.executor import CohortResult, RoundWork, empty_mean
from potluck.simulation.executors.vmap_executor import Vmap


class _Evaluation(NamedTuple):
    """A model of a run with this seed, to be evaluated."""

    weights: Vector
    seed: int


class _Reply(NamedTuple):
    """The result of a part, and its sum."""

    result: CohortResult
    sum: NDArray[np.int64]
    total: float
    bound: float


class _Process(NamedTuple):
    process: Any
    pipe: Connection


class DeviceWorkers:
    """An executor over processes that train side by side.

    Args:
        task: as for every executor.
        devices: one for each process; the same one several times where a process leaves it idle.
        precision: as for `Vmap`.
    """

    def __init__(
        self,
        task: Task,
        devices: Sequence[torch.device],
        precision: Precision = "float32",
    ) -> None:
        if not devices:
            raise ValueError("devices must name at least one, got none. Give one for each process.")
        self._task = task
        forks = sys.platform == "linux" and all(device.type == "cpu" for device in devices)
        self._context = mp.get_context("fork" if forks else "spawn")
        self._processes: list[_Process] = []
        try:
            for device in devices:
                self._processes.append(self._start(device, precision, forks))
            for process in self._processes:
                self._receive(process)  # that it is ready, or why it is not
        except BaseException:
            self.close()
            raise

    def begin(self, seed: int) -> None:
        """A run with this seed begins, or goes on."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort.

        Raises:
            WorkerError: a process died or failed. The executor is closed.
        """
        self._task.begin(work.seed)
        cohort, states = work.cohort, work.states
        requests = [
            work._replace(
                cohort=part, states={int(k): states[int(k)] for k in part if int(k) in states}
            )
            for part in divided(cohort, self._task.data.sizes[cohort], len(self._processes))
        ]
        replies: list[_Reply] = self._ask(requests)
        mean = empty_mean(work)
        for reply in replies:
            mean.merge(FixedPointMean.of(reply.sum, reply.total, reply.bound, mean.wide))
        results = [reply.result for reply in replies]
        weighted = [r.loss * reply.total for r, reply in zip(results, replies, strict=True)
                    if reply.total > 0.0]  # fmt: skip
        return CohortResult(
            aggregate=mean.mean(),
            loss=sum(weighted) / mean.total if weighted else float("nan"),
            num_examples=sum(result.num_examples for result in results),
            num_steps=sum(result.num_steps for result in results),
            failures=tuple(sorted(f for result in results for f in result.failures)),
            states={k: state for result in results for k, state in sorted(result.states.items())},
        )

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, by the first process."""
        (metrics,) = self._ask([_Evaluation(weights, self._task.last_seed())])
        return metrics

    def close(self) -> None:
        """End the processes. May be called twice."""
        for process in self._processes:
            process.pipe.close()  # who reads the end of its pipe leaves
        for process in self._processes:
            process.process.join(timeout=5.0)
            if process.process.is_alive():
                process.process.kill()
                process.process.join()
        self._processes = []

    def _start(self, device: torch.device, precision: Precision, forks: bool) -> _Process:
        ours, theirs = self._context.Pipe()
        inherited = [process.pipe for process in self._processes] + [ours] if forks else []
        process: Any = self._context.Process(  # type: ignore[reportAttributeAccessIssue]
            target=_serve, args=(self._task, device, precision, theirs, inherited), daemon=True
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
                process.start()
        except (AttributeError, PicklingError) as error:
            raise WorkerError(
                "for several processes on GPUs, the task must be made of named functions and "
                f"classes of a module, got {error}. Move them into one, or use one process."
            ) from None
        theirs.close()
        return _Process(process, ours)

    def _ask(self, requests: Sequence[RoundWork | _Evaluation]) -> list[Any]:
        """Send a request to each of the first processes, and wait for their replies."""
        if not self._processes:
            raise WorkerError("the processes were closed. Make a new executor.")
        asked = list(zip(self._processes, requests, strict=False))
        try:
            for process, request in asked:
                process.pipe.send(request)
        except (AttributeError, PicklingError) as error:
            self.close()  # some may have been asked
            raise WorkerError(
                "an algorithm must be made of named functions and classes of a module to reach "
                f"other processes, got {error}. Take a schedule of potluck.schedules."
            ) from None
        except OSError:
            pass  # who died is named where its reply is missing
        return [self._receive(process) for process, _ in asked]

    def _receive(self, process: _Process) -> Any:
        try:
            reply = process.pipe.recv()
        except (EOFError, OSError):
            process.process.join(timeout=1.0)
            code = process.process.exitcode
            self.close()
            raise WorkerError(
                f"processes on devices must live as long as the run, got exit code {code} (-9: "
                "killed, often for want of memory). Use fewer of them."
            ) from None
        if isinstance(reply, str):
            self.close()
            raise WorkerError(reply)
        return reply


def divided(
    cohort: NDArray[np.int64], sizes: NDArray[np.int64], parts: int
) -> list[NDArray[np.int64]]:
    """A cohort in parts of similar numbers of examples: the largest clients first, each to the
    part that has the fewest so far."""
    loads = np.zeros(parts, np.int64)
    members: list[list[int]] = [[] for _ in range(parts)]
    for i in np.argsort(-sizes, kind="stable").tolist():
        part = int(loads.argmin())
        members[part].append(i)
        loads[part] += sizes[i]
    return [cohort[np.array(sorted(part), np.int64)] for part in members]


def _serve(
    task: Task,
    device: torch.device,
    precision: Precision,
    pipe: Connection,
    inherited: list[Connection],
) -> None:
    """The life of a process."""
    for connection in inherited:
        connection.close()  # or the death of the parent would go unnoticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    parent = os.getppid()
    torch.set_num_threads(1)
    vmap: Vmap | None = None
    request: RoundWork | _Evaluation | None = None
    while os.getppid() == parent:
        try:
            if vmap is None:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                vmap = Vmap(task, device=device, precision=precision)
                reply: Any = None
            else:
                assert request is not None
                reply = _answer(vmap, request)
        except Exception as error:
            reply = f"a process on {device} failed: {type(error).__name__}: {error}"
        try:
            pipe.send(reply)
            request = pipe.recv()
        except (EOFError, OSError):
            return


def _answer(vmap: Vmap, request: RoundWork | _Evaluation) -> Any:
    vmap.begin(request.seed)
    if isinstance(request, _Evaluation):
        return vmap.evaluate(request.weights)
    mean, result = vmap.train_part(request)
    return _Reply(result, mean.sum, mean.total, mean.bound)
