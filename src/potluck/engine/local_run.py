"""Makes the local steps of a request for local training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from potluck.core import (
    PLAIN_SGD,
    ClientContext,
    ClientOptimizer,
    Correction,
    LocalSGD,
    Vector,
    derive_seed,
    stream,
)
from potluck.data.federated import lengths
from potluck.engine.task import Task


@dataclass(frozen=True)
class Epochs(Sequence[tuple[slice, float]]):
    """The same batches once an epoch, each with the rate. They are not written out: a device trains
    for as many epochs as it has time for."""

    batches: tuple[slice, ...]
    rate: float
    number: int

    def __len__(self) -> int:
        return self.number * len(self.batches)

    def __iter__(self) -> Iterator[tuple[slice, float]]:
        for _ in range(self.number):
            for batch in self.batches:
                yield batch, self.rate

    @overload
    def __getitem__(self, step: int) -> tuple[slice, float]: ...
    @overload
    def __getitem__(self, step: slice) -> list[tuple[slice, float]]: ...
    def __getitem__(self, step: int | slice) -> tuple[slice, float] | list[tuple[slice, float]]:
        if isinstance(step, slice):
            return [self[i] for i in range(len(self))[step]]
        return self.batches[range(len(self))[step] % len(self.batches)], self.rate


class LocalRun(NamedTuple):
    """All local steps of one client from some weights on."""

    start: Vector  # [dim], not changed while it is trained
    rows: NDArray[np.int64]  # of the packed training examples, in the order of the steps
    steps: Sequence[tuple[slice, float]]  # each the batch, of `rows`, and the rate
    seed: int  # of what the model draws
    correction: Correction
    optimizer: ClientOptimizer = PLAIN_SGD


def run_of(
    task: Task, request: LocalSGD, client: ClientContext, number: int | None = None
) -> LocalRun:
    """Returns the steps that a client requests.

    Args:
        number: of the client in the task's data, where it is another than in the run.
    """
    number = client.client if number is None else number
    data, size = task.data, client.num_examples
    random = stream(client.seed, "batches", client.round, client.client)
    steps = None
    if data.padding is not None and task.batches == "by length":
        steps = lengths(data.client(number).inputs, data.padding)
    order = batch_order(size, request.batch_size, steps, random)
    return LocalRun(
        request.start,
        order + int(data.offsets[number]),
        Epochs(batches_of(size, request.batch_size), request.lr, request.epochs),
        derive_seed(client.seed, "model", client.round, client.client),
        request.correction,
        request.optimizer,
    )


@lru_cache(maxsize=4096)  # clients of one size, round after round
def batches_of(num_examples: int, batch_size: int | None) -> tuple[slice, ...]:
    """The batches of one local epoch, as rows of the ordered examples; the last may be short."""
    size = batch_size or num_examples
    return tuple(slice(i, min(i + size, num_examples)) for i in range(0, num_examples, size))


def batch_order(
    num_examples: int,
    batch_size: int | None,
    lengths: NDArray[np.int64] | None,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """The order in which batches take a client's examples.

    It is random. Where examples have lengths [examples], those of a batch are of similar length,
    and the batches come in random order.
    """
    order = random.permutation(num_examples)
    if lengths is None or batch_size is None or num_examples <= batch_size:
        return order
    order = order[np.argsort(lengths[order], kind="stable")]
    whole, rest = divmod(num_examples, batch_size)
    # The short batch comes last, and may be of any length.
    start = int(random.integers(whole + 1)) * batch_size
    last = order[start : start + rest]
    others = np.delete(order, np.s_[start : start + rest]).reshape(whole, batch_size)
    return np.concatenate([others[random.permutation(whole)].ravel(), last])
