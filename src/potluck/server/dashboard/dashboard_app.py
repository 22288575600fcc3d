"""The operator's dashboard, at the address that devices come to.

    GET  /dashboard            the page, for a session; others are sent to sign in
    GET  /dashboard/events     what changes on it, for a session
    GET  /dashboard/sign-in    a form for a key; a link brings it behind #, which no log sees
    POST /dashboard/sign-in    a key for a session, which is a cookie
    POST /dashboard/sign-out
    GET  /dashboard/style.css, script.js, icon.svg

It only shows. A device's signature is not accepted here. Its headers forbid browsers to load
anything from elsewhere, to show it in a frame, and to keep it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from potluck.core import CodedError, ProtocolError
from potluck.server.dashboard.events import Snapshot, SnapshotFeed
from potluck.server.dashboard.render import Renderer
from potluck.server.dashboard.sign_in import (
    SESSION_SECONDS,
    Throttle,
    is_session,
    issue_key,
    sessions_of,
    sign_in,
    sign_out,
)
from potluck.server.http.admission import Limiter
from potluck.server.http.device_app import Endpoint, error_response, exact_route
from potluck.server.http.handlers import ServedRun
from potluck.server.http.listening import prove
from potluck.server.http.notifier import Notifier

MAX_STREAMS = 200
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MAX_FORM_BYTES = 1024
_FORM_SECONDS = 10.0
_FILES = {"style.css": "text/css", "script.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Dashboard:
    """The pages of one run. The streams need a running event loop."""

    def __init__(self, served: ServedRun, notifier: Notifier, address: str) -> None:
        self._service, self._run = served.service, served.id
        self._address = address
        self._is_secure = address.startswith("https:")
        name = f"potluck-{hashlib.sha256(served.id.encode()).hexdigest()[:8]}"
        self.cookie = f"__Host-{name}" if self._is_secure else name
        self._renderer = Renderer(served.service, served.id)
        self._feed = SnapshotFeed(self._read, notifier)
        self._viewers: Counter[str] = Counter()  # streams, by session
        self._over: set[str] = set()
        self._throttle = Throttle(time.monotonic)
        self._limiter = Limiter(8, waiting=64, seconds=10.0)
        self.num_streams = 0

    def invite(self) -> str:
        """Returns a link that signs in, once."""
        now = self._service.now()
        key = issue_key(self._service.database, self._run, now, actor="admin")
        return f"{self._address}/dashboard/sign-in#{key}"

    def paths(self) -> list[Route]:
        """Returns the routes."""
        made: dict[str, dict[str, Endpoint]] = {
            "": {"GET": self._page},
            "/events": {"GET": self._events},
            "/sign-in": {"GET": self._form, "POST": self._sign_in},
            "/sign-out": {"POST": self._sign_out},
            **{f"/{name}": {"GET": _file(name)} for name in _FILES},
        }
        return [
            exact_route(f"/dashboard{name}", {m: _guarded(e) for m, e in endpoints.items()})
            for name, endpoints in made.items()
        ]

    async def _page(self, request: Request) -> Response:
        async with self._limiter:
            if not await self._knows(request):
                return RedirectResponse("/dashboard/sign-in", 303)
            snapshot = await self._feed.snapshot()
            return HTMLResponse(await run_in_threadpool(self._renderer.page, snapshot))

    async def _events(self, request: Request) -> Response:
        async with self._limiter:
            if not await self._knows(request):
                raise ProtocolError("unsigned", "sign in first: potluck dashboard prints a link.")
        if self.num_streams >= MAX_STREAMS:
            raise ProtocolError("overloaded", "too many look at the dashboard. Come back later.")
        seen = request.headers.get("last-event-id") or request.query_params.get("seen", "")
        session = request.cookies[self.cookie]
        return EventSourceResponse(self._stream(seen, session))

    async def _stream(self, seen: str, session: str) -> AsyncGenerator[ServerSentEvent]:
        self.num_streams += 1
        self._viewers[session] += 1
        try:
            async for event in self._feed.events(seen, lambda: session not in self._over):
                yield event
        finally:
            self.num_streams -= 1
            self._viewers -= Counter([session])

    def _read(self) -> Snapshot:
        """Reads from the database the run, and the sessions that may still see it."""
        viewers, now = set(self._viewers), self._service.now()
        self._over = viewers - sessions_of(self._service.database, self._run, viewers, now)
        return self._renderer.snapshot()

    async def _form(self, request: Request) -> Response:
        return HTMLResponse(self._renderer.sign_in())

    async def _sign_in(self, request: Request) -> Response:
        _check_origin(request)
        address = request.client.host if request.client else ""
        key = await _key(request)
        async with self._limiter:
            now = self._service.now()
            session = await run_in_threadpool(sign_in, self._service.database, self._run, key, now)
        if session is None and not self._throttle.left(address):
            told = "Too many wrong keys. Wait a minute."
            return HTMLResponse(self._renderer.sign_in(told), 429, {"Retry-After": "60"})
        if session is None:
            self._throttle.wrong(address)
            told = "This key is unknown, used or too old. Ask for a link with: potluck dashboard"
            return HTMLResponse(self._renderer.sign_in(told), 401)
        answer = RedirectResponse("/dashboard", 303)
        answer.set_cookie(self.cookie, session, max_age=SESSION_SECONDS, **self._kind())
        return answer

    async def _sign_out(self, request: Request) -> Response:
        _check_origin(request)
        session, now = request.cookies.get(self.cookie, ""), self._service.now()
        async with self._limiter:
            await run_in_threadpool(sign_out, self._service.database, self._run, session, now)
        answer = RedirectResponse("/dashboard/sign-in", 303)
        answer.delete_cookie(self.cookie, **self._kind())
        return answer

    async def _knows(self, request: Request) -> bool:
        session, now = request.cookies.get(self.cookie, ""), self._service.now()
        database = self._service.database
        is_known = await run_in_threadpool(is_session, database, self._run, session, now)
        if is_known:
            prove(request.scope, "session " + hashlib.sha256(session.encode()).hexdigest()[:16])
        return is_known

    def _kind(self) -> dict[str, Any]:
        return {"path": "/", "secure": self._is_secure, "httponly": True, "samesite": "strict"}


def _file(name: str) -> Endpoint:
    async def serve(_: Request) -> Response:
        file = files("potluck.server.dashboard").joinpath("pages", name)
        return Response(await run_in_threadpool(file.read_bytes), media_type=_FILES[name])

    return serve


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Adds the headers for browsers, on errors too."""

    async def serve(request: Request) -> Response:
        try:
            answer = await endpoint(request)
        except CodedError as error:
            code: Any = error.code
            answer = error_response(code, str(error))
        answer.headers.update(HEADERS)
        return answer

    return serve


def _check_origin(request: Request) -> None:
    """Refuses what another site's page sends; browsers say it, and others have no cookie."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ProtocolError("unsigned", "the request must come from the dashboard's own page.")


async def _key(request: Request) -> str:
    """Returns the key in a form.

    Raises:
        ProtocolError: malformed, media, too_large.
    """
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise ProtocolError("media", "the body must be a form. Use the page.")
    body = bytearray()
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > _MAX_FORM_BYTES:
                    raise ProtocolError(
                        "too_large", f"the form must have at most {_MAX_FORM_BYTES} bytes."
                    )
    except (TimeoutError, ClientDisconnect):
        raise ProtocolError("malformed", "the form must arrive in time. Try again.") from None
    found = parse_qs(body.decode("latin-1"), max_num_fields=4).get("key", [""])
    return found[0].strip()
