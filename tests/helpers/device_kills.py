"""R3: devices as processes, three in ten of which are killed while they train and while they send.

Each round has fewer spare devices than were killed: so slots are leased again, the goal is out of
reach, and the round ends at its deadline with what came.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sqlalchemy import select

from bad_line import BadLine, Weather
from device_process import DeviceProcess
from potluck.server.rounds.state_machine import LEASE_RAN_OUT
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import assignments, rounds
from proof import prove
from serve_process import ServerProcess, experiment
from swarm import name_of, until

UPLOAD_SECONDS = 3.0
LEASE_SECONDS = 6.0  # above that of a chunk's way, which extends the lease when it has come
BYTES = 4 * 55_210  # of the model "2nn" on digits


def kill_devices(
    folder: Path,
    *,
    slots: int,
    times: int,
    seed: int,
    within_seconds: float,
    train_seconds: float = 3.0,
) -> dict[str, Any]:
    """Kill 30 % of the devices of so many rounds, half of them in training, half in uploading.

    Args:
        train_seconds: long enough for all to be at it when the last one begins.
        within_seconds: how far from its deadline a round may close.
    """
    dice = random.Random(seed)
    num_killed = round(0.3 * slots)
    total = slots + num_killed // 2
    text = experiment(
        clients=slots, model="2nn", minimum=0.5, population=total, selection_seconds=30.0,
        report_seconds=LEASE_SECONDS + 2 * (train_seconds + UPLOAD_SECONDS) + 2,
        lease_seconds=LEASE_SECONDS,
    )  # fmt: skip
    text = text.replace(f"clients = {slots}", f"clients = {total}", 1)
    server = ServerProcess(folder / "server", text)
    assert server.serves()
    devices: list[DeviceProcess] = []
    struck: dict[str, list[tuple[str, str]]] = {}  # by the round's id: (device, phase)
    with BadLine(server.port, Weather(rate=BYTES / UPLOAD_SECONDS), seed=seed) as line:
        try:
            for i in range(total):
                one = DeviceProcess(
                    folder / "devices" / str(i), line.address, seconds=train_seconds
                )
                one.start(server.invite())
                devices.append(one)
                until(lambda: devices[-1].is_enrolled)
            for _ in range(times):
                id, killed = _strike(server, devices, num_killed, struck, dice)
                struck[id] = [(name_of(one.folder), phase) for one, phase in killed]
                for one, _ in killed:
                    one.start(held=True)  # to be there when the next round begins
                until(lambda id=id: (server.status()["open"] or {}).get("id") != id)
                for one, _ in killed:
                    one.release()
            server.operator.post("pause", reason="the test is over")
            until(lambda: _is_over(server) and not any(one.owes for one in devices))
        finally:
            gone = [one.process.poll() for one in devices]
            for one in devices:
                one.kill()
            code = server.end()
    faults = server.faults()
    acknowledged = {name_of(one.folder): one.accepted() for one in devices}
    home = server.home
    proof = prove(home.database, home.blobs, acknowledged, folder / "again")
    told = _told(home.database, struck)
    given_up = sum(end is not None for end in gone)
    return proof._asdict() | told | {
        "devices": total,
        "slots": slots,
        "rounds_struck": len(struck),
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "holds": proof.holds
        and proof.committed >= len(struck)
        and not (given_up or faults or code)
        and told["released"] + told["killed_when_accepted"] == told["killed"]
        and told["released"] >= told["killed"] - told["killed_sending"]
        and told["leased_again"] >= len(struck) * (total - slots)
        and told["closed_at_the_deadline"] == len(struck),
        "closed_in_time": told["furthest_from_the_deadline_seconds"] <= within_seconds,
    }  # fmt: skip


def _strike(
    server: ServerProcess,
    devices: list[DeviceProcess],
    count: int,
    struck: dict[str, Any],
    dice: random.Random,
) -> tuple[str, list[tuple[DeviceProcess, str]]]:
    """Kill devices of the next round: first those in training, then those that send."""

    def is_full() -> bool:
        now = server.status()["open"] or {}
        return now.get("state") == "TRAINING" and now["id"] not in struck

    until(is_full)
    id, killed = server.status()["open"]["id"], []
    phases = ["training"] * (count // 2) + ["sending"] * (count - count // 2)

    def one_more(phase: str) -> bool:
        alive = [one for one in devices if one not in [k for k, _ in killed]]
        for one in dice.sample(alive, len(alive)):
            if one.phase == phase and one.kill_in(phase):
                killed.append((one, phase))
                return True
        return False

    for phase in phases:
        until(lambda phase=phase: one_more(phase))
    return id, killed


def _is_over(server: ServerProcess) -> bool:
    current = server.status()["open"]
    return current is None or current["started_ms"] is None


def _told(url: str, struck: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """What the database says of the rounds that were struck."""
    database = Database(url)
    with database.read() as db:
        closed = db.execute(select(rounds).where(rounds.c.id.in_(struck))).all()
        given = db.execute(select(assignments).where(assignments.c.round.in_(struck))).all()
    database.close()
    hit = [row for row in given if row.device in [device for device, _ in struck[row.round]]]
    released = [row for row in hit if (row.state, row.reason) == ("expired", LEASE_RAN_OUT)]
    distances = [(row.closed_ms - row.report_deadline_ms) / 1000 for row in closed]
    again = sum(
        any(row.assigned_ms >= lost.lease_ms for lost in released if lost.round == row.round)
        for row in given
    )
    return {
        "killed": sum(map(len, struck.values())),
        "killed_sending": sum(phase == "sending" for k in struck.values() for _, phase in k),
        "released": len(released),
        # Killed before it heard so: there is no slot to be released.
        "killed_when_accepted": sum(row.state == "reported" for row in hit),
        "leased_again": again,
        "closed_at_the_deadline": sum(distance >= 0 for distance in distances),
        "furthest_from_the_deadline_seconds": round(max(map(abs, distances)), 2),
    }
