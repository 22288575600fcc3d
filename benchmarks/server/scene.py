"""A served run as the benchmarks need it: `potluck serve` in a process of its own, and its devices.

    with Scene(folder, model_bytes=800_000, devices=20, rounds=3) as scene:
        scene.load("rounds", count=20)

The model is the paper's 2NN over invented data with as many features as the size asks for; only
its bytes matter. The server may be held to one core; the devices then have the others. Keys are
made once and kept in a folder; enrolment is done anew, by the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from potluck.core.plain_json import to_json
from potluck.protocol import new_key, parse_invitation, public_key
from potluck.server.admin.client import Operator
from potluck.server.storage.state_folder import StateFolder

HERE = Path(__file__).parent
_TICKS = os.sysconf("SC_CLK_TCK")

EXPERIMENT = """
name = "load"
[task]
data = "folder"
path = "data"
model = "{model}"
[partition]
kind = "own"
[algorithm]
client_lr = 0.1
[run]
rounds = {rounds}
cohort = 2
evaluate_every = 1000000
[server]
goal = {goal}
minimum = 1.0
over_selection = 1.0
population = {population}
long_poll_seconds = {long_poll}
pace_seconds = {pace}
report_seconds = 3600.0
selection_seconds = 3600.0
"""


class Scene:
    """A server, from the start of the block to its end, and processes of devices."""

    def __init__(
        self,
        folder: Path,
        *,
        keys: Path,
        model_bytes: int,
        devices: int,
        rounds: int = 1,
        goal: int | None = None,
        population: int | None = None,
        long_poll: float = 25.0,
        pace: float = 10.0,
        core: int | None = None,
        descriptors: int | None = None,
    ) -> None:
        self.folder, self.home, self.devices = folder, StateFolder(folder / "home"), devices
        self._core, self._descriptors = core, descriptors
        self._process: subprocess.Popen[bytes] | None = None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.dim, model = _write_data(folder / "data", model_bytes)
        self.keys = _keys(keys, devices)
        self.update = folder / "update"
        self.update.write_bytes(np.full(self.dim, 1e-3, "<f4").tobytes())
        self._values = {
            "model": model,
            "rounds": rounds,
            "goal": goal or devices,
            "population": population or devices,
            "long_poll": long_poll,
            "pace": float(pace),
        }
        self.configure(long_poll=long_poll)
        self.port = 0
        self.started_seconds = 0.0

    def __enter__(self) -> Scene:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder / "home" / "blobs", ignore_errors=True)

    def configure(self, *, long_poll: float) -> None:
        """Write the experiment, for the next start."""
        text = EXPERIMENT.format(**self._values | {"long_poll": float(long_poll)})
        (self.folder / "load.toml").write_text(text)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        begin = time.perf_counter()
        pin = [] if self._core is None else ["taskset", "-c", str(self._core)]
        if self._descriptors is not None:
            pin = ["sh", "-c", f'ulimit -n {self._descriptors} && exec "$@"', "sh", *pin]
        command = [sys.executable, "-m", "potluck", "serve", "load.toml", "--home", "home"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*pin, *command, "--port", str(self.port), "--log-level", "warning"],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, _, value = line.decode().partition(" ")
            if name == "address":
                self.port = int(value.strip().rsplit(":", 1)[1])
            if name == "admin":
                break
        else:
            raise RuntimeError(f"the server did not start: see {self.folder / 'server.log'}")
        self.started_seconds = time.perf_counter() - begin

    def stop(self) -> None:
        """End the server, and wait for it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def cpu_seconds(self) -> float:
        """Of the server's process, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_bytes(self, name: str = "VmHWM") -> int:
        """Resident memory: its peak (VmHWM), or now (VmRSS)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {name} in /proc")

    def children_bytes(self) -> int:
        """The peak memory of the server's children that there are now."""
        found = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(FileNotFoundError):
                    lines = Path(f"/proc/{child}/status").read_text().splitlines()
                    found += sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
        return found

    def status(self) -> dict[str, Any]:
        """What the operator is told."""
        return Operator(self.home).get("status")

    def round_seconds(self) -> list[float]:
        """From the opening to the commit of each round, by the server's own clock."""
        path = f"file:{self.home.folder / 'potluck.db'}?mode=ro"
        query = "SELECT closed_ms - opened_ms FROM rounds WHERE state = 'COMMITTED' ORDER BY number"
        with sqlite3.connect(path, uri=True) as db:
            found = [row[0] / 1000 for row in db.execute(query)]
        db.close()
        return found

    def enrol(self, processes: int = 1) -> float:
        """Let all devices in. Returns the seconds it took, without the making of the tokens."""
        counts = [min(1000, self.devices - i) for i in range(0, self.devices, 1000)]
        operator = Operator(self.home)
        invitations = [t for n in counts for t in operator.post("enroll", count=n)["invitations"]]
        tokens = "\n".join(parse_invitation(text).token for text in invitations)
        (self.folder / "tokens").write_text(tokens)
        begin = time.perf_counter()
        self.load("enrol", processes=processes, tokens=str(self.folder / "tokens"))
        return time.perf_counter() - begin

    def load(self, mode: str, **job: Any) -> dict[str, list[Any]]:
        """Have devices do something in processes of their own; what all of them saw."""
        return self.begin(mode, **job)()

    def begin(
        self, mode: str, *, first: int = 0, count: int | None = None, processes: int = 1, **job: Any
    ) -> Any:
        """As `load`, but going on meanwhile: returns a function that waits for the results."""
        count = self.devices - first if count is None else count
        shared = {
            "mode": mode,
            "host": "127.0.0.1",
            "port": self.port,
            "run": "load",
            "run_key": public_key(self.home.run_key("load", is_new=False)).hex(),
            "certificate": self.home.certificate.read_text(),
            "keys": str(self.keys),
            "population": count,
            "update": str(self.update),
        }
        edges = [first + count * i // processes for i in range(processes + 1)]
        running: list[subprocess.Popen[bytes]] = []
        pin = [] if self._core is None else ["taskset", "-c", _others(self._core)]
        for i in range(processes):
            part = shared | {"first": edges[i], "count": edges[i + 1] - edges[i]} | job
            process = subprocess.Popen(
                [*pin, sys.executable, str(HERE / "load.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdin is not None
            process.stdin.write(to_json(part).encode())
            process.stdin.close()
            process.stdin = None
            running.append(process)

        def results() -> dict[str, list[Any]]:
            together: dict[str, list[Any]] = {}
            for process in running:
                out, _ = process.communicate()
                if process.returncode != 0:
                    raise RuntimeError(f"a process of devices failed in mode {mode}")
                for name, values in json.loads(out).items():
                    together.setdefault(name, []).extend(values)
            return together

        return results


def _others(core: int) -> str:
    """All cores but one, as taskset names them; that one, if there is no other."""
    rest = sorted(os.sched_getaffinity(0) - {core}) or [core]
    return ",".join(map(str, rest))


def _keys(folder: Path, count: int) -> Path:
    """A file of at least so many private keys."""
    path = folder / "keys"
    folder.mkdir(parents=True, exist_ok=True)
    have = path.stat().st_size // 32 if path.exists() else 0
    if have < count:
        with path.open("ab") as file:
            file.write(b"".join(new_key() for _ in range(count - have)))
    return path


def _write_data(folder: Path, model_bytes: int) -> tuple[int, str]:
    """Two clients' data, for a model of about so many bytes: its number of weights, and its name.

    It is the 2NN, or logistic regression where that would be too large.
    """
    folder.mkdir()
    rest = 200 + 200 * 200 + 200 + 2 * 200 + 2
    weights = model_bytes // 4
    name = "2nn" if weights >= rest + 200 else "logistic"
    features = (weights - rest) // 200 if name == "2nn" else max((weights - 2) // 2, 1)
    random = np.random.default_rng(1)
    for owner in ("a", "b"):
        inputs = random.random((4, features), np.float32)
        np.savez(folder / f"{owner}.npz", inputs=inputs, targets=np.array([0, 1, 0, 1]))
    return (200 * features + rest if name == "2nn" else 2 * features + 2), name
