"""A copy of a served run, and the way back; SQLite and PostgreSQL, folders and object stores.

    backup:   the database as it is at one moment; then the models that its rows name; then the
              name under which the copy of the database counts
    restore:  keys, models, and the database last

So a database never names a model that is not there. A backup is a server's folder: potluck.db,
blobs/, the run's key and the certificate. It may be made while servers are at work, and again into
the same folder, where models that are there already are not copied again. Updates of rounds that
are not committed are left out: `serve --restored` begins such rounds anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, inspect, select

from potluck.core import ConfigError, RunError, StorageError
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.server.storage import audit
from potluck.server.storage.blobs import BlobStore, FolderStore, open_blobs
from potluck.server.storage.common_time import SystemTimeSource
from potluck.server.storage.copy_database import copy_all, copy_to_file
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import models, runs
from potluck.server.storage.state_folder import StateFolder

_SECRETS = ("run-*.key", "certificate.pem", "tls.key")


class Copied(NamedTuple):
    """The content of a copy."""

    runs: list[tuple[str, int]]  # name, committed rounds
    models: int  # files, with those of optimizers
    missing: list[str]  # models before the newest that were not whole, and are not in the copy


def back_up(home: StateFolder, database: str | None, blobs: str | None, to: Path) -> Copied:
    """Copies a server's folder, or the places named instead.

    Raises:
        RunError: there is no run, or the folder to write to is another server's.
        StorageError: a place cannot be read or written, or the newest model is not whole.
    """
    if database is None and not (home.folder / "potluck.db").exists():
        raise _nothing(home.folder)
    if to.resolve() == home.folder.resolve():
        raise ConfigError(
            f"a backup must be in a folder of its own, got the server's, {str(to)!r}. Name another."
        )
    made = StateFolder(to)
    made.make()
    _copy_secrets(home.folder, to)
    source = Database(database or home.database)
    with closing(source):
        new = to / "potluck.new"
        copy_to_file(source, new)
        with closing(Database(str(new))) as copy, copy.read() as db:
            copied = _copy_models(db, open_blobs(blobs or home.blobs), FolderStore(made.blobs))
        new.replace(to / "potluck.db")
        with source.write() as db:
            audit.append(db, SystemTimeSource().wall_ms(), "admin", "backup", to=str(to))
    return copied


def restore(backup: Path, home: StateFolder, database: str | None, blobs: str | None) -> Copied:
    """Puts a backup into an empty server's folder, or into empty places named instead.

    Raises:
        RunError: it is no backup, or a server is at work, or the folder has another run's key.
        StorageError: the database is not empty, or a model in the backup is not whole.
    """
    if not (backup / "potluck.db").exists():
        raise _nothing(backup)
    with closing(home.begin()), closing(Database(str(backup / "potluck.db"))) as source:
        _copy_secrets(backup, home.folder)
        target = Database(database or home.database)
        with closing(target), source.snapshot() as db:
            stores = FolderStore(backup / "blobs"), open_blobs(blobs or home.blobs)
            copied = _copy_models(db, *stores)
            copy_all(db, target)
            with target.write() as there:
                audit.append(
                    there, SystemTimeSource().wall_ms(), "admin", "restore", backup=str(backup)
                )
    return copied


def _copy_secrets(source: Path, target: Path) -> None:
    for pattern in _SECRETS:
        for path in source.glob(pattern):
            there, content = target / path.name, path.read_bytes()
            if not there.exists():
                write_whole(there, content, PRIVATE)
            elif there.read_bytes() != content:
                raise RunError(
                    f"{there} must be missing or the same as {path}, got another server's. Name "
                    "an empty folder."
                )


def _copy_models(db: Connection, source: BlobStore, target: BlobStore) -> Copied:
    found = inspect(db)
    if not found.has_table("runs"):
        raise _nothing(Path(db.engine.url.database or ""))
    begun = db.execute(select(runs.c.id, runs.c.name, runs.c.round, runs.c.version)).all()
    newest = {(run.id, run.version) for run in begun}
    named = (models.c.run, models.c.version, models.c.key, models.c.optimizer_key)
    copied, missing = 0, list[str]()
    for row in db.execute(select(*named).order_by(models.c.version)):
        for key in filter(None, (row.key, row.optimizer_key)):
            try:
                if target.size(key) is None:
                    target.put(key, _whole(key, source))
                copied += 1
            except StorageError:
                if (row.run, row.version) in newest:
                    raise
                missing.append(key)
    return Copied([(run.name, run.round) for run in begun], copied, missing)


def _whole(key: str, store: BlobStore) -> Iterator[bytes]:
    """Yields the pieces of a blob, whose name ends with its digest."""
    digest = hashlib.sha256()
    for piece in store.read(key):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != key.rpartition("/")[2]:
        raise StorageError(
            f"{key} must be as it was written, got other bytes. Go on with an older backup."
        )


def _nothing(folder: Path) -> RunError:
    return RunError(
        f"there must be a run's database, got none in {str(folder)!r}. Name the server's folder "
        "with --home, or what it was served with: --database and --blobs."
    )
