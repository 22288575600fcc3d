"""From an algorithm's client half to its local steps, and back.

Clients that train side by side need their steps before any is made. But steps are made by the
algorithm's own lines, which ask a runtime for them one by one. So those lines run twice: at first
against a `Recorder`, which notes what it is asked for and stops them where they want the result;
then, when all clients of a chunk have been trained, once more against the same recorder, which now
recalls the answer. What a client reports thus comes from the algorithm's own lines, and there is no
second implementation of any.

This works because a client half is pure: with the same arguments it asks for the same steps. One
that trains several times in a round is stopped, and answered, as many times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import Algorithm
from potluck.core import Correction, FixedPointMean, Vector
from potluck.data import Examples
from potluck.data.federated import lengths
from potluck.engine import Task
from potluck.engine.vmap.cohort_trainer import LocalRun
from potluck.simulation.executors.executor import ClientRuntime, Outcome, train_client

_NO_CORRECTION = Correction()


class Work(NamedTuple):
    """What an executor is asked for in a round."""

    task: Task
    algorithm: Algorithm
    received: Vector
    seed: int
    round: int
    states: Mapping[int, Vector]
    mean: FixedPointMean

    def train(self, client: int, runtime: ClientRuntime) -> tuple[Outcome, Vector | None]:
        """The client half of one client, into the mean; as `train_client`."""
        return train_client(
            self.task,
            runtime,
            self.mean,
            self.algorithm,
            self.received,
            client,
            self.states.get(client),
            self.seed,
            self.round,
        )


class Answer(NamedTuple):
    """What local training gave."""

    weights: Vector  # [dim]
    loss: float


class Unanswered(BaseException):
    """Stops a client half whose result is not known yet. Not an `Exception`: no error."""


class Recorder:
    """The runtime of one client, which trains nothing."""

    examples: Examples  # of the client

    def __init__(self, task: Task, client: int) -> None:
        data = task.data
        self.client = client
        self.answers: list[Answer] = []  # to the first of its questions
        self.first_row = int(data.offsets[client])
        self._padding = data.padding
        self._by_length = task.batches == "by length"
        self._asked = 0
        self._run: LocalRun | None = None

    @property
    def run(self) -> LocalRun:
        """The steps that were asked for last."""
        assert self._run is not None
        return self._run

    def take(self, examples: Examples) -> None:
        """Start the client half."""
        self.examples = examples
        self._asked = 0

    def lengths(self) -> NDArray[np.int64] | None:
        """As every runtime."""
        if self._padding is None or not self._by_length:
            return None
        return lengths(self.examples.inputs, self._padding)

    def recall(self) -> Answer | None:
        """The answer to the question that is about to be asked, if there is one."""
        if self._asked >= len(self.answers):
            return None
        self._asked += 1
        return self.answers[self._asked - 1]

    def begin(
        self,
        received: Vector,
        order: NDArray[np.int64],
        seed: int,
        correction: Correction = _NO_CORRECTION,
    ) -> None:
        """Note where to start."""
        self._asked += 1
        self._steps: list[tuple[slice, float]] = []
        self._run = LocalRun(received, order + self.first_row, self._steps, seed, correction)

    def step(self, batch: slice, lr: float) -> None:
        """Note a step."""
        self._steps.append((batch, lr))

    def end(self) -> tuple[Vector, float]:
        """Stop the client half here.

        Raises:
            Unanswered: always.
        """
        raise Unanswered
