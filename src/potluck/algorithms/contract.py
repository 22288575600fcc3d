"""The contract between an algorithm and the executor, server or device that runs it.

An algorithm is two halves. The client half is a generator: it yields a request for local training
for each time that it needs some, gets the result back, and returns an `Update`.

    def client_update(self, received, client):
        local = yield LocalSGD(start=received, lr=0.1, epochs=5, batch_size=10)
        return Update(local.weights - received, client.num_examples, local.loss, local.num_steps)

It is pure: from equal arguments and answers follow equal requests and an equal update.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from potluck.core import ClientContext, LocalSGD, LocalWork, Trained, Update, Vector


class Algorithm(Protocol):
    """The two halves of an algorithm, as an executor, a server or a device calls them."""

    @property
    def vectors(self) -> int:
        """Number of model-sized vectors sent to a client in a round; as many are sent back."""
        ...

    @property
    def client_vectors(self) -> int:
        """Number of model-sized vectors that a client keeps from one round to its next."""
        ...

    def broadcast(self, state: Any) -> Vector:
        """Returns the vector that every client of a round receives: [vectors · dim]."""
        ...

    def client_update(self, received: Vector, client: ClientContext) -> LocalWork:
        """The client half: from what was received, by local training, to an `Update`."""
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


class ClientHalf:
    """A running client half: it has made a request, or returned its update.

    Raises:
        TypeError: it breaks the contract of `Algorithm.client_update`. `answer` may raise this too.
    """

    request: LocalSGD | None
    """The request that it waits for; None once there is an update."""
    update: Update
    """The returned update, once there are no more requests."""

    def __init__(self, algorithm: Algorithm, received: Vector, client: ClientContext) -> None:
        self._name = type(algorithm).__name__
        self._half: Any = algorithm.client_update(received, client)
        if not isinstance(self._half, Generator):
            raise TypeError(
                f"{self._name}.client_update must be a generator, got {_named(self._half)}. "
                "Write `local = yield LocalSGD(…)` where it trains."
            )
        self.answer(None)

    def answer(self, local: Trained | None) -> None:
        """Sends the result of its request and continues it; None starts it."""
        try:
            request = self._half.send(local)
        except StopIteration as end:
            if not isinstance(end.value, Update):
                raise TypeError(
                    f"{self._name}.client_update must return an Update, got {_named(end.value)}. "
                    "End it with `return Update(…)`."
                ) from None
            self.request, self.update = None, end.value
            return
        if not isinstance(request, LocalSGD):
            raise TypeError(
                f"{self._name}.client_update must yield LocalSGD(…), got {_named(request)}."
            )
        self.request = request


def client_update(
    algorithm: Algorithm,
    received: Vector,
    client: ClientContext,
    train: Callable[[LocalSGD], Trained],
) -> Update:
    """Returns the update of one client; `train` answers its requests one by one."""
    half = ClientHalf(algorithm, received, client)
    while half.request is not None:
        half.answer(train(half.request))
    return half.update


def _named(value: object) -> str:
    return "None" if value is None else type(value).__name__
