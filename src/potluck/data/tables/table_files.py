"""Reads `.npz`, `.csv` and `.parquet` files, and splits tables into clients and columns.

A table is a pandas `DataFrame`, untyped here. `potluck.data.own_data` calls these functions and
checks what they return; they raise a `DataError` that names the file, the client and the column.
"""

from __future__ import annotations

import importlib
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potluck.core import DataError
from potluck.data.tables.client_names import client_name, client_names
from potluck.data.tables.columns import Array, Column, is_hole, read_column
from potluck.data.tables.csv_files import read_csv, rows_of
from potluck.data.tables.row_places import Rows, at, listed, place
from potluck.data.tables.targets import check_spaces

NOTES = "potluck.notes"  # in the `attrs` of a table: what was taken for granted, in words
_UNNAMED = re.compile(r"(Unnamed: \d+)?")  # pandas' name for a column without one
_SUFFIXES = (".csv", ".npz", ".parquet")


class Located(NamedTuple):
    """The table of one client, and where it is from, for messages."""

    table: Any
    where: str


def files_in(folder: Path, suffixes: Sequence[str] = _SUFFIXES) -> list[Path]:
    """The files of a folder, one a client, in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"the folder of the clients must exist, got folder={str(folder)!r}.")
    kinds = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{folder} must hold a {kinds} file for each client, got no files.")
    called: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in suffixes or not path.is_file():
            raise DataError(
                f"{folder} must hold only {kinds} files, got {path.name}. Move it elsewhere."
            )
        if called.setdefault(path.stem, path) != path:
            raise DataError(
                f"the files of {folder} must differ in more than the case of their suffix, got "
                f"{called[path.stem].name} and {path.name}, both for client {path.stem!r}. "
                "Rename one."
            )
    client_names(called)
    found = sorted({path.suffix.lower() for path in paths})
    if len(found) > 1:
        raise DataError(
            f"the files in {folder} must be of one kind, got {' and '.join(found)}. "
            "Convert them, or make a folder for each kind."
        )
    return paths


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


def read_table(path: Path, texts: Collection[str] = ()) -> Any:
    """The table in a `.csv` or `.parquet` file, with the names of its columns checked.

    Args:
        texts: columns of a `.csv` file that are not made numbers or truth values.
    """
    pandas: Any = importlib.import_module("pandas")
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(
            f"a table must be a file that is there, got path={str(path)!r}. Name another."
        )
    if suffix not in (".csv", ".parquet"):
        raise DataError(
            f"a table must be a .csv or .parquet file, got path={str(path)!r}. Save it as CSV."
        )
    try:
        table = pandas.read_parquet(path) if suffix == ".parquet" else read_csv(path, texts)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"a table must be in a readable file, got path={str(path)!r} ({error.strerror}). "
            "Name another."
        ) from None
    # pandas and pyarrow raise many kinds, which users of Potluck should not have to handle.
    except Exception as error:
        raise DataError(
            f"{path} must be a whole {suffix} file with one table, got "
            f"error={first_line(error)!r}. Write it anew."
        ) from error
    return named(table, str(path))


def read_tables(
    paths: Sequence[Path], *, categories: bool, classes: Collection[str]
) -> dict[str, Located]:
    """The tables of many clients, called as their files.

    A column of text in one `.csv` file may look like numbers or truth values in another, as wards
    "1" and "3A" or answers "true" and "unknown" do. It is then text in all of them.

    Args:
        categories: whether text may be a feature; otherwise it is left for a message.
        classes: columns of labels that are classes whatever they look like.
    """
    tables = {path: read_table(path) for path in paths}
    types = {
        path: {name: _type_of(table[name], rows_in(path)) for name in table.columns}
        for path, table in tables.items()
    }
    kinds_of: dict[str, set[str]] = {}
    for name, kind in chain.from_iterable(found.items() for found in types.values()):
        kinds_of.setdefault(name, set()).add(kind)
    texts = {
        name
        for name, kinds in kinds_of.items()
        if "text" in kinds and (categories or name in classes or "number" not in kinds)
    }
    for path in paths:
        odd = {name for name in texts if types[path].get(name) in ("number", "boolean")}
        if odd and path.suffix.lower() == ".csv":
            tables[path] = read_table(path, odd)
    return {path.stem: Located(table, rows_in(path)) for path, table in tables.items()}


def rows_in(path: Path) -> str:
    """The rows of a file, for messages."""
    return rows_of(path) if path.suffix.lower() == ".csv" else str(path)


def _type_of(series: Any, where: str) -> str:
    """Returns the type of a column; "none" where all of it is missing, also as "NA" and the
    like."""
    kind, values, missing = read_column(series, where)
    if missing.all() or (kind == "text" and all(map(is_hole, values[~missing]))):
        return "none"
    return kind


def named(table: Any, where: str) -> Any:
    """The same table with text as the names of its columns, all of them different.

    A column without a name that numbers the rows, as `to_csv` writes the index, is left out, and
    so is one without values; `attrs[NOTES]` of the table says so.
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
    kept, notes = list(range(len(names))), list(table.attrs.get(NOTES, ()))
    for position, name in enumerate(names):
        if _UNNAMED.fullmatch(name):
            notes.append(_unnamed(table.iloc[:, position], position, where))
            kept.remove(position)
    result = table.iloc[:, kept].set_axis([names[position] for position in kept], axis=1)
    if notes:
        result.attrs[NOTES] = tuple(notes)
    return result


def _unnamed(series: Any, position: int, where: str) -> str:
    """Why a column without a name is left out, in words, or an error."""
    column = f"column {position} has no name"
    if series.isna().all():
        return f"{column} and no values: it is left out"
    if position == 0 and getattr(series.dtype, "kind", "O") in "iu" and series.is_unique:
        return f"{column} and numbers the rows: it is left out"
    raise DataError(
        f"every column must have a name, got none for column {position} of {where}. "
        "Name it in the header, or remove it."
    )


def client_tables(
    source: Any, client_column: str, read: Callable[[Path, list[str]], Any] = read_table
) -> dict[str, Located]:
    """The rows of each client in a table: a path, a `DataFrame`, or what has a `to_pandas`.

    Args:
        read: (path, columns that stay text) to the table of a file.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise DataError(
                f"a table must be a .csv or .parquet file, got {path}. Name one, or a folder with "
                "a file for each client."
            )
        located = Located(read(path, [client_column]), rows_in(path))
    elif not hasattr(source, "columns") or not {"iloc", "to_pandas"} & set(dir(source)):
        raise TypeError(
            f"table must be a pandas DataFrame or a path, got {type(source).__name__}. "
            "For arrays call `from_clients`."
        )
    else:
        frame = source if hasattr(source, "iloc") else source.to_pandas()
        located = Located(named(frame, "the table"), "the table")
    tables = split_by_client(located, client_column)
    if not tables:
        raise DataError(f"a table must have at least one row, got none in {located.where}.")
    next(iter(tables.values())).table.attrs[NOTES] = located.table.attrs.get(NOTES, ())
    return tables


def split_by_client(located: Located, client_column: str) -> dict[str, Located]:
    """The rows of each client, clients in the order of their first row.

    The client may be a level of the table's index, as after `set_index` or `groupby`.
    """
    table, where = located
    if client_column in table.index.names and client_column not in table.columns:
        table = table.reset_index(level=client_column)
    check_column(Located(table, where), client_column)
    missing = table[client_column].isna().to_numpy(np.bool_)
    if missing.any():
        raise DataError(
            "every row must name its client, got none in "
            f"{place(client_column, int(missing.argmax()), where)}. Fill it in, or remove the row."
        )
    keys = table[client_column].astype(object).map(client_name).to_numpy(dtype=object)
    check_spaces(list(dict.fromkeys(keys)), "clients", where)
    table = table.drop(columns=[client_column])
    table.attrs = {}  # every column of every client would copy them
    groups = table.groupby(keys, sort=False)

    def rows_of_client(key: str) -> Rows:
        rows, name = groups.indices[key], f"client {key!r}"
        return Rows.of(f"{name} of {where}", lambda row: f"{at(int(rows[row]), where)} ({name})")

    return {key: Located(part, rows_of_client(key)) for key, part in groups}


def named_columns(
    table: Any, expected: Sequence[str], others: Collection[str], where: str
) -> dict[str, Column]:
    """The expected columns by name, in their order, of a table that may have the others."""
    for name in expected:
        check_column(Located(table, where), name)
    known = {*expected, *others}
    extra = [name for name in table.columns if name not in known]
    if extra:
        raise DataError(
            f"{where} must have the columns {listed(expected)} alone, got column {extra[0]!r} "
            "too. Remove it."
        )
    return {name: read_column(table[name], where) for name in expected}


def check_column(located: Located, column: str) -> None:
    """Raises a `DataError` unless the table has such a column."""
    if column not in located.table.columns:
        raise DataError(
            f"{located.where} must have one column {column!r}, got columns "
            f"{listed(located.table.columns) or 'none'}. Rename one, or name another."
        )


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
