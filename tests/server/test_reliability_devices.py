"""The rows of the reliability table that devices, clocks and lines are about, in small."""

from __future__ import annotations

import random
from pprint import pformat

from bad_weather import STORM, weather
from churn import churn
from clock_jumps import JUMPS, jump_clocks
from device_kills import kill_devices


def test_devices_that_are_killed_delay_no_round_and_report_once(tmp_path, seed):
    found = kill_devices(tmp_path, slots=7, times=1, seed=seed, within_seconds=5.0)
    assert found["holds"], pformat(found, width=200)
    assert found["closed_in_time"], found


def test_clocks_that_jump_move_no_deadline_and_lock_nobody_out(tmp_path, seed):
    jumps = random.Random(seed).sample(JUMPS, 4)
    found = jump_clocks(tmp_path, devices=4, jumps=jumps, seed=seed, within_seconds=4.0)
    assert found["holds"], pformat(found, width=200)
    assert found["closed_in_time"], found


def test_a_bad_line_ends_every_round_in_time(tmp_path, seed):
    storm = STORM._replace(latency=(0.0, 0.2), resets=0.15, half_open=0.02)
    found = weather(
        tmp_path, storm, devices=5, rounds=3, seconds=8.0, seed=seed, within_seconds=10.0
    )
    assert found["holds"], pformat(found, width=200)
    assert found["closed_in_time"], found


def test_devices_that_come_and_go_leave_nothing_behind(tmp_path, seed):
    found = churn(tmp_path, devices=8, part=4.0, minutes=0.25, seed=seed, every_seconds=0.5)
    assert found["holds"], pformat(found, width=200)
    assert found["left_and_came_again"] >= 5
    # 15 s tell nothing of an hour; but a descriptor lost with every life would be seen.
    assert found["descriptors"][1] < 100
