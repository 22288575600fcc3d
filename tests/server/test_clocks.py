"""A clock that was wrong once does not stay ahead for ever, neither a server's nor a device's."""

import pytest

from federation import Federation, UnitTrainer
from fleet import Fleet
from messages import check_in, device_of
from potluck.config.algorithm_section import build_algorithm
from potluck.core import RefusedError
from potluck.device.folder import Home
from potluck.server import Service
from potluck.server.rounds.check_in import wait
from potluck.server.rounds.enrolment import claim_sequences, enrol, issue_tokens
from potluck.server.storage.common_time import EARLIEST_MS
from swarm import PatientClock

YEARS = 4 * 365 * 86_400


def fleet_of(places, **settings):
    return Fleet(*places(), count=2, minimum=0.5, **settings)


def is_right(service, clock):
    return abs(service.time.now() - clock.wall_ms()) < 1000


def test_a_server_that_was_started_years_ahead_is_right_after_its_next_start(places):
    fleet = fleet_of(places)
    fleet.clock.jump(YEARS)  # this machine's battery was empty
    fleet.service.close()
    fleet.service = fleet.open()
    fleet.service.tick()
    first, second = fleet.devices
    work = fleet.assign(first)
    claim_sequences(fleet.service, [(first, 5)])
    token, late = (issue_tokens(fleet.service, fleet.run, actor="test")[0] for _ in range(2))
    fleet.service.database.close()  # as if killed
    fleet.clock.jump(-YEARS)
    fleet.service = fleet.open()
    for _ in range(2):
        fleet.clock.pass_(3)
        fleet.service.tick()
    assert is_right(fleet.service, fleet.clock)
    assert check_in(fleet.service, second).lease_seconds <= 600
    fleet.send(first, work.assignment)
    assert wait(fleet.service, first, "noted").retry_after_seconds < 800
    fleet.clock.pass_(121 + 600)
    fleet.service.tick()
    fleet.clock.pass_(600)
    fleet.service.tick()
    assert fleet.status()["version"] == 1  # at a deadline, not after four years
    assert enrol(fleet.service, token, bytes([9]) * 32).client == 2
    fleet.clock.pass_(8 * 86_400)
    with pytest.raises(RefusedError, match="not expired"):
        enrol(fleet.service, late, bytes([8]) * 32)
    seen = device_of(fleet.service, first).seen_ms
    assert seen <= fleet.clock.wall_ms()
    fleet.round(fleet.devices)
    assert wait(fleet.service, first, "noted").retry_after_seconds < 800
    assert [row["number"] for row in fleet.service.history(fleet.run)] == [1, 2]
    fleet.service.close()


def test_a_round_in_which_the_clock_was_set_says_nothing_of_the_length_of_rounds(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=2)
    fleet.round()
    fleet.service.tick()
    works = [fleet.assign(device) for device in fleet.devices]
    fleet.service.close()
    fleet.clock.jump(YEARS)
    fleet.service = fleet.open()
    fleet.service.tick()
    for device, work in zip(fleet.devices, works, strict=True):
        fleet.send(device, work.assignment)
    fleet.service.tick()
    assert fleet.status()["version"] == 2
    fleet.take_part(fleet.devices[0])
    assert wait(fleet.service, fleet.devices[0], "noted").retry_after_seconds <= 120 + 600 + 10
    fleet.service.close()


def test_a_leader_follows_a_clock_that_was_set_ten_minutes_ago_and_others_follow_it(places):
    fleet = fleet_of(places)
    other = fleet.open()
    fleet.service.tick()
    fleet.clock.jump(-86_400)
    for _ in range(7):
        assert fleet.service.tick()
        assert not other.tick()
        assert not is_right(fleet.service, fleet.clock)
        fleet.clock.pass_(99)
        fleet.service.tick()
        other.tick()
    fleet.clock.pass_(99)
    assert fleet.service.tick()
    other.tick()
    assert is_right(fleet.service, fleet.clock)
    assert is_right(other, fleet.clock)
    other.close()
    fleet.service.close()


def test_a_machine_without_a_clock_goes_on_from_the_last_time(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=2)
    fleet.service.tick()
    before = fleet.service.time.now()
    token = issue_tokens(fleet.service, fleet.run, actor="test")[0]
    fleet.service.close()
    fleet.clock.wall = EARLIEST_MS - YEARS
    fleet.service = Service.open(fleet.url, fleet.blobs, build=build_algorithm, clock=fleet.clock)
    fleet.service.tick()
    assert 0 <= fleet.service.time.now() - before < 1000
    fleet.clock.pass_(6 * 86_400)
    assert enrol(fleet.service, token, bytes([9]) * 32).client == 2
    fleet.service.close()


def test_a_device_that_counted_from_a_clock_ahead_and_loses_its_number_goes_on(tmp_path):
    server = "population = 1\ngoal = 1\nattempts = 100000\n"
    server += "selection_seconds = 0.5\nreport_seconds = 2.0"
    with Federation(tmp_path, clients=1, rounds=100_000, server=server) as served:
        device = served.join(0, UnitTrainer())
        numbers = []
        for years in (60, 0, 0):
            device.stop()
            (device.folder / "sequence").unlink()
            clock = PatientClock()
            clock.skew_ms = years * 365 * 86_400_000
            device = served.again(device, clock)
            served.until(lambda device=device: device.count("accepted") or device.died)
            assert device.died is None
            numbers.append(int((device.folder / "sequence").read_text()))
        assert numbers == sorted(numbers)


def test_numbers_double_as_far_as_there_are_any(tmp_path):
    home = Home(tmp_path)
    home.next_sequence(1_000)
    home.double_sequence()
    assert home.next_sequence(1) == 2_001
    home.next_sequence(2**53 - 10)
    home.double_sequence()
    assert home.next_sequence(1) == 2**53 - 9
    home.close()
