"""The database: one engine, short transactions, and migrations that run at the start.

SQLite by default, PostgreSQL by URL. A writing transaction of SQLite begins IMMEDIATE, so writers
queue instead of failing half-way; with `synchronous = FULL` and a write-ahead log a commit that
returned is on the disk. Writers of one process queue for a lock of ours, since SQLite's is polled.
Those that come while one writes share its commit, and so one fsync (`group_commit`). On PostgreSQL
transactions are READ COMMITTED, and one that makes a decision locks its row (`for_update`).

Every failure between server and database is one `StorageError`, which a server answers with 503.
Nothing of the transaction was kept, and it may be tried again.

Compatibility: `upgrade` brings any older database to the newest schema; a newer one is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, Executable, Row, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from potluck.core import StorageError
from potluck.server.storage.group_commit import GroupCommit

_BUSY_SECONDS = 20
_CACHE_KIB = 512
"""The cache of each of up to thirty connections to SQLite; the system caches the file."""
_STATEMENTS = 32
"""The prepared statements of each of them: for another number of devices the text is another."""
_LOCK = 0x706F746C75636B  # of PostgreSQL's advisory locks: schema changes and the audit log


class Database:
    """An open database. `read` and `write` give a connection inside a transaction."""

    def __init__(self, url: str) -> None:
        """Connects to `sqlite:///path`, `postgresql+psycopg://…`, or a path of a file."""
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._group_commit = GroupCommit(self._begin)

    @contextlib.contextmanager
    def read(self) -> Generator[Connection]:
        """Opens a consistent view on SQLite; on PostgreSQL, each statement reads what is
        committed."""
        with _storage_errors(), self.engine.begin() as db:
            yield db

    @contextlib.contextmanager
    def write(self) -> Generator[Connection]:
        """Commits at the end of the block, and rolls all of it back on any exception."""
        with _storage_errors():
            if self.is_sqlite:
                with self._group_commit.join() as db:
                    yield db
            else:
                with self.engine.begin() as db:
                    yield db

    def _begin(self) -> Connection:
        db = self.engine.connect().execution_options(potluck_write=True)
        try:
            db.begin()
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Connection]:
        """Opens a view of everything at one moment, on PostgreSQL too."""
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        place = self.engine.connect().execution_options(**options)
        with _storage_errors(), place as db, db.begin():
            yield db

    def upgrade(self, revision: str = "head") -> None:
        """Brings the schema to a version, the newest; several processes may do so at once."""
        config = _migrations()
        with self.write() as db:
            lock(db)
            config.attributes["connection"] = db
            try:
                command.upgrade(config, revision)
            except CommandError as error:
                raise StorageError(
                    f"the database must have a schema that this version knows, got {error}. "
                    "Upgrade Potluck."
                ) from None

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()


def revision_of(db: Connection) -> str | None:
    """Returns the version of a database's schema; None: it is empty."""
    return MigrationContext.configure(db).get_current_revision()


def newest_revision() -> str | None:
    """Returns the version of the schema that this version of Potluck has."""
    return ScriptDirectory.from_config(_migrations()).get_current_head()


def _migrations() -> Config:
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config


def lock(db: Connection) -> None:
    """Excludes other writers until the end of this transaction (which on SQLite is so anyway)."""
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


def one(db: Connection, query: Executable) -> Row[Any] | None:
    """Returns the single row of a query, or None."""
    return db.execute(query).one_or_none()


def as_dict(row: Row[Any]) -> dict[str, Any]:
    """Returns a row by the names of its columns."""
    return dict(row._mapping)  # pyright: ignore[reportPrivateUsage]: public in SQLAlchemy


def _engine(url: str) -> Engine:
    if "://" not in url:
        url = f"sqlite:///{url}"
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError("another database")
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ArgumentError("a database in memory, which does not survive a restart")
        if parsed.get_backend_name() == "postgresql":
            return create_engine(parsed, pool_pre_ping=True, pool_size=20)
    except ArgumentError as error:
        raise ValueError(
            "the database must be sqlite:///path or postgresql://user@host/name, "
            f"got url={url!r} ({error}). Name a file."
        ) from None
    options = {"timeout": _BUSY_SECONDS, "cached_statements": _STATEMENTS}
    engine = create_engine(parsed, connect_args=options, pool_size=20)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin` does
    cursor = connection.cursor()
    file = Path(cursor.execute("PRAGMA database_list").fetchone()[2])
    for path in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
        with contextlib.suppress(OSError):  # another user's, or missing: SQLite raises then
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
    settings = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
    for setting in (*settings, f"cache_size = -{_CACHE_KIB}"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin(db: Connection) -> None:
    writes = db.get_execution_options().get("potluck_write", False)
    db.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _storage_errors() -> Generator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise StorageError(
            f"the database must be reachable and writable, got {str(error.orig).strip()!r}. "
            "Make room, or bring it back; nothing that was acknowledged is lost."
        ) from error
