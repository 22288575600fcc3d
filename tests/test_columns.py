"""Columns as pandas gives them come down to numbers, truth values or text, with their holes."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from potluck.tasks.columns import read_column


@pytest.mark.parametrize(
    ("values", "kind", "dtype", "expected"),
    [
        ([1, 2], "number", np.int64, [1, 2]),
        ([1, None], "number", np.float64, [1.0, None]),
        (pd.array([1, None], dtype="Int64"), "number", np.float64, [1.0, None]),
        (pd.array([1, None], dtype="int64[pyarrow]"), "number", np.float64, [1.0, None]),
        (pd.array([2**63, 1], dtype="uint64"), "number", np.uint64, [2**63, 1]),
        (np.array([1, 2], np.float16), "number", np.float64, [1.0, 2.0]),
        (pd.Categorical([3, None, 1]), "number", np.float64, [3.0, None, 1.0]),
        (pd.Categorical([True, None]), "boolean", np.bool_, [True, None]),
        (pd.Categorical(["y", None], categories=["y", "n"]), "text", np.str_, ["y", None]),
        ([True, None], "boolean", np.bool_, [True, None]),
        (pd.array([True, None], dtype="boolean"), "boolean", np.bool_, [True, None]),
        (["a", None], "text", np.str_, ["a", None]),
        (pd.array(["a", None], dtype="string[pyarrow]"), "text", np.str_, ["a", None]),
        ([decimal.Decimal("1.5"), None], "number", np.float64, [1.5, None]),
        ([None, None], "number", np.float64, [None, None]),
        (pd.arrays.SparseArray([0, 0, 1]), "number", np.int64, [0, 0, 1]),
    ],
)
def test_a_column_is_numbers_truth_values_or_text(
    values: Any, kind: str, dtype: Any, expected: list[Any]
) -> None:
    column = read_column(pd.Series(values, index=range(7, 7 + len(values))))
    assert (column.type, column.values.dtype.kind) == (kind, np.dtype(dtype).kind)
    found = [None if m else v for v, m in zip(column.values.tolist(), column.missing, strict=True)]
    assert found == expected


@pytest.mark.parametrize(
    "values",
    [pd.date_range("2024-01-01", periods=2), [[1], [2]], ["a", 1], [1j, 2j], pd.cut([1, 2], 2)],
)
def test_anything_else_is_other(values: Any) -> None:
    assert read_column(pd.Series(values)).type == "other"
