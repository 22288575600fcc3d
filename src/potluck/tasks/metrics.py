"""Losses and metrics.

A loss takes (outputs, targets) of a batch to one scalar tensor, the mean over the batch. A metric
takes the same to one value per example, [batch], or per position of an example, [batch, …]; NaN
marks what does not count (padding). Values are averaged over all that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, classes] against classes [batch]."""
    return functional.cross_entropy(outputs, targets)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of [batch] or [batch, 1] outputs against targets [batch]."""
    return functional.mse_loss(outputs.reshape(targets.shape), targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, else 0: [batch]."""
    return (outputs.argmax(dim=1) == targets).float()
