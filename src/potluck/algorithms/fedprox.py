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
differ by client and round; here it is E epochs of gradient steps on every client, and there is no
client that does only part of them. The paper draws clients with probability n_k / n and averages
them equally; here the draw is uniform and the mean weighted by n_k. Where `gradient_clip` is set,
it bounds the gradient of ℓ, without the proximal term. Server optimizers and schedules are as in
FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.algorithms.local import LocalTraining
from potluck.algorithms.ranges import check_at_least
from potluck.algorithms.runtime import Runtime
from potluck.algorithms.schedules import Constant, Schedule
from potluck.algorithms.server import Average, ServerOptimizer, ServerState
from potluck.core import Update, Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class FedProx(LocalTraining):
    """FedProx; see the module's docstring for the algorithm and its source.

    Args:
        client_lr, local_epochs, batch_size, client_schedule, gradient_clip: of `LocalTraining`.
        mu: μ ≥ 0, how strongly local weights are pulled back. `client_lr` · μ should stay well
            below 1.
        server: what the server does with the aggregate.
        server_schedule: the factor on the server's rate in each round.
    """

    vectors = 1
    client_vectors = 0

    mu: float
    server: ServerOptimizer = field(default_factory=Average)
    server_schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        self.check()
        check_at_least("mu", self.mu, 0.0, "Use 0.0 for FedAvg; start with 0.01.")

    def broadcast(self, state: ServerState) -> Vector:
        """The weights w."""
        return state.weights

    def client_update(
        self,
        runtime: Runtime,
        received: Vector,
        num_examples: int,
        *,
        state: Vector | None = None,
        seed: int,
        round: int,
        client: int,
    ) -> Update:
        """The client half: local training on h, from the received weights."""
        local = self.train(
            runtime,
            received,
            num_examples,
            seed=seed,
            round=round,
            client=client,
            proximal=self.mu,
        )
        return Update(
            delta=local.weights - received,
            weight=float(num_examples),
            loss=local.loss,
            num_steps=local.num_steps,
        )

    def server_init(self, weights: Vector) -> ServerState:
        """The state before round 1."""
        return ServerState(weights, self.server.init(weights))

    def server_update(
        self, state: ServerState, aggregate: Vector, *, round: int, participation: float = 1.0
    ) -> ServerState:
        """The server half: the weighted mean of the cohort's Δ moves the model."""
        scale = float(self.server_schedule(round))
        optimizer, weights = self.server.step(state.optimizer, state.weights, aggregate, scale)
        return ServerState(weights, optimizer)
