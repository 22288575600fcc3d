"""More than 150 mistakes of users: each is refused, or told, in words that are for users.

`python benchmarks/errors/run.py` makes the same ones and writes what is read into audit.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "errors"))
from run import AREAS  # noqa: E402
from watched import found_in, see  # noqa: E402

sys.modules.pop("run")  # other benchmarks have one
sys.path.remove(str(ROOT / "benchmarks" / "errors"))


@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.area)
def test_every_mistake_is_told_in_words_for_users(area, tmp_path):
    wrong = []
    for number, mistake in enumerate(area.all):
        folder = tmp_path / str(number)
        folder.mkdir()
        seen = see(mistake, folder)
        if seen.faults:
            wrong.append((mistake.what, *seen))
    assert not wrong


def test_the_mistakes_are_many_and_the_page_shows_them_all():
    page = (ROOT / "benchmarks" / "errors" / "audit.md").read_text(encoding="utf-8")
    names = [mistake.what for area in AREAS for mistake in area.all]
    assert len(names) >= 150
    assert [name for name in names if f"- **{name}**: " not in page] == []


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "ValueError: _build() got an unexpected keyword argument",
        "TypeError: <lambda>() takes 1 positional argument but 2 were given",
        "error: 1 validation error for Enrol",
        "DataError: cannot use <Client object at 0x7f00aa11>",
    ],
)
def test_words_that_are_not_for_users_are_found(line):
    assert found_in(line)
