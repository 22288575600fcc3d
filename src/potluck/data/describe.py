"""A partition described before training: numbers for a table, and a picture.

The label skew of one client is the total-variation distance ½ Σ_c |p_k(c) − p(c)| between its
labels and those of all. It is 0 where the mixture is the same, and near 1 where few other clients
have its labels. A small client differs by chance, so even an IID partition is above 0.

Text has no labels to compare. Its sizes are given in characters too, beside examples, which are
lines.

A file that is sorted, by diagnosis or by time, has last rows that are not like the others, and a
model is then judged on what it was not trained for. So the labels of training and test examples
are shown side by side. They differ by more than chance where a test of homogeneity (χ², or the
means of a regression) is four deviations out, and by more than a trifle.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.data.federated import Examples, FederatedData, offsets_of
from potluck.data.tables.columns import Array
from potluck.data.tables.features import Feature
from potluck.data.tables.row_places import listed
from potluck.data.trees import is_one

_MOST_BARS = 100  # clients in the picture
_MOST_BINS = 50  # of the histogram
_MOST_COLOURS = 10  # classes with a colour and a legend entry of their own
_DEVIATIONS = 4.0  # beyond which a difference is more than chance
_TRIFLE = 0.05  # total variation, or, of means, four times as many deviations


class Spread(NamedTuple):
    """Smallest, median, mean and largest of a number over the clients."""

    total: int
    smallest: int
    median: float
    mean: float
    largest: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread:
        return cls(
            total=int(values.sum()),
            smallest=int(values.min()),
            median=float(np.median(values)),
            mean=float(values.mean()),
            largest=int(values.max()),
        )

    def __str__(self) -> str:
        return f"{self.smallest:,} / {self.median:,.10g} / {self.mean:,.1f} / {self.largest:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSummary:
    """The numbers that describe a partition."""

    data: FederatedData
    examples: Spread  # for training
    characters: Spread | None  # in them; None but for text
    test_characters: int | None
    classes_per_client: float | None  # median; None without one label per example
    label_skew: float | None  # mean over the clients, from 0 to 1

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, in order, for a table of two columns."""
        data, whose = self.data, "shared" if self.data.test_offsets is None else "each client's own"
        rows = [
            ("data set", data.name),
            ("clients", f"{data.num_clients:,}"),
            ("training examples", f"{self.examples.total:,}"),
            ("per client: min / median / mean / max", str(self.examples)),
            ("test examples", f"{data.test.num_examples:,}, {whose}"),
        ]
        if self.characters is not None:
            rows += [
                ("training characters", f"{self.characters.total:,}"),
                ("characters per client, likewise", str(self.characters)),
                ("test characters", f"{self.test_characters:,}"),
            ]
        rows += _inputs(data.train.inputs)
        if data.schema is not None and data.schema.targets:
            rows.append(("features", listed(map(_told, data.schema.features))))
        rows.append(("target", f"{data.kind}, {data.train.targets.dtype}"))
        rows += [("note", note) for note in data.notes]
        if self.classes_per_client is not None and self.label_skew is not None:
            named = "" if data.classes is None else f": {listed(data.classes)}"
            rows += [
                ("classes", f"{data.num_classes:,}" + named),
                ("classes per client: median", f"{self.classes_per_client:g}"),
                ("label skew: mean total variation", f"{self.label_skew:.3f}"),
            ]
        return [*rows, *compare_parts(data)]


def describe(data: FederatedData) -> PartitionSummary:
    """Summarises a partition, in time linear in the number of training examples."""
    classes, skew = _label_statistics(data) if _has_labels(data) else (None, None)
    characters = test_characters = None
    if data.padding is not None:
        ends = offsets_of(_characters(data.train, data.padding))
        characters = Spread.of(np.diff(ends[data.offsets]))
        test_characters = int(_characters(data.test, data.padding).sum())
    return PartitionSummary(
        data=data,
        examples=Spread.of(data.sizes),
        characters=characters,
        test_characters=test_characters,
        classes_per_client=classes,
        label_skew=skew,
    )


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
                f"the test has classes that no training example has: {listed(alone)}. Give "
                "training examples of them",
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
            listed(f"{name} {100 * share:.1f} %" for name, share in zip(names, part, strict=True)),
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


def draw(data: FederatedData, path: str | Path) -> None:
    """Draws the labels of the first 100 clients and the histogram of all sizes.

    Args:
        path: a file that does or does not exist yet; its suffix (.png, .svg, .pdf) is its format.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    figure = figure_module.Figure(figsize=(9.0, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.7, 1.0])
    _draw_clients(above, data)
    _draw_sizes(below, data.sizes)
    figure.savefig(path, dpi=150)


def _has_labels(data: FederatedData) -> bool:
    targets = data.train.targets
    return data.kind == "classes" and targets.ndim == 1 and targets.dtype.kind in "iu"


def _characters(examples: Examples, padding: int) -> NDArray[np.int64]:  # [examples]
    """Returns the number of targets of each example that count."""
    counted = examples.targets != padding
    return counted.reshape(len(counted), -1).sum(axis=1)


def _owners(data: FederatedData) -> NDArray[np.int64]:  # [training examples]
    return np.repeat(np.arange(data.num_clients), data.sizes)


def _label_statistics(data: FederatedData) -> tuple[float, float]:
    """The median number of classes of a client, and the mean label skew.

    Only pairs (client, class) that occur are counted: with p_k(c) = 0 elsewhere,
    Σ_c |p_k(c) − p(c)| = 1 + Σ_{c of k} (|p_k(c) − p(c)| − p(c)).
    """
    labels = data.train.targets.astype(np.int64)
    counted = labels >= 0
    labels, owners = labels[counted], _owners(data)[counted]
    overall = np.bincount(labels, minlength=data.num_classes) / max(len(labels), 1)
    pairs, counts = np.unique(owners * len(overall) + labels, return_counts=True)
    clients, classes = np.divmod(pairs, len(overall))
    own = counts / np.bincount(owners, minlength=data.num_clients)[clients]
    terms = np.abs(own - overall[classes]) - overall[classes]
    distances = 0.5 * (1.0 + np.bincount(clients, weights=terms, minlength=data.num_clients))
    return float(np.median(np.bincount(clients))), float(np.maximum(distances, 0.0).mean())


def _draw_clients(axes: Any, data: FederatedData) -> None:
    shown = min(data.num_clients, _MOST_BARS)
    rows = slice(0, int(data.offsets[shown]))
    bottom = np.zeros(shown)
    positions = np.arange(shown)
    for label, counts, colour in _layers(data, _owners(data)[rows], rows, shown):
        axes.bar(positions, counts, 0.9, bottom, color=colour, label=label, linewidth=0)
        bottom += counts
    axes.set_xlim(-0.5, shown - 0.5)
    axes.set_xlabel("client" if shown == data.num_clients else f"the first {shown} clients")
    axes.set_ylabel("training examples")
    axes.set_title(f"{data.name}: who has what ({data.num_clients:,} clients)", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if _has_labels(data):
        axes.legend(
            title="label",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            reverse=True,
        )


def _layers(
    data: FederatedData, owners: NDArray[np.int64], rows: slice, shown: int
) -> list[tuple[str, NDArray[np.float64], Any]]:
    """Name, height per client and colour of each layer of the bars, lowest first."""
    if not _has_labels(data):
        return [("examples", np.bincount(owners, minlength=shown).astype(np.float64), "C0")]
    # With many classes, neighbours share a layer: more colours would look alike.
    edges = np.unique(np.linspace(0, data.num_classes, _MOST_COLOURS + 1).round().astype(int))
    counted = data.train.targets[rows] >= 0
    layer = np.searchsorted(edges, data.train.targets[rows][counted], side="right") - 1
    num_layers = len(edges) - 1
    counts = np.bincount(owners[counted] * num_layers + layer, minlength=shown * num_layers)
    heights = counts.reshape(shown, num_layers).astype(np.float64)
    names = [str(low) if high == low + 1 else f"{low}–{high - 1}" for low, high in pairwise(edges)]
    return [(name, heights[:, i], f"C{i}") for i, name in enumerate(names)]


def _draw_sizes(axes: Any, sizes: NDArray[np.int64]) -> None:
    largest, median = int(sizes.max()), float(np.median(sizes))
    step = -(-largest // _MOST_BINS)  # whole numbers of examples
    edges = np.arange(0, largest + step + 1, step) - 0.5
    axes.hist(sizes, edges, color="0.45", rwidth=0.9)
    axes.axvline(median, color="0.1", linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.03 * edges[-1])
    axes.set_title(f"sizes (dashed: the median, {median:,.10g})", loc="left")
    axes.set_xlabel("training examples of a client")
    axes.set_ylabel("clients")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _told(feature: Feature) -> str:
    made = [f"{len(feature.categories)} categories"] * bool(feature.categories)
    made += ["filled"] * (feature.fill is not None)
    made += ["scaled"] * ((feature.shift, feature.scale) != (0.0, 1.0))
    return feature.name + (f" ({', '.join(made)})" if made else "")


def _inputs(inputs: Any) -> list[tuple[str, str]]:
    """The rows of a table with the inputs of the model."""

    def told(array: Any) -> str:
        return f"{'×'.join(map(str, array.shape[1:])) or 'scalar'} {array.dtype}"

    if is_one(inputs):
        return [("input", told(inputs))]
    keys: Any = inputs.keys() if hasattr(inputs, "keys") else range(len(inputs))
    return [(f"input {key}", told(inputs[key])) for key in keys]
