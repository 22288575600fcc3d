"""Vectors where they are kept: a small one in its row, a large one as a blob.

What is in a row is there with the transaction that wrote the row, and costs no file and no fsync of
its own. And the spec of a run, which says what is in its vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row, select

from potluck.core import Spec, StorageError
from potluck.core.plain_json import to_json
from potluck.protocol import INLINE_BYTES
from potluck.server.blobs import BlobStore
from potluck.server.database import Database
from potluck.server.tables import reports

ROW_BYTES = INLINE_BYTES
"""Of the longest vector that is kept in a row."""
_AT_ONCE = 64
"""Updates from rows that are in memory at a time."""


def read_vector(
    blobs: BlobStore, row: Row[Any], start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """The bytes [start, stop) of a model's or a report's vector, in pieces."""
    if row.content is None:
        return blobs.read(row.key, start, stop)
    return iter((bytes(row.content[start:stop]),))


class Updates:
    """The accepted updates of a round, from rows and blobs, in the order of the clients."""

    def __init__(self, database: Database, blobs: BlobStore, accepted: Sequence[Row[Any]]) -> None:
        self._database, self._blobs = database, blobs
        self._inside = [row.device for row in accepted if row.key is None]
        self._contents: dict[str, bytes] = {}

    def read(self, report: Row[Any]) -> Iterator[bytes]:
        """The bytes of one of them, in pieces."""
        if report.key is not None:
            return self._blobs.read(report.key)
        if report.device not in self._contents:
            at = self._inside.index(report.device)
            names = self._inside[at : at + _AT_ONCE]
            with self._database.read() as db:
                self._contents = _contents(db, report.round, names)
        if report.device not in self._contents:
            raise StorageError(
                f"the update of client {report.client} must be in its row, got none. Restore it."
            )
        return iter((self._contents[report.device],))


def _contents(db: Connection, round: str, devices: Sequence[str]) -> dict[str, bytes]:
    query = select(reports.c.device, reports.c.content).where(
        reports.c.round == round, reports.c.device.in_(devices), reports.c.content.is_not(None)
    )
    return {row.device: bytes(row.content) for row in db.execute(query)}


def write_spec(spec: Spec) -> str:
    """What travels in a run (`core.Spec.packed`), as it is stored."""
    tensors = list(zip(spec.names, spec.shapes, strict=True))
    if spec.num_buffers == 0:
        return to_json(tensors)
    return to_json({"tensors": tensors, "num_statistics": spec.num_buffers})


@lru_cache(maxsize=64)
def read_spec(stored: str) -> Spec:
    """What was stored of a run's spec."""
    told: Any = json.loads(stored)
    has_statistics = "num_statistics" in told
    tensors = told["tensors"] if has_statistics else told
    names, shapes = (tuple(column) for column in zip(*tensors, strict=True))
    statistics = told["num_statistics"] if has_statistics else 0
    return Spec.of_packed(names, tuple(map(tuple, shapes)), statistics)
