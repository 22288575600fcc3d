"""Whether a test set is like the training examples: the labels of both, side by side.

A file that is sorted, by diagnosis or by time, has last rows that are not like the others; a model
is then judged on what it was not trained for. Labels differ by more than chance where a test of
homogeneity (χ², or the means of a regression) is four deviations out, and by more than a trifle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potluck.data.federated import FederatedData
from potluck.data.tables.columns import Array

_DEVIATIONS = 4.0
_TRIFLE = 0.05  # total variation, or, of means, four times as many deviations
_SHOWN = 10  # classes


def compare_parts(data: FederatedData) -> list[tuple[str, str]]:
    """Rows for a table: the labels of training and test examples, and a warning if they differ."""
    train, test = data.train.targets, data.test.targets
    if len(test) == 0 or len(train) == 0:
        return []
    if data.kind == "classes" and train.ndim == 1 and train.dtype.kind in "iu":
        return _classes(data, train.astype(np.int64), test.astype(np.int64))
    if data.kind == "regression" and train.ndim == 1:
        return _quantities(train.astype(np.float64), test.astype(np.float64))
    if data.kind == "multilabel":
        names = data.classes or list(map(str, range(data.num_classes)))
        return _shares(names, train.mean(axis=0), test.mean(axis=0))
    return []


def _classes(data: FederatedData, train: Array, test: Array) -> list[tuple[str, str]]:
    train, test = train[train >= 0], test[test >= 0]
    if len(train) == 0 or len(test) == 0:
        return []
    size = max(data.num_classes, int(train.max()) + 1, int(test.max()) + 1)
    counts = np.stack([np.bincount(part, minlength=size) for part in (train, test)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    names = list(data.classes or ())
    names += map(str, range(len(names), size))
    rows = _shares(names, *shares)
    distance = 0.5 * float(np.abs(shares[0] - shares[1]).sum())
    alone = [names[k] for k in np.flatnonzero((counts[0] == 0) & (counts[1] > 0))]
    if alone:
        rows.append(
            (
                "warning",
                f"the test has classes that no training example has: {_some(alone)}. Give training "
                "examples of them",
            )
        )
    elif distance > _TRIFLE and _is_beyond_chance(counts):
        rows.append(_warning(f"total variation {distance:.2f}"))
    return rows


def _quantities(train: Array, test: Array) -> list[tuple[str, str]]:
    rows = [
        (
            f"targets of {what}",
            f"mean {part.mean():.4g}, deviation {part.std():.4g}, from {part.min():.4g} to "
            f"{part.max():.4g}",
        )
        for what, part in (("training", train), ("the test", test))
    ]
    deviation = float(train.std()) or 1.0
    apart = abs(float(train.mean() - test.mean())) / deviation
    if apart > max(4 * _TRIFLE, _DEVIATIONS * np.sqrt(1 / len(train) + 1 / len(test))):
        rows.append(_warning(f"the means are {apart:.2f} deviations apart"))
    return rows


def _shares(
    names: Sequence[str], train: NDArray[np.float64], test: NDArray[np.float64]
) -> list[tuple[str, str]]:
    return [
        (
            f"labels of {what}",
            ", ".join(
                f"{name} {100 * share:.1f} %"
                for name, share in zip(names[:_SHOWN], part[:_SHOWN], strict=True)
            )
            + (", …" if len(names) > _SHOWN else ""),
        )
        for what, part in (("training", train), ("the test", test))
    ]


def _is_beyond_chance(counts: NDArray[np.int64]) -> bool:
    """χ² of homogeneity of two rows of counts, in normal deviations (Wilson and Hilferty)."""
    counts = counts[:, counts.sum(axis=0) > 0]
    freedom = counts.shape[1] - 1
    if freedom < 1:
        return False
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2.0 / (9.0 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / spread**0.5 > _DEVIATIONS


def _warning(how: str) -> tuple[str, str]:
    return (
        "warning",
        f"training and test examples differ by more than chance: {how}. Hold out with split = "
        '"shuffled", or give a test set that is like the rest',
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
