"""Own data whose examples have several inputs: a tuple of arrays, or a dictionary of them.

    {"a": ({"ids": ids, "mask": mask}, labels), …}   the model is called as model(ids=…, mask=…)
    {"a": ((image, age), labels), …}                 the model is called as model(image, age)

Each input is prepared by itself, as if it were the only one. What is held out depends on the
targets and the seed alone, so it is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

from potluck.core import DataError
from potluck.data.federated import Examples, FederatedData

Key: TypeAlias = Any  # a name, or a place in a tuple


def keys_of(clients: Mapping[Any, Any]) -> list[Key] | None:
    """The names, or places, of the inputs of an example; None if it has one only.

    Raises:
        DataError: clients that do not have the same inputs.
    """
    pairs = {client: _parts(pair) for client, pair in clients.items()}
    if any(parts is None for parts in pairs.values()):
        return None
    first, keys = next((client, list(parts or ())) for client, parts in pairs.items())
    for client, parts in pairs.items():
        if set(parts or ()) != set(keys):
            raise DataError(
                f"every client must have the inputs {keys} of client {str(first)!r}, got "
                f"{list(parts or ())} of client {str(client)!r}. Give all clients the same."
            )
    return keys


def picked(pair: Any, key: Key) -> Any:
    """The same examples, of one client or of each in a dictionary, with one of their inputs."""
    if isinstance(pair, Mapping):
        clients = cast("Mapping[Any, Any]", pair)
        return {client: picked(own, key) for client, own in clients.items()}
    if pair is None:
        return None
    parts = _parts(pair)
    if parts is None or key not in parts:
        raise DataError(f"a test set must have the inputs of the clients, got none called {key!r}.")
    return parts[key], pair[1]


def together(keys: Sequence[Key], prepare: Callable[[Key], FederatedData]) -> FederatedData:
    """Federated data with all inputs, each of which `prepare` makes.

    Raises:
        DataError: an input cannot be used; the message names it.
    """
    made: dict[Key, FederatedData] = {}
    for key in keys:
        try:
            made[key] = prepare(key)
        except DataError as error:
            raise DataError(f"input {key!r}: {error}") from None
    first = made[keys[0]]

    def all_of(parts: dict[Key, Examples]) -> Examples:
        inputs = {key: part.inputs for key, part in parts.items()}
        is_tuple = keys == list(range(len(keys)))
        return Examples(tuple(inputs.values()) if is_tuple else inputs, parts[keys[0]].targets)

    return replace(
        first,
        train=all_of({key: data.train for key, data in made.items()}),
        test=all_of({key: data.test for key, data in made.items()}),
        schema=None,
    )


def _parts(pair: Any) -> Mapping[Key, Any] | None:
    """The inputs of a pair by name or place; None if there is one only."""
    if not isinstance(pair, (tuple, list)) or len(cast("list[Any]", pair)) != 2:
        return None
    inputs, targets = cast("list[Any]", pair)
    if isinstance(inputs, Mapping):
        return cast("Mapping[Key, Any]", inputs)
    if not isinstance(inputs, tuple) or not hasattr(targets, "__len__"):
        return None
    values = cast("tuple[Any, ...]", inputs)
    are_arrays = all(getattr(value, "ndim", 0) > 0 for value in values)
    if are_arrays and values and all(len(value) == len(targets) for value in values):
        return dict(enumerate(values))
    return None
