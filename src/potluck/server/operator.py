"""An operator's side of the admin socket."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

from potluck.core import PotluckError, RefusedError, RunError
from potluck.server.home import Home


class Operator:
    """Asks a running server; the folder says where and with what credential."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def get(self, name: str) -> Any:
        """Ask for something."""
        return json.loads(self._ask("GET", name, None))

    def post(self, name: str, **asked: Any) -> Any:
        """Have something done."""
        return json.loads(self._ask("POST", name, asked))

    def fetch(self, name: str, **asked: Any) -> bytes:
        """Have something made, and take its bytes."""
        return self._ask("POST", name, asked)

    def text(self, name: str) -> str:
        """Ask for something that is not JSON."""
        return self._ask("GET", name, None).decode()

    def _ask(self, method: str, name: str, asked: dict[str, Any] | None) -> bytes:
        self._knock()
        headers = {"Authorization": f"Bearer {self._home.credential()}"}
        transport = httpx.HTTPTransport(uds=str(self._home.socket))
        try:
            with httpx.Client(transport=transport, timeout=60.0) as client:
                address = f"http://server/admin/{name}"
                answer = client.request(method, address, headers=headers, json=asked)
        except httpx.HTTPError as error:
            raise self._absent(error) from None
        if answer.status_code != 200:
            raise _refusal(answer.content)
        return answer.content

    def _knock(self) -> None:
        """Tell a server that is not there: httpx would leave the socket open."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._home.socket))
            except OSError as error:
                raise self._absent(error) from None

    def _absent(self, error: Exception) -> RunError:
        return RunError(
            f"the server must be running, got {error} at {self._home.socket}. "
            "Start it with `potluck serve`, or name its folder with --home."
        )


def _refusal(content: bytes) -> PotluckError:
    try:
        error = json.loads(content)
        return RefusedError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return RunError("the server gave an answer that is none of its own. Is it the right one?")
