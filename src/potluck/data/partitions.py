"""Partitions: ways to divide one data set among simulated clients.

    iid         shuffled, equal sizes: the easy case
    shards      sorted by label, dealt in shards: each client sees few labels (the paper's)
    dirichlet   label skew and sizes set by one number, alpha
    unbalanced  the labels of `iid`, log-normal sizes
    by_group    the natural owners: writers, users, roles, modules

Every training example goes to exactly one client (`by_group` may leave small groups out), every
client gets at least one, and the same seed gives the same partition.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError, stream
from potluck.core.validate import as_count, as_integer, as_real
from potluck.data.federated import Array, Dataset, FederatedData, divide, offsets_of

Rows = NDArray[np.int64]


def iid(dataset: Dataset, clients: int, *, seed: int) -> FederatedData:
    """Shuffles the training examples and deals them evenly.

    Where they do not divide evenly the first clients get one more, as `numpy.array_split` does.
    """
    clients = _checked_clients(dataset, clients)
    order = stream(seed, "partition").permutation(dataset.train.num_examples)
    return divide(dataset, np.array_split(order, clients))


def shards(
    dataset: Dataset, clients: int, shards_per_client: int = 2, *, seed: int
) -> FederatedData:
    """Sorts the training examples by label, cuts them into equal shards and deals those at random.

    The non-IID partition of McMahan et al. 2017: on MNIST, 100 clients and two shards each give
    200 shards of 300, so that most clients see two digits. Examples of one label stay in their
    order. Where shards do not divide evenly the first ones are longer by one, as
    `numpy.array_split` does.
    """
    clients = _checked_clients(dataset, clients)
    shards_per_client = as_count("shards_per_client", shards_per_client, 1, "The paper has 2.")
    num_shards = clients * shards_per_client
    if num_shards > dataset.train.num_examples:
        raise ValueError(
            f"clients * shards_per_client must be at most the {dataset.train.num_examples} "
            f"training examples, got {clients} * {shards_per_client} = {num_shards}. Lower one."
        )
    ordered = np.argsort(_labels(dataset), kind="stable")
    pieces = np.array_split(ordered, num_shards)
    dealt: Rows = (
        stream(seed, "partition").permutation(num_shards).reshape(clients, shards_per_client)
    )
    return divide(dataset, [np.concatenate([pieces[int(i)] for i in hand]) for hand in dealt])


def dirichlet(
    dataset: Dataset, clients: int, alpha: float, *, seed: int, min_examples: int = 1
) -> FederatedData:
    """Divides each label among the clients in proportions drawn from a Dirichlet distribution.

    For each label c draw p ~ Dir_clients(alpha) and give client k the fraction p_k of the examples
    of c. This is the partition of Yurochkin et al., *Bayesian Nonparametric Federated Learning of
    Neural Networks*, ICML 2019 (not Hsu et al. 2019, who draw label proportions for each client, of
    equal sizes). Small alpha: few labels a client and very different sizes; large alpha: IID.

    One difference: a client left with fewer than `min_examples` is filled up with random examples
    of the client that then has most. Others draw the whole partition again, which with many clients
    never ends.
    """
    clients = _checked_clients(dataset, clients)
    alpha = as_real("alpha", alpha)
    if not (alpha > 0.0 and math.isfinite(alpha)):
        raise ValueError(
            f"alpha must be positive and finite, got alpha={alpha!r}. "
            "0.1 is strong label skew, 1.0 moderate, 100.0 nearly none."
        )
    min_examples = as_integer("min_examples", min_examples)
    if not 1 <= min_examples <= dataset.train.num_examples // clients:
        raise ValueError(
            f"min_examples must be from 1 to {dataset.train.num_examples // clients}, which is "
            f"all there is for each of {clients} clients, got min_examples={min_examples}."
        )
    random = stream(seed, "partition")
    labels = _labels(dataset)
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(_proportions(random, alpha, clients))[:-1] * len(rows)
        pieces = np.split(rows, np.rint(cuts).astype(np.int64))
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    merged = [random.permutation(np.concatenate(part)) for part in parts]
    return divide(dataset, _filled_up(merged, min_examples))


def unbalanced(dataset: Dataset, clients: int, sigma: float, *, seed: int) -> FederatedData:
    """Shuffles the training examples and deals them in log-normal sizes.

    Every client gets one example and its share of the rest, in proportion to exp(sigma · z) with z
    standard normal. At sigma = 0 sizes are equal. At sigma = 1 a tenth of the clients has about
    four tenths of the examples.
    """
    clients = _checked_clients(dataset, clients)
    sigma = as_real("sigma", sigma)
    if not (sigma >= 0.0 and math.isfinite(sigma)):
        raise ValueError(
            f"sigma must be at least 0 and finite, got sigma={sigma!r}. "
            "0.0 is equal sizes, 1.0 very different ones."
        )
    random = stream(seed, "partition")
    order = random.permutation(dataset.train.num_examples)
    exponents = sigma * random.standard_normal(clients)
    shares = np.exp(exponents - exponents.max())  # the largest is 1: nothing overflows
    ends = np.cumsum(shares) / shares.sum() * (len(order) - clients)
    cuts = np.rint(ends[:-1]).astype(np.int64) + np.arange(1, clients)
    return divide(dataset, np.split(order, cuts))


def by_group(dataset: Dataset, *, min_examples: int = 1) -> FederatedData:
    """One client for each natural owner (a writer, a user), in the order of their names.

    Nothing is random. Groups with fewer than `min_examples` training examples are left out. Where
    the data set names the groups of its test examples and each of them is a training group too,
    a client keeps its own test examples. The test set is then re-ordered by client, without the
    rows of groups that were left out. Otherwise (MNIST's test writers are other people) all share
    it.

    Raises:
        DataError: a data set without groups, or no group with `min_examples`.
    """
    min_examples = as_count("min_examples", min_examples)
    if dataset.groups is None:
        raise DataError(
            f"the data set must name the group of each example, got {dataset.name!r} without. "
            "Load it with groups (`mnist(writers=True)`, `wisdm()`, "
            "`shakespeare()`, `pythonlib()`), or take another partition."
        )
    names, codes = np.unique(dataset.groups, return_inverse=True)
    sizes = np.bincount(codes, minlength=len(names))
    kept = np.flatnonzero(sizes >= min_examples)
    if len(kept) == 0:
        raise DataError(
            f"at least one group must have min_examples={min_examples} training examples, got "
            f"{int(sizes.max(initial=0))} in the largest. Lower min_examples."
        )
    rows_of = _rows_by_code(codes, len(names))
    data = divide(dataset, [rows_of[i] for i in kept], list(names[kept]))
    if dataset.test_groups is None or not np.isin(dataset.test_groups, names).all():
        return data
    return _with_own_tests(dataset, data, names[kept], dataset.test_groups)


def _with_own_tests(
    dataset: Dataset, data: FederatedData, names: Array, test_groups: Array
) -> FederatedData:
    codes = np.searchsorted(names, test_groups)
    codes[~np.isin(test_groups, names)] = len(names)
    rows_of = _rows_by_code(codes, len(names))
    order = np.concatenate(rows_of)
    if len(order) == 0:
        raise DataError(
            "at least one client must have a test example, got none. Lower min_examples."
        )
    return replace(data, test=dataset.test.rows(order), test_offsets=offsets_of(map(len, rows_of)))


def _rows_by_code(codes: Array, num_codes: int) -> list[Rows]:
    """Returns for each code below `num_codes` the rows that have it, in order."""
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(num_codes + 1))
    return [order[ends[i] : ends[i + 1]] for i in range(num_codes)]


def _proportions(random: np.random.Generator, alpha: float, clients: int) -> NDArray[np.float64]:
    proportions = random.dirichlet(np.full(clients, alpha))
    if math.isfinite(proportions.sum()):
        return proportions
    # Beyond what floats can draw, take the limit: all to one client, or equal shares.
    if alpha < 1.0:
        return np.eye(clients)[random.integers(clients)]
    return np.full(clients, 1.0 / clients)


def _filled_up(parts: list[Rows], min_examples: int) -> list[Rows]:
    sizes = np.array([len(part) for part in parts])
    given: list[list[int]] = [[] for _ in parts]
    for poor in np.flatnonzero(sizes < min_examples):
        while sizes[poor] < min_examples:
            rich = int(sizes.argmax())
            # A part is in random order, and only `sizes` counts what was taken off its end.
            given[poor].append(int(parts[rich][sizes[rich] - 1]))
            sizes[rich] -= 1
            sizes[poor] += 1
    return [
        np.concatenate([part[: size - len(more)], np.array(more, np.int64)])
        for part, size, more in zip(parts, sizes, given, strict=True)
    ]


def _labels(dataset: Dataset) -> Array:
    labels = dataset.train.targets
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"a partition by label needs one integer label for each example, got targets of "
            f"{dataset.name!r} with shape={labels.shape}, dtype={labels.dtype}. "
            "Take `iid`, `unbalanced` or `by_group`."
        )
    return labels


def _checked_clients(dataset: Dataset, clients: int) -> int:
    clients = as_count("clients", clients)
    if clients > dataset.train.num_examples:
        raise ValueError(
            f"clients must be at most the number of training examples "
            f"({dataset.train.num_examples}), got clients={clients}. "
            "Lower it, so that every client has an example."
        )
    return clients
