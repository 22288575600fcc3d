"""The `auto` executor: the fastest of the others for this task, by the clock.

    before the first round: time a few local steps of its first clients, in `loop` and in `vmap`
    if a round will take a tenth of a second: two rounds with `workers`, each of which trains
        clients as the faster of both does; stay there if they are clearly faster than foreseen
    two rounds with the faster of the two; if the other was not far behind, two rounds with that
    when training has taken a tenth of a second: two rounds with `workers`, if not done yet
    from then on: the one whose second round was the fastest

The steps that are timed first are copies of the clients' next steps and leave no trace. The rounds
count. The first of two warms up. Processes must be started, which takes a tenth of a second, so
runs shorter than that do without. Where there is a GPU, it is what `vmap` trains on.

The choice decides neither cohorts nor batches, and results only to float tolerance. It is made
anew for another algorithm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch

from potluck.algorithms import Algorithm
from potluck.core import Vector, WorkerError
from potluck.core.validate import as_count
from potluck.data.trees import is_one
from potluck.engine import Task
from potluck.engine.devices import device_of
from potluck.simulation.executors.executor import CohortResult, Executor, RoundWork
from potluck.simulation.executors.loop import Loop
from potluck.simulation.executors.step_timing import Estimate, estimate
from potluck.simulation.executors.vmap_executor import Vmap
from potluck.simulation.executors.workers import Workers, available_cores

_Name: TypeAlias = Literal["loop", "vmap", "workers"]
_ALONE: tuple[_Name, _Name] = ("loop", "vmap")  # in this process
_FAR = 2.0  # times the faster's time, from which on a whole round is not spent on the other
_ROUNDS = 2  # with each, of which the last counts
_WORKERS_AFTER_SECONDS = 0.1  # of training, which is about what starting them takes
_CLEARLY = 0.8  # of the time of the faster one alone: no round is spent on that


class Auto:
    """Times the executors on the first clients, and trains with the fastest.

    Args:
        task: as for every executor.
        num_workers: processes of `workers`; the number of cores this process may use if None. With
            1 there are none.
        device: on which `vmap` trains: "auto" is a GPU if there is one, "cpu" is none.
        clock: in seconds.
    """

    def __init__(
        self,
        task: Task,
        num_workers: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        device: str | torch.device = "auto",
    ) -> None:
        self._task, self._clock = task, clock
        if num_workers is not None:
            num_workers = as_count("num_workers", num_workers)
        self._num_workers = num_workers or available_cores()
        self._executors: dict[_Name, Executor] = {"loop": Loop(task)}
        where = device_of(device) if isinstance(device, str) else device
        leaves_cpu = where.type != "cpu" or not isinstance(device, str)
        leaves_cpu = leaves_cpu and is_one(task.data.train.inputs)
        self._on_device = Vmap(task, device=where) if leaves_cpu else None
        self._name: _Name = "loop"
        self._algorithm: Algorithm | None = None  # the one that the choice is for
        self._per_step: dict[_Name, float] = {}  # seconds of a local step, as measured so far
        self._tried: set[_Name] = set()  # of which this was a round, and not foreseen
        self._next: list[_Name] = []  # to be tried after the present one, in order
        self._chunk: int | None = None  # of the workers
        self._rounds = 0  # with the present one since it was chosen
        self._spent = 0.0  # seconds of training since the choice began
        self._is_settled = False

    @property
    def choice(self) -> str:
        """The present executor and the reason, in words; empty before the first round."""
        others = sorted((s, n) for n, s in self._per_step.items() if n != self._name)
        if self._name not in self._per_step and not others:
            return ""
        vmap = self._executors.get("vmap")
        words = self._name
        if self._name == "vmap" and isinstance(vmap, Vmap):
            words += "" if vmap.placed is None else f" on {vmap.placed.device}"
            words += f" in chunks of {vmap.chunk}"
        if self._name == "workers":
            words += f", {self._num_workers} processes"
            words += "" if self._chunk is None else f" in chunks of up to {self._chunk}"
        compared = ", ".join(
            f"{name} {_microseconds(seconds)}" for seconds, name in others if np.isfinite(seconds)
        )
        mine = self._per_step.get(self._name)
        measured = "" if mine is None else f", {_microseconds(mine)} a local step"
        return words + measured + (f" ({compared})" if compared else "")

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort."""
        self._task.begin(work.seed)
        if len(work.cohort) > 0 and work.algorithm != self._algorithm:
            placed = None if self._on_device is None else self._on_device.placed
            self._begin(work.algorithm, estimate(self._task, work, self._clock, placed))
        started = self._clock()
        try:
            result = self._executors[self._name].train(work)
        except WorkerError:
            if self._is_settled or self._name != "workers":
                raise
            self._per_step["workers"] = np.inf  # this algorithm does not reach them
            self._tried.add("workers")
            self._advance()
            return self.train(work)
        words = self.choice
        if not self._is_settled and result.num_steps > 0:
            self._learn(self._clock() - started, result.num_steps)
        return result._replace(executor=words)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        return self._executors[self._name].evaluate(weights)

    def close(self) -> None:
        """Ends the processes, if there are any. May be called twice."""
        for executor in self._executors.values():
            executor.close()

    def _begin(self, algorithm: Algorithm, costs: Estimate) -> None:
        """Starts the choice for an algorithm."""
        self._algorithm = algorithm
        self._spent, self._is_settled = 0.0, False
        self._tried = set()
        self._per_step = {"loop": costs.loop}
        if costs.vmap < _FAR * costs.loop:
            program = self._on_device or Vmap(self._task, costs.chunk, compiles=True)
            self._executors["vmap"] = program
            self._per_step["vmap"] = costs.vmap
        order = sorted(self._per_step, key=lambda name: self._per_step[name])
        fastest = self._per_step[order[0]]
        self._next = [name for name in order if self._per_step[name] <= _FAR * fastest]
        if fastest * costs.num_steps >= _WORKERS_AFTER_SECONDS and self._start_workers():
            self._next.insert(0, "workers")
        self._advance()

    def _learn(self, seconds: float, num_steps: int) -> None:
        """Takes the time of a round into account and chooses the executor of the next."""
        self._spent += seconds
        self._rounds += 1
        vmap = self._executors.get("vmap")
        refused = self._name == "vmap" and isinstance(vmap, Vmap) and vmap.refused is not None
        if self._rounds < _ROUNDS and not refused:
            return
        self._per_step[self._name] = np.inf if refused else seconds / num_steps
        self._tried.add(self._name)
        self._advance()

    def _advance(self) -> None:
        """Gives the next rounds to an executor that had none, or chooses."""
        tried_workers = "workers" in self._tried
        alone = min(self._per_step[name] for name in _ALONE if name in self._per_step)
        if tried_workers and self._per_step["workers"] <= _CLEARLY * alone:
            self._settle()
        elif self._next:
            self._name, self._rounds = self._next.pop(0), 0
        elif tried_workers:
            self._settle()
        elif self._spent < _WORKERS_AFTER_SECONDS:
            self._name = self._fastest()
        elif self._start_workers():
            self._name, self._rounds = "workers", 0
        else:
            self._settle()

    def _start_workers(self) -> bool:
        """Starts processes that train as the faster executor does alone. Returns whether there are
        any."""
        if self._num_workers == 1:
            return False
        faster = min(_ALONE, key=lambda name: self._per_step.get(name, np.inf))
        vmap = self._executors.get(faster)
        chunk = vmap.chunk if isinstance(vmap, Vmap) else None
        if "workers" in self._executors and chunk != self._chunk:
            self._executors.pop("workers").close()
        try:
            if "workers" not in self._executors:
                workers = Workers(self._task, self._num_workers, chunk=chunk)
                self._executors["workers"] = workers
        except WorkerError:  # the task does not reach other processes
            return False
        self._chunk = chunk
        return True

    def _settle(self) -> None:
        self._name, self._is_settled = self._fastest(), True
        if self._name != "workers" and "workers" in self._executors:
            self._executors.pop("workers").close()

    def _fastest(self) -> _Name:
        """Returns the fastest executor that had a round; estimates of the others do not compare
        with it."""
        fastest: _Name = "loop"
        seconds = self._per_step["loop"] if "loop" in self._tried else np.inf
        for name in self._tried:
            if self._per_step[name] < seconds:
                fastest, seconds = name, self._per_step[name]
        return fastest


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
