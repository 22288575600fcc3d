"""A user's own data: a dictionary of clients, a folder with a file per client, or one table.

All three come down to one pair of arrays per client, checked and packed in the same way:

- Inputs are arrays [examples, ...] of one shape for all clients. Floats become float32; integers
  (token ids) become int64, so scale images to floats (`scale="pixels"` divides by 255). Features of
  tables always become float32. Missing values are refused, or filled in (`missing`); numbers may be
  scaled (`scale`), and columns of text become codes (`categories`), see
  `potluck.data.tables.fitting`.
- Targets are classes, a regression or several labels, as the user says (`kind`). Without `kind` the
  values give a proposal, see `potluck.data.tables.targets`. Text is mapped to classes in sorted
  order, over all clients together, and the names are kept.
- Unless a test set is given, 20 % of each client's examples (`test_fraction`) are its test
  examples. They are drawn by `seed`, of each class its share: at least one of two, and none where a
  client has only one. `split` holds out the last rows, the latest, or whole groups instead, see
  `potluck.data.tables.hold_out`.

All of this is one `Schema`, `data.schema`, which is made once for all clients, or given (`schema`).
What cannot be used raises a `DataError` that names the client, and the file and column it is in.

A server that has no client data has the schema alone (`read_schema`, `without_clients`), and
perhaps a test file (`with_test_file`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from potluck.core import DataError
from potluck.core.text_files import read_text
from potluck.core.validate import as_count
from potluck.data import several
from potluck.data.assembly import Asked, assemble
from potluck.data.federated import Examples, FederatedData
from potluck.data.own_text import from_text as from_text
from potluck.data.own_text import text_of_file, units_of_file
from potluck.data.sources import array_source, table_sources
from potluck.data.tables.client_names import client_names
from potluck.data.tables.fitting import Categories, Missing, Rules, Scale, check_rules
from potluck.data.tables.hold_out import HoldOut
from potluck.data.tables.schema import Schema
from potluck.data.tables.table_files import (
    NOTES,
    Located,
    client_tables,
    files_in,
    read_npz,
    read_table,
    read_tables,
    rows_in,
)
from potluck.data.tables.targets import TargetKind

Pair = tuple[Any, Any]  # inputs, targets: anything that NumPy makes an array of


def from_clients(
    clients: Mapping[str, Pair],
    *,
    test: Pair | Mapping[str, Pair] | None = None,
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    missing: Missing = "refuse",
    scale: Scale = "none",
    split: str = "shuffled",
    test_fraction: float = 0.2,
    seed: int = 0,
    schema: Schema | None = None,
    name: str = "own data",
) -> FederatedData:
    """Federated data from `{client: (inputs, targets)}`, in the order of the dictionary.

    Args:
        clients: what is not text is called as it prints: 7, 2024-01-01. Inputs may be several
            arrays, in a tuple or a dictionary, which a model takes by place or by name.
        test: one pair that all clients share, or a dictionary of the clients' own; then nothing
            is held out, and every example of `clients` is for training.
        kind: what the targets are; None takes the proposal of the values, and refuses what could be
            two.
        num_classes: the number of classes, whose labels are then their own codes from 0.
        missing, scale: of rows of features [examples, features]; "pixels" is for any shape.

    Raises:
        DataError: data that cannot be used; the message names the client.
    """
    if not isinstance(cast(Any, clients), Mapping):
        raise TypeError(
            "clients must be a dictionary {name: (inputs, targets)}, got "
            f"{type(clients).__name__}. Name each client."
        )
    if not clients:
        raise DataError("there must be at least one client, got none. Give {name: (x, y)}.")
    options = (split, test_fraction, seed)
    asked = _asked(name, schema, kind, num_classes, Rules(missing, scale), options)
    asked = replace(asked, columns=True)  # the loss may be one that takes them
    keys = several.keys_of(clients)
    if keys is not None and (missing, scale, schema) != ("refuse", "none", None):
        raise DataError(
            "several inputs of an example are taken as they are, got "
            f"missing={missing!r}, scale={scale!r}, schema={schema!r}. Prepare them before."
        )
    if asked.hold_out.column is not None:
        raise DataError(
            f"arrays have no columns, got split={split!r}. Say 'shuffled' or 'last', or give a "
            "table."
        )
    if keys is None:
        return _of_pairs(clients, test, asked)
    picked = several.picked
    return several.together(
        keys, lambda key: _of_pairs(picked(clients, key), picked(test, key), asked)
    )


def from_folder(
    folder: str | Path,
    *,
    target_column: str | Sequence[str] = "target",
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    missing: Missing = "refuse",
    scale: Scale = "none",
    categories: Categories = "refuse",
    split: str = "shuffled",
    test_fraction: float = 0.2,
    seed: int = 0,
    schema: Schema | None = None,
    name: str | None = None,
) -> FederatedData:
    """Federated data from a folder with one file per client, in the order of the file names.

    The files are all `.npz` (arrays `inputs` and `targets`), all `.csv`, or all `.parquet` (a
    target column; every other column is a feature). A client is called as its file without the
    suffix. Hidden files are ignored. Any other file or folder is refused, so that no client is
    lost.

    Args:
        target_column: its name, or the names of several: labels, or quantities.

    Raises:
        DataError: a folder or file that cannot be used; the message names it.
    """
    rules, options = Rules(missing, scale, categories), (split, test_fraction, seed)
    name = name or Path(folder).name
    asked = _asked(name, schema, kind, num_classes, rules, options, target_column)
    return _of_files(files_in(Path(folder)), asked)


def from_file(
    path: str | Path,
    *,
    target_column: str | Sequence[str] = "target",
    kind: TargetKind | None = None,
    schema: Schema | None = None,
) -> FederatedData:
    """One client from one file, as `from_folder` reads it: a device's own.

    A file with a single example has no test example.

    Raises:
        DataError: a file that cannot be used, or that the schema does not fit.
    """
    path = Path(path)
    if schema is not None and schema.symbols is not None:
        return text_of_file(path, schema, schema.symbols)
    asked = Asked(
        name=path.stem,
        kind=kind,
        schema=schema,
        targets=_column_names(target_column),
        needs_test=False,
    )
    return _of_files([path], asked)


def from_table(
    table: Any,
    *,
    client_column: str,
    target_column: str | Sequence[str] = "target",
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    missing: Missing = "refuse",
    scale: Scale = "none",
    categories: Categories = "refuse",
    split: str = "shuffled",
    test_fraction: float = 0.2,
    seed: int = 0,
    schema: Schema | None = None,
    name: str = "own data",
) -> FederatedData:
    """Federated data from one table that names the client of each row.

    Clients come in the order of their first row, and keep the order of their rows.

    Args:
        table: a pandas `DataFrame`, what has a `to_pandas` (Polars, Arrow), or the path of a
            `.csv` or `.parquet` file.
        client_column: names the client; read as text, so that "007" is not "7". It may be a level
            of the index.
        target_column: the target, or several; every column but these and the one that `split`
            names is a feature.

    Raises:
        DataError: a table that cannot be used; the message names the client and the column.
    """
    rules, options = Rules(missing, scale, categories), (split, test_fraction, seed)
    asked = _asked(name, schema, kind, num_classes, rules, options, target_column)
    client_column = str(client_column)
    if client_column in asked.targets:
        raise DataError(
            f"clients and targets must be two columns, got column {client_column!r} for both. "
            "Name another."
        )
    if split == f"group:{client_column}":
        raise DataError(
            f"test examples are held out of each client, got split={split!r}, which is the column "
            "of the clients. Name another."
        )
    read = read_table if schema is None else schema.read
    return _of_tables(client_tables(table, client_column, read), asked)


def read_schema(path: str | Path) -> Schema:
    """The schema in a JSON file.

    Raises:
        DataError: there is none; the message names the file.
    """
    try:
        return Schema.from_json(read_text(Path(path)))
    except OSError as error:
        raise DataError(
            f"the schema of the data must be in a readable file, got path={str(path)!r} "
            f"({error.strerror}). Write one with `potluck data describe --schema`."
        ) from None
    except (DataError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def without_clients(schema: Schema, *, name: str) -> FederatedData:
    """Federated data of which only the schema is known: no clients, no test examples."""
    targets = {"classes": "int64", "text": schema.input_dtype}.get(schema.kind, "float32")
    nothing = Examples(
        np.zeros((0, *schema.input_shape), schema.input_dtype),
        np.zeros((0, *schema.target_shape), targets),
    )
    return FederatedData(
        name=name,
        train=nothing,
        offsets=np.zeros(1, np.int64),
        test=nothing,
        clients=(),
        num_classes=schema.num_classes,
        padding=None if schema.symbols is None else schema.symbols.padding,
        kind=schema.kind,
        classes=schema.classes,
        schema=schema,
    )


def with_test_file(data: FederatedData, path: str | Path) -> FederatedData:
    """The same data with all examples of a file, which has their schema, as the only test set.

    Raises:
        DataError: the file cannot be used, or does not fit the schema.
    """
    path = Path(path)
    if data.schema is None:
        raise DataError(f"{data.name} has no schema to read {path} by. Give own data.")
    if data.schema.symbols is not None:
        units = units_of_file(path, data.schema.symbols)
        inputs, targets = data.schema.symbols.encode([line for unit in units for line in unit])
    elif path.suffix.lower() == ".npz":
        inputs, targets = data.schema.apply_arrays(*read_npz(path), str(path))
    else:
        inputs, targets = data.schema.apply(data.schema.read(path), rows_in(path))
    if len(inputs) == 0:
        raise DataError(f"a test file must have at least one example, got 0 in {path}.")
    return replace(data, test=Examples(inputs, targets), test_offsets=None)


def _of_pairs(
    clients: Mapping[Any, Pair], test: Pair | Mapping[Any, Pair] | None, asked: Asked
) -> FederatedData:
    names, first = client_names(clients), next(iter(clients.values()))
    train = {
        names[key]: array_source(pair, f"client {names[key]!r}", first)
        for key, pair in clients.items()
    }
    if not isinstance(test, Mapping):
        shared = None if test is None else array_source(test, "the shared test set", first)
        return assemble(train, shared, asked)
    names = client_names(test)
    strangers = names.values() - train.keys()
    if strangers:
        raise DataError(
            f"test must name only clients that train, got client={min(strangers)!r}. "
            "Give its training examples too, or leave it out."
        )
    own = {
        names[key]: array_source(pair, f"the test of client {names[key]!r}", first)
        for key, pair in test.items()
    }
    return assemble(train, own, asked)


def _of_files(paths: Sequence[Path], asked: Asked) -> FederatedData:
    if paths[0].suffix.lower() == ".npz":
        pairs = {path.stem: array_source(read_npz(path), str(path)) for path in paths}
        return assemble(pairs, None, replace(asked, targets=()))
    if asked.schema is not None:
        tables = {path.stem: Located(asked.schema.read(path), rows_in(path)) for path in paths}
    else:
        tables = read_tables(
            paths,
            categories=asked.rules.categories != "refuse",
            classes=asked.targets if asked.kind == "classes" else (),
        )
    return _of_tables(tables, asked)


def _of_tables(tables: Mapping[str, Located], asked: Asked) -> FederatedData:
    features, targets, hold_out = None, asked.targets, asked.hold_out
    if asked.schema is not None:
        asked.schema.check_is(True, next(iter(tables.values())).where)
        features = [feature.name for feature in asked.schema.features]
        targets, hold_out = asked.schema.targets, asked.schema.hold_out
    data = assemble(table_sources(tables, features, targets, hold_out.column), None, asked)
    notes = [note for table, _ in tables.values() for note in table.attrs.get(NOTES, ())]
    return replace(data, notes=(*dict.fromkeys(notes), *data.notes))


def _column_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as text: a frame's columns may be numbers."""
    return tuple(map(str, given if isinstance(given, (list, tuple)) else (given,)))


def _asked(
    name: str,
    schema: Schema | None,
    kind: TargetKind | None,
    num_classes: int | None,
    rules: Rules,
    options: tuple[str, float, int],  # split, test_fraction, seed
    target_column: str | Sequence[str] = (),
) -> Asked:
    """Checks the user's options and returns them together."""
    hold_out = HoldOut.asked(*options)
    check_rules(rules)
    said = (kind, num_classes, rules, hold_out) != (None, None, Rules(), HoldOut())
    if schema is not None and said:
        raise ValueError(
            "a schema says all of kind, num_classes, missing, scale, categories, split, "
            "test_fraction and seed, got one of them beside schema. Leave them out."
        )
    return Asked(
        name=name,
        kind=kind,
        num_classes=None if num_classes is None else as_count("num_classes", num_classes, 0),
        rules=rules,
        hold_out=hold_out,
        schema=schema,
        targets=_column_names(target_column),
    )
