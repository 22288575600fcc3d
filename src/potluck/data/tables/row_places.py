"""How messages name a row: by the line of its file, or by its number in the whole table.

What a client has may be some of the rows of a table, so that a row's number among them is of no
use to whoever looks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Rows(str):
    """The name of a client's rows in messages, and where each of them is found."""

    __slots__ = ("_name_of", "_positions", "_table")

    _table: str
    _name_of: Callable[[int], str]
    _positions: NDArray[np.int64] | None

    @classmethod
    def of_table(cls, table: str, name_of: Callable[[int], str]) -> Self:
        """All rows of a table.

        Args:
            name_of: what a row is called, such as "line 7"; called for a message only.
        """
        rows = cls(table)
        rows._table, rows._name_of, rows._positions = table, name_of, None
        return rows

    def some(self, name: str, positions: NDArray[np.int64]) -> Self:
        """Those of one client: their numbers in the table, in order."""
        rows = type(self)(f"{name} of {self._table}")
        rows._table, rows._name_of = f"{self._table} ({name})", self._name_of
        rows._positions = positions
        return rows

    def at(self, row: int) -> str:
        """Where a row is, which is counted from 0 within these."""
        position = row if self._positions is None else int(self._positions[row])
        return f"{self._name_of(position)} of {self._table}"


def numbered(row: int) -> str:
    """The name of a row that has no line, counted from 0."""
    return f"row {row}"


def at(row: int, where: str, what: str = "row") -> str:
    """Where a row is."""
    return where.at(row) if isinstance(where, Rows) else f"{what} {row} of {where}"


def place(column: str, row: int, where: str) -> str:
    """Where a value of a table is."""
    return f"column {column!r}, {at(row, where)}"


def table_rows(where: Any) -> Rows:
    """The rows of a table that is in no file, or that has no lines."""
    return where if isinstance(where, Rows) else Rows.of_table(str(where), numbered)
