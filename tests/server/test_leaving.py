"""Devices that cannot train: rounds go on without them, and the run is not paused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation import Federation, UnitTrainer
from fleet import Fleet
from messages import check_in
from potluck.core import sample_cohort
from potluck.protocol import Eligibility, Wait
from potluck.server.rounds.enrolment import revoke
from potluck.server.rounds.leases import fail


def local(folder: Path) -> tuple[str, str]:
    return f"sqlite:///{folder / 'potluck.db'}", str(folder / "blobs")


def leave(fleet: Fleet, device: str, reason: str = "unsupported") -> None:
    fail(fleet.service, device, fleet.assign(device).assignment, reason)


def committed(fleet: Fleet) -> list[int]:
    return [row["accepted"] for row in fleet.service.history(fleet.run)]


@pytest.mark.parametrize(("selection", "reason"), [("open", "unsupported"), ("sampled", "no_data")])
def test_the_round_goes_on_at_once_without_a_device_that_cannot_train(places, selection, reason):
    settings = {"selection": selection, "minimum": 1.0, "population": 4, "attempts": 1}
    fleet = Fleet(*places(), count=4, **settings)
    fleet.service.tick()
    leave(fleet, fleet.devices[2], reason)
    others = [device for device in fleet.devices if device != fleet.devices[2]]
    for device in others:
        fleet.take_part(device)
    fleet.service.tick()  # no time has passed
    assert committed(fleet) == [3]
    fleet.round(others)
    assert committed(fleet) == [3, 3]
    assert fleet.service.status(fleet.run)["state"] == "running"
    fleet.service.close()


@pytest.mark.parametrize("selection", ["open", "sampled"])
@pytest.mark.parametrize("works", [False, True])
def test_the_round_goes_on_at_once_without_a_device_that_was_revoked(places, selection, works):
    settings = {"selection": selection, "minimum": 1.0, "population": 4, "attempts": 1}
    fleet = Fleet(*places(), count=4, **settings)
    fleet.service.tick()
    if works:
        fleet.assign(fleet.devices[2])
    revoke(fleet.service, fleet.devices[2], actor="test")
    others = [device for device in fleet.devices if device != fleet.devices[2]]
    fleet.round(others)  # no time has passed
    fleet.round(others)
    assert committed(fleet) == [3, 3]
    assert fleet.service.status(fleet.run)["state"] == "running"
    fleet.service.close()


def test_what_a_revoked_device_had_reported_counts(tmp_path):
    fleet = Fleet(*local(tmp_path), count=3, selection="sampled", minimum=1.0, population=3)
    fleet.service.tick()
    fleet.take_part(fleet.devices[0])
    revoke(fleet.service, fleet.devices[0], actor="test")
    fleet.round(fleet.devices[1:])
    assert committed(fleet) == [3]
    fleet.service.close()


def lapse(fleet: Fleet) -> None:
    """Let the round that is open run out of time."""
    id = (fleet.status()["open"] or {}).get("id")
    for _ in range(2):  # the selection, the reports
        if (fleet.status()["open"] or {}).get("id") == id:
            fleet.clock.pass_(650)
            fleet.service.tick()


@pytest.mark.parametrize("begins", [False, True])
def test_a_drawn_device_that_is_silent_twice_is_drawn_no_more_until_it_is_back(places, begins):
    settings = {"selection": "sampled", "minimum": 1.0, "population": 3, "attempts": 2}
    fleet = Fleet(*places(), count=3, **settings)
    fleet.service.tick()
    if begins:
        fleet.assign(fleet.devices[0])  # and is switched off
    for _ in range(2):
        for device in fleet.devices[1:]:
            fleet.take_part(device)
        lapse(fleet)
    for _ in range(2):
        fleet.round(fleet.devices[1:])
    assert committed(fleet) == [2, 2]
    status = fleet.service.status(fleet.run)
    assert (status["state"], status["left"]) == ("running", 1)
    assert isinstance(check_in(fleet.service, fleet.devices[0]), Wait)  # not in this round
    fleet.round(fleet.devices[1:])
    fleet.round()
    assert committed(fleet) == [2, 2, 2, 3]
    fleet.service.close()


def test_a_drawn_device_that_may_not_train_now_is_waited_for_twice_and_no_more(tmp_path):
    settings = {"selection": "sampled", "minimum": 1.0, "attempts": 1, "needs_charging": True}
    fleet = Fleet(*local(tmp_path), count=3, **settings)
    fleet.eligibility = charging = Eligibility(charging=True)
    fleet.service.tick()
    for _ in range(2):
        for device in fleet.devices[1:]:
            fleet.take_part(device)
        assert check_in(fleet.service, fleet.devices[0]).reason == "ineligible"
        lapse(fleet)
    check_in(fleet.service, fleet.devices[0])  # not charging still
    assert fleet.service.status(fleet.run)["left"] == 1
    fleet.round(fleet.devices[1:])
    check_in(fleet.service, fleet.devices[0], charging)  # on mains again
    fleet.round(fleet.devices[1:])
    fleet.round()
    assert committed(fleet) == [2, 2, 3]
    fleet.service.close()


def test_where_nobody_is_there_a_sampled_run_waits_and_is_not_paused(tmp_path):
    fleet = Fleet(*local(tmp_path), count=4, selection="sampled", goal=2, attempts=1)
    fleet.service.tick()
    for _ in range(9):
        lapse(fleet)
    status = fleet.service.status(fleet.run)
    assert (status["state"], status["open"], status["left"]) == ("running", None, 4)
    for device in fleet.devices:
        assert isinstance(check_in(fleet.service, device), Wait)
    fleet.service.tick()
    cohort = json.loads(fleet.service.status(fleet.run)["open"]["cohort"])
    fleet.round([fleet.devices[client] for client in cohort])
    assert committed(fleet) == [2]
    fleet.service.close()


def test_another_attempt_draws_anew(tmp_path):
    fleet = Fleet(*local(tmp_path), count=40, selection="sampled", goal=20, attempts=10)
    drawn = []
    for _ in range(3):
        fleet.service.tick()
        drawn.append(json.loads(fleet.service.status(fleet.run)["open"]["cohort"]))
        for client in drawn[-1]:
            check_in(fleet.service, fleet.devices[client])
        lapse(fleet)
    assert drawn[0] == sample_cohort(40, 20, seed=0, round=1).tolist()  # of the simulation
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    fleet.service.close()


@pytest.mark.parametrize("waits", [False, True])
def test_a_round_whose_slots_were_taken_ends_at_its_report_deadline(tmp_path, waits):
    fleet = Fleet(*local(tmp_path), count=4, minimum=0.5, report_seconds=4.0)
    fleet.service.tick()
    works = [fleet.assign(device) for device in fleet.devices]
    if waits:  # the server looks before they fail, or only afterwards
        fleet.service.tick()
    for device, work in zip(fleet.devices[1:], works[1:], strict=True):
        fail(fleet.service, device, work.assignment, "error")
    fleet.service.tick()
    fleet.clock.pass_(5)
    fleet.service.tick()
    assert fleet.status()["open"]["attempt"] == 2
    fleet.service.close()


@pytest.mark.parametrize("selection", ["open", "sampled"])
def test_a_device_whose_data_were_mended_is_counted_again(tmp_path, selection):
    fleet = Fleet(*local(tmp_path), count=3, selection=selection, minimum=1.0, population=3)
    fleet.service.tick()
    leave(fleet, fleet.devices[0])
    assert isinstance(check_in(fleet.service, fleet.devices[0]), Wait)  # not in this round
    for device in fleet.devices[1:]:
        fleet.take_part(device)
    fleet.service.tick()
    fleet.round()
    assert committed(fleet) == [2, 3]
    fleet.service.close()


@pytest.mark.parametrize("selection", ["open", "sampled"])
def test_without_any_device_the_run_waits_and_is_not_paused(tmp_path, selection):
    fleet = Fleet(*local(tmp_path), count=2, selection=selection, population=2, attempts=1)
    fleet.service.tick()
    for device in fleet.devices:
        leave(fleet, device)
    for _ in range(3):
        fleet.service.tick()
    status = fleet.service.status(fleet.run)
    assert (status["state"], status["open"], status["devices"]) == ("running", None, 2)
    assert isinstance(check_in(fleet.service, fleet.devices[0]), Wait)
    fleet.round(fleet.devices[:1])
    assert committed(fleet) == [1]
    fleet.service.close()


def test_a_failure_that_passes_is_a_strike_still(tmp_path):
    fleet = Fleet(
        *local(tmp_path), count=2, selection="sampled", population=2, minimum=1.0, attempts=1
    )
    fleet.service.tick()
    leave(fleet, fleet.devices[0], "out_of_memory")
    fleet.take_part(fleet.devices[1])
    fleet.service.tick()
    assert fleet.service.status(fleet.run)["state"] == "paused"
    fleet.service.close()


def test_a_fraction_is_one_of_the_devices_that_are_enrolled_when_a_round_opens(tmp_path):
    fleet = Fleet(*local(tmp_path), count=2, dim=4, goal_part=1.0)
    fleet.round()
    fleet.devices += [fleet.enrol(i) for i in (2, 3)]
    fleet.round(fleet.devices[:2])  # it had opened before
    assert committed(fleet) == [2, 2]
    fleet.round()
    assert committed(fleet) == [2, 2, 4]
    fleet.service.close()


@pytest.mark.parametrize(("part", "goal"), [(0.5, 2), (0.0, 1)])
def test_the_goal_of_a_fraction_is_that_of_the_simulation(tmp_path, part, goal):
    fleet = Fleet(*local(tmp_path), count=4, goal_part=part)
    fleet.service.tick()
    assert fleet.service.status(fleet.run)["open"]["goal"] == goal
    fleet.service.close()


def test_a_sampled_run_ends_though_one_device_is_revoked_and_another_switched_off(tmp_path):
    server = 'selection = "sampled"\npopulation = 4\nselection_seconds = 1.0\nreport_seconds = 1.0'
    with Federation(tmp_path, clients=4, rounds=6, server=server) as federation:
        done = [federation.join(k, UnitTrainer()) for k in range(4)]
        federation.until(lambda: federation.status()["version"] >= 1)
        [known] = [row for row in federation.service.devices(federation.run) if row["client"] == 3]
        federation.operator.post("revoke", device=known["id"])
        done[2].stop()
        federation.until(lambda: federation.status()["state"] != "running")
        assert federation.status()["state"] == "finished"
        for device in done[:2]:
            device.end()
            assert device.died is None
        assert "revoked" in str(done[3].died)
