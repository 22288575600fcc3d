"""Makes federated data and their schema of each client's table or two arrays.

First the targets of all clients are given one meaning. Then test examples are held out, the
schema is computed from what is left, or a given one is taken, and applied to all rows alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.data.federated import Array, Examples, FederatedData, joined
from potluck.data.tables.columns import Column, array_column
from potluck.data.tables.features import Feature
from potluck.data.tables.fitting import Given, Rules, fit_feature
from potluck.data.tables.hold_out import HoldOut
from potluck.data.tables.schema import Schema
from potluck.data.tables.targets import Meaning, Part, TargetKind, understand

Rows = NDArray[np.int64]


class Source(NamedTuple):
    """The data of one client, or a test set, read but not prepared."""

    where: str  # for messages
    inputs: Array | Mapping[str, Column]  # an array of numbers, or the features of a table
    targets: Array  # as they are written
    by: Any = None  # a pandas Series, by which test examples are held out

    @property
    def num_examples(self) -> int:
        return len(self.targets)

    def column(self, name: str) -> Column:
        """A feature: of a table by its name, of an array by its number."""
        inputs = self.inputs
        return inputs[name] if isinstance(inputs, Mapping) else array_column(inputs[:, int(name)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The user's options for the data."""

    name: str
    kind: TargetKind | None = None
    num_classes: int | None = None
    rules: Rules = field(default_factory=Rules)
    hold_out: HoldOut = field(default_factory=HoldOut)
    schema: Schema | None = None  # instead of all but the name
    targets: tuple[str, ...] = ()  # the columns of tables
    needs_test: bool = True  # at least one test example
    columns: bool = False  # classes may be [examples, 1]


def assemble(
    clients: Mapping[str, Source], tests: Source | Mapping[str, Source] | None, asked: Asked
) -> FederatedData:
    """Federated data of clients, with a shared test set, tests of their own, or held out ones.

    Raises:
        DataError: data that cannot be used; the message names the place.
    """
    shared = tests if isinstance(tests, Source) else None
    own: Mapping[str, Source] = {} if tests is None or isinstance(tests, Source) else tests
    sources = [*clients.values(), *own.values(), *([] if shared is None else [shared])]
    for source in sources:
        _check(source, sources[0], asked)
    targets, meaning = _targets(sources, asked)
    hold_out = asked.hold_out if asked.schema is None else asked.schema.hold_out
    rows = [(np.arange(source.num_examples), np.arange(0)) for source in clients.values()]
    if tests is None:
        # A device without a given kind may have classes.
        is_untold = asked.schema is None and not asked.needs_test
        rows = [
            hold_out.divide(source.targets if is_untold else values, source.by, source.where)
            for source, values in zip(sources, targets, strict=True)
        ]
    train_rows = [train for train, _ in rows]
    schema = asked.schema or _fitted(sources, train_rows, targets[0].shape[1:], meaning, asked)
    examples = [
        Examples(_inputs(source, schema), values)
        for source, values in zip(sources, targets, strict=True)
    ]
    pairs = list(zip(clients, examples, rows, strict=False))
    train, offsets = joined(part.rows(kept) for _, part, (kept, _) in pairs)
    if shared is not None:
        test, test_offsets = examples[-1], None
    else:
        given = dict(zip(own, examples[len(clients) :], strict=True))
        test, test_offsets = joined(given.get(key, part.rows(out)) for key, part, (_, out) in pairs)
        if test.num_examples == 0 and asked.needs_test:
            raise DataError(
                "there must be a test example, got none: a client with one example, or one group, "
                "keeps it for training. Give `from_clients` a test set: test=(inputs, targets)."
            )
    return FederatedData(
        name=asked.name,
        train=train,
        offsets=offsets,
        test=test,
        clients=tuple(clients),
        num_classes=schema.num_classes,
        test_offsets=test_offsets,
        kind=schema.kind,
        classes=schema.classes,
        schema=schema,
        notes=() if meaning.note is None else (meaning.note,),
    )


def _targets(sources: Sequence[Source], asked: Asked) -> tuple[list[Array], Meaning]:
    schema = asked.schema
    if schema is not None:
        for source in sources:
            schema.check_is(isinstance(source.inputs, Mapping), source.where)
        values = [schema.targets_of(source.targets, source.where) for source in sources]
        return values, Meaning(schema.kind, schema.num_classes, schema.classes)
    return understand(
        [Part(source.where, source.targets) for source in sources],
        kind=asked.kind,
        num_classes=asked.num_classes,
        in_tables=bool(asked.targets),
        columns=asked.columns,
    )


def _fitted(
    sources: Sequence[Source],
    train: Sequence[Rows],
    target_shape: tuple[int, ...],
    meaning: Meaning,
    asked: Asked,
) -> Schema:
    known: dict[str, Any] = {
        "kind": meaning.kind,
        "num_classes": meaning.num_classes,
        "classes": asked.targets or None if meaning.kind == "multilabel" else meaning.classes,
        "targets": asked.targets,
        "target_shape": target_shape,
        "hold_out": asked.hold_out,
    }
    inputs, rules = sources[0].inputs, asked.rules
    if not isinstance(inputs, Mapping) and not _by_feature(inputs, rules, sources[0].where):
        known["input_shape"] = inputs.shape[1:]
        known["divisor"] = 255.0 if rules.scale == "pixels" else 1.0
        is_float = inputs.dtype.kind == "f" or known["divisor"] != 1.0
        return Schema.checked(known | {"input_dtype": "float32" if is_float else "int64"})
    rows = [*train, *(np.arange(0) for _ in sources[len(train) :])]
    features: list[Feature] = []
    for name in inputs if isinstance(inputs, Mapping) else map(str, range(inputs.shape[1])):
        given = [
            Given(source.where, source.column(name), part)
            for source, part in zip(sources, rows, strict=True)
        ]
        features.append(fit_feature(name, given, rules))
    width = sum(feature.width for feature in features)
    return Schema.checked(known | {"features": tuple(features), "input_shape": (width,)})


def _by_feature(inputs: Array, rules: Rules, where: str) -> bool:
    """True if arrays are filled and scaled, which only rows of features can be."""
    if rules.categories != "refuse":
        raise DataError(
            f"categories are columns of tables, got categories={rules.categories!r} for arrays "
            f"in {where}. Leave it out."
        )
    if rules.missing == "refuse" and rules.scale in ("none", "pixels"):
        return False
    if inputs.ndim != 2:
        raise DataError(
            "inputs must be rows of features, [examples, features], to be filled or scaled with "
            f"missing={rules.missing!r}, scale={rules.scale!r}, got shape={list(inputs.shape)} in "
            f'{where}. Prepare them before; for images of 0 to 255 say scale = "pixels".'
        )
    return True


def _inputs(source: Source, schema: Schema) -> Array:
    if isinstance(source.inputs, Mapping):
        columns = [source.column(feature.name) for feature in schema.features]
        return schema.encode(columns, source.where)
    return schema.inputs_of(source.inputs, source.where)


def _check(source: Source, first: Source, asked: Asked) -> None:
    """One shape and type for all; tables were checked by the names of their columns."""
    if source.num_examples == 0:
        raise DataError(f"{source.where} must have at least one example, got 0. Leave it out.")
    pairs = [("targets", source.targets, first.targets)]
    if isinstance(source.inputs, np.ndarray) and isinstance(first.inputs, np.ndarray):
        pairs.insert(0, ("inputs", source.inputs, first.inputs))
        if len(source.inputs) != source.num_examples:
            raise DataError(
                f"{source.where} must have one target for each input, got inputs="
                f"{len(source.inputs)}, targets={source.num_examples}. "
                "Give arrays of equal length."
            )
    # Any type of number will do where the user says what the targets are, or a table was read.
    said = asked.kind is not None or asked.schema is not None or bool(asked.targets)
    for what, got, expected in pairs:
        types = {got.dtype.kind, expected.dtype.kind}
        is_right = len(types) == 1 or (what == "targets" and (said or "U" in types))
        if got.shape[1:] != expected.shape[1:] or not is_right:
            raise DataError(
                f"{what} must have one shape and type for all clients, {expected.shape[1:]} and "
                f"{expected.dtype} as in {first.where}, got shape={got.shape[1:]}, "
                f"dtype={got.dtype} in {source.where}. Convert them alike."
            )
