"""The process that forks a server and its devices, so that a hundred cost one import of PyTorch.

    python -m potluck.demo.process_host '{"file": …, "overrides": […], "folder": …, "port": 0,
    "remove": …}'

It loads the experiment's data and forks a server that does what `potluck serve` does. For each line
that it reads it forks a device that does what `potluck join` does, with a key, a folder and a
connection of its own. Lines are JSON objects:

    reads   {"device": 3, "address": "https://…", "invitation": "…", "crash": [2, 40]}
    writes  {"is": "served", "device": null, "address": "https://…"}
            {"is": "event", "device": 3, "what": "training", "round": 2, "detail": "", "ms": …}
            {"is": "ended", "device": 3, "code": -9}               null for the server
            {"is": "failed", "error": "…"}                         it cannot go on

A device with `crash` kills itself, as `kill -9` would, in a round of at least that number before a
local step. (Another process cannot tell when it trains.)

When its input ends, also because the command was killed, it ends devices and server. With `remove`
it removes the folder too. Its children end when it is killed itself. The fork server of the
standard library does neither, and shares modules but no data. No threads run in it, so a fork is
safe.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from potluck.config.build import build_data
from potluck.config.experiment import load_experiment
from potluck.config.plan import Plan
from potluck.core import ConfigError, PotluckError, Spec, Update, Vector
from potluck.core.plain_json import to_json
from potluck.data import FederatedData
from potluck.device import Event, TorchTrainer, one_client, run_until_stopped

_DEVICE_SECONDS = 5.0  # to tell the server that they leave
_SERVER_SECONDS = 8.0
_MAX_TEXT = 2000  # a line is written at once, however many write, if it is below PIPE_BUF


class ProcessHost:
    """A server and devices, for as long as the input lasts."""

    def __init__(
        self, *, file: str, overrides: list[str], folder: str, port: int, remove: bool
    ) -> None:
        self._file, self._overrides, self._port, self._remove = file, overrides, port, remove
        self._folder = Path(folder)
        self._children: dict[int, tuple[BaseProcess, int | None]] = {}  # by sentinel

    def run(self) -> int:
        """Forks the server and the requested devices; returns the exit status."""
        torch.set_num_threads(1)
        try:
            data = build_data(load_experiment(self._file, self._overrides))
            (self._folder / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fork(None, self._serve)
            self._follow_input(data)
        except (PotluckError, ValueError, OSError) as error:
            return _fail(error)
        finally:
            self._end_children()
            if self._remove:
                shutil.rmtree(self._folder, ignore_errors=True)
        return 0

    def _follow_input(self, data: FederatedData) -> None:
        """Starts the requested devices and reports the children that have ended, until the input
        ends."""
        with open(0, "rb", buffering=0, closefd=False) as lines:
            while True:
                ready = wait([0, *self._children])
                for sentinel in self._children.keys() & set(ready):
                    process, device = self._children.pop(sentinel)
                    process.join()
                    say({"is": "ended", "device": device, "code": process.exitcode})
                if 0 in ready:
                    if not (line := lines.readline()):
                        return
                    self._start(data, json.loads(line))

    def _start(self, data: FederatedData, asked: dict[str, Any]) -> None:
        if asked["device"] >= data.num_clients:
            raise ConfigError(
                "the experiment must have a client for every device, got "
                f"clients={data.num_clients}. Start {data.num_clients} devices or fewer."
            )
        self._fork(asked["device"], lambda: self._join(data, **asked))

    def _fork(self, device: int | None, work: Callable[[], int]) -> None:
        log = self._folder / "logs" / f"{_name(device)}.log"
        process = mp.get_context("fork").Process(target=_run_child, args=(log, work))
        process.start()
        self._children[process.sentinel] = process, device

    def _serve(self) -> int:
        from potluck.server.http.listening import Listen
        from potluck.server.logs import log_to_stderr
        from potluck.server.open_run import open_server

        log_to_stderr("info")
        listen, home = Listen(port=self._port), self._folder / "server"
        try:
            server = open_server(Path(self._file), self._overrides, home, listen)
        except (PotluckError, ValueError, OSError) as error:
            return _fail(error)
        say({"is": "served", "device": None, "address": server.address})
        server.serve()
        return 0

    def _join(
        self,
        data: FederatedData,
        device: int,
        address: str,
        invitation: str | None,
        crash: tuple[int, int] | None,
    ) -> int:
        def show(event: Event) -> None:
            told = {"what": event.what, "round": event.round, "detail": event.detail[:300]}
            say({"is": "event", "device": device, "ms": time.time_ns() // 10**6} | told)

        trainer = TorchTrainer(lambda _: one_client(data, device))
        is_over = run_until_stopped(
            address,
            invitation,
            self._folder / _name(device),
            trainer if crash is None else CrashingTrainer(trainer, *crash),
            name=_name(device).replace("-", " "),
            show=show,
        )
        return 0 if is_over else 143

    def _end_children(self) -> None:
        """Ends the devices first, which tell the server that they leave, then the server."""
        for is_server, seconds in ((False, _DEVICE_SECONDS), (True, _SERVER_SECONDS)):
            group = [p for p, device in self._children.values() if (device is None) == is_server]
            for process in group:
                process.terminate()
            end = time.monotonic() + seconds
            for process in group:
                process.join(max(end - time.monotonic(), 0))
                process.kill()
                process.join()


class CrashingTrainer:
    """A trainer whose process is killed in a round of at least this number, before a step."""

    def __init__(self, inner: TorchTrainer, round: int, step: int) -> None:
        self._inner, self._round, self._left = inner, round, step
        self.runtime, self.fit, self.evaluate = inner.runtime, inner.fit, inner.evaluate

    def train(
        self,
        plan: Plan,
        spec: Spec,
        received: Vector,
        *,
        round: int,
        check: Callable[[], None],
        **place: int,
    ) -> Update:
        """Trains locally, up to the crash if it is due."""

        def crash_or_check() -> None:
            check()
            self._left -= round >= self._round
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return self._inner.train(plan, spec, received, round=round, check=crash_or_check, **place)


def say(told: dict[str, Any]) -> None:
    """Writes a line; lines of several processes do not mix."""
    os.write(1, to_json(told).encode() + b"\n")


def _fail(error: Exception) -> int:
    with suppress(OSError):  # its reader may be gone
        say({"is": "failed", "error": " ".join(str(error).split())[:_MAX_TEXT]})
    return 1


def _run_child(log: Path, work: Callable[[], int]) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(work())


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _name(device: int | None) -> str:
    return "server" if device is None else f"device-{device}"


if __name__ == "__main__":
    sys.exit(ProcessHost(**json.loads(sys.argv[1])).run())
