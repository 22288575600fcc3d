"""Blobs: models and updates, in a local folder or in an object store.

A blob is there as a whole or not at all. In a folder that is a temporary file, fsync, rename, and
fsync of the directory; `put` returns after the last of them. An upload grows as a part, which keeps
its length after any kill: that is the offset at which the device goes on. A whole part is sealed
under a key that nothing had before: in a folder by a hard link, so nothing is copied.

A full disk, a read-only one and a failing one are all `StorageError`, which a server answers with
503. Half-written bytes are removed, or overwritten by the next try. A blob that is missing or too
short, in a store that is itself in order, is a `LostError`: waiting would not help.

Keys are made by the server, never taken from a request: `models/<sha256>`, `optimizers/<sha256>`,
`reports/<round>/<upload>-<random>`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from potluck.core import StorageError
from potluck.core.atomic_files import sync_folder
from potluck.core.errors import LostError
from potluck.server.storage import fault_points

PIECE_BYTES = 1 << 17
"""The bytes of a blob in memory: for each of the devices that download, and twice more with TLS."""
_STALE_SECONDS = 3600
_KINDS = {"models", "optimizers", "parts", "reports", "temporary"}


class BlobStore(Protocol):
    """The interface of a store of blobs."""

    def put(self, key: str, pieces: Iterable[bytes]) -> None:
        """Stores a blob durably, replacing one with the same key."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yields the bytes [start, stop) in pieces of at most a megabyte.

        Raises:
            LostError: there is no such blob, or it ends before `stop`.
        """
        ...

    def size(self, key: str) -> int | None:
        """Returns the bytes of a blob; None if there is none."""
        ...

    def delete(self, prefix: str) -> None:
        """Removes the blob of this key, and all whose keys continue it with a slash."""
        ...

    def append(self, part: str, offset: int, data: bytes | bytearray) -> int:
        """Appends to a part if it is `offset` bytes long. Returns its length, durable."""
        ...

    def part_size(self, part: str) -> int:
        """Returns the bytes of a part; 0 if there is none."""
        ...

    def seal(self, part: str, key: str) -> None:
        """Makes a blob of a part, under a key that nothing has; the part stays until it is dropped.

        Raises:
            LostError: some of the part was dropped meanwhile.
        """
        ...

    def drop(self, part: str) -> None:
        """Removes a part, if there is one."""
        ...


def open_blobs(url: str) -> BlobStore:
    """Opens a folder by its path, or an object store by URL (`s3://bucket/prefix`)."""
    if "://" not in url:
        return FolderStore(url)
    if url.startswith("file://"):
        return FolderStore(url.removeprefix("file://"))
    from potluck.server.storage.object_store import ObjectStore

    return ObjectStore.open(url)


class FolderStore:
    """Blobs in a local folder, which several processes of one machine may share."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._parts = self._folder / "parts"
        self._temporary = self._folder / "temporary"
        with _disk_errors():
            for path in (self._folder, self._parts, self._temporary):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)  # updates are private
            self._close()
            self._sweep()

    def put(self, key: str, pieces: Iterable[bytes]) -> None:
        path = self._folder / key
        temporary = self._temporary / secrets.token_hex(16)
        with _disk_errors():
            try:
                with temporary.open("wb") as file:
                    for piece in pieces:
                        file.write(piece)
                    fault_points.reach("blob.written")
                    file.flush()
                    os.fsync(file.fileno())
                fault_points.reach("blob.synced")
                _place(path, temporary.replace)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        fault_points.reach("blob.done")

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        return self._read(self._folder / key, start, stop)

    def size(self, key: str) -> int | None:
        with _disk_errors():
            try:
                return (self._folder / key).stat().st_size
            except FileNotFoundError:
                return None

    def delete(self, prefix: str) -> None:
        path = self._folder / prefix
        with _disk_errors():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def append(self, part: str, offset: int, data: bytes | bytearray) -> int:
        fault_points.reach("chunk.before-write")
        with _disk_errors(), (self._parts / part).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a retry may meet the request that it repeats
            size = os.fstat(file.fileno()).st_size
            if size != offset:
                return size
            try:
                view, half = memoryview(data), len(data) // 2
                file.write(view[:half])
                file.flush()
                fault_points.reach("chunk.torn")
                file.write(view[half:])
                file.flush()
                fault_points.reach("chunk.before-sync")
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
            finally:
                with contextlib.suppress(OSError):  # an unwritten rest is not tried again
                    file.close()
        if offset == 0:
            sync_folder(self._parts)
        fault_points.reach("chunk.after-sync")
        return offset + len(data)

    def part_size(self, part: str) -> int:
        with _disk_errors():
            try:
                return (self._parts / part).stat().st_size
            except FileNotFoundError:
                return 0

    def seal(self, part: str, key: str) -> None:
        source, path = self._parts / part, self._folder / key
        with _disk_errors():
            try:
                _place(path, path.hardlink_to, source)
            except FileNotFoundError:
                raise LostError(f"the part {part} must be there, got none.") from None
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                self.put(key, self._read(source, 0, None))

    def drop(self, part: str) -> None:
        with _disk_errors():
            (self._parts / part).unlink(missing_ok=True)

    def _read(self, path: Path, start: int, stop: int | None) -> Iterator[bytes]:
        with _disk_errors():
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if stop is not None and stop > size:
                        raise LostError(f"{path.name} must have {stop} bytes, got {size}.")
                    file.seek(start)
                    left = (size if stop is None else stop) - start
                    while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
                        left -= len(piece)
                        yield piece
            except OSError as error:
                if self._is_well():
                    told = f"{path.name} must be readable, got {error.strerror!r}."
                    raise LostError(told) from error
                raise

    def _is_well(self) -> bool:
        """Returns whether the folder is there and keeps writes: one blob may still be lost."""
        probe = self._temporary / secrets.token_hex(16)
        try:
            probe.write_bytes(b"probe")
            is_well = probe.read_bytes() == b"probe"
            probe.unlink()
        except OSError:
            return False
        return is_well

    def _close(self) -> None:
        """Removes other users' access to the blobs; to the folder too, if it holds nothing else."""
        inside = {path.name for path in self._folder.iterdir()}
        folders = [self._folder / name for name in inside & _KINDS]
        for folder in folders + [self._folder] * (inside <= _KINDS):
            found = folder.stat()
            if found.st_mode & 0o077 and found.st_uid == os.getuid():
                folder.chmod(0o700)

    def _sweep(self) -> None:
        """Removes what killed processes left half-written."""
        for path in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def _place(path: Path, move: Callable[[Path], object], source: Path | None = None) -> None:
    """Moves a file into place, durably, in a folder that is made for it."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (path.parent.parent, path.parent.parent.parent):
            sync_folder(folder)
    move(source or path)
    fault_points.reach("blob.renamed")
    sync_folder(path.parent)


@contextlib.contextmanager
def _disk_errors() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the blob folder must be readable and writable, got {error.strerror!r} "
            f"for {error.filename!r}. Make room, or bring it back; nothing acknowledged is lost."
        ) from error
