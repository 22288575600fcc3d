"""One column of a table: numbers, truth values or text, and where it has holes.

Whatever pandas calls it (a category, a nullable or an Arrow type, objects), a column comes down to
one NumPy array and a mask of what is missing. A column of anything else is "other", and whoever
asked for it says so.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

ColumnType: TypeAlias = Literal["number", "boolean", "text", "other"]

_INFERRED: dict[str, tuple[ColumnType, Any]] = {  # what pandas says of objects
    "string": ("text", np.str_),
    "boolean": ("boolean", np.bool_),
    "integer": ("number", np.int64),
    "floating": ("number", np.float64),
    "mixed-integer-float": ("number", np.float64),
    "decimal": ("number", np.float64),
    "empty": ("number", np.float64),
}


class Column(NamedTuple):
    """What is in a column. What is missing is 0, NaN, False or "" in `values`."""

    type: ColumnType
    values: NDArray[Any]  # [rows]: int64, uint64, float64, bool or str
    missing: NDArray[np.bool_]  # [rows]


def read_column(series: Any) -> Column:
    """The content of a pandas `Series`."""
    missing: NDArray[np.bool_] = series.isna().to_numpy(np.bool_)
    present = series[~missing]
    if hasattr(present, "cat"):
        present = present.astype(present.cat.categories.dtype)
    kind, dtype = _type_of(present)
    if kind == "other":
        return Column("other", np.zeros(len(missing)), missing)
    found = present.to_numpy(dtype)
    if kind == "number" and missing.any():
        found = found.astype(np.float64)
    values = np.full(len(missing), np.nan if found.dtype.kind == "f" else found.dtype.type())
    values = values.astype(found.dtype)
    values[~missing] = found
    return Column(kind, values, missing)


def odd_value(series: Any) -> str:
    """The first value that is no number, for messages; the type of the column where all are."""
    for value in series:
        try:
            float(value)
        except (TypeError, ValueError):
            return f"value {value!r}"
    return f"dtype={series.dtype}"


def _type_of(present: Any) -> tuple[ColumnType, Any]:
    kind = cast("str", getattr(present.dtype, "kind", "O"))
    if kind == "b":
        return "boolean", np.bool_
    if kind in "iuf":
        return "number", {"i": np.int64, "u": np.uint64, "f": np.float64}[kind]
    types: Any = importlib.import_module("pandas.api.types")
    return _INFERRED.get(types.infer_dtype(present, skipna=True), ("other", None))
