"""Who may call what: every route × {anonymous, device, other device, admin}, and what is refused.

The table is compared with the applications' own routes: a new one without a row fails. A row is the
code of the refusal, or "ok".
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from fleet import CONTENT
from potluck.config.experiment import check_experiment
from potluck.protocol import ROUTES, STATUS, Error, new_key, parse_message, sign_request
from potluck.server.admin.admin_app import AdminApp
from potluck.server.http.device_app import DeviceApp
from potluck.server.http.notifier import Notifier
from potluck.server.metrics import Metrics
from potluck.server.rounds.enrolment import enrol, issue_tokens
from remote import RUNTIME, Caller, Served


class Access(NamedTuple):
    """What each caller is answered. `other` is a device that asks for another's thing."""

    anonymous: str
    device: str
    other: str
    admin: str  # with the operators' credential, and without a signature


_OWN = Access("unsigned", "ok", "not_found", "unsigned")
_OPEN = Access("ok", "ok", "ok", "ok")
_SHARED = Access("unsigned", "ok", "ok", "unsigned")
DEVICES = {
    "POST /v1/preview": Access("unsigned", "ok", "token", "unsigned"),  # by a token, which it keeps
    "POST /v1/enrol": Access("unsigned", "ok", "token", "unsigned"),  # by a token, used once
    "POST /v1/check-in": _SHARED,  # each device for itself
    "GET /v1/models/{sha256}": _SHARED,  # the model is the whole run's
    "POST /v1/progress": _OWN,
    "POST /v1/report": _OWN,
    "GET /v1/uploads/{upload}": _OWN,
    "PUT /v1/uploads/{upload}": _OWN,
    "POST /v1/evaluation": Access("unsigned", "malformed", "not_found", "unsigned"),  # to train
    "POST /v1/failure": _OWN,
    "GET /health": _OPEN,
}
_OPERATOR = Access("unsigned", "unsigned", "unsigned", "ok")
OPERATORS = {
    "GET /admin/status": _OPERATOR,
    "GET /admin/devices": _OPERATOR,
    "GET /admin/audit": _OPERATOR,
    "GET /admin/metrics": _OPERATOR,
    "POST /admin/enroll": _OPERATOR,
    "POST /admin/dashboard": _OPERATOR,
    "POST /admin/pause": _OPERATOR,
    "POST /admin/resume": _OPERATOR,
    "POST /admin/abandon": _OPERATOR,
    "POST /admin/fall-back": _OPERATOR,
    "POST /admin/revoke": _OPERATOR,
    "POST /admin/set": _OPERATOR,
    "POST /admin/export": _OPERATOR,
}
MESSAGES_OF = {f"{r.method} {r.path.partition('?')[0]}": r for r in ROUTES}
NEWCOMERS = ("enrol", "preview")
FAULTS = (
    "unsigned", "expired", "future", "wrong key", "another body", "another path",
    "another method", "another authority", "a flipped signature", "another device's name",
    "replayed", "replayed in between", "revoked", "of another run",
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("served"), count=200, dim=64) as served:
        yield served


def names_of(paths) -> set[str]:
    return {f"{method} {path.path}" for path in paths for method in path.methods}


def apps(served) -> tuple[DeviceApp, AdminApp]:
    notifier, metrics = Notifier(), Metrics()
    return DeviceApp(served.run, notifier, metrics), AdminApp(
        served.run, notifier, metrics, "x", None, lambda: ""
    )


def refused(answer: httpx.Response, code: str) -> Error:
    """The error of an answer, in the one shape of all."""
    error = parse_message(answer.content, Error)
    assert (error.code, answer.status_code) == (code, STATUS[code])
    assert answer.headers["content-type"] == "application/json"
    assert set(json.loads(answer.content)) <= {
        "type", "code", "message", "retry_after_seconds", "server_time_ms"
    }  # fmt: skip
    assert "Traceback" not in answer.text
    assert ("retry-after" in answer.headers) == (error.retry_after_seconds is not None)
    return error


def answered(answer: httpx.Response, expected: str) -> None:
    if expected == "ok":
        assert answer.status_code in (200, 206), answer.text
    else:
        refused(answer, expected)


class Work(NamedTuple):
    """A device with an assignment and an upload of its own."""

    device: Caller
    token: str
    assignment: str
    values: dict[str, str]

    def request(self, name: str) -> tuple[str, str, bytes]:
        """Method, path and body of a request that this device may make."""
        method, _, path = name.partition(" ")
        path = path.format(**self.values)
        if name.startswith("PUT"):
            return method, f"{path}?offset=0", bytes(256)
        content = _contents(self).get(name)
        return method, path, b"" if content is None else json.dumps(content).encode()


def _contents(work: Work) -> dict[str, dict]:
    runtime = RUNTIME.model_dump()
    place = {"assignment": work.assignment, "round": 1, "attempt": 1}
    digest = hashlib.sha256(bytes(256)).hexdigest()
    report = {"codec": "float32", "length_bytes": 256, "sha256": digest, "weight": 1.0}
    enrol = {"public_key": _public(work.device), "runtime": runtime, "device_class": "x"}
    key = {"public_key": enrol["public_key"]}
    return {
        "POST /v1/preview": {"type": "preview", "token": work.token} | key,
        "POST /v1/enrol": {"type": "enrol", "token": work.token} | enrol,
        "POST /v1/check-in": {"type": "check_in", "run": "fleet", "accepts": ["float32"]}
        | {"runtime": runtime, "eligibility": {}},
        "POST /v1/progress": {"type": "progress", "phase": "train", "fraction": 0.5}
        | {"assignment": work.assignment},
        "POST /v1/report": {"type": "report", "loss": 0.5, "num_steps": 1, "metrics": {}}
        | place
        | report,
        "POST /v1/evaluation": {"type": "evaluation", "metrics": {"loss": [1.0, 2]}} | place,
        "POST /v1/failure": {"type": "failed", "reason": "error"} | {"assignment": work.assignment},
    }


def _public(device: Caller) -> str:
    from potluck.protocol import public_key

    return public_key(device.key).hex()


def at_work(served) -> Work:
    device = served.caller()
    device.enrol(served.invite())
    given = device.assigned()
    upload = device.report(given, bytes(256))
    values = {"sha256": json.loads(given.manifest)["sha256"], "upload": upload.upload}
    return Work(device, device.invitation.token, given.assignment, values)


def test_the_table_has_a_row_for_every_route_and_no_other(served):
    devices, admin = apps(served)
    assert set(DEVICES) == names_of(devices.paths())
    assert set(OPERATORS) == names_of(admin.paths())
    assert set(DEVICES) == set(MESSAGES_OF) | {"GET /health"}


@pytest.mark.parametrize("name", DEVICES)
def test_each_caller_at_the_devices_address(served, name):
    work, other, row = at_work(served), served.device(), DEVICES[name]
    method, path, body = work.request(name)
    credential = {"Authorization": f"Bearer {served.home.credential()}"}
    answered(served.caller().send(method, path, body, headers={}), row.anonymous)
    answered(served.caller().send(method, path, body, headers=credential), row.admin)
    if name.endswith(NEWCOMERS):  # another key in the message, signed with it
        theirs = Work(other, work.token, work.assignment, work.values)
        answered(other.send(*theirs.request(name)), row.other)
    else:
        answered(other.send(method, path, body), row.other)
    answered(work.device.send(method, path, body), row.device)  # after all of them


@pytest.mark.parametrize("name", [n for n, row in DEVICES.items() if row.other == "not_found"])
def test_anothers_thing_looks_like_one_that_is_not_there(served, name):
    work, other = at_work(served), served.device()
    nowhere = Work(other, work.token, "0" * 32, {"upload": "0" * 32, "sha256": "0" * 64})
    answers = []
    for place, theirs in (("0" * 32, nowhere), (work.assignment, work)):
        answer = other.send(*theirs.request(name))
        told = refused(answer, "not_found").message
        for id in (place, *theirs.values.values()):
            told = told.replace(id, "ID")
        headers = {k for k in answer.headers if k != "date"}
        answers.append((told, headers))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_each_caller_at_the_operators_socket(served, name):
    row = OPERATORS[name]
    device = served.device()
    method, _, path = name.partition(" ")
    signed = device.signed(method, path)
    right = {"Authorization": f"Bearer {served.home.credential()}"}
    wrong = {"Authorization": f"Bearer {served.home.credential()[:-1]}"}
    transport = httpx.HTTPTransport(uds=str(served.home.socket))
    with httpx.Client(transport=transport, base_url="http://server") as client:
        for headers, expected in (({}, row.anonymous), (wrong, row.anonymous), (signed, row.other)):
            answered(client.request(method, path, headers=headers), expected)
        # These would change what others test.
        if path.endswith(("pause", "resume", "abandon", "fall-back", "revoke", "set")):
            answer = client.post(path, headers=right, content=b"[]")
            refused(answer, "malformed")  # let in, and read
        else:
            answered(client.request(method, path, headers=right), row.admin)
    answered(device.send(method, path, headers=right), "not_found")  # not at this address


@pytest.mark.parametrize("name", [*DEVICES, *OPERATORS])
def test_every_route_refuses_in_one_shape(served, name):
    method, _, path = name.partition(" ")
    path = re.sub(r"\{\w+\}", "0" * 32, path)
    if name in DEVICES:
        caller = served.caller()
        for wrong in ("DELETE", "PATCH", "PROPFIND"):
            refused(caller.http.request(wrong, path), "method")
        refused(caller.http.request("X", path), "malformed")  # no method that HTTP knows
        refused(caller.http.request(method, f"{path}/more"), "not_found")
        return
    transport = httpx.HTTPTransport(uds=str(served.home.socket))
    with httpx.Client(transport=transport, base_url="http://server") as client:
        for wrong in ("DELETE", "PATCH"):
            refused(client.request(wrong, path), "method")
        refused(client.request("X", path), "malformed")
        refused(client.request(method, f"{path}/more"), "not_found")


@pytest.mark.parametrize("name", [name for name in DEVICES if DEVICES[name] is not _OPEN])
def test_a_request_that_is_not_rightly_signed_is_refused_on_every_route(served, name):
    """14 faults on each route; after all of them the right request still passes."""
    work = at_work(served)
    method, path, body = work.request(name)
    newcomer = name.endswith(NEWCOMERS)
    for fault in FAULTS:
        device, headers, sent, codes = _faulty(served, work, fault, method, path, body, newcomer)
        if method == "GET" and sent:
            answer = device.http.request(method, path, content=sent, headers=headers)
        else:
            answer = device.send(method, path, sent, headers=headers)
        assert parse_message(answer.content, Error).code in codes, (fault, answer.text)
        assert answer.status_code in {STATUS[code] for code in codes}
        refused(answer, parse_message(answer.content, Error).code)
    answered(work.device.send(method, path, body), DEVICES[name].device)


def _another_run(served) -> str:
    """A token of another run in the same database."""
    service = served.run.service
    experiment = check_experiment(CONTENT | {"name": "another"}, "test")
    weights = np.zeros(served.dim, np.float32)
    run = service.create_run(experiment, weights, served.run.spec, served.settings)
    return issue_tokens(service, run, actor="test")[0]


def _faulty(served, work, fault, method, path, body, newcomer):
    """Who sends, the headers, the body, and the codes of the refusal."""
    device = work.device
    now = time.time_ns() // 10**6

    def signed(**changes):
        return device.signed(**({"method": method, "path": path, "body": body} | changes))

    match fault:
        case "unsigned":
            return device, {}, body, {"unsigned"}
        case "expired":
            return device, signed(time_ms=now - 301_000), body, {"clock"}
        case "future":
            return device, signed(time_ms=now + 301_000), body, {"clock"}
        case "wrong key":
            return device, signed(key=new_key()), body, {"unknown"}
        case "another body":
            if method == "GET":
                return device, signed(body=b"x"), b"x", {"too_large"}
            return device, signed(), body[:-1] + b" ", {"digest"}
        case "another path":
            return device, signed(path="/v1/elsewhere"), body, {"bad_signature"}
        case "another method":
            return device, signed(method="PATCH"), body, {"bad_signature"}
        case "another authority":
            return device, signed() | {"Host": "elsewhere:1"}, body, {"bad_signature"}
        case "a flipped signature":
            headers = signed()
            flipped = bytearray.fromhex(headers["Potluck-Signature"])
            flipped[device.sequence % 64] ^= 1 << device.sequence % 8
            headers["Potluck-Signature"] = flipped.hex()
            return device, headers, body, {"bad_signature"}
        case "another device's name":
            headers = signed() | {"Potluck-Device": served.device().id}
            return device, headers, body, {"unknown" if newcomer else "bad_signature"}
        case "replayed":
            return device, signed(sequence=1), body, {"replayed"}
        case "replayed in between":  # below the last one, though it was never used itself
            device.sequence += 5
            skipped = device.sequence - 2
            refused_first = device.send("GET", "/v1/uploads/" + "0" * 32)
            assert refused_first.status_code == 404
            return device, signed(sequence=skipped), body, {"replayed"}
        case "revoked":
            gone = at_work(served)
            served.operator.post("revoke", device=gone.device.id)
            name = f"{method} {path.partition('?')[0]}"
            if newcomer:
                return gone.device, None, gone.request(name)[2], {"unknown"}
            return gone.device, None, body, {"unknown"}
        case "of another run":
            stranger = served.caller()
            token = _another_run(served)
            if newcomer:  # with a token of that run
                content = json.loads(body) | {"public_key": _public(stranger), "token": token}
                return stranger, None, json.dumps(content).encode(), {"token"}
            enrol(served.run.service, token, bytes.fromhex(_public(stranger)))
            return stranger, None, body, {"unknown"}
    raise AssertionError(fault)


def test_a_signature_for_one_authority_is_none_for_another(served):
    device = served.device()
    headers = sign_request(
        device.key, "GET", "elsewhere:8443", "/v1/uploads/" + "0" * 32, run_key=device.run_key,
        sequence=10**6, time_ms=time.time_ns() // 10**6,
    )  # fmt: skip
    refused(device.send("GET", "/v1/uploads/" + "0" * 32, headers=headers), "bad_signature")
