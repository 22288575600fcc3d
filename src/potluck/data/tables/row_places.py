"""The name of a row in messages: the line of its file, or its number in the whole table.

A client may own some of the rows of a table. A row's number among those does not help to find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self


class Rows(str):
    """The name of some rows in messages, and where each of them is found."""

    __slots__ = ("name_of",)

    name_of: Callable[[int], str]

    @classmethod
    def of(cls, name: str, name_of: Callable[[int], str]) -> Self:
        """Makes the rows of this name. `name_of` gives the place of a row, counted from 0, for a
        message: "line 7 of t.csv"."""
        rows = cls(name)
        rows.name_of = name_of
        return rows


def at(row: int, where: str, what: str = "row") -> str:
    """Returns the place of a row."""
    return where.name_of(row) if isinstance(where, Rows) else f"{what} {row} of {where}"


def place(column: str, row: int, where: str) -> str:
    """Returns the place of a value in a table."""
    return f"column {column!r}, {at(row, where)}"


def listed(names: Iterable[Any], most: int = 10) -> str:
    """The first of some names."""
    shown = list(map(str, names))
    return ", ".join(shown[:most]) + ", …" * (len(shown) > most)
