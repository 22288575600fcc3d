"""Partitions: every example exactly once, sizes that add up, and the skew each promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.federated import Dataset, Examples, FederatedData
from potluck.data.partitions import by_group, dirichlet, iid, shards, unbalanced

Partition = Callable[[Dataset, int, int], FederatedData]

PARTITIONS: dict[str, Partition] = {
    "iid": lambda dataset, clients, seed: iid(dataset, clients, seed=seed),
    "shards": lambda dataset, clients, seed: shards(dataset, clients, 1, seed=seed),
    "dirichlet": lambda dataset, clients, seed: dirichlet(dataset, clients, 0.3, seed=seed),
    "extreme dirichlet": lambda dataset, clients, seed: dirichlet(
        dataset, clients, 1e-9, seed=seed
    ),
    "unbalanced": lambda dataset, clients, seed: unbalanced(dataset, clients, 1.5, seed=seed),
}


def numbered(
    labels: list[int], groups: list[str] | None = None, test_groups: list[str] | None = None
) -> Dataset:
    """A data set whose inputs are the row numbers; test rows are numbered from 1000."""
    num_test = 3 if test_groups is None else len(test_groups)
    targets = np.array(labels, np.int64)
    return Dataset(
        name="numbered",
        train=Examples(np.arange(len(labels), dtype=np.float32), targets),
        test=Examples(
            np.arange(1000, 1000 + num_test, dtype=np.float32), np.zeros(num_test, np.int64)
        ),
        num_classes=int(targets.max()) + 1,
        groups=None if groups is None else np.array(groups),
        test_groups=None if test_groups is None else np.array(test_groups),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Dataset, int, int]:
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=60))
    clients = draw(st.integers(1, len(labels)))
    return numbered(labels), clients, draw(st.integers(0, 2**31))


@pytest.mark.parametrize("name", PARTITIONS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_every_example_goes_to_exactly_one_client(
    name: str, case: tuple[Dataset, int, int]
) -> None:
    dataset, clients, seed = case
    data = PARTITIONS[name](dataset, clients, seed)
    rows = data.train.inputs.astype(np.int64)
    assert sorted(rows.tolist()) == list(range(dataset.train.num_examples))
    assert (data.train.targets == dataset.train.targets[rows]).all()
    assert data.num_clients == clients
    assert data.sizes.min() >= 1
    assert data.sizes.sum() == dataset.train.num_examples
    assert data.test is dataset.test
    assert PARTITIONS[name](dataset, clients, seed).digest() == data.digest()


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_seed_is_another_partition(name: str) -> None:
    dataset = numbered([row % 5 for row in range(200)])
    digests = {PARTITIONS[name](dataset, 10, seed).digest() for seed in range(5)}
    assert len(digests) == 5


@pytest.mark.parametrize("name", PARTITIONS)
def test_more_clients_than_examples_are_refused(name: str) -> None:
    dataset = numbered([0, 1, 2])
    with pytest.raises(ValueError, match=r"number of training examples \(3\), got clients=4"):
        PARTITIONS[name](dataset, 4, 0)
    with pytest.raises(ValueError, match="at least 1, got clients=0"):
        PARTITIONS[name](dataset, 0, 0)


def test_iid_sizes_differ_by_at_most_one() -> None:
    assert iid(numbered([0] * 11), 4, seed=0).sizes.tolist() == [3, 3, 3, 2]


def test_shards_give_each_client_two_runs_of_the_sorted_labels() -> None:
    dataset = numbered([2, 0, 1, 0, 2, 1, 0, 1])  # sorted by label, these are rows 1 3 6 2 5 7 0 4
    data = shards(dataset, 2, seed=0)
    runs = {(1, 3), (6, 2), (5, 7), (0, 4)}
    dealt = [tuple(pair) for pair in data.train.inputs.astype(int).reshape(4, 2).tolist()]
    assert set(dealt) == runs
    assert data.sizes.tolist() == [4, 4]


def test_shards_that_do_not_divide_evenly_differ_by_at_most_one() -> None:
    data = shards(numbered([0] * 11), 2, seed=0)  # four shards of 3, 3, 3 and 2
    assert sorted(data.sizes.tolist()) == [5, 6]


def test_two_shards_of_mnist_are_600_images_of_few_digits(mnist: Dataset) -> None:
    data = shards(mnist, 100, seed=0)
    digits = [len(np.unique(data.client(k).targets)) for k in range(100)]
    assert set(data.sizes.tolist()) == {600}
    assert max(digits) <= 4
    assert np.median(digits) == 2


def test_shards_refuse_more_shards_than_examples() -> None:
    with pytest.raises(ValueError, match=r"at most the 5 training examples, got 3 \* 2 = 6"):
        shards(numbered([0] * 5), 3, seed=0)
    with pytest.raises(ValueError, match="at least 1, got shards_per_client=0"):
        shards(numbered([0] * 5), 3, 0, seed=0)


def skew(data: FederatedData) -> float:
    """The mean over the clients of the largest share that one label has."""
    shares = [np.bincount(data.client(k).targets).max() / n for k, n in enumerate(data.sizes)]
    return float(np.mean(shares))


def test_smaller_alpha_is_more_skewed() -> None:
    dataset = numbered([row % 10 for row in range(5000)])
    skews = [skew(dirichlet(dataset, 20, alpha, seed=0)) for alpha in (0.01, 0.1, 1.0, 1e6)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.8
    assert skews[-1] == pytest.approx(0.1, abs=0.01)


def test_dirichlet_has_the_spread_of_its_alpha() -> None:
    # A client's share of a label has mean 1/K and variance (1/K)(1 − 1/K) / (K·alpha + 1).
    alpha, clients = 0.5, 10
    dataset = numbered([row % 4 for row in range(40_000)])
    shares = np.concatenate(
        [
            np.bincount(data.client(k).targets, minlength=4) / 10_000
            for data in (dirichlet(dataset, clients, alpha, seed=seed) for seed in range(20))
            for k in range(clients)
        ]
    )
    expected = 0.1 * 0.9 / (clients * alpha + 1)
    assert 2 / 3 * expected < shares.var() < 3 / 2 * expected


@given(case=cases(), alpha=st.sampled_from([1e-300, 1e-3, 1.0, 1e300]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_dirichlet_gives_every_client_min_examples(
    case: tuple[Dataset, int, int], alpha: float, data: st.DataObject
) -> None:
    dataset, clients, seed = case
    most = dataset.train.num_examples // clients
    least = data.draw(st.integers(1, most))
    divided = dirichlet(dataset, clients, alpha, seed=seed, min_examples=least)
    assert divided.sizes.min() >= least
    assert sorted(divided.train.inputs.tolist()) == list(range(dataset.train.num_examples))


def test_dirichlet_refuses_what_cannot_be() -> None:
    dataset = numbered([0, 1] * 10)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha must be positive .* got alpha={alpha}"):
            dirichlet(dataset, 2, alpha, seed=0)
    for least in (0, 11):
        with pytest.raises(ValueError, match=f"from 1 to 10, .* got min_examples={least}"):
            dirichlet(dataset, 2, 1.0, seed=0, min_examples=least)


@pytest.mark.parametrize("targets", [np.zeros((6, 3), np.int64), np.zeros(6, np.float32)])
def test_partitions_by_label_refuse_targets_that_are_no_labels(targets: np.ndarray) -> None:
    examples = Examples(np.zeros(6, np.float32), targets)
    dataset = Dataset(name="odd", train=examples, test=examples, num_classes=0)
    with pytest.raises(DataError, match=r"one integer label for each example, got .*shape="):
        shards(dataset, 2, seed=0)
    with pytest.raises(DataError, match=r"one integer label for each example, got .*dtype="):
        dirichlet(dataset, 2, 1.0, seed=0)
    assert iid(dataset, 2, seed=0).num_clients == 2


def test_unbalanced_sizes_spread_with_sigma() -> None:
    dataset = numbered([0] * 5000)
    equal, some, much = (unbalanced(dataset, 100, sigma, seed=0).sizes for sigma in (0.0, 0.5, 2.0))
    assert set(equal.tolist()) == {50}
    assert equal.std() < some.std() < much.std()
    assert np.log(some).std() == pytest.approx(0.5, rel=0.3)
    assert unbalanced(dataset, 100, 1e6, seed=0).sizes.max() == 4901


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_unbalanced_refuses_a_sigma_that_is_no_spread(sigma: float) -> None:
    with pytest.raises(ValueError, match=f"got sigma={sigma}"):
        unbalanced(numbered([0] * 9), 3, sigma, seed=0)


# By group


def test_one_client_for_each_group_with_its_rows_in_order() -> None:
    data = by_group(numbered([0] * 5, groups=["b", "a", "b", "c", "a"]))
    assert data.clients == ("a", "b", "c")
    assert data.train.inputs.tolist() == [1, 4, 0, 2, 3]
    assert data.sizes.tolist() == [2, 2, 1]
    assert data.test_offsets is None


def test_clients_get_the_test_rows_of_their_group() -> None:
    dataset = numbered([0] * 3, groups=["a", "b", "c"], test_groups=["c", "a", "c"])
    data = by_group(dataset)
    assert data.test.inputs.tolist() == [1001, 1000, 1002]
    assert data.test_offsets is not None
    assert data.test_offsets.tolist() == [0, 1, 1, 3]
    assert data.client_test(1).num_examples == 0


def test_the_test_set_stays_shared_where_its_groups_are_others() -> None:
    dataset = numbered([0] * 3, groups=["a", "b", "c"], test_groups=["a", "z"])
    data = by_group(dataset)
    assert data.test_offsets is None
    assert data.test is dataset.test


def test_small_groups_are_left_out_with_their_tests() -> None:
    dataset = numbered([0] * 3, groups=["a", "b", "a"], test_groups=["b", "a", "b"])
    data = by_group(dataset, min_examples=2)
    assert data.clients == ("a",)
    assert data.train.inputs.tolist() == [0, 2]
    assert data.test.inputs.tolist() == [1001]
    with pytest.raises(DataError, match="min_examples=3 training examples, got 2 in the largest"):
        by_group(dataset, min_examples=3)
    with pytest.raises(ValueError, match="got min_examples=0"):
        by_group(dataset, min_examples=0)
    alone = numbered([0] * 3, groups=["a", "b", "a"], test_groups=["b"])
    with pytest.raises(DataError, match="at least one client must have a test example"):
        by_group(alone, min_examples=2)


def test_groups_must_be_there() -> None:
    with pytest.raises(DataError, match="must name the group of each example, got 'numbered'"):
        by_group(numbered([0, 1]))


def test_mnist_by_writer_is_539_clients_with_a_shared_test(mnist: Dataset) -> None:
    data = by_group(mnist)
    assert data.num_clients == 539
    assert (data.sizes.min(), data.sizes.max()) == (19, 131)
    assert data.test_offsets is None
    assert data.test.num_examples == 10_000


def test_wisdm_by_user_is_36_clients_with_their_own_tests(wisdm: Dataset) -> None:
    data = by_group(wisdm)
    assert data.clients == tuple(str(user) for user in range(1, 37))
    assert data.test_offsets is not None
    assert data.test.num_examples == 1_019
    assert (np.diff(data.test_offsets) >= 11).all()
