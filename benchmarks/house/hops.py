"""How many functions and files a device's update goes through, from the socket to the model.

    python benchmarks/house/hops.py --out benchmarks/house/hops.json

A server runs in this process, on a real socket with TLS. A device reports an update, which is the
goal of its round: in a chunk, and in another run inside its report. The second round is traced, as
the first one fills caches. The path begins with the first byte of the report and ends when the new
model is the run's. It includes the announcement of an update that comes in a chunk.

A hop is the first entry on that path, in whatever thread of the server, into a function of
`potluck` that
- has a public name,
- is called from another file of ours, and
- calls another function of ours itself.
Leaves, helpers of a file, properties, and what runs beside the path (`_BESIDE`) are no hops. A file
counts where a hop is in it.

So counted, the tree of the review that set the bar (e19dde6: "about 60 hops in 36 files", by hand)
has 61 hops in 33 files for a chunk, and 40 in 31 for an update inside its report. The tree before
the functions of the server were called directly (8705cbb) had 81 in 46, and 61 in 43.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import ssl
import sys
import tempfile
import threading
import time
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import httpx
import numpy as np

import potluck
from potluck.config.experiment import check_experiment
from potluck.core import Spec
from potluck.protocol import (
    MESSAGES,
    Assignment,
    CheckIn,
    Eligibility,
    Enrol,
    Report,
    Runtime,
    Upload,
    encode_inline,
    encode_message,
    new_key,
    parse_invitation,
    parse_message,
    public_key,
    sign_request,
)
from potluck.server import RoundSettings
from potluck.server.admin.client import Operator
from potluck.server.evaluator import Beginning
from potluck.server.open_run import open_run
from potluck.server.process import Listen, Server
from potluck.server.storage.state_folder import StateFolder

ROOT = Path(potluck.__file__).parent
MAX_HOPS, MAX_FILES = 45, 26
_BESIDE = {
    "Candidate._hold",
    "Server._show",
    "Server._sweep",
    "Server._evaluations",
    "Server._tell",
    "Server._trim",
    "Service.status",
    "Service.sweep",
    "Service.evaluate",
    "GcScheduler.poll",
    "Trimmer.poll",
}
EXPERIMENT = {
    "name": "hops",
    "task": {"data": "digits", "model": "2nn"},
    "partition": {"kind": "iid", "clients": 4},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 100, "cohort": 4},
}
RUNTIME = Runtime(name="hops", version="1")


class Function(NamedTuple):
    """A function of ours."""

    file: str
    name: str


class Trace:
    """The functions of ours that any thread but the first one enters while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self._entered: dict[Function, Function | None] = {}
        """By function, in the order of their first entry: which one called it."""
        self.busy: set[Function] = set()
        """Those that call others."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if not self.is_on or event != "call":
            return
        entered, callers = _function(frame), _callers(frame)
        if entered is not None and not any(one.name in _BESIDE for one in (entered, *callers)):
            self._entered.setdefault(entered, callers[0] if callers else None)
            self.busy.update(callers[:1])

    def hops(self) -> list[Function]:
        """The hops, in their order."""
        return [
            one
            for one, caller in self._entered.items()
            if one in self.busy
            and (caller is None or caller.file != one.file)
            and not any(part.startswith("_") for part in one.name.split("."))
            and not _is_property(one)
        ]


def _function(frame: FrameType) -> Function | None:
    path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
    if not path.is_relative_to(ROOT) or "<lambda>" in name or name.endswith(">"):
        return None
    return Function(str(path.relative_to(ROOT)), name.replace("<locals>.", ""))


def _callers(frame: FrameType) -> list[Function]:
    """The other functions of ours on the stack, the nearest first."""
    found: list[Function] = []
    here, above = _function(frame), frame.f_back
    while above is not None:
        one = _function(above)
        if one is not None and one != here:
            found.append(one)
        above = above.f_back
    return found


def _is_property(function: Function) -> bool:
    found: Any = sys.modules["potluck." + function.file.removesuffix(".py").replace("/", ".")]
    for name in function.name.split("."):
        found = getattr(found, name, None)
    return isinstance(found, property | cached_property)


class Device:
    """A device: a key, a sequence number, and one connection."""

    def __init__(self, address: str, certificate: str, invitation: str) -> None:
        self._key, self._sequence = new_key(), 0
        self._invitation = parse_invitation(invitation)
        context = ssl.create_default_context(cadata=certificate)
        context.check_hostname = False
        self.http = httpx.Client(base_url=address, verify=context, timeout=30.0)
        self._authority = httpx.URL(address).netloc.decode()
        key = public_key(self._key).hex()
        token = self._invitation.token
        message = Enrol(token=token, public_key=key, runtime=RUNTIME, device_class="hops")
        self.ask("enrol", message)

    def send(self, method: str, path: str, body: bytes, kind: str) -> Any:
        self._sequence += 1
        signed = sign_request(
            self._key,
            method,
            self._authority,
            path,
            body,
            run_key=bytes.fromhex(self._invitation.server_key),
            sequence=self._sequence,
            time_ms=time.time_ns() // 10**6,
        )
        headers = signed | {"Content-Type": kind}
        answer = self.http.request(method, path, content=body, headers=headers)
        return parse_message(answer.content, *MESSAGES, limit=2**20)

    def ask(self, name: str, message: Any) -> Any:
        return self.send("POST", f"/v1/{name}", encode_message(message), "application/json")

    def assigned(self) -> Assignment:
        """Work, when there is some."""
        run, accepts = self._invitation.run, ("float32", "inline")
        message = CheckIn(run=run, accepts=accepts, runtime=RUNTIME, eligibility=Eligibility())
        while not isinstance(answer := self.ask("check-in", message), Assignment):
            time.sleep(0.1)
        return answer

    def report(self, given: Assignment, body: bytes, *, inside: bool) -> None:
        """Send an update, in a chunk or inside its report."""
        message = Report(
            assignment=given.assignment,
            round=given.round,
            attempt=given.attempt,
            codec=given.codec,
            length_bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            weight=1.0,
            loss=0.5,
            num_steps=1,
            metrics={},
            update=encode_inline(body) if inside else None,
        )
        answer = self.ask("report", message)
        if isinstance(answer, Upload):
            path = f"/v1/uploads/{answer.upload}?offset=0"
            answer = self.send("PUT", path, body, "application/octet-stream")
        assert answer.type == "accepted", answer


def trace(folder: Path, dim: int, *, inside: bool) -> list[Function]:
    """The hops of one update of so many numbers."""
    found = Trace()
    home = StateFolder(folder / "home")
    beginning = Beginning(np.zeros(dim, np.float32), Spec(("w",), ((dim,),)), {"task": "none"})
    settings = RoundSettings(goal=1, over_selection=1.0, num_rounds=100)
    served = open_run(check_experiment(EXPERIMENT, "hops"), settings, home, lambda: beginning)
    server = Server(served, home, Listen(host="127.0.0.1", port=0), 0.0, None)
    thread = threading.Thread(target=server.serve)
    threading.setprofile(found)
    thread.start()
    try:
        invitation = Operator(home).post("enroll")["invitations"][0]
        device = Device(server.address, home.certificate.read_text(), invitation)
        for round in (1, 2):
            given = device.assigned()
            while served.service.status(served.id)["open"]["state"] != "TRAINING":
                time.sleep(0.01)
            found.is_on = round == 2
            device.report(given, np.ones(dim, "<f4").tobytes(), inside=inside)
            while served.service.status(served.id)["version"] < round:
                time.sleep(0.001)
        found.is_on = False
        device.http.close()
    finally:
        server.stop()
        thread.join(20)
        threading.setprofile(None)
    return found.hops()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    told: dict[str, Any] = {"bar": {"hops": MAX_HOPS, "files": MAX_FILES}}
    for name, dim, inside in (("chunked", 100_000, False), ("inline", 4, True)):
        with tempfile.TemporaryDirectory() as folder:
            hops = trace(Path(folder), dim, inside=inside)
        files = list(dict.fromkeys(hop.file for hop in hops))
        print(f"{name}: {len(hops)} hops in {len(files)} files (bar: {MAX_HOPS} in {MAX_FILES})")
        for file in files:
            print(f"  {file:28} {', '.join(hop.name for hop in hops if hop.file == file)}")
        path = [f"{hop.file} {hop.name}" for hop in hops]
        told[name] = {"hops": len(hops), "files": len(files), "path": path}
    if out is not None:
        out.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
