"""A device as a process of its own, without PyTorch, which may be killed at any moment.

python device_process.py URL FOLDER SECONDS [INVITATION]      SECONDS: how long it trains

It sends e_i, the unit vector of its client's index, with weight 1. What happens is appended to
FOLDER/events, which survives it: `accepted ROUND ATTEMPT`, `training ROUND`; and `started` before
each life. While there is a FOLDER/held it has loaded all it needs, and does not begin.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from potluck.core import Update
from potluck.device import SystemClock, join
from potluck.protocol import Runtime


class BriskClock(SystemClock):
    """Waits at most a quarter of a second between check-ins."""

    def wait(self, seconds: float) -> None:
        super().wait(min(seconds, 0.25))


class SlowUnit:
    """The unit vector of the client's index, after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def runtime(self) -> Runtime:
        return Runtime(name="unit", version="1")

    def fit(self, plan, spec):
        pass

    def train(self, plan, spec, received, *, seed, round, client, check) -> Update:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            check()
            time.sleep(0.02)
        delta = np.zeros(spec.dim, np.float32)
        delta[client] = 1.0
        return Update(delta, 1.0, 0.5, 1)

    def evaluate(self, plan, spec, weights, *, check):
        return {"loss": (float(weights.sum()), 1)}


class DeviceProcess:
    """Lives of one device on one folder, seen from outside."""

    def __init__(self, folder: Path, address: str, *, seconds: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._words = [sys.executable, __file__, address, str(folder), str(seconds)]
        self._log, self._events, self._held = folder / "log", folder / "events", folder / "held"

    def start(self, invitation: str = "", *, held: bool = False) -> None:
        if held:
            self._held.touch()
        with self._events.open("a") as events:
            events.write("started 0 1\n")  # what the life before was in the middle of is over
        with self._log.open("a") as log:
            words = [*self._words, *([invitation] if invitation else [])]
            self.process = subprocess.Popen(words, stdout=log, stderr=log)

    def release(self) -> None:
        """Let one that was started and held begin."""
        self._held.unlink()

    @property
    def is_enrolled(self) -> bool:
        return (self.folder / "enrolment.json").exists()

    @property
    def owes(self) -> bool:
        return (self.folder / "outbox" / "report.json").exists()

    def events(self) -> list[list[str]]:
        return [line.split() for line in self._events.read_text().splitlines()]

    @property
    def phase(self) -> str:
        """What it is in the middle of: training, sending, or something else."""
        match self.events()[-1][0]:
            case "training":
                return "training"
            case "trained" if self.owes:
                return "sending"
        return ""

    def kill_in(self, phase: str) -> bool:
        """kill -9, if it is in this phase; it is held still while that is looked at."""
        self.process.send_signal(signal.SIGSTOP)
        if self.phase != phase:
            self.process.send_signal(signal.SIGCONT)
            return False
        self.kill()
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def accepted(self) -> list[tuple[int, int]]:
        """(round, attempt) of the reports that it was told are accepted, in all lives."""
        told = [event for event in self.events() if event[0] == "accepted"]
        return sorted({(int(event[1]), int(event[2])) for event in told})


def main(url: str, folder: str, seconds: str, invitation: str = "") -> None:
    trainer = SlowUnit(float(seconds))
    while (Path(folder) / "held").exists():
        time.sleep(0.02)
    with (Path(folder) / "events").open("a") as events:
        for event in join(url, invitation or None, folder, trainer, clock=BriskClock()):
            attempt = event.detail.split()[-1] if event.what == "accepted" and event.detail else 1
            words = (event.what, event.round, attempt)
            events.write(" ".join(map(str, words)) + "\n")
            events.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
