"""R7: clocks that jump in the middle of rounds, the server's by an hour, devices' by a day.

One device never finishes its training, so every round ends at its deadline, which is measured by a
clock that does not jump.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select

from disk_faults import refusals
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import rounds
from proof import prove
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until

HOUR, DAY = 3600, 86_400
KINDS = ("server", "server and restart", "device", "device and restart")
JUMPS = [(kind, sign) for kind in KINDS for sign in (1, -1)]
REPORT_SECONDS = 5.0


def jump_clocks(
    folder: Path, *, devices: int, jumps: list[tuple[str, int]], seed: int, within_seconds: float
) -> dict[str, Any]:
    """Have clocks jump in so many rounds, one jump each."""
    dice, skew = random.Random(seed), folder / "skew"
    skew.write_text("0")
    text = experiment(
        clients=devices, minimum=0.5, selection_seconds=5.0,
        report_seconds=REPORT_SECONDS, lease_seconds=REPORT_SECONDS,
    )  # fmt: skip
    server = ServerProcess(folder, text, skew=skew)
    assert server.serves()
    swarm, late = Swarm(folder / "devices"), []
    for i in range(devices):
        swarm.join(server.address, server.invite(), skew_ms=0 if i else DAY * 1000)
    allowed, told = 2, 2  # the first device, on each of its connections: to enrol, and to work
    swarm.trainers[0].seconds = 1e6
    try:
        for kind, sign in jumps:
            number, begun = _next_training(server)
            if kind.startswith("server"):
                skew.write_text(str(sign * HOUR))  # from the right time
                if kind.endswith("restart"):
                    server.kill()
                    server = ServerProcess(folder, text, skew=skew, port=server.port)
                    assert server.serves()
                    allowed += devices  # each of them once, and none where time did not move on
            else:
                lives = [one for one in swarm.devices if one.died is None]
                one = dice.choice([one for one in lives if one.folder.name != "0"])
                if kind.endswith("restart"):
                    swarm.again(one, server.address, skew_ms=sign * DAY * 1000)
                    allowed, told = allowed + 1, told + 1
                else:
                    one.clock.skew_ms += sign * DAY * 1000
            _until_over(server, number)
            if kind != "server and restart":  # which gives the round some more time
                late.append(time.monotonic() - begun - REPORT_SECONDS)
        swarm.trainers[0].seconds = 0.0
        drain(server, swarm)
    finally:
        swarm.stop()
        code = server.end()
    proof = prove(server.home.database, server.home.blobs, swarm.acknowledged(), folder / "again")
    resynchronised, given_up, faults = refusals(server)[401], swarm.given_up(), server.faults()
    honest = [one for one in swarm.devices if one.folder.name != "0"]
    refused = [e.detail for one in honest for e in one.events if e.what in ("refused", "failed")]
    # A server that was down until the deadline, or so long as its restart took, refused nobody.
    unanswered = [detail for detail in refused if detail.startswith("there was no answer in time")]
    refused = [detail for detail in refused if detail not in unanswered]
    furthest = max(map(abs, late))
    return proof._asdict() | {
        "jumps": len(jumps),
        "told_to_resynchronise": resynchronised,
        "at_least": told,
        "at_most": allowed,
        "refused": refused[:5],
        "unanswered_until_the_deadline": len(unanswered),
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "furthest_from_the_deadline_seconds": round(furthest, 2),
        "closed_late_seconds_max": _latest(server.home.database),
        "holds": proof.holds
        and code == 0
        and not (refused or given_up or faults)
        and told <= resynchronised <= allowed,
        "closed_in_time": furthest <= within_seconds,
    }


def _next_training(server: ServerProcess) -> tuple[str, float]:
    """The id of a round that has just begun its TRAINING, and when that was seen."""
    before = (server.status()["open"] or {}).get("id")
    found: dict[str, Any] = {}

    def is_new() -> bool:
        found.update(server.status()["open"] or {})
        return found.get("id") != before and found.get("state") == "TRAINING"

    until(is_new)
    return found["id"], time.monotonic()


def _until_over(server: ServerProcess, round: str) -> None:
    until(lambda: (server.status()["open"] or {}).get("id") != round)


def _latest(url: str) -> float:
    """By how much rounds were later than their deadlines, in the server's own time."""
    database = Database(url)
    query = select(rounds.c.closed_ms - rounds.c.report_deadline_ms)
    with database.read() as db:
        ends = [ms for ms in db.scalars(query) if ms is not None]
    database.close()
    return round(max(ends) / 1000, 2)
