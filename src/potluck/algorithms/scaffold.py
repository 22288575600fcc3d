"""SCAFFOLD: control variates take the clients' differences out of their local steps.

    SCAFFOLD.  N clients, cohort S_t, rates η_l and η_g; control variates c = 0 and c_i = 0
    server, in each round t = 1, 2, …:
        send (w, c) to each client i in S_t
        for each client i in S_t in parallel:
            (Δ_i, Δc_i) = ClientUpdate(i, w, c)
        w = w + η_g · mean of Δ_i over S_t
        c = c + (|S_t| / N) · mean of Δc_i over S_t
    ClientUpdate(i, w, c):
        w' = w
        for each of K local steps, with its batch b:
            w' = w' − η_l (∇ℓ(w'; b) − c_i + c)
        c_i⁺ = c_i − c + (w − w') / (K η_l)                             # option II
        Δ_i = w' − w,  Δc_i = c_i⁺ − c_i,  c_i = c_i⁺
        return (Δ_i, Δc_i)

S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic
Controlled Averaging for Federated Learning. ICML 2020, Algorithm 1, with option II for the
control variates (arXiv:1910.06378).

η_l is `client_lr`, η_g the server's rate (`server=Average(server_lr=…)`), c the vector "control"
of the server state, c_i the client state, N the population. c_i is the mean of the gradients that
client i computed in its last round. It stays with the client; Δc_i is sent. w and c travel as one
vector, one behind the other, and so do Δ_i and Δc_i: twice the bytes of FedAvg each way.

Differences from the paper: K follows from a client's examples, E · ⌈n_i / B⌉, and so differs
between clients; all count equally in the mean, as in the paper. In a round of rate 0 controls
stay as they are. Where `gradient_clip` is set, it bounds the gradient of ℓ, without the controls;
c_i is then the mean of clipped gradients. Clients take plain steps alone: of another optimizer's,
(w − w') / (K η_l) is not the mean gradient. The server may hand Δ to another optimizer than plain
averaging, and both rates may follow a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from potluck.algorithms.local_sgd import LocalTraining
from potluck.algorithms.schedules import Constant, Schedule
from potluck.algorithms.server_optimizer import Average, ServerOptimizer, ServerState, scaled
from potluck.core import PLAIN_SGD, ClientContext, LocalWork, Update, Vector

CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaffold(LocalTraining):
    """SCAFFOLD; see the module's docstring for the algorithm and its source.

    Args:
        client_lr, local_epochs, batch_size, client_schedule, gradient_clip: of `LocalTraining`.
        server: what the server does with the mean of the Δ_i.
        server_schedule: the factor on the server's rate in each round.
    """

    vectors = 2
    client_vectors = 1

    server: ServerOptimizer = field(default_factory=Average)
    server_schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        LocalTraining.__post_init__(self)
        if self.client_optimizer != PLAIN_SGD:
            raise ValueError(
                "client_optimizer must be plain SGD with SCAFFOLD, whose controls take a client's "
                "way for the sum of its gradients, got "
                f"client_optimizer={self.client_optimizer!r}. Leave it out, or use FedAvg."
            )

    def broadcast(self, state: ServerState) -> Vector:
        """w and c."""
        return np.concatenate([state.weights, state.algorithm[CONTROL]])

    def client_update(self, received: Vector, client: ClientContext) -> LocalWork:
        """The client half, ClientUpdate(i, w, c), with c_i the client's state."""
        weights, control = np.split(received, 2)
        own = np.zeros_like(control) if client.state is None else client.state
        local = yield self.local_sgd(weights, client.round, drift=control - own)
        distance = self.client_lr_at(client.round) * local.num_steps  # K η_l
        delta = local.weights - weights
        if distance > 0.0:
            change = -control - scaled(1.0 / distance, delta)  # c_i⁺ − c_i
        else:
            change = np.zeros_like(control)
        return Update(
            delta=np.concatenate([delta, change]),
            weight=1.0,
            loss=local.loss,
            num_steps=local.num_steps,
            state=own + change,
        )

    def server_init(self, weights: Vector) -> ServerState:
        """The state before round 1: c = 0."""
        return ServerState(weights, self.server.init(weights), {CONTROL: np.zeros_like(weights)})

    def server_update(
        self, state: ServerState, aggregate: Vector, *, round: int, participation: float
    ) -> ServerState:
        """The server half: the mean of Δ moves the model, that of Δc the control."""
        delta, change = np.split(aggregate, 2)
        scale = float(self.server_schedule(round))
        optimizer, weights = self.server.step(state.optimizer, state.weights, delta, scale)
        control = state.algorithm[CONTROL] + scaled(participation, change)
        return ServerState(weights, optimizer, {CONTROL: control})
