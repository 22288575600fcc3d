"""The client of the admin socket."""

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
from potluck.server.storage.state_folder import StateFolder

_LOOK_SECONDS = 0.2
_FOLDER_SECONDS, _START_SECONDS = 10.0, 60.0


class Operator:
    """Sends requests to a running server; the folder has its address and the credential."""

    def __init__(self, home: StateFolder) -> None:
        self._home = home

    def wait(self, seconds: float | None, tell: Callable[[float], None]) -> None:
        """Waits for a server that starts; `tell` is called once, with the limit, if there is none.

        Without a limit given it is 10 s for the server's folder, which `serve` makes in its first
        second, and 60 s where that is there.

        Raises:
            RunError: there is none in time.
        """
        begin, has_told = time.monotonic(), False
        while True:
            try:
                self._home.credential()
                with closing(_OverSocket(self._home.socket)) as connection:
                    connection.connect()
                return
            except (RunError, OSError) as error:
                limit = self._usual_seconds() if seconds is None else seconds
                if time.monotonic() - begin >= limit:
                    is_missing = isinstance(error, OSError) or not self._home.socket.exists()
                    raise self._absent(error) if is_missing else error from None
            if not has_told:
                has_told = True
                tell(limit)
            time.sleep(_LOOK_SECONDS)

    def get(self, name: str) -> Any:
        """Gets a value from the server."""
        return json.loads(self._ask("GET", name, None))

    def post(self, name: str, **asked: Any) -> Any:
        """Requests an action of the server."""
        return json.loads(self._ask("POST", name, asked))

    def fetch(self, name: str, **asked: Any) -> bytes:
        """Requests an action, and returns the bytes that it made."""
        return self._ask("POST", name, asked)

    def text(self, name: str) -> str:
        """Gets a text that is not JSON."""
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

    def _usual_seconds(self) -> float:
        return _START_SECONDS if self._home.folder.is_dir() else _FOLDER_SECONDS

    def _absent(self, error: Exception) -> RunError:
        folder = str(self._home.folder)
        if not self._home.folder.is_dir():
            got = f"no folder {folder!r}"
        elif not self._home.socket.exists() or isinstance(error, ConnectionRefusedError):
            got = f"none at work in {folder!r}"
        else:
            got = f"{error} at {self._home.socket}"
        return RunError(
            f"the server must be running, got {got}. "
            "Start it with `potluck serve`, or name its folder with --home."
        )


class _OverSocket(HTTPConnection):
    """HTTP over a Unix socket. The standard library's loads in a tenth of httpx's time."""

    def __init__(self, path: Path) -> None:
        super().__init__("server", timeout=60.0)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _refusal(content: bytes) -> PotluckError:
    try:
        error = json.loads(content)
        return RefusedError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return RunError("the server gave an answer that is none of its own. Is it the right one?")
