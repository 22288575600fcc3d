"""A local step, from the gradient of the loss to other weights: clip, correct, step the optimizer.

    g = min(1, gradient_clip / ‖∇ℓ‖) ∇ℓ  +  proximal (w − received)  +  drift
    w, state ← optimizer.step(w, g, state, lr, t)

It is the same for one client and for many, whose tensors are [clients, …] and whose rates are one
number or [clients]. Averaged buffers and frozen parameters have no gradient and are not touched. A
parameter that the loss does not depend on is stepped where a correction gives it a gradient.

Plain SGD adds these terms to w one after another, the one that reads w first, so that g is never
written. Layers may go further and write no gradient at all (`is_bare`, `is_plain`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from potluck.core import PLAIN_SGD, ClientOptimizer

Named: TypeAlias = Mapping[str, Tensor]
Rate: TypeAlias = float | Tensor  # of all clients, or [clients]


class Descent(NamedTuple):
    """The optimizer, rate, correction and state of a step, of one client or of several."""

    optimizer: ClientOptimizer
    gradient_clip: float | None
    proximal: float
    received: Named  # by name, as the weights; empty without a proximal term
    drift: Named  # the same; empty without a drift
    state: Sequence[Named]  # of `fresh_state`: stepped in place
    many: bool = True

    @property
    def is_plain(self) -> bool:
        """True if gradients need not be written: this is plain SGD."""
        return self.optimizer == PLAIN_SGD

    @property
    def is_bare(self) -> bool:
        """True if a step is w ← w − lr · ∇ℓ, which layers may take by themselves."""
        return (
            self.gradient_clip is None
            and not self.received
            and not self.drift
            and self.optimizer == PLAIN_SGD
        )

    @torch.no_grad()
    def take(self, weights: Named, gradients: Named, lr: Rate) -> None:
        """Makes one step, in place.

        Args:
            weights: the trained parameters by name.
            gradients: of the loss, for those that it depends on.
        """
        factor = self.clip_factor(self._squares(gradients)) if gradients else 1.0
        if self.is_plain:
            self.pull(weights, lr)
            for name, gradient in gradients.items():
                _add(weights[name], gradient, -(lr * factor))
            return
        for name, weight in weights.items():
            gradient = self._corrected(name, weight, gradients.get(name), factor)
            if gradient is not None:
                count, *moments = (part[name] for part in self.state)
                count += 1
                numbers = _wide(lr, weight), _wide(count, weight)
                new, news = self.optimizer.step(weight, gradient, tuple(moments), *numbers)
                for old, tensor in zip((weight, *moments), (new, *news), strict=True):
                    old.copy_(tensor)

    def pull(self, weights: Named, lr: Rate) -> None:
        """Adds a correction's part of a plain step to the weights, in place."""
        for name, start in self.received.items():
            if isinstance(lr, Tensor):
                _add(weights[name], start - weights[name], lr * self.proximal)
            else:
                weights[name].lerp_(start, lr * self.proximal)
        for name, drift in self.drift.items():
            _add(weights[name], drift, -lr)

    def clip_factor(self, squares: Rate) -> Rate:
        """Returns the factor that clips a gradient of this squared norm."""
        bound = self.gradient_clip
        if bound is None:
            return 1.0
        if isinstance(squares, Tensor):
            return bound / squares.clamp(min=0.0).sqrt().clamp(min=bound)
        return bound / max(math.sqrt(squares), bound)

    def _squares(self, gradients: Named) -> Rate:
        if self.gradient_clip is None:
            return 0.0
        if self.many:
            return sum(g.flatten(1).square().sum(1) for g in gradients.values())
        return sum(float(g.square().sum()) for g in gradients.values())

    def _corrected(
        self, name: str, weight: Tensor, gradient: Tensor | None, factor: Rate
    ) -> Tensor | None:
        if gradient is not None and self.gradient_clip is not None:
            gradient = gradient * _wide(factor, gradient)
        if self.received:
            pull = self.proximal * (weight - self.received[name])
            gradient = pull if gradient is None else gradient + pull
        if self.drift:
            gradient = self.drift[name] if gradient is None else gradient + self.drift[name]
        return gradient


def fresh_state(
    optimizer: ClientOptimizer, weights: Named, clients: Sequence[int] = ()
) -> list[dict[str, Tensor]]:
    """The state before the first step: by name how often each parameter was stepped, and then the
    optimizer's own tensors. None of it for plain SGD.

    Args:
        clients: the shape of a number for each client.
    """
    if optimizer == PLAIN_SGD:
        return []
    counts = {
        n: torch.zeros(clients, dtype=torch.float64, device=w.device) for n, w in weights.items()
    }
    kinds = zip(*map(optimizer.init, weights.values()), strict=True)
    return [counts, *(dict(zip(weights, kind, strict=True)) for kind in kinds)]


def _add(weight: Tensor, direction: Tensor, factor: Rate) -> None:
    """weight ← weight + factor · direction, in place."""
    wide = _wide(factor, weight)
    if isinstance(wide, Tensor):
        weight.addcmul_(direction, wide)
    else:
        weight.add_(direction, alpha=wide)


def _wide(number: Rate, like: Tensor) -> Rate:
    """A number for each client, against tensors [clients, …]."""
    if not isinstance(number, Tensor) or number.ndim == 0:
        return number
    return number.view(-1, *[1] * (like.ndim - 1))
