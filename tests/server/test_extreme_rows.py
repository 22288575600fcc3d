"""Whatever numbers the database holds, everything that shows them answers."""

import json
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import update
from typer.testing import CliRunner

from potluck.cli.main import app
from potluck.protocol import Evaluation
from potluck.server.console import Lines
from potluck.server.dashboard.render import Renderer
from potluck.server.storage.database_tables import devices, evaluations, ledger, reports, rounds
from remote import Served

numbers = st.floats(width=64) | st.sampled_from([1e27, -1e27, 1e300, -1e300, 5e-324, 2.0**53])
finite = numbers.filter(math.isfinite)
whole = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**53, 2**63 - 1])
names = st.sampled_from(["accuracy", "loss", "mae", "odd <b>"])
scores = st.dictionaries(names, finite | whole | st.just(10**400) | st.none()).map(json.dumps)
HELD = (
    (ledger, {"loss": numbers | st.none(), "median_loss": numbers | st.none(), "weight": finite}),
    (ledger, {"uplink_bytes": whole, "downlink_bytes": whole, "committed_ms": whole}),
    (reports, {"loss": finite, "weight": finite, "num_steps": whole}),
    (rounds, {"opened_ms": whole, "closed_ms": whole, "report_deadline_ms": whole}),
    (devices, {"seen_ms": whole, "enrolled_ms": whole, "revoked_ms": whole | st.none()}),
    (evaluations, {"metrics": scores, "medians": scores | st.none()}),
)
LOWERED = {
    "lowered": st.integers(1, 2**31 - 1),
    "lowered_round": st.integers(1, 2**31 - 1) | st.none(),
    "lowered_share": numbers | st.none(),
}
HELD += ((devices, LOWERED),)
FAR = (
    dict.fromkeys(HELD[0][1], 1e27),
    *(dict.fromkeys(columns, 2**63 - 1) for _, columns in HELD[1:5]),
    {"metrics": '{"accuracy": 1e30, "loss": -1e27}', "medians": "{}"},
    {"lowered": 7, "lowered_round": 1, "lowered_share": 1e27},
)


@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_everything_that_shows_numbers_answers_whatever_they_are(tmp_path, places, count):
    with Served(tmp_path, places=places(), count=2, federated_every=1, num_rounds=1) as served:
        made = [served.device(), served.device()]
        for device in made:
            served.until(lambda told: told["open"] and told["open"]["kind"] == "train")
            device.take_part(4)
        for device in made:
            served.until(lambda told: told["open"] and told["open"]["kind"] == "evaluate")
            place = {"assignment": device.assigned().assignment, "round": 1, "attempt": 1}
            device.ask("evaluation", Evaluation(**place, metrics={"loss": (1.0, 2)}))
        served.until(lambda told: told["state"] == "finished")
        service, home = served.run.service, ["--home", str(served.home.folder)]

        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
        @example(held=FAR)
        @given(held=st.tuples(*(st.fixed_dictionaries(columns) for _, columns in HELD)))
        def answers(held):
            with service.database.write() as db:
                for (table, _), values in zip(HELD, held, strict=True):
                    db.execute(update(table).values(values))
            is_here = held[4]["revoked_ms"] is None
            renderer = Renderer(service, served.run.id)
            assert "Curves" in renderer.page(renderer.snapshot())
            assert Lines(service, served.run.id).poll()
            served.until(lambda _: "potluck_round 1" in served.operator.text("metrics"))
            for command in ("status", "devices", "metrics"):
                result = CliRunner().invoke(app, [command, *home])
                assert result.exit_code == 0, result.output
                assert command != "status" or is_here == ("counts for less" in result.output)
            assert len(served.operator.fetch("export")) > 16

        answers()
