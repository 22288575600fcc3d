"""The training loss of the averaged model, beside its test metrics.

Clients report the loss while they train, which falls with every local epoch whatever the average is
worth. This is the loss of a round's final model on a sample of all clients' training examples. The
sample is the same in every round of every run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from potluck.core import Vector, stream
from potluck.core.validate import as_count
from potluck.engine import Evaluator, Task, evaluation_batches
from potluck.engine.devices import kernel_threads
from potluck.engine.task import Remade
from potluck.simulation.executors.executor import (
    CohortResult,
    Executor,
    RoundWork,
)


class WithTrainLoss:
    """An executor that adds `train_loss` to the metrics of another.

    Args:
        inner: trains, evaluates and is closed with this one.
        num_examples: of the sample; all training examples if there are not so many.
    """

    def __init__(self, inner: Executor, task: Task, num_examples: int) -> None:
        self._inner = inner
        self._task = task
        self._model = Remade(task, self._make)
        train = task.data.train
        order = stream(0, "train-loss").permutation(train.num_examples)
        rows = np.sort(order[: as_count("num_examples", num_examples)])
        self._batches = evaluation_batches(task, train.rows(rows))

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)
        begin: Callable[[int], None] | None = getattr(self._inner, "begin", None)
        if begin is not None:
            begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort, by the other executor."""
        return self._inner.train(work)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation by the other executor, and the loss on the sample."""
        metrics = self._inner.evaluate(weights)
        self._model.follow()
        self._evaluator.load(weights)
        with kernel_threads(1):  # the same bits whatever the executor
            loss = self._evaluator.evaluate(self._batches)["loss"]
        return {**metrics, "train_loss": loss}

    def close(self) -> None:
        """Closes the other executor."""
        self._inner.close()

    def _make(self) -> None:
        self._evaluator = Evaluator(self._task)
