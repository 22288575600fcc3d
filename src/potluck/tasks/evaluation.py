"""Evaluation: of one model on a test set (central), or on every client's own (federated)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import Vector
from potluck.core.validate import as_count
from potluck.tasks.data import Examples, lengths, trimmed
from potluck.tasks.task import Task, bind, spec_of

EVALUATION_BATCH = 100  # examples; whose activations a cache can hold


class Evaluator:
    """One module in evaluation mode, for any number of models; on a CPU if no device is given."""

    def __init__(
        self, task: Task, device: torch.device | None = None, seed: int | None = None
    ) -> None:
        self._task = task
        self._device = device or torch.device("cpu")
        self._module, self._loss, self._metrics = task.parts(seed)
        self._module.eval().to(self._device)
        self._vector = torch.empty(spec_of(self._module).dim, device=self._device)
        bind(self._module, self._vector)

    def load(self, weights: Vector) -> None:
        """Evaluate this model from now on."""
        self._vector.copy_(torch.tensor(weights))

    def sums(self, examples: Examples) -> dict[str, NDArray[np.float64]]:
        """Of one batch: name to [sum, count], the loss among them."""
        with torch.inference_mode():
            outputs, targets = self._outputs(examples)
            loss = float(self._loss(outputs, targets))
            count = getattr(self._loss, "count", len)(targets)
            sums = {"loss": np.array([loss * count, count])}
            for name, metric in self._metrics.items():
                values = metric(outputs, targets).double()
                counts = ~values.isnan()
                sums[name] = np.array([float(values.nansum()), float(counts.sum())])
        return sums

    def per_example(self, examples: Examples) -> dict[str, NDArray[np.float64]]:
        """Of one batch: name of a metric to [examples, 2], a sum and a count for each."""
        with torch.inference_mode():
            outputs, targets = self._outputs(examples)
            result: dict[str, NDArray[np.float64]] = {}
            for name, metric in self._metrics.items():
                values = metric(outputs, targets).double().reshape(len(targets), -1)
                counts = (~values.isnan()).sum(1).double()
                result[name] = torch.stack([values.nansum(1), counts], dim=1).cpu().numpy()
        return result

    def _outputs(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = np.array(examples.inputs), np.array(examples.targets)
        if self._task.data.padding is not None:
            longest = int(lengths(inputs, self._task.data.padding).max())
            inputs, targets = trimmed(inputs, targets, max(longest, 1))
        there = (
            torch.from_numpy(inputs).to(self._device),
            torch.from_numpy(targets).to(self._device),
        )
        return self._module(there[0]), there[1]


def batches_of(examples: Examples, size: int = EVALUATION_BATCH) -> list[Examples]:
    """The examples in order, in batches of `size`: views."""
    return [
        Examples(examples.inputs[i : i + size], examples.targets[i : i + size])
        for i in range(0, examples.num_examples, size)
    ]


def evaluation_batches(
    task: Task, examples: Examples | None = None, size: int = EVALUATION_BATCH
) -> list[Examples]:
    """The examples of a central evaluation (the task's test examples) in batches; sequences in
    order of length, so that little is padded."""
    examples = examples or task.data.test
    size = as_count("size", size)
    if task.data.padding is not None:
        order = np.argsort(lengths(examples.inputs, task.data.padding), kind="stable")
        examples = Examples(examples.inputs[order], examples.targets[order])
    return batches_of(examples, size)


def means(sums: list[dict[str, NDArray[np.float64]]]) -> dict[str, float]:
    """The sums of all batches, in order, to the means over all that counts; NaN if nothing does."""
    total = {name: np.sum([batch[name] for batch in sums], axis=0) for name in sums[0]}
    return {
        name: float(pair[0] / pair[1]) if pair[1] > 0 else float("nan")
        for name, pair in total.items()
    }


def evaluate(
    task: Task, weights: Vector, examples: Examples | None = None, *, seed: int | None = None
) -> dict[str, float]:
    """Central evaluation: the mean loss and metrics of a model, on the task's test examples if
    no others are given.

    Args:
        seed: of the run that the weights are of, where the model draws more than its weights; not
            needed while the task was used for one seed only.

    Raises:
        ValueError: it is needed, and was not given.
    """
    evaluator = Evaluator(task, seed=task.only_seed() if seed is None else seed)
    evaluator.load(weights)
    return means([evaluator.sums(b) for b in evaluation_batches(task, examples)])


class FederatedMetric(NamedTuple):
    """One metric over all clients."""

    per_client: NDArray[np.float64]  # [clients], NaN where a client has nothing that counts
    mean: float  # every client counts the same
    weighted_mean: float  # every example counts the same
    worst_decile: float  # the mean over the worst tenth of the clients


def federated_evaluation(
    task: Task, weights: Vector, *, seed: int | None = None
) -> Mapping[str, FederatedMetric]:
    """Evaluate a model on every client's own test examples (its training ones if it has none).

    Each metric is taken to be better the larger it is.
    """
    data = task.data
    own = data.test_offsets is not None
    examples = data.test if own else data.train
    offsets = data.test_offsets if data.test_offsets is not None else data.offsets
    evaluator = Evaluator(task, seed=task.only_seed() if seed is None else seed)
    evaluator.load(weights)
    parts = [evaluator.per_example(batch) for batch in batches_of(examples)]
    result: dict[str, FederatedMetric] = {}
    for name in task.metrics:
        pairs = np.concatenate([part[name] for part in parts])  # [examples, 2]
        running = np.concatenate([np.zeros((1, 2)), np.cumsum(pairs, axis=0)])
        sums = running[offsets[1:]] - running[offsets[:-1]]  # [clients, 2]
        result[name] = _summary(sums)
    return result


def _summary(sums: NDArray[np.float64]) -> FederatedMetric:
    counted = sums[:, 1] > 0
    per_client = np.full(len(sums), np.nan)
    per_client[counted] = sums[counted, 0] / sums[counted, 1]
    if not counted.any():
        return FederatedMetric(per_client, float("nan"), float("nan"), float("nan"))
    ordered = np.sort(per_client[counted])
    worst = ordered[: max(1, len(ordered) // 10)]
    return FederatedMetric(
        per_client=per_client,
        mean=float(ordered.mean()),
        weighted_mean=float(sums[:, 0].sum() / sums[:, 1].sum()),
        worst_decile=float(worst.mean()),
    )
