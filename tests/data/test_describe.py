"""The description of a partition, by hand, and its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potluck.data.describe import Spread, describe, draw
from potluck.data.federated import Dataset, Examples, FederatedData, divide
from potluck.data.lines import line_corpus
from potluck.data.own_data import from_clients
from potluck.data.partitions import by_group, iid, shards


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
    assert summary.examples == Spread(total=9, smallest=2, median=3, mean=3, largest=4)
    assert summary.characters is None
    assert summary.test_characters is None
    assert summary.classes_per_client == 1
    # Overall 4/9 and 5/9. The distances: 5/9 of (1, 0), 4/9 of (0, 1), 1/18 of (1/2, 1/2).
    assert summary.label_skew == pytest.approx((5 / 9 + 4 / 9 + 1 / 18) / 3)


def test_a_summary_is_shown_in_rows() -> None:
    rows = dict(describe(hand_made()).rows())
    assert (rows["clients"], rows["classes"]) == ("3", "3")
    assert rows["per client: min / median / mean / max"] == "2 / 3 / 3.0 / 4"
    assert rows["test examples"] == "9, shared"
    assert rows["input"] == "1×2×2 float32"
    assert rows["label skew: mean total variation"] == "0.352"


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
    assert summary.classes_per_client is None
    assert summary.label_skew is None
    assert "classes" not in dict(summary.rows())


def test_the_labels_of_both_parts_are_shown_and_a_difference_is_warned_of() -> None:
    """A file that is sorted by diagnosis, whose last fifth is of the ill alone."""
    inputs, ill = np.arange(200.0)[:, None], np.repeat(["no", "yes"], [150, 50])
    clients = {"a": (inputs, ill), "b": (inputs, ill)}
    rows = dict(describe(from_clients(clients, split="last")).rows())
    assert rows["labels of training"] == "no 93.8 %, yes 6.2 %"
    assert rows["labels of the test"] == "no 0.0 %, yes 100.0 %"
    assert "differ by more than chance: total variation 0.94" in rows["warning"]
    rows = dict(describe(from_clients(clients)).rows())
    assert rows["labels of training"] == rows["labels of the test"] == "no 75.0 %, yes 25.0 %"
    assert "warning" not in rows
    numbers = {"a": (inputs, np.arange(200) / 7)}
    rows = dict(describe(from_clients(numbers, split="last")).rows())
    assert rows["targets of the test"] == "mean 25.64, deviation 1.649, from 22.86 to 28.43"
    assert "the means are 2.17 deviations apart" in rows["warning"]
    assert "warning" not in dict(describe(from_clients(numbers)).rows())
    labels = {"a": (inputs, np.stack([np.arange(200) % 2, np.arange(200) % 2 == 3], 1))}
    rows = dict(describe(from_clients(labels, kind="multilabel", split="last")).rows())
    assert rows["labels of the test"] == "0 50.0 %, 1 0.0 %"
    test = (inputs[:4], [0, 1, 2, 3])
    alone = from_clients({"a": (inputs, np.arange(200) % 3)}, test=test, num_classes=4)
    assert "classes that no training example has: 3" in dict(describe(alone).rows())["warning"]


def test_chance_is_not_warned_of() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        train, test = random.integers(0, 10, 400), random.integers(0, 10, 100)
        data = from_clients(
            {"a": (np.zeros((400, 1)), train)}, test=(np.zeros((100, 1)), test), num_classes=10
        )
        assert "warning" not in dict(describe(data).rows())


def test_data_are_shown_in_three_lines() -> None:
    lines = repr(hand_made()).splitlines()
    assert lines == [
        "FederatedData 'hand made': 3 clients, 3 classes",
        "  9 training examples (2 to 4 a client), 9 test examples (shared)",
        "  inputs float32 [1, 2, 2], targets int64 []",
    ]
    named = from_clients({"a": (np.ones((10, 2)), ["yes", "no"] * 5)})
    assert "1 client, 2 classes: no, yes\n" in repr(named)
    assert "2 test examples (each client's own)" in repr(named)


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
    assert dict(summary.rows())["clients"] == "36"


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
