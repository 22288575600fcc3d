"""What runs a cohort: the interface, and the plain loop that is the oracle of all others.

An executor trains every client of a cohort and returns one weighted mean. Which executor runs
never changes cohorts, batches or initial weights, and the mean is exact in any order, so two
executors whose kernels round alike give the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.algorithms import Algorithm, Runtime, num_wide
from potluck.core import DivergedError, FixedPointMean, PotluckError, Update, Vector
from potluck.core.allocator import keep_freed
from potluck.core.validate import as_count
from potluck.data import Examples
from potluck.engine import Evaluator, Task, TorchRuntime, evaluation_batches
from potluck.engine.fused_sgd import SMALLEST
from potluck.engine.module.randomness import kept_randomness
from potluck.engine.precision import Precision
from potluck.engine.task import Remade


class Failure(NamedTuple):
    """A client that gave no update, and why."""

    client: int
    name: str
    reason: str
    diverged: bool = False


class CohortResult(NamedTuple):
    """What local training of one cohort gave."""

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


class Executor(Protocol):
    """Trains cohorts and evaluates models; has a lifetime.

    One that makes its model itself may have a method `begin(seed)`, which a run calls first: the
    seed decides what a model draws when it is made.
    """

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

        `states` holds, by client, what clients kept of their last round; it is not changed.
        """
        ...

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        ...

    def close(self) -> None:
        """Give back whatever it holds. May be called twice."""
        ...


class Loop:
    """One client after another, in this process.

    Args:
        task: as for every executor.
        num_threads: of PyTorch's kernels during training. With 1 the results are, bit for bit,
            those of `Workers` on any number of cores; large models run faster with more.
        precision: of local training: "float32" or "bf16".
        fused: whether large layers are fused with their SGD step. Without it every step is plain
            autograd's, which is what tests compare with.
    """

    def __init__(
        self,
        task: Task,
        num_threads: int = 1,
        *,
        precision: Precision = "float32",
        fused: bool = True,
    ) -> None:
        keep_freed()
        self._task = task
        self._num_threads = as_count("num_threads", num_threads)
        self._precision: Precision = precision
        self._fused_from = SMALLEST if fused else None
        self._test = evaluation_batches(task)
        self._mean: FixedPointMean | None = None
        self._model = Remade(task, self._make)

    def begin(self, seed: int) -> None:
        """A run with this seed begins, or goes on."""
        self._task.begin(seed)

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
        self._model.begin(seed)
        mean = self._mean = empty_mean(algorithm, len(received), self._mean)
        kept: dict[int, Vector] = {}
        outcomes: list[Outcome] = []
        with kept_randomness(), kernel_threads(self._num_threads):
            for client in map(int, cohort):
                outcome, state = train_client(
                    self._task,
                    self._runtime,
                    mean,
                    algorithm,
                    received,
                    client,
                    states.get(client),
                    seed,
                    round,
                )
                outcomes.append(outcome)
                if state is not None:
                    kept[client] = state
        return summarise(mean, outcomes, kept)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        self._model.follow()
        self._evaluator.load(weights)
        with kernel_threads(self._num_threads):
            return self._evaluator.evaluate(self._test)

    def close(self) -> None:
        """Nothing is held."""

    def _make(self) -> None:
        self._runtime = TorchRuntime(
            self._task,
            self._precision,
            one_thread=self._num_threads == 1,
            fused_from=self._fused_from,
        )
        self._evaluator = Evaluator(self._task)


def empty_mean(
    algorithm: Algorithm, length: int, last: FixedPointMean | None = None
) -> FixedPointMean:
    """For updates of this length: the last one, if it fits and is of no more use."""
    wide = num_wide(algorithm)
    if last is None or (last.dim, last.wide) != (length, wide):
        return FixedPointMean(length, wide=wide)
    last.reset()
    return last


@contextmanager
def kernel_threads(num_threads: int) -> Generator[None]:
    """Within it, PyTorch's kernels use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Outcome(NamedTuple):
    """What is kept of one client's update once it is in the sum."""

    client: int
    weight: float
    loss: float
    num_examples: int
    num_steps: int
    failure: Failure | None = None


class ClientRuntime(Runtime, Protocol):
    """A runtime that is told whose examples it trains on."""

    def take(self, examples: Examples) -> None:
        """Use these examples from the next `begin` on."""
        ...


def train_client(
    task: Task,
    runtime: ClientRuntime,
    mean: FixedPointMean,
    algorithm: Algorithm,
    received: Vector,
    client: int,
    state: Vector | None,
    seed: int,
    round: int,
) -> tuple[Outcome, Vector | None]:
    """Train one client and add its update to the mean; also what the client keeps.

    A failure is returned, not raised; a client that failed keeps nothing new.
    """
    examples = task.data.client(client)
    runtime.take(examples)
    try:
        update = algorithm.client_update(
            runtime,
            received,
            examples.num_examples,
            state=state,
            seed=seed,
            round=round,
            client=client,
        )
        if np.isnan(update.loss) and not update.delta.any():  # nothing of this client counts
            return Outcome(client, 0.0, 0.0, examples.num_examples, 0), None
        _check_finite(update)
        mean.add(update.delta, update.weight)
    except Exception as error:
        reason = (
            str(error) if isinstance(error, PotluckError) else f"{type(error).__name__}: {error}"
        )
        failure = Failure(
            client, task.data.clients[client], reason, isinstance(error, DivergedError)
        )
        return Outcome(client, 0.0, 0.0, 0, 0, failure), None
    outcome = Outcome(client, update.weight, update.loss, examples.num_examples, update.num_steps)
    return outcome, update.state


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


def summarise(
    mean: FixedPointMean, outcomes: list[Outcome], states: Mapping[int, Vector]
) -> CohortResult:
    """The result of a cohort, the same in whatever order its clients were trained."""
    outcomes = sorted(outcomes)
    total = mean.total
    loss = sum(o.weight * o.loss for o in outcomes) / total if total > 0 else float("nan")
    return CohortResult(
        aggregate=mean.mean(),
        loss=loss,
        num_examples=sum(o.num_examples for o in outcomes),
        num_steps=sum(o.num_steps for o in outcomes),
        failures=tuple(o.failure for o in outcomes if o.failure is not None),
        states={o.client: states[o.client] for o in outcomes if o.client in states},
    )
