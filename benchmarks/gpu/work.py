"""What is trained: random images and lines of the paper's shapes, and a plain loop on a device.

The loop is that of `benchmarks/engine/bare.py` with its data and its models on the device: what one
would write by hand, client after client, in eager PyTorch.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from potluck import CNN, FedAvg, Task, TwoNN
from potluck.core import stream
from potluck.data import Examples, FederatedData
from potluck.data.federated import lengths
from potluck.engine.local_run import batch_order
from potluck.models import CharLSTM, PerCharacter
from potluck.simulation import RoundWork

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import bare

SEED, LR = 1, 0.05
ALGORITHM = FedAvg(client_lr=LR)


class Size(NamedTuple):
    """How much of everything."""

    clients: int
    images: int  # of a client
    lines: int  # of a client
    side: int  # of an image
    steps: int  # of a line
    hidden: int  # of the LSTM


FULL = Size(clients=100, images=600, lines=40, side=28, steps=80, hidden=256)
QUICK = Size(clients=30, images=14, lines=9, side=8, steps=16, hidden=16)


def tasks(size: Size) -> dict[str, Task]:
    """The three models, each with its data."""
    shape = (1, size.side, size.side)
    images = _images(size)
    return {
        "2nn": Task(model=partial(TwoNN, shape), data=images),
        "cnn": Task(model=partial(CNN, shape), data=images),
        "lstm": lines_task(_lines([size.lines] * size.clients, size), size),
    }


def roles(size: Size) -> Task:
    """Lines of noise for roles of very unequal parts, in place of Shakespeare's."""
    parts = np.random.default_rng(2).geometric(1.0 / (2 * size.lines), size.clients) + 2
    return lines_task(_lines(parts.tolist(), size), size)


def lines_task(data: FederatedData, size: Size) -> Task:
    model = partial(CharLSTM, data.num_classes, hidden=size.hidden)
    return Task(model=model, data=data, loss=PerCharacter(padding=bare.PADDING), metrics={})


def plain_model(name: str, size: Size) -> nn.Module:
    """The same model, written by hand; parameters in the same order."""
    if name == "lstm":
        return bare.CharLSTM() if size.hidden == 256 else _SmallLSTM(size.hidden)
    side = size.side
    if name == "cnn":
        model = bare.cnn()
        assert isinstance(model, nn.Sequential)
        model[7] = nn.Linear(64 * (side // 4) ** 2, 512)
        return model
    layers = (nn.Linear(side * side, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(200, 10))


class Looped:
    """The plain loop on a device."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        data = task.data
        self._clients = [
            tuple(torch.from_numpy(part).to(device) for part in data.client(k))
            for k in range(data.num_clients)
        ]
        self._model, self._device = model.to(device), device
        self._by_length = None
        if data.padding is not None:
            self._by_length = [
                lengths(data.client(k).inputs, data.padding) for k in range(data.num_clients)
            ]
        start = torch.from_numpy(task.initial_weights(SEED)).to(device)
        values = start.split([p.numel() for p in model.parameters()])
        self._weights = {
            name: value.view_as(parameter).clone()
            for (name, parameter), value in zip(model.named_parameters(), values, strict=True)
        }

    def round(self, number: int, cohort: np.ndarray) -> None:
        def shuffle(client: int, size: int) -> torch.Tensor:
            random = stream(SEED, "batches", number, client)
            by_length = None if self._by_length is None else self._by_length[client]
            order = torch.from_numpy(batch_order(size, ALGORITHM.batch_size, by_length, random))
            return order.to(self._device)

        self._weights = bare.train_round(
            self._model, self._weights, self._clients, cohort.tolist(), shuffle,
            epochs=1, batch_size=10, lr=LR, is_text=self._by_length is not None,
        )  # fmt: skip

    def vector(self) -> np.ndarray:
        return torch.cat([value.flatten() for value in self._weights.values()]).cpu().numpy()

    def close(self) -> None:
        """Nothing is held."""


class Engine:
    """An executor of ours, driven by the algorithm's lines."""

    def __init__(self, task: Task, executor: Any) -> None:
        self._executor = executor
        self._state = ALGORITHM.server_init(task.initial_weights(SEED))

    def round(self, number: int, cohort: np.ndarray) -> None:
        weights = self._state.weights
        result = self._executor.train(
            RoundWork(ALGORITHM, weights, cohort, seed=SEED, round=number)
        )
        assert not result.failures, result.failures
        assert getattr(self._executor, "refused", None) is None, self._executor.refused
        self._state = ALGORITHM.server_update(self._state, result.aggregate, round=number)

    @property
    def num_captured(self) -> int:
        """Shapes of steps that are replayed."""
        return self._executor.placed.num_captured

    def vector(self) -> np.ndarray:
        return self._state.weights

    def close(self) -> None:
        self._executor.close()


class _SmallLSTM(bare.CharLSTM):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True)
        self.output = nn.Linear(hidden, 258)


def _images(size: Size) -> FederatedData:
    random = np.random.default_rng(0)
    count = size.clients * size.images
    inputs = random.random((count, 1, size.side, size.side), np.float32)
    train = Examples(inputs, random.integers(0, 10, count))
    return _data(train, [size.images] * size.clients, 10, None)


def _lines(parts: list[int], size: Size) -> FederatedData:
    """Lines of random characters, as long as a play's where there is room."""
    random = np.random.default_rng(0)
    count, steps = sum(parts), size.steps
    usual = random.normal(0.54 * steps, 0.15 * steps, count)
    length = np.clip(np.rint(usual), 2, steps - 1).astype(np.int64)
    symbols = random.integers(32, 127, (count, steps + 1))
    padded = np.arange(steps) >= length[:, None]
    train = Examples(
        *(np.where(padded, bare.PADDING, part) for part in (symbols[:, :-1], symbols[:, 1:]))
    )
    return _data(train, parts, 258, bare.PADDING)


def _data(train: Examples, parts: list[int], classes: int, padding: int | None) -> FederatedData:
    return FederatedData(
        name="noise",
        train=train,
        test=Examples(train.inputs[:100], train.targets[:100]),
        offsets=np.cumsum([0, *parts]),
        clients=tuple(map(str, range(len(parts)))),
        num_classes=classes,
        padding=padding,
    )
