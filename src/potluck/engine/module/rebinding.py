"""Losses and metrics that hold the model, made to hold the copy of it that trains.

    net = Net()
    task = Task(model=net, loss=lambda o, t: cross_entropy(o, t) + 0.01 * norm(net.layer.weight), …)

What trains is a copy of `net`, and another one evaluates. The penalty must act on the weights that
train, so the loss is copied with the module's copy in place of `net`. It is replaced in the
variables of a function, the arguments of a `partial`, the object of a method, the attributes of an
object, and the lists and dictionaries among them. What does not hold the model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeAlias, cast

from torch import nn

_DEEPEST = 5  # of what holds what holds the model
_NOT_ENTERED = ("builtins", "numpy", "torch", "types")  # whose objects hold no model
Pairs: TypeAlias = dict[int, Any]


def twins(module: nn.Module, copied: nn.Module) -> Pairs:
    """Maps the identity of each part, parameter and buffer of a module to its counterpart in the
    copy."""
    theirs = _named(copied)
    return {id(value): theirs[name] for name, value in _named(module).items()}


def _named(module: nn.Module) -> dict[str, Any]:
    some: Any = module
    parts: dict[str, Any] = dict(some.named_modules())
    return parts | dict(module.named_parameters()) | dict(module.named_buffers())


def rebound(value: Any, pairs: Pairs) -> Any:
    """`value` with the second of each pair in the place of the first; itself if it holds none."""
    return Rebinding(pairs).of(value)


class Rebinding:
    """One walk through what a loss or a metric holds."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._done: dict[int, tuple[Any, Any]] = {}  # by identity: what it was, and what it is now

    def of(self, value: Any, depth: int = 0) -> Any:
        if id(value) in self._pairs:
            return self._pairs[id(value)]
        if id(value) not in self._done and depth < _DEEPEST:
            self._done[id(value)] = value, value  # for what holds itself
            self._done[id(value)] = value, self._visit(value, depth + 1)
        return self._done.get(id(value), (value, value))[1]

    def _visit(self, value: Any, depth: int) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, MethodType):
            owner = self.of(value.__self__, depth)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            bound = cast("partial[Any]", value)
            old = [bound.func, bound.args, bound.keywords]
            function, arguments, keywords = new = [self.of(inner, depth) for inner in old]
            made: partial[Any] = partial(function, *arguments, **keywords)
            return made if _changed(new, old) else bound
        if type(value) in (list, tuple):
            row = self._row(value, depth)
            return type(value)(row) if _changed(row, value) else value
        if type(value) is dict:
            table = cast("dict[Any, Any]", value)
            row = self._row(table.values(), depth)
            return dict(zip(table, row, strict=True)) if _changed(row, table.values()) else table
        return self._object(value, depth)

    def _row(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.of(value, depth) for value in values]

    def _function(self, function: FunctionType, depth: int) -> FunctionType:
        cells = function.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        names = [n for n in dict.fromkeys(_names(function.__code__)) if n in function.__globals__]
        read = [function.__globals__[name] for name in names]
        old = [*contents, *read, function.__defaults__, function.__kwdefaults__]
        new = self._row(old, depth)
        if not _changed(new, old):
            return function
        made = FunctionType(
            function.__code__,
            {**function.__globals__, **dict(zip(names, new[len(cells) :], strict=False))},
            function.__name__,
            new[-2],
            tuple(
                cell if inner is content else CellType(inner)
                for cell, content, inner in zip(cells, contents, new, strict=False)
            ),
        )
        made.__kwdefaults__ = new[-1]
        return made

    def _object(self, value: Any, depth: int) -> Any:
        """An object whose attributes hold the model, with others in their places."""
        held: dict[str, Any] = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            parts = [*value.modules(), *value.parameters(), *value.buffers()]
            own = [inner for key, inner in held.items() if not key.startswith("_")]
            if any(id(part) in self._pairs for part in parts) or _changed(
                self._row(own, depth), own
            ):
                return copy.deepcopy(value, dict(self._pairs))
            return value
        if isinstance(value, type) or type(value).__module__.partition(".")[0] in _NOT_ENTERED:
            return value
        row = self._row(held.values(), depth)
        if not _changed(row, held.values()):
            return value
        made = copy.copy(value)
        for key, inner in zip(held, row, strict=True):
            object.__setattr__(made, key, inner)
        return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    """The names of global variables that a function reads, and functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _changed(new: Any, old: Any) -> bool:
    return any(one is not other for one, other in zip(new, old, strict=True))
