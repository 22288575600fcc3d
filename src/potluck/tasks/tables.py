"""From files to arrays: reading `.npz`, `.csv` and `.parquet`, and splitting tables into columns.

A table is a pandas `DataFrame`, untyped here. `potluck.tasks.own_data` calls these functions and
checks what they return; they raise a `DataError` that names the file, the client and the column.
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potluck.core import DataError
from potluck.tasks.columns import odd_value, read_column
from potluck.tasks.data import Array


class Located(NamedTuple):
    """The table of one client, and where it is from, for messages."""

    table: Any
    where: str


def read_npz(path: Path) -> tuple[Array, Array]:
    """The arrays `inputs` and `targets` of an `.npz` file; pickled objects are refused."""
    try:
        with path.open("rb") as stream:
            arrays: Any = np.load(stream, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("a single array, as numpy.save writes it")
            if not {"inputs", "targets"} <= set(arrays.files):
                raise DataError(
                    f"{path} must hold arrays called inputs and targets, "
                    f"got {', '.join(arrays.files) or 'none'}. Write it with numpy.savez."
                )
            return arrays["inputs"], arrays["targets"]
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} must be a whole .npz file without pickled objects, got "
            f"error={first_line(error)!r}. Write it anew with numpy.savez."
        ) from error


def read_table(path: Path, text_column: str | None = None) -> Any:
    """The table in a `.csv` or `.parquet` file.

    Args:
        text_column: a column that a `.csv` file's numbers are not to be made numbers of.
    """
    pandas: Any = importlib.import_module("pandas")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pandas.read_parquet(path)
        types = {} if text_column is None else {text_column: str}
        table = pandas.read_csv(path, dtype=types, low_memory=False)
        if not isinstance(table.index, pandas.RangeIndex):
            raise ValueError("more fields in a row than in the header")
        return table
    # pandas and pyarrow raise many kinds, none of which a user of ours should have to know.
    except Exception as error:
        raise DataError(
            f"{path} must be a whole {suffix} file with one table, got "
            f"error={first_line(error)!r}. Write it anew."
        ) from error


def split_by_client(located: Located, client_column: str) -> dict[str, Located]:
    """The rows of each client, clients in the order of their first row."""
    table, where = located
    check_column(located, client_column)
    missing = np.flatnonzero(table[client_column].isna().to_numpy())
    if len(missing) > 0:
        raise DataError(
            f"every row must name its client, got none in column {client_column!r}, row "
            f"{int(missing[0])} of {where}. Fill it in, or remove the row."
        )
    keys = table[client_column].astype(str)
    groups = table.drop(columns=[client_column]).groupby(keys, sort=False)
    return {key: Located(part, f"client {key!r} of {where}") for key, part in groups}


def split_columns(
    tables: Mapping[str, Located], target_column: str
) -> dict[str, tuple[Array, Array]]:
    """Inputs [rows, features] and targets [rows] of each client, of one kind for all of them."""
    first = next(iter(tables.values()))
    for located in tables.values():
        check_column(located, target_column)
        _check_same_columns(located, first)
        if len(located.table) == 0:
            raise DataError(f"{located.where} must have at least one example, got 0. Leave it out.")
    features = [column for column in first.table.columns if column != target_column]
    if not features:
        raise DataError(
            f"there must be a feature column beside {target_column!r}, got none in {first.where}."
        )
    inputs = {key: _features(located, features) for key, located in tables.items()}
    columns = {key: Located(table[target_column], at) for key, (table, at) in tables.items()}
    targets = _targets(columns)
    return {key: (inputs[key], targets[key]) for key in tables}


def check_column(located: Located, column: str) -> None:
    """Raise a `DataError` unless the table has exactly one such column."""
    names = list(located.table.columns)
    if names.count(column) != 1:
        got = ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")
        raise DataError(
            f"{located.where} must have one column {column!r}, got columns {got or 'none'}. "
            "Rename one, or name another."
        )


def first_line(error: Exception) -> str:
    """What an error says, without its details; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_same_columns(located: Located, first: Located) -> None:
    names, expected = list(located.table.columns), list(first.table.columns)
    if names != expected:
        odd = sorted({str(name) for name in set(names) ^ set(expected)})
        difference = f"a difference in {', '.join(odd[:5])}" if odd else "another order"
        raise DataError(
            f"every client must have the columns of {first.where}, got {difference} in "
            f"{located.where}. Give all clients the same columns in the same order."
        )


def _features(located: Located, features: list[Any]) -> Array:
    columns: list[Array] = []
    for name in features:
        column = read_column(located.table[name])
        if column.type not in ("number", "boolean"):
            raise DataError(
                f"features must be numbers, got column {str(name)!r} of {located.where} with "
                f"{odd_value(located.table[name])}. Encode it as numbers, or remove the column."
            )
        values = np.where(column.missing, np.nan, column.values)
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong) > 0:
            row = int(wrong[0])
            raise DataError(
                f"features must be finite, got {values[row]} in column {str(name)!r}, row {row} "
                f"of {located.where}. Fill missing values in, or remove the row."
            )
        columns.append(values)
    return np.stack(columns, axis=1).astype(np.float32)


def _targets(columns: Mapping[str, Located]) -> dict[str, Array]:
    read = {key: read_column(column) for key, (column, _) in columns.items()}
    for key, (column, where) in columns.items():
        missing = np.flatnonzero(read[key].missing)
        if len(missing) > 0:
            raise DataError(
                f"every example must have a target, got none in column {column.name!r}, row "
                f"{int(missing[0])} of {where}. Fill it in, or remove the row."
            )
    types = [column.type for column in read.values()]
    if "other" in types or ("text" in types and set(types) != {"text"}):
        odd = min(read, key=lambda key: ("other", "text", *types).index(read[key].type))
        column, where = columns[odd]
        raise DataError(
            f"targets must be all numbers or all text, got column {column.name!r} of {where} with "
            f"{odd_value(column)}. Make them alike for all clients."
        )
    return {key: column.values for key, column in read.items()}
