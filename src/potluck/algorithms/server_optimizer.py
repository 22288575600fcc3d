"""Server optimizers: how the aggregate of a round moves the model.

The aggregate is the weighted mean Δ of the cohort's updates; −Δ plays the part of a gradient
(Reddi et al. 2021). A server optimizer is two pure functions over vectors, and its state is a
dictionary of named vectors, so that a checkpoint can hold any of them.

`Average` is here; the others have a file for each paper: `fedavgm` and `fedopt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol, TypeAlias

import numpy as np
from annotated_types import Interval

from potluck.core import Vector
from potluck.core.validate import check_ranges

OptimizerState: TypeAlias = Mapping[str, Vector]  # by name, each [dim]


class ServerState(NamedTuple):
    """All that a server carries from one round to the next."""

    weights: Vector  # [dim]
    optimizer: OptimizerState
    algorithm: Mapping[str, Vector] = {}  # the algorithm's own vectors, each [dim]


class ServerOptimizer(Protocol):
    """The methods that an algorithm calls on a server optimizer."""

    def init(self, weights: Vector) -> OptimizerState:
        """The state before round 1."""
        ...

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """The next state and the next weights; the arguments are left as they are.

        `scale` multiplies the server's rate in this round.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """w ← w + server_lr · Δ; with the default 1.0 the plain average of the cohort's models."""

    server_lr: Annotated[float, Interval(gt=0), "Use 1.0 for plain averaging."] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Vector) -> OptimizerState:
        """No state."""
        return {}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Moves all the way to the mean, or `server_lr` of the way."""
        rate = float(self.server_lr * scale)
        if rate == 1.0:
            return state, weights + aggregate
        return state, weights + scaled(rate, aggregate)


def scaled(factor: float, vector: Vector) -> Vector:
    """factor · vector, in float32 whatever kind of number the factor is."""
    return np.multiply(vector, factor, dtype=np.float32)
