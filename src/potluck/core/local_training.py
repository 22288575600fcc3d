"""The input, requests and answers of an algorithm's client half.

    local = yield LocalSGD(start=received, lr=η, epochs=E, batch_size=B)

A client half is a generator that ends with an `Update`. Whatever runs it answers its requests:
one client after another, many side by side, or on a device. A request is a plain value.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias

from potluck.core.client_optimizer import PLAIN_SGD, ClientOptimizer
from potluck.core.update import Update, Vector


class ClientContext(NamedTuple):
    """The client that trains, and the round."""

    seed: int  # of the run
    round: int  # from 1
    client: int
    num_examples: int
    state: Vector | None = None
    """[client_vectors · dim], what the client kept of its last round; None in its first, and where
    clients keep nothing."""


class Correction(NamedTuple):
    """What changes the gradient of a local step besides the loss:

        g = min(1, gradient_clip / ‖∇ℓ(w; b)‖) ∇ℓ(w; b)  +  proximal (w − start)  +  drift

    One mechanism for clipped gradients, for FedProx (`proximal`) and for SCAFFOLD (`drift`). Only
    the gradient of the loss is clipped, not what is added to it. An averaged buffer has no gradient
    and is not corrected.
    """

    gradient_clip: float | None = None  # > 0; None leaves gradients as they are
    proximal: float = 0.0  # ≥ 0
    drift: Vector | None = None  # [dim]; not changed, and not to be changed during the round


class LocalSGD(NamedTuple):
    """Local training by stochastic gradient descent:

    split the client's examples into batches of size B, drawn for this round
    for each local epoch 1 … E, for each batch b:
        w ← w − lr · g(w; b), or what the optimizer makes of g

    g is the gradient of the loss, corrected. The optimizer's state lasts for one request. The split
    follows from the run's seed, round and client alone. Where examples are sequences, those of a
    batch may be of similar length.
    """

    start: Vector  # [dim], not changed
    lr: float
    epochs: int = 1
    batch_size: int | None = None  # None: all of the client's examples at once (∞)
    correction: Correction = Correction()
    optimizer: ClientOptimizer = PLAIN_SGD


class Trained(NamedTuple):
    """The end of local training."""

    weights: Vector  # [dim], valid until the client half asks again
    loss: float  # the mean over the local steps, each before its step; NaN if nothing counted
    num_steps: int


LocalWork: TypeAlias = Generator[LocalSGD, Trained, Update]  # a client half that is running
