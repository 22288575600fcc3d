"""One feature of a table: its column's type, and how its values become numbers.

A value of a number becomes (value − shift) / scale, a category a row of a one-hot code or its
place among the categories, a truth value 0 or 1. What is missing is filled in, or refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from potluck.core import DataError
from potluck.data.tables.columns import Column, alike, check_told_apart, first_text
from potluck.data.tables.row_places import listed, place
from potluck.data.tables.targets import codes_of, label_texts

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, Field(max_length=200)]
Names: TypeAlias = Annotated[tuple[Name, ...], Field(max_length=100_000, strict=False)]

_FILL = (
    'Fill missing values in, remove the row, or say missing = "mean" (in an experiment, '
    "task.missing)."
)


class Feature(BaseModel):
    """A column and what becomes of it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    type: Literal["number", "boolean", "category"] = "number"
    fill: Finite | Name | None = None
    """The value in place of a missing one, before scaling; None refuses it."""
    shift: Finite = 0.0
    scale: Positive = 1.0
    categories: Names = ()
    one_hot: bool = True
    """Of a category; False: its place among the categories."""

    @model_validator(mode="after")
    def _consistent(self) -> Feature:
        is_category = self.type == "category"
        if is_category != bool(self.categories):
            raise ValueError("a category has categories, and nothing else has")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("categories must differ")
        if self.fill is not None and is_category != isinstance(self.fill, str):
            raise ValueError("fill must be a value of the column")
        if is_category and self.fill is not None and self.fill not in self.categories:
            raise ValueError("fill must be one of the categories")
        return self

    @property
    def width(self) -> int:
        """The number of entries that it takes in an example."""
        return len(self.categories) if self.type == "category" and self.one_hot else 1

    def encode(self, column: Column, where: str) -> NDArray[np.float32]:  # [rows, width]
        """The numbers of a column."""
        if not self.categories:
            column = alike([column, Column("number", np.zeros(0), np.zeros(0, np.bool_))])[0]
        if self.fill is None:
            self._check(column.missing, column, "finite", where, _FILL)
        values = self._codes(column, where) if self.categories else self._numbers(column, where)
        if self.categories and self.one_hot:
            return (values[:, None] == np.arange(len(self.categories))).astype(np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold is inf, and found below
            scaled = ((values - self.shift) / self.scale).astype(np.float32)
        self._check(~np.isfinite(scaled), column, "finite", where)
        check_told_apart(column, scaled, self.name, where)
        return scaled[:, None]

    def _numbers(self, column: Column, where: str) -> NDArray[np.float64]:
        if column.type == "text":
            odd = np.arange(len(column.values)) == first_text(column.values)
            self._check(odd, column, "numbers", where)
        if self.type == "boolean":
            wrong = ~column.missing & ~np.isin(column.values, (0, 1))
            self._check(wrong, column, "True or False", where)
        fill = self.fill if isinstance(self.fill, float) else 0.0
        return np.where(column.missing, fill, column.values.astype(np.float64))

    def _codes(self, column: Column, where: str) -> NDArray[np.int64]:
        texts = label_texts(column.values)
        texts[column.missing] = self.fill if isinstance(self.fill, str) else ""
        codes = codes_of(texts, self.categories)
        expected = f"one of {listed(map(repr, self.categories))}"
        self._check(codes < 0, column, expected, where)
        return codes

    def _check(
        self,
        wrong: NDArray[np.bool_],
        column: Column,
        expected: str,
        where: str,
        advice: str = "Mend it, or remove the row.",
    ) -> None:
        """Raises a `DataError` for the first row that is wrong."""
        if wrong.any():
            row = int(wrong.argmax())
            got = "nan" if column.missing[row] else repr(column.values[row].item())
            raise DataError(
                f"features must be {expected}, got {got} in {place(self.name, row, where)}. "
                f"{advice}"
            )


def as_float32(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Numbers as float32."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is inf, and found below
        array = values.astype(np.float32)
    check_finite(array, what)
    return array


def check_finite(values: NDArray[Any], what: str) -> None:
    """Raises a `DataError` for NaN and infinity among numbers."""
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise DataError(
            f"{what} must be finite numbers, got NaN or infinity in example {row}. "
            "Fill missing values in, or remove the example."
        )


def check_pixels(values: NDArray[Any], what: str) -> None:
    """Raises a `DataError` for numbers that are not from 0 to 255, or that are scaled already."""
    found = values[np.isfinite(values)]
    if found.size == 0:
        return
    low, high = found.min(), found.max()
    is_scaled = high <= 1 and bool((found != np.floor(found)).any())
    if low < 0 or high > 255 or is_scaled:
        raise DataError(
            f'{what} must be from 0 to 255 for scale = "pixels", got values from {low:.6g} to '
            f'{high:.6g}. Give them so; if all are scaled already, say scale = "none".'
        )
