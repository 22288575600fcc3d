"""The gate: which requests get in, and how much of them is read.

In this order, and never further than the first fault: room for one more request, the signature's
headers, the device and its key, the signature, the clock, the sequence number, the form and length
of the body, the body itself, its digest. So nobody without a key makes the server read a body, but
for a newcomer's, whose key is inside and whose body is small.

Sequence numbers are written in batches: requests that arrive while one transaction is written share
the next one. That transaction also tells whether a device whose key is remembered may still take
part: between a revocation and the next request there is no time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from potluck.core import ProtocolError, RefusedError
from potluck.protocol import (
    MAX_SKEW_MS,
    Claim,
    Enrol,
    Preview,
    Route,
    check_body,
    parse_message,
    read_claim,
    verify_request,
)
from potluck.server.batches import Batches
from potluck.server.desk import refusals
from potluck.server.names import is_called
from potluck.server.service import Service

BODY_SECONDS = 120.0
"""For a whole chunk: 4 MiB at 35 KB/s."""
MESSAGE_SECONDS = 20.0
"""For a whole message: 64 KiB at 3.3 KB/s."""
STRANGER_SECONDS = 4.0
"""For a newcomer's message, whose sender nobody knows yet."""
PIECE_SECONDS = 20.0
"""Without a byte of a body, before the request is given up."""
MAX_HEADERS = 100
_MAX_KEYS = 100_000  # of devices that were here, of about 150 bytes each


class Gate:
    """Lets signed requests of the devices of one run in, each one once."""

    def __init__(
        self, service: Service, run: str, run_key: bytes, names: Collection[str] = ()
    ) -> None:
        """`run_key` is the run's public key, `names` are hosts by which devices call the server."""
        self._service = service
        self._run, self._run_key = run, run_key
        self._names = frozenset(names)
        self._keys: dict[str, bytes] = {}  # a device's id follows from its key: they stay right
        self._claims: Batches[tuple[str, int], None] = Batches(service.claim_sequences)

    async def admit(self, request: Request) -> Claim:
        """The claim of a device's request that may get in; its body is not read.

        Raises:
            ProtocolError: why not.
        """
        claim = await self.verify(request)
        await self.note(claim)
        return claim

    async def verify(self, request: Request) -> Claim:
        """The claim of a device's request, which gets in if it is then noted.

        Raises:
            ProtocolError: why not.
        """
        claim = _read_claim(request)
        key, last = self._keys.get(claim.device), 0
        if key is None:
            key, last = await self._find(claim.device)
        self._verify(claim, key, request, last)
        return claim

    async def _find(self, device: str) -> tuple[bytes | None, int]:
        """Key and last sequence number of a device of this run that may take part."""
        found = await run_in_threadpool(self._service.device_key, device)
        if found is None or found.run != self._run:
            return None, 0
        key = bytes(found.public_key)
        if len(self._keys) < _MAX_KEYS:
            self._keys[device] = key
        return key, found.sequence

    async def admit_newcomer(self, request: Request, route: Route) -> tuple[Claim, Enrol | Preview]:
        """The claim and message of a newcomer, signed with the key that is in the message."""
        claim = _read_claim(request)
        if abs(claim.time_ms - self._service.time.now()) > MAX_SKEW_MS:
            self._verify_clock(claim)
        body = await read_body(request, route, claim, STRANGER_SECONDS)
        kind = Preview if route.request is Preview else Enrol
        message = parse_message(bytes(body), kind, limit=route.max_bytes)
        known = await run_in_threadpool(self._service.device_key, claim.device)
        last = 0 if known is None else known.sequence
        key = bytes.fromhex(message.public_key)
        try:
            self._verify(claim, key, request, last)
        except ProtocolError as error:
            if error.code == "bad_signature":  # signed for the run of an old invitation, say
                check = self._service.check_token
                with refusals():
                    await run_in_threadpool(check, message.token, key, into=self._run)
            raise
        return claim, message

    def _verify(self, claim: Claim, key: bytes | None, request: Request, last: int) -> None:
        verify_request(
            claim,
            key,
            request.method,
            authority_of(request),
            path_of(request),
            run_key=self._run_key,
            now_ms=self._service.time.now(),
            last_sequence=last,
        )
        self._check_authority(request)

    def _check_authority(self, request: Request) -> None:
        """Refuse what was signed for another server, even if that one has the same run's key."""
        authority = authority_of(request)
        if not is_called(authority, request.scope["server"][0], self._names):
            raise ProtocolError(
                "misdirected",
                "the server must be called by a name of its own, got "
                f"authority={authority[:200]!r}. "
                "Whoever runs it adds the name: potluck serve --name.",
            )

    def _verify_clock(self, claim: Claim) -> None:
        now = self._service.time.now()
        raise ProtocolError(
            "clock",
            f"Potluck-Time must be within {MAX_SKEW_MS // 1000} s of server_time_ms={now}, "
            f"got time_ms={claim.time_ms}. Correct by the difference and sign again.",
        )

    async def note(self, claim: Claim) -> None:
        """Note the sequence number of a request: each one counts once.

        Raises:
            ProtocolError: replayed, unknown.
        """
        try:
            await self._claims.do((claim.device, claim.sequence))
        except RefusedError as error:
            if error.code == "replayed":
                raise ProtocolError("replayed", str(error)) from None
            self.forget(claim.device)
            raise ProtocolError("unknown", str(error)) from None

    def forget(self, device: str) -> None:
        """Remember no key of a device that was thrown out."""
        self._keys.pop(device, None)


def _read_claim(request: Request) -> Claim:
    headers = request.scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise ProtocolError(
            "malformed", f"a request has at most {MAX_HEADERS} headers, got {len(headers)}."
        )
    return read_claim(headers)


def authority_of(request: Request) -> str:
    """The `Host` header, which must be there once.

    Raises:
        ProtocolError: malformed.
    """
    hosts = request.headers.getlist("host")
    if len(hosts) != 1:
        raise ProtocolError("malformed", f"Host must be there once, got {len(hosts)}.")
    return hosts[0].lower()


def path_of(request: Request) -> str:
    """The path with its query, as sent."""
    query: bytes = request.scope["query_string"]
    raw: bytes = request.scope["raw_path"]
    return (raw + b"?" * bool(query) + query).decode("latin-1")


def check_form(request: Request, route: Route) -> int:
    """The length of the body that a request announces, where it may send one of this kind.

    Raises:
        ProtocolError: malformed, media, too_large.
    """
    headers = request.headers
    lengths = headers.getlist("content-length")
    if "transfer-encoding" in headers or len(lengths) > 1:
        raise ProtocolError("malformed", "a body must have one Content-Length, got another form.")
    length = int(lengths[0]) if lengths else 0  # HTTP/1.1 lets digits through alone
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


async def read_body(
    request: Request, route: Route, claim: Claim, seconds: float | None = None
) -> bytearray:
    """The body, as it was announced and signed, if it comes in time.

    Raises:
        ProtocolError: malformed, media, too_large, digest.
    """
    length = check_form(request, route)
    if seconds is None:
        seconds = BODY_SECONDS if route.request == "bytes" else MESSAGE_SECONDS
    body = bytearray()
    stream = request.stream()
    try:
        async with asyncio.timeout(min(seconds, PIECE_SECONDS)) as patience:
            end = asyncio.get_running_loop().time() + seconds
            while len(body) < length:
                body += await anext(stream)
                if len(body) < length:
                    soon = asyncio.get_running_loop().time() + PIECE_SECONDS
                    patience.reschedule(min(end, soon))
    except (TimeoutError, StopAsyncIteration, ClientDisconnect):
        raise ProtocolError(
            "malformed", f"the body must have {length} bytes, got {len(body)} in time. Go on."
        ) from None
    digest = hashlib.sha256(body).hexdigest()
    check_body(digest, claim)
    return body
