"""Group commit: writers that come while one writes share its transaction, and so its fsync.

    a writer:  wait for the turn; begin the group if there is none; SAVEPOINT, write, RELEASE;
               if nobody waits: COMMIT, and tell the group.  Else: wait to be told.

SQLite has one writer at a time, and a commit costs an fsync. Writers take turns on one connection,
each inside a savepoint of its own, so one that fails takes back what it did and nothing else. A
writer that finds no other waiting commits for all. Guarantee: a block that was left without an
exception is on the disk; one that was left with an exception, of its own or of the commit, is not
there.

A writer reads what the others of its group wrote, as if they had committed before it. If the commit
fails, it fails with them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from potluck.core import StorageError

_MOST = 256
"""The most writers in a group: so the first one is answered, however many keep coming."""


class GroupCommit:
    """The turns of the writers of one process."""

    def __init__(self, begin: Callable[[], Connection]) -> None:
        """`begin` opens a connection and begins a writing transaction on it."""
        self._begin = begin
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._open: _GroupTransaction | None = None

    @contextlib.contextmanager
    def join(self) -> Generator[Connection]:
        """Writes as one of a group; the end of the block waits for the group's commit.

        Raises:
            DBAPIError, StorageError: the group could not begin or commit; nothing of it was kept.
        """
        with self._counting:
            self._waiting += 1
        with self._turn:
            with self._counting:
                self._waiting -= 1
            group = self._open = self._open or _GroupTransaction(self._begin())
            group.size += 1
            try:
                yield from group.write()
            finally:
                if group.error is not None or self._waiting == 0 or group.size >= _MOST:
                    self._open = None
                    group.end()
        group.wait()


class _GroupTransaction:
    """One transaction of several writers."""

    def __init__(self, db: Connection) -> None:
        self.size = 0
        self.error: BaseException | None = None
        self._db = db
        self._over = threading.Event()

    def write(self) -> Generator[Connection]:
        savepoint = self._db.begin_nested()
        try:
            yield self._db
            savepoint.commit()
        except BaseException as error:
            if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
                self.error = error  # SQLite may have rolled back everything
            else:
                savepoint.rollback()
            raise

    def end(self) -> None:
        """Commits, or rolls all of it back."""
        try:
            if self.error is None:
                self._db.commit()
            else:
                with contextlib.suppress(DBAPIError):
                    self._db.rollback()
        except BaseException as error:
            self.error = error
            with contextlib.suppress(DBAPIError):
                self._db.rollback()
            raise
        finally:
            with contextlib.suppress(DBAPIError):
                self._db.close()
            self._over.set()

    def wait(self) -> None:
        """Waits until the group has committed.

        Raises:
            StorageError: it could not.
        """
        self._over.wait()
        if self.error is not None:
            raise StorageError(
                "the database must be writable, and a commit shared with others was not "
                f"({self.error}). Try again: nothing of it was kept."
            ) from self.error
