"""`vmap` on several devices, or several times on one: a process for each, and a sum from each.

Each process has the task, a device and a `Vmap` on it. In a round it trains its part of the cohort
and sends the sum of its updates. Sums are in the integers in which means are kept, so all together
give the mean of one process. Parts are of similar numbers of examples, and follow from the cohort
alone.

Processes that use a GPU are spawned, because CUDA does not work after a fork. Their task must be
made of named functions and classes of a module, as an experiment's is.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import FixedPointMean, Vector
from potluck.engine import Task
from potluck.engine.precision import Precision
from potluck.simulation.executors.executor import (
    ClientResult,
    CohortResult,
    RoundWork,
    empty_mean,
    summarise,
)
from potluck.simulation.executors.process_pool import ProcessPool
from potluck.simulation.executors.vmap_executor import Vmap


class _Part(NamedTuple):
    """The clients of a part, and their sum."""

    clients: list[ClientResult]
    sum: NDArray[np.int64]
    total: float
    bound: float


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
        self._task, self._count = task, len(devices)
        forks = sys.platform == "linux" and all(device.type == "cpu" for device in devices)
        self._pool = ProcessPool(
            mp.get_context("fork") if forks else mp.get_context("spawn"),
            [(f"a process on {d}", partial(_GpuWorkerBody, task, d, precision)) for d in devices],
        )
        try:
            self._pool.ask("ready", [None] * len(devices))
        except BaseException:
            self.close()
            raise

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort.

        Raises:
            WorkerError: a process failed; or it exited, and the executor is closed.
        """
        self._task.begin(work.seed)
        cohort, states = work.cohort, work.states
        requests = [
            work._replace(cohort=part, states={k: states[k] for k in part.tolist() if k in states})
            for part in divided(cohort, self._task.data.sizes[cohort], self._count)
        ]
        parts: list[_Part] = self._pool.ask("train", requests)
        mean = empty_mean(work)
        for part in parts:
            mean.merge(FixedPointMean.of(part.sum, part.total, part.bound, mean.wide))
        return summarise(mean, [client for part in parts for client in part.clients])

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, by the first process."""
        (metrics,) = self._pool.ask("evaluate", [(weights, self._task.last_seed())])
        return metrics

    def close(self) -> None:
        """Ends the processes. May be called twice."""
        self._pool.close()


def divided(
    cohort: NDArray[np.int64], sizes: NDArray[np.int64], parts: int
) -> list[NDArray[np.int64]]:
    """Divides a cohort into parts of similar numbers of examples: the largest clients first, each
    to the part that has the fewest so far."""
    loads = np.zeros(parts, np.int64)
    members: list[list[int]] = [[] for _ in range(parts)]
    for i in np.argsort(-sizes, kind="stable").tolist():
        part = int(loads.argmin())
        members[part].append(i)
        loads[part] += sizes[i]
    return [cohort[np.array(sorted(part), np.int64)] for part in members]


class _GpuWorkerBody:
    """The methods of a worker process."""

    def __init__(self, task: Task, device: torch.device, precision: Precision) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._vmap = Vmap(task, device=device, precision=precision)

    def ready(self, _: None) -> None:
        """Returns once the task is on the device."""

    def train(self, work: RoundWork) -> _Part:
        """Trains a part of a cohort."""
        mean, clients = self._vmap.train_part(work)
        return _Part(clients, mean.sum, mean.total, mean.bound)

    def evaluate(self, model: tuple[Vector, int]) -> dict[str, float]:
        """Evaluates a model of the run with this seed."""
        weights, seed = model
        self._vmap.begin(seed)
        return self._vmap.evaluate(weights)
