"""Attackers that are at work during a whole `year`, one of each kind; each counts what it did."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections import Counter

import httpx
import numpy as np

from potluck.core import PotluckError
from potluck.protocol import Accepted, Assignment, Error, Message, encode_inline, encode_message
from remote import Caller, read
from year import Year


def silent_sockets(year: Year, stop: threading.Event, found: Counter[str]) -> None:
    """Connections that say nothing, as many as the server's usual limit of descriptors."""
    while not stop.is_set():
        kept = []
        with contextlib.suppress(OSError):
            for _ in range(1100):
                kept.append(socket.create_connection(("127.0.0.1", year.server.port), timeout=2.0))
        found["silent sockets"] += len(kept)
        stop.wait(20.0)
        for one in kept:
            one.close()
        stop.wait(5.0)


def slow_bodies(year: Year, stop: threading.Event, found: Counter[str]) -> None:
    """Anonymous requests whose bodies come a byte a second."""
    head = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 4000\r\nPotluck-Device: " + b"0" * 32 + b"\r\n\r\n{"
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while not stop.is_set():
        kept = []
        for _ in range(32):
            with contextlib.suppress(OSError):
                raw = socket.create_connection(("127.0.0.1", year.server.port), timeout=5.0)
                kept.append(context.wrap_socket(raw))
                kept[-1].sendall(head)
        found["slow bodies"] += len(kept)
        for _ in range(15):
            for one in kept:
                with contextlib.suppress(OSError):
                    one.sendall(b" ")
            stop.wait(1.0)
        for one in kept:
            one.close()


def signatures_from_elsewhere(year: Year, stop: threading.Event, found: Counter[str]) -> None:
    """Requests that a device signed for another server, and requests that are repeated."""
    caller = _enrolled(year)
    while not stop.wait(1.0):
        with contextlib.suppress(httpx.TransportError, PotluckError):
            body = encode_message(caller.check_in_of())
            caller.authority = "elsewhere.example:8443"
            answer = read(caller.send("POST", "/v1/check-in", body))
            assert isinstance(answer, Error), answer
            caller.authority = httpx.URL(year.line.address).netloc.decode()
            headers = caller.signed("POST", "/v1/check-in", body)
            for _ in range(3):
                answer = read(caller.send("POST", "/v1/check-in", body, headers=headers))
            assert isinstance(answer, Error), answer
            found["signatures from elsewhere"] += 4
    caller.close()


def numbers_beyond_reason(year: Year, stop: threading.Event, found: Counter[str]) -> None:
    """Reports with losses, weights, counts of steps and norms that no device has."""
    caller, kinds = _enrolled(year), ("loss", "weight", "num_steps", "norm", "not finite")
    while not stop.wait(0.5):
        with contextlib.suppress(httpx.TransportError, PotluckError):
            given = caller.check_in()
            if not isinstance(given, Assignment):
                continue
            kind = year.dice.choice(kinds)
            vector = np.zeros(650, np.float32)
            if kind == "norm":
                vector[:] = 1e6
            if kind == "not finite":
                vector[0] = np.inf
            changes = {"loss": {"loss": 1e30}, "weight": {"weight": 1e9}}.get(kind, {})
            if kind == "num_steps":
                changes = {"num_steps": 2**60}
            answer = _sent(caller, given, vector, **changes)
            assert not isinstance(answer, Accepted), kind
            found[f"beyond reason: {kind}"] += 1
    caller.close()


def one_against_the_others(year: Year, stop: threading.Event, found: Counter[str]) -> None:
    """A device whose updates are within the bounds, and weigh as all others together and more."""
    caller = _enrolled(year)
    while not stop.wait(1.0):
        with contextlib.suppress(httpx.TransportError, PotluckError):
            given = caller.check_in()
            if not isinstance(given, Assignment):
                continue
            client = given.client
            year.sent[client] = np.full(650, -4.0, np.float32), 1000.0
            told = year.told.setdefault(caller.id, [])
            while not stop.is_set():  # until it is answered: what was accepted is told
                with contextlib.suppress(httpx.TransportError):
                    answer = _sent(caller, given, year.sent[client][0], weight=1000.0)
                    break
                stop.wait(0.5)
            else:
                continue
            if isinstance(answer, Accepted):
                told.append((given.round, given.attempt))
                found["one against the others"] += 1
    caller.close()


def _sent(caller: Caller, given: Assignment, vector: np.ndarray, **changes: float) -> Message:
    """Send a report with an update inside, whose numbers may be beyond what messages allow."""
    body = vector.astype("<f4").tobytes()
    message = caller.report_of(given, body, update=encode_inline(body))
    told = json.loads(encode_message(message)) | changes
    return read(caller.send("POST", "/v1/report", json.dumps(told).encode()))


def _enrolled(year: Year) -> Caller:
    caller = Caller(year.line.address, year.server.certificate)
    caller.enrol(year.server.invite())
    return caller


def browse(year: Year) -> int:
    """What the dashboard answers to an operator."""
    context = ssl.create_default_context(cadata=year.server.certificate)
    context.check_hostname = False
    key = year.server.operator.post("dashboard")["link"].partition("#")[2]
    with httpx.Client(base_url=year.server.address, verify=context, timeout=60.0) as client:
        assert client.post("/dashboard/sign-in", data={"key": key}).status_code == 303
        return client.get("/dashboard").status_code


ATTACKERS = [silent_sockets, slow_bodies, signatures_from_elsewhere, numbers_beyond_reason]
ATTACKERS += [one_against_the_others]
