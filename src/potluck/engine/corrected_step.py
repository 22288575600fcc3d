"""The plain local step with a correction of the gradient: clipped, proximal, drifting.

    w ← w + lr · proximal (received − w) − lr · drift − lr · min(1, gradient_clip / ‖∇ℓ‖) ∇ℓ

The terms are applied one after another in place, the one that reads w first, so that the sum is
never written. Averaged buffers and frozen parameters have no gradient and are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from potluck.core import Correction
from potluck.engine.gradients import gradients_of
from potluck.engine.task import spec_of


class CorrectedStep:
    """Corrected steps on the parameters of one module, which are views of `vector`."""

    def __init__(self, module: nn.Module, vector: Tensor) -> None:
        self._spec = spec_of(module)
        self._named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._vector = vector
        self._gradient_clip: float | None = None
        self._proximal = 0.0
        self._received: list[Tensor] = []  # as the parameters; empty without a proximal term
        self._drift: list[Tensor] = []

    def begin(self, correction: Correction) -> bool:
        """Take the correction of the next steps, from the present weights on; whether there is
        any to take."""
        self._gradient_clip, self._proximal, drift = correction
        self._received = [] if self._proximal == 0.0 else self._views(self._vector.clone())
        self._drift = [] if drift is None else self._views(torch.tensor(drift))
        return bool(self._gradient_clip is not None or self._received or self._drift)

    def descend(self, loss: Tensor, lr: float) -> None:
        """One step down the corrected gradient of `loss`."""
        parameters = list(self._named.values())
        gradients = gradients_of(loss, parameters)
        with torch.no_grad():
            # Both lists may be empty.
            for parameter, start in zip(parameters, self._received, strict=False):
                parameter.lerp_(start, lr * self._proximal)
            for parameter, drift in zip(parameters, self._drift, strict=False):
                parameter.add_(drift, alpha=-lr)
            rate = lr * self._clip_factor([g for g in gradients if g is not None])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.add_(gradient, alpha=-rate)

    def _clip_factor(self, gradients: list[Tensor]) -> float:
        if self._gradient_clip is None or not gradients:
            return 1.0
        squares = [float(gradient.square().sum()) for gradient in gradients]
        norm = math.sqrt(sum(squares))
        return self._gradient_clip / max(norm, self._gradient_clip)

    def _views(self, vector: Tensor) -> list[Tensor]:
        views = self._spec.unflatten(vector)
        return [views[name] for name in self._named]


class Pull(NamedTuple):
    """The correction of one step of many clients, in those that make it."""

    gradient_clip: float | None
    proximal: float
    received: Mapping[str, Tensor]  # by name, each [clients, …]; empty without a proximal term
    drift: Mapping[str, Tensor]  # the same; empty without a drift

    def apply(self, parameters: Mapping[str, Tensor], lr: float) -> None:
        """All of it but the clipping, in place: before the gradient, whatever its size."""
        if self.received:
            for name, parameter in parameters.items():
                parameter.lerp_(self.received[name], lr * self.proximal)
        if self.drift:
            for name, parameter in parameters.items():
                parameter.add_(self.drift[name], alpha=-lr)

    def clip_factors(self, squares: Tensor) -> Tensor:
        """From the squared norms of the gradients [clients] to what they are multiplied by."""
        assert self.gradient_clip is not None
        norms = squares.clamp(min=0.0).sqrt()
        return self.gradient_clip / norms.clamp(min=self.gradient_clip)
