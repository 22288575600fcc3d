"""A served run on real sockets: what devices are answered, and what they are not."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from potluck.protocol import (
    STATUS,
    Accepted,
    Assignment,
    Enrolled,
    Error,
    Evaluation,
    Failed,
    Finished,
    Lease,
    Progress,
    Upload,
    Wait,
    decode_vector,
    encode_message,
    encode_vector,
    new_key,
    parse_message,
    verify_manifest,
)
from potluck.server.http import server_connection
from remote import Served, read


@pytest.fixture(scope="module")
def served(tmp_path_factory, places):
    folder = tmp_path_factory.mktemp("served")
    with Served(folder, count=50, dim=64, places=places()) as served:
        yield served


def refused(answer, code) -> Error:
    """The error in an answer, which has its one shape."""
    error = parse_message(answer.content, Error)
    assert (error.code, answer.status_code) == (code, STATUS[code])
    assert answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text
    assert ("retry-after" in answer.headers) == (error.retry_after_seconds is not None)
    return error


def test_three_devices_train_a_round_over_tls(tmp_path, places):
    with Served(tmp_path, places=places(), count=3, population=3, num_rounds=2) as served:
        devices = [served.device() for _ in range(3)]
        for number in (1, 2):
            served.until(lambda told: told["open"])
            for device in devices:
                given, _, accepted, _ = device.take_part(4)
                assert (accepted.round, accepted.attempt) == (given.round, 1) == (number, 1)
            served.until(lambda told, number=number: told["round"] == number)
        served.until(lambda told: told["state"] == "finished")
        assert isinstance(devices[0].check_in(), Finished)
        assert served.weights() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0])
        model = load(served.operator.fetch("export"))
        assert model["w"].tolist() == served.weights()
        metrics = served.operator.get("status")["evaluations"]
        served.until(lambda _: len(served.operator.get("status")["evaluations"]) == 3)
        metrics = served.operator.get("status")["evaluations"]
        assert [m["metrics"]["sum"] for m in metrics] == pytest.approx([0.0, 1.0, 2.0])
        assert served.operator.get("audit")["broken"] is None


def test_what_a_device_is_given_is_signed_for_its_run(served):
    device = served.device()
    served.until(lambda told: told["open"])  # the first device has it opened
    given = device.assigned()
    manifest = verify_manifest(
        given.manifest.encode(),
        bytes.fromhex(given.signature),
        bytes.fromhex(device.invitation.server_key),
        run=device.invitation.run,
        now_ms=time.time_ns() // 10**6,
        last_seen_version=0,
    )
    assert manifest.plan == {"task": "none"}
    assert manifest.spec.spec() == served.run.spec
    assert device.assigned().assignment == given.assignment  # again is the same
    lease = device.ask(
        "progress", Progress(assignment=given.assignment, phase="train", fraction=0.5)
    )
    assert isinstance(lease, Lease)
    wait = device.ask("failure", Failed(assignment=given.assignment, reason="no_data"))
    assert isinstance(wait, Wait)
    assert wait.reason == "noted"


def test_the_invitation_names_the_certificate_that_the_server_shows(served):
    device = served.device()
    host, port = device.authority.split(":")
    pem = ssl.get_server_certificate((host, int(port)))
    shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    assert device.invitation.certificate == served.server.certificate == shown


def test_a_model_is_downloaded_whole_or_from_where_it_was_cut(served):
    device = served.device()
    manifest = json.loads(device.assigned().manifest)
    path = f"/v1/models/{manifest['sha256']}"

    def get(**headers):
        return device.send("GET", path, headers=device.signed("GET", path) | headers)

    whole = get()
    assert (whole.status_code, len(whole.content)) == (200, 256)
    assert hashlib.sha256(whole.content).hexdigest() == manifest["sha256"]
    tag = f'"{manifest["sha256"]}"'
    assert (whole.headers["etag"], whole.headers["accept-ranges"]) == (tag, "bytes")
    part = get(Range="bytes=100-", **{"If-Range": tag})
    assert (part.status_code, part.headers["content-range"]) == (206, "bytes 100-255/256")
    assert part.content == whole.content[100:]
    assert get(Range="bytes=4-7").content == whole.content[4:8]
    assert get(Range="bytes=-8").content == whole.content[-8:]
    assert get(Range="bytes=100-", **{"If-Range": '"other"'}).status_code == 200
    refused(get(Range="bytes=256-"), "range")


def test_an_upload_that_was_cut_goes_on_where_it_stands(served):
    device = served.device()
    given = device.assigned()
    body = bytes(256)
    upload = device.report(given, body)
    assert isinstance(upload, Upload)
    assert upload.offset == 0
    assert device.put(upload.upload, 0, body[:100]).offset == 100
    assert device.put(upload.upload, 0, body[:100]).offset == 100  # was stored: not stored again
    path = f"/v1/uploads/{upload.upload}"
    refused(device.send("PUT", f"{path}?offset=120", body[120:]), "offset")
    assert read(device.send("GET", path)).offset == 100
    assert device.report(given, body).offset == 100
    accepted = device.put(upload.upload, 100, body[100:])
    assert isinstance(accepted, Accepted)
    for again in (
        device.put(upload.upload, 100, body[100:]),
        device.report(given, body),
        read(device.send("GET", path)),
    ):
        assert again.sha256 == accepted.sha256
    other = bytes(255) + b"\x01"
    assert device.report(given, other).code == "conflict"


def test_a_report_is_answered_again_after_its_round_is_over(tmp_path, places):
    with Served(tmp_path, places=places(), count=2) as served:
        devices = [served.device(), served.device()]
        served.until(lambda told: told["open"])
        done = [device.take_part(4) for device in devices]
        served.until(lambda told: told["round"] == 1)
        for device, (given, upload, accepted, body) in zip(devices, done, strict=True):
            for answer in (device.put(upload.upload, 0, body), device.report(given, body)):
                assert isinstance(answer, Accepted)
                assert answer.sha256 == accepted.sha256
        assert served.weights() == [0.5, 0.5, 0.0, 0.0]
        late = Progress(assignment=done[0][0].assignment, phase="train", fraction=0.1)
        assert devices[0].ask("progress", late).code == "late"


def test_a_bad_update_is_refused_by_itself(served):
    nan = np.full(64, np.nan, "<f4").tobytes()
    for body, code in ((nan, "not_finite"), (np.full(64, 1e6, "<f4").tobytes(), "bounds")):
        device = served.device()
        upload = device.report(device.assigned(), body)
        path = f"/v1/uploads/{upload.upload}?offset=0"
        refused(device.send("PUT", path, body), code)
    device = served.device()
    assert device.report(device.assigned(), bytes(252)).code == "wrong_length"
    given = device.assigned()
    assert device.report(given, bytes(256), round=given.round + 1).code == "malformed"
    upload = device.report(given, bytes(256), sha256="00" * 32)
    path = f"/v1/uploads/{upload.upload}?offset=0"
    refused(device.send("PUT", path, bytes(256)), "digest")
    assert read(device.send("GET", path.partition("?")[0])).offset == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "code"),
    [
        ("GET", "/", b"", None, "not_found"),
        ("GET", "/v1/check-in/", b"", None, "not_found"),
        ("GET", "/v2/check-in", b"", None, "not_found"),
        ("GET", "/admin/status", b"", None, "not_found"),
        ("GET", "/v1/check-in", b"", None, "method"),
        ("DELETE", "/v1/uploads/" + "0" * 32, b"", None, "method"),
        ("HEAD", "/health", b"", None, "method"),
        ("POST", "/v1/check-in", b"{" * 10_000, None, "too_large"),
        ("POST", "/v1/check-in", b"[" * 4000, None, "malformed"),
        ("POST", "/v1/check-in", b'{"a":1,"a":2}', None, "malformed"),
        ("POST", "/v1/check-in", b"\x80\x04K*.", None, "malformed"),
        ("POST", "/v1/check-in", b"{}", "text/plain", "media"),
        ("POST", "/v1/check-in?x=1", b"{}", None, "malformed"),
        ("POST", "/v1/progress", b'{"type":"failed"}', None, "malformed"),
        ("GET", "/v1/models/" + "0" * 64, b"", None, "not_found"),
        ("GET", "/v1/models/..%2f..%2fetc", b"", None, "not_found"),
        ("GET", "/v1/uploads/" + "0" * 32, b"", None, "not_found"),
        ("PUT", "/v1/uploads/" + "0" * 32 + "?offset=0", b"x", None, "not_found"),
        ("PUT", "/v1/uploads/" + "0" * 32 + "?offset=-1", b"x", None, "malformed"),
        ("PUT", "/v1/uploads/" + "0" * 32, b"x", None, "malformed"),
    ],
)
def test_every_error_has_one_shape(served, method, path, body, kind, code):
    device = served.device()
    answer = device.send(method, path, body, kind=kind)
    if method == "HEAD":
        assert answer.status_code == STATUS[code]
    else:
        refused(answer, code)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_body_is_refused_by_its_announced_length(served, method):
    device = served.device()
    path = "/v1/check-in" if method == "POST" else f"/v1/uploads/{'0' * 32}?offset=0"
    signed = device.signed(method, path) | {"Content-Length": str(2**40)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
    answer = raw(served, f"{method} {path} HTTP/1.1\r\nHost: {device.authority}\r\n{lines}\r\n")
    assert b'"code":"too_large"' in answer
    assert b"connection: close" in answer


def test_what_is_not_http_is_answered_in_json(served):
    assert b'"code":"malformed"' in raw(served, "GIBBERISH\r\n\r\n")
    assert b'"code":"malformed"' in raw(served, "GET / HTTP/1.1\r\nX: " + "y" * 100_000)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("GET /health HTTP/1.0", None),
        ("GET /health# HTTP/1.1", "malformed"),
        ("GET /health#x?y HTTP/1.1", "malformed"),
        ("GET /health? HTTP/1.1", "malformed"),
        ("GET https://localhost/health HTTP/1.1", "malformed"),
        ("OPTIONS * HTTP/1.1", "malformed"),
        ("GET /health HTTP/0.9", "malformed"),
        ("GET /health HTTP/2.0", "malformed"),
        ("GET /health", "malformed"),
        ("GET /heal%74h HTTP/1.1", "not_found"),
        ("POST /v1/check%2Din HTTP/1.1", "not_found"),
        ("GET /v1/../health HTTP/1.1", "not_found"),
    ],
)
def test_a_path_is_written_in_one_way(served, line, code):
    answer = raw(served, f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n")
    if code is None:
        assert answer.endswith(b'{"status":"ok"}')
    else:
        assert f'"code":"{code}"'.encode() in answer


def test_a_connection_without_headers_is_closed(served, monkeypatch):
    monkeypatch.setattr(server_connection, "HEADER_SECONDS", 0.2)
    assert raw(served, "") == b""
    assert raw(served, "GET /health HTTP/1.1\r\nHost:") == b""


def raw(served, text: str) -> bytes:
    """What is answered to these bytes until the server closes."""
    context = ssl.create_default_context(cadata=served.home.certificate.read_text())
    context.check_hostname = False
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=10) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(text.encode())
        answer = b""
        while piece := secure.recv(65536):
            answer += piece
        return answer


CLAIMS = {
    "unsigned": ({}, "unsigned"),
    "expired": ({"time_ms": -301_000}, "clock"),
    "future": ({"time_ms": 301_000}, "clock"),
    "wrong key": ({"key": None}, "unknown"),
    "another body": ({"body": b"{ }"}, "digest"),
    "another path": ({"path": "/v1/failure"}, "bad_signature"),
    "another method": ({"method": "GET"}, "bad_signature"),
    "replayed": ({"sequence": 1}, "replayed"),
}


@pytest.mark.parametrize("fault", CLAIMS)
def test_a_claim_with_a_fault_is_refused(served, fault):
    device = served.device()
    changes, code = CLAIMS[fault]
    changes = dict(changes)
    if "time_ms" in changes:
        changes["time_ms"] += time.time_ns() // 10**6
    if "key" in changes:
        changes["key"] = new_key()
    request = {"method": "POST", "path": "/v1/check-in", "body": b"{}"}
    headers = device.signed(**(request | changes)) if changes else {}
    error = refused(device.send("POST", "/v1/check-in", b"{}", headers=headers), code)
    assert (error.server_time_ms is not None) == (code == "clock")


def test_a_signature_serves_one_device_and_once_also_after_a_restart(tmp_path, places):
    served = Served(tmp_path, places=places())
    with served:
        device = served.device()
        headers = device.signed("POST", "/v1/check-in", b"{}")
        refused(device.send("POST", "/v1/check-in", b"{}", headers=headers), "malformed")
        refused(device.send("POST", "/v1/check-in", b"{}", headers=headers), "replayed")
        other = served.device()
        stolen = headers | {"Potluck-Device": other.id}
        refused(other.send("POST", "/v1/check-in", b"{}", headers=stolen), "bad_signature")
    with served:
        again = served.caller(key=device.key)
        refused(again.send("POST", "/v1/check-in", b"{}", headers=headers), "replayed")
        again.invitation, again.sequence = device.invitation, device.sequence
        assert isinstance(again.check_in(), Wait | Assignment)
        served.operator.post("revoke", device=device.id)
        refused(again.send("POST", "/v1/check-in", b"{}"), "unknown")


def test_a_token_lets_one_of_fifty_in(served):
    invitation = served.invite()
    callers = [served.caller() for _ in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda caller: caller.enrol(invitation), callers))
    won = [i for i, answer in enumerate(answers) if isinstance(answer, Enrolled)]
    assert len(won) == 1
    assert {a.code for i, a in enumerate(answers) if i not in won} == {"token"}
    assert isinstance(callers[won[0]].enrol(invitation), Enrolled)  # its answer may have been lost


def test_a_device_of_another_run_is_unknown(served, tmp_path):
    with Served(tmp_path, name="another") as another:
        device = another.device()
        caller = served.caller(key=device.key)
        refused(caller.send("POST", "/v1/check-in", b"{}"), "unknown")
        caller = served.caller()
        assert caller.enrol(another.invite()).code == "token"


def test_a_check_in_waits_for_work(tmp_path, places):
    with Served(tmp_path, places=places(), count=2, population=2, long_poll_seconds=20.0) as served:
        first = served.device()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first.check_in)
            held = "potluck_waiting_check_ins 1.0"
            served.until(lambda _: held in served.operator.text("metrics"))
            second = served.device()
            assert isinstance(waiting.result(10), Assignment)
        assert isinstance(second.check_in(), Assignment)


def test_what_a_device_cannot_encode_it_is_not_asked_for(served):
    assert served.device().check_in(accepts=("int3",)).reason == "unsupported"


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4"])
def test_updates_come_in_the_codec_of_the_run(tmp_path, places, codec):
    with Served(tmp_path, places=places(), count=1, dim=2000, codec=codec) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        assert device.check_in().reason == "unsupported"
        given = device.check_in(accepts=("float32", codec))
        random = np.random.default_rng(0)
        update = random.normal(size=2000).astype(np.float32)
        body = encode_vector(update, codec, random).body
        assert device.report(given, body[:-1]).code == "wrong_length"
        upload = device.report(given, body)
        assert isinstance(device.put(upload.upload, 0, body), Accepted)
        served.until(lambda told: told["round"] == 1)
        assert served.weights() == decode_vector(body, codec, 2000).tolist()


def test_a_federated_evaluation_changes_no_model(tmp_path, places):
    with Served(tmp_path, places=places(), count=1, federated_every=1) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        device.take_part(4)
        served.until(lambda told: told["open"] and told["open"]["kind"] == "evaluate")
        given = device.assigned()
        assert (given.kind, given.round) == ("evaluate", 1)
        message = Evaluation(
            assignment=given.assignment, round=1, attempt=1, metrics={"correct": (57.0, 60)}
        )
        accepted = device.ask("evaluation", message)
        assert isinstance(accepted, Accepted)
        assert accepted.sha256 == hashlib.sha256(encode_message(message)).hexdigest()
        served.until(lambda told: told["open"] and told["open"]["number"] == 2)
        found = served.run.service.evaluations(served.run.id)
        assert {"correct": 0.95} in [e["metrics"] for e in found if e["kind"] == "federated"]
        assert served.weights() == [1.0, 0.0, 0.0, 0.0]


def test_a_device_that_has_gone_takes_no_slot(tmp_path, places):
    with Served(tmp_path, places=places(), count=1, population=2, long_poll_seconds=20.0) as served:
        gone = served.device()
        gone.http.timeout = 0.3
        with pytest.raises(httpx.ReadTimeout):
            gone.check_in()
        served.device()  # now there are enough
        idle = "potluck_waiting_check_ins 0.0"
        served.until(lambda _: idle in served.operator.text("metrics"))
        served.until(lambda told: told["open"])
        assert served.run.service.status(served.run.id)["open"]["active"] == 0


def test_health_and_metrics_tell_nothing_of_devices(served):
    device = served.device()
    assert device.send("GET", "/health", headers={}).json() == {"status": "ok"}
    text = served.operator.text("metrics")
    assert 'path="/v1/enrol",status="200"' in text
    assert device.id not in text
