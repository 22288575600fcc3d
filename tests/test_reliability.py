"""The rows of the reliability table in small, with real processes. Full size: `make soak`."""

from __future__ import annotations

import random

import pytest

from server_kills import kill_servers


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")
    return seed


def test_a_server_that_is_killed_loses_and_doubles_nothing(tmp_path, seed):
    points = ("run.before-row", "chunk.torn", "enrol.inside", "abandon.inside", "commit.inside")
    found = kill_servers(tmp_path, devices=5, points=points, times=3, seed=seed)
    assert found["killed_at_points"] == len(points)
    assert found["holds"], found
