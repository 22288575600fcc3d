"""Combines the loss and each metric of a task over batches.

values    one value per example or position: a sum and a count, NaN left out
counted   a loss with a known divisor: its mean times the divisor, and the divisor
mean      one number, shown to be a mean over examples: times their number, and their number
terms     a `Statistic`: its own sums
whole     one number that is none of these: of all examples at once

The way is decided once, on examples from all over the test set, of which two unequal parts must add
up to the whole. So the cut of a test set into batches changes no result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from potluck.core import TaskError
from potluck.data.trees import is_one, leaves, mapped, shown
from potluck.engine.first_batch import checked_loss, in_words, tensors, variants
from potluck.models.losses import Loss, Weighted, count_of
from potluck.models.task_metrics import Metric, Statistic, accuracy, is_statistic

Way: TypeAlias = Literal["values", "counted", "mean", "terms", "whole"]
Totals: TypeAlias = NDArray[np.float64]
WHOLE: Totals = np.empty(0)  # stands for the sums of what has none

_LOG = logging.getLogger("potluck")
_NUMBERS: Any = (int, float, np.ndarray, np.generic, Tensor)  # that a metric may give
_SAME = 2e-5  # of numbers that are sums of float32 in another order


class Score(NamedTuple):
    """The loss or a metric, and the way to combine it over batches."""

    name: str
    way: Way
    function: Any
    divisor: Callable[[Tensor], float] | None = None  # of a loss that is counted

    def sums(self, outputs: Any, targets: Tensor) -> Totals:
        """Returns the sums of one batch; they add up over batches."""
        if self.way == "whole":
            return WHOLE
        with in_words(self.what, None, outputs, targets):
            if self.way == "terms":
                return self.function.terms(outputs, targets).double().sum(0).cpu().numpy()
            if self.way == "values":
                values = torch.as_tensor(self.function(outputs, targets)).double()
                counts = ~values.isnan()
                return np.array([float(values.nansum()), float(counts.sum())])
            count = float(len(targets)) if self.divisor is None else self.divisor(targets)
            if count == 0.0:
                return np.zeros(2)
            return np.array([self.number(outputs, targets) * count, count])

    def number(self, outputs: Any, targets: Tensor) -> float:
        """Returns the number for examples that are given all at once."""
        return number_in(self.function(outputs, targets))

    @property
    def what(self) -> str:
        """Its name in a message."""
        return "the loss" if self.name == "loss" else f"metric {self.name!r}"


def number_in(found: Any) -> float:
    """One number, also of a tensor that has a gradient."""
    return float(found.item() if isinstance(found, Tensor) else found)


def value_of(metric: Metric | None, totals: Totals) -> float:
    """The loss (None) or a metric from its sums over all examples; NaN if nothing counts."""
    if metric is not None and is_statistic(metric):
        return float(cast("Statistic", metric).value(totals))
    return float(totals[0] / totals[1]) if totals[1] > 0 else float("nan")


def scores_of(
    loss: Loss, metrics: Mapping[str, Metric], outputs: Any, targets: Tensor, *, by_default: bool
) -> list[Score]:
    """The loss and the metrics that fit these outputs of examples from all over the test set.

    Metrics that a task has by default and that do not fit are left out, and the log says so.

    Raises:
        TaskError: the loss, or a given metric, does not keep its contract.
    """
    with in_words("the loss", None, outputs, targets):
        checked_loss(loss, outputs, targets, trains=False)
    count = count_of(loss)
    way = "counted" if count is not None else _way_of_number(loss, outputs, targets)
    scores = [Score("loss", way, loss, count)]
    for name, metric in metrics.items():
        try:
            scores.append(_score(name, metric, loss, outputs, targets))
        except TaskError as error:
            if not by_default:
                raise
            _LOG.warning("%s is not reported for this model and loss: %s", name, error)
    return scores


def _score(name: str, metric: Metric, loss: Loss, outputs: Any, targets: Tensor) -> Score:
    function: Any = metric
    if metric is accuracy and isinstance(outputs, Tensor):
        function = _fitted_accuracy(loss, outputs, targets)
    score = Score(name, "terms" if is_statistic(metric) else "values", function)
    with in_words(score.what, None, outputs, targets):
        if score.way == "terms":
            _check_terms(score, function.terms(outputs, targets), targets)
            return score
        with _Largest(score.what):
            found: Any = function(outputs, targets)
        if not isinstance(found, _NUMBERS):
            raise TaskError(
                f"{score.what} must give one value per example, or one number for all, got "
                f"{shown(found)}. Return a tensor [examples]."
            )
        if _is_number(found, targets):
            return score._replace(way=_way_of_number(function, outputs, targets))
        _check_values(score, torch.as_tensor(found), outputs, targets)
        return score


class _Largest(TorchFunctionMode):
    """Refuses in this block the place of the largest of one output, which is always the first."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = kwargs or {}
        if func in (torch.argmax, Tensor.argmax):
            place = options.get("dim", args[1] if len(args) > 1 else None)
            if place is not None and args[0].ndim > 1 and args[0].shape[place] == 1:
                raise TaskError(
                    f"{self._what} takes the largest of one output per example, which is always "
                    f"the first, got {shown(args[0])}. Compare the output with a threshold, or for "
                    "a regression leave metrics out."
                )
        return func(*args, **options)


def _is_number(found: Any, targets: Tensor) -> bool:
    """True if it is one number and not a value for each example."""
    values = torch.as_tensor(found)
    return values.ndim == 0 or (values.numel() == 1 and len(targets) > 1)


def _check_terms(score: Score, terms: Any, targets: Tensor) -> None:
    if not isinstance(terms, Tensor) or terms.ndim != 2 or len(terms) != len(targets):
        raise TaskError(
            f"{score.what} must give terms [examples, terms], got {shown(terms)} for "
            f"{len(targets)} examples. Return a tensor with a row for each example."
        )


def _check_values(score: Score, found: Tensor, outputs: Any, targets: Tensor) -> None:
    """Checks that an example's value does not depend on other examples in the batch."""
    if len(found) != len(targets):
        raise TaskError(
            f"{score.what} must give one value per example, or one number for all, got "
            f"{shown(found)} for {len(targets)} examples. Give values [examples]."
        )
    few = slice(0, max(len(targets) // 3, 1))
    if len(targets) < 2 or not _can_cut(outputs, targets):
        return
    again = torch.as_tensor(score.function(*_cut(outputs, targets, few)))
    same = again.shape == found[few].shape and torch.allclose(
        again.double(), found[few].double(), rtol=1e-3, atol=1e-5, equal_nan=True
    )
    if not same:
        raise TaskError(
            f"{score.what} must give each example a value that does not depend on the others of "
            f"its batch, got {shown(found)} for outputs={shown(outputs)}, "
            f"targets={shown(targets)}, and other values for a part of them. Make the shapes of "
            "outputs and targets alike in it, or let it return one number for all."
        )


def _way_of_number(function: Any, outputs: Any, targets: Tensor) -> Way:
    """Returns the way of a number: a mean over examples or not, as found on two unequal parts of
    examples that differ as much as can be."""
    size = len(targets)
    if size < 2 or not _can_cut(outputs, targets):
        return "mean"
    cut = max(size // 3, 1)
    said: list[bool] = []
    for varied in variants(outputs):
        try:
            all_of_them = number_in(function(varied, targets))
            parts = [
                number_in(function(*_cut(varied, targets, rows)))
                for rows in (slice(0, cut), slice(cut, size))
            ]
        except Exception:  # these outputs are none that the model may give
            continue
        together = (cut * parts[0] + (size - cut) * parts[1]) / size
        scale = abs(all_of_them) + abs(parts[0]) + abs(parts[1])
        if math.isfinite(scale):
            said.append(abs(together - all_of_them) <= _SAME * max(scale, 1e-9))
    return "mean" if said and all(said) else "whole"


def _can_cut(outputs: Any, targets: Tensor) -> bool:
    """True if there are tensors, each of which has one row per example."""
    parts = leaves(outputs)
    found = tensors(outputs)
    return (
        len(found) > 0
        and len(found) + parts.count(None) == len(parts)
        and all(part.ndim > 0 and len(part) == len(targets) for part in found)
    )


def _cut(outputs: Any, targets: Tensor, rows: slice) -> tuple[Any, Tensor]:
    return mapped(lambda part: None if part is None else part[rows], outputs), targets[rows]


def _fitted_accuracy(loss: Loss, outputs: Tensor, targets: Tensor) -> Any:
    """Accuracy that reads outputs as the loss does, and leaves out what it leaves out."""
    count = count_of(loss)
    options: dict[str, Any] = {}
    if isinstance(count, Weighted) and count.ignored >= 0:
        options["ignored"] = count.ignored
    if outputs.numel() == targets.numel() and is_one(outputs):
        options["threshold"] = _threshold(loss, outputs, targets)
    return partial(accuracy, **options) if options else accuracy


def _threshold(loss: Loss, outputs: Tensor, targets: Tensor) -> float | None:
    """Returns the output above which the loss predicts label 1: 0 for logits, 0.5 for
    probabilities; None if it takes the largest of several outputs."""
    labels = targets if targets.is_floating_point() else targets.float()

    def at(output: float, label: float) -> float:
        try:
            wanted = torch.full_like(labels, label).to(targets.dtype)
            return number_in(loss(torch.full_like(outputs, output), wanted))
        except Exception:  # an output that is no probability
            return math.nan

    ones = [at(output, 1.0) for output in (-1.0, 0.5, 1.0, 2.0)]
    zeros = [at(output, 0.0) for output in (-1.0, 0.0, 0.5)]
    if outputs.ndim > 1 and outputs.shape[1] > 1 and np.ptp(ones) <= _SAME * abs(ones[0]):
        return None  # a softmax: adding the same to all outputs changes nothing
    if ones[3] < ones[2] and zeros[0] < zeros[1]:  # it goes on beyond 0 and 1
        return 0.0
    return 0.5
