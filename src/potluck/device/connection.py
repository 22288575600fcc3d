"""A device's connection to its server: signed requests, tried again until they are answered.

One request at a time. Before each the next sequence number is stored, and the request recorded. A
request without an answer, or with one that is not of the protocol (a proxy's page, say), is tried
again after a random time that grows. So is one that cannot be recorded because the disk is full, or
that would go to another server than the pinned one. A refusal is raised. A wrong clock is corrected
by the server's time, once for a request. Between corrections time is counted by the monotonic
clock, so a jump of the machine's clock moves no deadline in the middle of the work.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, NoReturn, TypeVar

import httpx

from potluck.core import ConfigError, ProtocolError, RefusedError
from potluck.device.clock import Clock
from potluck.device.folder import Home
from potluck.device.sent_log import Record
from potluck.device.transport import client_context
from potluck.device.trouble import Backoff, Trouble
from potluck.protocol import (
    LONG_POLL_SECONDS,
    MAX_ANSWER_BYTES,
    MAX_SKEW_MS,
    STATUS,
    Error,
    Message,
    encode_message,
    parse_message,
    sign_request,
)
from potluck.protocol.routes import is_loopback

M = TypeVar("M", bound=Message)

LATEST_MS = 4_102_444_800_000
"""The year 2100. Sequence numbers may start from the time: a later one could use them all up."""
_TEMPORARY = ("misdirected", "overloaded", "internal", "unavailable")
_TRIES = {"clock": 1, "replayed": 4, "digest": 2}
"""The tries of a request that was refused so. From the second on the sequence number is doubled."""
_TIMEOUT = httpx.Timeout(2.0 * LONG_POLL_SECONDS, connect=15.0)


class Unanswered(Exception):
    """A request without an answer of the protocol; it may be tried again."""

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class _Answer(NamedTuple):
    status: int
    body: bytes


class Connection:
    """An open connection to the server."""

    def __init__(
        self,
        url: str,
        certificate: str | None,
        server_key: str,
        home: Home,
        record: Record,
        clock: Clock,
        *,
        proxy: str | None = None,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        self._url = check_url(url, certificate)
        self._authority = self._url.netloc.decode().lower()
        self._home = home
        self._key, self._run_key = home.key(), bytes.fromhex(server_key)
        self._record = record
        self._replays = 0  # of the request under way
        self._clock = clock
        self._uniform = uniform
        self._trouble = Trouble(self.backoff())
        self._offset_ms = clock.now_ms() - _elapsed_ms(clock)  # of the server's time, as known
        self._client = httpx.Client(  # nothing else of the environment: no .netrc
            verify=client_context(certificate), timeout=_TIMEOUT, trust_env=False, proxy=proxy
        )

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def hurry(self) -> None:
        """Waits for no answer longer than a few seconds from now on."""
        self._client.timeout = httpx.Timeout(3.0)

    def close(self) -> None:
        """Closes the sockets."""
        self._client.close()

    def now_ms(self) -> int:
        """Returns Unix time by the server's clock, as far as it is known."""
        return _elapsed_ms(self._clock) + self._offset_ms

    def backoff(self) -> Backoff:
        """Returns a new wait between tries."""
        return Backoff(self._clock, *filter(None, [self._uniform]))

    def ask(
        self,
        path: str,
        message: Message,
        *answers: type[M],
        until_ms: int | None = None,
    ) -> M:
        """Posts a message until it is answered.

        Args:
            until_ms: by the server's clock; nothing is tried again later.

        Raises:
            RefusedError: with the server's code; "late" after `until_ms`.
        """
        return self.call("POST", path, encode_message(message), *answers, until_ms=until_ms)

    def call(
        self,
        method: str,
        path: str,
        body: bytes,
        *answers: type[M],
        until_ms: int | None = None,
    ) -> M:
        """Sends a request until it is answered; see `ask`."""
        corrections = self._replays = 0
        while True:
            self._clock.wait(0)
            try:
                answer = self.call_once(method, path, body, *answers)
            except (Unanswered, OSError) as error:
                if until_ms is not None and self.now_ms() >= until_ms:
                    raise RefusedError(
                        "late", f"there was no answer in time ({error}). Check in again."
                    ) from None
                after = error.retry_after_seconds if isinstance(error, Unanswered) else 0.0
                self._trouble.wait(error, after)
            except RefusedError as error:
                corrections += 1
                again = _TRIES.get(error.code, 0)
                # A chunk's digest may also be that of the whole upload: the uploader tells them
                # apart.
                if corrections > again or (error.code == "digest" and method == "PUT"):
                    self._trouble.over()
                    raise
            else:
                self._trouble.over()
                return answer

    def call_once(self, method: str, path: str, body: bytes, *answers: type[M]) -> M:
        """Sends a request once.

        Raises:
            Unanswered: it may be tried again.
            RefusedError: with the server's code.
        """
        with self.stream(method, path, body) as response:
            answer = _Answer(response.status_code, read_answer(response))
        try:
            if answer.status == 200:
                return parse_message(answer.body, *answers, limit=MAX_ANSWER_BYTES)
            self.refuse(answer.status, answer.body)
        except ProtocolError as error:
            told = f"status {answer.status} without a message: {error}"
            raise Unanswered(f"{self._url} gives no answer of a server ({told})") from None

    @contextmanager
    def stream(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Generator[httpx.Response]:
        """Sends a request once, and reads the answer piecewise.

        Raises:
            Unanswered: there is none, or it breaks off, or it is another server's.
        """
        is_message = method == "POST"
        signed = self._sign(method, path, body)
        self._record.add(self._clock.now_ms(), method, path, body, is_message=is_message)
        kinds = {"Content-Type": "application/json" if is_message else "application/octet-stream"}
        request = self._client.build_request(
            method,
            self._url.copy_with(raw_path=path.encode()),
            content=body if method != "GET" else None,
            headers={"Accept-Encoding": "identity"}
            | signed
            | (kinds if method != "GET" else {})
            | dict(headers or {}),
        )
        try:
            response = self._client.send(request, stream=True, follow_redirects=False)
            try:
                if "content-encoding" in response.headers:
                    raise Unanswered("the answer is encoded, which no server of ours does")
                yield response
            finally:
                response.close()
        except (httpx.RequestError, httpx.StreamError) as error:
            root = _root(error)
            if isinstance(root, ssl.SSLCertVerificationError):
                raise Unanswered(self._untrusted(root)) from None
            told = f"{type(error).__name__}: {error}"
            raise Unanswered(f"{self._url} gives no answer ({told})") from None

    def _untrusted(self, error: ssl.SSLCertVerificationError) -> str:
        """Returns why a certificate is not trusted. With a pinned one our own check says so."""
        reason = getattr(error, "verify_message", "")
        if not reason:
            return str(error.args[0])
        return (
            f"the certificate must be of {self._authority}, by an authority that this device "
            f"knows, got: {reason.rstrip('.')}. Use the name that is on it, or name the file of a "
            "private authority in SSL_CERT_FILE."
        )

    def refuse(self, status: int, body: bytes) -> NoReturn:
        """Raises the error in an answer that is not a success.

        Raises:
            Unanswered: it may be tried again.
            RefusedError: it may not, as it is.
            ProtocolError: it is not an answer of the protocol.
        """
        error = parse_message(body, Error, limit=MAX_ANSWER_BYTES)
        if STATUS[error.code] != status:
            raise ProtocolError("malformed", f"status {status} does not go with {error.code}")
        if error.code in _TEMPORARY:
            raise Unanswered(error.message, error.retry_after_seconds or 0.0)
        if error.code in ("clock", "replayed") and error.server_time_ms is not None:
            self.correct_clock(error.server_time_ms)
        if error.code == "replayed":  # a number was lost: go on from the time
            if self._replays:
                self._home.double_sequence()
            else:
                self._home.next_sequence(self.now_ms())
            self._replays += 1
        raise RefusedError(error.code, error.message)

    def correct_clock(self, server_time_ms: int) -> None:
        """Sets the time by the server's from here on. Small differences come from the way.

        Nobody signs this time. An intermediary can move it, and so keep a manifest from expiring.
        It cannot bring back an older manifest than the last, since versions count
        (`verify_manifest`).
        """
        if server_time_ms > LATEST_MS:
            return
        offset = server_time_ms - _elapsed_ms(self._clock)
        if abs(offset - self._offset_ms) > MAX_SKEW_MS // 10:
            self._offset_ms = offset

    def _sign(self, method: str, path: str, body: bytes) -> dict[str, str]:
        first = 1 if self._home.has_sequence() or self._home.enrolment() is None else self.now_ms()
        return sign_request(
            self._key,
            method,
            self._authority,
            path,
            body,
            run_key=self._run_key,
            sequence=self._home.next_sequence(first),
            time_ms=self.now_ms(),
        )


def _elapsed_ms(clock: Clock) -> int:
    return round(clock.monotonic() * 1000)


def check_url(url: str, certificate: str | None) -> httpx.URL:
    """Returns the address of a server, checked.

    Raises:
        ConfigError: it is none, or one that a device may not use.
    """
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:
        found = httpx.URL("")
    if found.scheme not in ("https", "http") or not found.host or found.path not in ("", "/"):
        raise ConfigError(
            f"the server's address must look like https://host:port, got url={url!r}. "
            "Copy it from what `potluck serve` printed."
        )
    if found.scheme == "http" and not is_loopback(found.host):
        raise ConfigError(f"plain http is for this machine alone, got url={url!r}. Use https://.")
    if found.scheme == "http" and certificate is not None:
        raise ConfigError(
            f"the invitation names a certificate, got url={url!r} without TLS. Use https://."
        )
    return found


def read_answer(response: httpx.Response) -> bytes:
    """Returns the body of an answer that should be a message.

    Raises:
        Unanswered: it is longer than any message.
    """
    body = b""
    for part in response.iter_raw():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise Unanswered(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return body


def _root(error: BaseException) -> BaseException:
    """Returns the error that another one goes back to."""
    while error.__context__ is not None:
        error = error.__context__
    return error
