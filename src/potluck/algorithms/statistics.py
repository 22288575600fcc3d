"""Statistics beside an algorithm: averaged by weight, and untouched by everything else.

    w = (p, s): parameters p, on which the algorithm works, and buffers s (`core.Spec`)
    client k:  p_k, s_k ← local training from (p, s);  send (Δ_k of the algorithm, s_k − s)
    server:    p ← the algorithm's server half, of the weighted mean of Δ_k
               s ← s + the weighted mean of (s_k − s)

A running variance is no parameter, and the difference of two is no gradient. A server optimizer
would take it below zero. A proximal term, a control variate, a bound on a norm and a codec that
rounds gradients do not apply to it. So an algorithm never sees one. `with_statistics` gives it the
parameters alone, and is an algorithm again.

A frozen parameter is in the vector of the algorithm, where its Δ is 0. One that the forward pass
writes (a momentum encoder) is averaged like a buffer. What a client did not change has no
difference, whatever it is: a mask of −∞ stays what it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from potluck.algorithms.contract import Algorithm, ClientHalf
from potluck.algorithms.fedavg import FedAvg
from potluck.core import ClientContext, DivergedError, LocalSGD, LocalWork, Spec, Trained, Vector


def with_statistics(algorithm: Algorithm, spec: Spec) -> Algorithm:
    """The algorithm on the parameters of a model, and the mean of its statistics; the algorithm
    itself if every entry of the model is trained."""
    return algorithm if spec.is_all_trained else _WithStatistics(algorithm, spec)


def without_statistics(algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm that was given to `with_statistics`."""
    return algorithm.algorithm if isinstance(algorithm, _WithStatistics) else algorithm


def reports_its_model(algorithm: Algorithm) -> bool:
    """True if its client half is that of FedAvg: Δ is the local weights less those received, and
    the weight is the number of examples."""
    return type(without_statistics(algorithm)).client_update is FedAvg.client_update


def num_wide(algorithm: Algorithm) -> int:
    """Number of entries at the end of an update that are statistics; see `core.FixedPointMean`."""
    return algorithm.num_statistics if isinstance(algorithm, _WithStatistics) else 0


@dataclass(frozen=True, slots=True)
class _WithStatistics:
    """Vectors that travel are those of the algorithm, with the buffers behind them. Server states
    are the algorithm's own, but for the weights, which are those of the whole model."""

    algorithm: Algorithm
    spec: Spec

    @property
    def vectors(self) -> int:
        return self.algorithm.vectors

    @property
    def client_vectors(self) -> int:
        return self.algorithm.client_vectors

    @property
    def num_statistics(self) -> int:
        return self.spec.dim - self.spec.num_parameters

    def broadcast(self, state: Any) -> Vector:
        inner = self.algorithm.broadcast(self._inner(state))
        return np.concatenate([inner, state.weights[self.spec.num_parameters :]])

    def client_update(self, received: Vector, client: ClientContext) -> LocalWork:
        shown = _Parameters(self.spec, received)
        half = ClientHalf(self.algorithm, shown.received, client)
        while half.request is not None:
            local = yield shown.whole(half.request)
            half.answer(shown.parameters(local))
        delta = np.concatenate([half.update.delta, shown.change(self.spec.num_parameters)])
        for part in _frozen(self.spec):
            delta[part] = shown.change(part.start, part.stop)
        return half.update._replace(delta=delta)

    def server_init(self, weights: Vector) -> Any:
        state = self.algorithm.server_init(weights[: self.spec.num_parameters])
        return _with_weights(state, weights)

    def server_update(
        self, state: Any, aggregate: Vector, *, round: int, participation: float
    ) -> Any:
        start = self.spec.num_parameters
        end = len(aggregate) - self.num_statistics
        changes = aggregate[:end].copy()
        for part in _frozen(self.spec):
            changes[part] = 0.0
        new = self.algorithm.server_update(
            self._inner(state), changes, round=round, participation=participation
        )
        statistics = _added(state.weights[start:], aggregate[end:])
        weights = np.concatenate([new.weights, statistics])
        for part in _frozen(self.spec):
            weights[part] = _added(state.weights[part], aggregate[part])
        return _with_weights(new, weights)

    def _inner(self, state: Any) -> Any:
        return _with_weights(state, state.weights[: self.spec.num_parameters])


class _Parameters:
    """Local training of a whole model, for an algorithm that sees its parameters alone."""

    def __init__(self, spec: Spec, received: Vector) -> None:
        self._spec = spec
        size, end = spec.num_parameters, len(received) - (spec.dim - spec.num_parameters)
        self._start = received  # [dim]
        if end > size:
            self._start = np.concatenate([received[:size], received[end:]])
        self._local = self._start
        self._frozen = _frozen(spec)
        self.received = received[:end]
        """The vector that the algorithm received: [vectors · num_parameters]."""
        if not all(np.isfinite(received[part]).all() for part in self._frozen):
            self.received = self.received.copy()  # a mask may hold infinities: ∞ − ∞
            for part in self._frozen:
                self.received[part] = 0.0

    def whole(self, request: LocalSGD) -> LocalSGD:
        """Extends the algorithm's request to the whole model."""
        given, start = request.start, self._start
        if given.ctypes.data != self.received.ctypes.data or self._local is not start:
            start = np.concatenate([given, self._local[len(given) :]])
            for part in self._frozen:
                start[part] = self._local[part]
        correction = request.correction
        if correction.drift is not None:
            rest = np.zeros(self._spec.dim - len(given), np.float32)
            correction = correction._replace(drift=np.concatenate([correction.drift, rest]))
        return request._replace(start=start, correction=correction)

    def parameters(self, local: Trained) -> Trained:
        """Returns the result of local training without the statistics."""
        self._local = local.weights
        parameters = local.weights[: self._spec.num_parameters]
        if self._frozen:
            parameters = parameters.copy()
            for part in self._frozen:
                parameters[part] = self.received[part]
        return local._replace(weights=parameters)

    def change(self, start: int, stop: int | None = None) -> Vector:
        """Returns the change of these entries in local training; 0 where they are the same, even if
        not finite.

        Raises:
            DivergedError: a difference is not finite.
        """
        before, after = self._start[start:stop], self._local[start:stop]
        moved = before.view(np.int32) != after.view(np.int32)
        change = np.zeros_like(before)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(after, before, out=change, where=moved)
        finite = np.isfinite(change)
        if not finite.all():
            entry = int(np.flatnonzero(~finite)[0])
            raise _not_finite(self._spec.name_at(start + entry), before[entry], after[entry])
        return change


def _frozen(spec: Spec) -> list[slice]:
    """The parameters that no local step moves."""
    parts, end = spec.slices("constant", "statistic"), spec.num_parameters
    return [part for part in parts if part.start < part.stop <= end]


def _with_weights(state: Any, weights: Vector) -> Any:
    """A server state with other weights."""
    if hasattr(state, "_replace"):
        return state._replace(weights=weights)
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return dataclasses.replace(state, weights=weights)  # type: ignore[reportCallIssue]
    raise TypeError(
        "a server state must be a named tuple or a dataclass with weights where a model has "
        f"statistics or frozen parameters, got {type(state).__name__}. Use `ServerState`."
    )


def _added(values: Vector, changes: Vector) -> Vector:
    """Values with their changes; to the bit what they were where there is none."""
    return np.where(changes != 0.0, values + changes, values)


def _not_finite(name: str, before: float, after: float) -> DivergedError:
    if not np.isfinite(before):
        return DivergedError(
            f"what the model writes while it trains is averaged, so it must start finite, got "
            f"{name} = {before:g} before and {after:g} after local training. Start {name} with a "
            "finite value."
        )
    return DivergedError(
        f"what the model writes while it trains must stay finite, got {name} = {after:g} after "
        "local training. Lower the client learning rate, or look at this client's data."
    )
