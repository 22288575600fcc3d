"""Which examples are held out: each class in its share, by time, by group, and alike everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.own_data import from_clients, from_table
from potluck.data.tables.hold_out import HoldOut, num_test
from potluck.device import read_own


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_class_has_its_share_to_less_than_one_example(labels, fraction, seed) -> None:
    targets = np.array(sorted(labels))  # as a file that is sorted by diagnosis
    train, test = HoldOut(fraction=fraction, seed=seed).divide(targets, None, "here")
    assert sorted([*train, *test]) == list(range(len(targets)))
    assert train.tolist() == sorted(train)
    assert len(test) == num_test(len(targets), fraction)
    for label in np.unique(targets):
        share = (targets == label).sum() * len(test) / len(targets)
        # Less than one off by rounding, and one more where a lone example is kept for training.
        assert abs((targets[test] == label).sum() - share) < 2
    if len(train) > len(test) and all(n > 1 for n in np.unique(targets, return_counts=True)[1]):
        assert set(targets[train]) == set(targets)


def test_the_share_of_a_class_is_its_share_over_many_seeds() -> None:
    """Two-sided: 30 of 100 ill, 20 held out, so 6 ill in each test set and each row alike."""
    targets = np.repeat([0, 1], [70, 30])
    often = np.zeros(100)
    for seed in range(400):
        _, test = HoldOut(seed=seed).divide(targets, None, "here")
        assert targets[test].sum() == 6
        often[test] += 1
    # Each row is in the test with probability 0.2: standard deviation 0.02 of 400.
    assert np.abs(often / 400 - 0.2).max() < 0.1
    assert (often / 400).std() == pytest.approx(0.02, rel=0.35)


def test_a_regression_is_shuffled_and_the_seed_decides() -> None:
    targets = np.arange(1000, dtype=np.float32)
    splits = [HoldOut(seed=seed).divide(targets, None, "here")[1] for seed in (0, 0, 1)]
    assert splits[0].tolist() == splits[1].tolist() != splits[2].tolist()
    assert targets[splits[0]].mean() == pytest.approx(499.5, abs=5 * 289 / np.sqrt(200))


def test_the_last_rows_are_held_out_when_asked() -> None:
    targets = np.arange(10) % 2
    train, test = HoldOut(split="last").divide(targets, None, "here")
    assert (train.tolist(), test.tolist()) == (list(range(8)), [8, 9])


@pytest.mark.parametrize(
    "times",
    [
        [5, 1, 9, 2, 7, 0, 3, 8, 4, 6],
        [f"2024-01-{1 + k:02}" for k in [5, 1, 9, 2, 7, 0, 3, 8, 4, 6]],
        pd.Categorical(
            [f"2024-01-{1 + k:02}" for k in [5, 1, 9, 2, 7, 0, 3, 8, 4, 6]],
            categories=[f"2024-01-{10 - k:02}" for k in range(10)],
        ),
        pd.to_datetime([f"2024-01-{1 + k:02}" for k in [5, 1, 9, 2, 7, 0, 3, 8, 4, 6]]),
    ],
)
def test_the_latest_rows_are_held_out_by_time(times: Any) -> None:
    frame = pd.DataFrame({"who": "a", "when": times, "x": np.arange(10.0), "target": [0, 1] * 5})
    data = from_table(frame, client_column="who", split="time:when")
    assert data.test.inputs[:, 0].tolist() == [2, 7]
    assert data.train.inputs.shape == (8, 1)  # the time is no feature
    assert data.schema is not None
    inputs, _ = data.schema.apply(frame.drop(columns="who"))  # with or without the time
    assert inputs.shape == data.schema.apply(frame[["target", "x"]])[0].shape == (10, 1)


def test_whole_groups_are_held_out() -> None:
    patients = np.repeat(np.arange(12), [1, 2, 3, 4] * 3)
    frame = pd.DataFrame({"who": "a", "patient": patients, "x": patients * 1.0})
    frame["target"] = np.arange(len(frame)) % 2
    data = from_table(frame, client_column="who", split="group:patient")
    train, test = set(data.train.inputs[:, 0]), set(data.test.inputs[:, 0])
    assert train.isdisjoint(test)
    assert len(train | test) == 12
    assert 6 <= data.test.num_examples <= 9  # 6 of 30, and no more than one group over
    one = frame[frame.patient < 2].assign(who=["a", "b", "b"])
    with pytest.raises(DataError, match="a client with one example, or one group, keeps it"):
        from_table(one, client_column="who", split="group:patient")


@pytest.mark.parametrize(
    ("values", "split", "message"),
    [
        ([1, None, 3, 4], "time:t", "a value in column 't', by which .* none in row 1 of"),
        (["a", None, "b", "b"], "group:t", "a value in column 't', by which .* none in row 1 of"),
        (["2024-01-01", 3, 4, 5], "time:t", r"look like 2024-01-31 12:00, got '2024-01-01' in"),
        (["soon"] * 4, "time:t", r"look like 2024-01-31 12:00, got 'soon' in column 't'"),
        (["1/2/24"] * 4, "time:t", r"look like 2024-01-31 12:00, got '1/2/24' in column 't'"),
        ([1, 2, 3, 4], "time:z", "must have one column 'z', got columns t, x, target"),
    ],
)
def test_a_column_that_cannot_split_says_why(values: Any, split: str, message: str) -> None:
    frame = pd.DataFrame({"who": "a", "t": values, "x": 1.0, "target": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=message):
        from_table(frame, client_column="who", split=split)


def test_arrays_have_no_columns_to_split_by() -> None:
    with pytest.raises(DataError, match="arrays have no columns, got split='time:t'"):
        from_clients({"a": (np.ones((4, 1)), [0, 1, 0, 1])}, split="time:t")


def test_few_examples_of_many_classes_are_tested_on_all_of_them() -> None:
    random = np.random.default_rng(0)
    clients = {
        str(k): (random.random((20, 2)), random.permutation(np.repeat(np.arange(10), 2)))
        for k in range(100)
    }
    data = from_clients(clients)
    counts = np.bincount(data.test.targets, minlength=10)
    assert counts.sum() == 400
    assert (counts > 15).all()  # 40 of each are expected; the first four classes had them all


def test_a_device_without_a_schema_keeps_of_each_class_its_share(tmp_path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, inputs=np.zeros((50, 2)), targets=np.repeat([0, 1], [10, 40]))
    data = read_own(path)
    assert sorted(data.test.targets.tolist()) == [0.0] * 2 + [1.0] * 8
