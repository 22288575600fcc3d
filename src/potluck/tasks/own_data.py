"""A user's own data: a dictionary of clients, a folder with a file per client, or one table.

All three come down to one pair of arrays per client, checked and packed in the same way:

- Inputs are arrays [examples, ...] of one shape for all clients. Floats become float32; integers
  (token ids) become int64, so scale images to floats. Features of tables always become float32.
- What the targets are, classes, a regression or several labels, is what the user says (`kind`);
  what the values show is a proposal, see `potluck.tasks.targets`. Text is mapped to classes in
  sorted order, over all clients together, and the names are kept.
- Unless a test set is given, the last 20 % of each client's examples, in their order, are its test
  examples: at least one of two, and none where a client has only one.

What cannot be used raises a `DataError` that names the client, and the file and column it is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.core.validate import as_count, as_real
from potluck.tasks.data import Array, Examples, FederatedData, num_test
from potluck.tasks.names import client_names
from potluck.tasks.tables import (
    Located,
    first_line,
    named,
    read_npz,
    read_table,
    split_by_client,
    split_columns,
)
from potluck.tasks.targets import Part, TargetKind, understand

Pair = tuple[Any, Any]  # inputs, targets: anything that NumPy makes an array of

_SUFFIXES = (".csv", ".npz", ".parquet")


class _Asked(NamedTuple):
    """What the user says of the data."""

    name: str
    kind: TargetKind | None
    num_classes: int | None
    test_fraction: float = 0.2
    in_tables: bool = False


def from_clients(
    clients: Mapping[str, Pair],
    *,
    test: Pair | Mapping[str, Pair] | None = None,
    test_fraction: float = 0.2,
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    name: str = "own data",
) -> FederatedData:
    """Federated data from `{client: (inputs, targets)}`, in the order of the dictionary.

    Args:
        clients: what is not text is called as it prints: 7, 2024-01-01.
        test: one pair that all clients share, or a dictionary of the clients' own; then
            `test_fraction` is not used, and every example of `clients` is for training.
        kind: what the targets are; None asks the values, and refuses what could be two.
        num_classes: the number of classes, whose labels are then their own codes from 0.

    Raises:
        DataError: data that cannot be used; the message names the client.
    """
    if not clients:
        raise DataError("there must be at least one client, got none. Give {name: (x, y)}.")
    names = client_names(clients)
    places = {key: f"client {key!r}" for key in names.values()}
    train = {names[key]: _examples(pair, places[names[key]]) for key, pair in clients.items()}
    asked = _Asked(name, kind, num_classes, test_fraction)
    if test is None:
        return _held_out(train, places, asked)
    if not isinstance(test, Mapping):
        shared = _examples(test, "the shared test set")
        return _packed(train, places, shared, asked)
    tests = client_names(test)
    strangers = [key for key, tested in tests.items() if tested not in train]
    if strangers:
        raise DataError(
            f"test must name only clients that train, got client={strangers[0]!r}. "
            "Give its training examples too, or leave it out."
        )
    own = {
        tests[key]: _examples(pair, f"the test of {places[tests[key]]}")
        for key, pair in test.items()
    }
    return _packed(train, places, own, asked)


def from_folder(
    folder: str | Path,
    *,
    target_column: str = "target",
    test_fraction: float = 0.2,
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    name: str | None = None,
) -> FederatedData:
    """Federated data from a folder with one file per client, in the order of the file names.

    The files are all `.npz` (arrays `inputs` and `targets`), all `.csv`, or all `.parquet` (a
    target column; every other column is a feature). A client is called as its file without the
    suffix. Hidden files are ignored; any other file or folder is refused, lest a client be lost.

    Raises:
        DataError: a folder or file that cannot be used; the message names it.
    """
    paths = _files_in(Path(folder))
    places = {path.stem: str(path) for path in paths}
    notes: list[str] = []
    if paths[0].suffix.lower() == ".npz":
        pairs = {path.stem: read_npz(path) for path in paths}
    else:
        tables = {path.stem: Located(read_table(path), str(path)) for path in paths}
        notes += [note for table, _ in tables.values() for note in table.attrs.get("notes", ())]
        pairs = split_columns(tables, target_column)
    train = {key: _examples(pair, places[key]) for key, pair in pairs.items()}
    in_tables = paths[0].suffix.lower() != ".npz"
    called = name or Path(folder).name
    data = _held_out(train, places, _Asked(called, kind, num_classes, test_fraction, in_tables))
    return replace(data, notes=(*notes, *data.notes))


def from_table(
    table: Any,
    *,
    client_column: str,
    target_column: str = "target",
    test_fraction: float = 0.2,
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    name: str = "own data",
) -> FederatedData:
    """Federated data from one table that names the client of each row.

    Clients come in the order of their first row, and keep the order of their rows.

    Args:
        table: a pandas `DataFrame`, or the path of a `.csv` or `.parquet` file.
        client_column: names the client; read as text, so that "007" is not "7". It may be a level
            of the index.
        target_column: the target; every column but these two is a feature.

    Raises:
        DataError: a table that cannot be used; the message names the client and the column.
    """
    if isinstance(table, (str, Path)):
        path = Path(table)
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise DataError(
                f"a table must be a .csv or .parquet file, got {path}. "
                "For one .npz file per client call `from_folder`."
            )
        located = Located(read_table(path, text_column=client_column), str(path))
    elif not hasattr(table, "columns"):
        raise TypeError(
            f"table must be a pandas DataFrame or a path, got {type(table).__name__}. "
            "For arrays call `from_clients`."
        )
    else:
        located = Located(named(table, "the table"), "the table")
    if client_column == target_column:
        raise DataError(
            f"clients and targets must be two columns, got column {client_column!r} for both. "
            "Name another."
        )
    tables = split_by_client(located, client_column)
    if not tables:
        raise DataError(f"a table must have at least one row, got none in {located.where}.")
    places = {key: part.where for key, part in tables.items()}
    pairs = split_columns(tables, target_column)
    train = {key: _examples(pair, places[key]) for key, pair in pairs.items()}
    data = _held_out(train, places, _Asked(name, kind, num_classes, test_fraction, True))
    return replace(data, notes=(*located.table.attrs.get("notes", ()), *data.notes))


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"the folder of the clients must exist, got folder={str(folder)!r}.")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not paths:
        raise DataError(
            f"{folder} must hold a .npz, .csv or .parquet file for each client, got no files."
        )
    for path in paths:
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            raise DataError(
                f"{folder} must hold only .npz, .csv or .parquet files, got {path.name}. "
                "Move it elsewhere."
            )
    called: dict[str, Path] = {}
    for path in paths:
        if path.stem in called:
            raise DataError(
                f"the files of {folder} must differ in more than the case of their suffix, got "
                f"{called[path.stem].name} and {path.name}, both for client {path.stem!r}. "
                "Rename one."
            )
        called[path.stem] = path
    client_names(called)
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        raise DataError(
            f"the files in {folder} must be of one kind, got {' and '.join(kinds)}. "
            "Convert them, or make a folder for each kind."
        )
    return paths


def _examples(pair: Any, where: str) -> Examples:
    """The two arrays of one client, converted and checked on their own."""
    if not isinstance(pair, (tuple, list)) or len(cast("list[Any]", pair)) != 2:
        raise DataError(
            f"{where} must be a pair (inputs, targets), got {type(cast(Any, pair)).__name__}. "
            "Give two arrays of equal length."
        )
    values = cast("list[Any]", pair)
    inputs = _array(values[0], f"the inputs of {where}")
    targets = _targets(values[1], f"the targets of {where}")
    if len(inputs) != len(targets):
        raise DataError(
            f"{where} must have one target for each input, got inputs={len(inputs)}, "
            f"targets={len(targets)}. Give arrays of equal length."
        )
    if len(inputs) == 0:
        raise DataError(f"{where} must have at least one example, got 0. Leave it out.")
    return Examples(inputs, targets)


def _targets(values: Any, what: str) -> Array:
    """Text, Booleans, int64 or float32, with an axis of examples; what they mean is asked later."""
    array = _as_array(values, what)
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array.flat):
        array = array.astype(np.str_)
    if array.ndim > 0 and array.dtype.kind in "Ub":
        return array
    return _array(array, what)


def _as_array(values: Any, what: str) -> Array:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} must be an array, got error={first_line(error)!r}. "
            "Give every example the same shape."
        ) from error


def _array(values: Any, what: str) -> Array:
    """Float32 or int64, finite, with an axis of examples."""
    array = _as_array(values, what)
    if array.dtype.kind not in "iufb" or array.ndim == 0:
        raise DataError(
            f"{what} must be an array of numbers with an axis of examples, "
            f"got dtype={array.dtype}, shape={array.shape}. Convert it to floats or integers."
        )
    if array.dtype.kind != "f":
        return array.astype(np.int64)
    with np.errstate(over="ignore"):  # what float32 cannot hold is inf, and found below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(
            f"{what} must be finite numbers, got NaN or infinity in example {row}. "
            "Fill missing values in, or remove the example."
        )
    return array


def _held_out(
    clients: Mapping[str, Examples], places: Mapping[str, str], asked: _Asked
) -> FederatedData:
    """Split the last examples of each client off, as its test examples."""
    test_fraction = as_real("test_fraction", asked.test_fraction)
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"test_fraction must be above 0 and below 1, got test_fraction={test_fraction!r}. "
            "To train on every example, give `from_clients` a test set."
        )
    train: dict[str, Examples] = {}
    own: dict[str, Examples] = {}
    for key, (inputs, targets) in clients.items():
        end = len(inputs) - num_test(len(inputs), test_fraction)
        train[key] = Examples(inputs[:end], targets[:end])
        own[key] = Examples(inputs[end:], targets[end:])
    return _packed(train, places, own, asked)


def _packed(
    train: Mapping[str, Examples],
    places: Mapping[str, str],
    test: Examples | Mapping[str, Examples],
    asked: _Asked,
) -> FederatedData:
    """Check that all parts are alike, give targets their meaning, and pack the clients."""
    parts = [(places[key], examples) for key, examples in train.items()]
    if isinstance(test, Examples):
        parts.append(("the shared test set", test))
    else:
        parts += [(f"the test of {places[key]}", examples) for key, examples in test.items()]
    for part in parts:
        _check_alike(part, parts[0], asked)
    num_classes = asked.num_classes
    if num_classes is not None:
        num_classes = as_count("num_classes", num_classes, 0)
    targets, meaning = understand(
        [Part(where, examples.targets) for where, examples in parts],
        kind=asked.kind,
        num_classes=num_classes,
        in_tables=asked.in_tables,
    )
    examples = [
        Examples(part.inputs, values) for (_, part), values in zip(parts, targets, strict=True)
    ]
    packed, offsets = _joined(examples[: len(train)])
    if isinstance(test, Examples):
        tested, test_offsets = examples[-1], None
    else:
        own = dict(zip(test, examples[len(train) :], strict=True))
        nothing = Examples(*(array[:0] for array in examples[0]))
        tested, test_offsets = _joined(own.get(key, nothing) for key in train)
        if tested.num_examples == 0:
            raise DataError(
                "there must be a test example, got none: a client with one example keeps it for "
                "training. Give `from_clients` a test set: test=(inputs, targets)."
            )
    return FederatedData(
        name=asked.name,
        train=packed,
        offsets=offsets,
        test=tested,
        clients=tuple(train),
        num_classes=meaning.num_classes,
        test_offsets=test_offsets,
        kind=meaning.kind,
        classes=meaning.classes,
        notes=() if meaning.note is None else (meaning.note,),
    )


def _check_alike(part: tuple[str, Examples], first: tuple[str, Examples], asked: _Asked) -> None:
    said = asked.kind is not None or asked.in_tables  # any type of number will do then
    for what, got, expected in zip(("inputs", "targets"), part[1], first[1], strict=True):
        any_type = what == "targets" and (said or "U" in (got.dtype.kind, expected.dtype.kind))
        if got.shape[1:] != expected.shape[1:] or (got.dtype != expected.dtype and not any_type):
            raise DataError(
                f"{what} must have one shape and type for all clients, {expected.shape[1:]} and "
                f"{expected.dtype} as in {first[0]}, got shape={got.shape[1:]}, "
                f"dtype={got.dtype} in {part[0]}. Convert them alike."
            )


def _joined(parts: Iterable[Examples]) -> tuple[Examples, NDArray[np.int64]]:
    parts = list(parts)
    ends = np.cumsum([part.num_examples for part in parts], dtype=np.int64)
    joined = Examples(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )
    return joined, np.concatenate([np.zeros(1, np.int64), ends])
