"""Receiving a model: inside its assignment, or downloaded; used only when its digest is right.

A download is resumed where it was cut off.

    models/<SHA-256>         the last model that was complete and verified
    models/<SHA-256>.part    one that is on its way, also after a restart

The old model is removed once the new one is verified. So a device has the last model that it could
verify, whatever a server or an intermediary sends.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from potluck.core import ProtocolError, RefusedError, Vector
from potluck.device.connection import Connection, Unanswered, read_answer
from potluck.device.trouble import Trouble
from potluck.protocol import VERSION, Manifest, decode_inline

_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/\d{1,15}")


def receive_model(
    connection: Connection,
    manifest: Manifest,
    folder: Path,
    check: Callable[[], None],
    inside: str | None = None,
) -> Vector:
    """Returns the model of a manifest, [dim], from its assignment, the folder or the server.

    Args:
        check: called often; what it raises ends the download, and the part stays.
        inside: what the assignment brought.

    Raises:
        ProtocolError: "model_digest": it is not the model that the manifest names; of what is
            downloaded, twice.
        RefusedError: the server does not give it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / manifest.sha256
    given = None if inside is None else _unpack(inside, manifest)
    model = _verified(path, manifest)
    if model is None:
        part = folder / f"{manifest.sha256}.part"
        _keep(folder, lambda name: name == part.name or not name.endswith(".part"))
        if given is None:
            model = _download(connection, manifest, part, check)
        else:
            model = given
            part.write_bytes(given)
        part.replace(path)
    _keep(folder, lambda name: name == path.name)
    return np.frombuffer(model, "<f4").astype(np.float32)


def _unpack(inside: str, manifest: Manifest) -> bytes:
    """Returns the model that an assignment brought, if it is the manifest's."""
    try:
        model = decode_inline(inside, manifest.length_bytes)
    except ProtocolError as error:
        raise ProtocolError("model_digest", str(error)) from None
    if hashlib.sha256(model).hexdigest() != manifest.sha256:
        raise ProtocolError(
            "model_digest",
            f"the model in the assignment must have the SHA-256 {manifest.sha256} of its manifest, "
            "got another.",
        )
    return model


def _verified(path: Path, manifest: Manifest) -> bytes | None:
    """Returns the bytes of a file, if they are the manifest's model."""
    if _size(path) != manifest.length_bytes:
        return None
    model = path.read_bytes()
    return model if hashlib.sha256(model).hexdigest() == manifest.sha256 else None


def _keep(folder: Path, wanted: Callable[[str], bool]) -> None:
    for path in folder.iterdir():
        if not wanted(path.name):
            path.unlink()


def _download(
    connection: Connection, manifest: Manifest, part: Path, check: Callable[[], None]
) -> bytes:
    for _ in range(2):
        _complete(connection, manifest, part, check)
        model = _verified(part, manifest)
        if model is not None:
            return model
        part.unlink()
    raise ProtocolError(
        "model_digest",
        f"the model must have the SHA-256 {manifest.sha256} of its manifest, got others, twice.",
    )


def _complete(
    connection: Connection, manifest: Manifest, path: Path, check: Callable[[], None]
) -> None:
    backoff = connection.backoff()
    trouble = Trouble(backoff)
    while _size(path) != manifest.length_bytes:
        check()
        before = _size(path)
        try:
            _fetch(connection, manifest, path, check)
        except (Unanswered, OSError) as error:
            if _size(path) > before:
                backoff.reset()
            after = error.retry_after_seconds if isinstance(error, Unanswered) else 0.0
            trouble.wait(error, after)
        except RefusedError as error:
            if error.code != "range" or not before:
                raise
            path.unlink(missing_ok=True)


def _fetch(
    connection: Connection, manifest: Manifest, path: Path, check: Callable[[], None]
) -> None:
    """Requests the missing bytes once."""
    start = _size(path)
    if start > manifest.length_bytes:
        path.unlink()
        start = 0
    tag = f'"{manifest.sha256}"'
    wanted = {"Range": f"bytes={start}-", "If-Range": tag} if start else {}
    with connection.stream("GET", f"/v{VERSION}/models/{manifest.sha256}", b"", wanted) as answer:
        if answer.status_code not in (200, 206):
            try:
                connection.refuse(answer.status_code, read_answer(answer))
            except ProtocolError:
                raise Unanswered(f"status {answer.status_code} without a message") from None
        if answer.status_code == 206:
            found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
            if found is None or int(found[1]) != start:
                raise Unanswered("another range than was asked for")
        else:
            start = 0
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(start)
            file.seek(start)
            for part in answer.iter_raw(65_536):
                file.write(part)
                if file.tell() > manifest.length_bytes:
                    file.truncate(0)
                    raise Unanswered("the model is longer than its manifest says")
                check()
            if file.tell() == start:
                raise Unanswered("not a byte of what is missing")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
