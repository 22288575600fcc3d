"""One connection of a client, held to limits, and to the one shape of errors.

Uvicorn and httptools parse HTTP. Limits that they do not have are set here, on the length of
headers and on the time in which they must arrive, also those of a later request. Bytes that are not
HTTP/1.0 or 1.1 are answered in JSON. A request's target has one form: a path as it is routed and
signed, without escapes, and with a query that has something in it.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from potluck.protocol import Error, encode_message
from potluck.server.http.listening import ClientSocket, Listener

HEADER_SECONDS = 10.0
MAX_HEADER_BYTES = 32_768
"""The limit of a request's target and headers together."""
BUFFER_BYTES = 1 << 16
"""The buffer of a connection, each way, beside the piece that is being worked on."""
_GOODBYE_SECONDS = 0.5
_TARGET = re.compile(rb'/[!-"$->@-~]*(\?[!-"$-~]+)?')


class ServerConnection(HttpToolsProtocol):
    """Uvicorn's, with limits on the time in which headers must arrive, and on their size."""

    _headers_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_over = False  # answered for good: later bytes are ignored
    _accepted: ClientSocket | None = None
    _fault = "the request must be HTTP/1.1, got another."

    def __init__(self, *, listener: Listener | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._listener = listener

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(BUFFER_BYTES)
        if self.scheme == "https":  # what TLS has read ahead
            transport.set_read_buffer_limits(BUFFER_BYTES)  # type: ignore[attr-defined]
        if self._listener is not None:
            self._accepted = self._listener.find(transport.get_extra_info("socket").fileno())
        if self._accepted is not None:
            self._accepted.transport = transport
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over or self.transport.is_closing():
            return
        super().data_received(data)
        if self._headers_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                # A client that is still sending would lose the answer if the connection were closed
                # at once.
                self._is_over = True
                self._answer_malformed()
                self.loop.call_later(_GOODBYE_SECONDS, self._say_goodbye)
        elif self._is_idle() and self.timeout_keep_alive_task is None:
            self._start_timer()  # line breaks between two requests begin none, and end no pause

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["accepted"] = self._accepted  # type: ignore[typeddict-unknown-key]
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        assert self.parser is not None
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise httptools.HttpParserError(self._fault)
        if _TARGET.fullmatch(self.url) is None:
            self._fault = (
                "the target must be a path with at most a query, of visible ASCII without '#', "
                f"got {self.url[:100]!r}. Send it as docs/protocol.md has it."
            )
            raise httptools.HttpParserError(self._fault)
        length = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if length > MAX_HEADER_BYTES:
            raise httptools.HttpParserError("the headers are too long")
        super().on_headers_complete()
        self.scope["path"] = self.scope["raw_path"].decode()  # an escape is no part of any path
        if self._get_upgrade() is not None:  # to an unsupported protocol: what follows is not read
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._say_goodbye()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP, instead of the request under way."""
        self._answer_malformed()
        self._say_goodbye()

    def _answer_malformed(self) -> None:
        self._stop_timer()
        is_silent = self._is_idle() or not self.cycle.response_started
        self.pipeline.clear()
        if self.cycle:  # none before the first request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_silent:
            error = Error(code="malformed", message=self._fault)
            body = encode_message(error)
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)

    def _is_idle(self) -> bool:
        return not self.cycle or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._headers_timer is None:
            self._head_bytes = 0
            self._headers_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _give_up(self) -> None:
        self._headers_timer = None
        if not self.transport.is_closing():
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Closes the connection; TLS would wait for the other side to close."""
        if not self.transport.is_closing():  # asyncio's TLS forgets how to abort when closed twice
            self.transport.close()
        self.loop.call_later(_GOODBYE_SECONDS, self.transport.abort)
