"""A whole federation on this machine: a server process and device processes, on loopback, with TLS.

    with LocalFederation(file, folder) as federation:
        for device in range(10):
            federation.start(device, invited=True)
        while federation.running:
            for news in federation.news(0.2): ...
            federation.operator.get("status")

The processes are those of `potluck serve` and `potluck join`, forked by one that has imported what
they need (`potluck.demo.process_host`). They end with the block, and when this process is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from potluck.core import ConfigError, RunError
from potluck.core.plain_json import to_json
from potluck.device import LinuxSensor
from potluck.server.admin.client import Operator
from potluck.server.storage.state_folder import StateFolder

DEVICE_BYTES = 25_000_000
"""The memory of each device process beyond what it shares with the others, beside its data."""
BASE_BYTES = 600_000_000
"""The memory of the process host and the server together."""
DEVICES_PER_CORE = 100

_START_SECONDS = 120.0
_CLOSE_SECONDS = 30.0


class LocalFederation:
    """A server and its devices, which run as long as a `with` block.

    Args:
        file: the experiment.
        folder: where all state goes: `server`, `device-0`, …, `logs`.
        overrides: of the experiment, as for `potluck serve --set`.
        port: of the server; 0: any that is free.
        remove: remove the folder at the end, however this process ends.
    """

    def __init__(
        self,
        file: Path,
        folder: Path,
        *,
        overrides: Sequence[str] = (),
        port: int = 0,
        remove: bool = False,
    ) -> None:
        self.folder = folder
        self.operator = Operator(StateFolder(folder / "server"))
        self.running: set[int] = set()
        """The devices that run."""
        self._incoming: Queue[dict[str, Any]] = Queue()
        self._held: list[dict[str, Any]] = []  # news not yet returned by `news`
        wanted = {"file": str(file.resolve()), "overrides": list(overrides), "port": port}
        wanted |= {"folder": str(folder.resolve()), "remove": remove}
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._host = subprocess.Popen(
            [sys.executable, "-m", "potluck.demo.process_host", to_json(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | single,
            start_new_session=True,  # this process handles Ctrl-C, and then ends it
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.address: str = self._await("served", None)["address"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(
        self, device: int, *, invited: bool = False, crash: tuple[int, int] | None = None
    ) -> None:
        """Starts a device, for the first time or again.

        Args:
            invited: it gets an invitation, and this waits until it is enrolled: devices that are
                started one after the other are the clients 0, 1, … of the experiment.
            crash: (round, steps): it is killed in a round of at least this number, after so many
                local steps.
        """
        assert self._host.stdin is not None
        invitation = self.operator.post("enroll")["invitations"][0] if invited else None
        asked = {"device": device, "address": self.address, "invitation": invitation}
        with suppress(BrokenPipeError):  # `news` reports it
            self._host.stdin.write(to_json(asked | {"crash": crash}).encode() + b"\n")
            self._host.stdin.flush()
        self.running.add(device)
        if invited:
            self._await("event", device)  # the first is that it is enrolled

    def news(self, seconds: float) -> list[dict[str, Any]]:
        """Returns the events since the last call; waits at most so long for the first.

        Raises:
            RunError: the processes cannot go on, or the server ended.
        """
        if not self._held:
            self._take(seconds)
        while not self._incoming.empty():
            self._take(0)
        held, self._held = self._held, []
        return held

    def close(self) -> None:
        """Ends all processes, and waits until they have ended."""
        assert self._host.stdin is not None
        with suppress(BrokenPipeError):
            self._host.stdin.close()
        try:
            self._host.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._host.kill()  # its children see that
            self._host.wait()
        self._reader.join(_CLOSE_SECONDS)

    def _read(self) -> None:
        """Queues the lines of the process host, until all processes have ended."""
        assert self._host.stdout is not None
        with self._host.stdout as lines:
            for line in lines:
                self._incoming.put(json.loads(line))
        fault = "the processes were ended from outside. Start again."
        self._incoming.put({"is": "failed", "error": fault})

    def _await(self, kind: str, device: int | None) -> dict[str, Any]:
        """Takes news until there is one of this kind and returns it; `news` gives it too."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            for told in self._take(0.5):
                if told["device"] == device and told["is"] == kind:
                    return told
                if told["device"] == device and told["is"] == "ended":
                    raise RunError(
                        f"device {device} must start, got its end with code={told['code']}; "
                        f"see {self.folder / 'logs'}."
                    )
        raise RunError(
            f"the processes must start within {_START_SECONDS:.0f} s, got no word of {kind} from "
            f"{device}. Use fewer devices on this machine."
        )

    def _take(self, seconds: float) -> list[dict[str, Any]]:
        """Holds the next news, if one comes in time, and returns it."""
        try:
            told = self._incoming.get(timeout=seconds)
        except Empty:
            return []
        match told:
            case {"is": "failed", "error": str(error)}:
                raise RunError(error)
            case {"is": "ended", "device": None, "code": code}:
                log = (self.folder / "logs" / "server.log").read_text().splitlines()
                raise RunError(
                    f"the server must not end, got its end with code={code} "
                    f"({log[-1] if log else 'no word of it'}). Start again."
                )
            case {"is": "ended", "device": int(device)}:
                self.running.discard(device)
            case _:
                pass
        self._held.append(told)
        return [told]


def check_room(devices: int, cores: int, free_bytes: int | None = None) -> None:
    """Refuses more devices than this machine has cores and memory for.

    Args:
        free_bytes: None: as the system tells; where it gives none, memory is not checked.

    Raises:
        ConfigError: with the number that would do.
    """
    if devices > cores * DEVICES_PER_CORE:
        raise ConfigError(
            f"at most {DEVICES_PER_CORE} devices can share a core, got devices={devices} on "
            f"cores={cores}. Give --devices {cores * DEVICES_PER_CORE} or fewer."
        )
    free = LinuxSensor().free_memory_bytes() if free_bytes is None else free_bytes
    needed = BASE_BYTES + devices * DEVICE_BYTES
    if free is not None and needed > free:
        room = max((free - BASE_BYTES) // DEVICE_BYTES, 0)
        raise ConfigError(
            f"{devices} devices need about {needed / 1e9:.1f} GB of memory, got "
            f"{free / 1e9:.1f} GB free. Give --devices {room} or fewer."
        )
