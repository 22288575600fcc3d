"""Compression as a stage of a simulated client, between its Δ and the sum.

    (Δ, weight) = ClientUpdate(k, w)
    body, r_k = ENCODE(Δ + r_k)                  # r_k: what client k's last body lost; 0 at first
    send (body, weight)
    server:  sum ← sum + weight · DECODE(body)

The lines of `potluck.core.codecs`, which a device and a server run too, with the same random
stream of (seed, round, client). An algorithm, compressed, is an algorithm again: its clients keep
the residual in front of what they keep anyway, and executors, checkpoints and failures treat it
as such. As on a device, the residual is replaced when the update counts, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import Algorithm, ClientHalf
from potluck.core import (
    ClientContext,
    Codec,
    DivergedError,
    LocalWork,
    ProtocolError,
    Spec,
    Vector,
    decode_vector,
    encode_update,
)


def compressed(algorithm: Algorithm, codec: Codec, spec: Spec | None = None) -> Algorithm:
    """The algorithm with updates that travel in a codec; in float32 it is as it was.

    Args:
        spec: of the model, whose frozen parameters do not travel; without it all are trained.
    """
    if codec == "float32":
        return algorithm
    is_plain = spec is None or spec.size("trained") == spec.num_parameters
    return _Compressed(algorithm, codec, None if is_plain else spec)


@dataclass(frozen=True, slots=True)
class _Compressed:
    """An algorithm whose server half gets what was decoded."""

    algorithm: Algorithm
    codec: Codec
    spec: Spec | None  # where some parameters are not trained

    @property
    def vectors(self) -> int:
        return self.algorithm.vectors

    @property
    def client_vectors(self) -> int:
        return self.algorithm.vectors + self.algorithm.client_vectors

    def broadcast(self, state: Any) -> Vector:
        return self.algorithm.broadcast(state)

    def client_update(self, received: Vector, client: ClientContext) -> LocalWork:
        sent = self._sent(len(received))
        num_sent = len(received[sent])
        residual = kept = None
        if client.state is not None:
            residual, kept = client.state[:num_sent], client.state[num_sent:]
        inner = client._replace(state=kept if self.algorithm.client_vectors > 0 else None)
        half = ClientHalf(self.algorithm, received, inner)
        while half.request is not None:
            half.answer((yield half.request))
        update = half.update
        try:
            encoded = encode_update(
                update.delta[sent],
                self.codec,
                residual,
                seed=client.seed,
                round=client.round,
                client=client.client,
            )
        except ProtocolError:
            raise DivergedError(
                "an update must be finite to be encoded, got NaN or infinity with "
                f"loss={update.loss:g}. Lower the client learning rate, or look at this "
                "client's data."
            ) from None
        parts = [encoded.residual] if update.state is None else [encoded.residual, update.state]
        delta = np.zeros_like(update.delta)
        delta[sent] = decode_vector(encoded.body, self.codec, num_sent)
        return update._replace(delta=delta, state=np.concatenate(parts))

    def _sent(self, length: int) -> slice | NDArray[np.int64]:
        """The entries of an update that travel."""
        if self.spec is None:
            return slice(0, length)
        by_vector = np.arange(length).reshape(self.algorithm.vectors, -1)
        return np.concatenate([by_vector[:, p] for p in self.spec.slices("trained")], 1).ravel()

    def server_init(self, weights: Vector) -> Any:
        return self.algorithm.server_init(weights)

    def server_update(
        self, state: Any, aggregate: Vector, *, round: int, participation: float
    ) -> Any:
        return self.algorithm.server_update(
            state, aggregate, round=round, participation=participation
        )
