"""The contract of an executor: its work, its results, and one client of a round.

An executor trains every client of a cohort and returns one weighted mean. The choice of executor
never changes cohorts, batches or initial weights, and the mean is exact in any order. So two
executors whose kernels round alike give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import Algorithm, ClientHalf, num_wide
from potluck.core import (
    ClientContext,
    DivergedError,
    FixedPointMean,
    PotluckError,
    Trained,
    Update,
    Vector,
)
from potluck.engine import Task, TorchRuntime, run_of
from potluck.engine.local_run import LocalRun


class Failure(NamedTuple):
    """A client that gave no update, and why."""

    client: int
    name: str
    reason: str
    diverged: bool = False


class CohortResult(NamedTuple):
    """The result of local training of one cohort."""

    aggregate: Vector  # [vectors · dim], the weighted mean of the updates; zeros if there were none
    loss: float  # the weighted mean of the clients' training losses; NaN if there were none
    num_examples: int  # of the clients that gave an update
    num_steps: int
    failures: tuple[Failure, ...]
    states: Mapping[int, Vector]  # by client, what those that gave an update keep from now on
    executor: str = ""  # what trained it and why, in words, where that was a choice

    def __repr__(self) -> str:
        done = f"loss {self.loss:.4f}, {self.num_examples} examples, {self.num_steps} steps"
        return f"CohortResult({done}, {len(self.failures)} failed)"


NO_STATES: Mapping[int, Vector] = MappingProxyType({})


class RoundWork(NamedTuple):
    """The work of an executor in a round; each client of the cohort received the same."""

    algorithm: Algorithm
    received: Vector
    cohort: NDArray[np.int64]
    seed: int
    round: int
    states: Mapping[int, Vector] = NO_STATES
    """By client, what clients kept of their last round; it is not changed."""


class Executor(Protocol):
    """An object that trains cohorts and evaluates models until it is closed.

    One that makes its model itself may have a method `begin(seed)`, which a run calls first: the
    seed decides what a model draws when it is made.
    """

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort."""
        ...

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        ...

    def close(self) -> None:
        """Releases its processes and memory. May be called twice."""
        ...


def empty_mean(work: RoundWork, last: FixedPointMean | None = None) -> FixedPointMean:
    """Returns an empty mean for the updates of this work; `last` is reused if it fits."""
    length, wide = len(work.received), num_wide(work.algorithm)
    if last is None or (last.dim, last.wide) != (length, wide):
        return FixedPointMean(length, wide=wide)
    last.reset()
    return last


class Outcome(NamedTuple):
    """The part of a client's update that is kept once it is in the sum."""

    client: int
    weight: float
    loss: float
    num_examples: int
    num_steps: int
    failure: Failure | None = None


ClientResult: TypeAlias = tuple[Outcome, Vector | None]  # and what the client keeps


class RoundClient:
    """One client of a round, whose client half stops where it asks for local training.

    A loop answers at once. An executor that trains side by side collects the requests first. When
    the client half ends, its update is added to the mean. A failure is kept, not raised, and a
    client that failed keeps nothing new.
    """

    run: LocalRun | None
    """The steps that it waits for; None once there is a `result`."""
    result: ClientResult

    def __init__(self, task: Task, work: RoundWork, number: int, mean: FixedPointMean) -> None:
        self.number, self.num_examples = number, task.data.client(number).num_examples
        self._task, self._mean = task, mean
        state = work.states.get(number)
        self._context = ClientContext(work.seed, work.round, number, self.num_examples, state)
        try:
            self._half = ClientHalf(work.algorithm, work.received, self._context)
            self._go_on()
        except Exception as error:
            self.fail(error)

    def answer(self, local: Trained) -> None:
        """Sends the client half the result of its request."""
        try:
            self._half.answer(local)
            self._go_on()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the client half without an update."""
        told = str(error) if isinstance(error, PotluckError) else f"{type(error).__name__}: {error}"
        name = self._task.data.clients[self.number]
        failure = Failure(self.number, name, told, isinstance(error, DivergedError))
        self.run, self.result = None, (Outcome(self.number, 0.0, 0.0, 0, 0, failure), None)

    def _go_on(self) -> None:
        request = self._half.request
        if request is not None:
            self.run = run_of(self._task, request, self._context)
            return
        update, count = self._half.update, self.num_examples
        if np.isnan(update.loss) and not update.delta.any():  # nothing of this client counts
            self.run, self.result = None, (Outcome(self.number, 0.0, 0.0, count, 0), None)
            return
        _check_finite(update)
        self._mean.add(update.delta, update.weight)
        del self._half  # the update is in the mean
        outcome = Outcome(self.number, update.weight, update.loss, count, update.num_steps)
        self.run, self.result = None, (outcome, update.state)


def started(
    task: Task, work: RoundWork, numbers: NDArray[np.int64], mean: FixedPointMean
) -> Iterator[RoundClient]:
    """Yields these clients of a round, each run up to its first request."""
    return (RoundClient(task, work, number, mean) for number in map(int, numbers))


def train_client(client: RoundClient, runtime: TorchRuntime) -> ClientResult:
    """Answers the requests of a client until it ends."""
    while client.run is not None:
        try:
            local = runtime.train(client.run)
        except Exception as error:
            client.fail(error)
        else:
            client.answer(local)
    return client.result


def _check_finite(update: Update) -> None:
    if not np.isfinite(update.loss):
        raise DivergedError(
            f"the training loss must be finite, got loss={update.loss}. "
            "Lower the client learning rate, or look at this client's data."
        )
    if update.state is not None and not np.isfinite(update.state).all():
        raise DivergedError(
            "what a client keeps must be finite, got a state that is not. "
            "Lower the client learning rate."
        )


def summarise(mean: FixedPointMean, results: Iterable[ClientResult]) -> CohortResult:
    """Returns the result of a cohort, the same in any order of training."""
    results = sorted(results, key=lambda result: result[0].client)
    outcomes = [outcome for outcome, _ in results]
    total = mean.total
    loss = sum(o.weight * o.loss for o in outcomes) / total if total > 0 else float("nan")
    return CohortResult(
        aggregate=mean.mean(),
        loss=loss,
        num_examples=sum(o.num_examples for o in outcomes),
        num_steps=sum(o.num_steps for o in outcomes),
        failures=tuple(o.failure for o in outcomes if o.failure is not None),
        states={o.client: state for o, state in results if state is not None},
    )
