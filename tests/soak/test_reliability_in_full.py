"""The rows of the reliability table at full size. `make soak`, or one: -k r1."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record import record

from potluck.server import faults
from server_kills import kill_servers

pytestmark = pytest.mark.soak
SEED = int(os.environ.get("POTLUCK_SEED", "20261124"))


@pytest.fixture
def folder():
    """In memory, if there is any: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def show(name: str, must: str, act: Callable[[], dict[str, Any]], seed: int | None = SEED) -> None:
    """Do it, keep what was found, and fail if it does not hold."""
    print(f"seed {seed}")
    started = time.monotonic()
    found = act()
    holds = found.pop("holds") and found.get("serves_again_in_time", True)
    found |= {"seed": seed, "seconds": round(time.monotonic() - started)}
    record(name, must, found, passed=holds)
    assert holds, found


def test_r1_kills_of_the_server(folder):
    points = list(faults.POINTS)
    random.Random(SEED).shuffle(points)
    show(
        "r1",
        "kill -9 of `potluck serve` at every fault point and at 200 random times, 20 devices: "
        "0 lost, 0 double, 0 foreign, models as undisturbed; serving again within 3 s",
        lambda: kill_servers(folder, devices=20, points=points, times=200, seed=SEED),
    )
