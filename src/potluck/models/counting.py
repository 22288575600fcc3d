"""By what a loss divides: so that a mean over many batches is the mean over all examples.

Cross-entropy with class weights or an ignored class is a mean over Σ weight of the targets that
count, not over examples. Two batches with means ℓ_a, ℓ_b and counts n_a, n_b have together

    (n_a ℓ_a + n_b ℓ_b) / (n_a + n_b)

which is the loss of both as one batch, however they were cut. A batch in which nothing counts has
the loss 0/0; it takes no part in a mean, and there is no step for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from potluck.data.tables.targets import IGNORED
from potluck.models.losses import Loss, cross_entropy

Count: TypeAlias = Callable[[Tensor], float]

_FUNCTIONS: tuple[Any, ...] = (cross_entropy, functional.cross_entropy, functional.nll_loss)
_MODULES: tuple[Any, ...] = (nn.CrossEntropyLoss, nn.NLLLoss)


class Weighted(NamedTuple):
    """The weight of all targets that count."""

    weight: Tensor | None  # [classes]
    ignored: int

    def __call__(self, targets: Tensor) -> float:
        if targets.is_floating_point():  # the probabilities of classes, [batch, classes, …]
            return targets.numel() / (targets.shape[1] if targets.ndim > 1 else targets.shape[0])
        counts = targets != self.ignored
        if self.weight is None:
            return float(counts.sum())
        weights = self.weight.detach().to(targets.device)[(targets * counts).long()]
        return float((weights.double() * counts).sum())


def count_of(loss: Any) -> Count | None:
    """What a loss divides by, as a function of the targets of a batch; None if it is not known."""
    own: Any = getattr(loss, "count", None)
    if inspect.ismethod(own) or inspect.isfunction(own):  # tuples have another
        return lambda targets: float(own(targets))
    options: dict[str, Any] = {}
    kind = cast("type[Any]", type(loss))
    if kind is partial and not loss.args and loss.func in _FUNCTIONS[1:]:
        options = dict(loss.keywords)
    elif kind in _MODULES:
        options = {name: getattr(loss, name) for name in ("weight", "ignore_index", "reduction")}
    elif loss not in _FUNCTIONS:
        return None
    if options.get("reduction", "mean") != "mean" or {"size_average", "reduce"} & options.keys():
        return None
    return Weighted(options.get("weight"), int(options.get("ignore_index", IGNORED)))


def may_count_nothing(loss: Loss, targets: NDArray[Any]) -> bool:
    """Whether there may be batches of these targets in which nothing counts."""
    if targets.dtype.kind not in "iu":
        return False
    count = count_of(loss)
    if not isinstance(count, Weighted):
        return bool((targets < 0).any())
    if count.weight is not None and bool((count.weight == 0).any()):
        return True
    return bool((targets == count.ignored).any())


def counts_nothing(loss: Loss, targets: Tensor) -> bool:
    """Whether a loss of these targets is 0/0. Of a loss that is not known here, this is so where
    every target is a class below 0."""
    count = count_of(loss)
    if count is not None:
        return count(targets) == 0.0
    return not targets.is_floating_point() and bool((targets < 0).all())
