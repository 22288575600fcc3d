"""Random tables under random rules: prepared alike everywhere, or refused by a `DataError`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from potluck.core import DataError
from potluck.data.describe import describe
from potluck.data.own_data import from_table
from potluck.data.tables.schema import Schema

VALUES: list[Callable[[Random, int], Any]] = [
    lambda random, row: random.gauss(0, 1),
    lambda random, row: random.randrange(5),
    lambda random, row: random.choice("abc"),
    lambda random, row: random.random() < 0.5,
    lambda random, row: random.randrange(10**6),
    lambda random, row: f"id {row}",
    lambda random, row: random.choice(["1", "2", "3"]),
    lambda random, row: float(random.randrange(2)),
    lambda random, row: None,
    lambda random, row: random.choice([1e300, -1e300, 0.5]),
    lambda random, row: datetime.datetime(2024, 1, 1 + row % 28),
    lambda random, row: random.choice([-1, 1]),
    lambda random, row: random.choice(["yes", "no", ""]),
    lambda random, row: 0.0,
    lambda random, row: random.choice([1, "x"]),
]


def column(random: Random, rows: int) -> pd.Series:
    usual = random.random() < 0.7
    value = VALUES[random.randrange(4 if usual else len(VALUES))]
    holes = 0.2 if random.random() < 0.15 else 0.0
    values = [None if random.random() < holes else value(random, row) for row in range(rows)]
    series = pd.Series(values)
    return series.astype("category") if random.random() < 0.1 and usual else series


def made(random: Random) -> tuple[pd.DataFrame, dict[str, Any]]:
    rows = random.randrange(2, 40)
    frame = pd.DataFrame({f"f{k}": column(random, rows) for k in range(random.randrange(1, 4))})
    labels = [np.arange(rows) % 3, np.arange(rows) / 7, list("ab" * rows)[:rows]]
    frame["target"] = random.choice([*labels, column(random, rows)])
    frame["client"] = [random.choice("xyz") for _ in range(rows)]
    options: dict[str, Any] = {
        "kind": random.choice([None, None, "classes", "regression", "multilabel"]),
        "missing": random.choice(["refuse", "mean", "median", 0, 2.5]),
        "scale": random.choice(["none", "standard", "minmax", "pixels"]),
        "categories": random.choice(["refuse", "one-hot", "codes"]),
        "test_fraction": random.choice([0.2, 0.5, 0.9]),
        "seed": random.randrange(3),
    }
    if random.random() < 0.3:
        frame["by"] = column(random, rows)
        options["split"] = random.choice(["time:by", "group:by"])
    if random.random() < 0.2:
        frame["second"] = random.choice([np.arange(rows) % 2, column(random, rows)])
        options["target_column"] = ["target", "second"]
    return frame, options


@pytest.mark.parametrize("seed", range(8))
def test_any_table_is_prepared_alike_everywhere_or_refused(seed: int) -> None:
    random, taken = Random(seed), 0
    for _ in range(30):
        frame, options = made(random)
        try:
            data = from_table(frame, client_column="client", **options)
        except DataError:
            continue
        taken += 1
        assert np.isfinite(data.train.inputs).all()
        assert np.isfinite(data.train.targets).all()
        assert data.schema is not None
        schema = Schema.from_json(json.dumps(data.schema.to_json(), allow_nan=False))
        assert describe(data).rows()
        order = [name for name in frame.columns if name != "client"]
        random.shuffle(order)
        for k, client in enumerate(data.clients):
            own = frame[frame.client == client][order]
            inputs, targets = schema.apply(own)
            by = None if schema.hold_out.column is None else own[schema.hold_out.column]
            train, test = schema.hold_out.divide(targets, by, "own")
            np.testing.assert_array_equal(inputs[train], data.client(k).inputs)
            np.testing.assert_array_equal(targets[test], data.client_test(k).targets)
    assert taken > 3
