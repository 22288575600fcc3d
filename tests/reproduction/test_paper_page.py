"""docs/paper.md and the pages of results/ say what the committed runs say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from potluck.reproduction import paper
from potluck.simulation import read_run
from potluck.simulation.runs.report import measure, rounds_to_target

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- (\w+) -->\n\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)

spec = importlib.util.spec_from_file_location("paper_tables", ROOT / "docs/paper_tables.py")
assert spec is not None
assert spec.loader is not None
paper_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper_tables)


def test_every_table_and_figure_has_its_block():
    names = {name for name, _ in BLOCKS} - {"table2_after_first"}
    assert names == set(paper.TITLES) - {"figure2"}  # table 2's runs


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_block_is_what_the_committed_runs_give(name, block):
    assert block == paper_tables.table(name), "run `python docs/paper_tables.py`"


def test_every_committed_run_is_one_of_the_papers_cells():
    known = {cell.name for what in paper.TITLES if what != "figure1" for cell in paper.cells(what)}
    paths = sorted((ROOT / "results/runs").rglob("rounds.jsonl"))
    assert paths
    for path in paths:
        manifest = read_run(path.parent).manifest
        name, rate, seed = path.parent.parts[-3:]
        assert name in known
        assert manifest["name"] == name
        assert rate == f"lr-{manifest['experiment']['algorithm']['client_lr']:.4g}"
        assert seed == f"seed-{manifest['seed']}"


def test_federated_sgd_needs_46_times_the_rounds_to_what_plain_averaging_has_after_41():
    """Said in the README too. Both count first characters, with which neither has 54 % in 41."""
    runs = ROOT / "results/runs"
    sgd = measure(read_run(runs / "shakespeare-lstm-role-fedsgd-c0.1/lr-4.7/seed-1"))
    for seed in (1, 2, 3):
        plain = measure(read_run(runs / f"shakespeare-lstm-role-e5-b10-c0.1/lr-1.47/seed-{seed}"))
        accuracy = max(score for number, score in plain.curve if number <= 41)
        assert 0.5305 < accuracy < 0.5335
        rounds = rounds_to_target(sgd.curve, accuracy)
        assert rounds is not None
        assert 1881.5 < rounds < 1903.5
        assert round(rounds / 41) == 46
