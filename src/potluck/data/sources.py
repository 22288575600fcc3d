"""The data of one client, read and checked alone: two arrays, or the columns of a table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from potluck.core import DataError
from potluck.data.assembly import Source
from potluck.data.tables.columns import Array, Column, alike, check_target, read_column
from potluck.data.tables.features import check_finite
from potluck.data.tables.row_places import place
from potluck.data.tables.table_files import Located, check_column, first_line, named_columns


def array_source(pair: Any, where: str, like: Any = None) -> Source:
    """The two arrays of one client.

    Args:
        like: the pair of the first client, in the order of whose columns tables are put.
    """
    if not isinstance(pair, (tuple, list)) or len(cast("list[Any]", pair)) != 2:
        raise DataError(
            f"{where} must be a pair (inputs, targets), got {type(cast(Any, pair)).__name__}. "
            "Give two arrays of equal length."
        )
    firsts = cast("list[Any]", like or pair)
    values = [_in_order(*each, where) for each in zip(cast("list[Any]", pair), firsts, strict=True)]
    inputs = _numbers(as_array(values[0], f"the inputs of {where}"), f"the inputs of {where}")
    return Source(where, inputs, target_array(values[1], f"the targets of {where}"))


def _in_order(values: Any, first: Any, where: str) -> Any:
    """A table among arrays with its columns as those of the first: they go by name."""
    if values is first or not (hasattr(values, "columns") and hasattr(first, "columns")):
        return values
    expected, got = list(first.columns), list(values.columns)
    if expected == got:
        return values
    if sorted(map(str, expected)) != sorted(map(str, got)) or len(set(map(str, got))) < len(got):
        raise DataError(
            f"the tables of all clients must have the same columns, {expected}, got {got} in "
            f"{where}. Rename or remove some."
        )
    return values[expected]


def table_sources(
    tables: Mapping[str, Located], features: Sequence[str] | None, targets: Sequence[str], by: Any
) -> dict[str, Source]:
    """The columns of every client's table, which must be the same, in whatever order.

    Args:
        features: their names; None: all other columns of the first table.
        by: the name of the column by which test examples are held out, or None.
    """
    first = next(iter(tables.values()))
    if features is None:
        found = [str(name) for name in first.table.columns]
        features = [name for name in found if name not in targets and name != by]
    named = [*features, *targets, *([] if by is None else [by])]
    if by in targets:
        raise DataError(
            f"the examples must be split by another column than the target, got {by!r} for both. "
            "Name another in split."
        )
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise DataError(
            f"columns must have different names, got {named.count(twice[0])} called "
            f"{twice[0]!r} in {first.where}. Rename one."
        )
    if not features:
        raise DataError(
            f"there must be a feature column beside {targets[0]!r}, got none in {first.where}."
        )
    for table, where in tables.values():
        if len(table) == 0:
            raise DataError(f"{where} must have at least one example, got 0. Leave it out.")
    wanted, beside = [*features, *targets], () if by is None else (by,)
    if by is not None:
        for table in tables.values():
            check_column(table, by)
    read = {k: named_columns(table, wanted, beside, where) for k, (table, where) in tables.items()}
    for name in features:
        columns = alike([columns[name] for columns in read.values()])
        for key, column in zip(read, columns, strict=True):
            read[key][name] = column
    for (_, where), columns in zip(tables.values(), read.values(), strict=True):
        for name in targets:
            check_target(columns[name], name, where)
    return {
        key: Source(
            where,
            {name: read[key][name] for name in features},
            _target_columns([read[key][name] for name in targets], targets, where),
            None if by is None else tables[key].table[by],
        )
        for key, (_, where) in tables.items()
    }


def target_array(values: Any, what: str) -> Array:
    """Text, Booleans, int64 or floats, with an axis of examples; their meaning is decided later."""
    array = as_array(values, what)
    if array.ndim > 0 and array.dtype.kind in "Ub":
        return array
    array = _numbers(array, what)
    check_finite(array, what)
    return array


def as_array(values: Any, what: str) -> Array:
    """Returns a NumPy array of the values; a hole of a mask or of pandas is NaN."""
    if isinstance(values, np.ma.MaskedArray):
        values = _unmasked(values)
    if hasattr(values, "detach") and hasattr(values, "cpu"):  # a tensor
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # NumPy has none
            values = values.float()
    try:
        array: Array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} must be an array, got error={first_line(error)!r}. "
            "Give every example the same shape."
        ) from error
    if array.dtype.kind != "O" or array.ndim not in (1, 2) or array.size == 0:
        return array
    return _of_objects(array, what)


def _unmasked(masked: Any) -> Any:
    if np.ma.is_masked(masked) and masked.dtype.kind in "biuf":
        return masked.astype(np.float64).filled(np.nan)
    return masked.data


def _of_objects(array: Array, what: str) -> Array:
    """Converts an array of objects: columns of several types, decimals, integers with holes."""
    pandas: Any = importlib.import_module("pandas")
    found: list[Array] = []
    for name, values in enumerate(array.reshape(len(array), -1).T):
        column = read_column(pandas.Series(values, name=name, dtype=object), what)
        if column.type == "text" and column.missing.any():
            raise DataError(
                "no text may be missing, got none in "
                f"{place(str(name), int(column.missing.argmax()), what)}. Fill it in."
            )
        holes = column.missing.any()
        found.append(np.where(column.missing, np.nan, column.values) if holes else column.values)
    texts = [values.dtype.kind == "U" for values in found]
    if any(texts) and not all(texts):
        raise DataError(
            f"{what} must be all numbers, got {str(found[texts.index(True)][0])!r} in "
            f"{place(str(texts.index(True)), 0, what)}. Encode it as numbers, or call `from_table`."
        )
    return np.stack(found, axis=1).reshape(array.shape)


def _numbers(array: Array, what: str) -> Array:
    """Floats as they are, anything else as int64."""
    if array.dtype.kind not in "iufb" or array.ndim == 0:
        raise DataError(
            f"{what} must be an array of numbers with an axis of examples, "
            f"got dtype={array.dtype}, shape={array.shape}. Convert it to floats or integers."
        )
    if array.dtype.kind == "f":
        return array.astype(np.promote_types(array.dtype, np.float32), copy=False)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise DataError(
            f"{what} must be whole numbers below 2**63, got {array.max()}. Give smaller ones."
        )
    return array.astype(np.int64)


def _target_columns(columns: Sequence[Column], names: Sequence[str], where: str) -> Array:
    for column, name in zip(columns, names, strict=True):
        if len(columns) > 1 and column.type == "text":
            raise DataError(
                f"several target columns must be numbers, got text in column {name!r} of {where}. "
                "Write 0 and 1 for labels, or name one column."
            )
    arrays = [
        target_array(column.values, f"column {name!r} of {where}")
        for column, name in zip(columns, names, strict=True)
    ]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)
