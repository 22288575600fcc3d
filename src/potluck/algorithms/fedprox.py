"""FedProx: federated averaging whose clients are held near the model that they received.

    FedProx.  K clients, cohort S_t, local epochs E, batch size B, rate η, proximal weight μ
    server, in each round t = 1, 2, …:
        for each client k in S_t in parallel:
            Δ_k = ClientUpdate(k, w_{t-1})
        w_t = w_{t-1} + Σ_{k ∈ S_t} (n_k / m_t) Δ_k,   m_t = Σ_{k ∈ S_t} n_k
    ClientUpdate(k, w):
        approximately minimise   h(w') = F_k(w') + μ/2 ‖w' − w‖²   from w' = w:
            for each local epoch 1 … E, for each batch b:
                w' = w' − η (∇ℓ(w'; b) + μ (w' − w))
        return Δ_k = w' − w

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in
Heterogeneous Networks. MLSys 2020, Algorithm 2 (arXiv:1812.06127).

μ is `mu`; the other letters are those of FedAvg. With μ = 0 this is FedAvg, to the bit.

Differences from the paper: the paper leaves open how h is minimised, to a precision γ_k that may
differ by client and round. Here it is E epochs of gradient steps on every client, and there is no
client that does only part of them. The paper draws clients with probability n_k / n and averages
them equally; here the draw is uniform and the mean weighted by n_k. Where `gradient_clip` is set,
it bounds the gradient of ℓ, without the proximal term; a client optimizer gets their sum. Server
optimizers and schedules are as in FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from potluck.algorithms.fedavg import FedAvg


@dataclass(frozen=True, slots=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term; see the module's docstring for the algorithm and its source.

    Args:
        mu: μ ≥ 0, how strongly local weights are pulled back. `client_lr` · μ should stay well
            below 1.
    """

    mu: Annotated[float, Interval(ge=0), "Use 0.0 for FedAvg; start with 0.01."]

    @property
    def proximal(self) -> float:
        """μ."""
        return self.mu
