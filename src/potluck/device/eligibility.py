"""The condition of a device on Linux: charging, idle, and on a network that costs nothing.

An unknown part is None, and left out of the check-in. For another system pass a function of your
own: a `Sensor` is anything that returns an `Eligibility`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from potluck.protocol import Eligibility

Sensor: TypeAlias = Callable[[], Eligibility]

IDLE_LOAD = 0.5
"""A device is idle while fewer processes than this are runnable for each of its processors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxSensor:
    """Reads /sys and /proc, and asks NetworkManager where there is one.

    Args:
        root: of the file system, for tests.
        network_manager: the command `nmcli`; None: nothing is known about the network.
    """

    root: Path = Path("/")
    network_manager: str | None = shutil.which("nmcli")

    def __call__(self) -> Eligibility:
        return Eligibility(
            charging=self.charging(),
            idle=self.idle(),
            unmetered=self.unmetered(),
            free_memory_bytes=self.free_memory_bytes(),
        )

    def charging(self) -> bool | None:
        """Returns whether the device is on mains, or charges a battery. Without a battery it is on
        mains."""
        folder = self.root / "sys/class/power_supply"
        if not folder.is_dir():
            return None
        supplies = [(_word(path / "type"), path) for path in sorted(folder.iterdir())]
        if any(kind in ("Mains", "USB") and _word(p / "online") == "1" for kind, p in supplies):
            return True
        # The batteries of mice and the like say that they are a device's, not the system's.
        batteries = [
            _word(path / "status")
            for kind, path in supplies
            if kind == "Battery" and _word(path / "scope") != "Device"
        ]
        return all(status in ("Charging", "Full", "Not charging") for status in batteries)

    def idle(self) -> bool | None:
        """Returns whether there was little load over the last minute."""
        load = _word(self.root / "proc/loadavg")
        try:
            return float(load.split()[0]) < IDLE_LOAD * (os.cpu_count() or 1)
        except (ValueError, IndexError):
            return None

    def unmetered(self) -> bool | None:
        """Returns whether no network in use is said, or guessed, to be metered."""
        if self.network_manager is None:
            return None
        command = [self.network_manager, "-g", "GENERAL.STATE,GENERAL.METERED", "device", "show"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        lines = [line for line in done.stdout.splitlines() if line]
        connected = [
            metered
            for state, metered in zip(lines[::2], lines[1::2], strict=False)
            if state.startswith("100 ")
        ]
        known = [metered for metered in connected if metered.startswith(("yes", "no"))]
        return None if not known else not any(metered.startswith("yes") for metered in known)

    def free_memory_bytes(self) -> int | None:
        """Returns the memory that is available without swapping."""
        for line in _word(self.root / "proc/meminfo").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
        return None


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
