"""R5: devices whose way to the server is slow, late, sliced, and cut off or silent now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select

from bad_line import BadLine, Weather
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import rounds as all_rounds
from proof import prove
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until

STORM = Weather(
    rate=64_000.0, latency=(0.0, 2.0), slice_bytes=700, resets=0.05, half_open=0.01
)  # fmt: skip


def weather(
    folder: Path,
    storm: Weather,
    *,
    devices: int,
    rounds: int,
    seconds: float,
    seed: int,
    within_seconds: float,
) -> dict[str, Any]:
    """Have rounds under this weather; `seconds` are those of selection, and of report."""
    text = experiment(
        clients=devices, minimum=0.5, selection_seconds=seconds, report_seconds=seconds,
        lease_seconds=seconds,
    )  # fmt: skip
    server = ServerProcess(folder / "server", text)
    assert server.serves()
    swarm = Swarm(folder / "devices")
    with BadLine(server.port, Weather(), seed=seed) as line:
        try:
            for _ in range(devices):
                swarm.join(line.address, server.invite())
            line.change(storm)
            first = _closed(server)
            until(lambda: _closed(server) >= first + rounds, 2 * seconds * rounds + 120.0)
            line.change(Weather())
            drain(server, swarm)
        finally:
            swarm.stop()
            code = server.end()
    given_up, faults = swarm.given_up(), server.faults()
    home = server.home
    proof = prove(home.database, home.blobs, swarm.acknowledged(), folder / "again")
    told = _ends(home.database)
    return proof._asdict() | told | {
        "devices": devices,
        "requests": line.counts["requests"],
        "reset": line.counts["reset"],
        "half_open": line.counts["half-open"],
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "holds": proof.holds
        and not (given_up or faults or code or told["abandoned_without_a_reason"])
        and proof.committed + proof.abandoned >= rounds
        and line.counts["reset"] > 0,
        "closed_in_time": told["latest_after_its_deadline_seconds"] <= within_seconds,
    }  # fmt: skip


def _closed(server: ServerProcess) -> int:
    """Rounds that were committed or abandoned."""
    database = Database(server.home.database)
    with database.read() as db:
        ended = db.scalars(select(all_rounds.c.id).where(all_rounds.c.closed_ms.is_not(None))).all()
    database.close()
    return len(ended)


def _ends(url: str) -> dict[str, Any]:
    """How rounds ended, and how long after their deadlines."""
    database = Database(url)
    with database.read() as db:
        ended = db.execute(select(all_rounds).where(all_rounds.c.closed_ms.is_not(None))).all()
    database.close()
    late = [
        (row.closed_ms - (row.report_deadline_ms or row.selection_deadline_ms or row.closed_ms))
        / 1000
        for row in ended
    ]
    return {
        "latest_after_its_deadline_seconds": round(max(late), 2),
        "abandoned_without_a_reason": sum(r.state == "ABANDONED" and not r.reason for r in ended),
    }
