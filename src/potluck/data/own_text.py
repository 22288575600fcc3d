"""A user's own text, for next-character prediction: a folder, a table or a dictionary.

An example is a line; empty lines are left out. The test examples of a client are drawn from its
lines, or, in a table, from its rows, so that a message of several lines stays together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from potluck.core import DataError
from potluck.core.text_files import read_text
from potluck.core.validate import as_count
from potluck.data.federated import Examples, FederatedData, joined
from potluck.data.tables.client_names import client_names
from potluck.data.tables.columns import read_column
from potluck.data.tables.hold_out import HoldOut
from potluck.data.tables.row_places import place
from potluck.data.tables.schema import Schema
from potluck.data.tables.symbols import STEPS, Symbols
from potluck.data.tables.table_files import (
    Located,
    check_column,
    client_tables,
    files_in,
    read_table,
    rows_in,
)

Level = Literal["bytes", "characters"]


def from_text(
    source: str | Path | Mapping[str, str | Sequence[str]] | Any,
    *,
    client_column: str = "client",
    text_column: str = "text",
    symbols: Level = "bytes",
    steps: int = STEPS,
    split: str = "shuffled",
    test_fraction: float = 0.2,
    seed: int = 0,
    schema: Schema | None = None,
    name: str | None = None,
) -> FederatedData:
    """Federated data of text, whose targets are the symbols that follow.

    Args:
        source: a folder with one `.txt` file per client, a table (`.csv`, `.parquet` or a pandas
            `DataFrame`) with a column of text, or `{client: text or lines}`.
        symbols: "bytes" of UTF-8, 258 symbols with START and PADDING, as in the data sets that
            come with Potluck; or "characters", the alphabet of all clients.
        steps: symbols in a row; a longer line goes on in the next one.
        schema: the alphabet and all the rest of another federation, instead of these.

    Raises:
        DataError: text that cannot be used; the message names the client.
    """
    if symbols not in ("bytes", "characters"):
        raise ValueError(f"symbols must be 'bytes' or 'characters', got symbols={symbols!r}.")
    hold_out = HoldOut.asked(split, test_fraction, seed)
    if hold_out.column is not None:
        raise DataError(
            f"text is split by lines or rows, got split={split!r}. Say 'shuffled' or 'last'."
        )
    clients, column = _read(source, client_column, text_column)
    if schema is not None:
        rules = schema.symbols
        if rules is None:
            raise DataError(f"the schema must be of text, got kind={schema.kind!r}. Give another.")
        hold_out = schema.hold_out
    elif symbols == "bytes":
        rules = Symbols(steps=as_count("steps", steps), column=column)
    else:
        found = (text for units in clients.values() for unit in units for text in unit)
        rules = Symbols.of(found, as_count("steps", steps), column)
    called = name or (Path(source).stem if isinstance(source, (str, Path)) else "own text")
    data = _packed(clients, rules, hold_out, called)
    if data.test.num_examples == 0:
        raise DataError(
            "there must be a line for the test, got none: a client with one line keeps it for "
            "training. Give more lines."
        )
    return data


def _read(
    source: Any, client_column: str, text_column: str
) -> tuple[dict[str, list[list[str]]], str | None]:
    """Returns the units of each client as lines, which are not taken apart, and the column of a
    table."""
    if isinstance(source, Mapping):
        texts = cast("Mapping[Any, Any]", source)
        if not texts:
            raise DataError("there must be at least one client, got none. Give {name: text}.")
        names = client_names(texts)
        return {names[key]: _lines(text, names[key]) for key, text in texts.items()}, None
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        paths = files_in(Path(source), (".txt",))
        return {path.stem: _lines(text_in(path), path.stem) for path in paths}, None
    tables = client_tables(source, client_column)
    return {key: _column(part, text_column) for key, part in tables.items()}, text_column


def text_of_file(path: Path, schema: Schema, symbols: Symbols) -> FederatedData:
    """One client from one text file or table, by the schema of its run."""
    return _packed({path.stem: units_of_file(path, symbols)}, symbols, schema.hold_out, path.stem)


def units_of_file(path: Path, symbols: Symbols) -> list[list[str]]:
    """Returns the units that are held out whole, as lines: lines of a text file, or rows of a
    table."""
    if path.suffix.lower() == ".txt":
        return _lines(text_in(path), path.stem)
    column = symbols.column or "text"  # also where all of its texts are numbers here
    return _column(Located(read_table(path, [column]), rows_in(path)), column)


def text_in(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f"{path} must be readable, got {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(str(error)) from None


def _lines(text: Any, client: str) -> list[list[str]]:
    """Each line as a unit."""
    if isinstance(text, str):
        return [[line] for line in _split(text)]
    lines: list[Any] = [None]
    if isinstance(text, (list, tuple)):
        lines = list(cast("Sequence[Any]", text))
    if not all(isinstance(line, str) for line in lines):
        raise DataError(
            f"the text of client {client!r} must be a str or a list of lines, got "
            f"{type(cast(Any, text)).__name__}. Decode it."
        )
    return [_split(line) for line in lines if _split(line)]


def _column(located: Located, text_column: str) -> list[list[str]]:
    check_column(located, text_column)
    column = read_column(located.table[text_column], located.where)
    if column.missing.any():
        at = place(text_column, int(column.missing.argmax()), located.where)
        raise DataError(f"every row must have a text, got none in {at}. Remove the row.")
    if column.type != "text":
        raise DataError(
            f"a column of text must hold text, got {column.values[0].item()!r} in "
            f"{place(text_column, 0, located.where)}. Name another column."
        )
    return [lines for lines in map(_split, column.values.tolist()) if lines]


def _split(text: str) -> list[str]:
    return [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]


def _packed(
    clients: Mapping[str, list[list[str]]], symbols: Symbols, hold_out: HoldOut, name: str
) -> FederatedData:
    sides: tuple[list[Examples], list[Examples]] = [], []
    for client, units in clients.items():
        if not units:
            raise DataError(f"client {client!r} must have a line of text, got none. Leave it out.")
        parts = hold_out.divide(np.zeros(len(units), np.float32), None, client)
        for side, rows in zip(sides, parts, strict=True):
            lines = [line for row in rows for line in units[int(row)]]
            side.append(Examples(*symbols.encode(lines)))
    (train, offsets), (test, test_offsets) = map(joined, sides)
    schema = Schema.checked(
        {
            "kind": "text",
            "num_classes": symbols.size,
            "input_shape": (symbols.steps,),
            "input_dtype": symbols.dtype,
            "target_shape": (symbols.steps,),
            "symbols": symbols,
            "hold_out": hold_out,
        }
    )
    return FederatedData(
        name=name,
        train=train,
        offsets=offsets,
        test=test,
        test_offsets=test_offsets,
        clients=tuple(clients),
        num_classes=symbols.size,
        padding=symbols.padding,
        kind="text",
        schema=schema,
    )
