"""An operator's side of the admin socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from potluck.core import PotluckError, RefusedError, RunError
from potluck.core.plain_json import to_json
from potluck.server.home import Home

_LOOK_SECONDS = 0.2


class Operator:
    """Asks a running server; the folder says where and with what credential."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def wait(self, seconds: float, tell: Callable[[], None]) -> None:
        """Wait for a server that starts; `tell` is called once if there is none yet.

        Raises:
            RunError: there is none after so many seconds.
        """
        end, has_told = time.monotonic() + seconds, False
        while True:
            try:
                self._home.credential()
                with closing(_OverSocket(self._home.socket)) as connection:
                    connection.connect()
                return
            except (RunError, OSError) as error:
                if time.monotonic() >= end:
                    raise error if isinstance(error, RunError) else self._absent(error) from None
            if not has_told:
                has_told = True
                tell()
            time.sleep(_LOOK_SECONDS)

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
        body = None if asked is None else to_json(asked)
        with closing(_OverSocket(self._home.socket)) as connection:
            try:
                connection.connect()
                headers = {"Authorization": f"Bearer {self._home.credential()}"}
                if body is not None:
                    headers["Content-Type"] = "application/json"
                connection.request(method, f"/admin/{name}", body, headers)
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, HTTPException) as error:
                raise self._absent(error) from None
        if answer.status != 200:
            raise _refusal(content)
        return content

    def _absent(self, error: Exception) -> RunError:
        return RunError(
            f"the server must be running, got {error} at {self._home.socket}. "
            "Start it with `potluck serve`, or name its folder with --home."
        )


class _OverSocket(HTTPConnection):
    """HTTP over a Unix socket. The standard library's loads in a tenth of httpx's time."""

    def __init__(self, path: Path) -> None:
        super().__init__("server", timeout=60.0)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _refusal(content: bytes) -> PotluckError:
    try:
        error = json.loads(content)
        return RefusedError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return RunError("the server gave an answer that is none of its own. Is it the right one?")
