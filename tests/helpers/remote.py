"""A served run in a thread, on real sockets, and devices that are a signed HTTP client each.

Device i sends e_i, the i-th unit vector, with weight 1: the model tells who is in it.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np

from fleet import CONTENT, fingerprint
from messages import read_version
from potluck.config.experiment import check_experiment
from potluck.core import Spec
from potluck.protocol import (
    MESSAGES,
    Accepted,
    Assignment,
    CheckIn,
    Eligibility,
    Enrol,
    Message,
    Report,
    Runtime,
    Upload,
    Wait,
    encode_message,
    new_key,
    parse_invitation,
    parse_message,
    public_key,
    sign_request,
)
from potluck.protocol import fingerprint as key_fingerprint
from potluck.server import RoundSettings
from potluck.server.admin.client import Operator
from potluck.server.evaluator import Beginning
from potluck.server.open_run import open_run
from potluck.server.process import Listen, Server
from potluck.server.storage.state_folder import StateFolder

RUNTIME = Runtime(name="test", version="1")


class Served:
    """A server of one run in a thread, until the end of the block."""

    def __init__(
        self,
        folder,
        *,
        count=3,
        dim=4,
        long_poll_seconds=0.0,
        name=None,
        certificate=None,
        key=None,
        codec="float32",
        places=(None, None),
        host="127.0.0.1",
        names=(),
        **settings,
    ):
        self.places = places
        self.home, self.dim, self.long_poll_seconds = (
            StateFolder(folder / "home"),
            dim,
            long_poll_seconds,
        )
        values = {"goal": count, "over_selection": 1.0, "num_rounds": 100} | settings
        self.settings = RoundSettings(**values)
        content = CONTENT | {
            "name": name or "fleet",
            "run": CONTENT["run"] | {"codec": codec},
        }
        self.experiment = check_experiment(content, "test")
        self.evaluated = []
        self.callers = []
        self.listen = Listen(
            host=host, port=0, certificate=certificate, private_key=key, names=names
        )

    def __enter__(self) -> Served:
        first = np.zeros(self.dim, np.float32)
        beginning = Beginning(first, Spec(("w",), ((self.dim,),)), {"task": "none"})
        self.run = open_run(
            self.experiment,
            self.settings,
            self.home,
            lambda: beginning,
            database=self.places[0],
            blobs=self.places[1],
        )
        try:
            self.server = Server(
                self.run, self.home, self.listen, self.long_poll_seconds, self._evaluate
            )
        except BaseException:
            self.run.service.close()
            raise
        self.port = self.server.port
        self.listen = replace(self.listen, port=self.port)  # of the next start, too
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        self.operator = Operator(self.home)
        return self

    def __exit__(self, *_) -> None:
        for caller in self.callers:
            caller.close()
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def _evaluate(self, weights):
        self.evaluated.append(weights.copy())
        return {"sum": float(weights.sum())}

    def invite(self) -> str:
        return self.operator.post("enroll")["invitations"][0]

    def caller(self, **options) -> Caller:
        """A device that is not enrolled yet."""
        certificate = self.home.certificate.read_text()
        options = {"run_key": public_key(self.run.key)} | options
        named = f"https://{self.listen.host}:{self.port}"
        address = named if self.listen.names else self.server.address
        self.callers.append(Caller(address, certificate, **options))
        return self.callers[-1]

    def device(self) -> Caller:
        """An enrolled device."""
        caller = self.caller()
        caller.enrol(self.invite())
        return caller

    def until(self, condition) -> None:
        """Wait for the server to get somewhere by itself."""
        end = time.monotonic() + 300
        while not condition(self.run.service.status(self.run.id)):
            assert time.monotonic() < end, "the server did not get there"
            time.sleep(0.02)

    def weights(self) -> list[float]:
        service, run = self.run.service, self.run.id
        version = service.status(run)["version"]
        return np.frombuffer(b"".join(read_version(service, run, version)), "<f4").tolist()


class Caller:
    """A device: a key, a sequence number, and one connection."""

    def __init__(
        self,
        address: str,
        certificate: str,
        *,
        key: bytes | None = None,
        run_key: bytes = bytes(32),  # until there is an invitation
    ) -> None:
        self.key, self.run_key = key or new_key(), run_key
        self.id = key_fingerprint(public_key(self.key))
        self.sequence = 0
        context = ssl.create_default_context(cadata=certificate)
        context.check_hostname = False
        self.http = httpx.Client(base_url=address, verify=context, timeout=30.0)
        self.authority = httpx.URL(address).netloc.decode()

    def close(self) -> None:
        self.http.close()

    def signed(self, method, path, body=b"", **changes) -> dict[str, str]:
        """The headers of a request; `changes` make them wrong."""
        self.sequence += 1
        values = {
            "key": self.key,
            "method": method,
            "path": path,
            "body": body,
            "authority": self.authority,
            "run_key": self.run_key,
            "sequence": self.sequence,
            "time_ms": time.time_ns() // 10**6,
        } | changes
        v = SimpleNamespace(**values)
        numbers = {"sequence": v.sequence, "time_ms": v.time_ms}
        place = (v.method, v.authority, v.path)
        return sign_request(v.key, *place, v.body, run_key=v.run_key, **numbers)

    def send(self, method, path, body=b"", *, kind=None, headers=None) -> httpx.Response:
        """A request with these bytes; signed, unless other headers are given."""
        kind = kind or ("application/octet-stream" if method == "PUT" else "application/json")
        signed = self.signed(method, path, body) if headers is None else headers
        extra = {"Content-Type": kind} if method != "GET" else {}
        content = body if method != "GET" else None
        return self.http.request(method, path, content=content, headers=signed | extra)

    def ask(self, name: str, message: Message) -> Message:
        """The answer to a message."""
        return read(self.send("POST", f"/v1/{name}", encode_message(message)))

    def enrol(self, invitation: str) -> Message:
        self.invitation = parse_invitation(invitation)
        self.run_key = bytes.fromhex(self.invitation.server_key)
        key = public_key(self.key).hex()
        token = self.invitation.token
        message = Enrol(token=token, public_key=key, runtime=RUNTIME, device_class="test")
        return self.ask("enrol", message)

    def check_in(self, accepts=("float32",)) -> Message:
        return self.ask("check-in", self.check_in_of(accepts))

    def check_in_of(self, accepts=("float32",)) -> CheckIn:
        run = self.invitation.run
        return CheckIn(run=run, accepts=accepts, runtime=RUNTIME, eligibility=Eligibility())

    def assigned(self, accepts=("float32",)) -> Assignment:
        """The next work. A round may not be open yet, or be on its way to the next attempt."""
        end = time.monotonic() + 300
        while isinstance(answer := self.check_in(accepts), Wait) and time.monotonic() < end:
            time.sleep(answer.retry_after_seconds)
        assert isinstance(answer, Assignment), answer
        return answer

    def report(self, given: Assignment, body: bytes, **changes) -> Message:
        return self.ask("report", self.report_of(given, body, **changes))

    def report_of(self, given: Assignment, body: bytes, **changes) -> Report:
        values = {
            "assignment": given.assignment,
            "round": given.round,
            "attempt": given.attempt,
            "codec": given.codec,
            "length_bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "weight": 1.0,
            "loss": 0.5,
            "num_steps": 1,
            "metrics": {},
        }
        return Report(**(values | changes))

    def put(self, upload: str, offset: int, data: bytes) -> Message:
        return read(self.send("PUT", f"/v1/uploads/{upload}?offset={offset}", data))

    def take_part(self, dim: int) -> tuple[Assignment, Upload, Accepted, bytes]:
        """One round's work."""
        given = self.assigned()
        body = fingerprint(given.client, dim).astype("<f4").tobytes()
        upload = self.report(given, body)
        assert isinstance(upload, Upload), upload
        accepted = self.put(upload.upload, upload.offset, body)
        assert isinstance(accepted, Accepted), accepted
        return given, upload, accepted, body


def read(answer: httpx.Response) -> Message:
    """The message in an answer."""
    return parse_message(answer.content, *MESSAGES, limit=2**20)
