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
from potluck.core.validate import as_count, as_real
from potluck.data.federated import Array, Examples, FederatedData
from potluck.data.lines import STEPS
from potluck.data.tables.client_names import client_names
from potluck.data.tables.columns import read_column
from potluck.data.tables.hold_out import HoldOut, check_split
from potluck.data.tables.row_places import place
from potluck.data.tables.schema import Schema
from potluck.data.tables.symbols import Symbols
from potluck.data.tables.table_files import (
    Located,
    check_column,
    named,
    read_table,
    rows_in,
    split_by_client,
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
    check_split(split)
    hold_out = HoldOut(
        split=split,
        fraction=as_real("test_fraction", test_fraction),
        seed=as_count("seed", seed, 0),
    )
    if hold_out.column is not None:
        raise DataError(
            f"text is split by lines or rows, got split={split!r}. Say 'shuffled' or 'last'."
        )
    is_folder = isinstance(source, (str, Path)) and Path(source).is_dir()
    column = None if is_folder or isinstance(source, Mapping) else text_column
    clients = _read(source, client_column, text_column)
    if schema is not None:
        rules = schema.symbols
        if rules is None:
            raise DataError(f"the schema must be of text, got kind={schema.kind!r}. Give another.")
        hold_out = schema.hold_out
    elif symbols == "bytes":
        rules = Symbols(steps=as_count("steps", steps), column=column)
    else:
        texts = (text for units in clients.values() for unit in units for text in unit)
        rules = Symbols.of(texts, as_count("steps", steps), column)
    called = name or (Path(source).stem if isinstance(source, (str, Path)) else "own text")
    return _packed(clients, rules, hold_out, called, needs_test=True)


def text_of_file(path: Path, schema: Schema, symbols: Symbols) -> FederatedData:
    """One client from one text file or table, by the schema of its run."""
    units = _units_of_file(path, symbols)
    return _packed({path.stem: units}, symbols, schema.hold_out, path.stem, needs_test=False)


def lines_of_file(path: Path, symbols: Symbols) -> list[str]:
    """All lines of a text file, or of the column of text of a table."""
    return [line for unit in _units_of_file(path, symbols) for line in unit]


def _units_of_file(path: Path, symbols: Symbols) -> list[list[str]]:
    if path.suffix.lower() == ".txt":
        return _lines(text_in(path), path.stem)
    column = symbols.column or "text"  # also where all of its texts are numbers here
    return _column(Located(read_table(path, [column]), rows_in(path)), column)


def _read(source: Any, client_column: str, text_column: str) -> dict[str, list[list[str]]]:
    """Of each client its units, which are not taken apart, as lines."""
    if isinstance(source, Mapping):
        texts = dict(cast("Mapping[Any, Any]", source))
        if not texts:
            raise DataError("there must be at least one client, got none. Give {name: text}.")
        names = client_names(texts)
        return {names[key]: _lines(text, names[key]) for key, text in texts.items()}
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return {path.stem: _lines(text_in(path), path.stem) for path in _files_in(Path(source))}
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise DataError(
                "text must be a folder of .txt files, or a .csv or .parquet file with a column of "
                f"text, got {path}. Name one of these."
            )
        located = Located(read_table(path, [client_column]), rows_in(path))
    elif hasattr(source, "columns"):
        located = Located(named(source, "the table"), "the table")
    else:
        raise TypeError(
            "text must be a folder, a table, or a dictionary of clients, got "
            f"{type(source).__name__}."
        )
    tables = split_by_client(located, client_column)
    if not tables:
        raise DataError(f"a table must have at least one row, got none in {located.where}.")
    return {key: _column(part, text_column) for key, part in tables.items()}


def _files_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.suffix.lower() != ".txt" or not path.is_file():
            raise DataError(
                f"{folder} must hold only .txt files, got {path.name}. Move it elsewhere."
            )
    if not paths:
        raise DataError(f"{folder} must hold a .txt file for each client, got no files.")
    stems = client_names([path.stem for path in paths])
    if len(stems) < len(paths):
        raise DataError(
            f"the files of {folder} must differ in more than the case of their suffix, got "
            f"{len(paths)} files of {len(stems)} names. Rename one."
        )
    return paths


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
    missing = np.flatnonzero(column.missing)
    if len(missing) > 0:
        at = place(text_column, int(missing[0]), located.where)
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
    clients: Mapping[str, list[list[str]]],
    symbols: Symbols,
    hold_out: HoldOut,
    name: str,
    needs_test: bool,
) -> FederatedData:
    train_parts: list[tuple[Array, Array]] = []
    test_parts: list[tuple[Array, Array]] = []
    for client, units in clients.items():
        if not units:
            raise DataError(f"client {client!r} must have a line of text, got none. Leave it out.")
        parts = hold_out.divide(np.zeros(len(units), np.float32), None, client)
        for side, rows in zip((train_parts, test_parts), parts, strict=True):
            side.append(symbols.encode([line for row in rows for line in units[int(row)]]))
    train, offsets = _joined(train_parts)
    test, test_offsets = _joined(test_parts)
    if needs_test and test.num_examples == 0:
        raise DataError(
            "there must be a line for the test, got none: a client with one line keeps it for "
            "training. Give more lines."
        )
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


def _joined(parts: list[tuple[Array, Array]]) -> tuple[Examples, Any]:
    ends = np.cumsum([len(inputs) for inputs, _ in parts], dtype=np.int64)
    joined = Examples(
        np.concatenate([inputs for inputs, _ in parts]),
        np.concatenate([targets for _, targets in parts]),
    )
    return joined, np.concatenate([np.zeros(1, np.int64), ends])
