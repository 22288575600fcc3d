"""A user's own data: what becomes of it, and what is said about data that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.federated import Examples, FederatedData
from potluck.data.own_data import from_clients, from_folder, from_table


def pair(num_examples: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [n, 2] that count up from `start`, and alternating labels."""
    rows = np.arange(start, start + num_examples)
    return np.stack([rows, -rows], axis=1).astype(np.float64), rows % 2


def table(num_rows: int, start: int = 0) -> pd.DataFrame:
    inputs, targets = pair(num_rows, start)
    return pd.DataFrame({"a": inputs[:, 0], "target": targets, "b": inputs[:, 1]})


def own_test_sizes(data: FederatedData) -> list[int]:
    assert data.test_offsets is not None
    return np.diff(data.test_offsets).tolist()


# A dictionary of clients


def test_each_client_keeps_its_last_fifth_for_the_test_when_asked() -> None:
    data = from_clients({"b": pair(10), "a": pair(4, 100)}, split="last")
    assert data.clients == ("b", "a")
    assert data.sizes.tolist() == [8, 3]
    assert own_test_sizes(data) == [2, 1]
    assert data.client(0).inputs[:, 0].tolist() == list(range(8))
    assert data.client_test(0).inputs[:, 0].tolist() == [8, 9]
    assert data.client_test(1).inputs[:, 0].tolist() == [103]
    assert data.client_test(1).targets.tolist() == [1]
    assert data.num_classes == 2
    assert data.train.inputs.dtype == np.float32
    assert data.train.targets.dtype == np.int64


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda s: max(s) > 1))
@settings(max_examples=50, deadline=None)
def test_no_example_is_lost(sizes: list[int]) -> None:
    starts = np.cumsum([0, *sizes])
    clients = {str(k): pair(n, int(starts[k])) for k, n in enumerate(sizes)}
    data = from_clients(clients)
    rows = np.concatenate([data.train.inputs[:, 0], data.test.inputs[:, 0]])
    assert sorted(rows.tolist()) == list(range(sum(sizes)))
    assert (data.sizes + own_test_sizes(data)).tolist() == sizes


def test_a_one_example_client_trains_on_it() -> None:
    data = from_clients({"one": pair(1), "two": pair(2)})
    assert data.sizes.tolist() == [1, 1]
    assert own_test_sizes(data) == [0, 1]
    with pytest.raises(DataError, match="must be a test example, got none: a client with one"):
        from_clients({"one": pair(1), "other": pair(1)})


def test_a_shared_test_set_leaves_every_example_for_training() -> None:
    data = from_clients({"one": pair(1), "two": pair(2)}, test=pair(5, 50))
    assert data.sizes.tolist() == [1, 2]
    assert data.test_offsets is None
    assert data.test.inputs[:, 0].tolist() == [50, 51, 52, 53, 54]


def test_own_test_sets_may_be_given_for_some_clients() -> None:
    data = from_clients({"a": pair(3), "b": pair(2)}, test={"b": pair(4, 50)})
    assert data.sizes.tolist() == [3, 2]
    assert own_test_sizes(data) == [0, 4]
    with pytest.raises(DataError, match="only clients that train, got client='c'"):
        from_clients({"a": pair(3)}, test={"c": pair(4)})


def test_integer_inputs_stay_integers_and_float_targets_are_a_regression() -> None:
    data = from_clients({"a": Examples(np.ones((5, 3), np.int32), np.linspace(0, 1, 5))})
    assert data.train.inputs.dtype == np.int64
    assert data.train.targets.dtype == np.float32
    assert data.num_classes == 0


def test_num_classes_may_be_more_than_occur_but_not_less() -> None:
    assert from_clients({"a": pair(4)}, num_classes=7).num_classes == 7
    with pytest.raises(
        DataError, match=r"from 0 to 0 \(num_classes=1\), got label=1 in example 1 of client 'a'"
    ):
        from_clients({"a": pair(4)}, num_classes=1)
    with pytest.raises(DataError, match=r"got label=1 in example 1 of the shared test set"):
        from_clients({"a": (np.ones((2, 2)), [0, 0])}, test=pair(4), num_classes=1)
    with pytest.raises(DataError, match=r"whole numbers or text, got 0\.5 in ex"):
        from_clients({"a": (np.ones(4), np.arange(4) / 2)}, num_classes=3)


def with_nan(row: int) -> np.ndarray:
    inputs = np.ones((4, 2))
    inputs[row, 1] = np.nan
    return inputs


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((np.ones((0, 2)), np.ones(0, int)), "client 'x' must have at least one example, got 0"),
        ((np.ones((3, 2)), np.ones(4, int)), "client 'x' .* got inputs=3, targets=4"),
        ((with_nan(2), np.ones(4, int)), "inputs of client 'x' .* NaN or infinity in example 2"),
        ((np.full((1, 2), np.inf), [0]), "inputs of client 'x' .* infinity in example 0"),
        ((np.full((1, 2), 1e39), [0]), "inputs of client 'x' .* infinity in example 0"),
        ((np.ones((2, 2)), [0.5, np.nan]), "targets of client 'x' .* NaN or infinity in example 1"),
        (
            (np.ones((2, 2)), [0, -1]),
            r"from -1 to 1 in 6 examples \(see client 'x'",
        ),
        (
            (np.ones((2, 2)), ["a", "b"]),
            "all numbers or all text, got 'a' in example 0 of client 'x'",
        ),
        (
            (np.ones((2, 2)), [{}, {}]),
            r"got \{\} in column '0', row 0 of the targets of client 'x'",
        ),
        (
            (np.array([{}, {}]), [0, 1]),
            r"got \{\} in column '0', row 0 of the inputs of client 'x'",
        ),
        (([[1.0], [1.0, 2.0]], [0, 1]), "inputs of client 'x' must be an array, got error="),
        ((3.0, 1), r"inputs of client 'x' .* axis of examples, .* shape=\(\)"),
        (np.ones((3, 2)), r"client 'x' must be a pair \(inputs, targets\), got ndarray"),
        ((np.ones((2, 3)), [0, 1]), r"inputs .* as in client 'good', got shape=\(3,\).* 'x'"),
        ((np.ones((2, 2), int), [0, 1]), "inputs .* float64 as in .* got .*dtype=int64 in .*'x'"),
        ((np.ones((2, 2)), [0.5, 1.5]), "targets .* int64 as in .* got .*dtype=float64 in .*'x'"),
    ],
)
def test_a_client_that_cannot_be_used_is_named(bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_clients({"good": pair(4), "x": bad})


def test_a_bad_test_set_is_named() -> None:
    with pytest.raises(DataError, match="the test of client 'a' must have at least one example"):
        from_clients({"a": pair(4)}, test={"a": pair(0)})
    with pytest.raises(DataError, match=r"shape=\(3,\), .* in the shared test set"):
        from_clients({"a": pair(4)}, test=(np.ones((2, 3)), [0, 1]))


def test_there_must_be_clients_and_a_fraction_between_0_and_1() -> None:
    with pytest.raises(DataError, match="at least one client, got none"):
        from_clients({})
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"got test_fraction={fraction}"):
            from_clients({"a": pair(4)}, test_fraction=fraction)


# A folder with a file per client


def save_npz(path: Path, num_rows: int, start: int = 0) -> None:
    inputs, targets = pair(num_rows, start)
    np.savez(path, inputs=inputs, targets=targets)


def save_csv(path: Path, num_rows: int, start: int = 0) -> None:
    table(num_rows, start).to_csv(path, index=False)


def save_parquet(path: Path, num_rows: int, start: int = 0) -> None:
    table(num_rows, start).to_parquet(path)


KINDS: dict[str, Callable[..., None]] = {
    ".npz": save_npz,
    ".csv": save_csv,
    ".parquet": save_parquet,
}


@pytest.mark.parametrize("suffix", KINDS)
def test_a_folder_is_one_client_a_file_in_the_order_of_names(tmp_path: Path, suffix: str) -> None:
    KINDS[suffix](tmp_path / f"zoe{suffix}", 10)
    KINDS[suffix](tmp_path / f"adam{suffix}", 5, 100)
    (tmp_path / ".hidden").write_text("ignored")
    data = from_folder(tmp_path, split="last")
    assert data.name == tmp_path.name
    assert data.clients == ("adam", "zoe")
    assert data.sizes.tolist() == [4, 8]
    assert own_test_sizes(data) == [1, 2]
    assert data.client(0).inputs.tolist() == [[100, -100], [101, -101], [102, -102], [103, -103]]
    assert data.client_test(1).targets.tolist() == [0, 1]
    assert data.train.inputs.dtype == np.float32
    assert data.num_classes == 2


def test_folders_of_one_content_in_any_kind_are_equal(tmp_path: Path) -> None:
    digests: set[str] = set()
    for suffix, save in KINDS.items():
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        save(folder / f"a{suffix}", 6)
        save(folder / f"b{suffix}", 3, 50)
        digests.add(from_folder(folder).digest())
    assert len(digests) == 1


def test_a_folder_must_exist_and_hold_clients_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must exist, got folder='.*nowhere'"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"for each client, got no files"):
        from_folder(tmp_path)
    save_csv(tmp_path / "a.csv", 3)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"must hold only .* files, got notes\.txt"):
        from_folder(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "more.csv").mkdir()
    with pytest.raises(DataError, match=r"must hold only .* files, got more\.csv"):
        from_folder(tmp_path)
    (tmp_path / "more.csv").rmdir()
    save_npz(tmp_path / "b.npz", 3)
    with pytest.raises(DataError, match=r"must be of one kind, got \.csv and \.npz"):
        from_folder(tmp_path)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    KINDS[suffix](path, 40)
    path.write_bytes(path.read_bytes()[:100] if suffix != ".csv" else b"")
    with pytest.raises(DataError, match=rf"a\{suffix} must be a whole \{suffix} file.* got "):
        from_folder(tmp_path)


def test_an_npz_file_with_damaged_contents_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_npz(path, 200)
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"a\.npz must be a whole \.npz file"):
        from_folder(tmp_path)


def test_npz_files_need_two_arrays_and_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones(3), targets=np.ones(3))
    with pytest.raises(DataError, match=r"a\.npz must hold arrays .* got x, targets"):
        from_folder(tmp_path)
    np.savez(path, inputs=np.array([{}, 1], object), targets=np.ones(2))
    with pytest.raises(DataError, match=r"a\.npz .* without pickled objects, got error='Object"):
        from_folder(tmp_path)
    with path.open("wb") as stream:
        np.save(stream, np.ones(3))
    with pytest.raises(DataError, match=r"a\.npz .* got error='a single array"):
        from_folder(tmp_path)
    np.savez(path, inputs=np.full((2, 2), np.nan), targets=np.array([0, 1]))
    with pytest.raises(DataError, match=r"inputs of .*a\.npz must be finite"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"x\.csv must have one column 'target', got columns a, b"),
        (
            "a,target\n1,0\n",
            r"x\.csv must have one column 'b', got columns a, target",
        ),
        ("b,target,a,c\n1,0,2,3\n", r"x\.csv .* a, b, target alone, got column 'c' too"),
        ("a,target,b\n1,0,hello\n", r"numbers, got 'hello' in column 'b', line 2 of .*x\.csv"),
        ("a,target,b\n1,0,2\n1,0,\n", r"finite, got nan in column 'b', line 3 of .*x\.csv"),
        ("a,target,b\n1,0,inf\n", r"finite, got inf in column 'b', line 2 of .*x\.csv"),
        ("a,target,b\n1,,2\n", r"must have a target, got none in column 'target', line 2 of .*x\."),
        ("a,target,b\n1,-3,2\n", r"from -3 to 1 in 4 examples \(see .*x\.csv"),
        ("a,target,b\n1,cat,2\n", r"all numbers or all text, got 'cat' .*x\.csv"),
        ("a,target,b\n", r"x\.csv must have at least one example, got 0"),
        ("a,target,b\n1,0,2,9\n", r"x\.csv must be a whole .* got more fields in a row"),
        ('a,target,b\n"1,0,2\n', r"x\.csv must be a whole \.csv file .*error="),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    save_csv(tmp_path / "good.csv", 3)
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        from_folder(tmp_path)


def test_a_table_needs_a_feature(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("target\n1\n0\n")
    with pytest.raises(DataError, match=r"a feature column beside 'target', got none in .*x\.csv"):
        from_folder(tmp_path)


def test_parquet_columns_of_lists_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": [[1, 2], [3, 4]], "target": [0, 1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"got array\(\[1, 2\]\) in column 'a', row 0 of .*x\.parq"):
        from_folder(tmp_path)


def test_text_labels_are_numbered_in_sorted_order_over_all_clients(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,target\n1,dog\n2,cat\n3,dog\n")
    (tmp_path / "b.csv").write_text("x,target\n1,ant\n2,dog\n")
    data = from_folder(tmp_path, split="last")
    assert (data.num_classes, data.classes) == (3, ("ant", "cat", "dog"))
    assert data.client(0).targets.tolist() == [2, 1]
    assert data.client(1).targets.tolist() == [0]
    assert data.test.targets.tolist() == [2, 2]


def test_one_file_with_float_targets_makes_a_regression_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,target\n1,2\n2,3\n")
    (tmp_path / "b.csv").write_text("x,target\n1,0.5\n2,-1.5\n")
    data = from_folder(tmp_path, split="last")
    assert data.num_classes == 0
    assert data.train.targets.tolist() == [2.0, 0.5]
    assert data.test.targets.tolist() == [3.0, -1.5]


# A table with a client column


def visits() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "site": ["07", "7", "07", "7", "07", "12"],
            "age": [30, 40, 31, 41, 32, 50],
            "smokes": [True, False, False, True, True, False],
            "ill": ["no", "yes", "yes", "no", "yes", "no"],
        }
    )


def check_visits(data: FederatedData) -> None:
    assert data.clients == ("07", "7", "12")
    assert data.sizes.tolist() == [2, 1, 1]
    assert own_test_sizes(data) == [1, 1, 0]
    assert data.train.inputs.tolist() == [[30, 1], [31, 0], [41, 1], [50, 0]]
    assert data.train.targets.tolist() == [0, 1, 0, 0]
    assert data.test.inputs.tolist() == [[32, 1], [40, 0]]
    assert data.num_classes == 2


def test_a_table_is_divided_by_its_client_column(tmp_path: Path) -> None:
    check_visits(from_table(visits(), client_column="site", target_column="ill"))
    visits().to_csv(tmp_path / "v.csv", index=False)
    check_visits(from_table(tmp_path / "v.csv", client_column="site", target_column="ill"))
    visits().to_parquet(tmp_path / "v.parquet")
    check_visits(from_table(str(tmp_path / "v.parquet"), client_column="site", target_column="ill"))


def test_categorical_and_nullable_columns_are_read() -> None:
    frame = visits().astype({"ill": "category", "age": "Int64", "smokes": "boolean"})
    check_visits(from_table(frame, client_column="site", target_column="ill"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.drop(columns="site"),
            "the table must have one column 'site', got columns age",
        ),
        (lambda f: f.drop(columns="ill"), "client '07' of the table must have one column 'ill'"),
        (lambda f: f.assign(site=["a", None, *"bcde"]), "got none in column 'site', row 1 of the"),
        (
            lambda f: f.assign(age=[30, 40, 31, np.nan, 1, 2]),
            "column 'age', row 3 of the table .client '7'",
        ),
        (
            lambda f: f.assign(when=pd.Timestamp(2024, 1, 1)),
            "'when', row 0 of the table .client '07'",
        ),
        (
            lambda f: f.assign(ill=["no", 1, *["no"] * 4]),
            r"text \('no'\) in column 'ill', row 3 of the table .client '7'",
        ),
        (lambda f: f[:0], "at least one row, got none in the table"),
    ],
)
def test_a_table_that_cannot_be_used_says_where(
    change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        from_table(change(visits()), client_column="site", target_column="ill")


def test_a_table_is_a_frame_or_a_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a pandas DataFrame or a path, got dict"):
        from_table({"a": [1]}, client_column="a")
    with pytest.raises(DataError, match=r"must be a \.csv or \.parquet file, got .*a\.npz"):
        from_table(tmp_path / "a.npz", client_column="a")
    with pytest.raises(DataError, match=r"must be a file that is there, got path=.*a\.csv"):
        from_table(tmp_path / "a.csv", client_column="a")


def test_tables_among_arrays_go_by_the_names_of_their_columns() -> None:
    first = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [10.0, 20.0, 30.0]})
    other = first[["y", "x"]]
    labels = ["a", "b", "a"]
    data = from_clients({"1": (first, labels), "2": (other, labels)}, test=(other, labels))
    for part in (data.train.inputs[:3], data.train.inputs[3:], data.test.inputs):
        assert part.tolist() == first.to_numpy().tolist()
    with pytest.raises(DataError, match=r"same columns, \['x', 'y'\], got \['x', 'z'\] in client"):
        from_clients({"1": (first, labels), "2": (first.rename(columns={"y": "z"}), labels)})


def test_pixels_are_divided_by_255_in_arrays_and_tables_and_never_twice() -> None:
    pixels = np.array([[0, 255], [51, 102]] * 3, np.uint8)
    labels = [0, 1] * 3
    table = pd.DataFrame(pixels, columns=["p", "q"]).assign(client="a", target=labels)
    expected = {(0.0, 1.0), (np.float32(0.2), np.float32(0.4))}
    for data in (
        from_clients({"a": (pixels, labels)}, scale="pixels"),
        from_clients({"a": (pixels, labels)}, scale="pixels", missing="mean"),
        from_table(table, client_column="client", scale="pixels"),
    ):
        assert set(map(tuple, data.train.inputs)) == expected
        schema = data.schema
        assert schema is not None
        again = (
            schema.apply(table.drop(columns="client"))
            if schema.targets
            else (schema.apply_arrays(pixels, labels))
        )
        assert set(map(tuple, again[0])) == expected
    for odd in (pixels / 255, pixels - 128.0, pixels * 257.0):
        with pytest.raises(DataError, match="from 0 to 255"):
            from_clients({"a": (odd, labels)}, scale="pixels")
        table[["p", "q"]] = odd
        with pytest.raises(DataError, match=r"column '[pq]' of .* from 0 to 255"):
            from_table(table, client_column="client", scale="pixels")


def test_arrays_have_no_column_to_be_split_by(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.zeros((4, 2)), targets=[0, 1, 0, 1])
    with pytest.raises(DataError, match="no column to be split by, got split='time:day'"):
        from_folder(tmp_path, split="time:day")


@pytest.mark.parametrize("split", ["group:client", "group:target"])
def test_a_split_names_another_column(split: str) -> None:
    table = pd.DataFrame({"client": list("ab") * 4, "x": 1.5, "target": list("uuvv") * 2})
    with pytest.raises(DataError, match=f"got .*{split.partition(':')[2]}.*Name another"):
        from_table(table, client_column="client", split=split)


def test_any_tensor_and_any_number_are_taken() -> None:
    torch = pytest.importorskip("torch")
    inputs = torch.ones(4, 2, requires_grad=True)
    for tensor in (inputs, inputs.bfloat16()):
        data = from_clients({"a": (tensor, torch.tensor([0, 1, 0, 1]))}, missing=np.float32(1))
        assert (data.train.inputs == 1).all()
