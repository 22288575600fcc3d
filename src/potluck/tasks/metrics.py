"""Losses and metrics.

A loss takes (outputs, targets) of a batch to one scalar tensor, the mean over the batch. A metric
takes the same to one value per example, [batch], or per position of an example, [batch, …]; NaN
marks what does not count (padding). Values are averaged over all that count.

For sequences, targets are [batch, steps], padded at their end, and outputs are the logits
[batch, steps, symbols]; a runtime leaves out of both the steps that are padding in the whole batch.
Two losses differ by what they divide by: `PerCharacter` by the real characters of the batch,
`PerStep` by a fixed number of steps a line, as the paper's figures seem to. With lines of 42
characters and 80 steps the second is about half the first, and wants twice the rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]

AFTER_FIRST = "accuracy_after_first"  # the name of the metric of text without first characters


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, classes] against classes [batch]."""
    return functional.cross_entropy(outputs, targets)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of [batch] or [batch, 1] outputs against targets [batch]."""
    return functional.mse_loss(outputs.reshape(targets.shape), targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, else 0: [batch]."""
    return (outputs.argmax(dim=1) == targets).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PerCharacter:
    """Cross-entropy summed over the real characters, divided by their number."""

    padding: int  # the target that does not count

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of logits [batch, width, symbols] and targets [batch, width]."""
        return _summed(outputs, targets, self.padding) / self.count(targets)

    def count(self, targets: Tensor) -> int:
        """How many characters the loss is the mean over."""
        return max(int((targets != self.padding).sum()), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerStep:
    """Cross-entropy summed over the real characters, divided by batch · `steps`."""

    padding: int  # the target that does not count
    steps: int  # of a padded line, before any were left out

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of logits [batch, width, symbols] and targets [batch, width], width ≤ steps."""
        return _summed(outputs, targets, self.padding) / (len(targets) * self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterAccuracy:
    """1 where the largest logit is the target's, 0 where not, NaN at padding: [batch, width]."""

    padding: int  # the target that does not count
    skipped: int = 0  # positions at the beginning of every row that do not count either

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of logits [batch, width, symbols] and targets [batch, width]."""
        right = (outputs.argmax(dim=2) == targets).float()
        right = right.masked_fill(targets == self.padding, float("nan"))
        right[:, : self.skipped] = float("nan")
        return right


def _summed(outputs: Tensor, targets: Tensor, padding: int) -> Tensor:
    return functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten().long(), ignore_index=padding, reduction="sum"
    )
