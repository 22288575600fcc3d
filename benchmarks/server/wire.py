"""A device that trains nothing: real keys, real signatures, real TLS, and little else.

It speaks the protocol with `potluck.protocol`, over connections that cost less than the server's:
an asyncio protocol that reads into one shared buffer, and uploads one body that all devices share.
Answers are read with the standard library's JSON, not checked against the messages: what is
measured is the server. It never trains, keeps no file, and counts its sequence from the clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import ssl
import time
from typing import Any, NamedTuple

from potluck.protocol import (
    INLINE,
    INLINE_BYTES,
    CheckIn,
    Eligibility,
    Enrol,
    Report,
    Runtime,
    decode_inline,
    encode_inline,
    encode_message,
    public_key,
    sign_request,
)

RUNTIME = Runtime(name="load", version="1")
_PIECE = 128 * 1024
_SCRATCH = memoryview(bytearray(256 * 1024))  # all connections of a process read into it in turn
MOVED = [0]
"""Bytes that the connections of this process sent and received, inside TLS."""
_TYPES = {"POST": "application/json", "PUT": "application/octet-stream"}


class Answer(NamedTuple):
    """A response; of bytes that are not JSON, their SHA-256 and number."""

    status: int
    headers: dict[str, str]
    content: Any
    seconds: float

    @property
    def retry_after(self) -> float | None:
        """Seconds until a refused request may come again, as a device reads them; None: it has no
        such header."""
        if "retry-after" not in self.headers:
            return None
        return float(self.content["retry_after_seconds"])


class Body(NamedTuple):
    """An update that every device sends: its digests are made once."""

    data: bytes
    sha256: str
    inside: str | None
    """As it stands in a report, if it is small."""

    @classmethod
    def of(cls, data: bytes) -> Body:
        inside = encode_inline(data) if len(data) <= INLINE_BYTES else None
        return cls(data, hashlib.sha256(data).hexdigest(), inside)


class Wire(asyncio.BufferedProtocol):
    """One connection: a request at a time, an answer at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._head = bytearray()
        self._left = -1  # of the body; −1 before the headers are whole
        self._status, self._headers = 0, {}
        self._body = bytearray()
        self._hash: Any = None
        self._answer: asyncio.Future[Any] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=2 * _PIECE)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _SCRATCH

    def buffer_updated(self, nbytes: int) -> None:
        MOVED[0] += nbytes
        data = _SCRATCH[:nbytes]
        if self._left < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(bytes(self._head[:end]))
            rest = bytes(self._head[end + 4 :])
            self._head.clear()
            data = memoryview(rest)
        self._left -= len(data)
        if self._hash is None:
            self._body += data
        else:
            self._hash.update(data)
        if self._left <= 0:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._may_write.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the connection was lost"))

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def begin(self) -> asyncio.Future[Any]:
        """Expect an answer."""
        self._left, self._hash = -1, None
        self._head.clear()
        self._body.clear()
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    async def write(self, data: memoryview) -> None:
        """Send bytes no faster than the other side reads; stop early when it has answered."""
        for start in range(0, len(data), _PIECE):
            if self.transport is None or self._answered():
                return
            piece = data[start : start + _PIECE]
            MOVED[0] += len(piece)
            self.transport.write(piece)
            await self._may_write.wait()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _answered(self) -> bool:
        return self._answer is not None and self._answer.done() and not self._answer.cancelled()

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self._status = int(first.split(" ", 2)[1])
        pairs = (line.partition(":") for line in lines)
        self._headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._left = int(self._headers.get("content-length", "0"))
        if self._headers.get("content-type") == "application/octet-stream":
            self._hash = hashlib.sha256()

    def _finish(self) -> None:
        content: Any = None
        if self._hash is not None:
            content = self._hash.hexdigest()
        elif self._body:
            content = json.loads(bytes(self._body))
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._status, self._headers, content))


class Place(NamedTuple):
    """Where the server is, and what it runs."""

    host: str
    port: int
    run: str
    run_key: bytes
    context: ssl.SSLContext

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"


def trusting(certificate: str) -> ssl.SSLContext:
    """A context that trusts the server's own certificate (PEM), whatever its name."""
    context = ssl.create_default_context(cadata=certificate)
    context.check_hostname = False
    return context


class LoadDevice:
    """An enrolled device, or one that will be."""

    def __init__(self, place: Place, key: bytes) -> None:
        self.place, self.key = place, key
        self.wire: Wire | None = None
        self.sequence = time.time_ns() // 10**6
        check_in = CheckIn(
            run=place.run, accepts=("float32", INLINE), runtime=RUNTIME, eligibility=Eligibility()
        )
        self.check_in_body = encode_message(check_in)

    async def connect(self) -> Wire:
        """The connection, made if there is none."""
        if self.wire is None or self.wire.transport is None:
            loop, place = asyncio.get_running_loop(), self.place
            _, self.wire = await loop.create_connection(
                Wire, place.host, place.port, ssl=place.context, ssl_handshake_timeout=300.0
            )
        return self.wire

    def head(self, method: str, path: str, body: bytes = b"", extra: str = "") -> bytes:
        """The signed head of a request: it may be sent later, and once."""
        self.sequence += 1
        signed = sign_request(
            self.key,
            method,
            self.place.authority,
            path,
            body,
            run_key=self.place.run_key,
            sequence=self.sequence,
            time_ms=time.time_ns() // 10**6,
        )
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.place.authority}"]
        lines += [f"{name}: {value}" for name, value in signed.items()]
        if method in _TYPES:
            lines += [f"Content-Type: {_TYPES[method]}", f"Content-Length: {len(body)}"]
        return ("\r\n".join(lines) + extra + "\r\n\r\n").encode()

    async def send(self, head: bytes, body: bytes | memoryview = b"") -> Answer:
        """A request as it is, and its answer.

        Raises:
            OSError: there is none.
        """
        wire = await self.connect()
        start = time.perf_counter()
        answered = wire.begin()
        if len(body) < _PIECE:
            await wire.write(memoryview(head + bytes(body)))
        else:
            await wire.write(memoryview(head))
            await wire.write(memoryview(body))
        status, headers, content = await answered
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, headers, content, time.perf_counter() - start)

    async def call(self, method: str, path: str, body: bytes = b"") -> Answer:
        """A request, tried again where the protocol says so."""
        tries = 0
        while True:
            try:
                head = self.head(method, path, body)
                answer = await self.send(head, body)
                if answer.status not in (429, 503):
                    return answer
                at_least = answer.retry_after or 0.0
            except OSError:
                self.close()
                at_least = 0.0
            tries += 1
            await asyncio.sleep(max(random.uniform(0, min(300.0, 2.0**tries)), at_least))

    async def enrol(self, token: str) -> Answer:
        """Use a token."""
        message = Enrol(
            token=token,
            public_key=public_key(self.key).hex(),
            runtime=RUNTIME,
            device_class="load",
        )
        return await self.call("POST", "/v1/enrol", encode_message(message))

    async def check_in(self) -> dict[str, Any]:
        """The message that a check-in is answered with."""
        answer = await self.call("POST", "/v1/check-in", self.check_in_body)
        return expect(answer, 200)

    async def download(self, given: dict[str, Any]) -> None:
        """The model of an assignment, inside it or not, checked against its digest."""
        manifest = json.loads(given["manifest"])
        if "model" in given:
            model = decode_inline(given["model"], manifest["length_bytes"])
            if hashlib.sha256(model).hexdigest() != manifest["sha256"]:
                raise RuntimeError("the model in the assignment is not its manifest's")
            return
        answer = await self.call("GET", f"/v1/models/{manifest['sha256']}")
        if answer.status != 200 or answer.content != manifest["sha256"]:
            raise RuntimeError(f"the model must be {manifest['sha256']}, got {answer}")

    async def report(self, given: dict[str, Any], body: Body) -> dict[str, Any]:
        """Announce an update."""
        message = Report(
            assignment=given["assignment"],
            round=given["round"],
            attempt=given["attempt"],
            codec=given["codec"],
            length_bytes=len(body.data),
            sha256=body.sha256,
            weight=1.0,
            loss=0.5,
            num_steps=1,
            metrics={},
            update=body.inside if "model" in given else None,
        )
        return expect(await self.call("POST", "/v1/report", encode_message(message)), 200)

    async def upload(self, stood: dict[str, Any], body: Body) -> dict[str, Any]:
        """Send what is left of an update."""
        while stood["type"] == "upload":
            start = stood["offset"]
            chunk = body.data[start : start + stood["chunk_bytes"]]
            path = f"/v1/uploads/{stood['upload']}?offset={start}"
            stood = expect(await self.call("PUT", path, chunk), 200)
        return stood

    async def take_part(self, given: dict[str, Any], body: Body) -> dict[str, Any]:
        """One round's work, without training."""
        await self.download(given)
        return await self.upload(await self.report(given, body), body)

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()
        self.wire = None


def expect(answer: Answer, status: int) -> dict[str, Any]:
    """The message in an answer of this status.

    Raises:
        RuntimeError: it is another.
    """
    if answer.status != status:
        raise RuntimeError(f"the answer must have status {status}, got {answer}")
    return answer.content
