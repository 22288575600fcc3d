"""R4: every answer to a submission is lost once: a report's, its chunk's, an evaluation's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from fault_proxy import FaultProxy, Seen
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import reports
from proof import prove
from serve_process import ServerProcess, experiment
from swarm import Swarm, until


def lose_answers(folder: Path, *, devices: int, rounds: int, evaluations: int) -> dict[str, Any]:
    """Have a whole run of so many rounds, the last of which are followed by evaluations."""
    text = experiment(
        clients=devices, rounds=rounds, minimum=1.0, federated_every=rounds // evaluations
    )
    server = ServerProcess(folder / "server", text, options=("--insecure-loopback",))
    assert server.serves()
    seen: set[Seen] = set()

    def lose(request: Seen) -> bool:
        if not _is_submission(request) or request in seen:
            return False
        seen.add(request)
        return True

    swarm = Swarm(folder / "devices")
    with FaultProxy(server.port, lose=lose) as proxy:
        try:
            for _ in range(devices):
                swarm.join(proxy.address, server.invite())
            until(lambda: server.status()["state"] == "finished", 30.0 * rounds)
            for device in swarm.devices:
                device.end()
        finally:
            swarm.stop()
            code = server.end()
        lost, again = dict(proxy.lost), dict(proxy.again)
    home, faults = server.home, server.faults()
    proof = prove(home.database, home.blobs, swarm.acknowledged(), folder / "again")
    given_up = sum(device.died is not None for device in swarm.devices)
    per_device = [device.count("accepted") for device in swarm.devices]
    alike = sum(_told(lost[one]) == _told(again.get(one, b"")) for one in lost)
    kinds = Counter(f"{one.method} {one.path.split('/')[2]}" for one in lost)
    expected = {"POST report": devices * rounds, "PUT uploads": devices // 2 * rounds}
    expected["POST evaluation"] = devices * evaluations
    return proof._asdict() | {
        "devices": devices,
        "answers_lost": dict(sorted(kinds.items())),
        "statuses_lost": dict(Counter(_told(answer)[0] for answer in lost.values())),
        "statuses_of_the_retries": dict(Counter(_told(answer)[0] for answer in again.values())),
        "retries_answered_alike": alike,
        "rows_of_reports": _rows(home.database),
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "holds": proof.holds
        and (proof.committed, proof.abandoned, proof.reports) == (rounds, 0, devices * rounds)
        and kinds == expected
        and alike == len(lost) == len(again)
        and {_told(answer)[0] for answer in lost.values()} == {200}
        and per_device == [rounds + evaluations] * devices
        and _rows(home.database) == devices * (rounds + evaluations)
        and not (given_up or faults or code),
    }


def _is_submission(request: Seen) -> bool:
    return request.method == "PUT" or request.path in ("/v1/report", "/v1/evaluation")


def _told(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and message; when to come back is another matter at another time."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return 0, {}
    message = json.loads(body)
    message.pop("retry_after_seconds", None)
    return int(head.split(b" ", 2)[1]), message


def _rows(url: str) -> int:
    database = Database(url)
    with database.read() as db:
        count = db.scalar(select(func.count()).select_from(reports)) or 0
    database.close()
    return count
