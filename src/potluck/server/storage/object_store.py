"""Blobs in an object store: S3, or one with its interface, through obstore.

An object store writes an object as a whole or not at all, which is what a blob needs. It cannot
append; so each chunk of an upload is an object of its own, `parts/<part>/<offset>`, and sealing
streams them into another. Any server process can take any chunk.

Credentials and endpoint come from the environment, by the usual names (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`).

A killed server leaves unfinished an object that it was writing in parts. It takes room and is not
listed. A rule of the bucket that aborts unfinished uploads after a day removes it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from potluck.core import StorageError
from potluck.core.errors import LostError
from potluck.server.storage import fault_points

_RANGE_BYTES = 1 << 20  # of a blob in one request
_OFFSET_DIGITS = 15
_RETRIES: Any = {"max_retries": 5, "retry_timeout": datetime.timedelta(seconds=15)}
"""The time for retries, while a request waits; obstore's own default is three minutes."""


class ObjectStore:
    """Blobs in a store of obstore's."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str) -> ObjectStore:
        """Opens `s3://bucket/prefix`; plain HTTP only where the endpoint is named so."""
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        with _store_errors():
            options: dict[str, Any] = {"client_options": {"allow_http": True}} if plain else {}
            return cls(from_url(url, retry_config=_RETRIES, **options))

    def put(self, key: str, pieces: Iterable[bytes]) -> None:
        with _store_errors():
            # Not `obstore.put` with an iterator: pieces may come out of this very store.
            writer = obstore.open_writer(self._store, key)
            for piece in pieces:
                writer.write(piece)
            writer.close()  # only now there is an object: nothing half-written is ever seen
        fault_points.reach("blob.done")

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        size = self.size(key)
        stop = size if stop is None else stop
        if size is None or stop is None or stop > size:
            raise LostError(f"the object store must hold {stop or ''} bytes of {key}, got {size}.")
        for first in range(start, stop, _RANGE_BYTES):
            last = min(first + _RANGE_BYTES, stop)
            with _store_errors():
                try:
                    piece = bytes(obstore.get_range(self._store, key, start=first, end=last))
                except (BaseError, OSError) as error:
                    if not self._is_well():
                        raise
                    raise LostError(f"{key} must be readable, got {_named(error)}.") from error
            yield piece

    def size(self, key: str) -> int | None:
        with _store_errors():
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

    def delete(self, prefix: str) -> None:
        paths = [path for path, _ in self._list(prefix)]
        with _store_errors():
            if paths:
                obstore.delete(self._store, paths)
            elif self.size(prefix) is not None:
                obstore.delete(self._store, prefix)

    def append(self, part: str, offset: int, data: bytes | bytearray) -> int:
        fault_points.reach("chunk.before-write")
        size = self.part_size(part)
        if size != offset or not data:
            return size
        with _store_errors():
            obstore.put(self._store, f"parts/{part}/{offset:0{_OFFSET_DIGITS}d}", data)
        fault_points.reach("chunk.after-sync")
        return offset + len(data)

    def part_size(self, part: str) -> int:
        return sum(size for _, size in self._chunks(part))

    def seal(self, part: str, key: str) -> None:
        self.put(key, (piece for path, _ in self._chunks(part) for piece in self.read(path)))

    def drop(self, part: str) -> None:
        self.delete(f"parts/{part}")

    def _is_well(self) -> bool:
        """Returns whether the store keeps writes: one object may still be lost."""
        key = f"temporary/{secrets.token_hex(16)}"
        try:
            obstore.put(self._store, key, b"probe")
            is_well = bytes(obstore.get(self._store, key).bytes()) == b"probe"
            obstore.delete(self._store, key)
        except (BaseError, OSError):
            return False
        return is_well

    def _chunks(self, part: str) -> list[tuple[str, int]]:
        """Returns the chunks of a part in order, up to the first gap."""
        chunks: list[tuple[str, int]] = []
        end = 0
        for path, size in sorted(self._list(f"parts/{part}")):
            start = int(path.rsplit("/", 1)[1])
            if start > end:
                break
            if start == end:  # another one is the rest of a chunk that was replaced by a longer one
                chunks.append((path, size))
                end += size
        return chunks

    def _list(self, prefix: str) -> list[tuple[str, int]]:
        with _store_errors():
            return [
                (str(item["path"]), int(item["size"]))
                for batch in obstore.list(self._store, prefix)
                for item in batch
            ]


@contextlib.contextmanager
def _store_errors() -> Generator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise StorageError(
            f"the object store must be reachable and writable, got {_named(error)}. "
            "Check its URL and credentials."
        ) from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
