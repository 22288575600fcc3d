"""FedAdagrad: a server rate for each weight, smaller the more the weight has moved.

    FedAdagrad.  server rate η_s, adaptivity τ; v_0 = τ²
    server, in each round t = 1, 2, …, with Δ_t the weighted mean of the cohort's updates:
        v_t = v_{t-1} + Δ_t²
        w_t = w_{t-1} + η_s Δ_t / (√v_t + τ)

S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan:
Adaptive Federated Optimization. ICLR 2021, Algorithm 2 (arXiv:2003.00295), its line for FedAdagrad.

Squares, roots and quotients are by entry. η_s is `server_lr` (η in the paper), τ `tau`.

Differences from the paper: the paper asks for v_{−1} ≥ τ², and v starts at τ² here; its line
for Δ_t has a momentum β₁ for all three optimizers, and it sets β₁ = 0 for FedAdagrad, which has
none here; updates are weighted by examples, not equally; η_s may follow a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potluck.algorithms.ranges import check_above
from potluck.algorithms.server import OptimizerState, scaled
from potluck.core import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad:
    """FedAdagrad: w ← w + server_lr · Δ / (√v + tau) with v ← v + Δ².

    Args:
        server_lr: η_s > 0, about how far a weight moves in a round at first.
        tau: τ > 0, the adaptivity: entries of Δ far below it move in proportion to Δ.
    """

    server_lr: float
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_above("server_lr", self.server_lr, 0.0, "Start with 0.01 and tune it.")
        check_above("tau", self.tau, 0.0, "Start with 0.001.")

    def init(self, weights: Vector) -> OptimizerState:
        """v = τ²."""
        return {"v": np.full_like(weights, self.tau**2)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Each weight by its own rate, which only falls."""
        v = state["v"] + np.square(aggregate)
        step = scaled(self.server_lr * scale, aggregate)
        return {"v": v}, weights + np.divide(step, np.sqrt(v) + self.tau, dtype=np.float32)
