"""R12: a server under devices that come and go, watched for what it does not give back."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from proof import prove
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until

WARM_UP = 0.25
"""The part of the time that is not measured: caches fill, pools open their connections."""


class Slope(NamedTuple):
    """A straight line through what was measured: units an hour, with a 95 % interval."""

    per_hour: float
    low: float
    high: float


def churn(
    folder: Path, *, devices: int, part: float, minutes: float, seed: int, every_seconds: float
) -> dict[str, Any]:
    """Serve for so long, while in each minute `part` of the devices leave and come again."""
    dice = random.Random(seed)
    text = experiment(
        clients=devices, minimum=0.5, goal=max(devices // 2, 1), over_selection=1.3,
        selection_seconds=10.0, report_seconds=15.0, lease_seconds=10.0, long_poll_seconds=5.0,
    )  # fmt: skip
    server = ServerProcess(folder / "server", text, options=("--log-level", "warning"))
    assert server.serves()
    swarm = Swarm(folder / "devices")
    samples: list[tuple[float, float, int]] = []  # seconds, bytes, descriptors
    gone = 0
    try:
        for _ in range(devices):
            swarm.join(server.address, server.invite())
        for trainer in swarm.trainers:
            trainer.seconds = dice.uniform(0.5, 3.0)
        lives = list(swarm.devices)
        process, begun = psutil.Process(server.process.pid), time.monotonic()
        pause = 60.0 / max(devices * part, 1.0)
        next_sample, next_leave = begun, begun + pause
        while (now := time.monotonic()) < begun + minutes * 60:
            if now >= next_sample:
                size = process.memory_info().rss
                samples.append((now - begun, size, process.num_fds()))
                next_sample += every_seconds
            if now >= next_leave:
                k = dice.randrange(devices)
                lives[k] = swarm.again(lives[k], server.address)
                gone, next_leave = gone + 1, next_leave + pause
            time.sleep(max(min(next_sample, next_leave) - time.monotonic(), 0.0))
        until(lambda: server.status()["version"] >= 1)
        drain(server, swarm)
    finally:
        swarm.stop()
        code = server.end()
    faults, given_up = server.faults(), swarm.given_up()
    home = server.home
    proof = prove(home.database, home.blobs, swarm.acknowledged(), folder / "again")
    kept = np.array([row for row in samples if row[0] >= WARM_UP * minutes * 60], np.float64)
    memory = slope(kept[:, 0] / 3600, kept[:, 1] / 1e6)
    descriptors = slope(kept[:, 0] / 3600, kept[:, 2])
    return proof._asdict() | {
        "devices": devices,
        "minutes": minutes,
        "left_and_came_again": gone,
        "samples": len(kept),
        "memory_mb": [round(kept[:, 1].min() / 1e6, 1), round(kept[:, 1].max() / 1e6, 1)],
        "memory_mb_per_hour": [round(value, 2) for value in memory],
        "descriptors": [int(kept[:, 2].min()), int(kept[:, 2].max())],
        "descriptors_per_hour": [round(value, 2) for value in descriptors],
        "devices_that_gave_up": given_up,
        "faults_logged": faults[:3],
        "holds": proof.holds and not (given_up or faults or code),
    }


def slope(hours: np.ndarray, values: np.ndarray) -> Slope:
    """Least squares. Neighbouring samples are not independent: the interval counts as many as
    their first autocorrelation leaves, (1 − r) / (1 + r) of them."""
    x = hours - hours.mean()
    per_hour = float(x @ values / (x @ x))
    rest = values - values.mean() - per_hour * x
    power = float(rest @ rest)
    r = max(float(rest[1:] @ rest[:-1]) / power, 0.0) if power else 0.0
    count = max(len(values) * (1 - r) / (1 + r), 3.0)
    error = math.sqrt(power / (count - 2) / float(x @ x) * len(values) / count) if power else 0.0
    return Slope(per_hour, per_hour - 1.96 * error, per_hour + 1.96 * error)
