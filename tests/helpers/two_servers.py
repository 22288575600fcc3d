"""Two servers that share a database and blobs, one of which is killed in the middle of rounds.

Each device comes to one of the two; when that is killed, a load balancer leads it to the other.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from bad_line import BadLine, Weather
from proof import prove
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until


def kill_one_of_two(
    folder: Path, url: str, blobs: str | None = None, *, devices: int, times: int, seed: int
) -> dict[str, Any]:
    """Kill one of two servers so many times; `url` is that of an empty PostgreSQL database, and
    `blobs` a place that both reach; None: a folder."""
    dice, blobs = random.Random(seed), blobs or str(folder / "blobs")
    text = experiment(
        clients=devices, minimum=0.5, selection_seconds=5.0, report_seconds=8.0, lease_seconds=6.0
    )

    def live(name: str, port: int = 0) -> ServerProcess:
        options = ("--database", url, "--blobs", blobs)
        server = ServerProcess(folder / name, text, port=port, options=options)
        assert server.serves()
        return server

    servers = [live("a")]
    shutil.copytree(  # the run's key and the certificate; the rest is the other's own
        servers[0].home.folder,
        folder / "b" / "home",
        ignore=shutil.ignore_patterns("*.sock", "lock"),
    )
    servers.append(live("b"))
    swarm, waited, leaders = Swarm(folder / "devices"), [], 0
    with (
        BadLine(servers[0].port, Weather(), seed=seed) as one,
        BadLine(servers[1].port, Weather(), seed=seed) as other,
    ):
        lines = [one, other]
        try:
            for i in range(devices):
                swarm.join(lines[i % 2].address, servers[i % 2].invite())
            for trainer in swarm.trainers:
                trainer.seconds = dice.uniform(0.2, 1.0)
            for _ in range(times):
                _until_training(servers[0])
                k = dice.randrange(2)
                leaders += servers[k].status()["is_leader"]
                time.sleep(dice.uniform(0.0, 0.8))
                version = servers[1 - k].status()["version"]
                servers[k].kill()
                lines[k].lead_to(servers[1 - k].port)
                killed = time.monotonic()
                _until_version(servers[1 - k], version + 2)
                waited.append(time.monotonic() - killed)
                servers[k] = live("ab"[k], servers[k].port)
                lines[k].lead_to(servers[k].port)
            drain(servers[0], swarm)
        finally:
            swarm.stop()
            codes = [server.end() for server in servers]
    faults = servers[0].faults() + servers[1].faults()
    proof = prove(url, blobs, swarm.acknowledged(), folder / "again")
    return proof._asdict() | {
        "killed": times,
        "killed_while_leading": leaders,
        "two_rounds_after_a_kill_seconds_max": round(max(waited), 2),
        "devices_that_gave_up": swarm.given_up(),
        "faults_logged": faults[:3],
        "holds": proof.holds and not (swarm.given_up() or faults or any(codes)),
    }


def _until_training(server: ServerProcess) -> None:
    until(lambda: (server.status()["open"] or {}).get("state") == "TRAINING")


def _until_version(server: ServerProcess, version: int) -> None:
    until(lambda: server.status()["version"] >= version)
