"""docs/cli.md is what the commands say with --help."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_equals_the_help():
    expected = runpy.run_path(str(DOCS / "cli_reference.py"))["reference"]()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == expected, (
        "run `python docs/cli_reference.py`"
    )
