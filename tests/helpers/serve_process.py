"""`potluck serve` as a process of its own, which may be killed and started again on its folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from potluck.server.admin.client import Operator
from potluck.server.storage.state_folder import StateFolder

MOMENTUM = '[algorithm.server]\nname = "momentum"\nmomentum = {}\n'
_SKEWED = Path(__file__).with_name("skewed.py")


def experiment(
    *,
    clients: int,
    rounds: int = 100_000,
    model: str = "logistic",
    momentum: float | None = None,
    **server,
) -> str:
    """The TOML of an experiment on digits; `server` is its section of that name."""
    optimizer = "" if momentum is None else MOMENTUM.format(momentum)
    values = {"goal": clients, "over_selection": 1.0, "population": clients, "pace_seconds": 0.1}
    values |= {"attempts": 100_000, "long_poll_seconds": 2.0} | server
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return f"""name = "served"
[task]
data = "digits"
model = "{model}"
[partition]
kind = "iid"
clients = {clients}
[algorithm]
client_lr = 0.1
{optimizer}[run]
rounds = {rounds}
cohort = {clients}
evaluate_every = 100000
[server]
""" + "\n".join(lines)


_ORPHANED = re.compile(
    r"Traceback \(most recent call last\):\n(?:  .*\n)*.*spawn_main(?:\n  .*)*\n"
    r"EOFError: Ran out .*\n"
)
"""What the evaluating process says whose server was killed while it started it."""


class ServerProcess:
    """A life of a server. `text` is the experiment; `skew` a file with its clock's error in s;
    `limit` what `ulimit` is told before the start."""

    def __init__(
        self,
        folder: Path,
        text: str,
        *,
        home: Path | None = None,
        port: int = 0,
        fault: str = "",
        skew: Path | None = None,
        options: tuple[object, ...] = (),
        environment: Mapping[str, str] | None = None,
        limit: str = "",
    ) -> None:
        self.folder, self.home = folder, StateFolder(home or folder / "home")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "experiment.toml"
        file.write_text(text)
        program = ["-m", "potluck"] if skew is None else [_SKEWED, skew]
        words = [sys.executable, *program, "serve", file, "--home", self.home.folder]
        words += ["--port", port, *options]
        if limit:
            words = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *words]
        variables = os.environ | {"POTLUCK_FAULT": fault} | dict(environment or {})
        self.started = time.monotonic()
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*map(str, words)], stdout=subprocess.PIPE, stderr=log, text=True, env=variables
            )
        self.told: dict[str, str] = {}
        self.serving_seconds = self.serving_cpu_seconds = 0.0

    def serves(self, seconds: float = 120.0) -> bool:
        """Wait until it answers over HTTPS; False if it dies first."""
        stdout = self.process.stdout
        assert stdout is not None
        while "admin" not in self.told:
            name, _, value = stdout.readline().partition(" ")
            if not name:
                self.ended()
                return False
            self.told[name] = value.strip()
        self.port = int(self.address.rsplit(":", 1)[1])
        context = ssl.create_default_context()
        if self.address.startswith("https"):
            context.load_verify_locations(cadata=self.certificate)
        context.check_hostname = False
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{self.address}/health", verify=context, timeout=5.0)
                if answer.status_code == 200:
                    self.serving_seconds = time.monotonic() - self.started
                    with contextlib.suppress(psutil.Error):
                        times = psutil.Process(self.process.pid).cpu_times()
                        self.serving_cpu_seconds = times.user + times.system
                    return True
            assert time.monotonic() < end, self.log()[-3:]
            time.sleep(0.02)
        self.ended()
        return False

    @property
    def address(self) -> str:
        return self.told["address"]

    @property
    def certificate(self) -> str:
        return self.home.certificate.read_text()

    @property
    def operator(self) -> Operator:
        return Operator(self.home)

    def invite(self) -> str:
        return self.operator.post("enroll")["invitations"][0]

    def status(self) -> dict:
        return self.operator.get("status")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.ended()

    def ended(self, seconds: float = 120.0) -> int:
        """Wait for its end. Returns how it ended: −9 killed."""
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def end(self) -> int:
        """Ask it to stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def log(self) -> list[dict]:
        """What all lives on this folder logged; a killed one may leave half a line."""
        told = []
        for line in (self.folder / "log").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                told.append(json.loads(line))
        return told

    def faults(self) -> list[dict]:
        """What was logged with a traceback: nothing that was expected."""
        raw = _ORPHANED.sub("", (self.folder / "log").read_text())
        bare = [{"event": raw[-2000:]}] if "\nTraceback (most recent" in raw else []
        return bare + [line for line in self.log() if "trace" in line]

    def metric(self, name: str) -> float:
        """The sum of a counter's samples whose line begins so."""
        lines = self.operator.text("metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
