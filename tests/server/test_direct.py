"""Requests that pass by the router are answered as it would answer them."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from potluck.core import ProtocolError
from potluck.server.http.device_app import error_handlers
from potluck.server.http.fast_routes import Place, direct


class Fails(Response):
    """An answer that fails before its first byte, or after it."""

    def __init__(self, begins):
        super().__init__(b"xy")
        self.begins = begins

    async def __call__(self, scope, receive, send):
        if self.begins:
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise ProtocolError("overloaded", "no room")


async def here(request):
    return PlainTextResponse(f"{request['route'].path} {request.path_params.get('name')}")


async def late(request):
    return Fails(begins=request.path_params["name"] == "after")


async def behind(request):
    return PlainTextResponse("behind")


def ask(method, path):
    places = {
        ("GET", "/fixed"): Place("/fixed", here),
        ("GET", "/open/{name}"): Place("/open/{name}", here),
        ("GET", "/fails/{name}"): Place("/fails/{name}", late),
    }
    app = Starlette(routes=[Route("/{rest:path}", behind, methods=["GET", "PUT"])])

    async def scene():
        transport = httpx.ASGITransport(direct(app, places, error_handlers(lambda: 0)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path)

    return asyncio.run(scene())


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("GET", "/fixed", "/fixed None"),
        ("GET", "/fixed?a=1", "/fixed None"),
        ("GET", "/open/abc", "/open/{name} abc"),
        ("GET", "/open/a%20b?c=1", "/open/{name} a b"),
        ("GET", "/open/", "behind"),
        ("GET", "/open", "behind"),
        ("GET", "/open/a/b", "behind"),
        ("GET", "/fixed/", "behind"),
        ("PUT", "/open/abc", "behind"),
        ("PUT", "/fixed", "behind"),
        ("GET", "/elsewhere", "behind"),
    ],
)
def test_known_paths_are_answered_and_others_passed_on(method, path, told):
    assert ask(method, path).text == told


def test_an_answer_that_fails_before_it_begins_is_an_error_of_the_protocol():
    answer = ask("GET", "/fails/before")
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert "retry-after" in answer.headers


def test_an_answer_that_fails_on_its_way_is_broken_off():
    with pytest.raises(ProtocolError, match="no room"):
        ask("GET", "/fails/after")
