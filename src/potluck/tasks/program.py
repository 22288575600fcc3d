"""A chunk of clients in training on a device: their weights, and one captured step a shape.

    weights[0 … n) ← the weights that each starts from              # [capacity + 1, …] a layer
    for each tick (`potluck.tasks.ticks`):
        mine ← weights of the tick's clients                        # none are moved if it is all
        mine ← mine − rates · g(mine; their batches, gathered from the examples on the device)
        weights of the tick's clients ← mine

All tensors that a step reads or writes stay where they are, so that it can be replayed. The last
row belongs to nobody: a tick of 50 clients is filled up to 64, and the fourteen that are too many
read from it and write into it.

Everything is put on the program's stream in the order in which it is to happen, and nothing waits:
the caller may put another chunk on another stream meanwhile.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from potluck.core import Spec, Vector
from potluck.tasks.captured import Captured
from potluck.tasks.cohort import LocalRun
from potluck.tasks.correction import Pull
from potluck.tasks.data import lengths, trimmed
from potluck.tasks.device_step import DeviceStep
from potluck.tasks.placement import on_stream, sent, stream_of
from potluck.tasks.resident import Resident
from potluck.tasks.task import Task
from potluck.tasks.ticks import Tick, count_for, ticks

_GRAPHS = 64  # shapes that are kept, the latest used
_Named: TypeAlias = dict[str, Tensor]


class Program:
    """One chunk at a time, of at most `capacity` clients."""

    def __init__(
        self,
        task: Task,
        spec: Spec,
        step: DeviceStep,
        resident: Resident,
        device: torch.device,
        capacity: int,
    ) -> None:
        self._spec, self._step, self.resident, self._device = spec, step, resident, device
        self._padding, inputs = task.data.padding, task.data.train.inputs
        self._lengths = None if self._padding is None else lengths(inputs, self._padding)
        self._widest = inputs.shape[1] if self._padding is not None else 0
        self.capacity = capacity
        self.stream = stream_of(device)
        self._pool = None if self.stream is None else torch.cuda.graph_pool_handle()
        self.weights = self._room()
        self._received: _Named = {}
        self._drift: _Named = {}
        self._losses = torch.zeros(capacity + 1, device=device)
        self._shapes: dict[_Shape, _Static] = {}

    def train(self, runs: Sequence[LocalRun]) -> Generator[None]:
        """Put all steps of these clients on the stream, and yield after each tick.

        Each advance is to be made within `self.on_stream()`. The corrections of the runs may
        differ in the drift only.
        """
        self._begin(runs)
        plan = list(ticks(runs, self._lengths, self._widest, fills=self._step.fills))
        if not plan:
            return
        shapes = [self._shape(tick, runs) for tick in plan]
        orders = [self._order(tick, shape) for tick, shape in zip(plan, shapes, strict=True)]
        order = np.concatenate([slots for slots, _ in orders])
        rows, moved = self.resident.place(np.concatenate([rows for _, rows in orders]))
        if moved:
            self._shapes.clear()
        absent = np.concatenate([_absent(tick, s) for tick, s in zip(plan, shapes, strict=True)])
        there = sent(order, self._device), sent(np.where(absent, ~rows, rows), self._device)
        rates = sent(np.concatenate([_rates(t, s) for t, s in zip(plan, shapes, strict=True)]),
                     self._device)  # fmt: skip
        first = first_row = 0
        for shape in shapes:
            static = self._static(shape)
            past, past_row = first + shape.clients, first_row + shape.clients * shape.size
            static.slots.copy_(there[0][first:past])
            static.rates.copy_(rates[first:past])
            static.rows.view(-1).copy_(there[1][first_row:past_row])
            static.run()
            first, first_row = past, past_row
            yield

    def on_stream(self) -> Any:
        """The context in which work for this program is launched."""
        return on_stream(self.stream)

    def result(self, clients: int) -> Tensor:
        """The local weights of the first so many: [clients, dim]."""
        parts = [self.weights[name][:clients].flatten(1) for name in self._spec.names]
        return torch.cat(parts, dim=1)

    def losses(self, clients: int) -> Tensor:
        """The sums of their losses over their steps: [clients]."""
        return self._losses[:clients]

    @property
    def num_captured(self) -> int:
        """Shapes whose step is replayed."""
        return sum(static.run.is_captured for static in self._shapes.values())

    def _begin(self, runs: Sequence[LocalRun]) -> None:
        self._losses.zero_()
        self._fill(self.weights, [run.start for run in runs])
        if runs[0].correction.proximal != 0.0:
            self._received = self._received or self._room()
            self._fill(self._received, [run.start for run in runs])
        drifts = [run.correction.drift for run in runs if run.correction.drift is not None]
        if drifts:
            self._drift = self._drift or self._room()
            self._fill(self._drift, drifts)

    def _fill(self, room: _Named, vectors: Sequence[Vector]) -> None:
        """Write a vector into the row of each client; one that all share is sent once."""
        address = vectors[0].__array_interface__["data"]
        if all(vector.__array_interface__["data"] == address for vector in vectors):
            rows = sent(vectors[0], self._device).expand(len(vectors), -1)
        else:
            rows = sent(np.stack(vectors), self._device)
        for name, view in self._spec.unflatten(rows).items():
            room[name][: len(vectors)].copy_(view)

    def _room(self) -> _Named:
        """A row for each client and one for nobody, a tensor a layer."""
        return {
            name: torch.zeros(self.capacity + 1, *shape, device=self._device)
            for name, shape in zip(self._spec.names, self._spec.shapes, strict=True)
        }

    def _shape(self, tick: Tick, runs: Sequence[LocalRun]) -> _Shape:
        clip, proximal, drift = runs[0].correction
        is_all = len(tick.clients) == len(runs)
        clients = len(runs) if is_all else min(count_for(len(tick.clients)), self.capacity)
        return _Shape(clients, tick.size, tick.width, is_all, clip, proximal, drift is not None)

    def _order(self, tick: Tick, shape: _Shape) -> tuple[np.ndarray, np.ndarray]:
        """The slots of a tick's clients and the rows of their batches, filled up to a shape."""
        slots = np.full(shape.clients, self.capacity, np.int64)
        slots[: len(tick.clients)] = tick.clients
        rows = np.where(tick.rows < 0, ~tick.rows, tick.rows)
        more = np.broadcast_to(rows[:1], (shape.clients - len(rows), shape.size))
        return slots, np.concatenate([rows, more]).ravel()

    def _static(self, shape: _Shape) -> _Static:
        """What is kept for a shape, made when it is first met."""
        static = self._shapes.pop(shape, None)
        if static is None:
            if len(self._shapes) >= _GRAPHS:
                del self._shapes[next(iter(self._shapes))]
            static = self._new(shape)
        self._shapes[shape] = static  # now the latest
        return static

    def _new(self, shape: _Shape) -> _Static:
        slots = torch.zeros(shape.clients, dtype=torch.int64, device=self._device)
        rows = torch.zeros(shape.clients, shape.size, dtype=torch.int64, device=self._device)
        rates = torch.zeros(shape.clients, device=self._device)
        run = Captured(lambda: self._make(shape, slots, rows, rates), self.stream, self._pool)
        return _Static(slots, rows, rates, run)

    def _make(self, shape: _Shape, slots: Tensor, codes: Tensor, rates: Tensor) -> None:
        """One tick."""
        present = codes >= 0
        rows = torch.where(present, codes, codes.bitwise_not()).view(-1)
        inputs, targets = (
            packed.index_select(0, rows) for packed in (self.resident.inputs, self.resident.targets)
        )
        if shape.width > 0:
            inputs, targets = trimmed(inputs, targets, shape.width)
        inputs, targets = (
            part.reshape(shape.clients, shape.size, *part.shape[1:]) for part in (inputs, targets)
        )
        pull = Pull(
            shape.clip,
            shape.proximal,
            self._of(self._received, shape, slots) if shape.proximal != 0.0 else {},
            self._of(self._drift, shape, slots) if shape.has_drift else {},
        )
        mine = self._of(self.weights, shape, slots)
        losses = self._step.step(mine, inputs, targets, present.float(), rates, pull)
        with torch.no_grad():
            if shape.is_all:  # `mine` are the weights themselves
                self._losses[: shape.clients].add_(losses)
                return
            self._losses.index_add_(0, slots, losses)
            for name, rows_of in mine.items():
                self.weights[name].index_copy_(0, slots, rows_of)

    @staticmethod
    def _of(room: _Named, shape: _Shape, slots: Tensor) -> _Named:
        if shape.is_all:
            return {name: tensor[: shape.clients] for name, tensor in room.items()}
        return {name: tensor.index_select(0, slots) for name, tensor in room.items()}


class _Shape(NamedTuple):
    """What a step is captured for."""

    clients: int
    size: int  # of a batch
    width: int  # of sequences; 0 where there are none
    is_all: bool  # the clients are all of the chunk
    clip: float | None
    proximal: float
    has_drift: bool


class _Static(NamedTuple):
    """What a step of one shape reads, and the step."""

    slots: Tensor  # [clients]
    rows: Tensor  # [clients, size]: ~row where the example counts nothing
    rates: Tensor  # [clients]
    run: Captured


def _absent(tick: Tick, shape: _Shape) -> np.ndarray:
    """Which entries of a tick's rows count nothing, filled up to a shape with those that do."""
    absent = np.zeros((shape.clients, shape.size), bool)
    absent[: len(tick.clients)] = tick.rows < 0
    return absent.ravel()


def _rates(tick: Tick, shape: _Shape) -> np.ndarray:
    """The rates of a tick, 0 for whom it was filled up with."""
    rates = np.zeros(shape.clients, np.float32)
    rates[: len(tick.clients)] = tick.rates
    return rates
