"""What an algorithm and whatever runs it need of each other.

A runtime owns one model and executes local steps on it. The simulator and a device with PyTorch
use `potluck.engine.TorchRuntime`; another (ONNX Runtime, say) can follow without a change to any
algorithm.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potluck.core import Correction, Update, Vector


class Runtime(Protocol):
    """One model in local training on one client's examples."""

    def lengths(self) -> NDArray[np.int64] | None:
        """How long each of the client's examples is, [examples], where they are sequences that
        should share a batch with others of their length; None where batches are random."""
        ...

    def recall(self) -> tuple[Vector, float] | None:
        """What `end` will give, if the steps that are about to be asked for were made before: a
        client half that runs a second time need not ask again. None for runtimes that train."""
        ...

    def begin(
        self,
        received: Vector,
        order: NDArray[np.int64],
        seed: int,
        correction: Correction = ...,
    ) -> None:
        """Start from the `received` weights with the examples in this `order`.

        `seed` is for what the model itself draws (dropout). Every step until the next `begin`
        applies the `correction`; the one without arguments changes no bit.
        """
        ...

    def step(self, batch: slice, lr: float) -> None:
        """One local step, w ← w − lr · g(w; batch), on rows of the ordered examples.

        g is ∇ℓ, corrected.
        """
        ...

    def end(self) -> tuple[Vector, float]:
        """The local weights, and the mean of the losses of all steps since `begin`.

        The weights are valid until the next `begin`.
        """
        ...


class Algorithm(Protocol):
    """What an executor, a server or a device needs of an algorithm: its two halves."""

    @property
    def vectors(self) -> int:
        """How many model-sized vectors travel to a client in a round, and as many back."""
        ...

    @property
    def client_vectors(self) -> int:
        """How many model-sized vectors a client keeps from one round to its next."""
        ...

    def broadcast(self, state: Any) -> Vector:
        """What every client of a round receives: [vectors · dim]."""
        ...

    def client_update(
        self,
        runtime: Runtime,
        received: Vector,
        num_examples: int,
        *,
        state: Vector | None,
        seed: int,
        round: int,
        client: int,
    ) -> Update:
        """The client half: local training, from what was received to an `Update`.

        `state` is what this client kept of its last round: [client_vectors · dim], or None in
        its first and for algorithms whose clients keep nothing.
        """
        ...

    def server_init(self, weights: Vector) -> Any:
        """The server half before round 1: weights to `ServerState`."""
        ...

    def server_update(
        self, state: Any, aggregate: Vector, *, round: int, participation: float
    ) -> Any:
        """The server half after a round: the aggregate moves the `ServerState`.

        `participation` is the part of the population whose updates are in the aggregate.
        """
        ...
