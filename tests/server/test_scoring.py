"""Metrics of a federated evaluation: which numbers count, and how far one device's can go."""

import json

import pytest

from fleet import Fleet
from potluck.config.plan import Plan, PlannedTask, write_plan
from potluck.core import RefusedError
from potluck.server.rounds.scoring import checked_sums, measured

TASK = PlannedTask(model="logistic", num_classes=10)
PLAN = json.dumps(write_plan(Plan.model_validate({"task": TASK, "algorithm": {"client_lr": 0.1}})))


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"accuracy": (11.0, 10.0)}, "from 0 to 1"),
        ({"accuracy": (-1e-9, 10.0)}, "from 0 to 1"),
        ({"loss": (1e27, 10.0)}, "1e\\+15"),
        ({"loss": (-1e30, 1e9)}, "1e\\+15"),
        ({"loss": (float("nan"), 1.0)}, "got nan"),
        ({"accuracy": (1.0, 2.0**53 - 1)}, "at most 1000000000"),
        ({"accuracy": (0.0, 0.0)}, "above 0"),
        ({"mae": (0.5, 1.0)}, "of the plan"),
        ({}, "of the plan"),
    ],
)
def test_a_number_that_cannot_be_right_is_refused(metrics, told):
    with pytest.raises(RefusedError, match=told) as refused:
        checked_sums(metrics, PLAN)
    assert refused.value.code == "bounds"


def test_names_that_are_not_the_plans_are_left_out():
    sent = {f"made_up_{n}": (1.0, 1.0) for n in range(31)} | {"accuracy": (3.0, 4.0)}
    assert checked_sums(sent, PLAN) == {"accuracy": (3.0, 4.0)}


def test_where_no_plan_names_them_metrics_count_that_most_devices_reported():
    mine = {f"made_up_{n}": (1.0, 1.0) for n in range(32)}
    assert checked_sums(mine, '{"task": "none"}') == mine
    found = measured([mine, {"ours": (1.0, 2)}, {"ours": (2.0, 2)}])
    assert found.means == {"ours": 0.75}


def test_one_devices_count_weighs_five_medians_at_most_and_the_median_stays():
    honest = [{"accuracy": (0.9 * n, n)} for n in (10, 12, 14)]
    found = measured([*honest, {"accuracy": (0.0, 10**9)}])
    weights = 10 + 12 + 14, 5 * 12  # the lower median of 10, 12, 14 and 10⁹ is 12
    assert found.means["accuracy"] == pytest.approx(0.9 * weights[0] / sum(weights))
    assert found.medians["accuracy"] == pytest.approx(0.9)
    assert measured(honest).means["accuracy"] == pytest.approx(0.9)


def test_one_devices_loss_moves_the_mean_and_not_the_median(places):
    fleet = Fleet(*places())
    fleet.service.tick()
    works = [fleet.assign(device).assignment for device in fleet.devices]
    with pytest.raises(RefusedError, match="loss must be within"):
        fleet.send(fleet.devices[3], works[3], loss=1e27)
    for device, work, loss in zip(fleet.devices, works, (0.5, 0.7, 0.6, 1e15), strict=True):
        fleet.send(device, work, loss=loss)
    fleet.service.tick()
    [row] = fleet.service.history(fleet.run)
    assert row["loss"] == pytest.approx(2.5e14)
    assert row["median_loss"] == pytest.approx(0.65)
    fleet.service.close()
