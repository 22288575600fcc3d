"""Models as answers: whole, or the part that a device still lacks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

from sqlalchemy import Row
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from potluck.core import ProtocolError, StorageError
from potluck.protocol import Claim
from potluck.server.http.transfers import Transfer, Transfers

LARGE_BYTES = 1 << 20
"""The size of a model above which a connection that has carried it is closed."""
_PART_BYTES = 1 << 16
"""The bytes that are counted together once they are sent."""
Read: TypeAlias = Callable[[Row[Any], int, int], Iterator[bytes]]
_RANGE = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})")


def model_answer(
    request: Request, claim: Claim, read: Read, model: Row[Any], transfers: Transfers
) -> Download:
    """Answers with a model, or the part of it that a request's headers ask for.

    `read` gives the bytes [start, stop).

    Raises:
        ProtocolError: range.
    """
    size, tag = int(model.num_bytes), f'"{model.sha256}"'
    part = None
    if request.headers.get("if-range", tag) == tag:
        part = _range(request.headers.get("range", ""), size)
    start, stop = part or (0, size)
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Content-Length": str(stop - start),
        "Content-Type": "application/octet-stream",
    }
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    if size > LARGE_BYTES:  # what follows is training, and TLS keeps its buffers meanwhile
        headers["Connection"] = "close"
    pieces = read(model, start, stop)
    admission = transfers.of(claim.device, claim.sequence)
    return Download(pieces, admission, 200 if part is None else 206, headers)


class Download(Response):
    """Sends a vector, a piece at a time, once the limiter admits it."""

    def __init__(
        self,
        pieces: Iterator[bytes],
        admission: AbstractAsyncContextManager[Transfer],
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, status, headers)
        self._pieces, self._admission = pieces, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        gone = asyncio.create_task(hung_up(receive))
        try:
            async with self._admission as transfer:
                piece = await self._next()  # a disk that fails is answered with 503
                async with transfer.moving():
                    start = {"type": "http.response.start", "status": self.status_code}
                    await send(start | {"headers": self.raw_headers})
                    has_begun = True
                    while piece and not gone.done():
                        for at in range(0, len(piece), _PART_BYTES):
                            part = memoryview(piece)[at : at + _PART_BYTES]
                            await send(
                                {"type": "http.response.body", "body": part, "more_body": True}
                            )
                            transfer.num_bytes += len(part)
                        piece = await self._next()
        except (ProtocolError, StorageError):
            accepted = scope.get("accepted")
            if not has_begun or accepted is None:
                raise
            accepted.give_up()  # too slow, or the rest cannot be read: the device asks for it again
            await gone
        finally:
            gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes:
        return await run_in_threadpool(next, self._pieces, b"")


async def hung_up(receive: Receive) -> None:
    """Waits until the client has gone; the rest of the body is ignored."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _range(text: str, size: int) -> tuple[int, int] | None:
    """Returns [start, stop) of one range; None: all of it.

    Raises:
        ProtocolError: range.
    """
    match = _RANGE.fullmatch(text)
    if match is None or match[1] == match[2] == "":
        return None
    start, stop = max(size - int(match[2] or 0), 0), size
    if match[1] != "":
        start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
    if start >= size or start >= stop:
        raise ProtocolError("range", f"the range must begin before {size}, got {text[:60]}.")
    return start, stop
