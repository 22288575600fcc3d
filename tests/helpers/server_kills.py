"""R1: a server that is killed, at named points and at any time, while devices report to it.

Device i sends e_i. What devices were told is compared with what is stored, and every model with
that of an undisturbed run over the same accepted sets.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from proof import prove
from serve_process import ServerProcess, experiment
from swarm import Swarm, until

SERVING_SECONDS = 3.0
"""From the start of a process to its first answer, on a machine that has nothing else to do."""
BEFORE_THE_RUN = ("run.before-model", "run.before-row", "run.after-row")
"""Points that only the first life passes."""


def kill_servers(
    folder: Path, *, devices: int, points: Sequence[str], times: int, seed: int
) -> dict[str, Any]:
    """Kill a server once at each point and so many times at random; nobody repairs anything."""
    dice = random.Random(seed)
    text = experiment(
        clients=devices,
        momentum=0.5,  # there are blobs beside the model, which is small
        minimum=0.5,
        selection_seconds=3.0,
        report_seconds=5.0,
        lease_seconds=3.0,
    )
    lives: list[ServerProcess] = []
    died_at = []
    for point in (p for p in points if p in BEFORE_THE_RUN):
        assert not ServerProcess(folder, text, fault=point).serves(), f"{point} was not reached"
        died_at.append(point)
    server = ServerProcess(folder, text)
    assert server.serves()
    port, swarm = server.port, Swarm(folder / "devices")
    for _ in range(devices):
        swarm.join(server.address, server.invite())

    def live(fault: str = "") -> ServerProcess:
        lives.append(ServerProcess(folder, text, port=port, fault=fault))
        return lives[-1]

    try:
        until(lambda: server.status()["version"] >= 1)
        server.kill()
        for point in points:
            if point in BEFORE_THE_RUN:
                continue
            _provoke(point, server, swarm, before=True)
            server = live(point)
            if server.serves():
                _provoke(point, server, swarm, before=False)
            assert server.ended(300) == -9, f"{point} was not reached"
            died_at.append(point)
            for trainer in swarm.trainers:
                trainer.balks = False
        server = live()
        assert server.serves()
        for _ in range(times):
            time.sleep(dice.uniform(0.0, 1.5))
            server.kill()
            server = live()
            assert server.serves()
        reached = server.status()["version"]
        until(lambda: server.status()["version"] >= reached + 2)
        drain(server, swarm)
    finally:
        swarm.stop()
        code = server.end()
    assert code == 0
    given_up, logged = swarm.given_up(), len(server.faults())
    seconds = [one.serving_seconds for one in lives if one.serving_seconds]
    cpu = [one.serving_cpu_seconds for one in lives if one.serving_cpu_seconds]
    home = server.home
    proof = prove(home.database, home.blobs, swarm.acknowledged(), folder / "again")
    return proof._asdict() | {
        "killed_at_points": len(died_at),
        "killed_at_random": times,
        "serving_again_seconds_median": round(median(seconds), 2),
        "serving_again_seconds_max": round(max(seconds), 2),
        "serving_again_cpu_seconds_max": round(max(cpu), 2),
        "devices_that_gave_up": given_up,
        "faults_logged": logged,
        "holds": proof.holds and not given_up and not logged,
        "serves_again_in_time": max(seconds) <= SERVING_SECONDS,
    }


def drain(server: ServerProcess, swarm: Swarm) -> None:
    """Begin no further round, and let every device hear what became of its update."""
    server.operator.post("pause", reason="the test is over")
    until(lambda: _is_idle(server.status()["open"]) and not swarm.owe())


def _is_idle(current: dict[str, Any] | None) -> bool:
    """Whether no round is open, or one that no device was selected for: it stays so."""
    return current is None or current["started_ms"] is None


def _provoke(point: str, server: ServerProcess, swarm: Swarm, *, before: bool) -> None:
    """Have happen what leads to a point that an ordinary round does not pass."""
    if point.startswith("abandon") and before:
        for trainer in swarm.trainers:
            trainer.balks = True
    if point.startswith("enrol") and not before:
        swarm.join(server.address, server.invite(), wait=False)
