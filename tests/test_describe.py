"""The description of a partition, by hand, and its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potluck.tasks.data import Dataset, Examples, FederatedData, divide
from potluck.tasks.describe import describe, draw
from potluck.tasks.partitions import by_group, iid, shards


def hand_made() -> FederatedData:
    """Three clients with the labels 0 0 0, 1 1 1 1 and 0 1 (of 0 × 4 and 1 × 5)."""
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 0, 1])
    train = Examples(np.zeros((9, 1, 2, 2), np.float32), labels)
    dataset = Dataset(name="hand made", train=train, test=train, num_classes=3)
    return divide(dataset, [np.arange(3), np.arange(3, 7), np.arange(7, 9)])


def with_targets(targets: np.ndarray, num_classes: int, clients: int = 4) -> FederatedData:
    train = Examples(np.zeros((len(targets), 2), np.float32), targets)
    dataset = Dataset(name="made", train=train, test=train, num_classes=num_classes)
    return iid(dataset, clients, seed=0)


def test_a_partition_is_summarised_by_hand() -> None:
    summary = describe(hand_made())
    assert (summary.clients, summary.examples, summary.test_examples) == (3, 9, 9)
    assert (summary.smallest, summary.median, summary.mean, summary.largest) == (2, 3, 3, 4)
    assert summary.classes_per_client == 1
    assert summary.num_classes == 3
    # Overall 4/9 and 5/9. The distances: 5/9 of (1, 0), 4/9 of (0, 1), 1/18 of (1/2, 1/2).
    assert summary.label_skew == pytest.approx((5 / 9 + 4 / 9 + 1 / 18) / 3)
    assert summary.input_shape == (1, 2, 2)
    assert summary.input_dtype == "float32"
    assert not summary.own_tests


def test_rows_and_markdown_say_the_same() -> None:
    summary = describe(hand_made())
    rows = dict(summary.rows())
    assert rows["per client: min / median / mean / max"] == "2 / 3 / 3.0 / 4"
    assert rows["test examples"] == "9, shared"
    assert rows["input"] == "1×2×2 float32"
    assert rows["label skew: mean total variation"] == "0.352"
    lines = summary.markdown().splitlines()
    assert lines[1] == "|---|---|"
    assert lines[2:] == [f"| {name} | {value} |" for name, value in rows.items()]


def test_skew_is_0_for_equal_mixtures_and_1_minus_a_share_for_single_labels() -> None:
    labels = np.repeat(np.arange(4), 10)
    train = Examples(np.zeros(40, np.float32), labels)
    dataset = Dataset(name="made", train=train, test=train, num_classes=4)
    equal = divide(dataset, [np.arange(k, 40, 10) for k in range(10)])
    assert describe(equal).label_skew == pytest.approx(0.0, abs=1e-12)
    single = shards(dataset, 4, 1, seed=0)
    assert describe(single).label_skew == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "targets", [np.linspace(0, 1, 12, dtype=np.float32), np.zeros((12, 3), np.int64)]
)
def test_without_one_label_for_each_example_there_is_no_skew(targets: np.ndarray) -> None:
    summary = describe(with_targets(targets, 5 if targets.ndim > 1 else 0))
    assert summary.num_classes is None
    assert summary.classes_per_client is None
    assert summary.label_skew is None
    assert "classes" not in dict(summary.rows())


def test_wisdm_by_user_has_tests_of_its_own(wisdm: Dataset) -> None:
    summary = describe(by_group(wisdm))
    assert dict(summary.rows())["test examples"] == "1,019, each client's own"
    assert summary.clients == 36


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (hand_made(), "small.png"),
        (with_targets(np.arange(300) % 100, 100, clients=150), "many.png"),
        (with_targets(np.linspace(0, 1, 12, dtype=np.float32), 0), "regression.svg"),
        (with_targets(np.zeros(1, np.int64), 1, clients=1), "one.svg"),
    ],
)
def test_a_picture_is_drawn(data: FederatedData, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    draw(data, path)
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if name.endswith("png") else b"<?xml" in start
    assert path.stat().st_size > 5_000


def test_the_picture_says_how_many_clients_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "many.svg"
    draw(with_targets(np.arange(300) % 100, 100, clients=150), path)
    text = path.read_text()
    assert "<!-- the first 100 clients -->" in text
    assert "(150 clients)" in text
    assert "<!-- 90–99 -->" in text
