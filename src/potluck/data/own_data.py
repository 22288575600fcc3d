"""A user's own data: a dictionary of clients, a folder with a file per client, or one table.

All three come down to one pair of arrays per client, checked and packed in the same way:

- Inputs are arrays [examples, ...] of one shape for all clients. Floats become float32; integers
  (token ids) become int64, so scale images to floats (`scale="pixels"` divides by 255). Features of
  tables always become float32. Missing values are refused, or filled in (`missing`); numbers may be
  scaled (`scale`), and columns of text become codes (`categories`), see
  `potluck.data.tables.fitting`.
- What the targets are, classes, a regression or several labels, is what the user says (`kind`);
  what the values show is a proposal, see `potluck.data.tables.targets`. Text is mapped to classes
  in sorted order, over all clients together, and the names are kept.
- Unless a test set is given, 20 % of each client's examples (`test_fraction`) are its test
  examples, of each class its share, drawn by `seed`: at least one of two, and none where a client
  has only one. `split` holds out the last rows, the latest, or whole groups instead, see
  `potluck.data.tables.hold_out`.

All of this is one `Schema`, `data.schema`, which is made once for all clients, or given (`schema`).
What cannot be used raises a `DataError` that names the client, and the file and column it is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from potluck.core import DataError
from potluck.core.validate import as_count, as_real
from potluck.data import several
from potluck.data.assembly import Asked, assemble
from potluck.data.central_data import read_schema as read_schema
from potluck.data.central_data import with_test_file as with_test_file
from potluck.data.central_data import without_clients as without_clients
from potluck.data.federated import FederatedData
from potluck.data.own_text import from_text as from_text
from potluck.data.own_text import text_of_file
from potluck.data.sources import array_source, table_sources
from potluck.data.tables.client_names import client_names
from potluck.data.tables.fitting import Categories, Missing, Rules, Scale, check_rules
from potluck.data.tables.hold_out import HoldOut, check_split
from potluck.data.tables.schema import Schema
from potluck.data.tables.table_files import (
    NOTES,
    Located,
    files_in,
    named,
    read_npz,
    read_table,
    read_tables,
    rows_in,
    split_by_client,
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
        kind: what the targets are; None asks the values, and refuses what could be two.
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
    keys = several.keys_of(clients)
    if keys is not None:
        if (missing, scale, schema) != ("refuse", "none", None):
            raise DataError(
                "several inputs of an example are taken as they are, got "
                f"missing={missing!r}, scale={scale!r}, schema={schema!r}. Prepare them before."
            )

        def prepare(key: Any) -> FederatedData:
            tested = test
            if isinstance(test, Mapping):
                tested = {client: several.picked(pair, key) for client, pair in test.items()}
            elif test is not None:
                tested = several.picked(test, key)
            return from_clients(
                {client: several.picked(pair, key) for client, pair in clients.items()},
                test=tested,
                kind=kind,
                num_classes=num_classes,
                split=split,
                test_fraction=test_fraction,
                seed=seed,
                name=name,
            )

        return several.together(keys, prepare)
    if split not in ("shuffled", "last"):
        raise DataError(
            f"arrays have no columns, got split={split!r}. Say 'shuffled' or 'last', or give a "
            "table."
        )
    names = client_names(clients)
    first = next(iter(clients.values()))
    train = {
        names[key]: array_source(pair, f"client {names[key]!r}", first)
        for key, pair in clients.items()
    }
    asked = _asked(
        name=name,
        kind=kind,
        num_classes=num_classes,
        rules=Rules(missing, scale),
        split=split,
        test_fraction=test_fraction,
        seed=seed,
        schema=schema,
    )
    asked = replace(asked, columns=True)  # the loss may be one that takes them
    if test is None or not isinstance(test, Mapping):
        shared = None if test is None else array_source(test, "the shared test set", first)
        return assemble(train, shared, asked)
    tests = client_names(test)
    strangers = [key for key, tested in tests.items() if tested not in train]
    if strangers:
        raise DataError(
            f"test must name only clients that train, got client={strangers[0]!r}. "
            "Give its training examples too, or leave it out."
        )
    own = {
        tests[key]: array_source(pair, f"the test of client {tests[key]!r}", first)
        for key, pair in test.items()
    }
    return assemble(train, own, asked)


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
    suffix. Hidden files are ignored; any other file or folder is refused, lest a client be lost.

    Args:
        target_column: its name, or the names of several: labels, or quantities.

    Raises:
        DataError: a folder or file that cannot be used; the message names it.
    """
    paths = files_in(Path(folder))
    asked = _asked(
        name=name or Path(folder).name,
        kind=kind,
        num_classes=num_classes,
        rules=Rules(missing, scale, categories),
        split=split,
        test_fraction=test_fraction,
        seed=seed,
        schema=schema,
        target_column=target_column,
    )
    return _of_files(paths, asked)


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
    client_column = str(client_column)
    if isinstance(table, (str, Path)):
        path = Path(table)
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise DataError(
                f"a table must be a .csv or .parquet file, got {path}. "
                "For one .npz file per client call `from_folder`."
            )
        texts = [client_column]
        frame = read_table(path, texts) if schema is None else schema.read(path, texts)
        located = Located(frame, rows_in(path))
    elif not hasattr(table, "columns") or not {"iloc", "to_pandas"} & set(dir(table)):
        raise TypeError(
            f"table must be a pandas DataFrame or a path, got {type(table).__name__}. "
            "For arrays call `from_clients`."
        )
    else:
        frame = table if hasattr(table, "iloc") else table.to_pandas()
        located = Located(named(frame, "the table"), "the table")
    if client_column in _column_names(target_column):
        raise DataError(
            f"clients and targets must be two columns, got column {client_column!r} for both. "
            "Name another."
        )
    if split == f"group:{client_column}":
        raise DataError(
            f"test examples are held out of each client, got split={split!r}, which is the column "
            "of the clients. Name another."
        )
    tables = split_by_client(located, client_column)
    if not tables:
        raise DataError(f"a table must have at least one row, got none in {located.where}.")
    asked = _asked(
        name=name,
        kind=kind,
        num_classes=num_classes,
        rules=Rules(missing, scale, categories),
        split=split,
        test_fraction=test_fraction,
        seed=seed,
        schema=schema,
        target_column=target_column,
    )
    return _of_tables(tables, located.table.attrs.get(NOTES, ()), asked)


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
    notes = [note for table, _ in tables.values() for note in table.attrs.get(NOTES, ())]
    return _of_tables(tables, list(dict.fromkeys(notes)), asked)


def _of_tables(tables: Mapping[str, Located], notes: Sequence[str], asked: Asked) -> FederatedData:
    given = asked.schema
    features = None if given is None else [feature.name for feature in given.features]
    targets = asked.targets if given is None else given.targets
    if given is not None:
        given.check_is(True, next(iter(tables.values())).where)
    hold_out = asked.hold_out if given is None else given.hold_out
    sources = table_sources(tables, features, targets, hold_out.column)
    data = assemble(sources, None, asked)
    return replace(data, notes=(*notes, *data.notes))


def _column_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as text: a frame's columns may be numbers."""
    if isinstance(given, (list, tuple)):
        return tuple(map(str, given))
    return (str(given),)


def _asked(
    *,
    name: str,
    kind: TargetKind | None,
    num_classes: int | None,
    rules: Rules,
    split: str,
    test_fraction: float,
    seed: int,
    schema: Schema | None,
    target_column: str | Sequence[str] = (),
) -> Asked:
    """What the user says, checked."""
    fraction = as_real("test_fraction", test_fraction)
    if not 0.0 < fraction < 1.0:
        raise ValueError(
            f"test_fraction must be above 0 and below 1, got test_fraction={test_fraction!r}. "
            "To train on every example, give `from_clients` a test set."
        )
    check_split(split)
    check_rules(rules)
    hold_out = HoldOut(split=split, fraction=fraction, seed=as_count("seed", seed, 0))
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
