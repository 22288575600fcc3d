"""What an algorithm's client half needs of whatever runs it: the runtime.

A runtime owns one model and executes local steps on it. The simulator and a device with PyTorch
use `potluck.tasks.TorchRuntime`; another (ONNX Runtime, say) can follow without a change to any
algorithm.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potluck.core import Vector


class Runtime(Protocol):
    """One model in local training on one client's examples."""

    def lengths(self) -> NDArray[np.int64] | None:
        """How long each of the client's examples is, [examples], where they are sequences that
        should share a batch with others of their length; None where batches are random."""
        ...

    def begin(self, received: Vector, order: NDArray[np.int64], seed: int) -> None:
        """Start from the `received` weights with the examples in this `order`.

        `seed` is for what the model itself draws (dropout).
        """
        ...

    def step(self, batch: slice, lr: float) -> None:
        """One local step, w ← w − lr · ∇ℓ(w; batch), on rows of the ordered examples."""
        ...

    def end(self) -> tuple[Vector, float]:
        """The local weights, and the mean of the losses of all steps since `begin`.

        The weights are valid until the next `begin`.
        """
        ...


class Algorithm(Protocol):
    """What an executor, a server or a device needs of an algorithm: its two halves."""

    def client_update(
        self,
        runtime: Runtime,
        received: Vector,
        num_examples: int,
        *,
        seed: int,
        round: int,
        client: int,
    ) -> Any:
        """The client half: local training, from the received weights to an `Update`."""
        ...

    def server_init(self, weights: Vector) -> Any:
        """The server half before round 1: weights to `ServerState`."""
        ...

    def server_update(self, state: Any, aggregate: Vector) -> Any:
        """The server half after a round: the aggregate moves the `ServerState`."""
        ...
