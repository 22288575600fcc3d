"""A whole federation on this machine: a server process and device processes, on loopback, with TLS.

    with LocalFederation(file, folder) as federation:
        for device in range(10):
            federation.start(device, invited=True)
        while ...:
            for news in federation.news(0.2): ...
            federation.operator.get("status")

The processes are those of `potluck serve` and `potluck join`, forked by one that has imported what
they need (`potluck.demo.process_host`). They end with the block, and when this process is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from potluck.core import ConfigError, RunError
from potluck.core.plain_json import to_json
from potluck.device import LinuxSensor
from potluck.server.admin.client import Operator
from potluck.server.storage.state_folder import Home

DEVICE_BYTES = 25_000_000
"""What each device process adds to what it shares with the others, beside its data."""
BASE_BYTES = 600_000_000
"""What the nursery and the server need together."""
DEVICES_PER_CORE = 100

_START_SECONDS = 120.0
_CLOSE_SECONDS = 30.0


class LocalFederation:
    """A server and its devices, with the lifetime of a block.

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
        wanted = {
            "file": str(file.resolve()),
            "overrides": list(overrides),
            "folder": str(folder.resolve()),
            "port": port,
            "remove": remove,
        }
        self.folder = folder
        self.operator = Operator(Home(folder / "server"))
        self.pids: dict[int, int] = {}
        """Of the devices that run."""
        self._command = [sys.executable, "-m", "potluck.demo.process_host", to_json(wanted)]
        self._pending = b""
        self._held: list[dict[str, Any]] = []  # news that nobody has asked for yet

    def __enter__(self) -> LocalFederation:
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._nursery = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | single,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        try:
            self.address: str = self._await("served", None)["address"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self, device: int, *, invited: bool = False, dies: tuple[int, int] | None = None
    ) -> None:
        """Start a device, for the first time or again.

        Args:
            invited: it gets an invitation, and this waits until it is enrolled: devices that are
                started one after the other are the clients 0, 1, … of the experiment.
            dies: (round, steps): it is killed in a round of at least this number, after so many
                local steps.
        """
        invitation = self.operator.post("enroll")["invitations"][0] if invited else None
        self._tell({"device": device, "invitation": invitation, "dies": dies})
        self._await("started", device)
        if invited:
            self._await("event", device)  # the first is that it is enrolled

    def news(self, seconds: float) -> list[dict[str, Any]]:
        """What has happened since the last call; wait at most so long for the first of it.

        Raises:
            RunError: the nursery failed, or the server ended.
        """
        if not self._held:
            self._read(seconds)
        held, self._held = self._held, []
        return held

    def close(self) -> None:
        """End all processes, and wait until they have ended."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        end = time.monotonic() + _CLOSE_SECONDS
        while self._nursery.poll() is None and time.monotonic() < end:
            with selectors.DefaultSelector() as selector:
                selector.register(self._nursery.stdout, selectors.EVENT_READ)
                if selector.select(0.2) and not os.read(self._nursery.stdout.fileno(), 65_536):
                    break
        try:
            self._nursery.wait(max(end - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            self._nursery.kill()  # its children see that
            self._nursery.wait()
        self._nursery.stdout.close()

    def _tell(self, asked: dict[str, Any]) -> None:
        assert self._nursery.stdin is not None
        try:
            self._nursery.stdin.write(to_json(asked).encode() + b"\n")
            self._nursery.stdin.flush()
        except BrokenPipeError:
            raise RunError("the processes were ended from outside. Start again.") from None

    def _await(self, kind: str, device: int | None) -> dict[str, Any]:
        """The first news of this kind; all before it are held."""
        end = time.monotonic() + _START_SECONDS
        while True:
            held, self._held = self._held, []
            for number, told in enumerate(held):
                if told["is"] == kind and told.get("device") == device:
                    self._held = held[:number] + held[number + 1 :]
                    return told
                if told["is"] == "ended" and told["device"] == device:
                    raise RunError(
                        f"device {device} must start, got its end with code={told['code']}; "
                        f"see {self.folder / 'logs'}."
                    )
            self._held = held
            if time.monotonic() > end:
                raise RunError(
                    f"the processes must start within {_START_SECONDS:.0f} s, got no word of "
                    f"{kind} from {device}. Use fewer devices on this machine."
                )
            self._read(0.5)

    def _read(self, seconds: float) -> None:
        assert self._nursery.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._nursery.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return
        content = os.read(self._nursery.stdout.fileno(), 65_536)
        if not content:
            raise RunError("the processes were ended from outside. Start again.")
        *lines, self._pending = (self._pending + content).split(b"\n")
        for line in lines:
            self._note(json.loads(line))

    def _note(self, told: dict[str, Any]) -> None:
        match told:
            case {"is": "failed", "error": str(error)}:
                raise RunError(error)
            case {"is": "ended", "device": None, "code": code}:
                raise RunError(f"the server must not end, got its end with code={code}.")
            case {"is": "started", "device": int(device), "pid": int(pid)}:
                self.pids[device] = pid
            case {"is": "ended", "device": int(device)}:
                self.pids.pop(device, None)
            case _:
                pass
        self._held.append(told)


def check_room(devices: int, cores: int, free_bytes: int | None = None) -> None:
    """Refuse more devices than this machine has cores and memory for.

    Args:
        free_bytes: None: as the system tells; where it does not, memory is not looked at.

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
