"""The description of a partition, by hand, and its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potluck.tasks.data import Dataset, Examples, FederatedData, divide
from potluck.tasks.describe import Spread, describe, draw
from potluck.tasks.partitions import by_group, iid, shards
from potluck.tasks.text import line_corpus


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
    assert (summary.clients, summary.test_examples) == (3, 9)
    assert summary.examples == Spread(total=9, smallest=2, median=3, mean=3, largest=4)
    assert summary.characters is None
    assert summary.test_characters is None
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


def lines_of_three_clients() -> FederatedData:
    clients = {"b": [b"four", b"sixsix", b"x"], "a": [b"", b"", b"", b""], "c": [b"abc"]}
    return by_group(line_corpus("made", clients, checksums={}))


def test_text_is_summarised_in_characters_by_hand() -> None:
    summary = describe(lines_of_three_clients())
    # Each line has a newline. a: 3 lines of 1 and a test line of 1. b: 5 + 7 and 2. c: 4, no test.
    assert summary.examples == Spread(total=6, smallest=1, median=2, mean=2, largest=3)
    assert summary.characters == Spread(
        total=19, smallest=3, median=4, mean=pytest.approx(19 / 3), largest=12
    )
    assert summary.test_characters == 3
    rows = dict(summary.rows())
    assert rows["training characters"] == "19"
    assert rows["characters per client, likewise"] == "3 / 4 / 6.3 / 12"
    assert rows["test characters"] == "3"
    assert rows["input"] == "80 int16"
    assert not any("label" in name or "classes" in name for name in rows)


def test_shakespeare_is_summarised(shakespeare: Dataset) -> None:
    rows = dict(describe(by_group(shakespeare)).rows())
    assert rows["clients"] == "1,144"
    assert rows["per client: min / median / mean / max"] == "2 / 24 / 74.4 / 1,248"
    assert rows["training characters"] == "3,566,303"
    assert rows["test examples"] == "20,837, each client's own"


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
        (lines_of_three_clients(), "text.png"),
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
