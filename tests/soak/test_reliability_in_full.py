"""The rows of the reliability table at full size. `make soak`, or one: -k r1."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from record import record, record_part
from test_server_machine import SEEN
from test_server_machine import run as run_machine

from abandonment import abandon_rounds
from bad_weather import STORM, weather
from churn import churn
from clock_jumps import JUMPS, jump_clocks
from device_kills import kill_devices
from disk_faults import FAULTS, break_disks, build_bad_disk, fill_disk, mount_small, unmount
from lost_answers import lose_answers
from orders import report_in_orders
from potluck.server.storage import fault_points
from server_kills import kill_servers
from two_servers import kill_one_of_two

pytestmark = pytest.mark.soak
MINUTES = float(os.environ.get("POTLUCK_SOAK_MINUTES", "60"))
SEED = int(os.environ.get("POTLUCK_SEED", "20261124"))


@pytest.fixture
def folder():
    """In memory, if there is any: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def show(
    name: str,
    must: str,
    act: Callable[[], dict[str, Any]],
    seed: int | None = SEED,
    *,
    part: str = "",
    parts: Sequence[str] = (),
) -> None:
    """Do it, or a part of it, keep what was found, and fail if it does not hold."""
    print(f"seed {seed}")
    started = time.monotonic()
    found = act()
    holds = found.pop("holds") and all(v for k, v in found.items() if k.endswith("_in_time"))
    found |= {"seed": seed, "seconds": round(time.monotonic() - started)}
    if part:
        record_part(name, must, part, parts, found, passed=holds)
    else:
        record(name, must, found, passed=holds)
    assert holds, found


R1_PARTS = ("points 1", "points 2", "times 1", "times 2")


@pytest.mark.parametrize("part", R1_PARTS)
def test_r1_kills_of_the_server(folder, part):
    points = list(fault_points.POINTS)
    random.Random(SEED).shuffle(points)
    which = int(part[-1]) - 1
    points = points[which::2] if part.startswith("points") else []
    times = 100 if part.startswith("times") else 0
    seed = SEED + R1_PARTS.index(part)
    show(
        "r1",
        f"kill -9 of `potluck serve` at each of {len(fault_points.POINTS)} fault points and at 200 "
        "random times, in four runs of 20 devices: "
        "0 lost, 0 double, 0 foreign, models as undisturbed; serving again within 3 s",
        lambda: kill_servers(folder, devices=20, points=points, times=times, seed=seed),
        seed,
        part=part,
        parts=R1_PARTS,
    )


R3_PARTS = ("rounds 1 to 5", "rounds 6 to 10")


@pytest.mark.parametrize("part", R3_PARTS)
def test_r3_kills_of_devices(folder, part):
    seed = SEED + R3_PARTS.index(part)
    show(
        "r3",
        "kill -9 of 30 % of 20 device processes in each of 10 rounds, half of them in training, "
        "half in uploading: the round closes at its deadline ± 1 s, slots are leased again, "
        "nothing is reported twice",
        lambda: kill_devices(
            folder, slots=20, times=5, seed=seed, within_seconds=1.0, train_seconds=8.0
        ),
        seed,
        part=part,
        parts=R3_PARTS,
    )


def test_r4_lost_answers(folder):
    show(
        "r4",
        "a proxy loses every answer to a submission once, those of reports, chunks and federated "
        "evaluations; 20 devices, 20 rounds: every retry is answered 200 with the message that was "
        "lost (but for when to come back), each report counts once",
        lambda: lose_answers(folder, devices=20, rounds=20, evaluations=2),
        seed=None,
    )


def test_r5_a_bad_line(folder):
    show(
        "r5",
        "a line with latency 0–2 s, 5 % resets, slices, 64 KB/s and half-open connections; 50 "
        "devices, 50 rounds: each committed or abandoned with its reason, none open for more than "
        "5 s after its deadline",
        lambda: weather(
            folder, STORM, devices=50, rounds=50, seconds=30.0, seed=SEED, within_seconds=5.0
        ),
    )


def test_r6_too_few_reports(folder):
    show(
        "r6",
        "20 rounds in a row with 2 reports of at least 3: abandoned, model, version and ledger (by "
        "which a privacy budget would be charged) unchanged; what their six devices still hold is "
        "answered 409, or 200 as before where it had arrived; the body of a late chunk is not "
        "read; the next round counts all of them",
        lambda: abandon_rounds(folder, times=20),
        seed=None,
    )


def test_r7_jumps_of_clocks(folder):
    jumps = JUMPS * 5
    random.Random(SEED).shuffle(jumps)
    show(
        "r7",
        "40 jumps in the middle of rounds, the server's clock ± 1 h and a device's ± 1 day, half "
        "of them with a restart, 20 devices: rounds close at their deadline ± 1 s, devices are "
        "told to resynchronise, none is refused after one retry",
        lambda: jump_clocks(folder, devices=20, jumps=jumps, seed=SEED, within_seconds=1.0),
    )


def test_r8_bad_disks(folder):
    library = build_bad_disk(folder)
    small = folder / "small"
    if library is None or not mount_small(small, "16m"):
        pytest.skip("a bad disk needs a C compiler and Linux, a small one the right to mount")
    order = FAULTS * 5
    random.Random(SEED).shuffle(order)

    def act() -> dict[str, Any]:
        try:
            filled = fill_disk(folder / "filled", small, devices=20, times=10, seed=SEED)
        finally:
            unmount(small)
        broken = break_disks(folder / "broken", library, devices=20, faults=order, seed=SEED)
        holds = filled.pop("holds") and broken.pop("holds")
        return {"full_file_system": filled, "failing_calls": broken, "holds": holds}

    show(
        "r8",
        "a full file system 10 times; ENOSPC, EROFS and EIO under database and blobs 5 times each; "
        "20 devices: answers 503 and no other 5xx, nothing lost, database intact, the next round "
        "committed without a restart",
        act,
    )


def test_r9_the_round_as_a_machine():
    def act() -> dict[str, Any]:
        SEEN.clear()
        run_machine(2000, 50)
        ends = dict(sorted(SEEN.items()))
        rare = ("train COMMITTED", "train ABANDONED", "evaluate COMMITTED", "evaluate ABANDONED")
        return {"rounds": ends, "holds": ends["runs"] >= 2000 and all(ends.get(k) for k in rare)}

    show(
        "r9",
        "hypothesis drives the round in 2,000 runs × 50 steps over two processes: over-selection, "
        "leases, deadlines, minimum, abandonment, repeated and late reports, restarts, jumps of "
        "the clock, evaluation rounds; all invariants after every step",
        act,
        seed=None,
    )


def test_r10_any_order(folder, postgresql):
    show(
        "r10",
        "100 rounds of 8 dense updates at 1, 2 and 4 processes of `potluck serve` on one "
        "PostgreSQL, in random orders, one by one and all at once: the models of 1 process on "
        "SQLite that got them in order, bit for bit",
        lambda: report_in_orders(
            folder, postgresql, devices=8, orders=100, processes=(1, 2, 4), seed=SEED
        ),
    )


def test_r12_devices_that_come_and_go(folder):
    def act() -> dict[str, Any]:
        found = churn(folder, devices=200, part=0.1, minutes=MINUTES, seed=SEED, every_seconds=5.0)
        leaks = found["memory_mb_per_hour"][2] >= 1.0 or found["descriptors_per_hour"][1] > 1.0
        return found | {"holds": found["holds"] and not leaks}

    show(
        "r12",
        "200 devices, 10 % of which leave and come again in each minute, for POTLUCK_SOAK_MINUTES: "
        "memory grows by less than 1 MB an hour (the upper end of the 95 % interval), no "
        "descriptors are lost, no exception is logged",
        act,
    )


def test_two_servers_on_one_postgresql(folder, postgresql):
    show(
        "two-servers",
        "two processes of `potluck serve` on one PostgreSQL, one of them killed in the middle of "
        "20 rounds, the leader or the other; 20 devices: 0 lost, 0 double, 0 foreign, models as "
        "undisturbed",
        lambda: kill_one_of_two(folder, postgresql(), devices=20, times=20, seed=SEED),
    )
