"""Losses, and what is known of them: by what they divide, and what each example adds.

A loss takes (outputs, targets) of a batch to one scalar tensor, the mean over the batch. It may
have a method `count(targets)`: the number, or the weight, of the predictions that the mean is over.
Cross-entropy with class weights or an ignored class is a mean over Σ weight of the targets that
count, not over examples. Two batches with means ℓ_a, ℓ_b and counts n_a, n_b have together

    (n_a ℓ_a + n_b ℓ_b) / (n_a + n_b)

which is the loss of both as one batch, however they were cut. A batch in which nothing counts has
the loss 0/0; it takes no part in a mean, and there is no step for it.

For sequences, targets are [batch, steps], padded at their end, and outputs are the logits
[batch, steps, symbols]; a runtime leaves out of both the steps that are padding in the whole batch.
Two losses differ by what they divide by: `PerCharacter` by the real characters of the batch,
`PerStep` by a fixed number of steps a line, as the paper's figures seem to. With lines of 42
characters and 80 steps the second is about half the first, and needs twice the rate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from potluck.core import TaskError
from potluck.data.tables.targets import IGNORED
from potluck.data.trees import shown

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
Count: TypeAlias = Callable[[Tensor], float]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, classes] against classes [batch]."""
    return functional.cross_entropy(outputs, targets)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of [batch] or [batch, 1] outputs against targets [batch], or of outputs
    against targets of their own shape."""
    return functional.mse_loss(paired(outputs, targets), targets)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, labels] against as many labels, 0 or 1 each."""
    logits = paired(outputs, targets)
    return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerCharacter:
    """Cross-entropy summed over the real characters, divided by their number."""

    padding: int  # the target that does not count

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of logits [batch, width, symbols] and targets [batch, width]."""
        return _summed(outputs, targets, self.padding) / self.count(targets)

    def count(self, targets: Tensor) -> int:
        """Returns the number of characters that the loss is the mean over."""
        return max(int((targets != self.padding).sum()), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerStep:
    """Cross-entropy summed over the real characters, divided by batch · `steps`."""

    padding: int  # the target that does not count
    steps: int  # of a padded line, before any were left out

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of logits [batch, width, symbols] and targets [batch, width ≤ steps]."""
        return _summed(outputs, targets, self.padding) / (len(targets) * self.steps)


class ByExample(NamedTuple):
    """A loss as sums over examples, so that an example can count for nothing, or more.

        ℓ(batch) = Σ_i sum_i / max(Σ_i count_i, 1)

    A batch that is filled up to a shape then weighs its real examples alone, and the examples of
    many clients can share a batch, each with its client's weight.
    """

    sums: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) to what each adds [examples]
    counts: Callable[[Tensor], Tensor]  # targets to how many predictions of each count [examples]

    def mean(self, outputs: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        """The loss of those examples for which `present` [examples] is 1 and not 0."""
        total = (self.sums(outputs, targets) * present).sum()
        return total / (self.counts(targets) * present).sum().clamp(min=1.0)


def by_example(loss: Loss, targets_ndim: int, targets_dtype: torch.dtype) -> ByExample | None:
    """A loss taken apart; None if it is not known, or its targets are not of the usual kind."""
    whole = not targets_dtype.is_floating_point
    ones = partial(torch.ones_like, dtype=torch.float32)
    if loss in (cross_entropy, functional.cross_entropy) and whole and targets_ndim == 1:
        return ByExample(_likelihoods, ones)
    if loss is mean_squared_error and not whole and targets_ndim == 1:
        return ByExample(_squares, ones)
    if not isinstance(loss, (PerCharacter, PerStep)) or not whole or targets_ndim != 2:
        return None

    def characters(outputs: Tensor, targets: Tensor) -> Tensor:
        return (_likelihoods(outputs, targets) * (targets != loss.padding)).sum(-1)

    def counts(targets: Tensor) -> Tensor:
        if isinstance(loss, PerCharacter):
            return (targets != loss.padding).float().sum(-1)
        return torch.full_like(targets[..., 0], float(loss.steps), dtype=torch.float32)

    return ByExample(characters, counts)


_MEANS: tuple[Any, ...] = (cross_entropy, functional.cross_entropy, functional.nll_loss)


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
    """Returns the divisor of a loss as a function of the targets of a batch, or None if unknown."""
    own: Any = getattr(loss, "count", None)
    if inspect.ismethod(own) or inspect.isfunction(own):  # tuples have another
        return lambda targets: float(own(targets))
    options: dict[str, Any] = {}
    kind = cast("type[Any]", type(loss))
    if kind is partial and not loss.args and loss.func in _MEANS[1:]:
        options = dict(loss.keywords)
    elif kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        options = {name: getattr(loss, name) for name in ("weight", "ignore_index", "reduction")}
    elif loss not in _MEANS:
        return None
    if options.get("reduction", "mean") != "mean" or {"size_average", "reduce"} & options.keys():
        return None
    return Weighted(options.get("weight"), int(options.get("ignore_index", IGNORED)))


def may_count_nothing(loss: Loss, targets: NDArray[Any]) -> bool:
    """True if batches of these targets may have no target that counts."""
    if targets.dtype.kind not in "iu":
        return False
    count = count_of(loss)
    if not isinstance(count, Weighted):
        return bool((targets < 0).any())
    if count.weight is not None and bool((count.weight == 0).any()):
        return True
    return bool((targets == count.ignored).any())


def counts_nothing(loss: Loss, targets: Tensor) -> bool:
    """True if a loss of these targets is 0/0. Of a loss that is not known here, this is so where
    every target is a class below 0."""
    count = count_of(loss)
    if count is not None:
        return count(targets) == 0.0
    return not targets.is_floating_point() and bool((targets < 0).all())


def paired(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape of the targets, where these differ by axes of length 1 only.

    Raises:
        TaskError: they differ otherwise.
    """
    if outputs.shape != targets.shape and squeezed(outputs.shape) != squeezed(targets.shape):
        raise TaskError(
            "there must be one output for each target, got "
            f"outputs={shown(outputs)}, targets={shown(targets)}. Give the model's last layer as "
            "many outputs as an example has targets."
        )
    return outputs.reshape(targets.shape)


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its axes of length 1, apart from that of the batch."""
    return (shape[0], *(size for size in shape[1:] if size != 1)) if shape else ()


def _summed(outputs: Tensor, targets: Tensor, padding: int) -> Tensor:
    return functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten().long(), ignore_index=padding, reduction="sum"
    )


def _likelihoods(outputs: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target: logits [examples, classes] and targets [examples]."""
    chosen = outputs.float().log_softmax(-1).gather(-1, targets.long().unsqueeze(-1))
    return -chosen.squeeze(-1)


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().reshape(targets.shape) - targets).square()
