"""CSV files as programs and countries write them.

Fields are separated by commas, semicolons, tabs or bars, whichever divides the header into most.
An empty field is a hole. "NA", "null" and the like are holes in a column of numbers; in a column
of text they are text, as they may be names and classes. Decimal commas are read; separators of
thousands are refused, and so is what could be either.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.core.text_files import encoding_of
from potluck.data.tables.columns import is_hole
from potluck.data.tables.row_places import Rows, place

_SEPARATORS = ",;\t|"
_LONGEST = 60  # header in a message

_TRUTHS = {"true": True, "false": False}
_EXCEL = re.compile(r'"?sep=(.)"?\n')
_POINT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COMMA = re.compile(r"[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?")
_EITHER = re.compile(r"[+-]?[1-9]\d{0,2}[,.]\d{3}")  # 1,234: a decimal, or a thousand
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?P<by>[,.' \u00a0\u202f])\d{3}((?P=by)\d{3})*([.,]\d+)?")

Array = NDArray[Any]


def read_csv(path: Path, texts: Collection[str] = ()) -> Any:
    """The table of a file as a pandas `DataFrame`, whose columns are named by the header.

    Args:
        texts: columns whose values stay text.

    Raises:
        DataError: it is no whole table, or its numbers cannot be told.
        OSError: it cannot be read.
    """
    try:
        encoding = encoding_of(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    with path.open(encoding=encoding) as file:
        options = _options(file.read(1 << 16), path) | {"encoding": encoding}
    table = _parsed(path, texts, options)
    _check_whole(path, options, table)
    has_commas = False
    for name in table.columns:
        if name not in texts and _is_text(table[name]):
            table[name], commas = _typed(table[name], name, path)
            has_commas |= commas
    if has_commas:
        _check_points(path, options, [name for name in table if table[name].dtype.kind == "f"])
    return table


def rows_of(path: Path) -> Rows:
    """The rows of a file, which messages call by their lines, as an editor counts them."""
    return Rows.of_table(str(path), lambda row: f"line {_line_of(path, row)}")


def _line_of(path: Path, row: int) -> int:
    """The line at which a row begins; blank lines, and those within quotes, count."""
    encoding = encoding_of(path)
    with path.open(encoding=encoding) as file:
        options = _options(file.read(1 << 16), path)
    with path.open(encoding=encoding, newline="") as file:
        lines = csv.reader(file, delimiter=options["sep"])
        before, records = 0, -1 - options["skiprows"]
        for fields in lines:
            if fields and records == row:
                break
            records += bool(fields)
            before = lines.line_num
    return before + 1


def _options(start: str, path: Path) -> dict[str, Any]:
    """How fields are divided, from the header."""
    said = _EXCEL.match(start)  # by Excel, in a line of its own
    rows = {by: _first_row(start[said.end() :] if said else start, by) for by in _SEPARATORS}
    by = said[1] if said and said[1] in rows else max(rows, key=lambda by: len(rows[by]))
    header = rows[by]
    if not header:
        raise DataError(f"{path} must be a whole .csv file, got an empty one. Write it anew.")
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(
            f"columns must have different names, got column {twice[0]!r} "
            f"{header.count(twice[0])} times in {path}. Rename or remove one."
        )
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return {"sep": by, "skipinitialspace": spaced, "skiprows": int(bool(said))}


def _first_row(start: str, by: str) -> list[str]:
    for row in csv.reader(io.StringIO(start), delimiter=by):
        if row:
            return row
    return []


def _parsed(path: Path, texts: Collection[str], options: dict[str, Any]) -> Any:
    pandas: Any = importlib.import_module("pandas")
    table = pandas.read_csv(
        path,
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
        **options,
    )
    if not table.index.equals(pandas.RangeIndex(len(table))):
        raise _too_many(path, options, table)
    return table


def _too_many(path: Path, options: dict[str, Any], table: Any) -> DataError:
    header = options["sep"].join(map(str, table.columns))
    return DataError(
        f"{path} must be a whole .csv file, got more fields in a row than in the header "
        f"({header[:_LONGEST]!r}). Give each column a name in the first line, and put a field with "
        f"a {options['sep']!r} in it in quotes."
    )


def _check_whole(path: Path, options: dict[str, Any], table: Any) -> None:
    """Refuse rows that are shorter than the header, which pandas fills with holes, and longer ones,
    of which it takes the first field for a name of the row."""
    if table.shape[1] < 2 or not table.iloc[:, -1].isna().any():
        return
    with path.open(encoding=options["encoding"], newline="") as file:
        lines = (fields for fields in csv.reader(file, delimiter=options["sep"]) if fields)
        for _ in range(options["skiprows"]):
            next(lines)
        next(lines)
        for row, fields in enumerate(lines):
            if len(fields) > table.shape[1]:
                raise _too_many(path, options, table)
            if len(fields) < table.shape[1]:
                raise DataError(
                    f"every row must have a field for each of the {table.shape[1]} columns, got "
                    f"{len(fields)} in {rows_of(path).at(row)}. Write it anew."
                )


def _is_text(series: Any) -> bool:
    return getattr(series.dtype, "kind", "O") in "OU"


def _typed(series: Any, name: str, path: Path) -> tuple[Any, bool]:
    """A column with text in it, made numbers or truth values if all of it is; whether it has
    decimal commas."""
    missing: Array = series.isna().to_numpy(np.bool_)
    texts = [str(value).strip() for value in series.to_numpy(dtype=object)]
    rows = [row for row in np.flatnonzero(~missing).tolist() if not is_hole(texts[row])]
    if not rows:
        return series, False
    if all(texts[row].lower() in _TRUTHS for row in rows):
        values = np.full(len(texts), None, object)
        values[rows] = [_TRUTHS[texts[row].lower()] for row in rows]
        return _series(values, series), False
    forms = [_form(texts[row]) for row in rows]
    if "text" in forms:
        return series, False
    _check_forms([(row, texts[row]) for row in rows], forms, name, path)
    values = np.full(len(texts), np.nan, object)
    for row in rows:
        values[row] = _number(texts[row].replace(",", "."))
    return _series(values, series), "comma" in forms


def _form(text: str) -> str:
    if _POINT.fullmatch(text):
        return "point" if "." in text else "whole"
    if _COMMA.fullmatch(text):
        return "comma"
    return "thousands" if _THOUSANDS.fullmatch(text) else "text"


def _check_forms(texts: list[tuple[int, str]], forms: list[str], name: str, path: Path) -> None:
    """Refuse separators of thousands, and what may be them."""

    def refuse(form: str, what: str) -> DataError:
        row, text = texts[forms.index(form)]
        return DataError(
            f"{what}, got {text!r} in {place(name, row, rows_of(path))}. Write numbers without "
            "separators of thousands."
        )

    if "thousands" in forms:
        raise refuse("thousands", "numbers must have no separators of thousands")
    if "comma" not in forms:
        return
    if "point" in forms:
        raise refuse("comma", "numbers must have all decimal points or all decimal commas")
    commas = [text for (_, text), form in zip(texts, forms, strict=True) if form == "comma"]
    if all(_EITHER.fullmatch(text) for text in commas):
        raise refuse(
            "comma", "numbers must be plain, and a comma before three digits may be either"
        )


def _check_points(path: Path, options: dict[str, Any], names: list[str]) -> None:
    """Refuse 1.234 where other columns have decimal commas: it is a thousand there."""
    if not names:
        return
    pandas: Any = importlib.import_module("pandas")
    raw = pandas.read_csv(path, dtype=str, usecols=names, keep_default_na=False, **options)
    for name in names:
        points = [(row, text) for row, text in enumerate(raw[name]) if "." in text]
        if points and all(_EITHER.fullmatch(text.strip()) for _, text in points):
            row, text = points[0]
            raise DataError(
                "numbers must have no separators of thousands, and a point before three digits may "
                f"be one where other columns have decimal commas, got {text!r} in "
                f"{place(name, row, rows_of(path))}. Write numbers without them."
            )


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _series(values: Array, like: Any) -> Any:
    pandas: Any = importlib.import_module("pandas")
    return pandas.Series(values, index=like.index, dtype=object)
