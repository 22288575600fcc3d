"""The storage of vectors: a small one in its row, a large one as a blob.

A vector in a row is stored by the transaction that wrote the row, and costs no file and no fsync of
its own. The spec of a run, which names the tensors in its vectors, is stored here, too.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, select

from potluck.core import RefusedError, Spec
from potluck.core.errors import LostError
from potluck.core.plain_json import to_json
from potluck.protocol import INLINE_BYTES
from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.context import Context
from potluck.server.storage.database import Database, one
from potluck.server.storage.database_tables import models, reports

ROW_BYTES = INLINE_BYTES
"""The length of the longest vector that is kept in a row."""
_AT_ONCE = 64
"""The number of updates from rows in memory at a time."""
_PAUSES = (0.05, 0.2)
"""Seconds between tries to read what seems to be lost; a leader leads on meanwhile."""
T = TypeVar("T")


def read_vector(
    blobs: BlobStore, row: Row[Any], start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Returns the bytes [start, stop) of a model's vector, in pieces.

    Raises:
        LostError: they are missing, or too few.
    """
    stop = row.num_bytes if stop is None else stop
    if row.key:
        return blobs.read(row.key, start, stop)
    content = row.content or b""
    if len(content) != row.num_bytes:
        raise LostError(f"a row must have {row.num_bytes} bytes of a model, got {len(content)}.")
    return iter((bytes(content[start:stop]),))


def read_whole(pieces: Callable[[], Iterator[bytes]], sha256: str) -> bytes:
    """Returns all bytes of what was stored with this digest.

    Raises:
        LostError: they are not there, or others.
    """
    content = b"".join(pieces())
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        told = f"got {found[:16]}… of {len(content)} bytes"
        raise LostError(f"what was stored must have the SHA-256 {sha256[:16]}…, {told}.")
    return content


def tries(do: Callable[[], T]) -> T:
    """Calls `do` again, after a moment, where a stored object seems to be lost."""
    for seconds in _PAUSES:
        try:
            return do()
        except LostError:
            time.sleep(seconds)
    return do()


def find_model(context: Context, run: str, sha256: str) -> Row[Any]:
    """Returns the model of a run with this digest: num_bytes, and its key or content.

    Raises:
        RefusedError: not_found.
    """
    query = select(models).where(models.c.run == run, models.c.sha256 == sha256).limit(1)
    with context.database.read() as db:
        row = one(db, query)
    if row is None:
        raise RefusedError("not_found", f"no such model: sha256={sha256!r}.")
    return row


def find_version(context: Context, run: str, version: int) -> Row[Any]:
    """Returns a model version of a run.

    Raises:
        RefusedError: not_found.
    """
    query = select(models).where(models.c.run == run, models.c.version == version)
    with context.database.read() as db:
        row = one(db, query)
    if row is None:
        raise RefusedError(
            "not_found",
            f"no such model: run={run!r}, version={version}. `potluck status` shows the last.",
        )
    return row


def read_model(
    context: Context, run: str, model: Row[Any], start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Yields the bytes [start, stop) of a model's weights, little-endian float32, in pieces.

    Where the model is lost, the leader is made to read it, too.
    """
    try:
        yield from read_vector(context.blobs, model, start, stop)
    except LostError:
        context.suspect(run)
        raise


class Updates:
    """The accepted updates of a round, from rows and blobs, in the order of the clients."""

    def __init__(self, database: Database, blobs: BlobStore, accepted: Sequence[Row[Any]]) -> None:
        self._database, self._blobs = database, blobs
        self._inside = [row.device for row in accepted if row.key is None]
        self._contents: dict[str, bytes] = {}

    def read(self, report: Row[Any]) -> Iterator[bytes]:
        """Returns the bytes of one of them, in pieces."""
        if report.key is not None:
            return self._blobs.read(report.key)
        if report.device not in self._contents:
            at = self._inside.index(report.device)
            names = self._inside[at : at + _AT_ONCE]
            with self._database.read() as db:
                self._contents = _contents(db, report.round, names)
        if report.device not in self._contents:
            raise LostError(f"the update of client {report.client} must be in its row, got none.")
        return iter((self._contents[report.device],))


def _contents(db: Connection, round: str, devices: Sequence[str]) -> dict[str, bytes]:
    query = select(reports.c.device, reports.c.content).where(
        reports.c.round == round, reports.c.device.in_(devices), reports.c.content.is_not(None)
    )
    return {row.device: bytes(row.content) for row in db.execute(query)}


def write_spec(spec: Spec) -> str:
    """Returns the spec of what travels in a run (`core.Spec.packed`), as it is stored."""
    tensors = list(zip(spec.names, spec.shapes, strict=True))
    if spec.num_buffers == 0:
        return to_json(tensors)
    return to_json({"tensors": tensors, "num_statistics": spec.num_buffers})


@lru_cache(maxsize=64)
def read_spec(stored: str) -> Spec:
    """Reads a run's stored spec."""
    told: Any = json.loads(stored)
    has_statistics = "num_statistics" in told
    tensors = told["tensors"] if has_statistics else told
    names, shapes = (tuple(column) for column in zip(*tensors, strict=True))
    statistics = told["num_statistics"] if has_statistics else 0
    return Spec.of_packed(names, tuple(map(tuple, shapes)), statistics)
