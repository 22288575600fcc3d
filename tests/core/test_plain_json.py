"""Files are JSON: one writer, and no NaN or Infinity in any line that it writes."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core.plain_json import read_results, to_json

SOURCE = Path(__file__).parents[2] / "src" / "potluck"
WRITERS = {"core/plain_json.py", "protocol/strict_json.py"}  # both with allow_nan=False
NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([np.float32("nan"), np.int64(3), np.bool_(True)])
)
VALUES = st.recursive(
    NUMBERS | st.text() | st.none() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_nothing_else_writes_json(path):
    if path.relative_to(SOURCE).as_posix() in WRITERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            assert ast.unparse(node) not in ("json.dumps", "json.dump", "dumps", "JSONEncoder")


OUTSIDE = [
    path
    for folder in ("benchmarks", "docs", "examples")
    for path in sorted((SOURCE.parents[1] / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: p.name)
def test_what_benchmarks_and_pages_write_is_json_too(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            assert "allow_nan=False" in [ast.unparse(keyword) for keyword in node.keywords]


@given(VALUES)
def test_whatever_is_written_is_json(value):
    json.loads(to_json(value), parse_constant=pytest.fail)


def test_numbers_of_numpy_are_numbers_and_what_is_no_number_is_null():
    value = {
        "count": np.int64(3), np.int32(7): np.array([1.0, math.nan]), "inf": (math.inf, 1.5),
        "flag": np.bool_(True), "zero": np.array(2),
    }  # fmt: skip
    assert json.loads(to_json(value)) == {
        "count": 3, "7": [1.0, None], "inf": [None, 1.5], "flag": True, "zero": 2,
    }  # fmt: skip


def test_scores_without_a_result_are_left_out_when_read():
    assert read_results(to_json({"loss": math.nan, "accuracy": 0.5})) == {"accuracy": 0.5}
