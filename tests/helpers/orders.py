"""R10: the same reports in other orders, at one server process or several: the same models.

The updates are dense, of sizes and weights that are far apart, so that a sum in float32 would
depend on the order. Every second round the devices report one by one, in the others all at once.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import select

from potluck.protocol import Accepted, Assignment, Enrolled, Upload, Wait
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import ledger, reports
from remote import Caller
from serve_process import ServerProcess, experiment
from swarm import until

DIM = 650  # of the model "logistic" on digits


class Models(NamedTuple):
    """What a deployment made: by round the model and the accepted set, and the order it came in."""

    digests: dict[int, tuple[str, str]]
    arrivals: dict[int, list[int]]
    faults: list[dict]


def report_in_orders(
    folder: Path,
    new_url: Callable[[], str],
    *,
    devices: int,
    orders: int,
    processes: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Have so many rounds with each number of processes on PostgreSQL; and once more in order, with
    one process on SQLite."""
    dice = random.Random(seed)
    right = _deploy(folder / "right", None, 1, devices, orders, None)
    found: dict[str, Any] = {"devices": devices, "rounds": orders, "other_models": {}}
    differing, seen, faults = 0, set(), list(right.faults)
    for count in processes:
        made = _deploy(folder / str(count), new_url(), count, devices, orders, dice)
        wrong = [n for n in range(1, orders + 1) if made.digests.get(n) != right.digests.get(n)]
        found["other_models"][f"{count} processes"] = len(wrong)
        seen |= {tuple(order) for order in made.arrivals.values()}
        differing += sum(
            _naive(n, order).tobytes() != _naive(n, sorted(order)).tobytes()
            for n, order in made.arrivals.items()
        )
        faults += made.faults
    total = orders * len(processes)
    return found | {
        "orders": total,
        "different_orders": len(seen),
        "orders_in_which_float32_would_give_another_sum": differing,
        "faults_logged": faults[:3],
        "holds": len(right.digests) == orders
        and not any(found["other_models"].values())
        and differing > 0.8 * total
        and not faults,
    }


def _deploy(
    folder: Path,
    url: str | None,
    processes: int,
    devices: int,
    rounds: int,
    dice: random.Random | None,
) -> Models:
    """Serve so many rounds; without dice every report comes in the order of the clients."""
    text = experiment(clients=devices, rounds=rounds, minimum=1.0, long_poll_seconds=10.0)
    servers = _serve(folder, url, processes, text)
    crowd = [_Device(servers, k) for k in range(devices)]
    try:
        with ThreadPoolExecutor(devices) as pool:
            for number in range(1, rounds + 1):
                order = list(range(devices))
                doors = [0] * devices
                if dice is not None:
                    dice.shuffle(order)
                    doors = [dice.randrange(processes) for _ in range(devices)]
                works = list(pool.map(_Device.check_in, crowd, doors))
                assert [work.round for work in works] == [number] * devices
                if dice is not None and number % 2:
                    list(pool.map(lambda k, w=works: crowd[k].report(w[k]), order))
                else:
                    for k in order:
                        crowd[k].report(works[k])
        until(lambda: servers[0].status()["state"] == "finished")
    finally:
        for device in crowd:
            device.close()
        codes = [server.end() for server in servers]
    faults = [fault for server in servers for fault in server.faults()]
    assert not any(codes), faults
    return _read(url or servers[0].home.database, faults)


class _Device:
    """A device that may come to any of the servers."""

    def __init__(self, servers: Sequence[ServerProcess], k: int) -> None:
        self._k = k
        self._caller = Caller(servers[0].address, servers[0].certificate)
        enrolled = self._caller.enrol(servers[0].invite())
        assert isinstance(enrolled, Enrolled), enrolled
        others = [Caller(server.address, server.certificate) for server in servers[1:]]
        self._doors = [(one.http, one.authority) for one in (self._caller, *others)]

    def check_in(self, door: int) -> Assignment:
        """Come to this server, and wait for work."""
        self._caller.http, self._caller.authority = self._doors[door]
        while True:
            answer = self._caller.check_in()
            if isinstance(answer, Assignment):
                return answer
            assert isinstance(answer, Wait), answer

    def report(self, work: Assignment) -> None:
        """Send the update of this round."""
        body, weight = _update(self._k, work.round)
        upload = self._caller.report(work, body.astype("<f4").tobytes(), weight=weight)
        assert isinstance(upload, Upload), upload
        accepted = self._caller.put(upload.upload, 0, body.astype("<f4").tobytes())
        assert isinstance(accepted, Accepted), accepted

    def close(self) -> None:
        for http, _ in self._doors:
            http.close()


def _serve(folder: Path, url: str | None, processes: int, text: str) -> list[ServerProcess]:
    options = () if url is None else ("--database", url, "--blobs", folder / "blobs")
    servers = [ServerProcess(folder / "0", text, options=options)]
    assert servers[0].serves()
    for i in range(1, processes):
        shutil.copytree(  # the run's key and the certificate; the rest is its own
            servers[0].home.folder,
            folder / str(i) / "home",
            ignore=shutil.ignore_patterns("*.sock", "lock"),
        )
        servers.append(ServerProcess(folder / str(i), text, options=options))
    assert all(server.serves() for server in servers[1:])
    return servers


def _update(client: int, number: int) -> tuple[np.ndarray, float]:
    """What a client sends in a round, and its weight."""
    rng = np.random.default_rng([client, number])
    scale = 10 ** rng.uniform(-3, 2)
    return (rng.normal(size=DIM) * scale).astype(np.float32), float(rng.uniform(0.1, 900))


def _naive(number: int, order: Sequence[int]) -> np.ndarray:
    """The weighted sum in float32, in this order."""
    total = np.zeros(DIM, np.float32)
    for client in order:
        vector, weight = _update(client, number)
        total += np.float32(weight) * vector
    return total


def _read(url: str, faults: list[dict]) -> Models:
    database = Database(url)
    joined = select(ledger.c.number, reports.c.client).join(
        reports, reports.c.round == ledger.c.round
    )
    with database.read() as db:
        rows = db.execute(select(ledger)).all()
        arrived = db.execute(joined.order_by(reports.c.accepted_ms)).all()
    database.close()
    arrivals: dict[int, list[int]] = {}
    for number, client in arrived:
        arrivals.setdefault(number, []).append(client)
    return Models(
        {row.number: (row.model_sha256, row.accepted_sha256) for row in rows}, arrivals, faults
    )
