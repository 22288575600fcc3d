"""What the client half of an algorithm knows of its client, asks for, and is given.

    local = yield LocalSGD(start=received, lr=η, epochs=E, batch_size=B)

A client half is a generator that ends with an `Update`. Whatever runs it answers its requests:
one client after another, many side by side, or on a device. A request is a plain value.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias

from potluck.core.correction import Correction
from potluck.core.update import Update, Vector


class ClientContext(NamedTuple):
    """Who trains, and in which round."""

    seed: int  # of the run
    round: int  # from 1
    client: int
    num_examples: int
    state: Vector | None = None
    """[client_vectors · dim], what the client kept of its last round; None in its first, and where
    clients keep nothing."""


class LocalSGD(NamedTuple):
    """Local training by stochastic gradient descent:

    split the client's examples into batches of size B, drawn for this round
    for each local epoch 1 … E, for each batch b:
        w ← w − lr · g(w; b)

    g is the gradient of the loss, corrected. The split follows from the run's seed, round and
    client alone. Where examples are sequences, those of a batch may be of similar length.
    """

    start: Vector  # [dim], not changed
    lr: float
    epochs: int = 1
    batch_size: int | None = None  # None: all of the client's examples at once (∞)
    correction: Correction = Correction()


class Trained(NamedTuple):
    """Where local training ended."""

    weights: Vector  # [dim], valid until the client half asks again
    loss: float  # the mean over the local steps, each before its step; NaN if nothing counted
    num_steps: int


LocalWork: TypeAlias = Generator[LocalSGD, Trained, Update]  # a client half on its way
