"""Devices, each in a thread, that outlive their server: device of client i sends e_i."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from federation import Device, HastyClock, UnitTrainer, offers
from potluck.device.clock import Stopped


class PatientClock(HastyClock):
    """Waits at most a quarter of a second; `skew_ms` is how wrong the machine's clock is."""

    def __init__(self) -> None:
        super().__init__()
        self.skew_ms = 0
        self.now_ms = lambda: self._clock.now_ms() + self.skew_ms

    def wait(self, seconds: float) -> None:
        self._clock.wait(min(seconds, 0.25))


class Balking(UnitTrainer):
    """A trainer that fails while it is told to, and takes its time while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.balks = False
        self.seconds = 0.0

    def fit(self, plan, spec):
        pass

    def train(self, plan, spec, received, *, seed, round, client, check):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            check()
            time.sleep(0.02)
        if self.balks:
            raise RuntimeError("balks")
        return super().train(
            plan, spec, received, seed=seed, round=round, client=client, check=check
        )


class Swarm:
    """Devices in folders of their own; they enrol in order, so device k is client k.

    Every second one uploads its updates, as where a model is large; the others send them inside
    their reports.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.devices: list[Device] = []
        self.trainers: list[Balking] = []

    def join(self, address: str, invitation: str | None, *, wait: bool = True, skew_ms=0) -> Device:
        folder = self.folder / str(len(self.trainers))
        self.trainers.append(Balking())
        clock = PatientClock()
        clock.skew_ms = skew_ms
        mine = offers(int(folder.name))
        device = Device(address, invitation, folder, self.trainers[-1], clock=clock, offers=mine)
        self.devices.append(device)
        if wait:
            until(lambda: (folder / "enrolment.json").exists() or device.died)
        return device

    def again(self, device: Device, address: str, *, skew_ms: int = 0) -> Device:
        """The next life of a device, on its folder; its client and its trainer stay."""
        device.stop()
        clock = PatientClock()
        clock.skew_ms = skew_ms
        number = int(device.folder.name)
        trainer, mine = self.trainers[number], offers(number)
        again = Device(address, None, device.folder, trainer, clock=clock, offers=mine)
        self.devices.append(again)
        return self.devices[-1]

    def owe(self) -> bool:
        """Whether an update is on its way that was not answered for good."""
        return any((d.folder / "outbox/report.json").exists() for d in self.devices)

    def stop(self) -> None:
        for device in self.devices:
            device.clock.stop()
        for device in self.devices:
            device.stop()

    def given_up(self) -> int:
        """Devices that something else ended than `stop`."""
        return sum(not isinstance(device.died, Stopped) for device in self.devices)

    def acknowledged(self) -> dict[str, list[tuple[int, int]]]:
        """For each device's id the (round, attempt) of its reports that were accepted."""
        told: dict[str, list[tuple[int, int]]] = {}
        for device in self.devices:
            told.setdefault(name_of(device.folder), []).extend(accepted(device))
        return told


def accepted(device: Device) -> list[tuple[int, int]]:
    """(round, attempt) of the reports that a device was told are accepted."""
    return [
        (event.round, int(event.detail.split()[-1]) if event.detail else 1)
        for event in device.events
        if event.what == "accepted"
    ]


def name_of(folder: Path) -> str:
    """The id of the device that enrolled from a folder."""
    return json.loads((folder / "enrolment.json").read_text())["device"]


def until(condition: Callable[[], object], seconds: float = 900.0) -> None:
    """Wait for others to get somewhere."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it was waited for in vain"
        threading.Event().wait(0.02)
