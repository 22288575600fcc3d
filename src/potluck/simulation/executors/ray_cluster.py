"""The `ray` executor: one cohort over the cores of several machines.

The client data are placed in the cluster's object store once, and each machine's workers read
them from its shared memory. A worker has a core, or a part of a GPU, and trains its clients one
after another or side by side, whichever is faster (`local`).

In a round the model is sent to each machine once, and to every worker the numbers of its clients. A
worker adds their updates to a partial sum and sends that back when no clients are left. So traffic
grows with workers, not with clients, except for the states of SCAFFOLD's clients, which are sent.
Sums are exact in any order. So the division of clients among workers changes nothing, and neither
do lost workers whose clients are trained again. Side by side this holds to float tolerance.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm
from potluck.core import FixedPointMean, Vector, WorkerError
from potluck.core.validate import as_count
from potluck.engine import Evaluator, Task, evaluation_batches, means
from potluck.engine.devices import device_of
from potluck.engine.precision import Precision, check_precision
from potluck.engine.task import Remade
from potluck.simulation.executors.executor import (
    ClientResult,
    CohortResult,
    Failure,
    Outcome,
    RoundWork,
    empty_mean,
    summarise,
)
from potluck.simulation.executors.loop import OneByOne
from potluck.simulation.executors.ray_pool import ActorPool
from potluck.simulation.executors.step_timing import Estimate, estimate
from potluck.simulation.executors.vmap_executor import Vmap

Local: TypeAlias = Literal["auto", "loop", "vmap"]


class _RoundForWorkers(NamedTuple):
    """The work of a round for the workers; placed in the object store once."""

    number: int  # of the call, by which a worker recognises a new round
    work: RoundWork  # without the states, which travel with the clients
    chunk: int | None  # clients side by side; None is one after another


class _Means(NamedTuple):
    """The parts of which a worker is made."""

    task: Task
    device: str | None  # a GPU; None is a core
    precision: Precision


class _Partial(NamedTuple):
    """A worker's sum over the clients it trained since its last sum was taken."""

    sum: NDArray[np.int64]  # [vectors · dim]
    total: float
    bound: float


class Cluster:
    """Workers in a Ray cluster, a core or a part of a GPU each; those that are lost are replaced.

    Args:
        task: as for every executor. It may hold lambdas and classes of a notebook.
        num_workers: as many as the cluster has cores, or GPUs for, if None.
        address: of a running cluster: "auto" for the one that this machine belongs to,
            "ray://host:10001" for one reached from outside. If None, the cluster that this
            program is connected to already, or else a new one on this machine alone.
        precision: of local training: "float32" or "bf16", with a GPU also "tf32".
        local: how a worker with a core trains its clients: "loop" is one after another, to the
            bits of `Loop`; "vmap" is side by side; "auto" times both on the first clients of the
            first cohort, and again for another algorithm.
        device: "cuda" for workers with a GPU, which train side by side; None for cores.
        gpus: of each worker: 0.25 puts four of them on one GPU.
        progress: is called after every few clients with the number done and the size of the cohort.

    Raises:
        WorkerError: the cluster cannot be reached, or no worker starts.
    """

    def __init__(
        self,
        task: Task,
        num_workers: int | None = None,
        *,
        address: str | None = None,
        precision: Precision = "float32",
        local: Local = "auto",
        device: str | None = None,
        gpus: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if num_workers is not None:
            advice = "Leave it out to use every core of the cluster."
            num_workers = as_count("num_workers", num_workers, 1, advice)
        check_precision(precision, torch.device(device or "cpu"))
        _check_local(local, precision, device, gpus)
        self._task, self._progress = task, progress
        self._local: Local = "loop" if device is None and precision != "float32" else local
        self._on_gpu = device is not None
        self._chosen: tuple[Algorithm, int | None] | None = None  # how clients of it are trained
        self._ray, self._owned = _connect(address, num_workers)
        self._calls = 0
        self._num_batches = len(evaluation_batches(task))
        has = self._ray.cluster_resources()
        fits = int(has.get("CPU", 1)) if device is None else int(has.get("GPU", 0) / gpus)
        self._count = num_workers or max(fits, 1)
        body = self._ray.remote(
            num_cpus=1 if device is None else 0,
            num_gpus=0 if device is None else gpus,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )(_RayWorkerBody)
        placed = self._ray.put(_Means(task, device, precision))
        try:
            self._pool = ActorPool(self._ray, lambda: body.remote(placed), self._count)
        except BaseException:
            self._disconnect()
            raise

    @property
    def num_lost(self) -> int:
        """The number of workers that were lost and replaced so far."""
        return self._pool.num_lost

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort.

        Raises:
            WorkerError: no worker is left and none starts, or a worker failed otherwise.
        """
        self._task.begin(work.seed)
        self._calls += 1
        states, cohort = work.states, work.cohort
        largest_first = cohort[np.argsort(-self._task.data.sizes[cohort], kind="stable")]
        sent = work._replace(cohort=largest_first, states={})
        training = _RoundForWorkers(self._calls, sent, None)
        if len(cohort) > 0:
            training = training._replace(chunk=self._chunk(training, states))
        placed = self._ray.put(training)
        completed = self._pool.schedule(
            largest_first.tolist(),
            lambda actor, clients: actor.train.remote(
                placed, clients, {client: states[client] for client in clients if client in states}
            ),
            lambda actor: actor.take_sum.remote(),
            side_by_side=training.chunk or 1,
            progress=self._progress,
        )
        mean = empty_mean(work)
        for partial in completed.sums:
            sum, total, bound = partial
            mean.merge(FixedPointMean.of(sum, total, bound, mean.wide))
        results = [result for results in completed.results for result in results]
        results += [(self._lost_workers_over(client), None) for client in completed.refused]
        return summarise(mean, results)._replace(executor=self._words(training.chunk))

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, its batches shared out."""
        self._calls += 1
        placed = self._ray.put((weights, self._task.last_seed()))
        completed = self._pool.schedule(
            range(self._num_batches),
            lambda actor, numbers: actor.evaluate.remote(placed, self._calls, numbers),
            lambda actor: actor.ready.remote(),
        )
        if completed.refused:
            raise WorkerError("workers must survive evaluation, got three lost over one batch.")
        numbered = sorted((pair for part in completed.results for pair in part), key=lambda p: p[0])
        return means(self._task, weights, [sums for _, sums in numbered])

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them. May be called twice."""
        self._pool.close()
        self._disconnect()

    def _chunk(self, training: _RoundForWorkers, states: Mapping[int, Vector]) -> int | None:
        """Returns how many clients a worker trains side by side; None where it trains them one by
        one."""
        if self._local == "loop":
            return None
        algorithm, cohort = training.work.algorithm, training.work.cohort
        if self._chosen is not None and self._chosen[0] == algorithm:
            return self._chosen[1]
        # As many as a worker may ever have side by side are enough to time.
        few = cohort[: max(-(-len(cohort) // self._count), 2)]
        kept = {int(client): states[int(client)] for client in few if int(client) in states}
        placed = self._ray.put(training)
        completed = self._pool.schedule(
            [0],
            lambda actor, _: actor.estimate.remote(placed, few, kept),
            lambda actor: actor.ready.remote(),
        )
        chunk: int | None = None
        for costs in completed.results:  # none, if three workers were lost over it
            if self._on_gpu or self._local == "vmap" or costs.vmap < costs.loop:
                chunk = int(costs.chunk)
        self._chosen = (algorithm, chunk)
        return chunk

    def _words(self, chunk: int | None) -> str:
        where = " on GPUs" if self._on_gpu else ""
        how = "one client at a time" if chunk is None else f"chunks of up to {chunk}"
        return f"ray, {self._count} workers{where}, {how}"

    def _disconnect(self) -> None:
        if self._owned:
            self._ray.shutdown()
            self._owned = False

    def _lost_workers_over(self, client: int) -> Outcome:
        reason = "three workers died while they trained it, often for want of memory"
        failure = Failure(client, self._task.data.clients[client], reason)
        return Outcome(client, 0.0, 0.0, 0, 0, failure)


class _RayWorkerBody:
    """A worker of the cluster, in a process of its own."""

    def __init__(self, means: _Means) -> None:
        torch.set_num_threads(1)
        self._task = means.task
        self._precision: Precision = means.precision
        self._device = None if means.device is None else device_of(means.device)
        self._model = Remade(self._task, self._make)
        self._batches = evaluation_batches(self._task)
        self._mean = FixedPointMean(0)
        self._received: Vector = np.empty(0, np.float32)
        self._call = 0

    def ready(self) -> None:
        """Returns when everything before it is done."""

    def estimate(
        self, training: _RoundForWorkers, clients: NDArray[np.int64], states: Mapping[int, Vector]
    ) -> Estimate:
        """Measures the cost of a local step here, one after another and side by side."""
        work = training.work
        self._model.begin(work.seed)
        work = work._replace(received=work.received.copy(), cohort=clients, states=states)
        placed = None
        if self._device is not None:
            trainer = self._trainer(len(clients))
            placed = trainer.placed if isinstance(trainer, Vmap) else None
        return estimate(self._task, work, time.perf_counter, placed)

    def train(
        self, training: _RoundForWorkers, clients: list[int], states: Mapping[int, Vector]
    ) -> list[ClientResult]:
        """Trains clients and adds their updates to the partial sum. Returns their new states
        too."""
        work, chunk = training.work, training.chunk
        if training.number != self._call:
            self._call = training.number
            self._model.begin(work.seed)
            self._received = work.received.copy()  # what Ray gives cannot be written to
            self._mean = empty_mean(work)
        work = work._replace(received=self._received, states=states)
        trained = self._trainer(chunk).train_clients(work, np.array(clients, np.int64), self._mean)
        return [(outcome, None if state is None else state.copy()) for outcome, state in trained]

    def _make(self) -> None:
        self._trainers: dict[int | None, Vmap | OneByOne] = {}  # by clients side by side
        self._evaluator = Evaluator(self._task, self._device)

    def _trainer(self, chunk: int | None) -> Vmap | OneByOne:
        if chunk not in self._trainers:
            if chunk is None:
                self._trainers[chunk] = OneByOne(self._task, self._precision)
            else:
                self._trainers[chunk] = Vmap(
                    self._task, chunk, device=self._device, precision=self._precision
                )
        return self._trainers[chunk]

    def take_sum(self) -> _Partial:
        """Returns the partial sum and sets it to zero."""
        partial = _Partial(self._mean.sum, self._mean.total, self._mean.bound)
        self._mean = FixedPointMean(len(self._received), wide=self._mean.wide)
        return partial

    def evaluate(
        self, model: tuple[Vector, int], call: int, numbers: list[int]
    ) -> list[tuple[int, Any]]:
        """Returns the sums of batches of the central evaluation, with their numbers."""
        if call != self._call:
            self._call = call
            weights, seed = model
            self._model.begin(seed)
            self._evaluator.load(weights)
        return [(number, self._evaluator.sums(self._batches[number])) for number in numbers]


def _check_local(local: str, precision: Precision, device: str | None, gpus: float) -> None:
    if local not in get_args(Local):
        raise ValueError(
            f"local must be 'auto', 'loop' or 'vmap', got local={local!r}. Leave it out for 'auto'."
        )
    if device is not None and local == "loop":
        raise ValueError(
            "local must be left out with a device, on which clients are trained side by side, got "
            f"local={local!r} with device={device!r}."
        )
    if device is None and local == "vmap" and precision != "float32":
        raise ValueError(
            f"precision must be 'float32' with local='vmap' and no GPU, got precision="
            f"{precision!r}. Use local='loop'."
        )
    if not gpus > 0.0:
        raise ValueError(f"gpus must be above 0, got gpus={gpus!r}. Use 0.5 for two on a GPU.")


def _connect(address: str | None, num_workers: int | None) -> tuple[ModuleType, bool]:
    """Connects `ray`. Returns the module, and whether the connection is ours to end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        if address is not None:
            raise WorkerError(
                "address must be None in a program that is connected to a cluster already, got "
                f"address={address!r}. Leave it out, or call ray.shutdown() first."
            )
        return ray, False
    # The cluster's client server starts a process for each connection, and drops it if it starts
    # slowly.
    tries = 3 if address is not None and address.startswith("ray://") else 1
    for left in reversed(range(tries)):
        try:
            _knock(address)
            ray.init(
                address=address or "local",
                num_cpus=num_workers if address is None else None,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            if left and isinstance(error, (ConnectionError, RuntimeError)):
                ray.shutdown()
                continue
            raise WorkerError(
                f"the Ray cluster at address={address!r} must answer, got: {error} "
                "Start one with `ray start --head`, or leave the address out."
            ) from None
    return ray, True


def _knock(address: str | None) -> None:
    """Checks that host:port accepts connections; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10.0).close()
