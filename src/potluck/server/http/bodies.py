"""Bodies of requests: their limits, and how they are read.

A small body is read before its request is admitted, so a slow one holds nothing but its own
connection; uvicorn keeps as much of any body in memory. A large one is read only of a device that
was admitted, at the pace that `Transfers` asks for.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from potluck.core import ProtocolError
from potluck.protocol import MAX_REQUEST_BYTES, Claim, Message, Route, check_body, parse_message
from potluck.server.http.transfers import LEAST_RATE, Transfer

M = TypeVar("M", bound=Message)

GRACE_SECONDS = 10.0
"""The time for a small body, beside what it takes at the least rate."""
SMALL_BYTES = MAX_REQUEST_BYTES


async def read_small(request: Request, route: Route) -> bytearray | None:
    """Reads a small body of any sender; None: it is large, or there is none.

    Raises:
        ProtocolError: malformed: it does not come in time.
    """
    lengths = request.headers.getlist("content-length")
    if route.request is None or len(lengths) != 1 or "transfer-encoding" in request.headers:
        return None
    length = int(lengths[0])  # HTTP/1.1 lets digits through alone
    if length > min(route.max_bytes, SMALL_BYTES):
        return None
    body = bytearray()
    try:
        async with asyncio.timeout(GRACE_SECONDS + length / LEAST_RATE):
            await _receive(request, length, body)
    except TimeoutError:
        raise _incomplete(length, body) from None
    return body


async def read_large(request: Request, length: int, transfer: Transfer) -> bytearray:
    """Returns the body of an admitted request, piece by piece.

    Raises:
        ProtocolError: malformed; overloaded: it was too slow.
    """
    body = bytearray()
    async with transfer.moving():
        await _receive(request, length, body, transfer)
    return body


def check_form(request: Request, route: Route) -> int:
    """Returns the length of the body that a request announces, where it may send one of this kind.

    Raises:
        ProtocolError: malformed, media, too_large.
    """
    headers = request.headers
    lengths = headers.getlist("content-length")
    if "transfer-encoding" in headers or len(lengths) > 1:
        raise ProtocolError("malformed", "a body must have one Content-Length, got another form.")
    length = int(lengths[0]) if lengths else 0
    if length > route.max_bytes:
        raise ProtocolError(
            "too_large", f"the body must be at most {route.max_bytes} bytes, got {length}."
        )
    if route.request is None:
        return length
    if not lengths:
        raise ProtocolError("malformed", "the body must have a Content-Length, got none.")
    expected = "application/octet-stream" if route.request == "bytes" else "application/json"
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != expected or "content-encoding" in headers:
        raise ProtocolError(
            "media", f"the body must be {expected} without an encoding, got {kind[:80]!r}."
        )
    return length


def message_in(
    request: Request, route: Route, kind: type[M], claim: Claim, body: bytearray | None
) -> M:
    """Returns the message in a small body that was read.

    Raises:
        ProtocolError: malformed, media, too_large, digest.
    """
    check_form(request, route)
    assert body is not None  # or its form was refused
    check_digest(body, claim)
    return parse_message(bytes(body), kind, limit=route.max_bytes)


def check_digest(body: bytearray, claim: Claim) -> None:
    """Refuses a body that is not the one that was signed.

    Raises:
        ProtocolError: digest.
    """
    check_body(hashlib.sha256(body).hexdigest(), claim)


async def _receive(
    request: Request, length: int, body: bytearray, transfer: Transfer | None = None
) -> None:
    """Appends what comes to `body`, until it is `length` long."""
    stream = request.stream()
    try:
        while len(body) < length:
            body += await anext(stream)
            if transfer is not None:
                transfer.num_bytes = len(body)
    except (StopAsyncIteration, ClientDisconnect):
        raise _incomplete(length, body) from None


def _incomplete(length: int, body: bytearray) -> ProtocolError:
    return ProtocolError(
        "malformed", f"the body must have {length} bytes, got {len(body)} in time. Send it again."
    )
