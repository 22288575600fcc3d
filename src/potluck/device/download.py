"""Downloading a model: resumed where it was cut off, and used only when its digest is right.

The part that is here is a file named after the SHA-256 that it will have, so a device that was
restarted goes on too. Other models are deleted: a device keeps one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from potluck.core import ProtocolError, RefusedError, Vector
from potluck.device.connection import Connection, Unanswered
from potluck.protocol import VERSION, Manifest

_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/\d{1,15}")


def download_model(
    connection: Connection,
    manifest: Manifest,
    folder: Path,
    check: Callable[[], None],
) -> Vector:
    """The model of a manifest, [dim], from the folder or the server.

    Args:
        check: called often; what it raises ends the download, and the part stays.

    Raises:
        ProtocolError: "model_digest": it is not the model that the manifest names, twice.
        RefusedError: the server does not give it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / manifest.sha256
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    for _ in range(2):
        _complete(connection, manifest, path, check)
        model = path.read_bytes()
        if hashlib.sha256(model).hexdigest() == manifest.sha256:
            return np.frombuffer(model, "<f4").astype(np.float32)
        path.unlink()
    raise ProtocolError(
        "model_digest",
        f"the model must have the SHA-256 {manifest.sha256} of its manifest, got others, twice.",
    )


def _complete(
    connection: Connection, manifest: Manifest, path: Path, check: Callable[[], None]
) -> None:
    backoff = connection.backoff()
    while _size(path) != manifest.length_bytes:
        check()
        before = _size(path)
        try:
            _fetch(connection, manifest, path, check)
        except Unanswered as error:
            if _size(path) > before:
                backoff.reset()
            backoff.wait(error.retry_after_seconds)
        except RefusedError as error:
            if error.code != "range":
                raise
            path.unlink(missing_ok=True)


def _fetch(
    connection: Connection, manifest: Manifest, path: Path, check: Callable[[], None]
) -> None:
    """One request for what is missing."""
    start = _size(path)
    if start > manifest.length_bytes:
        path.unlink()
        start = 0
    tag = f'"{manifest.sha256}"'
    wanted = {"Range": f"bytes={start}-", "If-Range": tag} if start else {}
    with connection.stream("GET", f"/v{VERSION}/models/{manifest.sha256}", b"", wanted) as answer:
        if answer.status_code not in (200, 206):
            body = b"".join(answer.iter_raw())[:65_536]
            try:
                connection.refuse(answer.status_code, body)
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
