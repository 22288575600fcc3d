"""The rounds of a served run, on SQLite and on PostgreSQL, with devices that send fingerprints."""

import numpy as np
import pytest

from fleet import Fleet


@pytest.fixture
def fleet(database_url, tmp_path):
    fleet = Fleet(database_url, tmp_path / "blobs")
    yield fleet
    fleet.service.close()


def test_a_round_adds_the_mean_of_its_reports_to_the_model(fleet):
    fleet.round()
    assert fleet.status()["version"] == 1
    assert fleet.weights().tolist() == [0.25] * 4
    fleet.round()
    assert fleet.weights().tolist() == [0.5] * 4
    assert [row["number"] for row in fleet.service.history(fleet.run)] == [1, 2]
    assert fleet.service.verify_audit() is None
