"""A server in a process of its own, honest devices at work on it, and requests that are malformed.

`generated` are schemathesis's, from the OpenAPI description; `broken` are bytes for a socket. Both
come as they are, or signed by an enrolled device, so that they get past the gate.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import pickle
import random
import runpy
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import psutil
import requests
import schemathesis
from safetensors.numpy import load

from potluck.core import ProtocolError
from potluck.protocol import ROUTES, Accepted, Assignment, Error, Upload, parse_message
from potluck.server.admin.client import Operator
from potluck.server.storage.state_folder import StateFolder
from remote import Caller

HONEST = 4
MAX_SECONDS = 5.0
EXPERIMENT = f"""
name = "fleet"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 8
[algorithm]
client_lr = 0.1
[run]
rounds = 100000
cohort = {HONEST}
evaluate_every = 100000
[server]
goal = {HONEST}
minimum = 1.0
over_selection = 1.5
pace_seconds = 0.2
long_poll_seconds = 2.0
"""
OPENAPI = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "openapi.py"))["description"]()


class Request(NamedTuple):
    """Bytes to send. `is_whole`: an answer is due, without anything more being sent."""

    name: str
    data: bytes
    is_whole: bool = True


class Process:
    """`potluck serve` in a process of its own, until the end of the block."""

    def __init__(self, folder: Path, experiment: str = EXPERIMENT) -> None:
        self.home, self.log = StateFolder(folder / "home"), folder / "log"
        file = folder / "fleet.toml"
        file.write_text(experiment)
        words = [sys.executable, "-m", "potluck", "serve", file, "--home", self.home.folder]
        self._words = [*map(str, words), "--port"]
        self.port = 0

    def __enter__(self) -> Process:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self._words, str(self.port)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        told: dict[str, str] = {}
        while "admin" not in told:
            name, _, value = self.process.stdout.readline().partition(" ")
            assert name, self.log.read_text()
            told[name] = value.strip()
        self.address = told["address"]
        self.port = int(self.address.rsplit(":", 1)[1])
        self.operator = Operator(self.home)
        self.certificate = self.home.certificate.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()

    def device(self) -> Caller:
        caller = Caller(self.address, self.certificate)
        caller.enrol(self.operator.post("enroll")["invitations"][0])
        return caller

    def memory_bytes(self) -> int:
        """Private to the process: without the libraries' own pages."""
        return psutil.Process(self.process.pid).memory_full_info().uss

    def faults(self) -> list[str]:
        """The lines of the log that tell of an unhandled error.

        That the end of the server did not wait for a connection that was left open is none.
        """
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        faults = [line for line in lines if line["level"] == "error" or "trace" in line]
        return [str(line) for line in faults if "graceful shutdown" not in line["event"]]

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the newest."""
        models = (load(self.operator.fetch("export", **v)) for v in ({"version": 0}, {}))
        first, last = (np.concatenate([m[k].reshape(-1) for k in sorted(m)]) for m in models)
        return first, last


class HonestRounds:
    """Four devices that train all the time: an update is all ones, so each round adds one."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self.devices = [server.device() for _ in range(HONEST)]
        self.refused: list[str] = []
        self.accepted = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(d,)) for d in self.devices]

    def __enter__(self) -> HonestRounds:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for device in self.devices:
            device.close()

    def wait(self, rounds: int, seconds: float = 60.0) -> None:
        """Until so many rounds are committed."""
        end = time.monotonic() + seconds
        while self._server.operator.get("status")["round"] < rounds:
            assert time.monotonic() < end, self.refused
            self._over.wait(0.05)

    def _work(self, device: Caller) -> None:
        body = np.ones(650, "<f4").tobytes()
        while not self._over.is_set():
            try:
                self._round(device, body)
            except Exception as error:
                self.refused.append(f"{type(error).__name__}: {error}")

    def _round(self, device: Caller, body: bytes) -> None:
        given = device.check_in()
        if isinstance(given, Assignment):
            upload = device.report(given, body)
            answer = device.put(upload.upload, 0, body) if isinstance(upload, Upload) else upload
            if isinstance(answer, Accepted):
                self.accepted += 1
            else:
                self.refused.append(repr(answer))
        elif isinstance(given, Error):
            self.refused.append(repr(given))
        else:
            self._over.wait(min(given.retry_after_seconds, 0.2))


class Attack:
    """Sends requests, and notes what came of them."""

    def __init__(self, server: Process) -> None:
        self.server = server
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._context = ssl.create_default_context(cadata=server.certificate)
        self._context.check_hostname = False

    def send(self, request: Request, operation: dict | None = None) -> None:
        """One request on a connection of its own; `operation` is its OpenAPI description."""
        started = time.monotonic()
        try:
            self._judge(request, self._exchange(request), operation)
        except TimeoutError:
            self.wrong.append(f"{request.name}: no answer in {MAX_SECONDS} s")
        seconds = time.monotonic() - started
        self.slowest = max(self.slowest, seconds)
        if seconds > MAX_SECONDS:
            self.wrong.append(f"{request.name}: {seconds:.1f} s")

    def _exchange(self, request: Request) -> tuple[int, str, bytes] | None:
        """Status, content type and body; None: closed without an answer."""
        address = ("127.0.0.1", self.server.port)
        with (
            socket.create_connection(address, timeout=MAX_SECONDS) as plain,
            self._context.wrap_socket(plain) as secure,
        ):
            try:
                secure.sendall(request.data)
                if not request.is_whole:
                    return None
                answer = http.client.HTTPResponse(secure)
                answer.begin()
                body = b"" if request.data.startswith(b"HEAD") else answer.read()
                return answer.status, answer.headers.get("content-type", ""), body
            except (ConnectionError, ssl.SSLError, http.client.HTTPException):
                return None

    def _judge(self, request: Request, answer: tuple | None, operation: dict | None) -> None:
        if answer is None:
            self.statuses["closed"] += 1
            return
        status, kind, body = answer
        self.statuses[str(status)] += 1
        problem = _problem(status, kind, body, operation)
        if problem and not request.data.startswith(b"HEAD"):
            self.wrong.append(f"{request.name}: {problem}: {status} {body[:200]!r}")


def _problem(status: int, kind: str, body: bytes, operation: dict | None) -> str | None:
    """What is wrong with an answer, by the protocol and the description."""
    if status < 200 or status >= 500:
        return "a fault of the server"
    if b"Traceback" in body:
        return "a stack trace"
    if operation is not None and str(status) not in operation["responses"]:
        return "a status that the description does not have"
    if status < 400:
        return None
    if kind != "application/json":
        return f"the content type {kind}"
    try:
        code = parse_message(body, Error, limit=2**20).code
    except ProtocolError as error:
        return str(error)
    if operation is not None:
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        if code not in schema["properties"]["code"]["enum"]:
            return f"the code {code}, which the description does not have"
    return None


def generated(count: int, seed: int, device: Caller) -> Iterator[tuple[Request, dict]]:
    """About so many requests that schemathesis makes: right and wrong by the description, with
    its own headers or with a signature."""
    schema = schemathesis.openapi.from_dict(OPENAPI)
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    each = -(-count // (len(operations) * len(modes)))
    for operation in operations:
        for mode in modes:
            for i, case in enumerate(_cases(operation, mode, each, seed)):
                found = _prepared(case)
                if found is not None:
                    method, path, headers, body = found
                    if i % 3:
                        headers |= device.signed(method, path, body)
                    data = written(method, path, headers | {"Host": device.authority}, body)
                    yield Request(f"{operation.label} {mode.value}", data), operation.definition.raw


def _cases(operation, mode, count: int, seed: int) -> list:
    cases: list = []
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case) -> None:
        cases.append(case)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong about it
        collect()
    return cases[:count]


def _prepared(case) -> tuple[str, str, dict[str, str], bytes] | None:
    """Method, path, headers and body of a case; None if it is none that HTTP can carry."""
    try:
        request = requests.Request(**case.as_transport_kwargs(base_url="http://x")).prepare()
    except (requests.RequestException, ValueError, UnicodeError):
        return None
    body = request.body or b""
    body = body.encode() if isinstance(body, str) else bytes(body)
    headers = {
        str(k).title(): v.decode("latin-1") if isinstance(v, bytes) else str(v)
        for k, v in request.headers.items()
        if str(k).title() not in ("Host", "Content-Length", "Transfer-Encoding")
    }
    method, path = str(request.method), request.path_url
    if not path.isascii() or not path.isprintable() or len(path) > 2000:
        return None
    return method, path, headers, body


def written(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
    """A request as bytes; its length is added."""
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("utf-8", "replace") + body


class Broken:
    """Malformed requests, each made from a good one; the seed decides all of them."""

    def __init__(self, seed: int, device: Caller, upload: str, sha256: str) -> None:
        self.random = random.Random(seed)
        self._device = device
        self._ids = {"upload": upload, "sha256": sha256, "offset": "0"}
        self._bodies = {
            route.path: json.dumps(_content(route.request.__name__)).encode()
            for route in ROUTES
            if route.request not in (None, "bytes")
        }

    def __iter__(self) -> Iterator[Request]:
        while True:
            make = self.random.choice(_BREAKING)
            yield make(self)

    def good(self) -> tuple[str, str, dict[str, str], bytes]:
        """Method, path, headers and body, of any route; signed."""
        route = self.random.choice(ROUTES)
        path = route.path.format(**self._ids)
        body = bytes(2600) if route.request == "bytes" else self._bodies.get(route.path, b"")
        return route.method, path, self.headers(route.method, path, body), body

    def headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        kind = "application/octet-stream" if method == "PUT" else "application/json"
        signed = self._device.signed(method, path, body)
        return {"Host": self._device.authority, "Content-Type": kind} | signed

    def noise(self, longest: int) -> bytes:
        return self.random.randbytes(self.random.randrange(1, longest))


def _content(name: str) -> dict:
    """A message that is well formed, for a thing that is not there."""
    place = {"assignment": "0" * 32, "round": 1, "attempt": 1}
    runtime = {"name": "x", "version": "1"}
    return {
        "Preview": {"type": "preview", "token": "x" * 43, "public_key": "00" * 32},
        "Enrol": {"type": "enrol", "token": "x" * 43, "public_key": "00" * 32}
        | {"runtime": runtime, "device_class": "x"},
        "CheckIn": {"type": "check_in", "run": "another", "accepts": ["float32"]}
        | {"runtime": runtime, "eligibility": {}},
        "Progress": {"type": "progress", "assignment": "0" * 32, "phase": "train", "fraction": 0.5},
        "Report": {"type": "report", "codec": "float32", "length_bytes": 2600, "sha256": "0" * 64}
        | {"weight": 1.0, "loss": 0.5, "num_steps": 1, "metrics": {}}
        | place,
        "Evaluation": {"type": "evaluation", "metrics": {"loss": [1.0, 2]}} | place,
        "Failed": {"type": "failed", "assignment": "0" * 32, "reason": "error"},
    }[name]


HOSTILE_VALUES = (
    "NaN", "-Infinity", "1e999", "9" * 400, "-1", "0", "null", "true", '""', "[]", "{}",
    '"\\ud800"', '"\\u0000"', '"' + "x" * 3000 + '"', "[" * 3000, '{"a":' * 600, "1.0",
    "0x10", "1_0", "'a'", '"../../etc/passwd"', '"%s%n"', '"; DROP TABLE devices; --"',
)  # fmt: skip
HOSTILE_PATHS = (
    "/", "//", "/v1", "/v1/", "/v1/enrol/", "/v1/check-in/../enrol", "/v1/models/..%2f..%2fx",
    "/v1/models/" + "A" * 64, "/v1/uploads/%00", "/v1/uploads/" + "0" * 31, "/v1/models/*", "*",
    "/v1/%2e%2e/%2e%2e/etc/passwd", "/" + "x" * 3000, "/admin/status", "/metrics", "/docs", "/?",
    "/v1/check-in?x=" + "y" * 1000, "/v1/check-in#x", "http://[/x", "http://elsewhere/v1/enrol",
    "/v1/uploads/" + "0" * 32 + "?offset=" + "9" * 99, "/v1/uploads/" + "0" * 32 + "?offset=-0",
    "/%ff%fe", "/v1/check-in%0d%0aX:y", "/v2/check-in", "/static/..%5c..%5cx", "/.git/config",
)  # fmt: skip


def _hostile_value(make: Broken) -> Request:
    """One value of a message is another, under a right signature."""
    route = make.random.choice([r for r in ROUTES if r.path in make._bodies])
    text = make._bodies[route.path].decode()
    content = json.loads(text)
    name = make.random.choice(list(content))
    old = f'"{name}": {json.dumps(content[name])}'
    assert old in text
    value = make.random.choice(HOSTILE_VALUES)
    body = text.replace(old, f'"{name}": {value}').encode()
    if make.random.random() < 0.2:
        body = body.replace(b"{", f'{{"{name}": 1, '.encode(), 1)  # a key twice
    headers = make.headers(route.method, route.path, body)
    return Request("a hostile value", written(route.method, route.path, headers, body))


def _noise_as_body(make: Broken) -> Request:
    method, path, _, body = make.good()
    kinds = (
        lambda: make.noise(3000),
        lambda: pickle.dumps({"a": [1, 2, 3]}),
        lambda: gzip.compress(bytes(10**6)),
        lambda: body[: make.random.randrange(len(body) + 1)],
        lambda: body + make.noise(20),
        lambda: b"\xef\xbb\xbf" + body,
        lambda: b"\x00" * make.random.randrange(1, 5000),
    )
    body = make.random.choice(kinds)()
    headers = make.headers(method, path, body)
    if make.random.random() < 0.3:
        encoding = make.random.choice(["gzip", "br", "deflate", "gzip, gzip", "identity", "x"])
        headers["Content-Encoding"] = encoding
    return Request("noise as a body", written(method, path, headers, body))


def _flipped(make: Broken) -> Request:
    """Some bytes of the head are others. The server may wait for more of it: nobody does here."""
    data = bytearray(written(*make.good()))
    end = data.index(b"\r\n\r\n")
    for _ in range(make.random.randrange(1, 6)):
        data[make.random.randrange(end)] = make.random.randrange(256)
    whole = data.find(b"\r\n\r\n") == end and b"Content-Length: " in data
    return Request("flipped bytes", bytes(data), is_whole=whole and _length(data) is not None)


def _length(data: bytes) -> bool | None:
    """Whether the body is as long as its head announces; None: it is not, or cannot be told."""
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            value = line.partition(b":")[2].strip()
            return True if value.isdigit() and int(value) == len(body) else None
    return None


def _other_path(make: Broken) -> Request:
    method = make.random.choice(["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "TRACE", "X"])
    path = make.random.choice(HOSTILE_PATHS)
    headers = {"Host": make._device.authority}
    if path.isprintable() and len(path) < 2000:
        headers = make.headers(method, path, b"")
    return Request("another path", written(method, path, headers, b""))


def _other_headers(make: Broken) -> Request:
    method, path, headers, body = make.good()
    name = make.random.choice(list(headers))
    match make.random.randrange(7):
        case 0:
            del headers[name]
        case 1:
            headers[name.upper() + " "] = headers.pop(name)
        case 2:
            headers[name] = make.noise(200).hex()
        case 3:
            headers[f"X: y\r\n{name}"] = headers[name]  # twice, where it is a signature's
            headers[name.lower()] = headers[name]
        case 4:
            headers[name] += "\x7f" * make.random.randrange(1, 9)
        case 5:
            headers[name] = "9" * make.random.choice([15, 16, 17, 400, 5000])
        case 6:
            headers["X-Long"] = "y" * make.random.choice([8000, 40_000, 200_000])
    return Request("other headers", written(method, path, headers, body))


def _other_length(make: Broken) -> Request:
    """Lengths that are none: each is answered by what it announces."""
    method, path, headers, _ = make.good()
    lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
    lengths = (
        ["Content-Length: -1"], ["Content-Length: +5"], ["Content-Length: 0x5"],
        ["Content-Length: 5, 6"], ["Content-Length: 1e3"], ["Content-Length: "],
        [f"Content-Length: {2**63}"], ["Content-Length: " + "9" * 30],
        ["Content-Length: 4", "Content-Length: 5"],
        ["Content-Length: 3", "Transfer-Encoding: chunked"], ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: x"], ["Transfer-Encoding: chunked"],
    )  # fmt: skip
    lines += make.random.choice(lengths)
    ends = (b"zz\r\n", b"fffffffffffffffff\r\n", b"-1\r\nx", b"5;x=y\r\nhello\r\n0\r\n\r\n")
    data = "\r\n".join([*lines, "", ""]).encode() + make.random.choice(ends)
    return Request("another length", data)


def _many_headers(make: Broken) -> Request:
    count = make.random.choice([100, 3000, 100_000])
    lines = [f"X-{i}: y" for i in range(count)]
    data = "\r\n".join(["GET /health HTTP/1.1", "Host: x", *lines, "", ""]).encode()
    return Request(f"{count} headers", data)


def _no_http(make: Broken) -> Request:
    kinds = (
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00" + make.noise(300) + b"\r\n\r\n",
        lambda: make.noise(2000) + b"\r\n\r\n",
        lambda: b"\x00" * 40_000,
        lambda: b"GET /\r\n\r\n",
        lambda: b"GET  /health  HTTP/1.1\r\n\r\n",
        lambda: b"GET /health HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        lambda: b"GET /health HTTP/1.1\nHost: x\nX\n\n",
        lambda: b"\x80\x04K*." * 10_000,
    )
    return Request("no HTTP", make.random.choice(kinds)())


def _cut(make: Broken) -> Request:
    """Broken off somewhere."""
    data = written(*make.good())
    return Request("cut off", data[: make.random.randrange(len(data))], is_whole=False)


_BREAKING = (
    _hostile_value, _hostile_value, _noise_as_body, _noise_as_body, _flipped, _other_path,
    _other_headers, _other_length, _many_headers, _no_http, _cut,
)  # fmt: skip
