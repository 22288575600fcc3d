"""A server's folder: its state and its secrets, unless other places are given.

    potluck.db, blobs/          the state
    run-<name>.key              signs the manifests of a run; devices pin its public half
    certificate.pem, tls.key    the server's own certificate; devices pin its fingerprint
    admin.sock, admin.key       the operators' socket, and their credential
    lock                        held by the process that serves; has its id

The folder is readable by its owner alone. Losing a key means that every device enrols again;
several servers of one run share the keys.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from potluck.core import RunError
from potluck.core.atomic_files import PRIVATE, lock_file, write_whole

_KEY_DIGITS = 64  # of a private key

DEFAULT = Path("potluck-server")


class FolderLock:
    """A process's lock on a server's folder, until `close` or the process's end.

    The kernel releases the lock of a process that was killed. So its holder is certain that the
    process before, whose name is in the file, has ended, and may take over its lead at once.
    """

    def __init__(self, path: Path) -> None:
        self._file = lock_file(
            path,
            f"a server's folder serves one process at a time, got {str(path.parent)!r}, where "
            "another server is at work. Stop it, or name another --home.",
        )
        self.before = os.pread(self._file, 64, 0).decode("ascii", "replace")
        self.id = secrets.token_hex(16)
        os.pwrite(self._file, self.id.encode(), 0)

    def close(self) -> None:
        """Lets another process serve."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StateFolder:
    """A server's folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def make(self) -> None:
        """Makes the folder, for its owner alone, also if it was there for others.

        Raises:
            RunError: it cannot be made so.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_mode & 0o077:
                self.folder.chmod(0o700)
        except OSError as error:
            raise RunError(
                f"the server's folder must be its own, got {error.strerror!r} for "
                f"{str(self.folder)!r}. Name another one with --home."
            ) from None

    def put_aside(self) -> Path | None:
        """Moves state and signing keys into a folder inside this one; None: there is no state.

        Certificate and operators' credential stay, and copies of them go with what was moved. So a
        server on that folder goes on with its run and its devices.

        Raises:
            RunError: a server is at work here; or a file cannot be moved.
        """
        import sqlite3

        if not (self.folder / "potluck.db").exists():
            return None
        life = self.begin()
        try:
            moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            aside = self.folder / f"before-{moment}-{secrets.token_hex(2)}"
            aside.mkdir(mode=0o700)
            for path in (self.certificate, self.private_key):
                if path.exists():
                    write_whole(aside / path.name, path.read_bytes(), PRIVATE)
            with contextlib.closing(sqlite3.connect(self.folder / "potluck.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it is in the one file then
            # The database last: what is interrupted before can be tried again.
            moved = [self.folder / "blobs", *sorted(self.folder.glob("run-*.key"))]
            moved += [*sorted(self.folder.glob("potluck.db-*")), self.folder / "potluck.db"]
            for path in moved:
                if path.exists():
                    path.rename(aside / path.name)
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"the old run must be movable inside {str(self.folder)!r}, got {error}. "
                f"Move it by hand, or name another --home."
            ) from None
        finally:
            life.close()
        return aside

    def begin(self) -> FolderLock:
        """Locks the folder, from which one process serves.

        Raises:
            RunError: another one does.
        """
        self.make()
        return FolderLock(self.folder / "lock")

    @property
    def database(self) -> str:
        return f"sqlite:///{self.folder.resolve() / 'potluck.db'}"

    @property
    def blobs(self) -> str:
        return str(self.folder.resolve() / "blobs")

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def private_key(self) -> Path:
        return self.folder / "tls.key"

    @property
    def socket(self) -> Path:
        return self.folder / "admin.sock"

    def run_key(self, name: str, *, is_new: bool) -> bytes:
        """Returns the private key of a run, made for a new one.

        Raises:
            RunError: the key that the devices of a run pinned is not here.
        """
        from potluck.protocol import new_key

        path = self.folder / f"run-{name}.key"
        if is_new and not path.exists():
            write_whole(path, new_key().hex().encode(), PRIVATE)
        key = _read(path, "the key of a run is made with the run")
        if len(key) != _KEY_DIGITS:
            raise RunError(f"{path} must hold {_KEY_DIGITS} hex digits, got {len(key)} bytes.")
        return bytes.fromhex(key.decode())

    def new_credential(self) -> str:
        """Returns the operators' credential, made at the first start."""
        path = self.folder / "admin.key"
        if not path.exists():
            write_whole(path, secrets.token_urlsafe(32).encode(), PRIVATE)
        return self.credential()

    def credential(self) -> str:
        """Returns the operators' credential.

        Raises:
            RunError: there is none that we may read.
        """
        return _read(self.folder / "admin.key", "`potluck serve` makes it").decode().strip()


def _read(path: Path, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path} must be readable, got {error.strerror!r}: {origin}. "
            "Name the server's folder with --home, or bring the file back."
        ) from None
