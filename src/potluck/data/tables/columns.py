"""One column of a table: numbers, truth values or text, and where it has holes.

    number     of NumPy, pandas, Arrow, Python, `decimal`: int64 if all are whole, else float64
    boolean    bool
    text       str; it is never made numbers here, "007" is no 7

A hole is what pandas takes for missing: None, NaN, NaT, pandas.NA, the rows that a mask or a
categorical leaves out. A column of holes alone is one of numbers. What is neither of the three
(times, lists, complex numbers, a mixture) is refused with column, row and file.
"""

from __future__ import annotations

import decimal
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.data.tables.row_places import place

ColumnType: TypeAlias = Literal["number", "boolean", "text"]

Array = NDArray[Any]
_Family: TypeAlias = Literal["truth values", "whole numbers", "numbers", "text", "other"]

_INT64 = np.iinfo(np.int64)
_HOLES = {"na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "null", "none", "-", ".", "?"}
_EXACT = 2**24  # above it, float32 holds not every whole number
_TOLD_APART = 0.9  # of the different values of a column
_LONGEST = 60  # value in a message


class Column(NamedTuple):
    """The content of a column. A missing value is 0, NaN, False or "" in `values`."""

    type: ColumnType
    values: Array  # [rows]: int64, float64, bool or str
    missing: NDArray[np.bool_]  # [rows]


def read_column(series: Any, where: str = "the table") -> Column:
    """The content of a pandas `Series`.

    Args:
        where: the file or the client that it is of, for messages.
    """
    dtype: Any = series.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "bif":
        return array_column(series.to_numpy())
    if hasattr(series, "sparse"):
        series = series.sparse.to_dense()
    if series.dtype == object:
        series = series.mask(np.array([_is_odd_hole(value) for value in series], np.bool_))
    missing: NDArray[np.bool_] = series.isna().to_numpy(np.bool_)
    if missing.all():
        return Column("number", np.full(len(missing), np.nan), missing)
    kind = "O" if hasattr(series, "cat") else getattr(series.dtype, "kind", "O")
    if kind == "b":
        return Column("boolean", series.to_numpy(np.bool_, na_value=False), missing)
    if kind == "i" or (kind == "u" and series.max() <= _INT64.max):
        return Column("number", series.to_numpy(np.int64, na_value=0), missing)
    if kind == "f":
        return Column("number", series.to_numpy(np.float64, na_value=np.nan), missing)
    values: Array = series.astype(object).to_numpy(dtype=object)
    return _of_objects(values, missing, str(series.name), where)


def array_column(values: Array) -> Column:
    """One feature of an array of numbers, whose holes are NaN. No value is checked: a table of many
    clients has many short columns."""
    kind = values.dtype.kind
    missing = np.isnan(values) if kind == "f" else np.zeros(len(values), np.bool_)
    if kind == "b":
        return Column("boolean", values, missing)
    return Column("number", values.astype(np.float64 if kind == "f" else np.int64), missing)


def is_hole(text: str) -> bool:
    """True if the text stands for a hole among numbers: "NA", "null", "?" and the like."""
    return text.lower() in _HOLES


def alike(columns: Sequence[Column]) -> list[Column]:
    """The same column of several clients: where one has numbers, "NA" alone is no text."""
    if {column.type for column in columns} == {"text"}:
        return list(columns)
    return [
        Column("number", np.full(len(column.missing), np.nan), np.ones(len(column.missing), bool))
        if column.type == "text" and all(map(is_hole, column.values[~column.missing]))
        else column
        for column in columns
    ]


def are_numbers(values: Array) -> NDArray[np.bool_]:
    """Returns a mask of the texts or values that can be read as numbers."""
    return np.array([_is_number(value) for value in values.tolist()], np.bool_)


def first_text(values: Array) -> int:
    """The place of the first text that is no number, or of the first text that is not empty."""
    numbers = are_numbers(values)
    odd = ~numbers & (values != "")
    return int((odd if odd.any() else numbers).argmax())


def check_target(column: Column, name: str, where: str) -> None:
    """Raises a `DataError` where a target column has holes."""
    if column.missing.any():
        raise DataError(
            "every example must have a target, got none in "
            f"{place(name, int(column.missing.argmax()), where)}. Fill it in, or remove the row."
        )


def check_told_apart(column: Column, become: NDArray[np.float32], name: str, where: str) -> None:
    """Raises a `DataError` where whole numbers become the same float32, as identifiers do.

    Args:
        become: [rows], of the values of the column.
    """
    if column.values.dtype.kind != "i" or np.abs(column.values).max(initial=0) <= _EXACT:
        return
    different = len(np.unique(column.values[~column.missing]))
    left = len(np.unique(become[~column.missing]))
    if left < _TOLD_APART * different:
        row = int(np.abs(column.values).argmax())
        raise DataError(
            f"features must differ in float32, which has 24 bits, got {different} different whole "
            f"numbers that become {left}, as {column.values[row]} in {place(name, row, where)}. "
            "Remove an identifier; scale a quantity."
        )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_odd_hole(value: Any) -> bool:
    """True for a hole that pandas does not recognise, or fails on."""
    return value is np.ma.masked or (isinstance(value, decimal.Decimal) and value.is_nan())


def _of_objects(values: Array, missing: NDArray[np.bool_], name: str, where: str) -> Column:
    rows = np.flatnonzero(~missing)
    present: list[Any] = values[rows].tolist()
    families = list(map(_family, map(type, present)))
    _check_families(present, families, rows, name, where)

    def column(kind: ColumnType, fill: Any, made: list[Any]) -> Column:
        full = np.full(len(values), fill, object if kind == "text" else None)
        full[rows] = made
        return Column(kind, full.astype(np.str_) if kind == "text" else full, missing)

    if families[0] == "text":
        for row, text in zip(rows, present, strict=True):
            if "\0" in text:  # NumPy leaves it out at the end
                raise DataError(
                    f"text must have no null characters, got {_shown(text)} in "
                    f"{place(name, int(row), where)}. Remove them."
                )
        return column("text", "", list(map(str, present)))
    if families[0] == "truth values":
        return column("boolean", False, list(map(bool, present)))
    is_whole = set(families) == {"whole numbers"}
    if is_whole and _INT64.min <= min(present) <= max(present) <= _INT64.max:
        return column("number", np.int64(0), present)
    floats = [
        _float(value, name, int(row), where) for row, value in zip(rows, present, strict=True)
    ]
    return column("number", np.nan, floats)


def _check_families(
    present: list[Any], families: Sequence[str], rows: Array, name: str, where: str
) -> None:
    """Raises a `DataError` for the first value of no family, or of another than the first
    value's."""
    if "other" in families:
        index = families.index("other")
        raise DataError(
            "a column must hold numbers, text or truth values, got "
            f"{_shown(present[index])} in {place(name, int(rows[index]), where)}. "
            f"{_advice(present[index])}"
        )
    kinds = ["numbers" if family == "whole numbers" else family for family in families]
    if len(set(kinds)) > 1:
        index = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise DataError(
            f"a column must hold values of one kind, got {kinds[0]} ({_shown(present[0])}) and "
            f"{kinds[index]} ({_shown(present[index])}) in {place(name, int(rows[index]), where)}. "
            "Make them alike."
        )


def _float(value: Any, name: str, row: int, where: str) -> float:
    """Converts to a float, which rounds decimals; a whole number that it would round is refused."""
    try:
        number = float(value)
        is_exact = not isinstance(value, numbers.Integral) or int(number) == int(value)
    except OverflowError:
        number, is_exact = 0.0, False
    if not is_exact:
        raise DataError(
            f"numbers must fit 64 bits, got {_shown(value)} in {place(name, row, where)}. "
            "Scale them, or remove the column."
        )
    return number


def _family(kind: type) -> _Family:
    if issubclass(kind, (bool, np.bool_)):
        return "truth values"
    if issubclass(kind, str):
        return "text"
    if issubclass(kind, np.timedelta64):  # NumPy has it below its integers
        return "other"
    if issubclass(kind, numbers.Integral):
        return "whole numbers"
    if issubclass(kind, (numbers.Real, decimal.Decimal)):
        return "numbers"
    return "other"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def _advice(value: Any) -> str:
    if isinstance(value, bytes):
        return "Decode it to text, or remove the column."
    if isinstance(value, numbers.Complex):
        return "Give its two parts a column each, or remove the column."
    if hasattr(value, "__len__"):
        return "Give each of its values a column, or remove the column."
    # Times, dates, periods and lengths of time have one of these.
    if any(hasattr(value, part) for part in ("year", "hour", "days")):
        return "Make it a number, such as days since some date, or remove the column."
    return "Make it a number or text, or remove the column."
