"""A process that forks a server and its devices, so that a hundred cost one import of PyTorch.

    python -m potluck.demo.process_host '{"file": …, "overrides": […], "folder": …, "port": 0,
    "remove": …}'

It imports, loads the experiment's data, and forks: a server that does what `potluck serve` does,
then, for each line that it reads, a device that does what `potluck join` does, with a key, a folder
and a connection of its own. Lines are JSON objects:

    reads   {"device": 3, "invitation": "…", "dies": [2, 40]}     start it; the last two may be null
    writes  {"is": "served", "address": "https://…"}
            {"is": "started", "device": 3, "pid": …}
            {"is": "event", "device": 3, "what": "training", "round": 2, "detail": "", "ms": …}
            {"is": "ended", "device": 3, "code": -9}               null for the server
            {"is": "failed", "error": "…"}                         it cannot go on

A device with `dies` kills itself, as `kill -9` would, in a round of at least that number before a
local step. (From outside nobody could tell when it trains.)

When its input ends, also because its parent was killed, the nursery ends devices and server and, if
it is told so, removes the folder. Children watch a pipe that only the nursery holds open: where it
is killed itself, they end too. Neither Python nor its kernels run threads in it: a fork is safe.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from potluck.config.build import build_data
from potluck.config.experiment import load_experiment
from potluck.config.plan import Plan
from potluck.core import ConfigError, PotluckError, RunError, Spec, Update, Vector
from potluck.core.plain_json import to_json
from potluck.data import FederatedData
from potluck.device import Event, TorchTrainer, one_client, run_until_stopped
from potluck.device.trainer import Sums
from potluck.protocol import Runtime

_DEVICE_SECONDS = 5.0  # to say goodbye
_SERVER_SECONDS = 8.0
_MAX_TEXT = 2000  # a line is written at once, however many write, if it is below PIPE_BUF


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a nursery is for."""

    file: str
    overrides: list[str]
    folder: str
    port: int
    remove: bool
    """Whether the folder is removed at the end."""


class Nursery:
    """A server and devices, for as long as the input lasts."""

    def __init__(self, wanted: Wanted, data: FederatedData) -> None:
        self._wanted = wanted
        self._data = data
        self._folder = Path(wanted.folder)
        self._children: dict[int, int | None] = {}  # pid: device, or None for the server
        self._alive, self._lives = os.pipe()
        self._address = ""

    def serve(self) -> None:
        """Fork the server, and wait until it listens.

        Raises:
            RunError: it does not.
        """
        told, tell = os.pipe()
        self._fork(None, lambda: self._be_server(tell))
        os.close(tell)
        with os.fdopen(told) as pipe:
            self._address, _, fault = pipe.readline().strip().partition(" ")
        if fault or not self._address:
            lines = self._log("server").read_text().splitlines() or ["no word of it"]
            raise RunError(fault or f"the server must start, got {lines[-1]}. Try again.")
        say({"is": "served", "address": self._address})

    def tend(self) -> None:
        """Start devices as asked, and tell which children have ended, until the input ends."""
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _be_woken)
        pending = b""
        with selectors.DefaultSelector() as selector:
            for source in (0, woken):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if woken in ready:
                    os.read(woken, 4096)
                    self._reap()
                if 0 in ready:
                    content = os.read(0, 65_536)
                    if not content:
                        return
                    *lines, pending = (pending + content).split(b"\n")
                    for line in lines:
                        self._start(json.loads(line))

    def close(self) -> None:
        """End everything: first the devices, which say goodbye, then the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with suppress(OSError):
            self._reap()
        devices = [pid for pid, device in self._children.items() if device is not None]
        self._end(devices, _DEVICE_SECONDS)
        self._end(list(self._children), _SERVER_SECONDS)

    def _start(self, asked: dict[str, Any]) -> None:
        device, clients = int(asked["device"]), self._data.num_clients
        if device >= clients:
            raise ConfigError(
                f"the experiment must have a client for every device, got clients={clients}. "
                f"Start {clients} devices or fewer."
            )
        pid = self._fork(device, lambda: self._be_device(device, asked))
        say({"is": "started", "device": device, "pid": pid})

    def _fork(self, device: int | None, live: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            _be_born(self._alive, self._lives, self._log(_name(device)), live)
        self._children[pid] = device
        return pid

    def _be_server(self, tell: int) -> int:
        from potluck.cli.serve import open_server
        from potluck.server.http.listening import Listen
        from potluck.server.logs import log_to_stderr

        log_to_stderr("info")
        wanted, home = self._wanted, self._folder / "server"
        try:
            listen = Listen(port=wanted.port)
            server = open_server(Path(wanted.file), wanted.overrides, home, listen)
        except (PotluckError, ValueError, OSError) as error:
            os.write(tell, f"! {' '.join(str(error).split())}\n".encode())
            return 1
        os.write(tell, f"{server.address}\n".encode())
        os.close(tell)
        server.serve()
        return 0

    def _be_device(self, device: int, asked: dict[str, Any]) -> int:
        def show(event: Event) -> None:
            told = {"what": event.what, "round": event.round, "detail": event.detail[:300]}
            say({"is": "event", "device": device, "ms": time.time_ns() // 10**6} | told)

        trainer = TorchTrainer(lambda _: one_client(self._data, device), 1)
        dies: tuple[int, int] | None = asked["dies"]
        whole = run_until_stopped(
            self._address,
            asked["invitation"],
            self._folder / _name(device),
            trainer if dies is None else Mortal(trainer, *dies),
            name=f"device {device}",
            show=show,
        )
        return 0 if whole else 143

    def _log(self, name: str) -> Path:
        folder = self._folder / "logs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            device = self._children.pop(pid)
            say({"is": "ended", "device": device, "code": os.waitstatus_to_exitcode(status)})

    def _end(self, pids: list[int], seconds: float) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)  # not reaped yet, so the number is still its own
        end = time.monotonic() + seconds
        while pids:
            pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
            if pids and time.monotonic() > end:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._children = {p: d for p, d in self._children.items() if d is None}


class Mortal:
    """A trainer whose process is killed in a round of at least this number, before a step."""

    def __init__(self, inner: TorchTrainer, round: int, step: int) -> None:
        self._inner, self._round, self._left = inner, round, step
        self.runtime: Callable[[], Runtime] = inner.runtime
        self.fit: Callable[..., int | None] = inner.fit
        self.evaluate: Callable[..., Sums] = inner.evaluate

    def train(
        self,
        plan: Plan,
        spec: Spec,
        received: Vector,
        *,
        seed: int,
        round: int,
        client: int,
        check: Callable[[], None],
    ) -> Update:
        """Local training, or the beginning of it."""

        def mortal() -> None:
            check()
            self._left -= round >= self._round
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        place = {"seed": seed, "round": round, "client": client}
        return self._inner.train(plan, spec, received, check=mortal, **place)


def say(told: dict[str, Any]) -> None:
    """Write a line; lines of several processes do not mix."""
    os.write(1, to_json(told).encode() + b"\n")


def main(wanted: Wanted) -> int:
    """The life of a nursery; its exit status."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(wanted.folder)
    try:
        data = build_data(load_experiment(wanted.file, wanted.overrides))
        nursery = Nursery(wanted, data)
        try:
            nursery.serve()
            nursery.tend()
        finally:
            nursery.close()
    except (PotluckError, ValueError, OSError) as error:
        with suppress(OSError):
            say({"is": "failed", "error": " ".join(str(error).split())[:_MAX_TEXT]})
        return 1
    finally:
        if wanted.remove:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _be_born(alive: int, lives: int, log: Path, live: Callable[[], int]) -> NoReturn:
    """A child's whole life: it never returns to what its parent was doing."""
    code = 1
    try:
        os.close(lives)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        nothing, err = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | _APPEND, 0o600)
        os.dup2(nothing, 0)
        os.dup2(err, 2)
        threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
        code = live()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(code)


_APPEND = os.O_CREAT | os.O_APPEND


def _be_woken(number: int, frame: object) -> None:
    """The pipe of `set_wakeup_fd` says it."""


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # ends when nobody holds the other end
    os._exit(1)


def _name(device: int | None) -> str:
    return "server" if device is None else f"device-{device}"


if __name__ == "__main__":
    sys.exit(main(Wanted(**json.loads(sys.argv[1]))))
