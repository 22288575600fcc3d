"""A schema: what is made of the columns of all clients, and that any other table gets the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.describe import describe
from potluck.data.own_data import from_clients, from_file, from_folder, from_table
from potluck.data.tables.schema import Schema

ALL = {"missing": "mean", "scale": "standard", "categories": "one-hot"}


def patients() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "ward": list("aabbaabbaabb"),
            "age": [30.0, None, 50.0, 40.0, 35.0, 45.0, 60.0, 55.0, 20.0, 25.0, 65.0, 70.0],
            "sex": ["f", "m", "m", "f", None, "m", "f", "f", "m", "m", "m", "m"],
            "smokes": [True, False, None, True, False, False] * 2,
            "ill": ["yes", "no"] * 6,
        }
    )


def test_fills_scales_and_categories_are_those_of_all_training_rows_by_hand() -> None:
    frame = patients()
    data = from_table(frame, client_column="ward", target_column="ill", split="last", **ALL)
    # Of each ward's six rows the last is the test's.
    train = frame.iloc[[0, 1, 4, 5, 8, 2, 3, 6, 7, 10]]
    ages = train.age.dropna().to_numpy()
    assert data.schema is not None
    age, sex, smokes = data.schema.features
    assert (age.fill, age.shift) == (pytest.approx(ages.mean()), pytest.approx(ages.mean()))
    assert age.scale == pytest.approx(ages.std())
    assert (sex.categories, sex.fill) == (("f", "m"), "m")
    assert (smokes.type, smokes.fill) == ("boolean", 0.0)
    assert data.schema.input_shape == (4,)
    first, second = data.client(0).inputs[:2]
    np.testing.assert_allclose(first, [(30 - age.shift) / age.scale, 1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(second, [0, 0, 1, 0], atol=1e-7)
    assert data.classes == ("no", "yes")
    rows = dict(describe(data).rows())
    assert rows["features"] == "age (filled, scaled), sex (2 categories, filled), smokes (filled)"
    assert rows["classes"] == "2: no, yes"
    minmax = from_table(
        frame, client_column="ward", target_column="ill", split="last", **ALL | {"scale": "minmax"}
    )
    assert minmax.schema is not None
    assert (minmax.schema.features[0].shift, minmax.schema.features[0].scale) == (20.0, 45.0)
    assert minmax.train.inputs[:, 0].min() == 0.0
    assert minmax.train.inputs[:, 0].max() == 1.0


ZEROS = pd.DataFrame({"a": [-0.0] * 9, "the target": [0, 1, 2] * 3, "the client": "c"})


@st.composite
def tables(draw: Any) -> tuple[pd.DataFrame, list[Any]]:
    """A table of random columns with holes, and an order of its columns."""
    rows = draw(st.integers(8, 30))
    numbers = st.one_of(st.none(), st.floats(-1e6, 1e6, width=32))
    kinds = {
        "float": numbers,
        "integer": st.one_of(st.none(), st.integers(-(10**6), 10**6)),
        "text": st.one_of(st.none(), st.sampled_from(["low", "mid", "high"])),
        "truth": st.one_of(st.none(), st.booleans()),
    }
    names = draw(st.lists(st.text("abcxyz0 é", min_size=1, max_size=6), min_size=1, max_size=5))
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        values = kinds[draw(st.sampled_from([*kinds]))]
        column = draw(st.lists(values, min_size=rows, max_size=rows))
        columns[name] = column if any(value is not None for value in column) else [1.0] * rows
    columns["the target"] = [k % 3 for k in range(rows)]
    columns["the client"] = [f"c{k % 2}" for k in range(rows)]
    return pd.DataFrame(columns), draw(st.permutations([*columns]))


@given(made=tables(), rules=st.sampled_from([ALL, ALL | {"missing": "median", "scale": "minmax"}]))
@example(made=(ZEROS, [*ZEROS]), rules=ALL)
@settings(max_examples=30, deadline=None)
def test_any_order_of_columns_gives_the_same_arrays_and_a_device_does_too(made, rules) -> None:
    frame, order = made
    options: dict[str, Any] = {"client_column": "the client", "target_column": "the target"}
    data = from_table(frame, **options, **rules)
    schema = data.schema
    assert schema is not None
    # JSON, there and back, without a NaN in it.
    text = json.dumps(schema.to_json(), allow_nan=False)
    assert Schema.from_json(text) == schema == Schema.from_json(json.loads(text))
    # Another order of the columns, with the schema that came over the wire.
    again = from_table(frame[order], **options, schema=Schema.from_json(text))
    assert again.digest() == data.digest()
    # Each client's own rows, in its own order of columns.
    for k, client in enumerate(data.clients):
        own = frame[frame["the client"] == client][order].drop(columns="the client")
        inputs, targets = schema.apply(own, "own.csv")
        train, test = schema.hold_out.divide(targets, None, "own.csv")
        np.testing.assert_array_equal(inputs[train], data.client(k).inputs)
        np.testing.assert_array_equal(targets[test], data.client_test(k).targets)
    assert np.isfinite(data.train.inputs).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="age"), "own.csv must have one column 'age', got columns sex"),
        (lambda f: f.assign(city="x"), "own.csv must have .* alone, got column 'city' too"),
        (lambda f: f.assign(age="old"), "numbers, got 'old' in column 'age', row 0 of own.csv"),
        (lambda f: f.assign(age=np.inf), "finite, got inf in column 'age', row 0 of own.csv"),
        (lambda f: f.assign(sex="x"), "one of 'f', 'm', got 'x' in column 'sex', row 0 of own.csv"),
        (lambda f: f.assign(smokes=2), "True or False, got 2 in column 'smokes', row 0 of own.csv"),
        (lambda f: f.assign(ill="?"), "one of 'no', 'yes', got '.' in example 0 of own.csv"),
        (lambda f: f.assign(ill=None), "a target, got none in column 'ill', row 0 of own.csv"),
        (
            lambda f: f.assign(ill=pd.Timestamp(0)),
            "values, got Timestamp.* 'ill', row 0 of own.csv",
        ),
        (
            lambda f: f[["age", "age", "sex", "smokes", "ill"]],
            "'age' 2 times in own.csv",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_row_and_column(change, message) -> None:
    data = from_table(patients(), client_column="ward", target_column="ill", **ALL)
    assert data.schema is not None
    with pytest.raises(DataError, match=message.replace(".csv", r"\.csv")):
        data.schema.apply(change(patients().drop(columns="ward")), "own.csv")
    strict = from_table(
        patients().dropna(), client_column="ward", target_column="ill", categories="one-hot"
    )
    assert strict.schema is not None
    with pytest.raises(DataError, match=r"finite, got nan in column 'age', row 1 of own\.csv"):
        strict.schema.apply(patients().drop(columns="ward"), "own.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: Extra inputs"),
        ({"num_classes": 10**9}, "num_classes: Input should be less than"),
        ({"num_classes": "3"}, "num_classes: Input should be a valid integer"),
        ({"num_classes": 0}, "num_classes must be 0 for a regression"),
        ({"kind": "magic"}, "kind: Input should be 'classes'"),
        ({"classes": ["a", "a", "b"]}, "classes must differ"),
        ({"classes": ["a", "b", "c", "d"]}, "no more classes than num_classes"),
        ({"classes": ["x" * 300]}, "at most 200 characters"),
        ({"input_shape": [7]}, "input_shape must be the width"),
        ({"input_shape": [-1]}, "input_shape.0"),
        ({"divisor": 0}, "divisor: Input should be greater"),
        ({"features": [{"name": "a", "scale": 0}]}, "features.0.scale"),
        ({"features": [{"name": "a", "shift": float("nan")}]}, "features.0.shift"),
        ({"features": [{"name": "a", "fill": float("inf")}]}, "features.0.fill"),
        ({"features": [{"name": "a"}] * 2, "input_shape": [2]}, "columns must have different"),
        ({"features": [{"name": "a", "type": "category"}]}, "a category has categories"),
        (
            {"features": [{"name": "a", "type": "category", "categories": ["x"], "fill": "y"}]},
            "fill must be one",
        ),
        ({"hold_out": {"split": "time:"}}, "hold_out.split"),
        ({"hold_out": {"fraction": 1.0}}, "hold_out.fraction"),
    ],
)
def test_what_comes_over_the_wire_is_checked(change: dict[str, Any], message: str) -> None:
    good = {"kind": "classes", "num_classes": 3, "input_shape": [1], "features": [{"name": "a"}]}
    assert Schema.from_json(good | {"targets": ["t"]}).features[0].name == "a"
    with pytest.raises(DataError, match=message.replace(".", r"\.").replace(r"\.\*", ".*")):
        Schema.from_json(good | change)


def test_what_is_no_json_or_too_large_is_no_schema() -> None:
    for content, message in ((b"{", "must be JSON"), (b" " * 2**23, "bytes, got"), ([], "schema")):
        with pytest.raises(DataError, match=message):
            Schema.from_json(content)


def write(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    frame.to_csv(folder / f"{name}.csv", index=False)
    return folder / f"{name}.csv"


def test_a_device_reads_its_file_as_a_simulation_over_the_folder_does(tmp_path: Path) -> None:
    frame = patients().drop(columns="ward")
    paths = [write(tmp_path, "a", frame[:7]), write(tmp_path, "b", frame[5:])]
    data = from_folder(tmp_path, target_column="ill", seed=3, **ALL)
    schema = Schema.from_json(data.schema.to_json() if data.schema else None)
    for k, path in enumerate(paths):
        pd.read_csv(path).iloc[:, ::-1].to_csv(path, index=False)  # another order on the device
        own = from_file(path, schema=schema)
        for got, expected in (
            (own.client(0), data.client(k)),
            (own.client_test(0), data.client_test(k)),
        ):
            np.testing.assert_array_equal(got.inputs, expected.inputs)
            np.testing.assert_array_equal(got.targets, expected.targets)
        assert (own.classes, own.num_classes, own.kind) == (("no", "yes"), 2, "classes")
    lone = from_file(write(tmp_path, "lone", frame[:1]), schema=schema)
    assert (lone.train.num_examples, lone.test.num_examples) == (1, 0)


def test_whole_numbers_of_one_client_are_the_runs_regression(tmp_path: Path) -> None:
    x = np.arange(10.0)
    write(tmp_path, "a", pd.DataFrame({"x": x, "target": x + 0.5}))
    whole = write(tmp_path, "b", pd.DataFrame({"x": x, "target": np.arange(40, 50)}))
    data = from_folder(tmp_path)
    assert (data.kind, data.num_classes) == ("regression", 0)
    own = from_file(whole, schema=data.schema)
    np.testing.assert_array_equal(own.train.targets, data.client(1).targets)


def test_arrays_are_filled_and_scaled_by_feature_and_pixels_divided() -> None:
    inputs = np.array([[1.0, np.nan], [3.0, 4.0], [np.nan, 8.0], [5.0, 6.0]])
    data = from_clients(
        {"a": (inputs, [0, 1, 0, 1])}, split="last", missing="mean", scale="standard"
    )
    assert data.schema is not None
    assert [feature.name for feature in data.schema.features] == ["0", "1"]
    assert data.train.inputs[:, 0].mean() == pytest.approx(0, abs=1e-6)
    again, _ = data.schema.apply_arrays(inputs, [0, 1, 0, 1])
    np.testing.assert_array_equal(again[:3], data.train.inputs)
    pixels = np.full((4, 1, 2, 2), 255, np.uint8)
    images = from_clients({"a": (pixels, [0, 1, 0, 1])}, scale="pixels")
    assert (images.train.inputs.dtype, images.train.inputs.max()) == (np.float32, 1.0)
    with pytest.raises(DataError, match=r"rows of features.*for images of 0 to 255 say scale"):
        from_clients({"a": (pixels, [0, 1, 0, 1])}, scale="standard")
    with pytest.raises(DataError, match=r"\[examples, 1, 2, 2\], got shape=\[4, 2\]"):
        images.schema.apply_arrays(inputs, [0, 1, 0, 1])  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(DataError, match="must be arrays, got a table"):
        images.schema.apply(patients())  # pyright: ignore[reportOptionalMemberAccess]


def test_several_target_columns_are_labels_or_quantities() -> None:
    frame = patients().dropna()[["ward", "age"]].assign(cold=[0, 1] * 4, flu=[1, 1, 0, 0] * 2)
    options: dict[str, Any] = {"client_column": "ward", "target_column": ["cold", "flu"]}
    data = from_table(frame, kind="multilabel", **options)
    assert (data.num_classes, data.classes, data.train.targets.shape[1:]) == (
        2,
        ("cold", "flu"),
        (2,),
    )
    assert data.schema is not None
    _, targets = data.schema.apply(frame.drop(columns="ward"))
    np.testing.assert_array_equal(targets, frame[["cold", "flu"]])
    numbers = from_table(frame, kind="regression", **options)
    assert (numbers.kind, numbers.train.targets.shape[1:]) == ("regression", (2,))
    with pytest.raises(DataError, match='Say kind = "multilabel"'):
        from_table(frame, **options)


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        (list("pqrs") * 3, {}, r"got 'p' in column 'z', row 0.*say categories = .one-hot"),
        ([1, None] * 6, {}, r"got nan in column 'z', row 1 .* say missing = .mean"),
        (
            ["1", "2", "3", "n/a"] * 3,
            {"categories": "one-hot"},
            r"'n/a' in column 'z', row 3",
        ),
        (
            [f"id {k}" for k in range(24)],
            {"categories": "one-hot"},
            "repeat, got 24 different",
        ),
        ([None] * 12, {"missing": "mean"}, "a value to take the mean of, got none in column 'z'"),
        (
            ["a", None] * 6,
            {"missing": 0, "categories": "codes"},
            "with one, got missing = 0",
        ),
        (pd.date_range("2024-01-01", periods=12), {"categories": "one-hot"}, "got Timestamp"),
        ([1e308] * 12, {"scale": "standard"}, "small enough to be added up"),
        ([1, np.inf] * 6, {"scale": "standard"}, "finite, got inf in column 'z', row 1"),
    ],
)
def test_a_column_that_gives_no_feature_says_why(column: Any, options: Any, message: str) -> None:
    rows = len(column)
    frame = pd.DataFrame({"client": "a", "z": column, "target": np.arange(rows) % 2})
    with pytest.raises(DataError, match=message):
        from_table(frame, client_column="client", **options)


def test_rules_that_there_are_not_are_named() -> None:
    frame = patients()
    for options in ({"missing": "zero"}, {"scale": "max"}, {"missing": True}, {"split": "first"}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be .*got {name}="):
            from_table(frame, client_column="ward", target_column="ill", **options)
    data = from_table(frame, client_column="ward", target_column="ill", **ALL)
    with pytest.raises(ValueError, match="a schema says all of kind"):
        from_table(frame, client_column="ward", schema=data.schema, scale="minmax")
