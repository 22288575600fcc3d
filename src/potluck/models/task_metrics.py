"""Metrics.

A metric takes (outputs, targets) to one value per example, [batch], or per position of an example,
[batch, …]; NaN marks what does not count (padding). Values are averaged over all that count. A
metric that gives one number for a batch is taken of the whole test set at once where it is no mean
over examples. A `Statistic` is a metric that is made of sums over examples by a last step, as the
root mean squared error is. An attribute `higher_is_better` of a metric says which way is better.

Which loss and metrics a task has by default follows from what its targets are; see `defaults`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import TaskError
from potluck.data.tables.targets import TargetKind
from potluck.data.trees import shown
from potluck.models.losses import (
    Loss,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    paired,
    squeezed,
)


class Statistic(Protocol):
    """A metric that is made of sums over examples by a last step."""

    higher_is_better: bool

    def terms(self, outputs: Any, targets: Tensor) -> Tensor:
        """Returns the terms that each example adds to the sums: [batch, terms]."""
        ...

    def value(self, totals: NDArray[np.float64]) -> float:
        """The metric, from the sums [terms] over all examples."""
        ...


Metric: TypeAlias = Callable[[Any, Tensor], Any] | Statistic

AFTER_FIRST = "accuracy_after_first"  # the name of the metric of text without first characters


def accuracy(
    outputs: Tensor, targets: Tensor, *, threshold: float | None = 0.0, ignored: int | None = None
) -> Tensor:
    """1 where the prediction is the target, 0 where not, NaN where the target does not count.

    Of logits [batch, classes, …] and classes [batch, …], the prediction is the largest logit's
    class. Of one output per target ([batch] or [batch, 1]; or [batch, labels] of many labels, each
    0 or 1) it is whether the output is above `threshold`.

    Args:
        threshold: between label 0 and label 1, where there is one output per target: 0 for logits,
            0.5 for probabilities. With None such targets are the probabilities of classes.
        ignored: a target that does not count; a class below 0 never does.

    Raises:
        TaskError: outputs and targets of shapes for which there is no accuracy.
    """
    whole = not targets.is_floating_point()
    labels = targets.squeeze(1) if _is_column(outputs, targets) and whole else targets
    if whole and outputs.ndim == labels.ndim + 1 and outputs.shape[1] > 1:
        if outputs.shape[2:] == labels.shape[1:]:
            right = (outputs.argmax(dim=1) == labels).float()
            hidden = labels < 0 if ignored is None else (labels < 0) | (labels == ignored)
            return right.masked_fill(hidden, float("nan"))
    elif squeezed(outputs.shape) == squeezed(targets.shape):
        if threshold is None:
            return (outputs.argmax(dim=1) == targets.argmax(dim=1)).float()
        if bool(((targets == 0) | (targets == 1)).all()):
            return ((outputs.reshape(targets.shape) > threshold) == (targets > 0.5)).float()
        raise TaskError(
            "accuracy needs classes, or labels that are 0 or 1, got other numbers as targets "
            f"({shown(targets)}). For a regression use mean_absolute_error, or leave metrics out."
        )
    raise TaskError(
        "accuracy needs logits [batch, classes] and classes [batch], or one output per target that "
        f"is 0 or 1, got outputs={shown(outputs)}, targets={shown(targets)}. Give a metric of your "
        "own, or metrics={}."
    )


def mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The distance of each output from its target, in the targets' shape."""
    return (paired(outputs, targets).double() - targets.double()).abs()


@dataclass(frozen=True, slots=True)
class RootMeanSquaredError:
    """The root of the mean, over all examples, of the squared errors."""

    higher_is_better = False

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared errors of each example and their number: [batch, 2]."""
        errors = paired(outputs, targets).double() - targets.double()
        squares = errors.reshape(len(targets), -1).square()
        return torch.stack([squares.sum(1), torch.full_like(squares[:, 0], squares.shape[1])], 1)

    def value(self, totals: NDArray[np.float64]) -> float:
        """NaN of no examples."""
        return float(np.sqrt(totals[0] / totals[1])) if totals[1] > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class RSquared:
    """1 − Σ (y − ŷ)² / Σ (y − ȳ)², with the mean ȳ of all targets; of several targets per example
    the mean over them. NaN where all targets are alike."""

    higher_is_better = True

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(y − ŷ)², y, y² of each target, and 1: [batch, 3 · targets + 1]."""
        wanted = targets.double().reshape(len(targets), -1)
        errors = paired(outputs, targets).double().reshape(wanted.shape) - wanted
        ones = torch.ones_like(wanted[:, :1])
        return torch.cat([errors.square(), wanted, wanted.square(), ones], dim=1)

    def value(self, totals: NDArray[np.float64]) -> float:
        """NaN where the targets do not vary."""
        errors, sums, squares = totals[:-1].reshape(3, -1)
        spread = squares - sums**2 / max(totals[-1], 1.0)
        if not (spread > 1e-12 * np.maximum(squares, 1e-300)).all():
            return float("nan")
        return float((1.0 - errors / spread).mean())


_RMSE, _R2 = RootMeanSquaredError(), RSquared()


def defaults(kind: TargetKind) -> tuple[Loss, dict[str, Metric]]:
    """The loss and the metrics of targets of a kind."""
    if kind == "regression":
        metrics: dict[str, Metric] = {"mae": mean_absolute_error, "rmse": _RMSE, "r2": _R2}
        return mean_squared_error, metrics
    loss = binary_cross_entropy if kind == "multilabel" else cross_entropy
    return loss, {"accuracy": accuracy}


def check_judges(loss: Any, metrics: Any) -> None:
    """Checks the types of a loss and of metrics.

    Raises:
        TypeError, ValueError: they are none; the message says what to give.
    """
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            "loss must be a function of (outputs, targets), or a module, got "
            f"loss={loss!r}. Give one, such as torch.nn.functional.cross_entropy or "
            "torch.nn.CrossEntropyLoss()."
        )
    if not isinstance(metrics, Mapping):
        raise TypeError(
            "metrics must be a dictionary of names and functions of (outputs, targets), got "
            f"{type(metrics).__name__}. Give {{'accuracy': accuracy}}, or {{}} for none."
        )
    for name, metric in cast("Mapping[Any, Any]", metrics).items():
        if isinstance(metric, type) or not (callable(metric) or is_statistic(metric)):
            raise TypeError(
                "a metric must be a function of (outputs, targets), or have terms and value, got "
                f"{name!r}={metric!r}. Give a function, or an instance."
            )
        if not isinstance(name, str) or name == "loss":
            raise ValueError(
                "metrics must be called by text other than 'loss', which is the name of the "
                f"task's loss, got a metric called {name!r}. Call it otherwise."
            )


def is_statistic(metric: Any) -> bool:
    """True if a metric is made of sums over examples by a last step."""
    return callable(getattr(metric, "terms", None)) and callable(getattr(metric, "value", None))


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterAccuracy:
    """1 where the largest logit is the target's, 0 where not, NaN at padding: [batch, width]."""

    padding: int  # the target that does not count
    skipped: int = 0  # positions at the beginning of every row that do not count either

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns it for logits [batch, width, symbols] and targets [batch, width]."""
        right = (outputs.argmax(dim=2) == targets).float()
        right = right.masked_fill(targets == self.padding, float("nan"))
        right[:, : self.skipped] = float("nan")
        return right


def _is_column(outputs: Tensor, targets: Tensor) -> bool:
    """True if classes are [batch, 1] and logits [batch, classes]."""
    return targets.ndim == outputs.ndim == 2 and targets.shape[1] == 1 < outputs.shape[1]
