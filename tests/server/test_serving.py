"""`potluck serve` and the operators' commands; the server's folder, certificate and logs."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from asyncio.sslproto import SSLProtocol
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlalchemy import update
from starlette.requests import Request
from typer.testing import CliRunner

from fleet import Fleet
from messages import head_of
from potluck.cli.main import app
from potluck.config.experiment import check_experiment, load_experiment
from potluck.config.round_settings import in_words
from potluck.core import CodedError, ProtocolError, RefusedError, RunError
from potluck.protocol import Accepted, Assignment, Error, Upload, encode_message, parse_message
from potluck.server import RoundSettings
from potluck.server.console import Lines
from potluck.server.http.admission import Limiter
from potluck.server.http.certificate import certificate_fingerprint, ensure_certificate
from potluck.server.http.device_app import error_handlers
from potluck.server.http.server_connection import ServerConnection
from potluck.server.logs import JsonFormatter
from potluck.server.open_run import open_server
from potluck.server.process import TLS_BYTES, Listen
from potluck.server.rounds.changes import pause, resume
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.storage.blobs import open_blobs
from potluck.server.storage.database_tables import audit
from potluck.server.storage.state_folder import StateFolder
from remote import Caller, Served

EXPERIMENT = """
name = "kitchen"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 2
[algorithm]
client_lr = 0.1
[run]
rounds = 2
cohort = 2
[server]
selection = "sampled"
long_poll_seconds = 0.0
"""


def potluck(*words: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*words: object) -> str:
    """The one line that a command fails with."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    return result.output


class Process:
    """`potluck serve` as a process of its own."""

    def __init__(self, file, home, places, port=0):
        words = [sys.executable, "-m", "potluck", "serve", file, "--home", home, "--port", port]
        words += ["--database", places[0], "--blobs", places[1]]
        self.log = (home.parent / "log").open("a")
        self.process = subprocess.Popen(
            [*map(str, words)], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.told = {}
        while "admin" not in self.told:
            name, _, value = self.process.stdout.readline().partition(" ")
            assert name, (home.parent / "log").read_text()
            self.told[name] = value.strip()
        self.port = int(self.told["address"].rsplit(":", 1)[1])

    def end(self, number) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process.stdout.close()
        self.log.close()
        return code


def take_part(caller: Caller, *, finish: bool = True) -> tuple[Upload, bytes]:
    given = caller.check_in()
    while not isinstance(given, Assignment):  # the leader has not opened the round yet
        given = caller.check_in()
    body = np.ones(json.loads(given.manifest)["length_bytes"] // 4, "<f4").tobytes()
    upload = caller.report(given, body)
    assert isinstance(caller.put(upload.upload, 0, body[:1000]), Upload)
    if finish:
        assert isinstance(caller.put(upload.upload, 1000, body[1000:]), Accepted)
    return upload, body


def test_a_server_that_is_killed_goes_on_in_the_middle_of_a_round(tmp_path, places):
    file, home, where = tmp_path / "kitchen.toml", tmp_path / "home", places()
    file.write_text(EXPERIMENT)
    server = Process(file, home, where)
    callers = []
    try:
        certificate = (home / "certificate.pem").read_text()
        invitations = potluck("enroll", "--count", 2, "--home", home).split()
        for invitation in invitations:
            callers.append(Caller(server.told["address"], certificate))
            callers[-1].enrol(invitation)
            assert callers[-1].invitation.certificate == server.told["certificate"]
        assert "#" not in server.told["dashboard"]  # a link is printed by command alone
        take_part(callers[0])
        upload, body = take_part(callers[1], finish=False)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        server = Process(file, home, where, server.port)
        for caller in callers:
            caller.http.close()
            keys = {"key": caller.key, "run_key": caller.run_key}
            caller.__init__(server.told["address"], certificate, **keys)
            caller.sequence = 100
        assert isinstance(callers[1].put(upload.upload, 1000, body[1000:]), Accepted)
        for caller, invitation in zip(callers, invitations, strict=True):
            caller.enrol(invitation)  # the same answer again
            take_part(caller)
        while "finished" not in potluck("status", "--home", home):
            pass
        assert "rounds committed  2" in potluck("status", "--home", home)
        potluck("export", tmp_path / "model.safetensors", "--home", home)
        model = load_file(tmp_path / "model.safetensors")
        potluck("export", tmp_path / "first.safetensors", "--version", 0, "--home", home)
        first = load_file(tmp_path / "first.safetensors")
        for name in model:  # every update was all ones: each round adds one to every weight
            np.testing.assert_allclose(model[name], first[name] + 2.0, rtol=1e-6)
    finally:
        code = server.end(signal.SIGTERM)
        for caller in callers:
            caller.close()
    assert code == 0
    assert not (home / "admin.sock").exists()
    for line in (tmp_path / "log").read_text().splitlines():
        assert {"time", "level", "logger", "event"} <= set(json.loads(line))


def test_a_server_goes_on_without_waiting_for_pytorch(tmp_path):
    file = tmp_path / "kitchen.toml"
    file.write_text(EXPERIMENT)
    open_server(file, [], tmp_path / "home", Listen(port=0)).close()
    code = f"""
import sys
import tempfile
from pathlib import Path
from potluck.server.process import Listen
from potluck.server.storage.database_tables import audit
from potluck.server.open_run import open_server
server = open_server(Path({str(file)!r}), [], Path({str(tmp_path / "home")!r}), Listen(port=0))
print("torch" in sys.modules, server.served.spec.dim, sorted(server.served.plan))
server.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False 650 ['algorithm', 'needs', 'task']"


def test_operators_ask_and_are_answered(tmp_path):
    with Served(tmp_path, count=2, population=2) as served:
        home = served.home.folder
        device, other = served.device(), served.device()
        assert device.id in potluck("devices", "--home", home)
        potluck("pause", "--reason", "lunch", "--home", home)
        assert "paused: lunch" in potluck("status", "--home", home)
        assert "must be running" in error_of("pause", "--home", home)
        potluck("resume", "--home", home)
        served.until(lambda told: told["open"])
        assert "reports           0 of 2" in potluck("status", "--home", home)
        potluck("revoke", other.id, "--home", home)
        assert isinstance(other.check_in(), Error)
        assert "no such device" in error_of("revoke", "nobody", "--home", home)
        assert len(set(potluck("enroll", "--count", 3, "--home", home).split())) == 3
        assert "no such model" in error_of(
            "export", tmp_path / "x.safetensors", "--version", 9, "--home", home
        )
        assert "potluck_devices" in potluck("metrics", "--home", home)
        assert re.fullmatch(
            r"whole: \d+ rows, .* hash [0-9a-f]{64}\n", potluck("audit", "--home", home)
        )
        head = head_of(served.run.service)[1]
        assert "whole" in potluck("audit", "--since", head, "--home", home)
        assert "64 hex digits" in error_of("audit", "--since", head[1:], "--home", home)
        wrong = error_of("audit", "--since", head[1:] + "0", "--home", home)
        assert "the end was cut off" in wrong
        with served.run.service.database.write() as db:
            db.execute(update(audit).where(audit.c.number == 2).values(actor="nobody"))
        assert "got row 2: was changed" in error_of("audit", "--home", home)


def test_the_admin_socket_is_for_who_has_the_credential(tmp_path):
    with Served(tmp_path) as served:
        for name in ("admin.sock", "admin.key", "tls.key", "run-fleet.key"):
            assert stat.S_IMODE((served.home.folder / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(served.home.folder.stat().st_mode) == 0o700
        device = served.device()
        signed = device.signed("GET", "/admin/status")
        transport = httpx.HTTPTransport(uds=str(served.home.socket))
        names = ("status", "devices", "audit", "metrics")
        posts = ("enroll", "pause", "resume", "revoke", "export")
        with httpx.Client(transport=transport, base_url="http://server") as client:
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": ""}, signed):
                answers = [client.get(f"/admin/{name}", headers=headers) for name in names]
                answers += [client.post(f"/admin/{name}", headers=headers) for name in posts]
                for answer in answers:
                    assert answer.status_code == 401
                    assert parse_message(answer.content, Error).code == "unsigned"
            right = {"Authorization": f"Bearer {served.home.credential()}"}
            for path, content, status in (
                ("/admin/enroll", b'{"count":0}', 400),
                ("/admin/enroll", b'{"count":true}', 400),
                ("/admin/enroll", b"[1]", 400),
                ("/admin/enroll", b"x" * 5000, 413),
                ("/admin/nothing", b"{}", 404),
                ("/v1/check-in", b"{}", 404),
            ):
                answer = client.post(path, headers=right, content=content)
                assert answer.status_code == status
                parse_message(answer.content, Error)


def test_a_folder_that_others_could_read_is_its_owners_alone_from_then_on(tmp_path):
    (tmp_path / "home").mkdir(mode=0o755)
    with Served(tmp_path) as served:
        for path in (served.home.folder, served.home.folder / "blobs"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="must be its own"):
        StateFolder(tmp_path / "file").make()


def test_two_servers_do_not_share_a_folder_and_a_stale_socket_is_replaced(tmp_path):
    with Served(tmp_path) as served, pytest.raises(RunError, match="another server"):
        Served(tmp_path).__enter__()
    (served.home.folder / "admin.sock").touch()
    with Served(tmp_path) as served:
        assert served.operator.get("status")["state"] == "running"


def test_a_run_without_its_key_is_refused(tmp_path):
    with Served(tmp_path) as served:
        pass
    (served.home.folder / "run-fleet.key").unlink()
    with pytest.raises(RunError, match="made with the run"), Served(tmp_path):
        pass


def test_commands_without_a_server_fail_in_one_line(tmp_path):
    none = tmp_path / "none"
    for words in (["status"], ["enroll", "--wait", 0], ["dashboard"]):
        assert f"must be running, got no folder '{none}'" in error_of(*words, "--home", none)
        assert f"none at work in '{tmp_path}'" in error_of(*words, "--home", tmp_path)
    StateFolder(tmp_path).new_credential()
    assert f"none at work in '{tmp_path}'" in error_of("enroll", "--home", tmp_path, "--wait", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--insecure-loopback", "--host", "0.0.0.0"], "loopback"),
        (["--certificate", "x.pem"], "go together"),
        (["--goal", "0"], "server.goal"),
        (["--set", "server.banana=1"], "banana"),
        (["--set", "algorithm.name=scaffold"], "fedavg"),
    ],
)
def test_a_server_that_cannot_start_says_why(tmp_path, words, message):
    file = tmp_path / "kitchen.toml"
    file.write_text(EXPERIMENT)
    level, handlers = logging.getLogger().level, logging.getLogger().handlers[:]
    try:
        told = error_of("serve", file, "--home", tmp_path / "home", "--port", 0, *words)
    finally:
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
    assert message in told


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "got 0 in data="),
        (["a.npz", "b.npz"], "got 2 in data="),
        (["a.npz"], "a.npz"),
    ],
)
def test_data_that_are_none_are_told_before_the_invitation_is_used(tmp_path, files, message):
    (tmp_path / "data").mkdir()
    for name in files:
        (tmp_path / "data" / name).write_bytes(b"no archive")
    words = ("--token", "any", "--data", tmp_path / "data", "--home", tmp_path / "device")
    assert message in error_of("join", "https://127.0.0.1:1", *words)
    assert not (tmp_path / "device").exists()


def test_a_device_without_pytorch_is_told_so(tmp_path):
    code = """
import sys
import tempfile
from importlib import metadata
find = metadata.version
def version(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.version = version
from potluck.cli.main import main
main()
"""
    words = ["join", "https://127.0.0.1:1", "--token", "any", "--data", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: a device trains with PyTorch, got a machine without it.")


def test_the_server_section_becomes_the_settings_of_rounds(tmp_path):
    file = tmp_path / "kitchen.toml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file)
    assert RoundSettings.served(experiment) == RoundSettings.sampled(experiment)
    content = {
        "name": "x",
        "task": {"data": "digits", "model": "2nn"},
        "partition": {"kind": "iid", "clients": 40},
        "algorithm": {"client_lr": 0.1},
        "run": {"rounds": 3, "cohort": 0.25},
    }
    plain = RoundSettings.served(check_experiment(content, "test"))
    assert plain == RoundSettings(goal_part=0.25, num_rounds=3)  # of those that enrol
    counted = check_experiment(content | {"run": {"rounds": 3, "cohort": 10}}, "test")
    assert RoundSettings.served(counted) == RoundSettings(goal=10, population=8, num_rounds=3)
    for kind in ("own", "writer"):  # however many clients a simulation has
        divided = content | {"partition": {"kind": kind}, "server": {"selection": "sampled"}}
        drawn = RoundSettings.served(check_experiment(divided, "test"))
        assert drawn == plain.model_copy(update={"selection": "sampled"})
    knobs = {"goal": 7, "population": 1, "minimum": 0.5, "needs_idle": True, "report_seconds": 60}
    told = RoundSettings.served(check_experiment(content | {"server": knobs}, "test"))
    assert told == RoundSettings(num_rounds=3, **(knobs | {"report_seconds": 60.0}))
    assert "server" not in check_experiment(content | {"server": knobs}, "test").model_dump()


def test_a_certificate_is_made_once_and_for_the_owner(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "tls.key"
    ensure_certificate(certificate, key)
    fingerprint = certificate_fingerprint(certificate)
    ensure_certificate(certificate, key)
    assert certificate_fingerprint(certificate) == fingerprint
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(RunError, match="PEM"):
        certificate_fingerprint(key)
    assert Listen().host == "127.0.0.1"


def test_an_operators_own_certificate_is_not_pinned(tmp_path):
    ensure_certificate(tmp_path / "own.pem", tmp_path / "own.key")
    with Served(tmp_path, certificate=tmp_path / "own.pem", key=tmp_path / "own.key") as served:
        caller = Caller(served.server.address, (tmp_path / "own.pem").read_text())
        served.callers.append(caller)
        caller.enrol(served.invite())
        assert caller.invitation.certificate is None
        assert not served.home.certificate.exists()


@pytest.mark.parametrize(("length", "told"), [("200", None), ("4097", "close"), ("x", "close")])
def test_who_is_told_to_come_back_keeps_a_connection_that_has_little_left(length, told):
    headers = [(b"content-length", length.encode())]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers})
    refuse = error_handlers(lambda: 0)[CodedError]
    answer = asyncio.run(refuse(request, ProtocolError("overloaded", "too many")))
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] in ("1", "2", "3")
    assert answer.headers.get("Connection") == told


def test_those_for_whom_there_is_no_room_are_told_when_to_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "potluck.server.http.device_app.Limiter",
        lambda *_, **__: Limiter(1, waiting=1, seconds=20.0),
    )
    with Served(tmp_path, count=8) as served:
        devices = [served.device() for _ in range(8)]
        answers: list[httpx.Response] = []
        begin = threading.Barrier(len(devices))

        def ask(device: Caller) -> None:
            begin.wait(20)
            for _ in range(10):
                message = encode_message(device.check_in_of())
                answers.append(device.send("POST", "/v1/check-in", message))

        threads = [threading.Thread(target=ask, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) == 80
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {parse_message(answer.content, Error).code for answer in refused} == {"overloaded"}


def test_tls_reads_into_a_buffer_of_the_size_that_its_class_has(monkeypatch):
    """asyncio documents neither, and the memory of a thousand connections depends on it."""
    monkeypatch.setattr(SSLProtocol, "max_size", TLS_BYTES)

    async def scene() -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        loop = asyncio.get_running_loop()
        made = SSLProtocol(loop, asyncio.Protocol(), context, None, server_side=True)
        size = len(made.get_buffer(-1))
        made.connection_lost(None)
        return size

    assert asyncio.run(scene()) == TLS_BYTES


def test_a_connection_that_is_over_is_free_without_a_search_for_cycles(tmp_path, monkeypatch):
    found = []

    class Watched(ServerConnection):
        def connection_made(self, transport):
            super().connection_made(transport)
            if self.scheme == "https":  # the operator's have no TLS
                found.extend([weakref.ref(self), weakref.ref(transport)])

    monkeypatch.setattr("potluck.server.process.ServerConnection", Watched)
    with Served(tmp_path) as served:
        gc.collect()
        gc.disable()
        try:
            device = served.device()
            device.check_in()
            device.close()
            end = time.monotonic() + 10
            while not found or any(one() for one in found):
                assert time.monotonic() < end, [one() for one in found]
                time.sleep(0.02)
        finally:
            gc.enable()


def test_a_log_line_is_one_json_object():
    record = logging.makeLogRecord(
        {"name": "potluck.server", "msg": "a\nb", "levelname": "INFO", "device": "d", "n": 1}
    )
    told = json.loads(JsonFormatter().format(record))
    assert (told["event"], told["level"], told["device"], told["n"]) == ("a\nb", "info", "d", 1)


def test_a_failing_disk_is_unavailable_and_not_a_fault(tmp_path):
    with Served(tmp_path) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        given = device.assigned()
        parts = served.home.folder / "blobs" / "parts"
        upload = device.report(given, bytes(16))
        parts.rename(parts.with_name("gone"))
        path = f"/v1/uploads/{upload.upload}?offset=0"
        answer = device.send("PUT", path, bytes(16))
        assert parse_message(answer.content, Error).code == "unavailable"
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        parts.with_name("gone").rename(parts)
        assert isinstance(device.put(upload.upload, 0, bytes(16)), Accepted)


def test_an_object_store_that_is_away_is_unavailable_and_the_upload_goes_on_later(
    tmp_path, s3, monkeypatch
):
    bucket = s3()
    with socket.create_server(("127.0.0.1", 0)) as taken, monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        away = open_blobs(bucket)  # nobody listens there any more
    with Served(tmp_path, places=(None, bucket)) as served:
        device, service = served.device(), served.run.service
        served.until(lambda told: told["open"])
        upload, here = device.report(device.assigned(), bytes(16)), service.blobs
        for blobs in (away, open_blobs("s3://no-such-bucket")):
            service.blobs = blobs
            answer = device.send("PUT", f"/v1/uploads/{upload.upload}?offset=0", bytes(16))
            assert parse_message(answer.content, Error).code == "unavailable"
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        service.blobs = here
        assert isinstance(device.put(upload.upload, 0, bytes(16)), Accepted)


def test_stopping_sends_home_who_waits(tmp_path):
    with Served(tmp_path, population=2, long_poll_seconds=25.0) as served:
        device = served.device()
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(device.check_in()))
        waiting.start()
        held = "potluck_waiting_check_ins 1.0"
        served.until(lambda _: held in served.operator.text("metrics"))
        served.server.stop()
        waiting.join(10)
        assert answers[0].reason == "between_rounds"


def test_refusals_of_the_admin_api_reach_the_operator(tmp_path):
    with Served(tmp_path) as served, pytest.raises(RefusedError, match="days must be") as caught:
        served.operator.post("enroll", days=-1)
    assert caught.value.code == "malformed"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"goal_part": 1.0}, "a report of every enrolled device closes a round"),
        (
            {"goal_part": 0.1},
            "reports of 10 % of the enrolled devices (at least one) close a round",
        ),
        ({"goal": 1}, "1 report close"),
        ({"goal": 10}, "at most 13 devices a round"),
        ({"goal": 10}, "8 reports; with fewer a round is tried again"),
        ({"goal": 10, "population": 3}, "when 3 devices have enrolled"),
        ({"selection": "sampled"}, "the devices that are drawn for a round"),
    ],
)
def test_goal_minimum_and_assigned_are_told_in_words(settings, told):
    words = in_words(RoundSettings(num_rounds=1, **settings))
    assert [name for name, _ in words] == ["goal", "minimum", "assigned", "first round"]
    assert any(told in value for _, value in words)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="a system without both at once")
def test_a_server_at_every_ipv6_address_takes_ipv4_too(tmp_path):
    with Served(tmp_path, host="::") as served:
        assert served.server.address.startswith("https://[::]:")
        port = int(served.server.address.rsplit(":", 1)[1])
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=10).close()


def test_enroll_waits_for_a_server_that_starts(tmp_path):
    (tmp_path / "home").mkdir()
    words = [sys.executable, "-m", "potluck", "enroll", "--count", "2"]
    words += ["--home", str(tmp_path / "home")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as asking:
        assert "at most 60 s" in asking.stderr.readline()  # it has looked, and there is none
        with Served(tmp_path):
            told, complaint = asking.communicate(timeout=120)
    assert (asking.returncode, complaint) == (0, "")
    assert len(told.split()) == 2


@pytest.fixture
def short_path():
    """A folder whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        yield Path(folder)


def test_a_run_of_other_values_is_named_with_its_keys_and_put_aside_when_asked(short_path):
    file, home = short_path / "kitchen.toml", short_path / "home"
    file.write_text(EXPERIMENT)
    server = open_server(file, [], home, Listen(port=0))
    service, run = server.served.service, server.served.id
    token = issue_tokens(service, run, actor="test")[0]
    enrol(service, token, bytes(32))
    fingerprint, key = server.certificate, server.served.key
    server.close()
    changes = ["run.rounds=7", "algorithm.client_lr=0.5"]
    with pytest.raises(RefusedError) as refused:
        open_server(file, changes, home, Listen(port=0))
    told = str(refused.value)
    assert "run.rounds = 2 and not 7" in told
    assert "algorithm.client_lr = 0.1 and not 0.5" in told
    assert "--fresh" in told
    moved = potluck_fresh(home)
    server = open_server(file, changes, home, Listen(port=0))
    assert server.served.service.devices(server.served.id) == []
    assert (server.certificate, server.served.key != key) == (fingerprint, True)
    server.close()
    old = open_server(file, [], moved, Listen(port=0))  # with what its devices pinned
    assert [row["client"] for row in old.served.service.devices(old.served.id)] == [0]
    assert (old.certificate, old.served.key) == (fingerprint, key)
    with pytest.raises(RunError, match="another server is at work"):
        StateFolder(moved).put_aside()
    old.close()
    assert StateFolder(short_path / "none").put_aside() is None


def potluck_fresh(home):
    moved = StateFolder(home).put_aside()
    assert moved.parent == home
    assert stat.S_IMODE(moved.stat().st_mode) == 0o700
    assert not (home / "potluck.db").exists()
    return moved


def test_a_line_a_round_for_people(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=2, num_rounds=2, minimum=1.0)
    lines = Lines(fleet.service, fleet.run)
    assert lines.poll() == []
    fleet.round()
    assert lines.poll() == []  # until it was evaluated
    fleet.service.evaluate(fleet.run, lambda weights: {"accuracy": 0.5})
    shown = lines.poll()
    assert len(shown) == 1
    words = r"round 1/2  2 of 2 devices  train loss 0\.5000  accuracy 0\.5000  0\.0 s"
    assert re.fullmatch(words, shown[0])
    assert lines.poll() == []
    assert Lines(fleet.service, fleet.run).poll() == ["going on after round 1"]
    pause(fleet.service, fleet.run, "for lunch", actor="test")
    resume(fleet.service, fleet.run, actor="test")
    fleet.assign(fleet.devices[0])
    fleet.clock.pass_(10_000)
    fleet.service.tick()
    assert "abandoned and tried again" in lines.poll()[0]
    unjudged = Lines(fleet.service, fleet.run, is_evaluated=False)
    unjudged.poll()
    fleet.round()
    fleet.service.tick()
    assert [line[:9] for line in unjudged.poll()] == ["round 2/2", "finished:"]
    fleet.service.close()
