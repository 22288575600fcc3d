"""The data that a model takes, as one object: columns by name, their types, fills and scales, the
categories, the class labels, the shapes, and the hold-out of test examples.

It is made once, over the data of all clients, or given. It is written into a run's directory and
can be sent to devices, so that each prepares its own file in the same way. Columns in another order
are put in order. A column that is missing or too many is refused by name, and so is a value that
the model does not know.

Compatibility: strict JSON of bounded size. An unknown key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from potluck.core import DataError
from potluck.data.tables.columns import Array, Column, array_column, check_target
from potluck.data.tables.features import Feature, Names, Positive, as_float32, check_pixels
from potluck.data.tables.hold_out import HoldOut
from potluck.data.tables.symbols import Symbols
from potluck.data.tables.table_files import named, named_columns, read_table
from potluck.data.tables.targets import Part, TargetKind, encode_labels, understand

Shape: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(max_length=8, strict=False)
]

_MAX_BYTES = 4 * 2**20


class Schema(BaseModel):
    """The data of a run, as every client and every device must give them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: TargetKind
    num_classes: Annotated[int, Field(ge=0, le=10**6)]
    """0 for a regression."""
    classes: Names | None = None
    """The labels by code; None: labels are their own codes."""
    targets: Names = ()
    """The columns to be predicted; none of arrays."""
    features: Annotated[tuple[Feature, ...], Field(max_length=100_000, strict=False)] = ()
    """The columns in their order; none where inputs are arrays that are taken as they are."""
    input_shape: Shape
    """Of one example, as the model gets it."""
    input_dtype: Literal["float32", "int64", "int16"] = "float32"
    target_shape: Shape = ()
    divisor: Positive = 1.0
    """Of inputs that are arrays: 255 for pixels."""
    symbols: Symbols | None = None
    """Of text."""
    hold_out: HoldOut = HoldOut()

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [feature.name for feature in self.features] + list(self.targets)
        if len(set(names)) != len(names):
            raise ValueError("columns must have different names")
        if (self.num_classes == 0) != (self.kind == "regression"):
            raise ValueError("num_classes must be 0 for a regression, and for nothing else")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must differ")
        if self.classes is not None and len(self.classes) > self.num_classes:
            raise ValueError("there must be no more classes than num_classes")
        if self.symbols is not None and (self.kind, self.num_classes, self.input_shape) != (
            "text",
            self.symbols.size,
            (self.symbols.steps,),
        ):
            raise ValueError("text must have kind, num_classes and input_shape of its symbols")
        if self.features and self.input_shape != (sum(f.width for f in self.features),):
            raise ValueError("input_shape must be the width of all features together")
        return self

    def to_json(self) -> dict[str, Any]:
        """Returns the schema as JSON, without the keys that have no value of their own."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_json(cls, content: Any) -> Schema:
        """Checks a schema as JSON: text, bytes, or the parsed value.

        Raises:
            DataError: it is no schema; the message names the key.
        """
        if isinstance(content, (str, bytes)):
            if len(content) > _MAX_BYTES:
                raise DataError(
                    f"a schema must have at most {_MAX_BYTES} bytes, got {len(content)}. "
                    "Use fewer columns."
                )
            try:
                content = json.loads(content)
            except ValueError as error:
                raise DataError(f"a schema must be JSON, got error={str(error)!r}.") from None
        return cls.checked(content)

    @classmethod
    def checked(cls, content: Any) -> Schema:
        """A schema of these values.

        Raises:
            DataError: they make none; the message names the key.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "the schema"
            raise DataError(
                f"a schema must have keys and values within its bounds, got {place}: "
                f"{first['msg']}. Mend it, or let this version of Potluck write it."
            ) from None

    def read(self, path: Path, texts: Collection[str] = ()) -> Any:
        """The table of a file, whose categories and labels are text as it is written where that is
        what this knows: "01" is no 1, and "true" may be one of three.

        Args:
            texts: more columns that stay text.

        Raises:
            DataError: it cannot be read.
        """
        if path.suffix.lower() != ".csv":
            return read_table(path)
        known = {feature.name: feature.categories for feature in self.features}
        known |= dict.fromkeys(self.targets if self.kind == "classes" else (), self.classes or ())
        known = {name: set(names) for name, names in known.items() if names}
        table = read_table(path, [*texts, *known])
        odd = [n for n, names in known.items() if n in table and not {*table[n].dropna()} <= names]
        if odd:
            table[odd] = read_table(path, texts)[odd]  # 1.0 may be a 1
        return table

    def apply(self, table: Any, where: str = "the table") -> tuple[Array, Array]:
        """Inputs and targets of a pandas `DataFrame`, prepared as those of all clients.

        The columns may come in any order; the one by which test examples are held out may be
        there or not.

        Raises:
            DataError: it does not fit; the message names column and row, what was expected and got.
        """
        self.check_is(True, where)
        names = [*(feature.name for feature in self.features), *self.targets]
        column = self.hold_out.column
        table = named(table, where)
        columns = named_columns(table, names, () if column is None else (column,), where)
        inputs = self.encode([columns[f.name] for f in self.features], where)
        labels = [columns[name] for name in self.targets]
        for name, label in zip(self.targets, labels, strict=True):
            check_target(label, name, where)
        values = [label.values for label in labels]
        several = len(values) > 1 or self.kind == "multilabel"
        return inputs, self.targets_of(np.stack(values, 1) if several else values[0], where)

    def apply_arrays(self, inputs: Any, targets: Any, where: str = "the arrays") -> tuple[Any, Any]:
        """The same for arrays [examples, …] of inputs and targets."""
        self.check_is(False, where)
        return self.inputs_of(np.asarray(inputs), where), self.targets_of(
            np.asarray(targets), where
        )

    def inputs_of(self, inputs: Array, where: str) -> Array:
        """Inputs that are arrays, prepared."""
        expected = (len(self.features),) if self.features else self.input_shape
        if inputs.ndim == 0 or inputs.shape[1:] != expected or inputs.dtype.kind not in "biuf":
            raise DataError(
                f"inputs must be numbers of shape [examples, {', '.join(map(str, expected))}], got "
                f"shape={list(inputs.shape)}, dtype={inputs.dtype} in {where}. Convert them."
            )
        if self.features:
            return self.encode([array_column(inputs[:, k]) for k in range(inputs.shape[1])], where)
        if self.input_dtype != "float32":
            if inputs.dtype.kind == "f":
                raise DataError(
                    f"inputs must be whole numbers, got dtype={inputs.dtype} in {where}. "
                    "Convert them."
                )
            return inputs.astype(self.input_dtype)
        if self.divisor == 1:
            return as_float32(inputs, f"the inputs of {where}")
        check_pixels(inputs, f"the inputs of {where}")
        return as_float32(inputs / self.divisor, f"the inputs of {where}")

    def encode(self, columns: Sequence[Column], where: str) -> Array:
        """Inputs [rows, width] of the columns of all features, in their order."""
        parts = [
            feature.encode(column, where)
            for feature, column in zip(self.features, columns, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def targets_of(self, targets: Array, where: str) -> Array:
        """Targets as the model takes them, of labels as they are written."""
        if self.kind == "classes" and self.classes is not None:
            values = encode_labels(targets, self.classes, where)
        else:
            parts = [Part(where, targets)]
            (values,), _ = understand(parts, kind=self.kind, num_classes=self.num_classes or None)
        if values.shape[1:] != self.target_shape:
            raise DataError(
                f"targets must have the shape {['examples', *self.target_shape]}, got "
                f"shape={list(values.shape)} in {where}. Convert them."
            )
        return values

    def check_is(self, table: bool, where: str) -> None:
        """Raises a `DataError` for arrays where a table is wanted, or the other way round."""
        if bool(self.targets) != table:
            expected, got = ("a table with columns", "arrays")[:: 1 if self.targets else -1]
            raise DataError(
                f"the data of this run must be {expected}, got {got} in {where}. Convert them."
            )
