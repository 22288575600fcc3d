"""Arrays and tensors that come several together: in a tuple, list, dictionary or dataclass.

A model may take several inputs (token ids and a mask) and give several outputs (a head for each
question). What is done to one array is then done to each of them, in the same structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure with `function` of each of its leaves."""
    if isinstance(tree, Mapping):
        pairs = {key: mapped(function, part) for key, part in cast("Any", tree).items()}
        return pairs if type(cast("Any", tree)) is dict else _as(tree, pairs)
    if isinstance(tree, (tuple, list)):
        parts = [mapped(function, part) for part in cast("Any", tree)]
        if hasattr(cast("Any", tree), "_fields"):  # a named tuple
            return type(cast("Any", tree))(*parts)
        return type(cast("Any", tree))(parts)
    if is_dataclass(tree) and not isinstance(tree, type):
        named = {field.name: getattr(tree, field.name) for field in fields(tree) if field.init}
        return replace(tree, **{name: mapped(function, part) for name, part in named.items()})
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """All leaves, in order."""
    found: list[Any] = []
    mapped(found.append, tree)
    return found


def joined(join: Callable[[list[Any]], Any], trees: list[Any]) -> Any:
    """Trees of one structure as one, each leaf by `join` of the leaves in its place."""
    columns = zip(*(leaves(tree) for tree in trees), strict=True)
    results = iter([join(list(column)) for column in columns])
    return mapped(lambda _: next(results), trees[0])


def first(tree: Any) -> Any:
    """The first leaf."""
    return leaves(tree)[0]


def is_one(tree: Any) -> bool:
    """True if it is a single array or tensor, and not several together."""
    return not isinstance(tree, (Mapping, tuple, list))


def called(module: Callable[..., Any], inputs: Any) -> Any:
    """A model's outputs: of one array, of the arrays of a tuple in order, or of a dictionary by
    name."""
    if isinstance(inputs, Mapping):
        return module(**cast("Any", inputs))
    if isinstance(inputs, (tuple, list)):
        return module(*cast("Any", inputs))
    return module(inputs)


def shown(tree: Any) -> str:
    """Shapes and types, for a message: float32 [8, 3], (int64 [8], float32 [8, 2]), …"""
    if isinstance(tree, Mapping):
        pairs = cast("Any", tree).items()
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in pairs) + "}"
    if isinstance(tree, (tuple, list)):
        return "(" + ", ".join(shown(part) for part in cast("Any", tree)) + ")"
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        name = str(tree.dtype).removeprefix("torch.")
        return f"{name} [{', '.join(map(str, tree.shape))}]"
    return type(tree).__name__


def _as(tree: Any, pairs: dict[Any, Any]) -> Any:
    """A mapping of the kind of `tree`, such as the outputs of a language model's library."""
    try:
        return type(tree)(**pairs)
    except TypeError:
        return type(tree)(pairs)
