"""Client states on their way between the processes of `workers`: rows of a nameless file.

The file has no name, so it is gone however the process ends. Unwritten rows take no room. It is
read and written with system calls instead of being mapped: a full disk is then an error with a
name, not a signal that kills the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, cast

import numpy as np

from potluck.core import Vector


class ClientStateFile:
    """Numbered vectors of one length that a process and its children share."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this
        self._descriptor = self._file.fileno()

    def read(self, row: int, length: int) -> Vector:
        """Returns a copy of the vector in a row that was written with this length."""
        vector = np.empty(length, np.float32)
        self._move(os.preadv, row, vector)
        return vector

    def write(self, row: int, vector: Vector) -> None:
        """Writes a vector into a row; all are of one length while rows are in use."""
        self._move(os.pwritev, row, np.ascontiguousarray(vector, np.float32))

    def close(self) -> None:
        """Closes the file. Children close theirs when they end."""
        self._file.close()

    def _move(self, move: Callable[..., int], row: int, vector: Vector) -> None:
        rest = memoryview(cast("Any", vector)).cast("B")
        offset = row * len(rest)
        while len(rest) > 0:
            moved = move(self._descriptor, [rest], offset)
            if moved == 0:
                raise OSError(f"row {row} must be written before it is read, got none there.")
            rest, offset = rest[moved:], offset + moved

    # A spawned process is handed the open file; a forked one has it.
    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, handle: Any) -> None:
        self._descriptor = handle.detach()
        self._file = os.fdopen(self._descriptor, "rb+", buffering=0)
