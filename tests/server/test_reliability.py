"""The rows of the reliability table in small, with real processes. Full size: `make soak`."""

from __future__ import annotations

from pprint import pformat

import numpy as np
import pytest

from abandonment import abandon_rounds
from churn import slope
from disk_faults import FAULTS, break_disks, build_bad_disk, fill_disk, mount_small, unmount
from lost_answers import lose_answers
from orders import report_in_orders
from server_kills import kill_servers
from two_servers import kill_one_of_two


def test_a_server_that_is_killed_loses_and_doubles_nothing(tmp_path, seed):
    points = ("run.before-row", "chunk.torn", "commit.inside")
    found = kill_servers(tmp_path, devices=5, points=points, times=2, seed=seed)
    assert found["killed_at_points"] == len(points)
    assert found["holds"], pformat(found, width=200)


def test_a_disk_that_is_full_read_only_or_broken_corrupts_nothing(tmp_path, seed):
    library = build_bad_disk(tmp_path)
    if library is None:
        pytest.skip("there is no C compiler, or no Linux, to make a bad disk with")
    found = break_disks(tmp_path, library, devices=3, faults=FAULTS, seed=seed)
    assert found["holds"], pformat(found, width=200)


def test_a_server_on_a_full_file_system_goes_on_when_there_is_room(tmp_path, seed):
    small = tmp_path / "small"
    if not mount_small(small):
        pytest.skip("a small file system cannot be mounted here")
    try:
        found = fill_disk(tmp_path, small, devices=3, times=2, seed=seed)
    finally:
        unmount(small)
    assert found["holds"], pformat(found, width=200)


def test_a_submission_whose_answer_was_lost_is_answered_as_the_first_time(tmp_path):
    found = lose_answers(tmp_path, devices=3, rounds=2, evaluations=1)
    assert found["holds"], pformat(found, width=200)


def test_an_abandoned_round_changes_nothing_and_what_is_left_of_it_is_late(tmp_path):
    found = abandon_rounds(tmp_path, times=2)
    assert found["holds"], pformat(found, width=200)


def test_the_same_reports_make_the_same_models_in_any_order_at_two_servers(
    tmp_path, postgresql, seed
):
    found = report_in_orders(tmp_path, postgresql, devices=5, orders=2, processes=(2,), seed=seed)
    assert found["holds"], pformat(found, width=200)


def test_a_slope_is_found_under_noise_that_drifts():
    hours = np.linspace(0, 1, 400)
    for seed in range(20):
        dice = np.random.default_rng(seed)
        noise = np.zeros(400)
        for i in range(1, 400):
            noise[i] = 0.8 * noise[i - 1] + dice.normal(0, 0.3)
        assert slope(hours, 100 + 5.0 * hours + noise).low > 2.0  # 5 MB an hour are a leak
        flat = slope(hours, 100 + noise)
        assert flat.low < 1.0  # and none is none
        assert abs(flat.per_hour) < 2.0


def test_of_two_servers_on_one_database_one_is_killed_and_nothing_is_lost(
    tmp_path, postgresql, s3, seed
):
    found = kill_one_of_two(tmp_path, postgresql(), s3(), devices=4, times=1, seed=seed)
    assert found["holds"], pformat(found, width=200)
