"""Server optimizers: how the aggregate of a round moves the model.

The aggregate is the weighted mean Δ of the cohort's updates; −Δ plays the part of a gradient
(Reddi et al. 2021). A server optimizer is two pure functions over vectors, and its state is a
dictionary of named vectors, so that a checkpoint can hold any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from potluck.core import Vector

OptimizerState: TypeAlias = Mapping[str, Vector]


class ServerOptimizer(Protocol):
    """What an algorithm needs of a server optimizer."""

    def init(self, weights: Vector) -> OptimizerState:
        """The state before round 1."""
        ...

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector
    ) -> tuple[OptimizerState, Vector]:
        """The next state and the next weights; the arguments are left as they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """w ← w + server_lr · Δ; with the default 1.0 the plain average of the cohort's models."""

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.server_lr > 0.0:
            raise ValueError(
                f"server_lr must be above 0, got server_lr={self.server_lr!r}. "
                "Use 1.0 for plain averaging."
            )

    def init(self, weights: Vector) -> OptimizerState:
        """No state."""
        return {}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector
    ) -> tuple[OptimizerState, Vector]:
        """Move all the way to the mean, or `server_lr` of the way."""
        if self.server_lr == 1.0:
            return state, weights + aggregate
        return state, weights + np.multiply(aggregate, self.server_lr, dtype=np.float32)
