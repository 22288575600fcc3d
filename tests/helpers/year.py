"""A run that lives through what a year brings: upgrades, kills, losses, and attackers at work.

The server is a process, which is killed, restored and upgraded. Device i is a thread that sends
e_i, so the model tells who is in it; for the devices of older versions see `old_devices`. What
devices were told is compared with what is stored, and every model with that of an undisturbed run
over the same accepted sets (`proof`).

A year passes in rounds: between two events so many are committed. Nobody does anything by hand but
the events, and these only what docs/operating.md says.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bad_line import BadLine, Weather
from federation import Device
from proof import prove, stored_reports
from serve_process import ServerProcess, experiment
from swarm import Swarm, accepted, name_of, until

ROOT = Path(__file__).parents[2]


class Year:
    """A server, its devices, and what became of them."""

    def __init__(self, folder: Path, *, devices: int, seed: int) -> None:
        self.folder, self.dice, self.counts = folder, random.Random(seed), Counter[str]()
        self.skew = folder / "skew"
        self.skew.write_text("0")
        self.settings = {
            "minimum": 0.5, "goal": round(0.8 * devices), "over_selection": 1.25,
            "selection_seconds": 5.0, "report_seconds": 6.0, "lease_seconds": 6.0,
        }  # fmt: skip
        self.num_devices, self.environment = devices, dict[str, str]()
        self.swarm = Swarm(folder / "devices")
        self.ended: set[Device] = set()
        """Devices that a person ended: revoked, or stopped."""
        self.lost = 0
        """Reports that were acknowledged, and whose bytes an event took away."""
        self.undone = Counter[tuple[str, tuple[int, int]]]()
        """Reports that were acknowledged after the backup that was restored."""
        self.sent: dict[int, tuple[np.ndarray, float]] = {}
        """Vector and weight of the clients that send others than their unit vector, with 1."""
        self.told: dict[str, list[tuple[int, int]]] = {}
        """What devices of no swarm were told is accepted."""
        self.server = self.serve()
        self.line = BadLine(self.server.port, Weather(), seed=seed)

    def serve(self, *options: object) -> ServerProcess:
        """Start the server on its folder; of the version whose source `environment` names."""
        text = experiment(clients=self.num_devices, momentum=0.5, **self.settings)
        port = self.server.port if hasattr(self, "server") else 0
        where = {"skew": self.skew, "options": options, "environment": self.environment}
        server = ServerProcess(self.folder / "server", text, port=port, **where)
        assert server.serves(), server.log()[-3:]
        return server

    def pass_rounds(self, count: int, seconds: float = 600.0) -> None:
        """Wait until so many more rounds are committed; whatever else is on, this must go on."""
        first = self.server.status()["round"]
        until(lambda: self.server.status()["round"] >= first + count, seconds)

    @property
    def at_work(self) -> list[Device]:
        """The devices that are in the run."""
        return [one for one in self.swarm.devices if one not in self.ended]

    def acknowledged(self) -> dict[str, list[tuple[int, int]]]:
        """For each device's id what it was told is accepted, but for what a restore undid."""
        told = {name: list(places) for name, places in self.told.items()}
        for device in self.swarm.devices:
            told.setdefault(name_of(device.folder), []).extend(accepted(device))
        for (name, place), times in self.undone.items():
            for _ in range(times):
                told[name].remove(place)
        return told

    def undo(self, url: str) -> None:
        """Forget what devices were told and this database does not have: it was restored."""
        kept = stored_reports(url)
        told = [(name, place) for name, places in self.acknowledged().items() for place in places]
        self.undone.update(one for one in told if one not in kept)

    def command(self, *words: object) -> None:
        """An operator's command."""
        whole = [sys.executable, "-m", "potluck", *map(str, words)]
        done = subprocess.run(whole, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


Event: TypeAlias = Callable[[Year], None]
Attacker: TypeAlias = Callable[[Year, threading.Event, Counter[str]], None]


class Upgrade(NamedTuple):
    """From an older version, of which server and devices are, over others that the server is of."""

    commits: Sequence[str]
    rounds: int


def live(
    folder: Path,
    *,
    devices: int,
    rounds: int,
    events: Mapping[Event, int],
    attackers: Sequence[Attacker],
    seed: int,
    upgrade: Upgrade | None = None,
) -> dict[str, Any]:
    """A year: every event so many times, in an order that the seed draws."""
    order = [event for event, times in events.items() for _ in range(times)]
    random.Random(seed).shuffle(order)
    olds = [] if upgrade is None else [_source(folder, one) for one in upgrade.commits]
    year = _begun_by(folder, devices, seed, olds[:1])
    stop, threads, found = threading.Event(), [], Counter[str]()
    with year.line:
        try:
            if upgrade is None:
                for _ in range(devices):
                    year.swarm.join(year.line.address, year.server.invite())
            else:
                _upgrade(year, devices, olds, upgrade.rounds)
            for attacker in attackers:
                threads.append(threading.Thread(target=attacker, args=(year, stop, found)))
                threads[-1].start()
            done = year.server.status()["round"]
            for number, event in enumerate(order):
                due = done + (rounds - done) * (number + 1) // (len(order) + 1)
                until(lambda due=due: year.server.status()["round"] >= due, 1800.0)
                print(f"round {due}: {event.__name__}", flush=True)
                event(year)
                year.counts[event.__name__] += 1
                year.pass_rounds(1)
            until(lambda: year.server.status()["round"] >= rounds, 1800.0)
            is_shown = _shows(year)
            stop.set()
            for thread in threads:
                thread.join(120)
            audit = year.server.operator.get("audit")
            _drain(year)
        finally:
            stop.set()
            _stop(year)
            code = year.server.end()
    home, faults = year.server.home, year.server.faults()
    told = year.acknowledged()
    proof = prove(home.database, home.blobs, told, folder / "again", year.sent)
    gone = [d.died for d in year.at_work if type(d.died).__name__ != "Stopped"]
    kept = proof._replace(lost=max(proof.lost - year.lost, 0))
    alive = [thread.name for thread in threads if thread.is_alive()]
    return proof._asdict() | {
        "events": dict(sorted(year.counts.items())),
        "attacks": dict(sorted(found.items())),
        "upgrades": len(olds),
        "reports_whose_bytes_were_taken": year.lost,
        "devices_that_gave_up": [repr(error) for error in gone],
        "faults_logged": faults[:3],
        "audit": audit["broken"],
        "holds": kept.holds
        and not (gone or faults or code or alive or audit["broken"])
        and is_shown
        and proof.committed >= rounds,
    }


def _shows(year: Year) -> bool:
    """Whether the dashboard answers."""
    from attackers import browse

    return browse(year) == 200


def _drain(year: Year) -> None:
    """Begin no further round, and let every device that is in the run hear of its update."""
    year.server.operator.post("pause", reason="the year is over")

    def is_over() -> bool:
        current = year.server.status()["open"]
        owed = [d.folder for d in year.at_work if (d.folder / "outbox/report.json").exists()]
        return not owed and (current is None or current["started_ms"] is None)

    until(is_over)


def _stop(year: Year) -> None:
    for device in year.swarm.devices:
        device.clock.stop()
    for device in year.swarm.devices:
        device.end()


def _begun_by(folder: Path, devices: int, seed: int, sources: Sequence[Path]) -> Year:
    """A year whose server is of an older version, if one is named."""
    if not sources:
        return Year(folder, devices=devices, seed=seed)
    os.environ["PYTHONPATH"], kept = str(sources[0]), os.environ.get("PYTHONPATH", "")
    try:
        return Year(folder, devices=devices, seed=seed)
    finally:
        os.environ["PYTHONPATH"] = kept


def _upgrade(year: Year, devices: int, sources: Sequence[Path], rounds: int) -> None:
    """Old devices under servers newer and newer; the last comes with new devices, whose signatures
    older servers do not know, nor this one theirs."""
    for k in range(devices):
        folder = year.swarm.folder / str(k)
        folder.mkdir(parents=True)
        (folder / "invitation").write_text(year.server.invite())
    words = [sys.executable, "-m", "old_devices", year.line.address, str(year.swarm.folder)]
    paths = f"{sources[0]}:{Path(__file__).parent}"
    with (year.folder / "old_devices.log").open("w") as log:
        old = subprocess.Popen(
            [*words, str(devices)], env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log
        )
    try:
        for source in sources[1:]:
            year.pass_rounds(rounds)
            _serve_by(year, {"PYTHONPATH": str(source)})
        year.pass_rounds(rounds)
    finally:
        old.terminate()
        old.wait(120)
    _serve_by(year, {})
    for k in range(devices):
        told = (year.swarm.folder / str(k) / "events").read_text().split("\n")
        places = [tuple(map(int, line.split()[1:])) for line in told if line.startswith("accepted")]
        year.told[name_of(year.swarm.folder / str(k))] = [(r, a) for r, a in places]
        year.swarm.join(year.line.address, None)


def _serve_by(year: Year, environment: dict[str, str]) -> None:
    assert year.server.end() == 0
    year.environment = environment
    year.server = year.serve()


def _source(folder: Path, commit: str) -> Path:
    """The packages of a commit."""
    place = folder / "versions" / commit
    place.mkdir(parents=True)
    words = ["git", "-C", str(ROOT), "archive", commit, "src"]
    packed = subprocess.run(words, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(place)], input=packed, check=True)
    return place / "src"
