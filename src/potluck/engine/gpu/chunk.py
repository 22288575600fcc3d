"""A chunk of clients in training on a device: their weights, and one captured step a shape.

    weights[0 … n) ← the weights that each starts from              # [capacity + 1, …] a layer
    for each tick (`potluck.engine.gpu.schedule`):
        mine ← weights of the tick's clients                        # none are moved if it is all
        mine ← the step on their batches, gathered from the examples on the device
        weights of the tick's clients ← mine

The state of an optimizer is moved like the weights.

All tensors that a step reads or writes stay where they are, so that it can be replayed. The last
row belongs to no client: a tick of 50 clients is filled up to 64, and the fourteen extra ones read
from it and write into it.

Work is put on the program's stream in its order, without waiting. The caller may put another chunk
on another stream meanwhile.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import ClientOptimizer, Spec, Vector
from potluck.data.federated import lengths, trimmed
from potluck.engine.corrected_step import Descent, fresh_state
from potluck.engine.devices import on_stream, sent, stream_of
from potluck.engine.gpu.cuda_graph import Captured
from potluck.engine.gpu.device_examples import Resident
from potluck.engine.gpu.schedule import Tick, count_for, ticks
from potluck.engine.gpu.step import DeviceStep
from potluck.engine.local_run import LocalRun
from potluck.engine.task import Task

# Shapes that are captured at most. None is given up for another: with a graph, PyTorch may free
# what others of its stream still use, the workspace of cuBLAS.
_GRAPHS = 64
_BLOCK = 32  # ticks that are planned and sent together
_Named: TypeAlias = dict[str, Tensor]


class Program:
    """Trains one chunk at a time, of at most `capacity` clients."""

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
        self._states: dict[ClientOptimizer, list[_Named]] = {}
        self._losses = torch.zeros(capacity + 1, device=device)
        self._shapes: dict[_Shape, _Static] = {}
        self._captures = True  # until a step could not be

    def train(self, runs: Sequence[LocalRun]) -> Generator[None]:
        """Puts all steps of these clients on the stream, and yields after each tick.

        Each advance must be within `self.on_stream()`. The corrections of the runs may differ in
        the drift only, their optimizers not.
        """
        self._begin(runs)
        runs, lengths = self._placed(runs)
        plan = ticks(runs, lengths, self._widest, fills=self._step.fills)
        while block := list(islice(plan, _BLOCK)):  # planned while those before are made
            shapes = [self._shape(tick, runs) for tick in block]
            filled = [self._filled(*pair) for pair in zip(block, shapes, strict=True)]
            indices, rows, rates = (
                sent(np.concatenate(parts), self._device) for parts in zip(*filled, strict=True)
            )
            first = first_row = 0
            for shape in shapes:
                past, past_row = first + shape.clients, first_row + shape.clients * shape.size
                static = self._static(shape)
                static.indices.copy_(indices[first:past])
                static.rates.copy_(rates[first:past])
                static.rows.view(-1).copy_(rows[first_row:past_row])
                static.run(may_capture=self._captures and self.num_captured < _GRAPHS)
                self._captures &= static.run.refused is None
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
        optimizer = runs[0].optimizer
        if optimizer not in self._states:
            self._states[optimizer] = fresh_state(
                optimizer, self._trained(self.weights), (self.capacity + 1,)
            )
        for part in self._states[optimizer]:
            for tensor in part.values():
                tensor.zero_()

    def _fill(self, room: _Named, vectors: Sequence[Vector]) -> None:
        """Writes a vector into the row of each client; a common one is sent once."""
        address = vectors[0].__array_interface__["data"]
        if all(vector.__array_interface__["data"] == address for vector in vectors):
            rows = sent(vectors[0], self._device).expand(len(vectors), -1)
        else:
            rows = sent(np.stack(vectors), self._device)
        for name, view in self._spec.unflatten(rows).items():
            room[name][: len(vectors)].copy_(view)

    def _room(self) -> _Named:
        """Returns a row for each client and an extra one, a tensor a layer."""
        return {
            name: torch.zeros(self.capacity + 1, *shape, device=self._device)
            for name, shape in zip(self._spec.names, self._spec.shapes, strict=True)
        }

    def _shape(self, tick: Tick, runs: Sequence[LocalRun]) -> _Shape:
        clip, proximal, drift = runs[0].correction
        is_all = len(tick.clients) == len(runs)
        clients = len(runs) if is_all else min(count_for(len(tick.clients)), self.capacity)
        rule = runs[0].optimizer, clip, proximal, drift is not None
        return _Shape(clients, tick.size, tick.width, is_all, *rule)

    def _placed(
        self, runs: Sequence[LocalRun]
    ) -> tuple[list[LocalRun], list[NDArray[np.int64]] | None]:
        """The same runs with the rows of their examples on the device, and their lengths."""
        known = self._lengths
        lengths = None if known is None else [known[run.rows] for run in runs]
        places, moved = self.resident.place(np.concatenate([run.rows for run in runs]))
        if moved:
            self._shapes.clear()  # all at once: see `_GRAPHS`
        ends = np.cumsum([len(run.rows) for run in runs])
        parts = np.split(places, ends[:-1])
        placed = [run._replace(rows=part) for run, part in zip(runs, parts, strict=True)]
        return placed, lengths

    def _filled(
        self, tick: Tick, shape: _Shape
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Returns the clients' indices, rows and rates of a tick, filled up with extra clients."""
        more = shape.clients - len(tick.clients)
        if more == 0:
            return tick.clients, tick.rows.ravel(), tick.rates
        first = tick.rows[:1]
        first = np.where(first < 0, ~first, first)
        indices = np.concatenate([tick.clients, np.full(more, self.capacity, np.int64)])
        rows = np.concatenate([tick.rows, np.repeat(first, more, axis=0)])
        return indices, rows.ravel(), np.concatenate([tick.rates, np.zeros(more, np.float32)])

    def _static(self, shape: _Shape) -> _Static:
        """Returns the tensors and the step of a shape, made at its first use."""
        if shape not in self._shapes:
            self._shapes[shape] = self._new(shape)
        return self._shapes[shape]

    def _new(self, shape: _Shape) -> _Static:
        indices = torch.zeros(shape.clients, dtype=torch.int64, device=self._device)
        rows = torch.zeros(shape.clients, shape.size, dtype=torch.int64, device=self._device)
        rates = torch.zeros(shape.clients, device=self._device)
        run = Captured(lambda: self._make(shape, indices, rows, rates), self.stream, self._pool)
        return _Static(indices, rows, rates, run)

    def _make(self, shape: _Shape, indices: Tensor, codes: Tensor, rates: Tensor) -> None:
        """Puts one tick on the stream."""
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
        received = self._trained(self._received) if shape.proximal != 0.0 else {}
        drift = self._trained(self._drift) if shape.has_drift else {}
        rooms = [self.weights, *self._states[shape.optimizer]]
        mine, *state = (self._of(room, shape, indices) for room in rooms)
        received, drift = (self._of(room, shape, indices) for room in (received, drift))
        descent = Descent(shape.optimizer, shape.clip, shape.proximal, received, drift, state)
        losses = self._step.step(mine, inputs, targets, present.float(), rates, descent)
        with torch.no_grad():
            if shape.is_all:  # `mine` are the weights themselves
                self._losses[: shape.clients].add_(losses)
                return
            self._losses.index_add_(0, indices, losses)
            for room, some in zip(rooms, (mine, *state), strict=True):
                for name, rows_of in some.items():
                    room[name].index_copy_(0, indices, rows_of)

    def _trained(self, room: _Named) -> _Named:
        return {name: room[name] for name in self._spec.trained}

    @staticmethod
    def _of(room: _Named, shape: _Shape, indices: Tensor) -> _Named:
        if shape.is_all:
            return {name: tensor[: shape.clients] for name, tensor in room.items()}
        return {name: tensor.index_select(0, indices) for name, tensor in room.items()}


class _Shape(NamedTuple):
    """The shape for which a step is captured."""

    clients: int
    size: int  # of a batch
    width: int  # of sequences; 0 where there are none
    is_all: bool  # the clients are all of the chunk
    optimizer: ClientOptimizer
    clip: float | None
    proximal: float
    has_drift: bool


class _Static(NamedTuple):
    """The tensors that a step of one shape reads, and the step."""

    indices: Tensor  # [clients]
    rows: Tensor  # [clients, size]: ~row where the example counts nothing
    rates: Tensor  # [clients]
    run: Captured
