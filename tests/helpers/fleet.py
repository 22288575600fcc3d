"""A server and its devices in one process, without sockets, with a clock that is moved by hand.

Device i sends e_i, the i-th unit vector, with weight 1: the model tells who is in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from messages import begin, check_in, claims, read_version
from potluck.config.algorithm_section import build_algorithm
from potluck.config.experiment import check_experiment
from potluck.core import Spec
from potluck.protocol import Accepted, Eligibility
from potluck.server import RoundSettings, Service
from potluck.server.rounds.check_in import Assigned
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.uploads import append_chunk, finish_report
from potluck.server.storage.object_store import ObjectStore

CONTENT = {
    "name": "fleet",
    "task": {"data": "digits", "model": "2nn"},
    "partition": {"kind": "iid", "clients": 4},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 1000, "cohort": 4},
}


class Clock:
    """A wall clock and a monotonic one; `pass_` moves both, `jump` the wall clock alone."""

    def __init__(self, wall_ms: int = 1_700_000_000_000) -> None:
        self.wall, self.elapsed = wall_ms, 5_000

    def wall_ms(self) -> int:
        return self.wall

    def elapsed_ms(self) -> int:
        return self.elapsed

    def pass_(self, seconds: float) -> None:
        self.wall += round(seconds * 1000)
        self.elapsed += round(seconds * 1000)

    def jump(self, seconds: float) -> None:
        self.wall += round(seconds * 1000)


def fingerprint(client: int, dim: int) -> np.ndarray:
    vector = np.zeros(dim, np.float32)
    vector[client] = 1.0
    return vector


class Fleet:
    """A service with one run and `count` enrolled devices."""

    eligibility = Eligibility()
    """Of all devices."""

    def __init__(
        self, url, blobs, *, count=4, dim=None, clock=None, run=None, algorithm=None, **settings
    ) -> None:
        self.url, self.blobs, self.clock = url, str(blobs), clock or Clock()
        self.dim = dim or count
        self.spec = Spec(("w",), ((self.dim,),))
        values = {"goal": count, "over_selection": 1.0, "num_rounds": 1000} | settings
        self.settings = RoundSettings(**values)
        given = {"run": run or {}, "algorithm": algorithm or {}}
        content = CONTENT | {name: CONTENT[name] | values for name, values in given.items()}
        self.experiment = check_experiment(content, "test")
        self.service = self.open()
        self.run = self.service.create_run(
            self.experiment, np.zeros(self.dim, np.float32), self.spec, self.settings
        )
        self.devices = [self.enrol(i) for i in range(count)]

    def open(self, **options) -> Service:
        return Service.open(
            self.url, self.blobs, build=build_algorithm, clock=self.clock, **options
        )

    def enrol(self, i: int) -> str:
        token = issue_tokens(self.service, self.run, actor="test")[0]
        return enrol(self.service, token, bytes([i % 256, i // 256]) * 16).id

    def vector(self, device: str) -> np.ndarray:
        return fingerprint(self.devices.index(device), self.dim)

    def assign(self, device: str) -> Assigned:
        answer = check_in(self.service, device, self.eligibility)
        assert isinstance(answer, Assigned), answer
        return answer

    def send(self, device: str, assignment: str, vector=None, **changes) -> Accepted:
        vector = self.vector(device) if vector is None else vector
        upload = begin(self.service, device, assignment, claims(vector, **changes))
        if isinstance(upload, Accepted):
            return upload
        body = vector.astype("<f4").tobytes()
        append_chunk(self.service, device, upload.upload, upload.offset, body[upload.offset :])
        return finish_report(self.service, device, upload.upload)

    def take_part(self, device: str) -> Accepted:
        return self.send(device, self.assign(device).assignment)

    def round(self, devices=None) -> None:
        """One whole round of these devices."""
        self.service.tick()
        for device in devices or self.devices:
            self.take_part(device)
        self.service.tick()

    def weights(self, version=None) -> np.ndarray:
        version = self.status()["version"] if version is None else version
        return np.frombuffer(b"".join(read_version(self.service, self.run, version)), "<f4")

    def status(self) -> dict:
        return self.service.status(self.run)

    def stored(self) -> list[str]:
        """The keys of all blobs, and of what there is of uploads."""
        blobs, folder = self.service.blobs, Path(self.blobs)
        if isinstance(blobs, ObjectStore):
            return [path for path, _ in blobs._list("")]
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
