"""Files that are replaced as a whole, and locks that end with their process.

Guarantee: after a kill or a power cut at any moment a file of `write_whole` has its old content or
the new one. Once the call has returned, it has the new one. A kill may leave `NAME.partial` beside
it, which the next call replaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from potluck.core.errors import RunError

PRIVATE = 0o600
"""The mode of a file that its owner alone may read."""


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replaces a file at once and durably. The caller is its only writer.

    Args:
        mode: of the file, less the process's umask.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may have another mode
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(file)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, if_held: str, mode: int = PRIVATE) -> int:
    """Locks a file, which is made if it is missing, until its descriptor is closed.

    The kernel releases the lock of a process that ended, in whatever way.

    Args:
        if_held: the message for the user where another process holds it.

    Returns:
        The descriptor, for reading and writing.

    Raises:
        RunError: another process holds it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise RunError(if_held) from None
    return file
