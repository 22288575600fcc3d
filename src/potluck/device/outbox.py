"""The finished update of a device: on disk from the moment it is trained until it is accepted.

    outbox/update       the encoded bytes
    outbox/residual     what the encoding lost; the next update gets it, once this one is accepted
    outbox/report.json  what announces it; written last: with it the update exists

A killed device sends it when it is started again. It is dropped when the server refuses it for
good.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from potluck.core import ProtocolError, Vector
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.protocol import Report, encode_message, parse_message


class Owed(NamedTuple):
    """An update to send."""

    report: Report
    body: Path


class Outbox:
    """At most one update that is to be sent, and the residual of the last accepted one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._body = folder / "update"
        self._report = folder / "report.json"
        self._next = folder / "residual"
        self._residual = folder / "accepted-residual"

    def put(self, report: Report, body: bytes, residual: Vector) -> None:
        """Stores an update to be sent. When this returns it survives a power cut."""
        write_whole(self._body, body, PRIVATE)
        write_whole(self._next, residual.astype("<f4").tobytes(), PRIVATE)
        write_whole(self._report, encode_message(report), PRIVATE)

    def owed(self) -> Owed | None:
        """Returns the update that is to be sent, if there is one."""
        try:
            report = parse_message(self._report.read_bytes(), Report)
        except (FileNotFoundError, ProtocolError):
            return None
        return Owed(report, self._body)

    def accept(self) -> None:
        """Notes that the server accepted the update: the next one makes up for what it lost."""
        if self._next.exists():
            self._next.replace(self._residual)
        self.drop()

    def drop(self) -> None:
        """Removes the update."""
        for path in (self._report, self._body, self._next):
            path.unlink(missing_ok=True)

    def residual(self, dim: int) -> Vector | None:
        """Returns what the last accepted update lost, if it has this length."""
        if not self._residual.exists():
            return None
        residual = np.frombuffer(self._residual.read_bytes(), "<f4").astype(np.float32)
        return residual if residual.size == dim else None
