"""Copies of a whole database, SQLite and PostgreSQL both ways, and upgrades, after a copy.

Tables and columns are taken as they are found, so a database of any version can be copied. The
target gets the schema of the source's version first, and then its rows.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from sqlalchemy import Connection, MetaData, func, insert, select

from potluck.core import StorageError
from potluck.server.storage.database import Database, as_dict, newest_revision, revision_of

_ROWS = 500
"""The rows in memory at a time: one may hold a small model."""
_LOG = logging.getLogger("potluck.server")


def upgrade(database: Database, aside: Path | None) -> None:
    """Brings a database to the newest schema; one that holds an older one is copied first.

    Args:
        aside: the folder for the copy; None: there is none.
    """
    with database.read() as db:
        revision = revision_of(db)
    if aside is not None and revision not in (None, newest_revision()):
        path = aside / f"potluck-{revision}.db"
        copy_to_file(database, path)
        _LOG.warning(
            "the database is of an older version and is brought up to date; a copy of it is %s",
            path,
        )
    database.upgrade()


def copy_to_file(database: Database, path: Path) -> None:
    """Copies a database as it is at one moment into an SQLite file, which is there whole or not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))
    try:
        copy = Database(str(temporary))
        try:
            with database.snapshot() as source:
                copy_all(source, copy)
        finally:
            copy.close()
        temporary.replace(path)
    finally:
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink()


def copy_all(source: Connection, target: Database) -> None:
    """Copys every row into a database that has none.

    Raises:
        StorageError: it has some.
    """
    here, there = MetaData(), MetaData()
    here.reflect(source)
    target.upgrade(revision_of(source) or "base")
    with target.write() as db:
        there.reflect(db)
        for table in there.sorted_tables:
            if table.name == "alembic_version":
                continue
            if db.scalar(select(func.count()).select_from(table)):
                raise StorageError(
                    f"the database to copy into must be empty, got rows in its {table.name}. Name "
                    "another one."
                )
            query = select(here.tables[table.name]).execution_options(yield_per=_ROWS)
            for part in source.execute(query).partitions():
                db.execute(insert(table), [as_dict(row) for row in part])
