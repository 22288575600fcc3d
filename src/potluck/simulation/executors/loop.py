"""The `loop` executor: one client after another. All others are tested against it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from potluck.core import FixedPointMean, Vector
from potluck.core.allocator import keep_freed
from potluck.core.validate import as_count
from potluck.engine import Evaluator, Task, TorchRuntime, evaluation_batches
from potluck.engine.devices import kernel_threads
from potluck.engine.fused_sgd import SMALLEST
from potluck.engine.module.randomness import kept_randomness
from potluck.engine.precision import Precision
from potluck.engine.task import Remade
from potluck.simulation.executors.executor import (
    ClientResult,
    CohortResult,
    RoundWork,
    empty_mean,
    started,
    summarise,
    train_client,
)


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
        """Begins or continues a run with this seed."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort."""
        self._model.begin(work.seed)
        mean = self._mean = empty_mean(work, self._mean)
        with kept_randomness(), kernel_threads(self._num_threads):
            clients = started(self._task, work, work.cohort, mean)
            results = list(map(train_client, clients, repeat(self._runtime)))
        return summarise(mean, results)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        self._model.follow()
        self._evaluator.load(weights)
        with kernel_threads(self._num_threads):
            return self._evaluator.evaluate(self._test)

    def close(self) -> None:
        """Does nothing: a loop holds no resources."""

    def _make(self) -> None:
        self._runtime = TorchRuntime(
            self._task,
            self._precision,
            one_thread=self._num_threads == 1,
            fused_from=self._fused_from,
        )
        self._evaluator = Evaluator(self._task)


class OneByOne:
    """Trains some clients of a cohort as `Loop` does, and to its bits."""

    def __init__(self, task: Task, precision: Precision) -> None:
        keep_freed()
        self._task, self._runtime = task, TorchRuntime(task, precision, one_thread=True)

    def train_clients(
        self, work: RoundWork, clients: NDArray[np.int64], mean: FixedPointMean
    ) -> Iterator[ClientResult]:
        """Runs the client halves of these clients; their updates go into the mean."""
        runtime = repeat(self._runtime)
        return map(train_client, started(self._task, work, clients, mean), runtime)
