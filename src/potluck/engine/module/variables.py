"""Numbers that functions keep in variables: what a loss counts, or a schedule of its own.

    calls = 0
    def loss(outputs, targets):
        global calls
        calls += 1
        return cross_entropy(outputs, targets) + min(calls / 100, 1) * penalty(outputs)

They are the caller's, and no part of the module that is copied. Each client starts from what they
were, so that it does not matter which client came before it, nor in which process. What was None,
or was not there, is so again. Lists that grow are logs, and are left alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, NamedTuple, cast

from torch import nn

_LARGEST = 1000  # entries of a list or a table that may be counters
_NUMBERS = (int, float, bool, NoneType)
_FOREIGN = frozenset({"torch", "numpy", "potluck", "builtins"})


class _Holder(NamedTuple):
    """A place of numbers: named entries of a table, all those of a list or a table, or a cell."""

    name: str
    holder: Any
    keys: tuple[str, ...] | None = None  # None for whatever is there

    def numbers(self) -> dict[Any, Any]:
        """Returns the numbers by key."""
        is_cell = isinstance(self.holder, CellType)
        if self.keys is None and not is_cell and len(self.holder) > _LARGEST:  # data, or a log
            return {}
        if isinstance(self.holder, CellType):
            try:
                pairs = [("", self.holder.cell_contents)]
            except ValueError:  # a variable that is not set yet
                return {}
        elif isinstance(self.holder, list):
            pairs = list(enumerate(cast("list[Any]", self.holder)))
        else:
            table = cast("dict[str, Any]", self.holder)
            keys = list(table) if self.keys is None else self.keys
            pairs = [(key, table[key]) for key in keys if key in table]
        return {key: value for key, value in pairs if type(value) in _NUMBERS}

    def entries(self) -> frozenset[Any]:
        """All keys of a table."""
        return frozenset(cast("Any", self.holder) if isinstance(self.holder, dict) else ())

    def write(self, numbers: dict[Any, Any], entries: frozenset[Any]) -> None:
        """Restores these numbers, and these entries."""
        if isinstance(self.holder, CellType):
            self.holder.cell_contents = numbers[""]
        elif isinstance(self.holder, list):
            if len(cast("list[Any]", self.holder)) == len(numbers):
                self.holder[:] = numbers.values()
        else:
            if self.keys is None:
                for key in self.numbers().keys() - entries:  # made by the first call
                    del self.holder[key]
            self.holder.update(numbers)


class Variables:
    """The numbers in variables that functions read, and the functions that these call."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self._places: list[_Holder] = []
        self._seen: dict[int, Any] = {}
        for function in functions:
            self._visit("", function)
        self._kept: list[tuple[dict[Any, Any], frozenset[Any]]] = []

    @classmethod
    def of(cls, module: nn.Module, loss: Any) -> Variables:
        """Returns the variables that a module and a loss read."""
        kinds: dict[type, None] = dict.fromkeys(map(type, module.modules()))
        return cls([loss, *[getattr(kind, "forward", None) for kind in kinds]])

    def keep(self) -> None:
        """Keeps their present values."""
        self._kept = [
            (place.numbers(), frozenset() if place.keys else place.entries())
            for place in self._places
        ]

    def put_back(self) -> str | None:
        """Restores their values at `keep`. Returns the name of one that had changed, if any."""
        changed = None
        for place, (before, entries) in zip(self._places, self._kept, strict=False):
            now = place.numbers()
            grew = now.keys() != before.keys() and not isinstance(place.holder, (list, CellType))
            if grew or any(_differs(now, key, value) for key, value in before.items()):
                place.write(before, entries)
                changed = place.name
        self._kept = []
        return changed

    @contextmanager
    def held(self) -> Generator[None]:
        """Restores their values at the end of the block."""
        self.keep()
        try:
            yield
        finally:
            self.put_back()

    def _visit(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, MethodType):
            self._visit(name, value.__func__)
        elif isinstance(value, partial):
            self._visit(name, cast("Any", value).func)
        elif isinstance(value, FunctionType):
            if value.__module__.partition(".")[0] not in _FOREIGN:
                self._visit_function(value)
        elif isinstance(value, (dict, list)):
            self._places.append(_Holder(name, value))
        elif _is_own_object(value):
            self._places.append(_Holder(name, vars(value)))

    def _visit_function(self, function: FunctionType) -> None:
        self._places.append(_Holder(function.__name__, function.__dict__))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self._places.append(_Holder(name, cell))
            try:
                self._visit(name, cell.cell_contents)
            except ValueError:  # a variable that is not set yet
                continue
        shared = function.__globals__
        for name in function.__code__.co_names:
            if name in shared:
                self._places.append(_Holder(name, shared, (name,)))
                self._visit(name, shared[name])


def _differs(now: dict[Any, Any], key: Any, before: Any) -> bool:
    return key not in now or (now[key] is not before and now[key] != before)


def _is_own_object(value: Any) -> bool:
    """True if a value is an object of one of the caller's classes, such as a table of settings."""
    return (
        not isinstance(value, (type, ModuleType, nn.Module))
        and hasattr(value, "__dict__")
        and type(value).__module__.partition(".")[0] not in _FOREIGN
    )
