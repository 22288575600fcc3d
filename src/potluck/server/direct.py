"""The shortest way to an answer: requests on fixed paths pass by the router and its middleware.

Almost all requests are check-ins and reports, on paths without a parameter. What is answered is
what the application behind it would answer, with the same handlers of errors; it has the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


class Place(NamedTuple):
    """Who answers on a path; its name is the route's in the meters."""

    path: str
    answer: Callable[[Request], Awaitable[Response]]


def direct(
    app: ASGIApp, places: Mapping[tuple[str, str], Place], handlers: Mapping[Any, Any]
) -> ASGIApp:
    """`app`, with the requests of these methods and paths answered without it."""
    kinds = [kind for kind in handlers if kind is not Exception]

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        place = None
        if scope["type"] == "http":
            place = places.get((scope["method"], scope["path"]))
        if place is None:
            await app(scope, receive, send)
            return
        scope["route"] = place
        request = Request(scope, receive, send)
        try:
            response = await place.answer(request)
        except Exception as error:
            kind = next((kind for kind in kinds if isinstance(error, kind)), Exception)
            response = await handlers[kind](request, error)
            await response(scope, receive, send)
            if kind is Exception:
                raise
            return
        await response(scope, receive, send)

    return outer
