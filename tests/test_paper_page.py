"""docs/paper.md and the pages of results/ say what the committed runs say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from potluck.reproduction import paper
from potluck.simulation import read_run

ROOT = Path(__file__).parents[1]
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
