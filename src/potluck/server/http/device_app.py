"""The application for devices: the protocol's routes to one served run.

Thin: a small body is read, the request is authenticated, its message is parsed, and the run answers
in a thread. A request that waits for its client does not count among those at work. Check-ins wait
for work (long poll) until a transition or the end of their time. Large bodies have limits of their
own. Every error, on every path, is one message of the protocol.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from starlette import routing
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from potluck.core import CodedError, ProtocolError, StorageError
from potluck.protocol import (
    ROUTES,
    STATUS,
    Accepted,
    CheckIn,
    Claim,
    Error,
    ErrorCode,
    Message,
    Preview,
    Report,
    Route,
    Wait,
    encode_message,
    parse_offset,
    public_key,
)
from potluck.server.http.admission import LEAST_SECONDS, DeviceRequests, Limiter, RetryAfter
from potluck.server.http.authenticate import Authenticator, claim_of
from potluck.server.http.batching import GATHER_SECONDS, Batches
from potluck.server.http.bodies import (
    check_digest,
    check_form,
    message_in,
    read_large,
    read_small,
)
from potluck.server.http.handlers import ServedRun
from potluck.server.http.middleware import measured
from potluck.server.http.model_answers import LARGE_BYTES, hung_up, model_answer
from potluck.server.http.notifier import Notifier
from potluck.server.http.transfers import Transfers
from potluck.server.metrics import Metrics
from potluck.server.rounds.uploads import Stood, add_chunk, find_report, upload_state
from potluck.server.storage.vectors import find_model, read_model

HEALTH = "/health"
_LOG = logging.getLogger("potluck.server")
_MAX_POLLS = 20_000
SENDERS = 64
"""The devices that send an update at the same time, a chunk after another."""
_RETRY_SECONDS: dict[ErrorCode, float] = {
    "overloaded": LEAST_SECONDS,
    "unavailable": 5.0,
    "internal": 5.0,
}
_KEEPING = ("not_found", "late", "conflict", "offset", "digest", "range", "wrong_length")
"""Refusals of a known device, for a body of the right length: the connection goes on."""
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]
_HEX = re.compile(r"[0-9a-f]{32,64}")


class DeviceApp:
    """The routes for devices. It needs a running event loop."""

    def __init__(
        self,
        served: ServedRun,
        notifier: Notifier,
        metrics: Metrics,
        *,
        names: Collection[str] = (),
        long_poll_seconds: float = 25.0,
    ) -> None:
        self.served = served
        self.notifier = notifier
        self.metrics = metrics
        self.limiter = Limiter(48, waiting=3000, seconds=20.0)  # a few seconds of one core's work
        self.newcomers = Limiter(8, waiting=256, seconds=5.0)  # or they would crowd devices out
        self.requests = DeviceRequests()
        # A body that waits lies in memory, a device that waits before it sends holds next to
        # nothing. So as many send as keep a core and a disk busy; a device's own time-out ends its
        # wait, too.
        self.senders = Limiter(SENDERS, waiting=_MAX_POLLS, seconds=25.0, idle_seconds=10.0)
        # A chunk of 1 MiB each, at most of 4, so that no device that may send has to wait.
        self.uploads = Transfers(Limiter(SENDERS, waiting=4000, seconds=60.0))
        self.downloads = Transfers(Limiter(64, waiting=4000, seconds=60.0))
        self.authenticator = Authenticator(served.service, served.id, public_key(served.key), names)
        self.long_poll_seconds = long_poll_seconds
        self._polls = 0
        self._check_ins: Batches[Any, Message] = Batches(served.check_ins, GATHER_SECONDS)
        self._inline_reports: Batches[Any, Message] = Batches(served.accept_batch, GATHER_SECONDS)

    def asgi(self, others: Sequence[routing.Route] = ()) -> ASGIApp:
        """Returns the application; `others` are paths that are not for devices."""
        handlers = error_handlers(self.served.service.now)
        app = Starlette(routes=[*self.paths(), *others], exception_handlers=handlers)
        app.router.redirect_slashes = False

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                self.requests.leave(scope)

        return measured(counted, self.metrics)

    def paths(self) -> list[routing.Route]:
        """Returns the routes for devices."""
        found: dict[str, dict[str, Endpoint]] = {}
        for route in ROUTES:
            endpoints = found.setdefault(route.path.partition("?")[0], {})
            endpoints[route.method] = partial(self._endpoint, route=route)
        found[HEALTH] = {"GET": self._health}
        return [exact_route(path, endpoints) for path, endpoints in found.items()]

    async def _endpoint(self, request: Request, route: Route) -> Response:
        claim = claim_of(request)
        body = await read_small(request, route)
        if route.caller == "newcomer":
            return await self._enrol(request, route, claim, body)
        if route.request is CheckIn or route.request is Report:
            return await self._with_claim(request, route, route.request, claim, body)
        async with self.limiter:
            await self.authenticator.admit(request, claim)
            self.requests.enter(request.scope, claim.device)
            if route.request != "bytes":
                return await self._answer(request, route, claim, body)
            upload = _upload(request)
            offset = parse_offset(request.scope["query_string"])
            length = check_form(request, route)
            # 409 and 404 before the body.
            before = await run_in_threadpool(find_report, self.served.service, claim.device, upload)
            put = partial(self._put, claim, upload, offset, before)
            if body is not None:
                return await put(body)
        async with self.uploads.of(claim.device, claim.sequence) as transfer:
            return await put(await read_large(request, length, transfer))

    async def _answer(
        self, request: Request, route: Route, claim: Claim, body: bytearray | None
    ) -> Response:
        device = claim.device
        _no_query(request)
        if isinstance(route.request, type):
            message = message_in(request, route, route.request, claim, body)
            return _json(await run_in_threadpool(self.served.answer, device, message, claim.digest))
        check_form(request, route)
        if "sha256" in request.path_params:
            return await self._model(request, claim, request.path_params["sha256"])
        return _json(
            await run_in_threadpool(upload_state, self.served.service, device, _upload(request))
        )

    async def _enrol(
        self, request: Request, route: Route, claim: Claim, body: bytearray | None
    ) -> Response:
        async with self.newcomers:
            _no_query(request)
            message = await self.authenticator.admit_newcomer(request, route, claim, body)
            if isinstance(message, Preview):  # nothing is noted: it changes nothing
                return _json(await run_in_threadpool(self.served.preview, message))
            enrolled = await run_in_threadpool(self.served.enrol, message)
            self.requests.enter(request.scope, claim.device)
            await self.authenticator.note(claim)
        self.notifier.wake()
        return _json(enrolled)

    async def _with_claim(
        self,
        request: Request,
        route: Route,
        kind: type[CheckIn] | type[Report],
        claim: Claim,
        body: bytearray | None,
    ) -> Response:
        """Answers a message; the transaction that does what it asks for notes its request."""
        async with self.limiter:
            await self.authenticator.verify(request, claim)
            self.requests.enter(request.scope, claim.device)
            try:
                _no_query(request)
                message = message_in(request, route, kind, claim, body)
            except CodedError:
                await self.authenticator.note(
                    claim
                )  # a replay is refused as one, whatever it holds
                raise
            generation = self.notifier.generation
            if isinstance(message, CheckIn):
                asked = (claim.device, claim.sequence, message)
                given = await self._noted(claim, self._check_ins, asked)
            elif message.update is not None:
                self.metrics.received.inc(message.length_bytes)
                return _json(await self._noted(claim, self._inline_reports, (claim, message)))
            else:
                await self.authenticator.note(claim)
                given = message
        if isinstance(given, Report):
            return await self._announce(claim, given)
        if isinstance(message, CheckIn) and self._may_poll(given):
            return await self._poll(request, claim.device, message, given, generation)
        return _json(given)

    async def _noted(self, claim: Claim, batches: Batches[Any, Message], item: Any) -> Message:
        with self.authenticator.noting(claim):
            return await batches.do(item)

    async def _announce(self, claim: Claim, message: Report) -> Response:
        """Answers an announced update once its device is one of those that may send."""
        await self.senders.lease(claim.device)
        async with self.limiter:
            return await self._upload(claim.device, self.served.answer, claim.device, message, "")

    async def _put(
        self, claim: Claim, upload: str, offset: int, before: Stood, data: bytearray
    ) -> Response:
        """Appends a chunk to an upload whose state was `before` when its body was read."""
        check_digest(data, claim)
        self.metrics.received.inc(len(data))
        chunk = (self.served.service, claim.device, upload, offset, data, before)
        return await self._upload(claim.device, add_chunk, *chunk)

    async def _upload(self, device: str, step: Callable[..., Message], *given: Any) -> Response:
        """Takes a step of an upload; after the last, or a refusal, the device sends no more."""
        try:
            told = await run_in_threadpool(step, *given)
        except CodedError:
            self.senders.end(device)
            raise
        self.senders.renew(device)
        response = _json(told)
        if isinstance(told, Accepted):
            self.senders.end(device)
            if self.served.spec.num_bytes > LARGE_BYTES:  # the connection keeps no buffers
                response.headers["Connection"] = "close"
        return response

    def _may_poll(self, given: Message) -> bool:
        waits = isinstance(given, Wait) and given.reason not in ("ineligible", "unsupported")
        return waits and self.long_poll_seconds > 0 and self._polls < _MAX_POLLS

    async def _poll(
        self, request: Request, device: str, message: CheckIn, given: Message, generation: int
    ) -> Response:
        """Asks again whenever something has changed, until there is work or the time is over."""
        end = time.monotonic() + self.long_poll_seconds
        self._polls += 1
        self.metrics.polls.set(self._polls)
        gone = asyncio.create_task(hung_up(request.receive))
        try:
            while self._may_poll(given) and not self.notifier.closed:
                if self.notifier.generation == generation:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    await self.notifier.wait(left, gone)
                if gone.done():  # a slot of the round would be lost on it
                    return Response(status_code=499)
                generation = self.notifier.generation
                given = await self._check_ins.do((device, None, message))
            return _json(given)
        finally:
            gone.cancel()
            self._polls -= 1
            self.metrics.polls.set(self._polls)

    async def _model(self, request: Request, claim: Claim, sha256: str) -> Response:
        if len(sha256) != 64 or _HEX.fullmatch(sha256) is None:
            raise ProtocolError("not_found", "no such model. Take its name from the manifest.")
        place = (self.served.service, self.served.id)
        model = await run_in_threadpool(find_model, *place, sha256)
        read = partial(read_model, *place)
        answer = model_answer(request, claim, read, model, self.downloads)
        self.metrics.sent.inc(int(answer.headers["Content-Length"]))
        return answer

    async def _health(self, request: Request) -> Response:
        _no_query(request)
        return Response('{"status":"ok"}', media_type="application/json")


def error_handlers(now: Any) -> dict[Any, Any]:
    """Returns the handlers of exceptions, which all answer with one message of the protocol."""
    retry_after = RetryAfter()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, CodedError)
        code: Any = error.code if error.code in STATUS else "malformed"
        retry = retry_after.seconds() if code == "overloaded" else None
        response = error_response(code, str(error), now() if code == "clock" else None, retry)
        if code == "overloaded" and _is_small(request):  # a handshake would cost more
            del response.headers["Connection"]
        return response

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code: ErrorCode = "method" if error.status_code == 405 else "not_found"
        told = f"{request.method} {request.scope['path']}"[:200]
        response = error_response(code, f"no such path or method: {told}. See docs/protocol.md.")
        response.headers.update({"Connection": "close", **(error.headers or {})})
        return response

    async def storage(request: Request, error: Exception) -> Response:
        _LOG.error("storage", extra={"reason": str(error)})
        return error_response("unavailable", "the server cannot read or write now. Try again.")

    async def internal(request: Request, error: Exception) -> Response:
        return error_response("internal", "the server has a fault. Try again later.")

    known = {CodedError: refused, HTTPException: http, StorageError: storage}
    return known | {Exception: internal}


def error_response(
    code: ErrorCode,
    message: str,
    server_time_ms: int | None = None,
    retry_after_seconds: float | None = None,
) -> Response:
    """Returns the one shape of every answer that is not a success."""
    retry = retry_after_seconds or _RETRY_SECONDS.get(code)
    error = Error(
        code=code,
        message=message[:1000],
        retry_after_seconds=retry,
        server_time_ms=server_time_ms,
    )
    headers = {} if retry is None else {"Retry-After": str(math.ceil(retry))}
    if code not in _KEEPING:
        headers["Connection"] = "close"  # what is left of the body is not read to its end
    return Response(encode_message(error), STATUS[code], headers, "application/json")


def exact_route(path: str, endpoints: Mapping[str, Endpoint]) -> routing.Route:
    """Returns a route with an endpoint for each method, without the HEAD that Starlette adds."""

    async def serve(request: Request) -> Response:
        return await endpoints[request.method](request)

    made = routing.Route(path, serve, methods=list(endpoints))
    made.methods = set(endpoints)
    return made


def _is_small(request: Request) -> bool:
    """Returns whether the unread rest of a body is small enough to be ignored."""
    length = request.headers.get("content-length", "0")
    return length.isdecimal() and int(length) <= 4096 and "transfer-encoding" not in request.headers


def _json(message: Message) -> Response:
    return Response(encode_message(message), media_type="application/json")


def _upload(request: Request) -> str:
    upload: str = request.path_params["upload"]
    if len(upload) != 32 or _HEX.fullmatch(upload) is None:
        raise ProtocolError("not_found", "no such upload. Report again.")
    return upload


def _no_query(request: Request) -> None:
    if request.scope["query_string"]:
        raise ProtocolError("malformed", "this path has no query, got one. Leave it out.")
