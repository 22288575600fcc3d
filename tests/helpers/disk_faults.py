"""R8: a served run whose disk is full, read-only or broken for a while, under devices at work.

The faults are those of a process of `potluck serve`: `bad_disk.c` has its reads, writes and syncs
fail with the system's own error numbers, under the database or under the blobs; and, where one may
be mounted, a small file system is really full.
"""

from __future__ import annotations

import errno
import random
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proof import prove
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until

NUMBERS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "broken": errno.EIO}
PLACES = {"database": "potluck.db", "blobs": "blobs"}
FAULTS = [(kind, place) for kind in NUMBERS for place in PLACES]
_SOURCE = Path(__file__).with_name("bad_disk.c")


def build_bad_disk(folder: Path) -> Path | None:
    """The library, or None where there is no compiler (or no Linux) to make it with."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/proc/self/fd").exists():
        return None
    library = folder / "bad_disk.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE]
    made = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library


def mount_small(folder: Path, size: str = "4m") -> bool:
    """Mount a small file system; False where that may not be done."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None
        and not subprocess.run(words, capture_output=True).returncode
    )


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def break_disks(
    folder: Path, library: Path, *, devices: int, faults: list[tuple[str, str]], seed: int
) -> dict[str, Any]:
    """Have the disk of a server fail in these ways, one after the other."""
    flag, home = folder / "flag", folder / "server" / "home"
    changes = {"LD_PRELOAD": str(library), "POTLUCK_BAD_DISK": str(flag)}

    def broken(number: int) -> tuple[Callable[[], object], Callable[[], object]]:
        kind, place = faults[number]
        told = f"{NUMBERS[kind]} {home / PLACES[place]}"

        def begin() -> None:
            flag.with_suffix(".new").write_text(told)
            flag.with_suffix(".new").replace(flag)  # all of it at once

        return begin, flag.unlink

    found = _disturb(folder, home, devices, [broken(i) for i in range(len(faults))], seed, changes)
    return {"faults": Counter(" ".join(fault) for fault in faults)} | found


def fill_disk(folder: Path, small: Path, *, devices: int, times: int, seed: int) -> dict[str, Any]:
    """Fill the file system of a server's folder to its last byte, and make room again."""
    filler = small / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    disturbances = [(fill, filler.unlink)] * times
    return {"times": times} | _disturb(folder, small / "home", devices, disturbances, seed, {})


def _disturb(
    folder: Path,
    home: Path,
    devices: int,
    disturbances: list[tuple[Callable[[], object], Callable[[], object]]],
    seed: int,
    environment: dict[str, str],
) -> dict[str, Any]:
    dice = random.Random(seed)
    text = experiment(
        clients=devices,
        minimum=0.5,
        selection_seconds=10.0,
        report_seconds=30.0,
        lease_seconds=10.0,
    )
    server = ServerProcess(folder / "server", text, home=home, environment=environment)
    assert server.serves()
    swarm, recovered = Swarm(folder / "devices"), []
    for _ in range(devices):
        swarm.join(server.address, server.invite())
    try:
        until(lambda: server.status()["version"] >= 1)
        for disturbance in disturbances:
            recovered.append(_suffer(server, *disturbance, seconds=dice.uniform(0.0, 1.5)))
        drain(server, swarm)
    finally:
        swarm.stop()
        code = server.end()
    answers, faults, given_up = refusals(server), server.faults(), swarm.given_up()
    with sqlite3.connect(home / PLACES["database"]) as db:
        [(integrity,)] = db.execute("PRAGMA integrity_check").fetchall()
    db.close()
    proof = prove(server.home.database, server.home.blobs, swarm.acknowledged(), folder / "again")
    wrong = {status: n for status, n in answers.items() if status >= 500 and status != 503}
    clean = proof.holds and code == 0 and integrity == "ok" and not (wrong or faults or given_up)
    return proof._asdict() | {
        "answers_503": answers[503],
        "other_5xx": sum(wrong.values()),
        "integrity": integrity,
        "round_after_recovery_seconds_max": round(max(recovered), 2),
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "holds": clean,
    }


def _suffer(
    server: ServerProcess,
    begin: Callable[[], object],
    end: Callable[[], object],
    *,
    seconds: float,
) -> float:
    """Have the disk fail until a device was refused, and for some time more.

    Returns the seconds from its recovery to the commit of the next round.
    """
    before, version = refusals(server)[503], server.status()["version"]
    begin()
    try:
        until(lambda: refusals(server)[503] > before, 60.0)
        time.sleep(seconds)
    finally:
        end()
    healed = time.monotonic()
    until(lambda: server.status()["version"] > version)
    return time.monotonic() - healed


def refusals(server: ServerProcess) -> Counter[int]:
    """The answers of 400 and above that a server has logged, by their status."""
    return Counter(line["status"] for line in server.log() if line.get("event") == "request")
