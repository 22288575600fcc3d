"""Chooses a client's test examples: shuffled and stratified by default.

A file is often sorted, by diagnosis or by time, so that its last rows are not like the others.
The default therefore draws the test examples, of each class its share. The draw depends on the seed
and the targets alone, not on the client's name or place. So a device that reads its own file holds
out the same rows as a simulation over a folder of such files.
"""

from __future__ import annotations

import importlib
import math
import re
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from potluck.core import DataError, stream
from potluck.core.validate import as_count, as_real
from potluck.data.tables.row_places import at

Rows = NDArray[np.int64]

SPLIT_PATTERN = r"^(shuffled|last|(time|group):[^\x00-\x1f]{1,200})$"


class HoldOut(BaseModel):
    """The rule that splits a client's examples into training and test examples.

    `split` is "shuffled" (of each class its share, at random), "last" (the last rows as they are),
    "time:COLUMN" (the latest rows) or "group:COLUMN" (whole groups, such as patients, at random).
    A column that is named here is no feature.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    split: Annotated[str, Field(pattern=SPLIT_PATTERN)] = "shuffled"
    fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @classmethod
    def asked(cls, split: str, test_fraction: Any, seed: Any) -> HoldOut:
        """Checks the caller's options and returns the rule."""
        fraction = as_real("test_fraction", test_fraction)
        if not 0.0 < fraction < 1.0:
            raise ValueError(
                f"test_fraction must be above 0 and below 1, got test_fraction={test_fraction!r}. "
                "To train on every example, give `from_clients` a test set."
            )
        if not re.fullmatch(SPLIT_PATTERN, split):
            raise ValueError(
                "split must be 'shuffled', 'last', 'time:COLUMN' or 'group:COLUMN', got "
                f"split={split!r}."
            )
        return cls(split=split, fraction=fraction, seed=as_count("seed", seed, 0))

    @property
    def column(self) -> str | None:
        """The column by which it is split."""
        return self.split.partition(":")[2] or None

    def divide(self, targets: NDArray[Any], by: Any, where: str) -> tuple[Rows, Rows]:
        """The rows for training and those for the test, each in their order.

        Args:
            targets: one integer an example is a class; of anything else no share is kept.
            by: the pandas `Series` that `column` names; None where it names none.
        """
        if self.column is not None and by is None:
            raise DataError(
                f"arrays have no column to be split by, got split={self.split!r} for {where}. Say "
                "'shuffled' or 'last', or give a table."
            )
        count = num_test(len(targets), self.fraction)
        random = stream(self.seed, "hold-out")
        if self.split == "shuffled":
            test = _stratified(targets, count, random)
        elif self.split == "last":
            test = np.arange(len(targets) - count, len(targets))
        elif self.split.startswith("time:"):
            test = _latest(by, count, where)
        else:
            test = _whole_groups(by, count, random, where)
        is_test = np.zeros(len(targets), np.bool_)
        is_test[test] = True
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def num_test(num_examples: int, fraction: float) -> int:
    """Returns the number of a client's test examples: the fraction rounded down, but at least one
    of two examples and none of one, so that training always keeps one."""
    if num_examples < 2:
        return 0
    return min(max(1, math.floor(num_examples * fraction + 1e-9)), num_examples - 1)


def _stratified(targets: NDArray[Any], count: int, random: np.random.Generator) -> Rows:
    """`count` rows, of each class its share to less than one row, where rows have a class.

    Shares are rounded down. The rest goes to the largest remainders, first of classes that keep an
    example for training then. Equal remainders are drawn at random: if the first class won, no
    client with an example of each class would be tested on the last.
    """
    order = random.permutation(len(targets))
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        return order[:count]
    labels, first, sizes = np.unique(targets[order], return_index=True, return_counts=True)
    at_random = np.argsort(first)
    labels, sizes = labels[at_random], sizes[at_random]
    shares = sizes * (count / len(targets))
    taken = np.floor(shares + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-np.round(shares - taken, 9), kind="stable")
    for most in (sizes - 1, sizes):
        for label in by_remainder:
            if taken.sum() < count and taken[label] < most[label]:
                taken[label] += 1
    rows = [order[targets[order] == label][:n] for label, n in zip(labels, taken, strict=True)]
    return np.concatenate(rows)


def _latest(times: Any, count: int, where: str) -> Rows:
    _check_whole(times, where)
    pandas: Any = importlib.import_module("pandas")
    if hasattr(times, "cat"):  # the order of categories is not that of times
        times = times.astype(times.cat.categories.dtype)
    kind, ordered = pandas.api.types.infer_dtype(times), times.reset_index(drop=True)
    try:
        if kind == "string":
            ordered = pandas.to_datetime(ordered, format="ISO8601", utc=True)
        order = ordered.sort_values(kind="stable").index.to_numpy(np.int64)
    except (TypeError, ValueError):
        raise DataError(
            f"times must be numbers or look like 2024-01-31 12:00, got {times.iloc[0]!r} in "
            f"column {str(times.name)!r} of {where}. Write all of them so."
        ) from None
    return order[len(order) - count :]


def _whole_groups(groups: Any, count: int, random: np.random.Generator, where: str) -> Rows:
    """Random groups until they have `count` rows; one group at least stays for training."""
    _check_whole(groups, where)
    _, codes = np.unique(groups.astype(str).to_numpy(np.str_), return_inverse=True)
    sizes = np.bincount(codes)
    order = random.permutation(len(sizes))[: len(sizes) - 1]
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.flatnonzero(np.isin(codes, order[before < count]))


def _check_whole(column: Any, where: str) -> None:
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"every row must have a value in column {str(column.name)!r}, by which the examples "
            f"are split, got none in {at(int(missing.argmax()), where)}. Fill it in."
        )
