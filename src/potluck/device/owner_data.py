"""The data of one device: a file of its owner, or one client of an experiment.

All devices must number words alike, and a single one cannot know the numbers. So text is read by
the run's schema alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potluck.core import DataError
from potluck.core.validate import as_integer

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.data.tables.schema import Schema

_SUFFIXES = (".npz", ".csv", ".parquet", ".txt")


def check_own(path: Path) -> None:
    """Refuses a path that cannot be read as a device's data in any run.

    Raises:
        DataError: it is no `.npz`, `.csv`, `.parquet` or `.txt` file, and no folder that holds
            just one.
    """
    from potluck.data.own_text import text_in
    from potluck.data.tables.table_files import read_npz, read_table

    path = _only_file(path)
    if path.suffix.lower() == ".npz":
        read_npz(path)
    elif path.suffix.lower() == ".txt":
        text_in(path)
    else:
        read_table(path)


def read_own(
    path: Path, *, target_column: str | None = None, schema: Schema | None = None
) -> FederatedData:
    """Returns one client, from a `.npz`, `.csv` or `.parquet` file, or a folder that holds just
    one.

    Test examples are held out as in a simulation on a folder of such files.

    Args:
        target_column: of a table; None: that of the schema, or "target".
        schema: the run's. Without one targets are numbers, and the run says what they are
            (`potluck.config.plan.build_planned_task`).

    Raises:
        DataError: it cannot be used.
    """
    from potluck.data import own_data

    path = _only_file(path)
    if schema is None:
        target = target_column or "target"
        return own_data.from_file(path, target_column=target, kind="regression")
    if schema.targets and target_column not in (None, *schema.targets):
        raise DataError(
            f"the target of this run is column {', '.join(map(repr, schema.targets))}, got "
            f"target_column={target_column!r} for {path}. Leave it out, and call the column so."
        )
    return own_data.from_file(path, schema=schema)


def one_client(data: FederatedData, client: int) -> FederatedData:
    """Returns the `client`-th client, from 0, of divided data, alone: for demos and tests.

    Raises:
        DataError: there is no such client.
    """
    from dataclasses import replace

    if not 0 <= as_integer("client", client) < data.num_clients:
        raise DataError(
            f"client must be from 0 to {data.num_clients - 1}, got client={client}. "
            "Name a client of the experiment's partition."
        )
    train, test = data.client(client), data.client_test(client)
    return replace(
        data,
        train=train,
        offsets=np.array([0, train.num_examples]),
        test=test,
        test_offsets=np.array([0, test.num_examples]),
        clients=(data.clients[client],),
    )


def _only_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix.lower() not in _SUFFIXES or not path.exists():
            raise DataError(
                "a device's data must be a .npz, .csv, .parquet or .txt file, or a folder with "
                f"one, got data={str(path)!r}. Name another."
            )
        return path
    files = [
        file
        for file in sorted(path.iterdir())
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
    ]
    if len(files) != 1:
        raise DataError(
            "a device's folder must hold one .npz, .csv, .parquet or .txt file, got "
            f"{len(files)} in data={str(path)!r}. Name the file."
        )
    return files[0]
