"""The losses known here as sums over examples, so that an example can count for nothing, or more.

    ℓ(batch) = Σ_i sum_i / max(Σ_i count_i, 1)

`sum_i` is what example i adds, `count_i` how many predictions of it the mean is over: 1, its real
characters, its steps. A batch that is filled up to a shape then weighs its real examples alone, and
the examples of many clients can share a batch, each with its client's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from potluck.models.losses import Loss, PerCharacter, PerStep, cross_entropy, mean_squared_error


class ByExample(NamedTuple):
    """One loss, taken apart."""

    sums: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) to [examples]
    counts: Callable[[Tensor], Tensor]  # targets to [examples]

    def mean(self, outputs: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        """The loss of those examples for which `present` [examples] is 1 and not 0."""
        total = (self.sums(outputs, targets) * present).sum()
        return total / (self.counts(targets) * present).sum().clamp(min=1.0)


def by_example(loss: Loss, targets_ndim: int, targets_dtype: torch.dtype) -> ByExample | None:
    """A loss taken apart; None if it is not known, or its targets are not of the usual kind."""
    whole = not targets_dtype.is_floating_point
    if loss in (cross_entropy, functional.cross_entropy) and whole and targets_ndim == 1:
        return ByExample(_likelihoods, _ones)
    if loss is mean_squared_error and not whole and targets_ndim == 1:
        return ByExample(_squares, _ones)
    if isinstance(loss, PerCharacter) and whole and targets_ndim == 2:
        return ByExample(partial(_characters, loss.padding), partial(_real, loss.padding))
    if isinstance(loss, PerStep) and whole and targets_ndim == 2:
        return ByExample(partial(_characters, loss.padding), partial(_steps, loss.steps))
    return None


def _likelihoods(outputs: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target: logits [examples, classes] and targets [examples]."""
    chosen = outputs.float().log_softmax(-1).gather(-1, targets.long().unsqueeze(-1))
    return -chosen.squeeze(-1)


def _ones(targets: Tensor) -> Tensor:
    return torch.ones_like(targets, dtype=torch.float32)


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().reshape(targets.shape) - targets).square()


def _characters(padding: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """−log p summed over the real characters: logits [examples, width, symbols]."""
    return (_likelihoods(outputs, targets) * (targets != padding)).sum(-1)


def _real(padding: int, targets: Tensor) -> Tensor:
    return (targets != padding).float().sum(-1)


def _steps(steps: int, targets: Tensor) -> Tensor:
    return torch.full_like(targets[..., 0], float(steps), dtype=torch.float32)
