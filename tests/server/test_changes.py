"""What decides no numbers is changed in a run that goes on: `potluck set`."""

import json

import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from federation import Federation
from fleet import Fleet
from messages import check_in
from potluck.cli.main import app
from potluck.core import RefusedError
from potluck.server.open_run import open_server
from potluck.server.process import Listen
from potluck.server.rounds.changes import change as change_in
from potluck.server.storage.database_tables import audit
from potluck.server.storage.stored_run import run_of


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=4, num_rounds=3, minimum=1.0)
    yield made
    made.service.close()


def change(fleet, **changes):
    return change_in(fleet.service, fleet.run, changes, actor="test")


def test_deadlines_change_in_an_open_round_too(fleet):
    fleet.service.tick()
    for device in fleet.devices:
        fleet.assign(device)
    fleet.service.tick()
    assert fleet.status()["open"]["state"] == "TRAINING"  # for 600 s
    other = fleet.open()  # another server of the same run, which is not told
    assert change(fleet, report_seconds=5.0) == {"server.report_seconds": [600.0, 5.0]}
    fleet.clock.pass_(6)
    fleet.service.tick()
    assert fleet.status()["open"]["attempt"] == 2
    assert 1.0 < check_in(other, fleet.devices[0]).lease_seconds <= 5.0
    other.close()


def test_goal_minimum_attempts_and_rounds_change(fleet):
    change(fleet, goal=2, minimum=0.5, attempts=1, **{"run.rounds": 1})
    fleet.service.tick()
    assert (fleet.status()["open"]["goal"], fleet.status()["open"]["minimum"]) == (2, 1)
    fleet.round(fleet.devices[:2])
    assert fleet.status()["state"] == "finished"
    change(fleet, rounds=2)
    fleet.service.tick()
    assert (fleet.status()["state"], fleet.status()["open"]["number"]) == ("running", 2)
    fleet.assign(fleet.devices[0])
    fleet.clock.pass_(10_000)
    fleet.service.tick()
    fleet.clock.pass_(10_000)
    fleet.service.tick()
    assert fleet.status()["state"] == "paused"  # after one attempt


def test_bounds_and_evaluations_change(fleet):
    fleet.service.tick()
    far = np.full(4, 1e4, np.float32)  # of a norm above 1e4
    change(fleet, max_norm=1e6, evaluate_every=2, federated_every=1)
    for device in fleet.devices:
        fleet.send(device, fleet.assign(device).assignment, far)
    fleet.service.tick()
    assert fleet.status()["open"]["kind"] == "evaluate"
    assert fleet.service.pending_evaluations(fleet.run) == [(0, 0)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"run.seed": 3}, "must be one that decides no numbers of the model, got 'run.seed'"),
        ({"server.selection": "sampled"}, "must be one that decides no numbers"),
        ({"server.needs_idle": True}, "must be one that decides no numbers"),
        ({"nonsense": 3}, "got 'nonsense'. Set one of run.evaluate_every, run.rounds, server."),
        ({"goal": 2, "minimum": 2.0}, "server.minimum must be right, got 2.0: .*less than or"),
        ({"goal": 2, "rounds": 0}, "run.rounds must be right, got 0: .*Nothing was changed"),
        ({"report_seconds": "soon"}, "server.report_seconds must be right, got 'soon'"),
    ],
)
def test_what_may_not_be_changed_is_named_and_nothing_is(fleet, changes, told):
    with fleet.service.database.read() as db:
        before = run_of(db, fleet.run)
    with pytest.raises(RefusedError, match=told):
        change(fleet, **changes)
    with fleet.service.database.read() as db:
        assert run_of(db, fleet.run) == before


def test_a_changed_run_is_served_again_with_its_old_file_or_the_new_one(tmp_path):
    def again(*overrides):
        server = open_server(served.file, list(overrides), tmp_path / "server", Listen(port=0))
        server.close()
        return server.served

    with Federation(tmp_path, clients=2, rounds=7, server="report_seconds = 60.0") as served:
        words = ["set", "server.report_seconds=90", "rounds=9", "attempts=7"]
        result = CliRunner().invoke(app, [*words, "--home", str(tmp_path / "server")])
        assert sorted(result.output.splitlines()) == [
            "run.rounds = 9, and was 7",
            "server.attempts = 7, and was 3",
            "server.report_seconds = 90, and was 60.0",
        ]
        query = select(audit.c.actor, audit.c.detail).where(audit.c.action == "set")
        with served.service.database.read() as db:
            actor, detail = db.execute(query).one()
        assert (actor, json.loads(detail)["changes"]["run.rounds"]) == ("admin", [7, 9])
        result = CliRunner().invoke(app, ["set", "seed=3", "--home", str(tmp_path / "server")])
        assert result.exit_code == 1
    run = again()
    assert sorted(run.kept) == [
        "run.rounds = 9 in the run, and not 7",
        "server.attempts = 7 in the run, and not 3",
        "server.report_seconds = 90.0 in the run, and not 60.0",
    ]
    assert (run.settings.report_seconds, run.settings.num_rounds) == (90.0, 9)
    assert again("server.report_seconds=90", "run.rounds=9", "server.attempts=7").kept == []
    with pytest.raises(RefusedError, match=r"report_seconds = 90.0 and not 30.0\. .*`potluck set`"):
        again("server.report_seconds=30.0")
