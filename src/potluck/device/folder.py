"""A device's folder: its key, its enrolment, its sequence number, and its updates.

    device.key           its private key, another for each enrolment; never leaves this folder
    invited              the token that the key was made for
    enrolment.json       the server, its certificate, the run and the run's key: pinned for good
    sequence             the number of the last request, stored before the request is sent
    manifest             the highest manifest version that was accepted, and its epoch
    audit                the last hash that it received of the server's audit log
    outbox/, models/     an update that is not accepted yet; the model that is being trained on
    sent/                what was sent, a file for each day

The folder is readable by its owner alone. One process at a time uses it.

Guarantee: after `kill -9` or a power cut at any moment every file is as it was before or after its
last change, and no sequence number is used twice.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from pydantic import ValidationError

from potluck.core import RunError
from potluck.core.atomic_files import PRIVATE, lock_file, write_whole
from potluck.protocol import Message, new_key
from potluck.protocol.keys import KEY_BYTES
from potluck.protocol.messages import Digest, Id, Key, Name
from potluck.protocol.strict_json import MAX_INTEGER, encode_json

_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of opening a folder that may pass."""


class Enrolment(Message):
    """The facts that a device received at its enrolment, and trusts from then on."""

    url: str
    device: Id
    run: Name
    server_key: Key
    certificate: Digest | None


class Home:
    """A device's folder, locked by this process until `close`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock_file(
                self.folder / "lock",
                f"a device's folder serves one process at a time, got home={str(self.folder)!r}, "
                "which is in use. Stop the other one, or name another folder with --home.",
            )
        except OSError as error:
            if error.errno in _PASSING:
                raise
            raise RunError(
                f"a device's folder must be its own, got {error.strerror!r} for "
                f"home={str(self.folder)!r}. Name another one with --home."
            ) from None

    def close(self) -> None:
        """Lets another process use the folder."""
        os.close(self._lock)

    def expect(self, token: str) -> None:
        """Makes a new identity for this token, unless its enrolment was only interrupted.

        Two servers of one key could pass its requests on to each other. Files of the run before are
        removed: its updates are not for another.
        """
        path = self.folder / "invited"
        digest = hashlib.sha256(token.encode()).hexdigest()  # what an older version kept
        if path.exists() and path.read_text() in (token, digest):
            return
        shutil.rmtree(self.folder / "outbox", ignore_errors=True)
        for name in ("manifest", "audit"):
            (self.folder / name).unlink(missing_ok=True)
        write_whole(self.folder / "device.key", new_key().hex().encode(), PRIVATE)
        write_whole(path, token.encode(), PRIVATE)

    def token(self) -> str | None:
        """Returns the token that this device enrolled with, or tried to."""
        path = self.folder / "invited"
        return path.read_text() if path.exists() else None

    def key(self) -> bytes:
        """Returns the device's private key, made at first use.

        Raises:
            RunError: a key that others can read, or that is none.
        """
        path = self.folder / "device.key"
        if not path.exists():
            write_whole(path, new_key().hex().encode(), PRIVATE)
        if path.stat().st_mode & 0o077:
            raise RunError(
                f"{path} must be readable by its owner alone, got mode="
                f"{path.stat().st_mode & 0o777:o}. Run chmod 600 on it, or, if another may have "
                "read it, delete it and enrol again."
            )
        try:
            key = bytes.fromhex(path.read_text())
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise RunError(
                f"{path} must hold {2 * KEY_BYTES} hex digits, got something else. "
                "Bring it back, or delete it and enrol again."
            )
        return key

    def enrolment(self) -> Enrolment | None:
        """Returns the facts of the enrolment; None before.

        Raises:
            RunError: a file that is not what was written.
        """
        path = self.folder / "enrolment.json"
        if not path.exists():
            return None
        try:
            return Enrolment.model_validate_json(path.read_bytes())
        except ValidationError:
            raise RunError(
                f"{path} must be as it was written, got something else. Bring it back, or delete "
                "it and enrol again."
            ) from None

    def keep_enrolment(self, enrolment: Enrolment) -> None:
        """Pins a server and its run."""
        write_whole(self.folder / "enrolment.json", encode_json(enrolment.model_dump()), PRIVATE)

    def next_sequence(self, at_least: int) -> int:
        """Returns a number for one request, above all earlier ones; it is stored first.

        `at_least` matters where the number was lost, or is behind the server's.
        """
        path = self.folder / "sequence"
        last = _read_number(path)
        number = at_least if last is None else max(last + 1, at_least)
        write_whole(path, str(number).encode(), PRIVATE)
        return number

    def double_sequence(self) -> None:
        """Goes on from twice the last number.

        The server has a higher one, from before the number was lost here, or from a clock that was
        ahead.
        """
        last = _read_number(self.folder / "sequence") or 0
        if 2 * last <= MAX_INTEGER:
            self.next_sequence(2 * last)

    def has_sequence(self) -> bool:
        """Returns whether a last sequence number is stored."""
        return _read_number(self.folder / "sequence") is not None

    @property
    def manifest(self) -> tuple[int, int]:
        """Returns the highest accepted epoch and manifest version; 0, 0 before the first."""
        try:
            version, *epoch = map(int, (self.folder / "manifest").read_text().split())
        except (FileNotFoundError, ValueError):
            return 0, 0
        return (epoch[0] if epoch else 0), version

    def accept_manifest(self, version: int, epoch: int = 0) -> None:
        """Refuses older manifests from now on."""
        if (epoch, version) > self.manifest:
            text = f"{version} {epoch}" if epoch else str(version)
            write_whole(self.folder / "manifest", text.encode(), PRIVATE)

    def keep_audit(self, head: str | None) -> None:
        """Keeps a hash of the server's audit log: `potluck audit --since` must find it there."""
        if head is not None:
            write_whole(self.folder / "audit", head.encode(), PRIVATE)


def _read_number(path: Path) -> int | None:
    try:
        number = int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return number if 0 <= number <= MAX_INTEGER else None
