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
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

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


def read_csv(path: Path, texts: Collection[str] = ()) -> Any:
    """The table of a file as a pandas `DataFrame`, whose columns are named by the header.

    Args:
        texts: columns whose values stay text.

    Raises:
        DataError: it is no whole table, or its numbers are ambiguous.
        OSError: it cannot be read.
    """
    try:
        options = _options(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    table = _parsed(path, options, dtype=dict.fromkeys(texts, str), na_values=[""])
    if not table.index.equals(_pandas().RangeIndex(len(table))):
        raise _too_many(path, options, table)
    _check_whole(path, options, table)
    has_commas = False
    for name in table.columns:
        if name not in texts and getattr(table[name].dtype, "kind", "O") in "OU":
            table[name], commas = _typed(table[name], name, path)
            has_commas |= commas
    if has_commas:
        _check_points(path, options, [name for name in table if table[name].dtype.kind == "f"])
    return table


def rows_of(path: Path) -> Rows:
    """The rows of a file, which messages call by their lines, as an editor counts them."""

    def find(row: int) -> str:
        line, _ = next(islice(_records(path, _options(path)), row, None))
        return f"line {line} of {path}"

    return Rows.of(str(path), find)


def _records(path: Path, options: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """The line at which each row below the header begins, and its fields; blank lines, and those
    within quotes, count."""
    above, begin = options["skiprows"] + 1, 1
    with path.open(encoding=options["encoding"], newline="") as file:
        lines = csv.reader(file, delimiter=options["sep"])
        for fields in lines:
            if fields and above > 0:
                above -= 1
            elif fields:
                yield begin, fields
            begin = lines.line_num + 1


def _options(path: Path) -> dict[str, Any]:
    """Returns pandas' options for a file: its encoding, separator and skipped rows."""
    encoding = encoding_of(path)
    with path.open(encoding=encoding) as file:
        start = file.read(1 << 16)
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
    skipped = int(bool(said))
    return {"sep": by, "skipinitialspace": spaced, "skiprows": skipped, "encoding": encoding}


def _first_row(start: str, by: str) -> list[str]:
    for row in csv.reader(io.StringIO(start), delimiter=by):
        if row:
            return row
    return []


def _pandas() -> Any:
    return importlib.import_module("pandas")


def _parsed(path: Path, options: dict[str, Any], **how: Any) -> Any:
    how |= options | {"keep_default_na": False, "low_memory": False}
    return _pandas().read_csv(path, **how)


def _too_many(path: Path, options: dict[str, Any], table: Any) -> DataError:
    header = options["sep"].join(map(str, table.columns))
    return DataError(
        f"{path} must be a whole .csv file, got more fields in a row than in the header "
        f"({header[:_LONGEST]!r}). Give each column a name in the first line, and put a field with "
        f"a {options['sep']!r} in it in quotes."
    )


def _check_whole(path: Path, options: dict[str, Any], table: Any) -> None:
    """Refuses rows that are shorter than the header, which pandas fills with holes, and longer
    ones, of which it takes the first field for a name of the row."""
    if table.shape[1] < 2 or not table.iloc[:, -1].isna().any():
        return
    for line, fields in _records(path, options):
        if len(fields) > table.shape[1]:
            raise _too_many(path, options, table)
        if len(fields) < table.shape[1]:
            raise DataError(
                f"every row must have a field for each of the {table.shape[1]} columns, got "
                f"{len(fields)} in line {line} of {path}. Write it anew."
            )


def _typed(series: Any, name: str, path: Path) -> tuple[Any, bool]:
    """A column with text in it, made numbers or truth values if all of it is; whether it has
    decimal commas."""
    distinct = {value: str(value).strip() for value in series.dropna().unique()}
    texts = {value: text for value, text in distinct.items() if not is_hole(text)}
    forms = {_form(text) for text in texts.values()}
    if not texts or "text" in forms or ("truth" in forms and len(forms) > 1):
        return series, False
    _check_forms(series, texts, forms, name, path)
    known = {value: _value(text) for value, text in texts.items()}
    values = [known.get(value) for value in series]
    return _pandas().Series(values, index=series.index, dtype=object), "comma" in forms


def _form(text: str) -> str:
    if text.lower() in _TRUTHS:
        return "truth"
    if _POINT.fullmatch(text):
        return "point" if "." in text else "whole"
    if _COMMA.fullmatch(text):
        return "comma"
    return "thousands" if _THOUSANDS.fullmatch(text) else "text"


def _value(text: str) -> bool | int | float:
    if text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    try:
        return int(text)
    except ValueError:
        return float(text.replace(",", "."))


def _check_forms(
    series: Any, texts: dict[Any, str], forms: set[str], name: str, path: Path
) -> None:
    """Refuses separators of thousands, and what may be one."""
    commas = [text for text in texts.values() if "," in text]
    if "thousands" in forms:
        form, what = "thousands", "numbers must have no separators of thousands"
    elif "comma" in forms and "point" in forms:
        form, what = "comma", "numbers must have all decimal points or all decimal commas"
    elif commas and all(map(_EITHER.fullmatch, commas)):
        form = "comma"
        what = "numbers must be plain, and a comma before three digits may be either"
    else:
        return
    odd = {value for value, text in texts.items() if _form(text) == form}
    row, value = next((row, value) for row, value in enumerate(series) if value in odd)
    raise DataError(
        f"{what}, got {texts[value]!r} in {place(name, row, rows_of(path))}. Write numbers without "
        "separators of thousands."
    )


def _check_points(path: Path, options: dict[str, Any], names: list[str]) -> None:
    """Refuses 1.234 where other columns have decimal commas: it is a thousand there."""
    raw: Any = _parsed(path, options, dtype=str, usecols=names) if names else None
    for name in names:
        points = [(row, text) for row, text in enumerate(raw[name]) if "." in text]
        if points and all(_EITHER.fullmatch(text.strip()) for _, text in points):
            row, text = points[0]
            raise DataError(
                "numbers must have no separators of thousands, and a point before three digits may "
                f"be one where other columns have decimal commas, got {text!r} in "
                f"{place(name, row, rows_of(path))}. Write numbers without them."
            )
