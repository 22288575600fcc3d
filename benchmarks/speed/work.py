"""The workloads: what every contender is given, in one file, and what it must do with it.

A file holds the data of all clients, the initial weights, the cohort of every round, and the order
in which each client of a cohort takes its examples. So all contenders make the same local steps on
the same batches, and must end with the same weights. Inputs are noise: only time is measured. The
lines of `d-natural` have the lengths of the lines of Shakespeare's plays.

Reading needs NumPy alone, since contenders have environments of their own; writing needs Potluck,
whose cohorts and orders they are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEED = 1
PADDING = 257
SYMBOLS, STEPS = 258, 80
SHAPES: dict[str, tuple[int, ...]] = {
    "cnn": (1, 28, 28),
    "2nn": (1, 28, 28),
    "logistic": (1, 28, 28),
    "narrow": (64,),
    "lstm": (STEPS,),
    "empty": (1,),
}
CLASSES = {"lstm": SYMBOLS, "empty": 2}  # else 10
# How many lines of 3, 4, … 74 characters the speaking roles of the plays have: 85,128 in all.
LENGTHS = (
    6, 96, 161, 256, 260, 231, 323, 311, 338, 334, 341, 370, 406, 494, 603, 689, 749, 736, 683, 671,
    616, 661, 702, 729, 722, 686, 641, 609, 669, 666, 767, 979, 1269, 1604, 2204, 2808, 3298, 3956,
    4523, 4691, 4864, 4598, 4343, 3887, 3349, 2645, 2220, 1759, 1462, 1172, 945, 931, 844, 785, 845,
    784, 786, 783, 2204, 881, 908, 1057, 1032, 1163, 16, 4, 0, 0, 0, 0, 2, 1,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained: E = 1 epoch over each client of a cohort."""

    name: str
    about: str
    model: str  # a key of SHAPES
    num_clients: int
    size: int  # examples of a client
    cohort: int
    rounds: int  # the first of which warms up
    lr: float
    batch_size: int = 10
    natural: bool = False  # lines of unequal length

    @property
    def is_text(self) -> bool:
        return self.model == "lstm"


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="a", about="the paper's CNN, 100 clients × 600, C 0.1, B 10", model="cnn",
            num_clients=100, size=600, cohort=10, rounds=6, lr=0.005,
        ),
        Workload(
            name="b", about="2NN, 100 clients × 600, C 0.1, B 10", model="2nn",
            num_clients=100, size=600, cohort=10, rounds=31, lr=0.005,
        ),
        Workload(
            name="c", about="logistic regression, 1,000 clients × 60, 100 a round, B 10",
            model="logistic", num_clients=1000, size=60, cohort=100, rounds=21, lr=0.02,
        ),
        Workload(
            name="d-equal", about="character LSTM, 100 clients × 40 lines of 80 characters, C 0.1, "
            "B 10", model="lstm", num_clients=100, size=40, cohort=10, rounds=4, lr=0.5,
        ),
        Workload(
            name="d-natural", about="the same, lines as long as Shakespeare's", model="lstm",
            num_clients=100, size=40, cohort=10, rounds=4, lr=0.5, natural=True,
        ),
        Workload(
            name="e", about="650 parameters, 100,000 clients × 10, 1,000 a round", model="narrow",
            num_clients=100_000, size=10, cohort=1000, rounds=11, lr=0.02,
        ),
        Workload(
            name="f", about="the empty round: 100 clients with one example of one feature",
            model="empty", num_clients=100, size=1, cohort=100, rounds=31, lr=0.02, batch_size=1,
        ),
    )
}  # fmt: skip


def tiny(workload: Workload) -> Workload:
    """A few seconds of it: to see that a contender still runs, and does the same work."""
    size = min(workload.size, 2 * workload.batch_size)
    return dataclasses.replace(workload, num_clients=12, size=size, cohort=4, rounds=3)


class Given(NamedTuple):
    """A workload's file. `cohorts[r, i]` is a client, and `orders[r, i]` its examples in order."""

    workload: Workload
    inputs: np.ndarray  # [clients, size, …], float32; of text, int64 symbols
    targets: np.ndarray  # [clients, size], int64; of text [clients, size, steps]
    weights: np.ndarray  # [dim], the initial ones, as PyTorch orders parameters
    cohorts: np.ndarray  # [rounds, cohort]
    orders: np.ndarray  # [rounds, cohort, size]

    def client(self, round: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of one client of a cohort in the order of training; rounds from 1."""
        k, order = self.cohorts[round - 1, place], self.orders[round - 1, place]
        return self.inputs[k][order], self.targets[k][order]


def read(folder: Path) -> Given:
    """Map a workload's files into memory: processes share the pages that they read."""
    workload = Workload(**json.loads((folder / "workload.json").read_text()))
    return Given(workload, *(np.load(folder / f"{n}.npy", "c") for n in Given._fields[1:]))


def write(workload: Workload, folder: Path) -> None:
    """Make the files of a workload, unless they are there."""
    text = json.dumps(dataclasses.asdict(workload), allow_nan=False)
    marker = folder / "workload.json"
    if marker.exists() and marker.read_text() == text:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(Given._fields[1:], _arrays(workload), strict=True):
        np.save(folder / f"{name}.npy", array)
    marker.write_text(text)


def potluck_task(given: Given) -> Any:
    """The workload as a `potluck.Task`, with next to nothing to evaluate on."""
    import torch
    from torch import nn
    from torch.nn.utils import vector_to_parameters

    from potluck import CNN, LogisticRegression, Task, TwoNN
    from potluck.data import Examples, FederatedData
    from potluck.models import CharLSTM, PerCharacter

    workload = given.workload
    classes = CLASSES.get(workload.model, 10)
    n = workload.num_clients * workload.size
    train = Examples(
        np.asarray(given.inputs).reshape(n, *given.inputs.shape[2:]),
        np.asarray(given.targets).reshape(n, *given.targets.shape[2:]),
    )
    data = FederatedData(
        name=workload.name,
        train=train,
        test=Examples(train.inputs[:1], train.targets[:1]),
        offsets=np.arange(0, n + 1, workload.size),
        clients=tuple(map(str, range(workload.num_clients))),
        num_classes=classes,
        padding=PADDING if workload.is_text else None,
    )
    models: dict[str, Any] = {
        "lstm": CharLSTM,
        "cnn": CNN,
        "2nn": TwoNN,
        "logistic": LogisticRegression,
        "narrow": lambda: LogisticRegression((64,)),
        "empty": lambda: nn.Linear(1, 2),
    }
    model = models[workload.model]
    if given.weights.size > 0:  # a file's, from which the others start too
        model = model()
        vector_to_parameters(torch.from_numpy(np.array(given.weights)), model.parameters())
    if workload.is_text:
        return Task(model=model, data=data, loss=PerCharacter(padding=PADDING), metrics={})
    return Task(model=model, data=data)


def potluck_algorithm(workload: Workload) -> Any:
    """Federated averaging with the workload's settings."""
    from potluck import FedAvg

    return FedAvg(client_lr=workload.lr, batch_size=workload.batch_size)


def _arrays(workload: Workload) -> tuple[np.ndarray, ...]:
    from potluck.core import sample_cohort, stream
    from potluck.data.federated import lengths
    from potluck.engine.local_run import batch_order

    inputs, targets = _examples(workload)
    nothing = np.empty(0)
    task = potluck_task(Given(workload, inputs, targets, nothing, nothing, nothing))
    cohorts = np.stack([
        sample_cohort(workload.num_clients, workload.cohort, seed=SEED, round=r)
        for r in range(1, workload.rounds + 1)
    ])  # fmt: skip
    orders = np.empty((*cohorts.shape, workload.size), np.int64)
    algorithm = potluck_algorithm(workload)
    for r, cohort in enumerate(cohorts, 1):
        for place, k in enumerate(map(int, cohort)):
            by_length = lengths(inputs[k], PADDING) if workload.is_text else None
            random = stream(SEED, "batches", r, k)
            orders[r - 1, place] = batch_order(
                workload.size, algorithm.batch_size, by_length, random
            )
    return inputs, targets, task.initial_weights(SEED), cohorts, orders


def _examples(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (workload.num_clients, workload.size)
    if not workload.is_text:
        inputs = random.random((*shape, *SHAPES[workload.model]), np.float32)
        if workload.model in ("cnn", "2nn"):
            inputs -= 0.5  # else the last bits of a sum decide where the weights go
        return inputs, random.integers(0, CLASSES.get(workload.model, 10), shape)
    symbols = random.integers(32, 127, (*shape, STEPS + 1))
    length = np.full(shape, STEPS)
    if workload.natural:
        weights = np.array(LENGTHS) / sum(LENGTHS)
        length = random.choice(np.arange(3, 3 + len(LENGTHS)), shape, p=weights)
    padded = np.arange(STEPS) >= length[..., None]
    return (
        np.where(padded, PADDING, symbols[..., :-1]),
        np.where(padded, PADDING, symbols[..., 1:]),
    )
