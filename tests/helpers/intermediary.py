"""Somebody in between who ends TLS: it has the server's certificate and its key, but not the run's.

It hands requests on as they are, changes answers if it likes, and keeps what devices wrote, byte
for byte, as it was before encryption.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import httpx

from potluck.server.storage.state_folder import StateFolder


class Answer(NamedTuple):
    """What a device is to be answered."""

    method: str
    path: str
    request: bytes
    status: int
    content: bytes


class Intermediary:
    """Listens in a thread until the end of the block.

    Args:
        change: from the server's answer to the content, or the status and the content, that the
            device gets.
    """

    def __init__(
        self,
        port: int,
        home: StateFolder,
        change: Callable[[Answer], bytes | tuple[int, bytes]] = lambda a: a.content,
    ) -> None:
        self.upstream = httpx.Client(
            base_url=f"https://127.0.0.1:{port}",
            verify=False,
            timeout=60.0,
        )
        self.change = change
        self.written = bytearray()
        self.lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", 0), _Hop)
        self._server.between = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home.certificate, home.private_key)
        self._server.context = context
        self.address = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Intermediary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
        self.upstream.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    between: Intermediary
    context: ssl.SSLContext

    def finish_request(self, request, client_address) -> None:
        secure = self.context.wrap_socket(request, server_side=True)
        try:
            self.RequestHandlerClass(secure, client_address, self)
        finally:
            secure.close()

    def handle_error(self, request, client_address) -> None:
        """A device that leaves in the middle is no error."""


class _Recorded:
    """A stream whose bytes are kept as they are read."""

    def __init__(self, inner, between: Intermediary) -> None:
        self._inner, self._between = inner, between

    def readline(self, limit: int = -1) -> bytes:
        return self._keep(self._inner.readline(limit))

    def read(self, size: int = -1) -> bytes:
        return self._keep(self._inner.read(size))

    def close(self) -> None:
        self._inner.close()

    @property
    def closed(self) -> bool:
        return self._inner.closed

    def _keep(self, data: bytes) -> bytes:
        with self._between.lock:
            self._between.written += data
        return data


class _Hop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.rfile = _Recorded(self.rfile, self.server.between)

    def handle_any(self) -> None:
        between = self.server.between
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = between.upstream.request(
            self.command,
            between.upstream.base_url.copy_with(raw_path=self.path.encode()),
            headers=list(self.headers.items()),
            content=body if self.command != "GET" else None,
        )
        seen = Answer(self.command, self.path, body, answer.status_code, answer.content)
        changed = between.change(seen)
        is_whole = isinstance(changed, tuple)
        status, content = changed if is_whole else (answer.status_code, changed)
        self.send_response(status)
        for name, value in answer.headers.items():
            if name not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, format, *args) -> None:
        """Nothing on stderr."""
