"""FedAdam: a server rate for each weight, by the recent size of its updates.

    FedAdam.  server rate η_s, decays β₁, β₂, adaptivity τ; m_0 = 0, v_0 = τ²
    server, in each round t = 1, 2, …, with Δ_t the weighted mean of the cohort's updates:
        m_t = β₁ m_{t-1} + (1 − β₁) Δ_t
        v_t = β₂ v_{t-1} + (1 − β₂) Δ_t²
        w_t = w_{t-1} + η_s m_t / (√v_t + τ)

S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan:
Adaptive Federated Optimization. ICLR 2021, Algorithm 2 (arXiv:2003.00295), its line for FedAdam.

Squares, roots and quotients are by entry. η_s is `server_lr` (η in the paper), β₁ `beta1`, β₂
`beta2`, τ `tau`.

Differences from the paper: the paper asks for v_{−1} ≥ τ², and v starts at τ² here; updates are
weighted by examples, not equally; η_s may follow a schedule. As in the paper there is no bias
correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potluck.algorithms.ranges import check_above, check_decay, check_within
from potluck.algorithms.server import OptimizerState, scaled
from potluck.core import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """FedAdam: w ← w + server_lr · m / (√v + tau), with running means m of Δ and v of Δ².

    Args:
        server_lr: η_s > 0, about how far a weight moves in a round.
        beta1: β₁ in [0, 1), how much of m is kept.
        beta2: β₂ in [0, 1], how much of v is kept.
        tau: τ > 0, the adaptivity: entries of Δ far below it move in proportion to Δ.
    """

    server_lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_above("server_lr", self.server_lr, 0.0, "Start with 0.01 and tune it.")
        check_decay("beta1", self.beta1, "Start with 0.9.")
        check_within("beta2", self.beta2, 0.0, 1.0, "Start with 0.99.")
        check_above("tau", self.tau, 0.0, "Start with 0.001.")

    def init(self, weights: Vector) -> OptimizerState:
        """m = 0, v = τ²."""
        return {"m": np.zeros_like(weights), "v": np.full_like(weights, self.tau**2)}

    def step(
        self, state: OptimizerState, weights: Vector, aggregate: Vector, scale: float = 1.0
    ) -> tuple[OptimizerState, Vector]:
        """Each weight by its own rate."""
        m = scaled(self.beta1, state["m"]) + scaled(1.0 - self.beta1, aggregate)
        v = scaled(self.beta2, state["v"]) + scaled(1.0 - self.beta2, np.square(aggregate))
        step = scaled(self.server_lr * scale, m)
        return {"m": m, "v": v}, weights + np.divide(step, np.sqrt(v) + self.tau, dtype=np.float32)
