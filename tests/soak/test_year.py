"""A year of a server in an hour, with all that happens in it. `make soak`, or one: -k year."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from record import record

from attackers import ATTACKERS
from fleet import fingerprint
from potluck.protocol import STATUS, Accepted, Assignment, Error
from remote import Caller, Served
from swarm import name_of, until
from year import Upgrade, Year, live

pytestmark = pytest.mark.soak
SEED = int(os.environ.get("POTLUCK_SEED", "20261201"))
ROUNDS = int(os.environ.get("POTLUCK_YEAR_ROUNDS", "300"))
MUST = (
    "50 devices, 300 rounds: every event of an operator's year several times, two upgrades, two "
    "restores, lost updates and models, and attackers of each kind at work: 0 double, 0 foreign, "
    "none lost but those whose bytes were taken away, every model that of its accepted sets, no "
    "device gives up, no fault logged, the dashboard answers"
)
VERSIONS = ("e19dde6", "b984864")
"""The commits that the run is begun with and is first upgraded to."""


def kill(year: Year) -> None:
    """kill -9 of the server at any moment."""
    time.sleep(year.dice.uniform(0.0, 2.0))
    year.server.kill()
    year.server = year.serve()


def revoke(year: Year) -> None:
    """A device is thrown out, and another comes."""
    device = year.dice.choice(year.at_work)
    year.ended.add(device)
    year.server.operator.post("revoke", device=name_of(device.folder))
    year.pass_rounds(1)  # it is refused and ends, or its owner stops it
    device.clock.stop()
    device.end()
    year.swarm.join(year.line.address, year.server.invite())


def pause(year: Year) -> None:
    """An operator pauses the run, and resumes it."""
    year.server.operator.post("pause", reason="for a while")
    time.sleep(year.dice.uniform(0.0, 2.0))
    year.server.operator.post("resume")


def restart_devices(year: Year) -> None:
    """A fifth of the devices is switched off and on again."""
    for device in year.dice.sample(year.at_work, len(year.at_work) // 5):
        year.ended.add(device)
        year.swarm.again(device, year.line.address)


def wrong_certificate(year: Year) -> None:
    """For some seconds another server answers in the place of ours: a captive portal."""
    with _other_server(year.folder / f"portal{year.counts['wrong_certificate']}") as port:
        year.line.lead_to(port)
        time.sleep(15.0)
        year.line.lead_to(year.server.port)


@contextlib.contextmanager
def _other_server(folder: Path):
    folder.mkdir()
    with Served(folder, name="portal") as served:
        yield served.port


def clock_ahead(year: Year) -> None:
    """The server's clock is a year ahead for a while, over restarts, and then right again."""
    for seconds in (365 * 86_400, 0):
        year.skew.write_text(str(seconds))
        year.server.kill()
        year.server = year.serve()
        year.pass_rounds(2)


def lose_an_update(year: Year) -> None:
    """The bytes of an update that was accepted are gone before its round is committed."""
    slow = year.dice.sample(year.swarm.trainers, len(year.swarm.trainers) // 2)
    for trainer in slow:
        trainer.seconds = 3.0
    folder, end = Path(year.server.home.blobs) / "reports", time.monotonic() + 60
    while time.monotonic() < end:
        current = year.server.status()["open"] or {}
        found = [path for path in (folder / str(current.get("id"))).glob("*") if path.is_file()]
        if found:
            with contextlib.suppress(FileNotFoundError):
                found[0].unlink()
                year.lost += 1
                break
        time.sleep(0.05)
    for trainer in slow:
        trainer.seconds = 0.0


def overlap(year: Year) -> None:
    """A device sends the last chunk of an update twice at the same time."""
    callers = [Caller(year.line.address, year.server.certificate) for _ in range(2)]
    callers[0].enrol(year.server.invite())
    callers[1].key, callers[1].id = callers[0].key, callers[0].id
    while not isinstance(given := callers[0].check_in(), Assignment):
        time.sleep(0.2)
    body = fingerprint(given.client, 650).astype("<f4").tobytes()
    upload = callers[0].report(given, body).upload
    callers[1].sequence = callers[0].sequence + 1  # of the two, either may come first
    callers[1].invitation = callers[0].invitation
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda one: one.put(upload, 0, body), callers))
    for one in callers:
        one.close()
    codes = [answer.code for answer in answers if isinstance(answer, Error)]
    assert all(STATUS[code] < 500 for code in codes), codes
    if any(isinstance(answer, Accepted) for answer in answers):
        year.told[callers[0].id] = [(given.round, given.attempt)]


def restore(year: Year) -> None:
    """The server's folder is lost, and comes back from a backup that is some rounds old."""
    home, backup = year.server.home.folder, year.folder / "backup"
    year.command("backup", backup, "--home", home)
    year.pass_rounds(3)
    year.server.kill()
    home.rename(home.with_name(f"lost{year.counts['restore']}"))
    year.command("restore", backup, "--home", home)
    year.undo(year.server.home.database)
    year.server = year.serve("--restored")


def change_deadlines(year: Year) -> None:
    """An operator gives rounds more time, and then less."""
    for seconds in (60, year.settings["report_seconds"]):
        year.command("set", f"report_seconds={seconds}", "--home", year.server.home.folder)
        year.pass_rounds(1)


def abandon(year: Year) -> None:
    """An operator ends an attempt that goes on well."""
    until(lambda: (year.server.status()["open"] or {}).get("started_ms"))
    with contextlib.suppress(AssertionError):  # it was over first
        year.command("abandon", "--home", year.server.home.folder)


def lose_the_model(year: Year) -> None:
    """The newest optimizer state is gone; the operator goes on with the newest model before it."""
    folder = Path(year.server.home.blobs) / "optimizers"
    year.server.operator.post("pause", reason="the disk is looked at")
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[-2:]:
        path.unlink()
    year.server.kill()
    year.server = year.serve()
    year.command("fall-back", "--home", year.server.home.folder)
    year.command("resume", "--home", year.server.home.folder)


EVENTS = {kill: 5, overlap: 3, revoke: 3, pause: 3, restart_devices: 4, restore: 2}
EVENTS |= {change_deadlines: 2, clock_ahead: 2, wrong_certificate: 2}
EVENTS |= {abandon: 3, lose_an_update: 3, lose_the_model: 2}
"""What happens, and how often. What is mended is added here with the commit that mends it."""


@pytest.fixture
def folder():
    """In memory, if there is any: what happens does not depend on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def test_a_year_in_an_hour(folder):
    names = os.environ.get("POTLUCK_YEAR_EVENTS", "").split()
    chosen = {e: n for e, n in EVENTS.items() if e.__name__ in names} or EVENTS
    attackers = [] if os.environ.get("POTLUCK_YEAR_PEACE") else ATTACKERS
    versions = os.environ.get("POTLUCK_YEAR_VERSIONS", " ".join(VERSIONS)).split()
    started = time.monotonic()
    found = live(
        folder,
        devices=int(os.environ.get("POTLUCK_YEAR_DEVICES", "50")),
        rounds=ROUNDS,
        events=chosen,
        attackers=attackers,
        seed=SEED,
        upgrade=Upgrade(versions, max(ROUNDS // 30, 2)) if versions else None,
    )
    holds = found.pop("holds")
    found |= {"seed": SEED, "rounds": ROUNDS, "seconds": round(time.monotonic() - started)}
    print(found)
    if not names:
        record("year", MUST, found, passed=holds)
    assert holds, found
