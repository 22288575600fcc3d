"""Authentication: which requests get in.

In this order, and never further than the first fault: the signature's headers, a small body, room
for one more request, the device and its key, the signature, the clock, the sequence number, the
form and length of the body, a large body, its digest. So the server reads no body but a small one
for a caller without a key.

Sequence numbers are written in batches: requests that arrive while one transaction is written share
the next one. That transaction also checks that a device whose key is remembered may still take
part. So a revocation counts from the next request on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from potluck.core import CodedError, ProtocolError
from potluck.protocol import (
    MAX_SKEW_MS,
    Claim,
    Enrol,
    Preview,
    Route,
    read_claim,
    verify_request,
)
from potluck.server.http.authorities import is_called
from potluck.server.http.batching import Batches
from potluck.server.http.bodies import message_in
from potluck.server.rounds.enrolment import check_token, claim_sequences, find_key
from potluck.server.storage.context import Context

MAX_HEADERS = 100
_MAX_KEYS = 100_000  # of devices that were here, of about 150 bytes each


class Authenticator:
    """Admits signed requests of the devices of one run, each one once."""

    def __init__(
        self, context: Context, run: str, run_key: bytes, names: Collection[str] = ()
    ) -> None:
        """`run_key` is the run's public key, `names` are hosts by which devices call the server."""
        self._context = context
        self._run, self._run_key = run, run_key
        self._names = frozenset(names)
        self._keys: dict[str, bytes] = {}  # a device's id follows from its key: they stay right
        self._last: dict[str, int] = {}  # sequence numbers of theirs, as far as known here
        self._claims: Batches[tuple[str, int], None] = Batches(partial(claim_sequences, context))

    async def admit(self, request: Request, claim: Claim) -> None:
        """Admits a device's request, once.

        Raises:
            ProtocolError: why not.
        """
        await self.verify(request, claim)
        await self.note(claim)

    async def verify(self, request: Request, claim: Claim) -> None:
        """Checks the claim of a device's request, which is admitted once it is noted.

        Raises:
            ProtocolError: why not.
        """
        if claim.device not in self._keys:
            await self._find(claim.device)
        key = self._keys.get(claim.device)
        try:
            self._verify(claim, key, request, self._last.get(claim.device, 0))
        except ProtocolError as error:
            if error.code in ("clock", "replayed"):  # signed by the device: the log names it
                request.scope["signer"] = claim.device
            raise

    async def _find(self, device: str) -> None:
        """Remembers a device of this run that may take part."""
        found = await run_in_threadpool(find_key, self._context, device)
        if found is None or found.run != self._run:
            return
        while len(self._keys) >= _MAX_KEYS:
            self.forget(next(iter(self._keys)))
        self._keys[device] = bytes(found.public_key)
        self._last[device] = max(found.sequence, self._last.get(device, 0))

    async def admit_newcomer(
        self, request: Request, route: Route, claim: Claim, body: bytearray | None
    ) -> Enrol | Preview:
        """Returns the message of a new device, signed with the key that is in the message."""
        if abs(claim.time_ms - self._context.now()) > MAX_SKEW_MS:
            self._verify_clock(claim)
        kind = Preview if route.request is Preview else Enrol
        message = message_in(request, route, kind, claim, body)
        known = await run_in_threadpool(find_key, self._context, claim.device)
        last = 0 if known is None else known.sequence
        key = bytes.fromhex(message.public_key)
        try:
            self._verify(claim, key, request, last)
        except ProtocolError as error:
            if error.code == "bad_signature":  # signed for the run of an old invitation, say
                check = partial(check_token, self._context, message.token, key, into=self._run)
                await run_in_threadpool(check)
            raise
        return message

    def _verify(self, claim: Claim, key: bytes | None, request: Request, last: int) -> None:
        verify_request(
            claim,
            key,
            request.method,
            authority_of(request),
            path_of(request),
            run_key=self._run_key,
            now_ms=self._context.now(),
            last_sequence=last,
        )
        self._check_authority(request)

    def _check_authority(self, request: Request) -> None:
        """Refuses what was signed for another server, even if that one has the same run's key."""
        authority = authority_of(request)
        if not is_called(authority, request.scope["server"][0], self._names):
            raise ProtocolError(
                "misdirected",
                "the server must be called by a name of its own, got "
                f"authority={authority[:200]!r}. "
                "Whoever runs it adds the name: potluck serve --name.",
            )

    def _verify_clock(self, claim: Claim) -> None:
        now = self._context.now()
        raise ProtocolError(
            "clock",
            f"Potluck-Time must be within {MAX_SKEW_MS // 1000} s of server_time_ms={now}, "
            f"got time_ms={claim.time_ms}. Correct by the difference and sign again.",
        )

    async def note(self, claim: Claim) -> None:
        """Notes the sequence number of a request: each one counts once.

        Raises:
            RefusedError: replayed, unknown.
        """
        with self.noting(claim):
            await self._claims.do((claim.device, claim.sequence))

    @contextlib.contextmanager
    def noting(self, claim: Claim) -> Generator[None]:
        """Wraps a transaction that notes a request, and remembers its result.

        So the next replay is refused before it takes anything of its device's.
        """
        try:
            yield
        except CodedError as error:
            if error.code == "unknown":
                self.forget(claim.device)
            elif error.code == "replayed":
                self._remember(claim)
            raise
        self._remember(claim)

    def _remember(self, claim: Claim) -> None:
        if claim.device in self._keys:
            self._last[claim.device] = max(claim.sequence, self._last.get(claim.device, 0))

    def forget(self, device: str) -> None:
        """Forgets a device that was revoked, or one of too many."""
        self._keys.pop(device, None)
        self._last.pop(device, None)


def claim_of(request: Request) -> Claim:
    """Returns the claim in a request's headers.

    Raises:
        ProtocolError: unsigned, malformed.
    """
    headers = request.scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise ProtocolError(
            "malformed", f"a request has at most {MAX_HEADERS} headers, got {len(headers)}."
        )
    return read_claim(headers)


def authority_of(request: Request) -> str:
    """Returns the `Host` header, which must be there once.

    Raises:
        ProtocolError: malformed.
    """
    hosts = request.headers.getlist("host")
    if len(hosts) != 1:
        raise ProtocolError("malformed", f"Host must be there once, got {len(hosts)}.")
    return hosts[0].lower()


def path_of(request: Request) -> str:
    """Returns the path with its query, as sent."""
    query: bytes = request.scope["query_string"]
    raw: bytes = request.scope["raw_path"]
    return (raw + b"?" * bool(query) + query).decode("latin-1")
