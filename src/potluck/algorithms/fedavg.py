"""Federated averaging: clients train locally, the server averages their models.

    FederatedAveraging.  K clients, cohort fraction C, local epochs E, batch size B, rate η
    server:
        initialise w_0
        for each round t = 1, 2, …:
            m   = max(C · K, 1)
            S_t = random set of m clients                              # the cohort
            for each client k in S_t in parallel:
                Δ_k = ClientUpdate(k, w_{t-1})
            m_t = Σ_{k ∈ S_t} n_k
            w_t = w_{t-1} + Σ_{k ∈ S_t} (n_k / m_t) Δ_k
    ClientUpdate(k, w):
        w' = w
        split the n_k examples of client k into batches of size B
        for each local epoch 1 … E, for each batch b:
            w' = w' − η ∇ℓ(w'; b)
        return Δ_k = w' − w

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient
Learning of Deep Networks from Decentralized Data. AISTATS 2017, Algorithm 1, in the version of
arXiv:1602.05629v4 (2023), whose erratum weights by the cohort's examples m_t and not by those of
the whole population.

K is the population, S_t the cohort, n_k a client's number of examples (its weight), C `cohort`,
E `local_epochs`, B `batch_size` (∞ is None), η `client_lr`.

Differences from the paper: clients return Δ_k instead of w^k, which is the same mean, and the
server may hand it to another optimizer than plain averaging (`server`). Both rates may follow a
schedule over the rounds, gradients may be clipped, and clients may step by another optimizer than
plain SGD (`client_optimizer`). The split into batches is drawn anew in every round. Sequences share
a batch with others of their length, unless the task says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.algorithms.local_sgd import LocalTraining
from potluck.algorithms.schedules import Constant, Schedule
from potluck.algorithms.server_optimizer import Average, ServerOptimizer, ServerState
from potluck.core import ClientContext, LocalWork, Update, Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg(LocalTraining):
    """Federated averaging; see the module's docstring for the algorithm and its source.

    Args:
        client_lr, local_epochs, batch_size, client_schedule, gradient_clip, client_optimizer: of
            `LocalTraining`.
        server: what the server does with the aggregate.
        server_schedule: the factor on the server's rate in each round.
    """

    vectors = 1
    client_vectors = 0

    server: ServerOptimizer = field(default_factory=Average)
    server_schedule: Schedule = field(default_factory=Constant)

    @property
    def proximal(self) -> float:
        """The weight μ of the proximal term of FedProx; FedAvg has none."""
        return 0.0

    def broadcast(self, state: ServerState) -> Vector:
        """The weights w."""
        return state.weights

    def client_update(self, received: Vector, client: ClientContext) -> LocalWork:
        """The client half, ClientUpdate(k, w): local training from the received weights."""
        local = yield self.local_sgd(received, client.round, proximal=self.proximal)
        return Update(
            delta=local.weights - received,
            weight=float(client.num_examples),
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


def fed_sgd(
    *,
    client_lr: float,
    client_schedule: Schedule | None = None,
    gradient_clip: float | None = None,
    server: ServerOptimizer | None = None,
    server_schedule: Schedule | None = None,
) -> FedAvg:
    """FederatedSGD: one full-batch gradient per client and round (E = 1, B = ∞)."""
    return FedAvg(
        client_lr=client_lr,
        local_epochs=1,
        batch_size=None,
        client_schedule=client_schedule or Constant(),
        gradient_clip=gradient_clip,
        server=server or Average(),
        server_schedule=server_schedule or Constant(),
    )
