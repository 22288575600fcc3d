"""The work of A to D, and what of it is arithmetic and memory traffic: counted, not measured.

A step of B examples multiplies matrices three times: forward, for the gradient of the weights, and
for that of the layer's inputs, which the first layer does without. `Product` is one layer.

Bytes are those that no program could save with a model that does not stay in the caches from one
step to the next: the weights are read forward, read backward where a gradient flows on, and read
and written by the step; a batch is read once. A client's model is then subtracted and summed. What
lies between layers is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potluck import CNN, LogisticRegression, Task, TwoNN
from potluck.data.federated import lengths
from potluck.models import CharLSTM, PerCharacter

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from bare import PADDING
from run import random_data, random_lines  # of benchmarks/engine

BATCH = 10


class Product(NamedTuple):
    """A layer as a matrix product; `rows` is how many vectors an example multiplies by it."""

    inputs: int
    outputs: int
    rows: int = 1
    is_first: bool = False  # nothing flows on from it
    is_recurrent: bool = False


class Work(NamedTuple):
    """Rounds of federated averaging with E = 1 and B = 10."""

    title: str
    task: Callable[[bool], Task]  # a small one, for a quick try, or not
    cohort: int
    layers: tuple[Product, ...]
    processes_train: str  # one client at a time, or side by side

    def flops(self, task: Task, clients: list[int]) -> float:
        """Of all local steps of these clients."""
        steps = self._steps(task, clients)
        per_row = sum(
            2 * p.inputs * p.outputs * p.rows * (2 if p.is_first else 3) for p in self.layers
        )
        return float(per_row * steps)

    def bytes(self, task: Task, clients: list[int]) -> float:
        """Of all local steps of these clients, and of their updates."""
        weights = sum(p.inputs * p.outputs * (3 if p.is_first else 4) for p in self.layers)
        total = sum(p.inputs * p.outputs for p in self.layers)
        data = task.data
        batches = sum(-(-int(data.sizes[c]) // BATCH) for c in clients)
        read = sum(int(data.sizes[c]) for c in clients) * data.train.inputs[0].nbytes
        # Received and copied, subtracted, scaled into the sum of 64 bits.
        updates = len(clients) * total * (2 * 4 + 3 * 4 + 4 + 2 * 8)
        return float(batches * weights * 4 + read + updates)

    def _steps(self, task: Task, clients: list[int]) -> int:
        """Examples; of sequences, their symbols."""
        data = task.data
        if data.padding is None:
            return sum(int(data.sizes[c]) for c in clients)
        return sum(int(lengths(data.client(c).inputs, data.padding).sum()) for c in clients)


def _images(model: Any, clients: int, size: int) -> Callable[[bool], Task]:
    def task(small: bool) -> Task:
        return Task(model=model, data=random_data(clients, 20 if small else size))

    return task


def _lines(small: bool) -> Task:
    data = random_lines(20 if small else 100, 10 if small else 40)
    return Task(model=CharLSTM, data=data, loss=PerCharacter(padding=PADDING))


WORK = {
    "A": Work(
        "CNN, 10 of 100 clients × 600",
        _images(CNN, 100, 600),
        10,
        (
            Product(25, 32, rows=784, is_first=True),
            Product(800, 64, rows=196),
            Product(3136, 512),
            Product(512, 10),
        ),
        "one at a time",
    ),
    "B": Work(
        "2NN, 10 of 100 clients × 600",
        _images(TwoNN, 100, 600),
        10,
        (Product(784, 200, is_first=True), Product(200, 200), Product(200, 10)),
        "side by side",
    ),
    "C": Work(
        "logistic regression, 100 of 1,000 clients × 60",
        _images(LogisticRegression, 1000, 60),
        100,
        (Product(784, 10, is_first=True),),
        "side by side",
    ),
    "D": Work(
        "character LSTM, 10 of 100 clients × 40 lines",
        _lines,
        10,
        (
            Product(8, 1024),
            Product(256, 1024, is_recurrent=True),
            Product(256, 1024),
            Product(256, 1024, is_recurrent=True),
            Product(256, 258),
        ),
        "one at a time",
    ),
}


def clients_of(work: Work, task: Task) -> np.ndarray[Any, Any]:
    """The cohort of every round: the same, so that rounds can be compared."""
    return np.arange(min(work.cohort, task.data.num_clients))
