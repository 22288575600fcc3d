"""Write the tables of docs/paper.md from the committed runs: `python docs/paper_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from potluck.models.task_metrics import AFTER_FIRST
from potluck.reproduction import interpolation, paper
from potluck.reproduction.comparison import HEADER, LOSS_HEADER, gather, loss_rows, rows
from potluck.reproduction.grid import Grid
from potluck.simulation.runs.report import markdown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"


def table(what: str) -> str:
    """The table of one name, from `results/`; with "_after_first", without first characters."""
    if what == "figure1":
        path = ROOT / "results" / what / "lines.json"
        found = interpolation.load(path, interpolation.PAPER)
        return markdown(interpolation.HEADER, interpolation.rows(found))
    what, _, other = what.partition("_")
    kept = ROOT / "results" / "runs"
    grid = Grid(cells=paper.cells(what), runs=kept, copies=kept, experiments=ROOT / "experiments")
    if what in ("figure3", "figure8"):
        return markdown(LOSS_HEADER, loss_rows(gather(grid)))
    return markdown(HEADER, rows(gather(grid, AFTER_FIRST if other else None)))


def written(text: str) -> str:
    """The page with every block between `<!-- name -->` and `<!-- end -->` made anew."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- {match[1]} -->\n\n{table(match[1])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}")
