"""Clients that announce more than they send, or read less than they asked for."""

from __future__ import annotations

import contextlib
import socket
import ssl
from contextlib import ExitStack

from hostile import written
from remote import Caller, Served


class Slow:
    """Connections to a server that stand still, until the end of the block."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._stack = ExitStack()
        self._context = ssl.create_default_context(cadata=served.home.certificate.read_text())
        self._context.check_hostname = False

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        length: int,
        body: bytes = b"x",
        kind: str = "application/json",
    ) -> ssl.SSLSocket:
        """A request whose body would have `length` bytes, and has these."""
        plain = socket.create_connection(("127.0.0.1", self._served.port), timeout=60)
        secure = self._stack.enter_context(self._context.wrap_socket(plain))
        host = {"Host": f"127.0.0.1:{self._served.port}", "Content-Type": kind}
        data = written(method, path, host | headers, body)
        told = f"Content-Length: {len(body)}\r\n".encode()
        secure.sendall(data.replace(told, f"Content-Length: {length}\r\n".encode(), 1))
        return secure

    def message(self, caller: Caller, path: str, length: int = 999) -> ssl.SSLSocket:
        """A signed message that does not come to its end."""
        return self.send("POST", path, caller.signed("POST", path, b"x" * length), length)

    def chunk(self, caller: Caller, upload: str, offset: int, length: int) -> ssl.SSLSocket:
        """A signed part of an upload that does not come to its end."""
        path = f"/v1/uploads/{upload}?offset={offset}"
        signed = caller.signed("PUT", path, bytes(length))
        return self.send("PUT", path, signed, length, kind="application/octet-stream")

    def download(self, caller: Caller, sha256: str) -> ssl.SSLSocket:
        """A model that is asked for and not read."""
        path = f"/v1/models/{sha256}"
        return self.send("GET", path, caller.signed("GET", path), 0, b"")


def are_open(sockets: list[ssl.SSLSocket]) -> int:
    """How many have been told nothing yet."""
    count = 0
    for secure in sockets:
        secure.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            secure.recv(1)
            continue
        secure.settimeout(60)
        count += 1
    return count


def rest(secure: ssl.SSLSocket) -> bytes:
    """What is answered until the server closes."""
    answer = b""
    try:
        while piece := secure.recv(1 << 20):
            answer += piece
    except (ConnectionError, ssl.SSLEOFError):
        pass
    return answer
