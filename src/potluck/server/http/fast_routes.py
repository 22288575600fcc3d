"""The shortest way to an answer: requests on known paths pass by the router and its middleware.

Almost all requests are of devices, whose paths are fixed, or end in one parameter. What is answered
is what the application behind it would answer, with the same handlers of errors; it has the rest.
A request that waits for a slot then also holds a dozen calls less.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Place(NamedTuple):
    """Who answers on a path; its name is the route's in the meters."""

    path: str
    """With a name in braces for what may be there, but at the end alone: "/v1/models/{sha256}"."""
    answer: Callable[[Request], Awaitable[Response]]


def direct(
    app: ASGIApp, places: Mapping[tuple[str, str], Place], handlers: Mapping[Any, Any]
) -> ASGIApp:
    """`app`, with the requests of these methods and paths answered without it."""
    kinds = [kind for kind in handlers if kind is not Exception]
    fixed = {(method, path): place for (method, path), place in places.items() if "{" not in path}
    open_ones = {
        (method, path.partition("{")[0]): place
        for (method, path), place in places.items()
        if "{" in path
    }

    def find(scope: Scope) -> Place | None:
        method, path = scope["method"], scope["path"]
        place = fixed.get((method, path))
        if place is None:
            folder, slash, name = path.rpartition("/")
            place = open_ones.get((method, folder + slash)) if name else None
            if place is not None:
                scope["path_params"] = {place.path.partition("{")[2].rstrip("}"): name}
        return place

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        place = find(scope) if scope["type"] == "http" else None
        if place is None:
            await app(scope, receive, send)
            return
        scope["route"] = place
        request = Request(scope, receive, send)
        has_begun = False

        async def begin(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            response = await place.answer(request)
            await response(scope, receive, begin)
        except Exception as error:
            if has_begun:
                raise
            kind = next((kind for kind in kinds if isinstance(error, kind)), Exception)
            response = await handlers[kind](request, error)
            await response(scope, receive, send)
            if kind is Exception:
                raise

    return outer
