"""The speed benchmark still runs: Potluck and the hand-written loop, at a size of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
RUN = Path(__file__).parents[1] / "benchmarks/speed/run.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    command = [sys.executable, RUN, "--tiny", "--repeat", "1", "--folder", folder, "--out", folder]
    command += ["--parts", "c,d-natural,population", "--contenders", "potluck,bare"]
    command += ["--variants", "vmap;loop;1;1 trimmed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()


def test_all_contenders_do_the_same_work_and_end_with_the_same_model(result):
    for part, num_runs in (("c", 3), ("d-natural", 3)):
        rows = result[0]["parts"][part]["rows"]
        assert len(rows) == num_runs
        for row in rows:
            assert "reason" not in row
            assert row["same_counts"]
            assert row["difference"] < 1e-3
            assert row["peak_megabytes"] > 0
            assert row["seconds_a_round"] > 0


def test_the_table_names_every_contender(result):
    for words in ("| potluck, vmap |", "| bare, 1 trimmed |", "**Population**", "seed 1"):
        assert words in result[1]
