"""Local training of many clients on a device: chunks of them, two in flight on a GPU.

The last, long clients of a chunk leave most of a GPU idle, so steps of the next chunk fill it.
Chunks are launched in turn, each on a stream of its own. A chunk for which there is no memory is
halved, with a line of the log "potluck", and so are those that follow.

The same lines run on a CPU, with one chunk in flight and without a capture.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import Spec, Vector
from potluck.engine.devices import free_bytes, give_back, synchronise
from potluck.engine.gpu.chunk import Program
from potluck.engine.gpu.device_examples import Resident
from potluck.engine.gpu.input_checks import misfits
from potluck.engine.gpu.recurrence import has_fused_cell
from potluck.engine.gpu.step import DeviceStep, ModelStep, StackStep, is_pure
from potluck.engine.local_run import LocalRun
from potluck.engine.precision import Precision, products
from potluck.engine.runtime import ModelWithLoss
from potluck.engine.task import Task, spec_of
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.engine.vmap.mlp import layers_of

_LOG = logging.getLogger("potluck")
_CHUNK = 256  # clients, beyond which a GPU has enough to do
_COPIES = 8  # of each model: weights, gradient, what it is made of, the last row of a program
_SHARE = 0.25  # of the free memory of a device: for the examples, and for the models of a chunk


class Chunk(NamedTuple):
    """Clients that are done."""

    first: int  # among those that were asked for
    clients: int
    program: Program  # which holds their weights and losses until the next is asked for


class DeviceCohort:
    """Trains clients side by side on a device; `train` is that of `CohortRuntime`.

    Args:
        chunk: clients that are trained side by side; by the memory of the device if None.
        lanes: chunks in flight; two on a GPU if None, one elsewhere.
        plain: with PyTorch's own rules for all layers, which is for comparison.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        precision: Precision = "float32",
        chunk: int | None = None,
        lanes: int | None = None,
        *,
        plain: bool = False,
    ) -> None:
        with_loss = ModelWithLoss(task)
        module = with_loss.module
        self._task, self.device = task, device
        self._precision: Precision = precision
        self.spec: Spec = spec_of(module)
        free = free_bytes(device)
        fits = int(_SHARE * free) // (_COPIES * self.spec.num_bytes)
        self.chunk = chunk or max(min(_CHUNK, fits, task.data.num_clients), 1)
        self._lanes = lanes or (2 if device.type == "cuda" else 1)
        self._share = _SHARE * free
        self.misfits = misfits(with_loss, task.data)
        """Clients whose data must not be sent to a GPU: an index out of range ends the process."""
        self._resident: Resident | None = None
        self._general: CohortRuntime | None = None
        self._step: DeviceStep | None = None
        self._programs: list[Program] = []
        if is_pure(module, task):
            if device.type == "cuda":
                has_fused_cell(device)  # is tried now, and not while a graph is captured
            layers = None if plain or precision == "bf16" else layers_of(module, task)
            if layers is None:
                self._step = ModelStep(task, device, precision, plain=plain)
            else:
                self._step = StackStep(task, layers)
        else:
            self._general = CohortRuntime(task, plain=True, device=device)

    @property
    def is_pure(self) -> bool:
        """True if `chunks` may be called."""
        return self._general is None

    @property
    def num_captured(self) -> int:
        """Shapes whose step is replayed as a graph."""
        return sum(program.num_captured for program in self._programs)

    def train(self, runs: Sequence[LocalRun]) -> tuple[Vector, NDArray[np.float32]]:
        """Makes all steps of all runs.

        Args:
            runs: their corrections may differ in the drift only, their optimizers not.

        Returns:
            The local weights [runs, dim] and the mean losses [runs].

        Raises:
            RuntimeError: and others, if the model cannot be vectorised.
        """
        if self._general is not None:
            with products(self._precision):
                return self._general.train(runs)
        weights = np.empty((len(runs), self.spec.dim), np.float32)
        losses = np.empty(len(runs), np.float32)
        for first, clients, program in self.chunks(runs):
            part = slice(first, first + clients)
            weights[part] = program.result(clients).cpu().numpy()
            losses[part] = program.losses(clients).cpu().numpy()
        return weights, losses / np.array([max(len(run.steps), 1) for run in runs], np.float32)

    def chunks(self, runs: Sequence[LocalRun]) -> Iterator[Chunk]:
        """Trains these clients, and yields each chunk of them when it is done, within its
        stream."""
        waiting = _parts(slice(0, len(runs)), self.chunk)
        flights: list[_Flight] = []
        with products(self._precision):
            while waiting or flights:
                try:
                    self._start(runs, waiting, flights)
                    done = [flight for flight in flights if not _advance(flight)]
                except torch.OutOfMemoryError:
                    done = None
                if done is None:  # outside of the handler, which would keep their memory
                    waiting = [flight.part for flight in flights] + waiting
                    flights.clear()
                    self._halve()
                    waiting = [p for part in waiting for p in _parts(part, self.chunk)]
                    continue
                for flight in done:
                    flights.remove(flight)
                    with flight.program.on_stream():
                        first, past = flight.part.start, flight.part.stop
                        yield Chunk(first, past - first, flight.program)

    def resident(self) -> Resident:
        """The training examples on the device: one copy for all users, or only a part of them, and
        then a copy each."""
        if self._resident is None or not self._resident.is_whole:
            self._resident = Resident(self._task.data.train, self.device, self._share)
        return self._resident

    def _start(
        self, runs: Sequence[LocalRun], waiting: list[slice], flights: list[_Flight]
    ) -> None:
        """Starts chunks while there are lanes for them."""
        while waiting and len(flights) < self._lanes:
            program = self._idle([flight.program for flight in flights])
            part = waiting.pop(0)
            flights.append(_Flight(part, program, program.train(runs[part])))

    def _idle(self, busy: Sequence[Program]) -> Program:
        """Returns a program that is not in use."""
        for program in self._programs:
            if not any(program is other for other in busy):
                return program
        assert self._step is not None
        program = Program(
            self._task, self.spec, self._step, self.resident(), self.device, self.chunk
        )
        synchronise(self.device)  # what was put there is seen by all streams
        self._programs.append(program)
        return program

    def _halve(self) -> None:
        """Halves the chunks from now on; those in flight are dropped.

        Raises:
            RuntimeError: a single client does not fit.
        """
        if self.chunk == 1:
            raise RuntimeError(f"a single client needs more memory than there is on {self.device}")
        self.chunk //= 2
        _LOG.warning("out of memory on %s: chunks are halved to %d", self.device, self.chunk)
        synchronise(self.device)
        self._programs.clear()
        give_back(self.device)


class _Flight(NamedTuple):
    """A chunk in training."""

    part: slice
    program: Program
    ticks: Generator[None]


def _advance(flight: _Flight) -> bool:
    """Launches a tick. Returns whether there was one."""
    with flight.program.on_stream():
        return next(flight.ticks, flight) is None


def _parts(clients: slice, size: int) -> list[slice]:
    """Divides these clients into chunks."""
    stop = clients.stop
    return [slice(i, min(i + size, stop)) for i in range(clients.start, stop, size)]
