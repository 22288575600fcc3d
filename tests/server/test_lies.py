"""What a device believes: real devices against somebody in between who ends TLS and lies.

In each round from the second on there is one lie. The device must refuse, say why, and keep its
last good model; and when it is told the truth again, go on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time

import numpy as np
import pytest
from sqlalchemy import select

from federation import Federation, UnitTrainer
from intermediary import Answer, Intermediary
from potluck.core import PotluckError, RefusedError, Spec
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.device import Home, Record, SystemClock
from potluck.device.agent import OFFERS
from potluck.device.connection import LATEST_MS, Connection
from potluck.device.download import receive_model
from potluck.protocol import CODECS, Manifest, ManifestSpec, new_key, sign_manifest
from potluck.protocol.keys import sign_bytes
from potluck.server.storage.database_tables import assignments, rounds

HOUR = 3_600_000
KEY = "00" * 32  # of a run; nothing is verified with it


class Liar:
    """Changes the answers to one device, and notes what the device does then."""

    def __init__(self) -> None:
        self.run_key = b""
        self.folder = None
        self.manifests: list[dict] = []  # of the rounds before, as they were handed out
        self.models: list[bytes] = []
        self.told: dict[str, dict] = {}  # by lie: what the device said, and what it had then
        self.trained: list[str | None] = []  # the lie during which it trained
        self.current: str | None = None
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, answer: Answer) -> bytes:
        if answer.path == "/v1/check-in" and b'"type":"assignment"' in answer.content:
            return self._assignment(json.loads(answer.content))
        if answer.path.startswith("/v1/models/"):
            return self._model(answer.content)
        if answer.path == "/v1/failure" and self.current is not None:
            models = self.folder / "models"
            self.told.setdefault(
                self.current,
                {
                    "reason": json.loads(answer.request)["reason"],
                    "models": {p.name: p.read_bytes() for p in models.iterdir()},
                    "version": (self.folder / "manifest").read_text(),
                },
            )
        return answer.content

    def _assignment(self, given: dict) -> bytes:
        place = (given["round"], given["attempt"])
        lie = LIES[given["round"] - 2] if given["round"] >= 2 else None
        self.current = lie if place[1] == 1 else None
        if self.current is None:
            if place not in self._seen:
                self._seen.add(place)
                self.manifests.append(given)
                if "model" in given:
                    self.models.append(base64.b64decode(given["model"]))
        else:
            given = _changed(self, self.current, dict(given))
        return json.dumps(given).encode()

    def _model(self, model: bytes) -> bytes:
        if self.current is None:
            self.models.append(model)
        return self.lie_of(model)

    def lie_of(self, model: bytes) -> bytes:
        match self.current:
            case "a flipped bit of the model":
                return model[:-1] + bytes([model[-1] ^ 1])
            case "an older model":
                return self.models[0]
        return model


LIES = (
    "a flipped bit of the manifest", "a flipped bit of the signature", "another key",
    "another run", "another round", "expired", "rollback", "signed nonsense",
    "a flipped bit of the model", "an older model",
)  # fmt: skip
REASONS = {
    "a flipped bit of the manifest": "manifest_signature",
    "a flipped bit of the signature": "manifest_signature",
    "another key": "manifest_signature",
    "another run": "manifest_foreign",
    "another round": "manifest_foreign",
    "expired": "manifest_expired",
    "rollback": "manifest_rollback",
    "signed nonsense": "manifest_malformed",
    "a flipped bit of the model": "model_digest",
    "an older model": "model_digest",
}


def _changed(liar: Liar, lie: str, given: dict) -> dict:
    content = json.loads(given["manifest"])
    now = time.time_ns() // 10**6
    changes: dict = {}
    match lie:
        case "a flipped bit of the manifest":
            name = '"sha256":"'
            at = given["manifest"].index(name) + len(name)
            flipped = chr(ord(given["manifest"][at]) ^ 1)
            given["manifest"] = given["manifest"][:at] + flipped + given["manifest"][at + 1 :]
            return given
        case "a flipped bit of the signature":
            bits = bytearray.fromhex(given["signature"])
            bits[17] ^= 4
            return given | {"signature": bits.hex()}
        case "rollback":  # what the server itself signed in the first round
            old = liar.manifests[0]
            return given | {"manifest": old["manifest"], "signature": old["signature"]}
        case "signed nonsense":
            data = b'{"version":99}'
            signature = sign_bytes(liar.run_key, b"potluck-manifest-v1\n" + data)
            return given | {"manifest": data.decode(), "signature": signature.hex()}
        case "another run":
            changes = {"run": "another"}
        case "another round":
            changes = {"round": given["round"] + 1}
        case "expired":
            changes = {"created_ms": now - 2 * HOUR, "expires_ms": now - HOUR}
    key = new_key() if lie == "another key" else liar.run_key
    if lie in ("a flipped bit of the model", "an older model"):
        if "model" in given:
            model = liar.lie_of(base64.b64decode(given["model"]))
            given["model"] = base64.b64encode(model).decode()
        return given
    manifest = Manifest.model_validate(content | changes)
    data, signature = sign_manifest(key, manifest)
    return given | {"manifest": data.decode(), "signature": signature.hex()}


@pytest.fixture(scope="module", params=["downloaded", "inside"])
def lied_to(request, tmp_path_factory):
    """One device, a round for each lie, and what came of it; its model is downloaded, or comes
    inside its assignment."""
    offers = CODECS if request.param == "downloaded" else OFFERS
    folder = tmp_path_factory.mktemp("lies")
    liar = Liar()
    server = (
        "goal = 1\npopulation = 1\nover_selection = 1.0\nattempts = 100\n"
        "selection_seconds = 1.0\nreport_seconds = 1.5"
    )
    federation = Federation(folder, clients=1, rounds=1 + len(LIES), server=server)
    with federation:
        liar.run_key, liar.folder = federation.server.served.key, folder / "device0"
        trainer = UnitTrainer(lambda: liar.trained.append(liar.current))
        with Intermediary(federation.port, federation.operator._home, liar) as between:
            device = federation.join(0, trainer, between.address, offers=offers)
            federation.until(lambda: federation.status()["state"] == "finished", 120)
            device.end()
            assert device.died is None
            assert all(("model" in given) == (offers is OFFERS) for given in liar.manifests)
        failed = (
            select(assignments.c.reason, rounds.c.number)
            .join(rounds, rounds.c.id == assignments.c.round)
            .where(assignments.c.state == "failed", rounds.c.attempt == 1)
        )
        with federation.service.database.read() as db:
            noted = {LIES[row.number - 2]: row.reason for row in db.execute(failed)}
        moved = federation.weights() - federation.weights(0)
    return liar, device, noted, moved


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_is_lied_to_refuses_says_why_and_keeps_its_model(lied_to, lie):
    liar, device, noted, _ = lied_to
    round = LIES.index(lie) + 2
    told = liar.told[lie]
    assert told["reason"] == noted[lie] == REASONS[lie]
    assert lie not in liar.trained
    before = liar.models[round - 2]  # what the last honest round gave it
    kept = told["models"][hashlib.sha256(before).hexdigest()]
    assert kept == before
    rolled = json.loads(liar.manifests[round - 2]["manifest"])["version"]
    accepted = json.loads(liar.manifests[round - 1]["manifest"])["version"]
    assert told["version"] == str(accepted if REASONS[lie] == "model_digest" else rolled)
    event = next(e for e in device.events if e.what == "failed" and e.round == round)
    assert "got" in event.detail


def test_a_device_that_was_lied_to_goes_on_when_it_is_told_the_truth(lied_to):
    liar, device, _, moved = lied_to
    assert device.count("accepted") == 1 + len(LIES)
    assert moved[0] == pytest.approx(1 + len(LIES), abs=1e-5)
    assert set(liar.trained) == {None}
    assert device.count("failed") >= len(LIES)


class Answers:
    """A server of raw answers, one after another; the last is given for ever."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.count = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Answers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                self.count += 1
                answer = self._answers[min(self.count, len(self._answers)) - 1]
                try:
                    while answer:
                        connection.sendall(answer)
                        if not answer.endswith(b"..."):
                            break
                        answer = b"x" * 65_536 + b"..."  # without an end
                except OSError:
                    pass


class Stop(PotluckError):
    """Long enough."""


class Patience(SystemClock):
    """A clock that notes waits instead of waiting, and gives up after some."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.left = waits

    def wait(self, seconds: float) -> None:
        if seconds > 0:
            self.left -= 1
        if self.left < 0:
            raise Stop


def manifest_of(model: bytes) -> Manifest:
    return Manifest(
        version=1, previous=0, run="r", round=1, length_bytes=len(model), plan={}, created_ms=1,
        sha256=hashlib.sha256(model).hexdigest(), expires_ms=2,
        spec=ManifestSpec.of(Spec(("w",), ((len(model) // 4,),))),
    )  # fmt: skip


def refusal(code: str, status: int) -> bytes:
    body = json.dumps({"type": "error", "code": code, "message": "no"}).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        status, len(body), body,
    )  # fmt: skip


HOSTILE_DOWNLOADS = {
    "an error without an end": b"HTTP/1.1 404 X\r\nConnection: close\r\n\r\n...",
    "a model without an end": b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n...",
    "nothing": b"HTTP/1.1 200 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "no HTTP": b"hello\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "compressed": b"HTTP/1.1 200 X\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    "another range": b"HTTP/1.1 206 X\r\nContent-Range: bytes 9-9/9\r\nContent-Length: 1\r\n\r\nx",
}


@pytest.mark.parametrize("kind", HOSTILE_DOWNLOADS)
def test_a_download_that_is_none_is_tried_again_slowly_and_fills_nothing(tmp_path, kind):
    home, clock = Home(tmp_path / "d"), Patience(5)
    model = np.ones(100, "<f4").tobytes()
    (home.folder / "models").mkdir()
    old = home.folder / "models" / ("0" * 64)
    write_whole(old, b"the old model", PRIVATE)
    try:
        with (
            Answers(HOSTILE_DOWNLOADS[kind]) as server,
            Connection(server.address, None, KEY, home, Record(home.folder / "s"), clock) as to,
        ):
            with pytest.raises(Stop):
                receive_model(to, manifest_of(model), home.folder / "models", lambda: None)
            assert server.count <= 7  # a wait before each
        assert old.read_bytes() == b"the old model"
        assert sum(p.stat().st_size for p in (home.folder / "models").iterdir()) < 1000
    finally:
        home.close()


def test_a_range_that_is_always_refused_is_no_endless_loop(tmp_path):
    home = Home(tmp_path / "d")
    try:
        with (
            Answers(refusal("range", 416)) as server,
            Connection(
                server.address, None, KEY, home, Record(home.folder / "s"), Patience(5)
            ) as to,
            pytest.raises(RefusedError),
        ):
            receive_model(to, manifest_of(bytes(400)), tmp_path / "models", lambda: None)
        assert server.count == 1
    finally:
        home.close()


def test_a_server_whose_clock_runs_wild_does_not_use_up_the_sequence_numbers(tmp_path):
    home = Home(tmp_path / "d")
    try:
        connection = Connection(
            "http://127.0.0.1:1", None, KEY, home, Record(home.folder / "s"), Patience(9)
        )
        before = connection.now_ms()
        connection.correct_clock(2**53 - 1)
        connection.correct_clock(LATEST_MS + 1)
        assert abs(connection.now_ms() - before) < 60_000
        connection.correct_clock(before + HOUR)
        assert abs(connection.now_ms() - before - HOUR) < 60_000
        assert home.next_sequence(LATEST_MS) + 10**12 < 2**53  # room for a trillion requests
        connection.close()
    finally:
        home.close()
