"""A schema's features, computed from the training rows of all clients together.

    missing      "refuse" (the default), "mean", "median" or a number; a category and a truth
                 value are filled with the most frequent one, but for a number
    scale        "none" (the default), "standard" (mean 0, deviation 1), "minmax" (0 to 1) or
                 "pixels" (divided by 255)
    categories   of text: "refuse" (the default), "one-hot" or "codes"

Scales and fills never see a test example. Categories do: a test set with a value that no training
row has can still be read.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.data.tables.columns import Column, are_numbers, first_text
from potluck.data.tables.features import Feature, check_pixels
from potluck.data.tables.row_places import place
from potluck.data.tables.targets import check_spaces, label_texts

Missing: TypeAlias = Literal["refuse", "mean", "median"] | float
Scale: TypeAlias = Literal["none", "standard", "minmax", "pixels"]
Categories: TypeAlias = Literal["refuse", "one-hot", "codes"]

_FEW = 20  # different texts that are surely categories
_MOST = 1000  # categories of a column


class Rules(NamedTuple):
    """The user's rules for features."""

    missing: Missing = "refuse"
    scale: Scale = "none"
    categories: Categories = "refuse"


class Given(NamedTuple):
    """A column of one client, and which of its rows are for training."""

    where: str
    column: Column
    train: NDArray[np.int64]


def check_rules(rules: Rules) -> None:
    """Raises a `ValueError` for an unknown rule."""
    choices: dict[str, tuple[str, ...]] = {
        "missing": ("refuse", "mean", "median"),
        "scale": get_args(Scale),
        "categories": get_args(Categories),
    }
    for name, allowed in choices.items():
        value: Any = getattr(rules, name)
        is_number = name == "missing" and isinstance(value, numbers.Real) and math.isfinite(value)
        if value not in allowed and (not is_number or isinstance(value, (bool, np.bool_))):
            number = " or a finite number" if name == "missing" else ""
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}{number}, got "
                f"{name}={value!r}."
            )


def fit_feature(name: str, given: Sequence[Given], rules: Rules) -> Feature:
    """The feature of one column of all clients."""
    kind = _type_of(name, given, rules)
    if kind == "category":
        return _category(name, given, rules)
    for where, column, _ in given:
        if column.values.dtype.kind == "f" and np.isinf(column.values).any():
            Feature(name=name, fill=0.0).encode(column, where)  # raises, with the row
    values = _training_values(given)
    fill = _fill(name, values, rules, given, kind)
    if kind == "boolean":
        return Feature(name=name, type="boolean", fill=fill)
    if rules.scale == "pixels":
        for where, column, _ in given:
            if column.type == "number":
                check_pixels(column.values[~column.missing], f"column {name!r} of {where}")
    shift, scale = _scaling(values, rules.scale)
    if not np.isfinite([shift, scale, fill or 0.0]).all():
        raise DataError(
            f"the values of column {name!r} must be small enough to be added up, got one of "
            f"{np.abs(values).max()} (see {given[0].where}). Use another unit."
        )
    # Adding 0.0 makes a zero of -0.0, which JSON without defaults would not keep.
    return Feature(name=name, fill=fill, shift=shift + 0.0, scale=scale)


def _type_of(name: str, given: Sequence[Given], rules: Rules) -> str:
    present = [part for part in given if not part.column.missing.all()]
    types = {part.column.type for part in present}
    if types == {"boolean"}:
        return "boolean"
    if types <= {"number", "boolean"}:
        return "number"
    odd = next(part for part in present if part.column.type == "text")
    if types != {"text"}:
        raise _no_number(name, odd, "Make it alike for all clients, or remove the column.")
    if rules.categories == "refuse":
        advice = (
            'Encode it as numbers, remove the column, or say categories = "one-hot" '
            "(in an experiment, task.categories)."
        )
        raise _no_number(name, odd, advice)
    return "category"


def _no_number(name: str, part: Given, advice: str) -> DataError:
    row = first_text(part.column.values)
    return DataError(
        f"features must be numbers, got {str(part.column.values[row])!r} in "
        f"{place(name, row, part.where)}. {advice}"
    )


def _category(name: str, given: Sequence[Given], rules: Rules) -> Feature:
    texts = [label_texts(column.values)[~column.missing] for _, column, _ in given]
    names, counts = np.unique(np.concatenate(texts).astype(np.str_), return_counts=True)
    check_spaces(names.tolist(), f"the texts of column {name!r}", given[0].where)
    if len(names) > _FEW and (len(names) > counts.sum() / 2 or len(names) > _MOST):
        raise DataError(
            f"categories must repeat, got {len(names):,} different texts in {counts.sum():,} "
            f"rows of column {name!r}, as {str(names[0])!r} (see {given[0].where}). Remove the "
            "column, or write numbers with a decimal point."
        )
    share = are_numbers(names).mean()
    if 0.5 <= share < 1:
        raise _no_number(name, _odd_one(given), "Mend the value; the others are numbers.")
    fill = None
    if rules.missing in ("mean", "median"):
        train = np.concatenate([label_texts(c.values)[t][~c.missing[t]] for _, c, t in given])
        seen, often = np.unique(train.astype(np.str_), return_counts=True)
        fill = str(seen[often.argmax()]) if len(seen) else str(names[counts.argmax()])
    elif rules.missing != "refuse":
        fill = str(rules.missing)
        if fill not in names:
            _refuse_fill(name, rules, "category", given)
            fill = None
    return Feature(
        name=name,
        type="category",
        fill=fill,
        categories=tuple(names.tolist()),
        one_hot=rules.categories == "one-hot",
    )


def _odd_one(given: Sequence[Given]) -> Given:
    return next(
        part for part in given if not (part.column.missing | are_numbers(part.column.values)).all()
    )


def _refuse_fill(name: str, rules: Rules, kind: str, given: Sequence[Given]) -> None:
    """A number fills no category: its column must have no holes then."""
    for where, column, _ in given:
        if column.missing.any():
            raise DataError(
                f"a missing {kind} must be filled with one, got missing = {rules.missing!r} for "
                f"{place(name, int(column.missing.argmax()), where)}. "
                'Say missing = "mean", which takes the most frequent one.'
            )


def _training_values(given: Sequence[Given]) -> NDArray[np.float64]:
    """The values that are there in training rows, or, if there are none, in all rows."""
    for in_training in (True, False):
        found = [np.zeros(0)]
        for _, column, train in given:
            rows = train if in_training else np.arange(len(column.missing))
            if column.type in ("number", "boolean"):
                found.append(column.values[rows][~column.missing[rows]].astype(np.float64))
        values = np.concatenate(found)
        if len(values) > 0:
            return values
    return np.zeros(0)


def _fill(
    name: str, values: NDArray[np.float64], rules: Rules, given: Sequence[Given], kind: str
) -> float | None:
    if rules.missing == "refuse":
        return None
    if not isinstance(rules.missing, str):
        return float(rules.missing)
    if kind == "boolean":
        return float(values.mean() > 0.5)
    if len(values) == 0:
        raise DataError(
            f"a column must have a value to take the {rules.missing} of, got none in column "
            f"{name!r} (see {given[0].where}). Remove it, or give a number for missing values."
        )
    with np.errstate(over="ignore"):
        return float(values.mean() if rules.missing == "mean" else np.median(values))


def _scaling(values: NDArray[np.float64], scale: Any) -> tuple[float, float]:
    """Shift and scale; a column that never varies becomes 0."""
    if scale == "pixels":
        return 0.0, 255.0
    if len(values) == 0 or scale not in ("standard", "minmax"):
        return 0.0, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        if scale == "minmax":
            return float(values.min()), float(np.ptp(values)) or 1.0
        deviation = 0.0 if values.min() == values.max() else float(values.std())
        return float(values.mean()), deviation or 1.0
