"""From files to arrays: reading `.npz`, `.csv` and `.parquet`, and splitting tables into columns.

A table is a pandas `DataFrame`, untyped here. `potluck.tasks.own_data` calls these functions and
checks what they return; they raise a `DataError` that names the file, the client and the column.
"""

from __future__ import annotations

import importlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potluck.core import DataError
from potluck.tasks.columns import Column, alike, check_told_apart, place, read_column
from potluck.tasks.csv_files import read_csv
from potluck.tasks.data import Array
from potluck.tasks.names import client_name

_UNNAMED = re.compile(r"(Unnamed: \d+)?")  # pandas' name for a column without one


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
    """The table in a `.csv` or `.parquet` file, with the names of its columns checked.

    Args:
        text_column: a column that a `.csv` file's numbers are not to be made numbers of.
    """
    pandas: Any = importlib.import_module("pandas")
    suffix = path.suffix.lower()
    try:
        table = pandas.read_parquet(path) if suffix == ".parquet" else read_csv(path, text_column)
    except DataError:
        raise
    # pandas and pyarrow raise many kinds, none of which a user of ours should have to know.
    except Exception as error:
        raise DataError(
            f"{path} must be a whole {suffix} file with one table, got "
            f"error={first_line(error)!r}. Write it anew."
        ) from error
    return named(table, str(path))


def named(table: Any, where: str) -> Any:
    """The same table with text as the names of its columns, all of them different.

    A column without a name that numbers the rows, as `to_csv` writes the index, is left out, and
    so is one without values; `attrs["notes"]` of the table says so.
    """
    if table.columns.nlevels > 1:
        raise DataError(
            f"a column must have one name, got {table.columns.nlevels} levels of names in {where}, "
            f"as {tuple(table.columns[0])!r}. Join them: table.columns.map('_'.join)."
        )
    names = ["" if name is None or name != name else str(name) for name in table.columns]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(
                f"columns must have different names, got column {name!r} {names.count(name)} times "
                f"in {where}. Rename or remove one."
            )
    kept, notes = list(range(len(names))), list(table.attrs.get("notes", ()))
    for position, name in enumerate(names):
        if _UNNAMED.fullmatch(name):
            notes.append(_unnamed(table.iloc[:, position], position, where))
            kept.remove(position)
    result = table.iloc[:, kept].set_axis([names[position] for position in kept], axis=1)
    if notes:
        result.attrs["notes"] = tuple(notes)
    return result


def _unnamed(series: Any, position: int, where: str) -> str:
    """Why a column without a name is left out, in words, or an error."""
    column = f"column {position} of {where} has no name"
    if series.isna().all():
        return f"{column} and no values: it is left out"
    if position == 0 and getattr(series.dtype, "kind", "O") in "iu" and series.is_unique:
        return f"{column} and numbers the rows: it is left out"
    raise DataError(
        f"every column must have a name, got none for column {position} of {where}. "
        "Name it in the header, or remove it."
    )


def split_by_client(located: Located, client_column: str) -> dict[str, Located]:
    """The rows of each client, clients in the order of their first row.

    The client may be a level of the table's index, as after `set_index` or `groupby`.
    """
    table, where = located
    if client_column in table.index.names and client_column not in table.columns:
        table = table.reset_index(level=client_column)
    check_column(Located(table, where), client_column)
    missing = np.flatnonzero(table[client_column].isna().to_numpy(np.bool_))
    if len(missing) > 0:
        raise DataError(
            "every row must name its client, got none in "
            f"{place(client_column, int(missing[0]), where)}. Fill it in, or remove the row."
        )
    keys = table[client_column].astype(object).map(client_name).to_numpy(dtype=object)
    table = table.drop(columns=[client_column])
    table.attrs = {}  # every column of every client would copy them
    groups = table.groupby(keys, sort=False)
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
    read = [
        alike([read_column(table[name], where) for table, where in tables.values()])
        for name in features
    ]
    inputs = {
        key: _features([columns[k] for columns in read], features, located.where)
        for k, (key, located) in enumerate(tables.items())
    }
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


def _features(columns: list[Column], names: list[str], where: str) -> Array:
    features: list[Array] = []
    for name, column in zip(names, columns, strict=True):
        if column.type == "text":
            row = first_text(column)
            raise DataError(
                f"features must be numbers, got {str(column.values[row])!r} in "
                f"{place(name, row, where)}. Encode it as numbers, or remove the column."
            )
        values = np.where(column.missing, np.nan, column.values)
        wrong = np.flatnonzero(~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max))
        if len(wrong) > 0:
            row = int(wrong[0])
            raise DataError(
                f"features must be finite, got {values[row]} in "
                f"{place(name, row, where)}. Fill missing values in, or remove the row."
            )
        features.append(values.astype(np.float32))
        check_told_apart(column, features[-1], name, where)
    return np.stack(features, axis=1)


def _targets(columns: Mapping[str, Located]) -> dict[str, Array]:
    read = {key: read_column(column, where) for key, (column, where) in columns.items()}
    for key, (column, where) in columns.items():
        missing = np.flatnonzero(read[key].missing)
        if len(missing) > 0:
            raise DataError(
                "every example must have a target, got none in "
                f"{place(column.name, int(missing[0]), where)}. Fill it in, or remove the row."
            )
    types = {column.type for column in read.values()}
    if "text" in types and types != {"text"}:
        key = next(key for key, column in read.items() if column.type == "text")
        row = first_text(read[key])
        raise DataError(
            f"targets must be all numbers or all text, got {str(read[key].values[row])!r} in "
            f"{place(columns[key].table.name, row, columns[key].where)}. Make them alike for all "
            "clients."
        )
    return {key: column.values for key, column in read.items()}


def first_text(column: Column) -> int:
    """The row of the first text that is no number, or of the first text."""
    rows = np.flatnonzero(~column.missing)
    for row in rows:
        try:
            float(column.values[row])
        except ValueError:
            return int(row)
    return int(rows[0])
