"""A partition described before training: numbers for a table, and a picture.

The label skew of one client is the total-variation distance ½ Σ_c |p_k(c) − p(c)| between its
labels and everybody's: 0 where it has the same mixture, towards 1 where it has labels that nearly
nobody else has. A small client differs by chance, so even an IID partition is above 0.

Text has no labels to compare: its sizes are told in characters beside examples, which are lines.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from potluck.data.federated import Examples, FederatedData
from potluck.data.parts import compare_parts
from potluck.data.tables.schema import Schema
from potluck.data.trees import is_one, mapped

_MOST_BARS = 100  # clients in the picture
_MOST_BINS = 50  # of the histogram
_MOST_COLOURS = 10  # classes with a colour and a legend entry of their own


class Spread(NamedTuple):
    """How some number varies over the clients."""

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
    """What a partition is like. `characters` and `test_characters` are None but for text, the
    last three without one label per example."""

    name: str
    clients: int
    examples: Spread  # for training
    characters: Spread | None  # in them
    test_examples: int
    test_characters: int | None
    own_tests: bool  # clients have test examples of their own
    input_shape: Any  # of one example; of each of its inputs, if there are several
    input_dtype: Any
    target_kind: str
    target_dtype: str
    classes: tuple[str, ...] | None  # names
    notes: tuple[str, ...]  # what was taken for granted
    num_classes: int | None
    classes_per_client: float | None  # median
    label_skew: float | None  # mean over the clients, from 0 to 1
    features: str | None  # of tables: the columns and what becomes of them
    parts: tuple[tuple[str, str], ...]  # labels of training and test, and whether they differ

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, in order, for a table of two columns."""
        rows = [
            ("data set", self.name),
            ("clients", f"{self.clients:,}"),
            ("training examples", f"{self.examples.total:,}"),
            ("per client: min / median / mean / max", str(self.examples)),
            ("test examples", f"{self.test_examples:,}" + _whose(self.own_tests)),
        ]
        if self.characters is not None:
            rows += [
                ("training characters", f"{self.characters.total:,}"),
                ("characters per client, likewise", str(self.characters)),
                ("test characters", f"{self.test_characters:,}"),
            ]
        rows += [
            *_inputs(self.input_shape, self.input_dtype),
            *([] if self.features is None else [("features", self.features)]),
            ("target", f"{self.target_kind}, {self.target_dtype}"),
            *(("note", note) for note in self.notes),
        ]
        if self.classes_per_client is not None and self.label_skew is not None:
            rows += [
                ("classes", f"{self.num_classes:,}{_named(self.classes)}"),
                ("classes per client: median", f"{self.classes_per_client:g}"),
                ("label skew: mean total variation", f"{self.label_skew:.3f}"),
            ]
        return [*rows, *self.parts]

    def markdown(self) -> str:
        """The same rows as a Markdown table."""
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.rows())]
        return "\n".join(lines) + "\n"


def describe(data: FederatedData) -> PartitionSummary:
    """Summarise a partition; linear in the number of training examples."""
    labelled = _has_labels(data)
    classes, skew = _label_statistics(data) if labelled else (None, None)
    characters = test_characters = None
    if data.padding is not None:
        characters = Spread.of(_characters_per_client(data, data.padding))
        test_characters = int(_characters(data.test, data.padding).sum())
    return PartitionSummary(
        name=data.name,
        clients=data.num_clients,
        examples=Spread.of(data.sizes),
        characters=characters,
        test_examples=data.test.num_examples,
        test_characters=test_characters,
        own_tests=data.test_offsets is not None,
        input_shape=mapped(lambda part: part.shape[1:], data.train.inputs),
        input_dtype=mapped(lambda part: str(part.dtype), data.train.inputs),
        target_kind=data.kind,
        target_dtype=str(data.train.targets.dtype),
        classes=data.classes,
        notes=data.notes,
        num_classes=data.num_classes if labelled else None,
        classes_per_client=classes,
        label_skew=skew,
        features=_features(data.schema),
        parts=tuple(compare_parts(data)),
    )


def draw(data: FederatedData, path: str | Path) -> None:
    """Draw the labels of the first 100 clients and the histogram of all sizes.

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
    """How many targets of each example count."""
    counted = examples.targets != padding
    return counted.reshape(len(counted), -1).sum(axis=1)


def _characters_per_client(data: FederatedData, padding: int) -> NDArray[np.int64]:  # [clients]
    ends = np.cumsum(_characters(data.train, padding))
    return np.diff(np.concatenate([np.zeros(1, np.int64), ends])[data.offsets])


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
    # With many classes, neighbours share a layer: more colours could not be told apart.
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


def _whose(own_tests: bool) -> str:
    return ", each client's own" if own_tests else ", shared"


def _features(schema: Schema | None) -> str | None:
    if schema is None or not schema.targets:
        return None
    words: list[str] = []
    for feature in schema.features[:_MOST_COLOURS]:
        made = [f"{len(feature.categories)} categories"] * bool(feature.categories)
        made += ["filled"] * (feature.fill is not None)
        made += ["scaled"] * ((feature.shift, feature.scale) != (0.0, 1.0))
        words.append(feature.name + (f" ({', '.join(made)})" if made else ""))
    return ", ".join(words) + ", …" * (len(schema.features) > _MOST_COLOURS)


def _named(classes: tuple[str, ...] | None) -> str:
    if classes is None:
        return ""
    shown = ", ".join(classes[:_MOST_COLOURS])
    return f": {shown}" + (", …" if len(classes) > _MOST_COLOURS else "")


def _inputs(shapes: Any, types: Any) -> list[tuple[str, str]]:
    """The rows of a table that say what the model is given."""
    if is_one(types):
        return [("input", f"{_shape(shapes)} {types}")]
    keys: Any = list(cast("Any", types)) if isinstance(types, Mapping) else range(len(types))
    return [(f"input {key}", f"{_shape(shapes[key])} {types[key]}") for key in keys]


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"
