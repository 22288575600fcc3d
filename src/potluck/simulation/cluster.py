"""The `ray` executor: one cohort over the cores of several machines.

The client data are placed in the cluster's object store once, and each machine's workers read
them from its shared memory. In a round every worker is sent the model once per machine and the
numbers of clients to train, adds their updates to a partial sum of its own, and sends that sum back
when no clients are left: traffic grows with workers, not with clients (except for the states that
the clients of SCAFFOLD keep, which travel). Sums are exact in any order, so it changes nothing
which worker trained which client, nor that one was lost and its clients were trained again.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm
from potluck.core import FixedPointMean, Vector, WorkerError
from potluck.simulation.executors import (
    NO_STATES,
    CohortResult,
    Failure,
    Outcome,
    summarise,
    train_client,
)
from potluck.simulation.hands import Hands
from potluck.tasks import Evaluator, Task, TorchRuntime, evaluation_batches, means
from potluck.tasks.precision import Precision, check_precision


class _Training(NamedTuple):
    """What a round is for a worker; placed in the object store once."""

    number: int  # of the call, so that a worker knows a new round
    algorithm: Algorithm
    received: Vector
    seed: int
    round: int


class _Partial(NamedTuple):
    """A worker's sum over the clients it trained since it last handed over."""

    sum: NDArray[np.int64]  # [vectors · dim]
    total: float
    bound: float


class Cluster:
    """Workers in a Ray cluster, one core each; those that are lost are replaced.

    Args:
        task: as for every executor. It may hold lambdas and classes of a notebook.
        num_workers: as many as the cluster has cores if None.
        address: of a running cluster: "auto" for the one that this machine belongs to,
            "ray://host:10001" for one reached from outside. If None, the cluster that this
            program is connected to already, or else a new one on this machine alone.
        precision: of local training: "float32" or "bf16".

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
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(
                f"num_workers must be at least 1, got num_workers={num_workers}. "
                "Leave it out to use every core of the cluster."
            )
        check_precision(precision, torch.device("cpu"))
        self._task = task
        self._ray, self._owned = _connect(address, num_workers)
        self._calls = 0
        self._num_batches = len(evaluation_batches(task))
        count = num_workers or int(self._ray.cluster_resources().get("CPU", 1))
        labour = self._ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(_Labour)
        placed = self._ray.put(task)
        try:
            self._hands = Hands(self._ray, lambda: labour.remote(placed, precision), count)
        except BaseException:
            self._disconnect()
            raise

    @property
    def num_lost(self) -> int:
        """How many workers were lost and replaced so far."""
        return self._hands.num_lost

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
        """Local training of one cohort, each client of which received the same.

        Raises:
            WorkerError: no worker is left and none starts, or a worker failed otherwise.
        """
        self._calls += 1
        placed = self._ray.put(_Training(self._calls, algorithm, received, seed, round))
        largest_first = cohort[np.argsort(-self._task.data.sizes[cohort], kind="stable")]
        dealt = self._hands.deal(
            largest_first.tolist(),
            lambda actor, clients: actor.train.remote(
                placed, clients, {client: states[client] for client in clients if client in states}
            ),
            lambda actor: actor.hand_over.remote(),
        )
        mean = FixedPointMean(len(received))
        for partial in dealt.handed_over:
            mean.merge(_restored(partial))
        outcomes = [outcome for trained, _ in dealt.results for outcome in trained]
        outcomes += [self._took_workers_with_it(client) for client in dealt.refused]
        kept = {client: state for _, new in dealt.results for client, state in new.items()}
        return summarise(mean, outcomes, kept)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples, its batches dealt out."""
        self._calls += 1
        placed = self._ray.put(weights)
        dealt = self._hands.deal(
            range(self._num_batches),
            lambda actor, numbers: actor.evaluate.remote(placed, self._calls, numbers),
            lambda actor: actor.ready.remote(),
        )
        if dealt.refused:
            raise WorkerError("workers must survive evaluation, got three lost over one batch.")
        numbered = sorted((pair for part in dealt.results for pair in part), key=lambda p: p[0])
        return means([sums for _, sums in numbered])

    def close(self) -> None:
        """End the workers, and the cluster if it was started for them. May be called twice."""
        self._hands.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owned:
            self._ray.shutdown()
            self._owned = False

    def _took_workers_with_it(self, client: int) -> Outcome:
        reason = "three workers died while they trained it, often for want of memory"
        failure = Failure(client, self._task.data.clients[client], reason)
        return Outcome(client, 0.0, 0.0, 0, 0, failure)


class _Labour:
    """What a worker of the cluster does; it lives in a process of its own."""

    def __init__(self, task: Task, precision: Precision) -> None:
        torch.set_num_threads(1)
        self._task = task
        self._runtime, self._evaluator = TorchRuntime(task, precision), Evaluator(task)
        self._batches = evaluation_batches(task)
        self._mean = FixedPointMean(self._runtime.spec.dim)
        self._received: Vector = np.empty(0, np.float32)
        self._call = 0

    def ready(self) -> None:
        """Answers when everything before it is done."""

    def train(
        self, training: _Training, clients: list[int], states: Mapping[int, Vector]
    ) -> tuple[list[Outcome], dict[int, Vector]]:
        """Train clients and add their updates to the partial sum; also what they keep."""
        if training.number != self._call:
            self._call = training.number
            self._received = training.received.copy()  # what Ray gives cannot be written to
            self._mean = FixedPointMean(len(self._received))
        outcomes: list[Outcome] = []
        kept: dict[int, Vector] = {}
        for client in clients:
            outcome, state = train_client(
                self._task,
                self._runtime,
                self._mean,
                training.algorithm,
                self._received,
                client,
                states.get(client),
                training.seed,
                training.round,
            )
            outcomes.append(outcome)
            if state is not None:
                kept[client] = state.copy()
        return outcomes, kept

    def hand_over(self) -> _Partial:
        """The partial sum, which is zero from then on."""
        partial = _Partial(self._mean.sum, self._mean.total, self._mean.bound)
        self._mean = FixedPointMean(len(self._received))
        return partial

    def evaluate(self, weights: Vector, call: int, numbers: list[int]) -> list[tuple[int, Any]]:
        """The sums of batches of the central evaluation, with their numbers."""
        if call != self._call:
            self._call = call
            self._evaluator.load(weights)
        return [(number, self._evaluator.sums(self._batches[number])) for number in numbers]


def _restored(partial: _Partial) -> FixedPointMean:
    mean = FixedPointMean.__new__(FixedPointMean)
    mean.sum, mean.total, mean.bound = partial
    return mean


def _connect(address: str | None, num_workers: int | None) -> tuple[ModuleType, bool]:
    """The module `ray`, connected; and whether the connection is ours to end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        if address is not None:
            raise WorkerError(
                "address must be None in a program that is connected to a cluster already, got "
                f"address={address!r}. Leave it out, or call ray.shutdown() first."
            )
        return ray, False
    # A cluster's door starts a process for each who knocks, and gives it up if it is slow to start.
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
    """See whether anybody answers at host:port; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10.0).close()
