"""One connection of a client, held to a time limit, and to the one shape of errors.

Uvicorn parses HTTP; what it leaves open is closed here: a client that opens a connection, or a
second request on it, and does not send its headers in time; and bytes that are not HTTP, which are
answered in JSON.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from potluck.protocol import Error, encode_message

HEADER_SECONDS = 10.0
_GOODBYE_SECONDS = 0.5


class Connection(H11Protocol):
    """Uvicorn's, with a limit on the time in which headers must arrive."""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # a next request has begun
            if self._headers_timer is None:
                self._headers_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)
        else:
            self._stop_timer()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():  # TLS would wait for the other side's goodbye
            self.loop.call_later(_GOODBYE_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, instead of whatever was under way."""
        if self.cycle:  # none before the first request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = Error(code="malformed", message="the request must be HTTP/1.1, got another.")
            body = encode_message(error)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _give_up(self) -> None:
        self._headers_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
