"""kill -9: at every fault point, at random times; what was acknowledged is there, and once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from potluck.server.storage import fault_points

PROGRAM = Path(__file__).parents[1] / "helpers/mortal.py"
BATCH = 8
BATCHES = [fault_points.POINTS[i : i + BATCH] for i in range(0, len(fault_points.POINTS), BATCH)]
NUM_ROUNDS = 3


def lives(*arguments: object) -> list[dict]:
    """Run the program; one result for each life that ended well."""
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A folder in memory, if there is one: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="potluck-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    [result] = lives(place / "db", place / "blobs", NUM_ROUNDS)
    return result


def test_the_undisturbed_run_has_every_report_once(undisturbed):
    # Rounds 1, 2 and 3 send 1, 2 and 3 times e_i, and the mean is over four devices.
    assert undisturbed["weights"] == [(1 + 2 + 3) / 4] * 4
    assert [(row["number"], row["attempt"]) for row in undisturbed["rounds"]] == [
        (1, 1),
        (2, 2),
        (3, 1),
    ]
    assert [row["accepted"] for row in undisturbed["rounds"]] == [4, 4, 4]


def test_there_are_at_least_25_points():
    assert len(set(fault_points.POINTS)) == len(fault_points.POINTS) >= 25


def test_an_unknown_point_is_refused():
    with pytest.raises(ValueError, match="must name a fault point, got 'commit'"):
        fault_points.arm("commit")


@pytest.mark.parametrize("points", BATCHES, ids=lambda points: points[0])
def test_kill_9_at_every_fault_point_changes_nothing(undisturbed, folder, points):
    results = lives(folder / "{}.db", folder / "{}", NUM_ROUNDS, *points)
    assert results == [undisturbed] * len(points)
    # Also at a later pass, where there is one in every run.
    again = [f"{point}:4" for point in points if point.startswith(("chunk", "finish", "upload"))]
    if again:
        results = lives(folder / "{}-4.db", folder / "{}-4", NUM_ROUNDS, *again)
        assert results == [undisturbed] * len(again)


NO_FILE = ("chunk.torn", "chunk.before-sync", "blob.written", "blob.synced", "blob.renamed")
"""Points that only a folder has."""
ELSEWHERE = [point for point in fault_points.POINTS if point not in NO_FILE]


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=[] if i % 5 == 0 else pytest.mark.soak)
        for i, point in enumerate(ELSEWHERE)
    ],
)
def test_kill_9_at_fault_points_on_postgresql_and_s3(undisturbed, postgresql, s3, point):
    assert lives(postgresql(), s3(), NUM_ROUNDS, point) == [undisturbed]


def kill_at_random(undisturbed, database, blobs, count: int) -> None:
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed of the kills: {seed}")
    [result] = lives(database, blobs, NUM_ROUNDS, "--random", count, seed, 0.15)[-1:]
    assert result == undisturbed


def test_kill_9_at_20_random_times_changes_nothing(undisturbed, places):
    kill_at_random(undisturbed, *places(), 20)


@pytest.mark.soak
@pytest.mark.parametrize("times", range(20))
def test_kill_9_at_400_random_times_changes_nothing(undisturbed, places, times):
    kill_at_random(undisturbed, *places(), 10)
