"""FedAdagrad, FedAdam and FedYogi: a server rate for each weight, by the size of its updates.

    FedOpt.  server rate η_s, decays β₁, β₂, adaptivity τ; m_0 = 0, v_0 = τ²
    server, in each round t = 1, 2, …, with Δ_t the weighted mean of the cohort's updates:
        FedAdagrad:  m_t = Δ_t
                     v_t = v_{t-1} + Δ_t²
        FedAdam:     m_t = β₁ m_{t-1} + (1 − β₁) Δ_t
                     v_t = β₂ v_{t-1} + (1 − β₂) Δ_t²
        FedYogi:     m_t = β₁ m_{t-1} + (1 − β₁) Δ_t
                     v_t = v_{t-1} − (1 − β₂) Δ_t² sign(v_{t-1} − Δ_t²)
        w_t = w_{t-1} + η_s m_t / (√v_t + τ)

S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan:
Adaptive Federated Optimization. ICLR 2021, Algorithm 2 (arXiv:2003.00295).

Squares, roots and quotients are by entry. η_s is `server_lr` (η in the paper), β₁ `beta1`, β₂
`beta2`, τ `tau`.

Differences from the paper: the paper asks for v_{−1} ≥ τ², and v starts at τ² here. Its line for
m_t holds for all three, and it sets β₁ = 0 for FedAdagrad, which has none here. Updates are
weighted by examples, not equally. η_s may follow a schedule. As in the paper there is no bias
correction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Interval

from potluck.algorithms.server_optimizer import OptimizerState, scaled
from potluck.core import Vector
from potluck.core.validate import check_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad:
    """FedAdagrad: w ← w + server_lr · Δ / (√v + tau) with v ← v + Δ².

    Args:
        server_lr: η_s > 0, about how far a weight moves in a round at first.
        tau: τ > 0, the adaptivity: entries of Δ far below it move in proportion to Δ.
    """

    server_lr: Annotated[float, Interval(gt=0), "Start with 0.01 and tune it."]
    tau: Annotated[float, Interval(gt=0), "Start with 0.001."] = 1e-3

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Vector) -> OptimizerState:
        """v = τ²."""
        return {"v": np.full_like(weights, self.tau**2)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Moves each weight by its own rate, which only falls."""
        v = state["v"] + np.square(aggregate)
        return {"v": v}, _moved(weights, self.server_lr * scale, aggregate, v, self.tau)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithMoments(ABC):
    """The common part of FedAdam and FedYogi: all but the line for v."""

    server_lr: Annotated[float, Interval(gt=0), "Start with 0.01 and tune it."]
    beta1: Annotated[float, Interval(ge=0, lt=1), "Start with 0.9."] = 0.9
    beta2: Annotated[float, Interval(ge=0, le=1), "Start with 0.99."] = 0.99
    tau: Annotated[float, Interval(gt=0), "Start with 0.001."] = 1e-3

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Vector) -> OptimizerState:
        """m = 0, v = τ²."""
        return {"m": np.zeros_like(weights), "v": np.full_like(weights, self.tau**2)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Moves each weight by its own rate."""
        m = scaled(self.beta1, state["m"]) + scaled(1.0 - self.beta1, aggregate)
        v = self._next_v(state["v"], np.square(aggregate))
        return {"m": m, "v": v}, _moved(weights, self.server_lr * scale, m, v, self.tau)

    @abstractmethod
    def _next_v(self, v: Vector, square: Vector) -> Vector:
        """v_t, of v_{t-1} and Δ_t²."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(_WithMoments):
    """FedAdam: w ← w + server_lr · m / (√v + tau), with running means m of Δ and v of Δ².

    Args:
        server_lr: η_s > 0, about how far a weight moves in a round.
        beta1: β₁ in [0, 1), how much of m is kept.
        beta2: β₂ in [0, 1], how much of v is kept.
        tau: τ > 0, the adaptivity: entries of Δ far below it move in proportion to Δ.
    """

    def _next_v(self, v: Vector, square: Vector) -> Vector:
        return scaled(self.beta2, v) + scaled(1.0 - self.beta2, square)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yogi(_WithMoments):
    """FedYogi: FedAdam whose v moves by steps of the size of Δ², and so falls slowly.

    Args:
        server_lr, beta1, beta2, tau: of `Adam`.
    """

    def _next_v(self, v: Vector, square: Vector) -> Vector:
        return v - scaled(1.0 - self.beta2, square * np.sign(v - square))


def _moved(weights: Vector, rate: float, m: Vector, v: Vector, tau: float) -> Vector:
    """w + rate · m / (√v + τ)."""
    return weights + np.divide(scaled(rate, m), np.sqrt(v) + tau, dtype=np.float32)
