"""Bodies that are not what they say: pickles, bombs, wrong vectors, hostile JSON. All are 4xx."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import pickle
import re
import socket
import ssl
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hostile import written
from potluck.protocol import ROUTES, STATUS, Error, Upload, encode_vector, parse_message
from potluck.server.rounds.enrolment import enrol, issue_tokens
from remote import Served

SOURCE = Path(__file__).parents[2] / "src" / "potluck"
DIM = 600
LENGTH = 4 * DIM


class Bomb:
    """A pickle that does something when it is read."""

    def __reduce__(self):
        return (Path("/tmp/potluck-was-here").touch, ())


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(DIM)}, file)
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(DIM, np.float32))
    return file.getvalue()


BODIES = {
    "pickle": pickle.dumps(Bomb()),
    "torch zip": torch_zip(),
    "npy": numpy_file(),
    "gzip": gzip.compress(bytes(10**7)),
    "empty": b"",
    "noise": bytes(range(256)),
    "depth 10,000": b"[" * 10_000 + b"]" * 10_000,
    "depth 2,000": b'{"a":' * 600 + b"1" + b"}" * 600,
    "duplicate keys": b'{"type":"failed","type":"failed"}',
    "escaped duplicate": b'{"type":"failed","\\u0074ype":"failed"}',
    "a huge integer": b'{"type":"progress","fraction":' + b"9" * 3000 + b"}",
    "2^53": b'{"type":"report","round":9007199254740992}',
    "NaN": b'{"type":"progress","fraction":NaN}',
    "Infinity": b'{"type":"progress","fraction":-Infinity}',
    "1e999": b'{"type":"progress","fraction":1e999}',
    "a surrogate": b'{"type":"\\ud800"}',
    "UTF-16": '{"type":"failed"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"type":"failed"}',
    "a second value": b'{"type":"failed"}{}',
    "YAML": b"type: !!python/object/apply:os.system ['true']",
    "a prototype": b'{"__proto__":{},"type":"failed"}',
}
REFUSALS = {400, 404, 413, 415}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("served"), count=100, dim=DIM) as served:
        yield served


def refused(answer) -> str:
    """The code of a 4xx."""
    error = parse_message(answer.content, Error)
    assert answer.status_code == STATUS[error.code]
    assert 400 <= answer.status_code < 500
    return error.code


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_message_is_refused_on_every_route(served, name):
    device = served.device()
    for route in ROUTES:
        path = route.path.format(sha256="0" * 64, upload="0" * 32, offset=0)
        if route.method == "GET":
            continue
        answer = device.send(route.method, path, BODIES[name])
        assert refused(answer) in ("malformed", "too_large", "not_found")
    assert not Path("/tmp/potluck-was-here").exists()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_encoded_body_is_refused_and_not_unpacked(served, method, encoding):
    device = served.device()
    path = "/v1/report"
    if method == "PUT":
        upload = device.report(device.assigned(), bytes(LENGTH))
        path = f"/v1/uploads/{upload.upload}?offset=0"
    bomb = zlib.compress(bytes(10**7), 9) if encoding == "deflate" else gzip.compress(bytes(10**7))
    headers = device.signed(method, path, bomb) | {"Content-Encoding": encoding}
    tracemalloc.start()
    try:
        assert refused(device.send(method, path, bomb, headers=headers)) == "media"
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6  # of 10 MB, were it unpacked
    finally:
        tracemalloc.stop()


def exchanged(served, data: bytes, seconds: float = 10.0) -> bytes:
    """What is answered until the server closes."""
    context = ssl.create_default_context(cadata=served.home.certificate.read_text())
    context.check_hostname = False
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as plain,
        context.wrap_socket(plain) as secure,
    ):
        try:
            secure.sendall(data)
            while piece := secure.recv(65_536):
                answer += piece
        except (ConnectionError, ssl.SSLError):  # it closed while we were still sending
            pass
    return answer


@pytest.mark.parametrize("count", [200, 2_000, 100_000])
def test_more_headers_than_anyone_needs_are_refused(served, count):
    device = served.device()
    path = "/v1/uploads/" + "0" * 32
    headers = {"Host": device.authority} | device.signed("GET", path)
    headers |= {f"X-Header-{i}": "something" for i in range(count)}
    started = time.monotonic()
    answer = exchanged(served, written("GET", path, headers, b""))
    assert time.monotonic() - started < 5.0
    assert answer.startswith(b"HTTP/1.1 400 ") or answer == b""  # it may close while we still send
    assert refused(device.send("GET", path)) == "not_found"  # and it serves on


VECTORS = {
    "NaN": (np.full(DIM, np.nan, "<f4").tobytes(), "not_finite"),
    "one NaN at the end": (np.r_[np.zeros(DIM - 1), np.nan].astype("<f4").tobytes(), "not_finite"),
    "Inf": (np.full(DIM, np.inf, "<f4").tobytes(), "not_finite"),
    "-Inf": (np.r_[-np.inf, np.zeros(DIM - 1)].astype("<f4").tobytes(), "not_finite"),
    "too large": (np.full(DIM, 1e30, "<f4").tobytes(), "bounds"),
    "float64 in as many bytes": (np.full(DIM // 2, -1e300, "<f8").tobytes(), None),
    "big-endian": (np.full(DIM, 1.0, ">f4").tobytes(), "ok"),  # tiny numbers: a vector too
}
LENGTHS = {
    "float64": np.zeros(DIM, "<f8").tobytes(),
    "float16": np.zeros(DIM, "<f2").tobytes(),
    "int8 codec": encode_vector(np.ones(DIM, np.float32), "int8", np.random.default_rng(0)).body,
    "another shape": bytes(4 * (DIM + 10)),
    "a byte less": bytes(LENGTH - 1),
    "a byte more": bytes(LENGTH + 1),
    "torch zip": torch_zip(),
    "npy": numpy_file(),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_that_cannot_be_averaged_is_refused(served, name):
    body, code = VECTORS[name]
    device = served.device()
    upload = device.report(device.assigned(), body)
    path = f"/v1/uploads/{upload.upload}?offset=0"
    answer = device.send("PUT", path, body)
    if code == "ok":
        assert answer.status_code == 200
    else:
        assert refused(answer) in ((code,) if code else ("not_finite", "bounds"))


@pytest.mark.parametrize("name", LENGTHS)
def test_a_vector_of_another_length_is_refused_when_it_is_announced(served, name):
    device = served.device()
    answer = device.report(device.assigned(), LENGTHS[name])
    assert (type(answer), answer.code) == (Error, "wrong_length")


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_body_that_is_not_as_long_as_announced_is_never_accepted(served, extra):
    device = served.device()
    body = np.ones(DIM, "<f4").tobytes()
    upload = device.report(device.assigned(), body)
    wrong = body[:-1] if extra < 0 else body + b"\0"
    answer = device.send("PUT", f"/v1/uploads/{upload.upload}?offset=0", wrong)
    if extra > 0:
        assert refused(answer) == "malformed"
    else:
        assert isinstance(parse_message(answer.content, Upload), Upload)  # one byte is missing
        path = f"/v1/uploads/{upload.upload}?offset={LENGTH - 1}"
        assert refused(device.send("PUT", path, b"\x01")) == "digest"


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"weight": 1e9}, {"bounds"}),
        ({"weight": 0}, {"malformed"}),
        ({"weight": 1e400}, {"malformed"}),
        ({"loss": float("nan")}, {"malformed"}),
        ({"length_bytes": 2**40}, {"wrong_length"}),
        ({"length_bytes": 2**63}, {"malformed"}),
        ({"num_steps": -1}, {"malformed"}),
        ({"codec": "int8"}, {"malformed"}),
        ({"codec": "pickle"}, {"malformed"}),
        ({"round": 10**9}, {"malformed"}),
        ({"attempt": 2}, {"malformed"}),
        ({"assignment": "../../x"}, {"malformed"}),
    ],
    ids=str,
)
def test_a_report_with_a_hostile_number_is_refused(served, change, codes):
    device = served.device()
    given = device.assigned()
    content = {
        "type": "report", "assignment": given.assignment, "round": given.round, "attempt": 1,
        "codec": "float32", "length_bytes": LENGTH, "weight": 1.0, "loss": 0.5, "num_steps": 1,
        "sha256": hashlib.sha256(bytes(LENGTH)).hexdigest(), "metrics": {},
    }  # fmt: skip
    answer = device.send("POST", "/v1/report", json.dumps(content | change).encode())
    assert refused(answer) in codes


def test_one_device_cannot_hold_more_than_its_share(served):
    from potluck.core import ProtocolError
    from potluck.server.http.admission import DEVICE_REQUESTS, DeviceRequests

    requests = DeviceRequests()
    scopes = [{} for _ in range(DEVICE_REQUESTS + 1)]
    for scope in scopes[:-1]:
        requests.enter(scope, "a")
    with pytest.raises(ProtocolError) as caught:
        requests.enter(scopes[-1], "a")
    assert caught.value.code == "overloaded"
    requests.leave(scopes[-1])  # it was refused: nothing to leave
    requests.enter(scopes[-1], "b")
    requests.leave(scopes[0])
    requests.enter({}, "a")
    with pytest.raises(ProtocolError):
        requests.enter({}, "a")


def test_made_up_methods_leave_no_trace_in_the_metrics(served):
    caller = served.caller()
    for i in range(30):  # not HTTP to a parser that knows all methods there are
        assert caller.http.request(f"X{i}", "/v1/enrol").status_code == 400
    for method in ("DELETE", "PURGE", "MKCOL", "REPORT", "M-SEARCH"):
        assert caller.http.request(method, "/v1/enrol").status_code == 405
    methods = set(re.findall(r'method="([^"]*)"', served.operator.text("metrics")))
    assert methods <= {"", "GET", "POST", "PUT"}


@pytest.mark.parametrize(
    ("text", "status"),
    [("bytes=-0", 416), ("bytes=-1", 206), ("bytes=0-", 206), ("bytes=2400-", 416), ("x", 200)],
)
def test_ranges_are_inside_or_refused(served, text, status):
    device = served.device()
    path = f"/v1/models/{json.loads(device.assigned().manifest)['sha256']}"
    headers = device.signed("GET", path) | {"Range": text}
    assert device.send("GET", path, headers=headers).status_code == status


def test_a_text_that_no_database_keeps_is_refused(served):
    from potluck.core import RefusedError

    with pytest.raises(RefusedError, match="must be a text"):
        served.operator.post("pause", reason="a\0b")


def test_a_token_for_another_run_of_the_database_is_not_used_up(tmp_path):
    from fleet import Fleet
    from potluck.core import RefusedError

    fleet = Fleet(f"sqlite:///{tmp_path / 'db'}", tmp_path / "blobs", count=1)
    service, token = fleet.service, issue_tokens(fleet.service, fleet.run, actor="test")[0]
    with pytest.raises(RefusedError) as caught:
        enrol(service, token, b"k" * 32, into="another")
    assert caught.value.code == "token"
    assert enrol(service, token, b"l" * 32, into=fleet.run).run == fleet.run
    service.close()


UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    "loads_pickle", "read_pickle", "to_pickle", "unsafe_load", "full_load", "Unpickler", "Pickler",
    "memmap_pickle", "weights_only", "allow_pickle",
}  # fmt: skip
UNSAFE_CALLS = ("torch.load", "torch.jit.load", "os.system", "os.popen", "builtins.eval")
WIRE = ("protocol", "server", "device")


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_no_name_that_runs_data_is_used_even_under_another_name(path):
    """`test_architecture.py` looks at imports and calls; this at every name and attribute.

    The workers of a simulation, and a server's evaluator, talk to their own parent by pipes of
    `multiprocessing`, which pickles. Nobody else can write into those; and no other code beside a
    network imports it.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id not in UNSAFE_NAMES, node.lineno
        elif isinstance(node, ast.Attribute):
            assert node.attr not in UNSAFE_ATTRIBUTES, node.lineno
            inner = ast.unparse(node)
            assert inner not in UNSAFE_CALLS, node.lineno
        elif isinstance(node, ast.keyword):
            assert node.arg != "shell", node.lineno
            if node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"joblib", "runpy", "code", "jsonpickle", "xmlrpc", "imp"}
            if path.relative_to(SOURCE).parts[0] in WIRE and path.stem != "evaluator":
                assert not roots & {"multiprocessing", "ctypes", "torch.multiprocessing"}
