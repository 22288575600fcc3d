"""The report of a client after local training, and the type of a model."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float32]  # [dim]: a model, or a difference of two


class Update(NamedTuple):
    """Δ = local weights − received weights, and how much it counts in the mean.

    `loss` is the mean of the losses of all local steps, each measured before its step. `state` is
    what the client keeps for its next round, if the algorithm has it keep something; it never
    leaves the client.
    """

    delta: Vector  # [vectors · dim]: Δ, and what else the algorithm sends behind it
    weight: float
    loss: float
    num_steps: int
    state: Vector | None = None  # [client_vectors · dim]
