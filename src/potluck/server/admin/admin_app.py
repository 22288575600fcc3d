"""The application for operators, on a socket of its own and with a credential of its own.

A device's signature is not accepted here, nor the credential by the application for devices.
Requests and answers are JSON; a refusal has the protocol's shape of an error.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from potluck.core import ProtocolError
from potluck.core.plain_json import flat, plain
from potluck.protocol import Invitation, encode_invitation, public_key
from potluck.protocol.strict_json import encode_json, parse_json, refuse
from potluck.server.http.device_app import error_handlers, exact_route
from potluck.server.http.handlers import ServedRun
from potluck.server.http.middleware import measured
from potluck.server.http.notifier import Notifier
from potluck.server.metrics import Metrics
from potluck.server.rounds import audit_check, bounds, changes, enrolment, mending
from potluck.server.storage import audit

MAX_BYTES = 4096
_HASH = re.compile(r"[0-9a-f]{64}")
_TOKENS = 10_000  # at once


class AdminApp:
    """The routes for operators."""

    def __init__(
        self,
        served: ServedRun,
        notifier: Notifier,
        metrics: Metrics,
        credential: str,
        certificate: str | None,
        invite: Callable[[], str],
    ) -> None:
        self._served = served
        self._place = (served.service, served.id)
        self._notifier = notifier
        self._metrics = metrics
        self._credential = credential.encode()
        self._certificate = certificate
        self._invite = invite

    def asgi(self) -> ASGIApp:
        """Returns the application."""
        handlers = error_handlers(self._served.service.now)
        app = Starlette(routes=self.paths(), exception_handlers=handlers)
        app.router.redirect_slashes = False
        return measured(app, self._metrics)

    def paths(self) -> list[Route]:
        """Returns the routes of the operators' socket."""
        service, run = self._served.service, self._served.id
        gets: dict[str, Callable[[], Any]] = {
            "status": self._status,
            "devices": lambda: service.devices(run),
        }

        def pause(asked: dict[str, Any]) -> None:
            reason = _word(asked, "reason", "an operator paused it")
            changes.pause(*self._place, reason, actor="admin")

        def abandon(asked: dict[str, Any]) -> None:
            reason = _word(asked, "reason", "an operator abandoned it")
            mending.abandon(*self._place, reason, actor="admin")

        def revoke(asked: dict[str, Any]) -> None:
            enrolment.revoke(service, _word(asked, "device", ""), actor="admin")

        posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "enroll": self._enroll,
            "pause": pause,
            "resume": lambda _: changes.resume(*self._place, actor="admin"),
            "abandon": abandon,
            "fall-back": self._fall_back,
            "revoke": revoke,
            "set": lambda asked: changes.change(*self._place, flat(asked), actor="admin"),
            "dashboard": lambda _: {"link": self._invite()},
        }
        made = {("GET", name): self._get(do) for name, do in gets.items()}
        made |= {("POST", name): self._post(do) for name, do in posts.items()}
        made |= {("GET", "audit"): self._audit, ("GET", "metrics"): self._text}
        made |= {("POST", "export"): self._export}
        return [exact_route(f"/admin/{name}", {method: do}) for (method, name), do in made.items()]

    def _get(self, do: Callable[[], Any]) -> Callable[[Request], Any]:
        async def get(request: Request) -> Response:
            self._check(request)
            return _json(await run_in_threadpool(do))

        return get

    def _post(self, do: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
        async def post(request: Request) -> Response:
            self._check(request)
            asked = await _content(request)
            answer = await run_in_threadpool(do, asked)
            self._notifier.wake()
            return _json(answer or {})

        return post

    def _check(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, b"Bearer " + self._credential):
            raise ProtocolError(
                "unsigned", "an operator shows the credential of the server's folder. Use --home."
            )

    def _status(self) -> dict[str, Any]:
        service, run = self._served.service, self._served.id
        rounds, evaluations = service.history(run), service.evaluations(run)
        told = {"rounds": rounds[-20:], "evaluations": evaluations[-20:]}
        with service.database.read() as db:
            lowered = bounds.read_lowered(db, run)
        return service.status(run) | told | {"lowered": lowered}

    async def _audit(self, request: Request) -> Response:
        self._check(request)
        since = request.query_params.get("since")
        if since is not None and _HASH.fullmatch(since) is None:
            _refuse(
                f"since must be a hash of 64 hex digits, got since={since!r:.80}. Copy it whole."
            )
        service = self._served.service
        found = await run_in_threadpool(audit_check.check, service, since)
        with service.database.read() as db:
            rows, last = audit.head(db)
        broken = None if found is None else found._asdict()
        return _json({"broken": broken, "rows": rows, "hash": last})

    def _enroll(self, asked: dict[str, Any]) -> dict[str, Any]:
        count = asked.get("count", 1)
        if type(count) is not int or not 1 <= count <= _TOKENS:
            _refuse(f"count must be between 1 and {_TOKENS}, got count={count!r:.40}. Ask twice.")
        days = asked.get("days", 7)
        if type(days) not in (int, float) or not 0 < days <= 3650:
            _refuse(
                f"days must be above 0 and at most 3650, got days={days!r:.40}. The default is 7."
            )
        made = enrolment.issue_tokens(
            *self._place, count, valid_seconds=days * 86400.0, actor="admin"
        )
        return {"invitations": [self._invitation(token) for token in made]}

    def _invitation(self, token: str) -> str:
        invitation = Invitation(
            token=token,
            run=self._served.name,
            server_key=public_key(self._served.key).hex(),
            certificate=self._certificate,
        )
        return encode_invitation(invitation)

    def _fall_back(self, asked: dict[str, Any]) -> dict[str, Any]:
        version = _version(asked)
        found, now = mending.fall_back(*self._place, version, actor="admin")
        return {"version": found, "now": now}

    async def _export(self, request: Request) -> Response:
        self._check(request)
        version = _version(await _content(request))

        def export() -> bytes:
            return self._served.service.export(self._served.id, version, actor="admin")

        content = await run_in_threadpool(export)
        return Response(content, media_type="application/octet-stream")

    async def _text(self, request: Request) -> Response:
        self._check(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


async def _content(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BYTES:
            raise ProtocolError("too_large", f"the body must be at most {MAX_BYTES} bytes.")
    asked = parse_json(bytes(body) or b"{}", MAX_BYTES)
    if not isinstance(asked, dict):
        refuse("the body must be a JSON object, got another value")
    return asked  # pyright: ignore[reportUnknownVariableType]


def _refuse(what: str) -> NoReturn:
    """Refuses a value that an operator gave."""
    raise ProtocolError("malformed", what)


def _word(asked: dict[str, Any], name: str, default: str) -> str:
    value = asked.get(name, default)
    if not isinstance(value, str) or len(value) > 500 or "\0" in value:  # no database keeps it
        refuse(f"{name} must be a text of at most 500 characters, got {value!r:.40}")
    return value


def _version(asked: dict[str, Any]) -> int | None:
    version = asked.get("version")
    if version is not None and (type(version) is not int or version < 0):
        refuse(f"version must be a number from 0 on, got version={version!r:.40}")
    return version


def _json(value: Any) -> Response:
    return Response(encode_json(plain(value)), media_type="application/json")
