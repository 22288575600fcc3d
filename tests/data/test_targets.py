"""What targets are taken for: what the user says, a proposal that is told, or neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.config.experiment import check_experiment
from potluck.core import DataError
from potluck.data import partitions
from potluck.data.describe import compare_parts, describe
from potluck.data.federated import Dataset, Examples, FederatedData, reread
from potluck.data.own_data import from_clients, from_table
from potluck.data.tables.targets import IGNORED, KINDS, Part, label_text, understand
from potluck.engine import evaluate
from potluck.simulation import build_data, build_task

RANDOM = np.random.default_rng(0)


def understood(values: Any, **options: Any) -> tuple[list[Any], Any]:
    targets, meaning = understand([Part("here", np.asarray(values))], **options)
    return targets[0].tolist(), meaning


@pytest.mark.parametrize(
    ("values", "kind", "num_classes", "classes"),
    [
        ([0, 1, 0, 1], "classes", 2, None),
        ([0, 1], "classes", 2, None),
        ([0, 1, 2, 0, 1, 2], "classes", 3, None),
        ([0, 0, 0], "classes", 1, None),
        ([True, True], "classes", 2, ("False", "True")),
        (["no", "yes", "no"], "classes", 2, ("no", "yes")),
        ([0.5, 1.0, 2.0], "regression", 0, None),
        (np.arange(100_000.0, 100_050.0), "regression", 0, None),
        ([[0, 1, 2], [2, 1, 0]], "classes", 3, None),
    ],
)
def test_what_can_only_be_one_kind_is_taken_for_it(values, kind, num_classes, classes) -> None:
    _, meaning = understood(values)
    assert meaning[:3] == (kind, num_classes, classes)


@pytest.mark.parametrize(
    "values",
    [
        RANDOM.integers(100_000, 321_869, 300),  # prices
        RANDOM.integers(18, 90, 3000),  # ages
        RANDOM.poisson(20, 1000),  # counts
        np.arange(50),  # numbers of rows
        [0, 1, 3, 0, 1, 3],  # codes with a gap
        [10, 20, 30] * 5,
        [-1, 1] * 10,
        [1, 2, 3] * 10,
        [0.0, 1.0] * 10,
        [-1.0, 1.0] * 10,
        [1.0, 2.0, 3.0, 4.0, 5.0] * 10,
    ],
)
def test_what_could_be_two_kinds_is_refused_with_both_ways_to_say_it(values) -> None:
    for in_tables in (False, True):
        with pytest.raises(
            DataError, match=r'here\). Say kind = "regression" .* or kind = "cl'
        ) as e:
            understood(values, in_tables=in_tables)
        assert "task.kind" in str(e.value)
    assert understood(values, kind="regression")[0] == pytest.approx(np.asarray(values, float))
    codes, meaning = understood(values, kind="classes")
    names = sorted(set(np.asarray(values).tolist()))
    assert meaning.num_classes == len(names)
    assert [names[code] for code in codes] == np.asarray(values).tolist()
    if meaning.classes is not None:
        assert meaning.classes == tuple(str(int(name)) for name in names)


def test_whole_numbers_in_an_array_are_meant_and_in_a_table_they_are_not() -> None:
    values = np.tile(np.arange(62), 5)
    _, meaning = understood(values)
    assert (meaning.kind, meaning.num_classes) == ("classes", 62)
    assert 'if they are quantities, say kind = "regression"' in meaning.note
    with pytest.raises(DataError, match="62 different values from 0 to 61 in 310 examples"):
        understood(values, in_tables=True)
    assert understood(np.tile(np.arange(20), 5), in_tables=True)[1].num_classes == 20


@given(
    labels=st.lists(
        st.one_of(
            st.integers(-(2**40), 2**40).filter(lambda label: label != IGNORED),
            st.text(min_size=1, max_size=5),
        ),
        min_size=2,
    ),
    repeats=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_named_labels_come_back_from_their_codes(labels, repeats) -> None:
    """Whatever they are called; the parts in which they come do not matter."""
    labels = [label for label in labels if type(label) is type(labels[0])] * repeats
    values = np.array(labels)
    whole, meaning = understood(values, kind="classes")
    names = meaning.classes or tuple(map(str, range(meaning.num_classes)))
    assert [names[code] for code in whole] == [label_text(value) for value in values.tolist()]
    cut = len(values) // 2
    parts = [Part("a", values[:cut]), Part("b", values[cut:])]
    halves, again = understand(parts, kind="classes")
    assert again == meaning
    assert np.concatenate(halves).tolist() == whole


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0, 1], {"kind": "class"}, "kind must be one of 'classes', .* got kind='class'"),
        ([0.5, 1], {"kind": "classes"}, "whole numbers or text, got 0.5 in example 0 of here"),
        (["a", "b"], {"kind": "regression"}, "must be numbers, got text, as 'a' in here"),
        ([1, 2], {"kind": "regression", "num_classes": 3}, "no classes, got num_classes=3"),
        ([1, 0], {"kind": "multilabel"}, r"\[examples, labels\], got shape=\(2,\) in here"),
        ([[1, 2]], {"kind": "multilabel"}, "0 or 1, got 2 for label 1 in example 0 of here"),
        ([[1], [0]], {"kind": "classes"}, r"one number an example.*Give targets\[:, 0\]"),
        (np.eye(3), {"kind": "classes"}, r"one-hot rows .*argmax\(axis=1\)"),
        (np.eye(3, dtype=int), {}, r"several labels .* or one-hot .*\[examples, 3\] in here"),
        (np.eye(3), {}, r'Say kind = "multilabel"'),
        ([f"{k},5" for k in range(60)], {}, "classes must repeat, got 60 different texts in 60"),
        (
            [0, 5],
            {"num_classes": 3},
            "from 0 to 2 .*, got label=5 in example 1 of here",
        ),
        (
            [0, -1],
            {"num_classes": 3},
            "from 0 to 2 .*, got label=-1 in example 1 of here",
        ),
        (["a", "b"], {"num_classes": 1}, "at most num_classes=1 classes, got 2"),
        ([0.5], {"kind": "text"}, "whole numbers"),
        ([1.0, 1e300], {"kind": "classes"}, r"whole numbers or text, got 1e\+300 in example 1"),
        ([0.5, 1e300], {}, r"finite in float32, got 1e\+300 in example 1 of here"),
    ],
)
def test_targets_that_are_not_of_their_kind_are_refused(values, options, message) -> None:
    with pytest.raises(DataError, match=message):
        understood(values, **options)


def test_several_labels_are_rows_of_zeros_and_ones() -> None:
    rows = np.eye(4)[[0, 1, 2, 3]] + np.eye(4)[[1, 1, 3, 0]] > 0
    data = from_clients({"a": (np.ones((4, 2)), rows)}, kind="multilabel")
    assert (data.kind, data.num_classes, data.train.targets.dtype) == ("multilabel", 4, np.float32)


def test_numbers_of_any_type_are_one_regression_if_the_user_says_so() -> None:
    clients = {"a": (np.ones((2, 1)), [0.5, 1.5]), "b": (np.ones((2, 1)), [42, 17])}
    with pytest.raises(DataError, match="one shape and type"):
        from_clients(clients)
    data = from_clients(clients, kind="regression", split="last")
    assert data.train.targets.tolist() == [0.5, 42.0]


def test_made_up_and_divided_data_know_their_kind() -> None:
    train = Examples(np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1]))
    names = ("no", "yes")
    dataset = Dataset(name="made", train=train, test=train, num_classes=2, classes=names)
    divided = partitions.iid(dataset, 2, seed=0)
    assert (dataset.kind, divided.kind, divided.classes) == ("classes", "classes", names)
    padded = Dataset(name="made", train=train, test=train, num_classes=9, padding=8)
    assert partitions.iid(padded, 2, seed=0).kind == "text"
    numbers = Dataset(name="made", train=train, test=train, num_classes=0)
    assert partitions.iid(numbers, 2, seed=0).kind == "regression"
    assert set(KINDS) == {"classes", "regression", "multilabel", "text"}


def houses(folder: Path, **target: Any) -> FederatedData:
    frame = pd.DataFrame({"town": list("ab") * 30, "x": RANDOM.standard_normal(60), **target})
    frame.to_csv(folder / "t.csv", index=False)
    return from_table(folder / "t.csv", client_column="town", target_column=next(iter(target)))


def test_a_run_says_what_the_targets_of_its_table_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="60 different values from 0 to 59000"):
        houses(tmp_path, price=np.arange(60) * 1000)
    content: dict[str, Any] = {
        "name": "houses",
        "task": {"data": "table", "path": str(tmp_path / "t.csv"), "client_column": "town"},
        "partition": {"kind": "own"},
        "algorithm": {"client_lr": 0.1},
        "run": {"rounds": 1},
    }
    content["task"] |= {"target_column": "price", "model": "logistic", "kind": "regression"}
    experiment = check_experiment(content, "here")
    task = build_task(experiment, build_data(experiment))
    assert set(evaluate(task, task.initial_weights(0))) >= {"loss"}
    assert task.data.kind == "regression"


def test_what_was_taken_for_granted_is_noted(tmp_path: Path) -> None:
    data = houses(tmp_path, ill=np.arange(60) % 3)
    assert data.num_classes == 3
    assert data.notes[0].startswith("targets are taken for 3 classes")


def test_one_devices_numbers_are_what_the_run_says() -> None:
    inputs = np.ones((6, 2), np.float32)
    device = from_clients({"d": (inputs, [0, 3, 0, 3, 0, 3])}, kind="regression", split="last")
    classes = reread(device, "classes", 10)
    assert (classes.num_classes, classes.train.targets.tolist()) == (10, [0, 3, 0, 3, 0])
    assert reread(device, "regression", None) is device
    with pytest.raises(DataError, match="got label=3 in example 1 of the training examples"):
        reread(device, "classes", 3)


def test_a_label_of_minus_100_is_left_out_and_no_class() -> None:
    clients = {"a": (np.ones((6, 2)), [0, 1, 2, -100, 0, 1]), "b": (np.ones((5, 2)), [-100] * 5)}
    for said in ({}, {"kind": "classes"}, {"num_classes": 3}):
        data = from_clients(clients, test=clients["a"], **said)
        assert (data.kind, data.num_classes, data.classes) == ("classes", 3, None)
        assert (data.train.targets == -100).sum() == 6
    assert "-100 is left out" in from_clients(clients, test=clients["a"]).notes[0]
    maps = np.where(np.arange(24).reshape(6, 4) % 5 == 0, -100, np.arange(24).reshape(6, 4) % 3)
    assert from_clients({"a": (np.ones((6, 4)), maps)}, kind="classes").num_classes == 3
    with pytest.raises(DataError, match="numbered from 0 beside labels of -100"):
        from_clients({"a": (np.ones((4, 2)), [-100, 7, 8, 7])}, kind="classes")


def test_left_out_labels_are_not_described() -> None:
    labels = np.array([0, 1, -100, 0, 1, -100, 1, 0, 0, 1])
    data = from_clients({"a": (np.ones((10, 2)), labels), "b": (np.ones((10, 2)), labels)})
    summary = describe(data)
    assert dict(summary.rows())["classes"] == "2"
    assert summary.label_skew == pytest.approx(0.0, abs=0.2)
    compare_parts(data)


def test_float_rows_of_zeros_and_ones_are_several_labels_unless_one_hot() -> None:
    rows = np.array([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]] * 3)
    data = from_clients({"a": (np.ones((12, 2)), rows)})
    assert (data.kind, data.num_classes) == ("multilabel", 3)
    assert "3 labels an example" in data.notes[0]
    with pytest.raises(DataError, match="one-hot"):
        from_clients({"a": (np.ones((12, 2)), np.eye(3)[np.arange(12) % 3])})


def test_a_column_of_classes_is_left_to_the_loss() -> None:
    data = from_clients({"a": (np.ones((12, 2)), np.arange(12)[:, None] % 3)})
    assert data.train.targets.shape[1:] == (1,)
    assert data.num_classes == 3


def test_maps_of_classes_need_not_have_every_class() -> None:
    maps = np.where(RANDOM.random((8, 4, 4)) < 0.3, 9, RANDOM.integers(0, 3, (8, 4, 4)))
    data = from_clients({"a": (np.ones((8, 1, 4, 4)), maps)})
    assert (data.kind, data.num_classes) == ("classes", 10)
    assert "maps of classes" in data.notes[0]
