"""Routes answer the methods that they name, and what fails is one message of the protocol."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response

from potluck.core import ProtocolError
from potluck.server.http.device_app import error_handlers, exact_route


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


async def fails(request):
    return Fails(begins=request.path_params["name"] == "after")


def ask(method, path):
    routes = [
        exact_route("/fixed", {"GET": here, "PUT": here}),
        exact_route("/open/{name}", {"GET": here}),
        exact_route("/fails/{name}", {"GET": fails}),
    ]
    app = Starlette(routes=routes, exception_handlers=error_handlers(lambda: 0))
    app.router.redirect_slashes = False

    async def scene():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path)

    return asyncio.run(scene())


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("GET", "/fixed", "/fixed None"),
        ("PUT", "/fixed?a=1", "/fixed None"),
        ("GET", "/open/abc", "/open/{name} abc"),
        ("GET", "/open/a%20b?c=1", "/open/{name} a b"),
    ],
)
def test_a_path_is_answered_and_its_route_known(method, path, told):
    assert ask(method, path).text == told


@pytest.mark.parametrize("path", ["/open/", "/open", "/open/a/b", "/fixed/", "/elsewhere"])
def test_a_path_that_is_none_is_not_found(path):
    answer = ask("GET", path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path"), [("PUT", "/open/a"), ("HEAD", "/fixed")])
def test_a_method_that_is_not_named_is_refused(method, path):
    assert ask(method, path).status_code == 405


def test_an_answer_that_fails_before_it_begins_is_an_error_of_the_protocol():
    answer = ask("GET", "/fails/before")
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert "retry-after" in answer.headers


def test_an_answer_that_fails_on_its_way_is_broken_off():
    with pytest.raises(RuntimeError, match="response already started"):
        ask("GET", "/fails/after")
