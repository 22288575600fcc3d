"""Server momentum: the mean update of a round is averaged with those of the rounds before.

    FedAvgM.  server rate η_s, momentum β; v_0 = 0
    server, in each round t = 1, 2, …, with Δ_t the weighted mean of the cohort's updates:
        v_t = β v_{t-1} + Δ_t
        Momentum:  w_t = w_{t-1} + η_s v_t
        Nesterov:  w_t = w_{t-1} + η_s (Δ_t + β v_t)

T.-M. H. Hsu, H. Qi, M. Brown: Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification. arXiv:1909.06335 (2019), the update of FedAvgM in its section on
server momentum. The look-ahead form of Nesterov's momentum is that of I. Sutskever, J. Martens,
G. Dahl, G. Hinton: On the importance of initialization and momentum in deep learning. ICML 2013,
section 2, written for the weights at which clients train.

η_s is `server_lr`, β `momentum`.

Differences from the paper: the paper subtracts weights in the other order, so that its Δ is −Δ
here. It has no server rate, which is η_s = 1. Here η_s may follow a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Interval

from potluck.algorithms.server_optimizer import OptimizerState, scaled
from potluck.core import Vector
from potluck.core.validate import check_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum:
    """FedAvgM: w ← w + server_lr · v with v ← momentum · v + Δ.

    Args:
        server_lr: η_s > 0. Where updates agree, v grows to Δ / (1 − momentum).
        momentum: β in [0, 1); 0 is plain averaging.
    """

    server_lr: Annotated[float, Interval(gt=0), "Start with 1.0."] = 1.0
    momentum: Annotated[float, Interval(ge=0, lt=1), "Start with 0.9."] = 0.9

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Vector) -> OptimizerState:
        """v = 0."""
        return {"momentum": np.zeros_like(weights)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Moves the model along the running sum of the updates."""
        velocity = scaled(self.momentum, state["momentum"]) + aggregate
        return {"momentum": velocity}, weights + scaled(self.server_lr * scale, velocity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesterov:
    """FedAvgM looking ahead: w ← w + server_lr · (Δ + momentum · v) with v ← momentum · v + Δ.

    Args:
        server_lr: η_s > 0.
        momentum: β in [0, 1); 0 is plain averaging.
    """

    server_lr: Annotated[float, Interval(gt=0), "Start with 1.0."] = 1.0
    momentum: Annotated[float, Interval(ge=0, lt=1), "Start with 0.9."] = 0.9

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Vector) -> OptimizerState:
        """v = 0."""
        return {"momentum": np.zeros_like(weights)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Moves the model along the running sum as if the next update were like this one."""
        velocity = scaled(self.momentum, state["momentum"]) + aggregate
        ahead = aggregate + scaled(self.momentum, velocity)
        return {"momentum": velocity}, weights + scaled(self.server_lr * scale, ahead)
