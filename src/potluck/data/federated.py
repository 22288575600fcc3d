"""A data set, and a data set divided among clients.

`Dataset` is what a loader returns: training and test examples in two pairs of arrays.
`FederatedData` is the same after a partition: the training examples of all clients packed
into one array, so that client k owns the rows `offsets[k]:offsets[k + 1]`. Packing costs one
copy at the start; afterwards a client's examples are a view, and a worker process shares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.core.validate import as_count, as_integer
from potluck.data.tables.client_names import client_names
from potluck.data.tables.row_places import listed
from potluck.data.tables.schema import Schema
from potluck.data.tables.targets import TAKEN, Part, TargetKind, understand
from potluck.data.trees import leaves, mapped

Array = NDArray[Any]
A = TypeVar("A", bound=Any)  # arrays or tensors
_UNSAID = cast("TargetKind", "")  # what num_classes and padding say


class Examples(NamedTuple):
    """Examples in order: `inputs[i]` belongs to `targets[i]`."""

    inputs: Any  # [examples, ...]; or several such, in a tuple or a dictionary
    targets: Array  # [examples] or [examples, ...]

    @property
    def num_examples(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        def told(array: Any) -> str:
            return f"{array.dtype} {[*array.shape]}"

        inputs = mapped(told, self.inputs)
        return f"Examples(inputs={inputs}, targets={told(self.targets)})"

    def rows(self, index: Any) -> Examples:
        """Returns some of them, by a slice or an array of row numbers."""
        return Examples(mapped(lambda array: array[index], self.inputs), self.targets[index])


def offsets_of(sizes: Iterable[int]) -> NDArray[np.int64]:
    """Returns the offsets of parts of these sizes that lie one behind another, with the end of the
    last."""
    return np.cumsum([0, *sizes], dtype=np.int64)


def joined(parts: Iterable[Examples]) -> tuple[Examples, NDArray[np.int64]]:
    """The examples of several clients, one behind another, and their offsets."""
    parts = list(parts)
    examples = Examples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return examples, offsets_of(part.num_examples for part in parts)


def lengths(inputs: Array, padding: int) -> NDArray[np.int64]:
    """Returns the length of each sequence [examples, steps] without its padding: [examples]."""
    return (inputs != padding).sum(axis=1, dtype=np.int64)


def trimmed(inputs: A, targets: A, length: int) -> tuple[A, A]:
    """The first `length` steps of a batch of sequences, and of targets that have steps too."""
    has_steps = targets.ndim > 1 and targets.shape[1] == inputs.shape[1]
    return inputs[:, :length], targets[:, :length] if has_steps else targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training and test examples as they were published, not yet divided.

    `groups[i]` names the natural owner of training example i (a writer, a user) where the data
    set knows it; `test_groups` likewise for the test examples.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    padding: int | None = None  # a target with this value does not count
    groups: Array | None = None  # [train examples]
    test_groups: Array | None = None  # [test examples]
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])  # file -> md5
    kind: TargetKind = _UNSAID
    classes: tuple[str, ...] | None = None  # names by code

    def __repr__(self) -> str:
        sizes = f"{self.train.num_examples:,} training and {self.test.num_examples:,} test examples"
        return f"Dataset({self.name!r}: {sizes}, {self.kind}, {self.num_classes} classes)"

    def __post_init__(self) -> None:
        _settle_kind(self)


def _settle_kind(data: Dataset | FederatedData) -> None:
    object.__setattr__(data, "num_classes", as_count("num_classes", data.num_classes, 0))
    if data.padding is not None:
        object.__setattr__(data, "padding", as_integer("padding", data.padding))
    if data.kind == _UNSAID:
        kind = "classes" if data.num_classes else "regression"
        object.__setattr__(data, "kind", kind if data.padding is None else "text")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FederatedData:
    """One data set divided among clients.

    Client k owns the rows `offsets[k]:offsets[k + 1]` of `train`, and, where clients have test
    examples of their own, the rows `test_offsets[k]:test_offsets[k + 1]` of `test`.

    `kind` is the kind of the targets. "classes" is a whole number each, from 0 to num_classes − 1.
    "regression" is quantities, with a num_classes of 0. "multilabel" is rows of num_classes zeros
    and ones, and "text" the symbols that follow. If it is not given, it is text where there is
    padding, a regression where num_classes is 0, and else classes.
    """

    name: str
    train: Examples
    offsets: NDArray[np.int64]  # [clients + 1]
    test: Examples
    clients: tuple[str, ...]  # names, in order
    num_classes: int
    padding: int | None = None  # a target with this value does not count
    test_offsets: NDArray[np.int64] | None = None  # [clients + 1]
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])  # file -> md5
    kind: TargetKind = _UNSAID
    classes: tuple[str, ...] | None = None  # names by code; None: labels are their own codes
    schema: Schema | None = None  # of own data: what was made of columns and labels
    notes: tuple[str, ...] = ()  # what the loader took for granted, in words

    def __post_init__(self) -> None:
        _settle_kind(self)
        object.__setattr__(self, "clients", tuple(client_names(self.clients).values()))

    def __repr__(self) -> str:
        """Returns three lines: clients, examples, and the kind of the targets."""
        sizes, inputs = self.sizes, self.train.inputs
        whose = "shared" if self.test_offsets is None else "each client's own"
        named = {"classes": "classes", "multilabel": "labels", "text": "symbols of text"}
        what = f"{self.num_classes} {named[self.kind]}" if self.kind in named else self.kind
        if any(note.startswith(TAKEN) for note in self.notes):
            what += " (taken from the values; say kind)"
        if self.classes is not None:
            what += f": {listed(self.classes)}"
        clients = f"{self.num_clients:,} client" + "s" * (self.num_clients != 1)
        return (
            f"FederatedData {self.name!r}: {clients}, {what}\n"
            f"  {len(inputs):,} training examples ({sizes.min():,} to {sizes.max():,} a client), "
            f"{len(self.test.inputs):,} test examples ({whose})\n"
            f"  inputs {inputs.dtype} {list(inputs.shape[1:])}, "
            f"targets {self.train.targets.dtype} {list(self.train.targets.shape[1:])}"
        )

    @property
    def num_clients(self) -> int:
        return len(self.clients)

    @property
    def sizes(self) -> NDArray[np.int64]:  # [clients]
        """The number of training examples of each client."""
        return np.diff(self.offsets)

    def client(self, index: int) -> Examples:
        """The training examples of client `index`: views, not copies."""
        index = self._index(index)
        return self.train.rows(slice(int(self.offsets[index]), int(self.offsets[index + 1])))

    def client_test(self, index: int) -> Examples:
        """The test examples of client `index`, or its training examples if it has none."""
        if self.test_offsets is None:
            return self.client(index)
        index = self._index(index)
        first, end = map(int, self.test_offsets[index : index + 2])
        return self.test.rows(slice(first, end))

    def _index(self, client: int) -> int:
        client = as_count("client", client, 0)
        if client >= self.num_clients:
            raise ValueError(
                f"client must be from 0 to {self.num_clients - 1}, got client={client}. "
                "Clients are numbered in the order of `clients`."
            )
        return client

    def digest(self) -> str:
        """A checksum over what every client owns; equal digests mean equal partitions."""
        digest = hashlib.blake2b(digest_size=16)
        for array in leaves((self.offsets, *self.train, *self.test)):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def divide(
    dataset: Dataset, parts: Sequence[NDArray[np.int64]], clients: Sequence[str] | None = None
) -> FederatedData:
    """Gives the training rows `parts[k]` to client k and packs them.

    Args:
        parts: row numbers of `dataset.train`, one array a client, in the client's order.
        clients: their names; numbers from 0 if not given.

    Raises:
        DataError: a client without examples.
    """
    names = tuple(client_names(range(len(parts)) if clients is None else clients).values())
    for name, part in zip(names, parts, strict=True):
        if len(part) == 0:
            raise DataError(
                f"every client must have at least one example, got client={name!r} with 0. "
                "Use fewer clients or another partition."
            )
    rows = dataset.train.rows(np.concatenate(parts))
    return FederatedData(
        name=dataset.name,
        train=Examples(*mapped(np.ascontiguousarray, tuple(rows))),
        offsets=offsets_of(map(len, parts)),
        test=dataset.test,
        clients=names,
        num_classes=dataset.num_classes,
        padding=dataset.padding,
        checksums=dataset.checksums,
        classes=dataset.classes,
        kind=dataset.kind,
    )


def reread(data: FederatedData, kind: TargetKind, num_classes: int | None) -> FederatedData:
    """The same examples with targets of another kind, as a run requires.

    Raises:
        DataError: targets that are not of that kind.
    """
    if data.kind == kind and num_classes in (None, data.num_classes):
        return data
    parts = [Part("the training examples", data.train.targets)]
    parts.append(Part("the test examples", data.test.targets))
    (train, test), meaning = understand(parts, kind=kind, num_classes=num_classes)
    return replace(
        data,
        train=data.train._replace(targets=train),
        test=data.test._replace(targets=test),
        kind=meaning.kind,
        num_classes=meaning.num_classes,
    )
