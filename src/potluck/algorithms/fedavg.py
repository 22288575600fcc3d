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
server may hand it to another optimizer than plain averaging (`server`). η may decay by a factor
each round (`client_lr_decay`). The split into batches is drawn anew in every round. Sequences
share a batch with others of their length, unless the task says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms.runtime import Runtime
from potluck.algorithms.server import Average, OptimizerState, ServerOptimizer
from potluck.core import Update, Vector, derive_seed, stream

W = TypeVar("W")  # vectors, tensors, batches of either


class ServerState(NamedTuple):
    """All that a server carries from one round to the next."""

    weights: Vector  # [dim]
    optimizer: OptimizerState


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg:
    """Federated averaging; see the module's docstring for the algorithm and its source.

    Args:
        client_lr: η > 0, the learning rate of a local step.
        local_epochs: E ≥ 1, passes over a client's examples in one round.
        batch_size: B ≥ 1, examples in a local step; None takes all of a client's at once (∞).
        client_lr_decay: in (0, 1]; round t uses client_lr · client_lr_decay^(t − 1).
        server: what the server does with the aggregate.
    """

    client_lr: float
    local_epochs: int = 1
    batch_size: int | None = 10
    client_lr_decay: float = 1.0
    server: ServerOptimizer = field(default_factory=Average)

    def __post_init__(self) -> None:
        if not self.client_lr > 0.0:
            raise ValueError(
                f"client_lr must be above 0, got client_lr={self.client_lr!r}. Start with 0.1."
            )
        if self.local_epochs < 1:
            raise ValueError(
                f"local_epochs must be at least 1, got local_epochs={self.local_epochs!r}. "
                "Use 1 for a single pass."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1, got batch_size={self.batch_size!r}. "
                "Use None for all of a client's examples in one step."
            )
        if not 0.0 < self.client_lr_decay <= 1.0:
            raise ValueError(
                "client_lr_decay must be above 0 and at most 1, "
                f"got client_lr_decay={self.client_lr_decay!r}. Use 1.0 for a constant rate."
            )

    def client_lr_at(self, round: int) -> float:
        """η in a round (from 1)."""
        return self.client_lr * self.client_lr_decay ** (round - 1)

    def client_update(
        self,
        runtime: Runtime,
        received: Vector,
        num_examples: int,
        *,
        seed: int,
        round: int,
        client: int,
    ) -> Update:
        """The client half, ClientUpdate(k, w): local training from the received weights."""
        batches = self.batches(num_examples)
        lr = self.client_lr_at(round)
        order = self.order(num_examples, runtime.lengths(), stream(seed, "batches", round, client))
        runtime.begin(received, order, derive_seed(seed, "model", round, client))
        for _ in range(self.local_epochs):
            for batch in batches:
                runtime.step(batch, lr)
        weights, loss = runtime.end()
        return Update(
            delta=weights - received,
            weight=float(num_examples),
            loss=loss,
            num_steps=self.local_epochs * len(batches),
        )

    def batches(self, num_examples: int) -> list[slice]:
        """The batches of one local epoch, as rows of the shuffled examples; the last may be
        short."""
        size = num_examples if self.batch_size is None else self.batch_size
        return [slice(i, min(i + size, num_examples)) for i in range(0, num_examples, size)]

    def order(
        self, num_examples: int, lengths: NDArray[np.int64] | None, random: np.random.Generator
    ) -> NDArray[np.int64]:
        """The order in which `batches` takes a client's examples: random, or, where examples have
        lengths [examples], such that those of a batch are of similar length and the batches come
        in random order."""
        order = random.permutation(num_examples)
        if lengths is None or self.batch_size is None or num_examples <= self.batch_size:
            return order
        order = order[np.argsort(lengths[order], kind="stable")]
        whole, rest = divmod(num_examples, self.batch_size)
        # The short batch comes last, and may be of any length.
        start = int(random.integers(whole + 1)) * self.batch_size
        last = order[start : start + rest]
        others = np.delete(order, np.s_[start : start + rest]).reshape(whole, self.batch_size)
        return np.concatenate([others[random.permutation(whole)].ravel(), last])

    @staticmethod
    def local_step(weights: W, gradient: W, lr: float) -> W:
        """The pure local step, w − η ∇ℓ(w; b), which a runtime may do in place."""
        return weights - lr * gradient  # type: ignore[operator]

    def server_init(self, weights: Vector) -> ServerState:
        """The state before round 1."""
        return ServerState(weights, self.server.init(weights))

    def server_update(self, state: ServerState, aggregate: Vector) -> ServerState:
        """The server half: the weighted mean of the cohort's Δ moves the model."""
        optimizer, weights = self.server.step(state.optimizer, state.weights, aggregate)
        return ServerState(weights, optimizer)


def fed_sgd(*, client_lr: float, client_lr_decay: float = 1.0) -> FedAvg:
    """FederatedSGD: one full-batch gradient per client and round (E = 1, B = ∞)."""
    return FedAvg(
        client_lr=client_lr, local_epochs=1, batch_size=None, client_lr_decay=client_lr_decay
    )
