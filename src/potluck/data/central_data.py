"""What a server has that has no client data: the schema of the data, and perhaps a test file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from potluck.core import DataError
from potluck.core.text_files import read_text
from potluck.data.federated import Examples, FederatedData
from potluck.data.own_text import lines_of_file
from potluck.data.tables.schema import Schema
from potluck.data.tables.table_files import read_npz, rows_in


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
        inputs, targets = data.schema.symbols.encode(lines_of_file(path, data.schema.symbols))
    elif path.suffix.lower() == ".npz":
        inputs, targets = data.schema.apply_arrays(*read_npz(path), str(path))
    else:
        inputs, targets = data.schema.apply(data.schema.read(path), rows_in(path))
    if len(inputs) == 0:
        raise DataError(f"a test file must have at least one example, got 0 in {path}.")
    return replace(data, test=Examples(inputs, targets), test_offsets=None)
