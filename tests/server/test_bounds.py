"""What one report can move: bounds that follow the others', by hand and in served runs."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from fleet import Fleet
from potluck.server import RoundSettings
from potluck.server.dashboard.render import Renderer
from potluck.server.rounds import audit_check
from potluck.server.rounds.bounds import (
    FAR_TIMES,
    Weighed,
    counted,
    limits_of,
    read_lowered,
    shortened,
)
from potluck.server.storage.database_tables import audit, reports

SETTINGS = RoundSettings(num_rounds=1)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "bounds"))
sys.modules.pop("run", None)  # other benchmarks have one
import run as benchmark  # noqa: E402

sys.modules.pop("run")
sys.path.pop(0)


def weights_of(reports, earlier=()):
    limits = limits_of(reports, earlier, SETTINGS)
    return [count.weight for count in counted(reports, limits)]


def test_a_weight_counts_for_five_medians_and_a_pull_for_two():
    usual = [Weighed(10.0, 1.0, 0.0)] * 8
    assert weights_of([*usual, Weighed(1e6, 0.1, 0.0)]) == [10.0] * 8 + [50.0]
    assert weights_of([*usual, Weighed(10.0, 4.0, 0.0)]) == [10.0] * 8 + [5.0]  # 5 · 4 = 2 · 10 · 1
    [*_, far] = weights_of([*usual, Weighed(10.0, 1000.0, 0.0)])
    assert far == pytest.approx(20.0 / 1000.0 * FAR_TIMES * 20.0 / 10_000.0)
    assert weights_of([*usual, Weighed(10.0, 1.0, 1e9)]) == [10.0] * 9  # nobody else has any
    wide = [Weighed(10.0, 1.0, 1.0)] * 8
    assert weights_of([*wide, Weighed(10.0, 1.0, 4.0)]) == [10.0] * 8 + [5.0]


def test_the_median_pull_is_of_earlier_rounds_too():
    before = [Weighed(1.0, 1.0, 0.0)] * 49
    assert weights_of([Weighed(1.0, 8.0, 0.0)], before) == [0.25]
    limits = limits_of([Weighed(1.0, 8.0, 0.0)], before, SETTINGS)
    mean = shortened(np.array([8.0, 0.0, 100.0], np.float32), 2, limits)
    assert mean.tolist() == [3.0, 0.0, 100.0]  # three medians; of the statistics there is none


usual = st.builds(Weighed, st.floats(1.0, 5.0), st.floats(0.5, 0.9), st.just(0.0))


@given(st.lists(usual, min_size=1, max_size=20), st.randoms())
def test_what_is_usual_counts_as_it_is_in_any_order(them, random):
    near = [Weighed(1.0, report.norm, 0.0) for report in them]
    assert weights_of(near) == [1.0] * len(near)
    lone = Weighed(1e6, 1e4, 1.0)
    shuffled = random.sample(them, len(them))
    assert sorted(weights_of([*them, lone])) == sorted(weights_of([lone, *shuffled]))


@given(
    st.lists(usual, min_size=3, max_size=20),
    st.floats(1e-9, 1e9),
    st.floats(0.0, 1e9),
)
def test_no_report_has_more_than_two_usual_pulls_or_five_weights(them, weight, norm):
    [*others, mine] = weights_of([*them, Weighed(weight, norm, 0.0)])
    assert 0.0 < mine <= min(weight, 5 * max(r.weight for r in them)) * (1 + 1e-9)
    assert mine * norm <= 2 * max(r.weight * r.norm for r in them) * (1 + 1e-9)
    assert all(map(math.isfinite, others))


def hostile_round(fleet, order, weight=1e4, norm=9e3):
    """A round in which device 0 asks for all that it can."""
    fleet.service.tick()
    works = [fleet.assign(device).assignment for device in fleet.devices]
    for k in order:
        vector = np.eye(fleet.dim, dtype=np.float32)[k]
        asked = {"weight": weight} if k == 0 else {}
        sent = vector * np.float32(norm) if k == 0 else vector
        fleet.send(fleet.devices[k], works[k], sent, **asked)
    fleet.service.tick()


def test_a_hostile_report_moves_little_is_named_everywhere_and_is_the_same_after_a_restart(
    places, caplog
):
    digests = []
    for order in (range(10), reversed(range(10))):
        fleet = Fleet(*places(), count=10)
        with caplog.at_level(logging.WARNING, "potluck.server"):
            hostile_round(fleet, order)
        first = fleet.weights()
        assert first[0] < 0.01 < first[1:].min()
        fleet.service.close()
        fleet.service = fleet.open()
        hostile_round(fleet, range(10), weight=1.0, norm=3.0)
        assert fleet.weights()[0] - first[0] == pytest.approx(2 / (9 + 2 / 3), rel=1e-5)
        digests.append(fleet.weights().tobytes())
        assert [r.getMessage() for r in caplog.records] == ["alarm"]
        caplog.clear()
        with fleet.service.database.read() as db:
            [named] = read_lowered(db, fleet.run)
        assert (named["id"], named["lowered"], named["lowered_round"]) == (fleet.devices[0], 2, 2)
        assert named["lowered_share"] == pytest.approx(3 / 12)
        with fleet.service.database.read() as db:
            query = select(audit.c.detail).where(audit.c.action == "lowered")
            told = [json.loads(text)["most"][0] for text in db.scalars(query)]
            kept = list(db.scalars(select(reports.c.counted).where(reports.c.counted.is_not(None))))
        assert [(one["device"], one["alarm"]) for one in told] == [
            (fleet.devices[0], True),
            (fleet.devices[0], False),
        ]
        assert [one["counted"] for one in told] == kept
        assert (
            "counted for less" in Renderer(fleet.service, fleet.run).snapshot().sections["devices"]
        )
        assert audit_check.check(fleet.service) is None
        fleet.service.close()
    assert digests[0] == digests[1]


def test_a_round_of_two_raises_no_alarm_where_a_round_of_three_does(places):
    for count in (2, 3):
        fleet = Fleet(*places(), count=count)
        hostile_round(fleet, range(count))
        with fleet.service.database.read() as db:
            [named] = read_lowered(db, fleet.run)
        alarms = fleet.service.status(fleet.run)["alarms"]
        assert (named["is_alarm"], alarms) == (count == 3, count - 2)
        fleet.service.close()


def test_a_round_of_one_report_moves_three_usual_norms(places):
    fleet = Fleet(*places(), count=4, goal=1)
    for device in fleet.devices[1:]:
        fleet.round([device])
    before = fleet.weights()
    fleet.service.tick()
    hostile = fleet.devices[0]
    fleet.send(hostile, fleet.assign(hostile).assignment, fleet.vector(hostile) * np.float32(9e3))
    fleet.service.tick()
    assert np.linalg.norm(fleet.weights() - before) == pytest.approx(3.0)
    fleet.service.close()


def test_one_hostile_device_of_ten_costs_less_than_two_points_and_is_named():
    clients = benchmark.Clients(benchmark.experiment_of("digits", "logistic", benchmark.IID))
    honest = benchmark.hostile(clients, rounds=8)
    assert honest["named"] == []
    for attack in (benchmark.flipped, benchmark.own_flipped):
        found = benchmark.hostile(clients, attack, rounds=8)
        assert found["named"] == [0]
        assert found["accuracy"] > honest["accuracy"] - 0.02
