"""Evaluation: of one model on a test set (central), or on every client's own (federated).

The loss and each metric are put together from batches such that the result is that of all examples
at once (`potluck.engine.scores`). Sums may come from many processes. A metric without sums is
computed in one, from the outputs for all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import TaskError, Vector, derive_seed, higher_is_better
from potluck.core.validate import as_count
from potluck.data.federated import Examples, lengths, trimmed
from potluck.data.trees import joined, mapped
from potluck.engine.first_batch import in_words, outputs_of, tensors
from potluck.engine.module.modes import own_modes
from potluck.engine.module.pristine import Pristine
from potluck.engine.module.randomness import borrowed_randomness, seed_generators, states
from potluck.engine.module.variables import Variables
from potluck.engine.native.max_pool import use_compiled
from potluck.engine.scores import WHOLE, Score, Totals, number_in, scores_of, value_of
from potluck.engine.task import Task, averaged_tensors, bind, spec_of
from potluck.models.task_metrics import defaults

_STREAM = derive_seed(0, "evaluation")
EVALUATION_BATCH = 100  # examples; whose activations a cache can hold
_SAMPLE = 64  # examples, from which it is decided how metrics are put together
_MOST_BYTES = 2**31  # of outputs that are kept for a metric of all examples at once

Sums: TypeAlias = dict[str, Totals]  # by name, the loss among them
T = TypeVar("T")


class Evaluator:
    """One module in evaluation mode, for any number of models; on a CPU if no device is given."""

    def __init__(
        self, task: Task, device: torch.device | None = None, seed: int | None = None
    ) -> None:
        self._task = task
        self._device = device or torch.device("cpu")
        self._module, self._loss, self._metrics = task.parts(seed)
        use_compiled(self._module.eval())
        self._module.to(self._device)
        self._vector = torch.empty(spec_of(self._module).dim, device=self._device)
        bind(self._module, self._vector)
        self._pristine = Pristine(self._module, dict(averaged_tensors(self._module)), self._loss)
        self._variables = Variables.of(self._module, self._loss)
        self._draws: bool | None = None  # whether there is chance in it; unknown before a batch
        self._scores: list[Score] | None = None
        # A model that differentiates itself in its forward pass needs gradients here too.
        self._modes: Sequence[Callable[[], Any]] = (
            torch.inference_mode,
            torch.no_grad,
            torch.enable_grad,
        )

    def load(self, weights: Vector) -> None:
        """Loads the model to evaluate from now on.

        Raises:
            ValueError: weights of another length.
        """
        if np.shape(weights) != tuple(self._vector.shape):
            raise ValueError(
                f"weights must be a vector of the task's model, of length {len(self._vector)}, "
                f"got shape={np.shape(weights)}. Take those of a run with this model."
            )
        self._module.train()
        self._vector.copy_(torch.tensor(weights))
        self._module.eval()  # with them in place: adapters add theirs to those of their layers now

    def sums(self, examples: Examples) -> Sums:
        """Returns the sums of one batch, by name; empty for a metric of all examples at once.

        Raises:
            TaskError: model, loss or a metric cannot be used on these examples; the client is
                named if they are one's own.
        """
        scores = self._known_scores()

        def work() -> Sums:
            outputs, targets = self._outputs(examples)
            return {score.name: score.sums(outputs, targets) for score in scores}

        return self._blaming(work)

    def evaluate(self, batches: Sequence[Examples]) -> dict[str, float]:
        """The loss and metrics of all examples of these batches."""
        metrics, totals = self._metrics, self.totals(batches)
        return {name: value_of(metrics.get(name), total) for name, total in totals.items()}

    def totals(self, batches: Sequence[Examples]) -> Sums:
        """Returns the sums over these batches, in order. A metric of all examples at once is there
        as if it were a mean over examples."""
        totals = added([self.sums(batch) for batch in batches])
        names = [name for name, total in totals.items() if total is WHOLE]
        size = sum(batch.num_examples for batch in batches)
        for name, number in self.whole(batches, names).items():
            is_number = not np.isnan(number)
            totals[name] = np.array([number * size, size]) if is_number else np.zeros(2)
        return totals

    def whole(self, batches: Sequence[Examples], names: Sequence[str]) -> dict[str, float]:
        """Returns the named metrics of all examples at once."""
        if not names:
            return {}
        chosen = [score for score in self._known_scores() if score.name in names]

        def work() -> dict[str, float]:
            pairs: list[Any] = []
            for batch in batches:
                outputs, targets = self._outputs(batch, whole=True)
                pairs.append((mapped(_detached, outputs), targets))
                _check_room(chosen[0], pairs)
            outputs, targets = joined(_all_rows, pairs)
            with in_words(chosen[0].what, None, outputs, targets):
                return {score.name: score.number(outputs, targets) for score in chosen}

        return self._blaming(work)

    def _known_scores(self) -> list[Score]:
        """Returns the ways to combine the loss and metrics over batches, decided once."""
        if self._scores is None:

            def work() -> list[Score]:
                outputs, targets = self._outputs(_sample(self._task))
                return scores_of(
                    self._loss,
                    self._metrics,
                    outputs,
                    targets,
                    by_default=self._task.metrics == defaults(self._task.kind)[1],
                )

            self._scores = self._blaming(work)
        return self._scores

    def _blaming(self, work: Callable[[], T]) -> T:
        try:
            return self._in_a_mode(work)
        except TaskError as error:
            # A batch that cannot be computed, unlike a contract that is not kept, has a client.
            client = None if error.__cause__ is None else self._first_failing()
            if client is None:
                raise
            raise TaskError(f"client {client!r}: {error}") from error.__cause__

    def _in_a_mode(self, work: Callable[[], T]) -> T:
        """Computes it in the fastest mode that works, from then on."""
        *others, last = self._modes
        for number, mode in enumerate(others):
            try:
                with self._alike(), self._variables.held(), mode():
                    found = work()
                self._modes = self._modes[number:]
                return found
            except Exception:  # perhaps because gradients are off
                continue
        with self._alike(), self._variables.held(), last():
            found = work()
        self._modes = [last]
        return found

    @contextmanager
    def _alike(self) -> Generator[None]:
        """Seeds the generators in this block, so that a batch has the same draws in every
        process."""
        if self._draws is False:
            yield
            return
        with borrowed_randomness():
            seed_generators(_STREAM)
            before = states()
            yield
            self._draws = self._draws or states() != before

    def _first_failing(self) -> str | None:
        """The first client on whose own examples the model cannot be evaluated."""
        data = self._task.data
        for number, name in enumerate(data.clients):
            for batch in batches_of(data.client_test(number)):
                try:
                    outputs, targets = self._in_a_mode(lambda batch=batch: self._outputs(batch))
                    number_in(self._loss(outputs, targets))
                except Exception:
                    return name
        return None

    def _outputs(self, examples: Examples, whole: bool = False) -> tuple[Any, torch.Tensor]:
        """The model's outputs, and the targets; not trimmed if they are to be put together."""
        self._pristine.restore()
        inputs, targets = mapped(np.array, examples.inputs), np.array(examples.targets)
        if self._task.data.padding is not None and not whole:
            longest = int(lengths(inputs, self._task.data.padding).max())
            inputs, targets = trimmed(inputs, targets, max(longest, 1))
        there: Any = mapped(lambda array: torch.from_numpy(array).to(self._device), inputs)
        wanted = torch.from_numpy(targets).to(self._device)
        return outputs_of(self._module, there, wanted), wanted


def _sample(task: Task) -> Examples:
    """Returns examples from all over the test set, with targets as different as can be, in their
    order."""
    data = task.data
    examples = data.test if data.test.num_examples > 0 else data.train
    targets = examples.targets
    if targets.ndim > 1 and targets.dtype.kind in "iu":
        order = np.argsort(targets.reshape(len(targets), -1).min(axis=1), kind="stable")
    elif targets.ndim > 1:
        order = np.arange(len(targets))
    else:
        order = np.argsort(targets, kind="stable")
    places = np.linspace(0, len(order) - 1, min(_SAMPLE, len(order))).astype(np.int64)
    if targets.ndim == 1 and targets.dtype.kind in "iu":
        starts = np.unique(targets[order], return_index=True)[1]  # of each class
        places = np.unique(np.concatenate([places, starts[:_SAMPLE]]))
    return examples.rows(order[places])


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, torch.Tensor) else part


def _all_rows(parts: list[Any]) -> Any:
    """Returns one element of the outputs for all batches, as a tensor, or None."""
    return parts[0] if parts[0] is None else torch.cat(parts)


def _check_room(score: Score, pairs: list[Any]) -> None:
    kept = sum(part.nbytes for pair in pairs for part in tensors(pair))
    if kept > _MOST_BYTES:
        raise TaskError(
            f"{score.what} must be a mean over examples where outputs are large, got a number that "
            f"is none, and {kept:,} bytes of outputs. Give a loss a method count(targets), which "
            "is what it divides by, and let a metric give one value per example."
        )


def batches_of(examples: Examples, size: int = EVALUATION_BATCH) -> list[Examples]:
    """The examples in order, in batches of `size`: views."""
    return [examples.rows(slice(i, i + size)) for i in range(0, examples.num_examples, size)]


def evaluation_batches(
    task: Task, examples: Examples | None = None, size: int = EVALUATION_BATCH
) -> list[Examples]:
    """The examples of a central evaluation (the task's test examples) in batches; sequences in
    order of length, so that little is padded."""
    size = as_count("size", size)
    examples = examples or task.data.test
    if task.data.padding is not None:
        order = np.argsort(lengths(examples.inputs, task.data.padding), kind="stable")
        examples = examples.rows(order)
    return batches_of(examples, size)


def added(sums: Sequence[Sums]) -> Sums:
    """The sums of all batches, in order, as one."""
    if not sums:
        return {}
    return {
        name: WHOLE if len(sums[0][name]) == 0 else np.sum([part[name] for part in sums], axis=0)
        for name in sums[0]
    }


def means(task: Task, weights: Vector, sums: Sequence[Sums]) -> dict[str, float]:
    """The central evaluation of a model of which these are the sums of all batches, in order: NaN
    for what nothing counts in."""
    totals = added(sums)
    names = [name for name, total in totals.items() if total is WHOLE]
    numbers: dict[str, float] = {}
    if names:
        evaluator = Evaluator(task)
        evaluator.load(weights)
        numbers = evaluator.whole(evaluation_batches(task), names)
    return {
        name: numbers[name] if name in numbers else value_of(task.metrics.get(name), total)
        for name, total in totals.items()
    }


@own_modes()
def evaluate(
    task: Task, weights: Vector, examples: Examples | None = None, *, seed: int | None = None
) -> dict[str, float]:
    """Central evaluation: the mean loss and metrics of a model, on the task's test examples if
    no others are given.

    Args:
        seed: of the run that the weights are of, where the model draws more than its weights; not
            needed while the task was used for one seed only.

    Raises:
        TaskError: model, loss or a metric does not keep its contract or does not fit the data.
        ValueError: the seed is needed, and was not given.
    """
    evaluator = Evaluator(task, seed=task.only_seed() if seed is None else seed)
    evaluator.load(weights)
    return evaluator.evaluate(evaluation_batches(task, examples))


class FederatedMetric(NamedTuple):
    """The loss or one metric over all clients."""

    per_client: NDArray[np.float64]  # [clients], NaN where a client has nothing that counts
    mean: float  # every client counts the same
    weighted_mean: float  # every example counts the same
    worst_decile: float  # the mean over the worst tenth of the clients

    def __repr__(self) -> str:
        return (
            f"FederatedMetric(mean {self.mean:.4f}, weighted mean {self.weighted_mean:.4f}, "
            f"worst decile {self.worst_decile:.4f}, {len(self.per_client)} clients)"
        )


@own_modes()
def federated_evaluation(
    task: Task, weights: Vector, *, seed: int | None = None
) -> Mapping[str, FederatedMetric]:
    """Evaluates a model on every client's own test examples (its training ones if it has none): the
    loss and each metric.

    Which clients are the worst depends on the metric: see `potluck.core.higher_is_better`.

    The seed is as for `evaluate`.

    Raises:
        TaskError: as `evaluate`; the client is named.
        ValueError: as `evaluate`.
    """
    evaluator = Evaluator(task, seed=task.only_seed() if seed is None else seed)
    evaluator.load(weights)
    parts: dict[int, Sums] = {}  # of the clients that have examples
    for number in range(task.data.num_clients):
        examples = task.data.client_test(number)
        if examples.num_examples > 0:
            parts[number] = evaluator.totals(batches_of(examples))
    return {
        name: _summary(task, name, {number: totals[name] for number, totals in parts.items()})
        for name in (next(iter(parts.values())) if parts else ())
    }


def _summary(task: Task, name: str, totals: Mapping[int, Totals]) -> FederatedMetric:
    metric = task.metrics.get(name)
    per_client = np.full(task.data.num_clients, np.nan)
    for number, total in totals.items():
        per_client[number] = value_of(metric, total)
    rising = np.sort(per_client[~np.isnan(per_client)])
    if len(rising) == 0:
        return FederatedMetric(per_client, float("nan"), float("nan"), float("nan"))
    worst_first = rising if higher_is_better(name, metric) else rising[::-1]
    return FederatedMetric(
        per_client=per_client,
        mean=float(rising.mean()),
        weighted_mean=value_of(metric, np.sum(list(totals.values()), axis=0)),
        worst_decile=float(worst_first[: max(1, len(rising) // 10)].mean()),
    )
