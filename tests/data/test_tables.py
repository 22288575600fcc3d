"""Tables as pandas and other programs give them: read rightly, or refused with column and row."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.own_data import from_clients, from_file, from_folder, from_table
from potluck.data.tables.columns import Column, read_column
from potluck.data.tables.table_files import Located, read_table, split_by_client

D = decimal.Decimal
NAN = float("nan")
DAY = pd.Timestamp("2024-01-01")

# What is in a column: the kind, and the values with None for a hole; or what is said.
TAKEN: dict[str, tuple[Any, str, list[Any]]] = {
    "integers": (pd.Series([1, 2]), "number", [1, 2]),
    "small integers": (pd.Series([1, 2], dtype="int8"), "number", [1, 2]),
    "unsigned": (pd.Series([1, 2], dtype="uint64"), "number", [1, 2]),
    "beyond int64": (pd.Series([2**63, 1], dtype="uint64"), "number", [2.0**63, 1.0]),
    "half floats": (pd.Series([0.5, NAN], dtype="float16"), "number", [0.5, None]),
    "nullable integers": (pd.Series([1, None], dtype="Int64"), "number", [1, None]),
    "exact nullable integers": (
        pd.Series([2**53 + 1, None], dtype="Int64"),
        "number",
        [2**53 + 1, None],
    ),
    "nullable floats": (pd.Series([1.5, None], dtype="Float64"), "number", [1.5, None]),
    "arrow integers": (pd.Series([1, None], dtype="int64[pyarrow]"), "number", [1, None]),
    "arrow floats": (pd.Series([1.5, None], dtype="double[pyarrow]"), "number", [1.5, None]),
    "truth": (pd.Series([True, False]), "boolean", [True, False]),
    "truth with a hole": (pd.Series([True, None]), "boolean", [True, None]),
    "nullable truth": (pd.Series([True, None], dtype="boolean"), "boolean", [True, None]),
    "arrow truth": (pd.Series([True, None], dtype="bool[pyarrow]"), "boolean", [True, None]),
    "numpy truth": (pd.Series([np.True_, None], dtype=object), "boolean", [True, None]),
    "text": (pd.Series(["a", ""]), "text", ["a", ""]),
    "text with a hole": (pd.Series(["a", None]), "text", ["a", None]),
    "objects of text": (pd.Series(["NA", NAN], dtype=object), "text", ["NA", None]),
    "arrow text": (pd.Series(["a", None], dtype="string[pyarrow]"), "text", ["a", None]),
    "text of numbers": (pd.Series(["007", "7"]), "text", ["007", "7"]),
    "numpy text": (pd.Series([np.str_("a"), "b"], dtype=object), "text", ["a", "b"]),
    "categories": (pd.Series(pd.Categorical(["b", "a"])), "text", ["b", "a"]),
    "integer categories": (pd.Series(pd.Categorical([3, None, 3])), "number", [3, None, 3]),
    "float categories": (pd.Series(pd.Categorical([1.5, None])), "number", [1.5, None]),
    "truth categories": (pd.Series(pd.Categorical([True, None])), "boolean", [True, None]),
    "empty categories": (pd.Series(pd.Categorical([None, None])), "number", [None, None]),
    "sparse": (pd.Series(pd.arrays.SparseArray([0, 2])), "number", [0, 2]),
    "sparse with holes": (pd.Series(pd.arrays.SparseArray([NAN, 2.0])), "number", [None, 2.0]),
    "objects of numbers": (pd.Series([1, 2.5], dtype=object), "number", [1.0, 2.5]),
    "objects of integers": (
        pd.Series([1, np.int8(2), None], dtype=object),
        "number",
        [1, 2, None],
    ),
    "decimals": (pd.Series([D("1.5"), D("2.25"), D("NaN")]), "number", [1.5, 2.25, None]),
    "signalling": (pd.Series([D("1.5"), D("sNaN")]), "number", [1.5, None]),
    "whole decimals": (pd.Series([D("1"), None]), "number", [1.0, None]),
    "arrow decimals": (
        pd.Series([D("1.50"), None], dtype=pd.ArrowDtype(pyarrow.decimal128(5, 2))),
        "number",
        [1.5, None],
    ),
    "fractions": (pd.Series([Fraction(1, 2), 3]), "number", [0.5, 3.0]),
    "large exact integers": (pd.Series([2**70, 1], dtype=object), "number", [2.0**70, 1.0]),
    "masked": (pd.Series([1, np.ma.masked], dtype=object), "number", [1, None]),
    "nothing": (pd.Series([None, None]), "number", [None, None]),
    "all NaN": (pd.Series([NAN, NAN]), "number", [None, None]),
    "nullable nothing": (pd.Series([None, None], dtype="Int64"), "number", [None, None]),
    "no times": (pd.Series([pd.NaT, pd.NaT]), "number", [None, None]),
    "infinite": (pd.Series([np.inf, 1.0]), "number", [np.inf, 1.0]),
    "no rows": (pd.Series([], dtype=object), "number", []),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "times": (
        pd.Series([pd.NaT, DAY]),
        r"Timestamp\(.*row 1 of the table\. Make it a number, such",
    ),
    "zoned": (
        pd.Series([DAY.tz_localize("UTC")]),
        r"row 0 of the table\. Make it a number, such as",
    ),
    "dates": (
        pd.Series([datetime.date(2024, 1, 1)]),
        r"datetime\.date\(2024, 1, 1\) in column 'z'",
    ),
    "clock": (pd.Series([None, datetime.time(1)]), r"datetime\.time\(1, 0\) in column 'z', row 1"),
    "durations": (pd.Series([pd.Timedelta(1, "h")]), r"Timedelta\(.*such as days since some date"),
    "numpy durations": (pd.Series([np.timedelta64(1, "h")], dtype=object), "row 0 of the table"),
    "periods": (pd.Series([pd.Period("2024")]), r"Period\('2024'.*such as days"),
    "intervals": (pd.Series(pd.cut([1, 2], 2)), r"Interval\(.*column 'z', row 0"),
    "arrow times": (pd.Series([DAY]).astype("timestamp[us][pyarrow]"), "column 'z', row 0"),
    "lists": (pd.Series([None, [1, 2]]), r"got \[1, 2\] in column 'z', row 1 .*Give each of its"),
    "arrays": (pd.Series([np.arange(2)]), r"got array\(\[0, 1\]\) in column 'z', row 0"),
    "dictionaries": (pd.Series([{"a": 1}]), r"got \{'a': 1\} in column 'z', row 0"),
    "bytes": (pd.Series([b"a"]), r"got b'a' in column 'z', row 0 .*Decode it to text"),
    "complex": (pd.Series([1j]), r"got 1j in column 'z', row 0 .*two parts a column each"),
    "objects": (pd.Series([object()]), "got <object .* in column 'z', row 0"),
    "long": (pd.Series([list(range(1000))]), r"got \[0, 1.{40,60}… in column"),
    "mixture": (pd.Series(["1", None, 2]), r"text \('1'\) and numbers \(2\) in column 'z', row 2"),
    "truth and numbers": (
        pd.Series([True, 2], dtype=object),
        r"truth values \(True\) and numbers \(2\)",
    ),
    "not exact": (
        pd.Series([2**70 + 1, 1], dtype=object),
        "fit 64 bits, got 1180.*column 'z', row 0",
    ),
    "uint64 not exact": (pd.Series([1, 2**64 - 1], dtype="uint64"), "fit 64 bits, got .* row 1"),
    "huge": (pd.Series([Fraction(10**400)]), "fit 64 bits, got Fraction"),
}


def shown(column: Column) -> list[Any]:
    return [
        None if gone else value
        for value, gone in zip(column.values.tolist(), column.missing.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", TAKEN)
def test_a_column_is_read(name: str) -> None:
    series, kind, values = TAKEN[name]
    for index in (range(len(series)), range(7, 7 + len(series)), [0] * len(series)):
        column = read_column(series.set_axis(index))
        assert (column.type, shown(column)) == (kind, values)
        assert [type(value) for value in shown(column)] == [type(value) for value in values]
        assert column.values.dtype.kind in {"number": "if", "boolean": "b", "text": "U"}[kind]


@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_cannot_be_read_is_named_with_its_row(name: str) -> None:
    series, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        read_column(series.rename("z"))
    assert "column 'z', row" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=3),
            st.decimals(),
            st.dates(),
            st.complex_numbers(),
            st.binary(max_size=3),
            st.lists(st.integers(), max_size=2),
        ),
        max_size=4,
    )
)
def test_any_column_is_read_or_refused(values: list[Any]) -> None:
    series = pd.Series(values, dtype=object, name="z")
    try:
        column = read_column(series)
    except DataError as error:
        assert "column 'z', row" in str(error)  # noqa: PT017
    else:
        present = [value for value, gone in zip(values, column.missing, strict=True) if not gone]
        numbers = [float(value) if isinstance(value, D) else value for value in present]
        assert [value for value in shown(column) if value is not None] == numbers


# Whole tables


def frame(**changes: Any) -> pd.DataFrame:
    base = {"client": list("aabb"), "x": [0.5, 1.5, 2.5, 3.5], "target": [0, 1, 0, 1]}
    return pd.DataFrame(base | changes)


def inputs(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Of each client: what the training features are."""
    data = from_table(
        table, client_column="client", kind="classes", split="last", test_fraction=0.01
    )
    return {name: data.client(k).inputs.tolist() for k, name in enumerate(data.clients)}


PLAIN = {"a": [[0.5]], "b": [[2.5]]}
SAME: dict[str, Callable[[pd.DataFrame], Any]] = {
    "as it is": lambda f: f,
    "the client in the index": lambda f: f.set_index("client"),
    "the client in one level": lambda f: f.assign(day=range(4)).set_index(["client", "day"]),
    "an index of text": lambda f: f.set_axis(list("wxyz")),
    "an index that repeats": lambda f: f.set_axis([0, 0, 0, 0]),
    "an index column": lambda f: f.reset_index(names="Unnamed: 0"),
    "an index column from 7": lambda f: f.set_axis(range(7, 11)).reset_index(names=""),
    "a column of nothing": lambda f: f.assign(**{"Unnamed: 3": NAN}),
    "categorical clients": lambda f: f.assign(client=pd.Categorical(f.client, list("zab"))),
    "categorical features": lambda f: f.assign(x=f.x.astype("category")),
    "decimals": lambda f: f.assign(x=[D(str(value)) for value in f.x]),
    "objects": lambda f: f.astype(object),
    "arrow": lambda f: f.convert_dtypes(dtype_backend="pyarrow"),
    "nullable": lambda f: f.convert_dtypes(),
    "an Arrow table": pyarrow.Table.from_pandas,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_table_in_other_clothes_is_the_same(name: str) -> None:
    table = SAME[name](frame())
    assert inputs(table) == PLAIN
    data = from_table(table, client_column="client", kind="classes", split="last")
    assert data.clients == ("a", "b")
    assert data.train.targets.tolist() == [0, 0]
    assert all("left out" in note for note in data.notes)
    assert len(data.notes) == ("index column" in name or "of nothing" in name)


WRONG: list[tuple[Callable[[pd.DataFrame], Any], str]] = [
    (lambda f: pd.concat([f, f[["x"]]], axis=1), "column 'x' 2 times in the table"),
    (lambda f: f.rename(columns={"x": 1}).assign(**{"1": 0}), "column '1' 2 times"),
    (
        lambda f: f.rename(columns={"x": None}),
        "got none for column 1 of the table|none for column 0",
    ),
    (lambda f: f.rename(columns={"x": "Unnamed: 1"}), "every column must have a name, got none"),
    (lambda f: pd.concat({"g": f}, axis=1), "2 levels of names in the table, as .'g', 'client'"),
    (
        lambda f: f.assign(x=[1, np.inf, 2, 3]),
        "got inf in column 'x', row 1 of the table .client 'a'",
    ),
    (
        lambda f: f.assign(x=[1, 2, 3, NAN]),
        r"got nan in column 'x', row 3 of the table .client 'b'",
    ),
    (lambda f: f.assign(x=[1e39, 2, 3, 4]), r"got 1e\+39 in column 'x', row 0"),
    (lambda f: f.assign(x=list("1p2q")), "got 'p' in column 'x', row 1"),
    (
        lambda f: f.assign(x=2**53 + np.arange(4)),
        r"different whole numbers that become 1, .*'x', row",
    ),
    (lambda f: f.assign(target=[0, None, 1, 1]), "a target, got none in column 'target', row 1"),
    (
        lambda f: f.assign(client=["a", None, "b", "b"]),
        "its client, got none in column 'client', row 1",
    ),
    (lambda f: f.assign(client=[["a"], ["a"], "b", NAN]), "column 'client', row 3 of the table"),
    (lambda f: f.drop(columns="client"), "must have one column 'client', got columns x, target"),
    (lambda f: f[["client", "target"]], "a feature column beside 'target'"),
    (lambda f: f[:0], "at least one row, got none in the table"),
    (lambda f: f[[]], "must have one column 'client', got columns none"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_table_that_cannot_be_used_is_refused(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_table(change(frame()), client_column="client", kind="classes")


def test_clients_and_targets_are_two_columns() -> None:
    with pytest.raises(DataError, match="two columns, got column 'client' for both"):
        from_table(frame(), client_column="client", target_column="client")


KEYS: list[tuple[list[Any], list[str]]] = [
    ([1, 1, 2, 2], ["1", "2"]),
    ([True, True, False, False], ["True", "False"]),
    ([1.5, 1.5, 2.0, 2.0], ["1.5", "2.0"]),
    ([1, "1", "2", 2], ["1", "2"]),
    (["", "", " ", " "], ["", " "]),
    (["NA", "NA", "None", "None"], ["NA", "None"]),
    ([DAY, DAY, "nan", "nan"], ["2024-01-01 00:00:00", "nan"]),
    ([b"a", b"a", "[/]", "[/]"], ["a", "[/]"]),
    ([("a", 1), ("a", 1), "x\ny", "x\ny"], ["('a', 1)", "x\ny"]),
]


@pytest.mark.parametrize(("keys", "names"), KEYS)
def test_clients_are_called_as_their_keys_print(keys: list[Any], names: list[str]) -> None:
    table = frame(client=pd.Series(keys, dtype=object))
    assert list(split_by_client(Located(table, "the table"), "client")) == names


def test_large_quantities_stay_features() -> None:
    table = frame(x=[1_700_000_000 + 1000 * k for k in range(4)])
    assert inputs(table)["a"] == [[1.7e9]]


# CSV files


def csv(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: shown(read_column(table[name])) for name in table.columns}


FILES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "commas": ("a,b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}),
    "semicolons": ("a;b\n1.5;x\n2;y\n", {"a": [1.5, 2.0], "b": ["x", "y"]}),
    "tabs": ("a\tb\n1,5\tx\n2\ty\n", {"a": [1.5, 2.0], "b": ["x", "y"]}),
    "bars": ("a|b\n1|x\n", {"a": [1], "b": ["x"]}),
    "decimal commas": ("a;b\n1,5;2\n-,25;3\n", {"a": [1.5, -0.25], "b": [2, 3]}),
    "decimal commas, with exponents": ("a;b\n1,5e3;2\n", {"a": [1500.0], "b": [2]}),
    "decimal commas and holes": ("a;b\n1,5;\nNA;3\n", {"a": [1.5, None], "b": [None, 3.0]}),
    "quoted decimal commas": ('a,b\n"1,5",2\n', {"a": [1.5], "b": [2]}),
    "three decimals among others": ("a;b\n1,234;1\n1,2;2\n", {"a": [1.234, 1.2], "b": [1, 2]}),
    "below one": ("a;b\n0,123;1\n0,456;1\n", {"a": [0.123, 0.456], "b": [1, 1]}),
    "quotes": ('a,b\n"1","x, ""y"""\n', {"a": [1], "b": ['x, "y"']}),
    "a line end in a field": ('a,b\n1,"x\ny"\n', {"a": [1], "b": ["x\ny"]}),
    "missing words": (
        "a,b\n1,NA\nNA,None\nnull,nan\n",
        {"a": [1, None, None], "b": ["NA", "None", "nan"]},
    ),
    "question marks": ("a,b\n1.5,x\n?,y\n", {"a": [1.5, None], "b": ["x", "y"]}),
    "empty fields": ("a,b\n1,\n,y\n", {"a": [1.0, None], "b": [None, "y"]}),
    "truth": ("a,b\nTrue,false\nFalse,NA\n", {"a": [True, False], "b": [False, None]}),
    "truth with holes": ("a,b\nTRUE,1\n,2\n", {"a": [True, None], "b": [1, 2]}),
    "spaces": ("a, b\n1, x\n2, y\n", {"a": [1, 2], "b": ["x", "y"]}),
    "blank lines": ("\na,b\n\n1,2\n\n", {"a": [1], "b": [2]}),
    "an index": (",a,b\n0,5,6\n1,7,8\n", {"a": [5, 7], "b": [6, 8]}),
    "row names of R": ('"","a"\n"1",5\n"2",6\n', {"a": [5, 6]}),
    "an end too many": ("a,b,\n1,2,\n", {"a": [1], "b": [2]}),
    "one column": ("a\n1\n", {"a": [1]}),
    "commas in the header": ('"x, y";a\n1;2\n', {"x, y": [1], "a": [2]}),
    "infinite": ("a,b\ninf,1\n2,2\n", {"a": [np.inf, 2.0], "b": [1, 2]}),
    "numbers as names": ("0,1\n5,6\n", {"0": [5], "1": [6]}),
    "Excel's first line": ("sep=;\na;b\n1,5;2\n", {"a": [1.5], "b": [2]}),
    "long numbers": ("a,b\n36893488147419103232,1\n1,2\n", {"a": [2.0**65, 1.0], "b": [1, 2]}),
    "no rows": ("a,b\n", {"a": [], "b": []}),
}
ENCODED = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]


@pytest.mark.parametrize("name", FILES)
def test_a_csv_file_is_read(tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    for encoding in ENCODED:
        for end in ("\n", "\r\n"):
            found = columns(read_table(csv(tmp_path, text.replace("\n", end).encode(encoding))))
            if name != "a line end in a field":
                assert found == expected, (encoding, end)
    assert columns(read_table(csv(tmp_path, text, "T.CSV"))) == expected


BAD_FILES = [
    (
        "a;b\n1.234,56;1\n",
        "no separators of thousands, got '1.234,56' in column 'a', line 2 of .*t.csv",
    ),
    (
        'a,b\n1,1\n"1,234,567",1\n',
        "no separators of thousands, got '1,234,567' in column 'a', line 3",
    ),
    ("a;b\n1 234;1\n", "no separators of thousands, got '1 234'"),
    ("a;b\n1'234.5;1\n", "no separators of thousands"),
    ("a;b\n1,234;1\n5,678;1\n", "a comma before three digits may be either, got '1,234'"),
    (
        "a;b\n1,5;1\n2.5;1\n",
        "all decimal points or all decimal commas, got '1,5' in column 'a', line 2",
    ),
    (
        "a;b\n1,5;1.234\n2,5;5.678\n",
        "a point before three digits .* got '1.234' in column 'b', line 2",
    ),
    ("a,b,a\n1,2,3\n", "column 'a' 2 times in .*t.csv"),
    ("a,b,\n1,2,x\n", "must have a name, got none for column 2"),
    (",a\nx,1\ny,2\n", "must have a name, got none for column 0"),
    ("sep=,\na,b\n1,2\n3\n", "a field for each of the 2 columns, got 1 in line 4 of"),
    ("a,b\n1,2\n3\n", "a field for each of the 2 columns, got 1 in line 3 of"),
    ("a,b\n1,2,3\n", "more fields in a row than in the header"),
    ("a,b\n1,2\n1,2,3\n", "must be a whole .csv file with one table, got error="),
    ("", "got an empty one"),
    ("\n\n", "got an empty one"),
    ("a,b\n1,zürich\n".encode("latin-1"), "must be text in UTF-8, got byte=0xfc in line 2"),
    (b"PK\x03\x04\0\0", "got an Excel workbook"),
    (b"a,b\n1,\0\0\0x\n", "got a binary one"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_csv_file_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(csv(tmp_path, content))


def test_a_name_or_a_class_may_be_what_pandas_takes_for_missing(tmp_path: Path) -> None:
    names = ["NA", "None", "null", "nan", "NaN", "N/A", "007", "1e5", "True", " ", "[/]", "=1+1"]
    rows = "".join(f"{name},1.5,{label}\n" for name in names for label in ("None", "NA", "yes"))
    data = from_table(csv(tmp_path, "client,x,target\n" + rows), client_column="client")
    assert list(data.clients) == names
    assert data.classes == ("NA", "None", "yes")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=8),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(",;\t|"),
)
def test_names_come_back_from_a_csv_file(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], encoding: str, by: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    table = pd.DataFrame(
        {"client": names * 2, "x": 0.5, "target": [0] * len(names) + [1] * len(names)}
    )
    path.write_bytes(table.to_csv(index=False, sep=by, lineterminator="\n").encode(encoding))
    data = from_table(path, client_column="client")
    assert list(data.clients) == names


def test_a_column_without_values_at_one_client_is_one_of_holes(tmp_path: Path) -> None:
    csv(tmp_path, "x,y,target\n1,1.5,0\n2,2.5,1\n", "a.csv")
    csv(tmp_path, "x,y,target\n1,NA,0\n2,NA,1\n", "b.csv")
    with pytest.raises(DataError, match=r"got nan in column 'y', line 2 of .*b\.csv"):
        from_folder(tmp_path)


def test_a_folder_loses_no_client(tmp_path: Path) -> None:
    text = "x,target\n" + "1,0\n2,1\n" * 3
    for name in ("Ward.csv", "ward.csv", "caf\u00e9.csv", "cafe\u0301.CSV", "[red].csv", "a.b.csv"):
        csv(tmp_path, text, name)
    data = from_folder(tmp_path)
    assert set(data.clients) == {"Ward", "ward", "caf\u00e9", "cafe\u0301", "[red]", "a.b"}
    csv(tmp_path, text, "ward.CSV")
    with pytest.raises(DataError, match=r"got ward\.CSV and ward\.csv, both for client 'ward'"):
        from_folder(tmp_path)


def test_an_index_is_left_out_of_every_file_alike(tmp_path: Path) -> None:
    for name in "ab":
        frame().drop(columns="client").to_csv(tmp_path / f"{name}.csv")
    data = from_folder(tmp_path)
    assert data.train.inputs.shape[1:] == (1,)
    assert [note for note in data.notes if "numbers the rows" in note] == [
        "column 0 has no name and numbers the rows: it is left out"
    ]


# Arrays of clients

ROWS = [[1.5, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
NUMBERS: dict[str, tuple[Any, Any]] = {
    "lists": (ROWS, [0, 1, 0, 1]),
    "a frame": (pd.DataFrame(ROWS), pd.Series([0, 1, 0, 1], index=[7, 7, 8, 8])),
    "a frame of types": (
        pd.DataFrame({"a": [1.5, 3, 5, 7], "b": pd.array([2, 4, 6, 8], dtype="Int64")}),
        pd.Series([0, 1, 0, 1], dtype="Int64"),
    ),
    "objects": (np.array(ROWS, dtype=object), np.array([0, 1, 0, 1], dtype=object)),
    "decimals": ([[D(str(value)) for value in row] for row in ROWS], [0, 1, 0, 1]),
    "a mask of nothing": (np.ma.masked_array(ROWS, mask=False), np.ma.masked_array([0, 1, 0, 1])),
    "categories": (ROWS, pd.Categorical([0, 1, 0, 1])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_arrays_of_any_make_are_the_same_arrays(name: str) -> None:
    data = from_clients({"a": NUMBERS[name]}, num_classes=2, split="last", test_fraction=0.25)
    assert data.train.inputs.tolist() == ROWS[:3]
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (np.float32, np.int64)
    assert data.train.targets.tolist() == [0, 1, 0]


BAD_ARRAYS: list[tuple[Any, Any, str]] = [
    (np.ma.masked_equal(np.array(ROWS), 4.0), [0, 1, 0, 1], "the inputs of client 'a'.* example 1"),
    (ROWS, np.ma.masked_equal([0, 1, 2, 1], 2), "the targets of client 'a' .* in example 2"),
    (ROWS, pd.Series([0, None, 1, 1], dtype="Int64"), "the targets of client 'a' .* in example 1"),
    (
        ROWS,
        ["y", None, "n", "n"],
        "no text may be missing, got none in column '0', row 1 of",
    ),
    (
        np.array([[1, "x"]] * 4, dtype=object),
        [0, 1, 0, 1],
        "got 'x' in column '1', row 0 of",
    ),
    ([[1, D("1")], [1, [2]]] * 2, [0, 1, 0, 1], "error=|in column '1', row 1 of the inputs"),
    (np.array(ROWS) * 1j, [0, 1, 0, 1], "dtype=complex128"),
    (pd.DataFrame({"a": pd.date_range("2024", periods=4)}), [0, 1, 0, 1], "dtype=datetime64"),
    (ROWS, np.array([2**64 - 1, 0, 1, 1], np.uint64), "whole numbers below"),
]


@pytest.mark.parametrize(("given", "targets", "message"), BAD_ARRAYS)
def test_arrays_that_cannot_be_used_are_refused(given: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_clients({"a": (given, targets)}, num_classes=None, kind=None)


def test_columns_may_be_named_by_numbers() -> None:
    table = frame().rename(columns={"client": 0, "x": 1, "target": 2})
    data = from_table(table, client_column=0, target_column=2, kind="classes")  # type: ignore[arg-type]
    assert (data.clients, data.train.targets.tolist()) == (("a", "b"), [1, 1])


def test_what_is_text_in_one_file_is_text_in_all_and_on_devices(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    folder.mkdir()
    (folder / "a.csv").write_text("ward,target\n" + "".join(f"{w},yes\n{w},no\n" for w in "ABCD"))
    (folder / "b.csv").write_text("ward,target\n01,yes\n1,no\n01,yes\n")
    data = from_folder(folder, categories="codes")
    schema = data.schema
    assert schema is not None
    assert schema.features[0].categories == ("01", "1", "A", "B", "C", "D")
    device = tmp_path / "device.csv"
    for name, code in (("01", 0.0), ("1", 1.0)):  # as numbers they would be one
        device.write_text(f"ward,target\n{name},yes\n{name},no\n")
        assert set(from_file(device, schema=schema).train.inputs.ravel().tolist()) == {code}
        inputs, _ = schema.apply(schema.read(device))
        assert inputs.ravel().tolist() == [code, code]


def test_answers_are_text_where_one_file_has_a_third_beside_true_and_false(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    folder.mkdir()
    (folder / "a.csv").write_text("x,target\n" + "1,true\n2,false\n3,unknown\n" * 3)
    (folder / "b.csv").write_text("x,target\n" + "1,true\n2,false\n" * 3)
    data = from_folder(folder)
    assert data.classes == ("false", "true", "unknown")
    device = from_file(folder / "b.csv", schema=data.schema)
    assert set(device.train.targets.tolist()) == {0, 1}


@pytest.mark.parametrize(
    "text",
    [
        "id,target,x\n1,0,5,\n2,1,6,\n3,0,7,\n",  # separators at the ends of rows
        "id,target,x\n0,0,5,\n1,1,6,\n2,0,7,\n",
        "target,x\n1,0,5\n2,1,6\n",  # names of rows without a name of their own
        "# of 2024\nid,target,x\n1,0,5\n",
    ],
)
def test_rows_that_are_longer_than_the_header_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="more fields in a row than in the header"):
        read_table(path)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "none.xlsx"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="a file that is there"):
        read_table(tmp_path / name)


def test_messages_name_the_line_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('client,note,x,target\na,"two\nlines",1,u\n\nb,p,2,v\na,p,,u\nb,p,oh,v\n')
    rules: Any = {"client_column": "client", "categories": "one-hot"}
    with pytest.raises(DataError, match=r"'oh' in column 'x', line 7 of .*t\.csv"):
        from_table(path, **rules)
    path.write_text(path.read_text().replace("oh", "3"))
    with pytest.raises(DataError, match=r"nan in column 'x', line 6 of .*t\.csv \(client 'a'\)"):
        from_table(path, **rules)
    frame = pd.read_csv(path)
    with pytest.raises(DataError, match=r"nan in column 'x', row 2 of the table \(client 'a'\)"):
        from_table(frame, **rules)
    path.write_text(path.read_text().replace("p,,u", "p,4,"))
    with pytest.raises(DataError, match=r"none in column 'target', line 6 of .* \(client 'a'\)"):
        from_table(path, **rules)


@pytest.mark.parametrize("column", ["target", "ward", "client"])
@pytest.mark.parametrize("pair", [("a", "a "), ("m\u00fcde", "mu\u0308de")])
def test_names_that_look_alike_are_refused(column: str, pair: tuple[str, str]) -> None:
    table = pd.DataFrame({name: list("aabb") * 2 for name in ("client", "ward", "target")})
    table.loc[[4, 5], column] = pair
    with pytest.raises(DataError, match=r"more than the spaces around them, .*, got '.*' and '"):
        from_table(table, client_column="client", categories="one-hot")
