"""What a served run needs data, a model and PyTorch for, in a process of its own while it is asked.

To begin a run takes the model's first weights; after a round somebody evaluates. Both are over in
seconds, and PyTorch would stay in the server for weeks: 230 MB, and a hold on the interpreter while
the devices wait. So the server asks a child, which ends by itself when it was asked nothing for a
minute, and at once when the server does, however that ended.

Where PyTorch is loaded anyway, as in a demonstration, nothing is apart.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from potluck.config.experiment import Experiment
from potluck.core import Spec, Vector, WorkerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck.config.plan import Need
    from potluck.engine import Task

IDLE_SECONDS = 60.0
"""Without a question, before the child ends."""


class Beginning(NamedTuple):
    """What a run begins with."""

    weights: Vector
    spec: Spec
    plan: dict[str, Any]


class Judge:
    """Answers from an experiment's data and model, which are loaded when it is first asked."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._task: Task | None = None
        self._spec: Spec | None = None

    def begin(self, needs: tuple[Need, ...]) -> Beginning:
        """The first weights, their spec, and the plan of a device's work."""
        from potluck.config.plan import plan_of, write_plan
        from potluck.engine.buffers import roles

        task = self._load()
        weights = task.initial_weights(self._experiment.run.seed)
        spec = roles(task)
        plan = write_plan(plan_of(self._experiment, task.data, needs))
        return Beginning(spec.pack(weights), spec.packed(), plan)

    def evaluate(self, weights: Vector) -> Mapping[str, float]:
        """Metrics of a model, by one thread: others on this machine train meanwhile."""
        from potluck.engine import evaluate
        from potluck.simulation.executors.executor import kernel_threads

        with kernel_threads(1):
            seed = self._experiment.run.seed
            return evaluate(self._load(), self._whole(weights), seed=seed)

    def close(self) -> None:
        """Nothing is held but memory."""

    def give_up(self) -> None:
        """What is being answered here is answered to its end."""

    def _whole(self, weights: Vector) -> Vector:
        """The model of what travels, with the constants of the run's first one."""
        from potluck.engine.buffers import roles

        task = self._load()
        if self._spec is None:
            self._spec = roles(task)
        if self._spec.is_all_trained:
            return weights
        return self._spec.unpack(weights, task.initial_weights(self._experiment.run.seed))

    def _load(self) -> Task:
        from potluck.config.build import build_central_data, build_task

        if self._task is None:
            self._task = build_task(self._experiment, build_central_data(self._experiment))
        return self._task


class DistantJudge:
    """The same answers from a child. Asked by one thread at a time."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._one = threading.Lock()
        self._child: tuple[BaseProcess, Connection] | None = None
        self._is_given_up = False

    def begin(self, needs: tuple[Need, ...]) -> Beginning:
        """As `Judge.begin`; the child ends, since the first evaluation may be far away."""
        try:
            return self._ask("begin", needs)
        finally:
            self.close()

    def evaluate(self, weights: Vector) -> Mapping[str, float]:
        """As `Judge.evaluate`."""
        return self._ask("evaluate", weights)

    def close(self) -> None:
        """End the child, if there is one."""
        with self._one:
            self._drop()

    def give_up(self) -> None:
        """Answer nothing any more; whoever waits for an answer is told at once. In any thread."""
        self._is_given_up = True
        child = self._child
        if child is not None:
            child[0].kill()

    def _ask(self, name: str, argument: Any) -> Any:
        with self._one:
            for _ in range(2):  # the child may have ended since it was asked last
                if self._is_given_up:
                    raise WorkerError("nothing is evaluated any more: the server ends.")
                _, pipe = self._child or self._start()
                try:
                    pipe.send((name, argument))
                    answer = pipe.recv()
                except (EOFError, OSError):
                    self._drop()
                    continue
                if isinstance(answer, Exception):
                    raise answer
                return answer
        raise WorkerError(
            "the process that holds data and model must answer, and it ended twice "
            f"({name}). Look for a lack of memory in the kernel's log."
        )

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._experiment), daemon=True)
        process.start()
        theirs.close()
        self._child = process, ours
        if self._is_given_up:  # meanwhile
            process.kill()
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            process, pipe = self._child
            pipe.close()
            process.join()
            self._child = None


def is_evaluated(experiment: Experiment) -> bool:
    """Whether a server has anything to evaluate models on."""
    return experiment.task.data != "devices" or experiment.server.test is not None


def evaluated_on(experiment: Experiment) -> str:
    """What a server evaluates models on, in words."""
    task, section = experiment.task, experiment.server
    if not is_evaluated(experiment):
        told = "on nothing here (server.test names a file)"
    elif section.test is not None:
        told = f"on all examples of {section.test}"
    elif task.path is not None:
        told = f"on the examples of {task.path} that are held out"
    else:
        told = f"on the test examples of {task.data}"
    every = section.federated_every or 0
    if every:
        told += f"; every {every} rounds on the devices' own"
    return told


def judge_of(experiment: Experiment) -> Judge | DistantJudge:
    """One of the two: a child, unless PyTorch is loaded here."""
    return Judge(experiment) if "torch" in sys.modules else DistantJudge(experiment)


def _work(pipe: Connection, experiment: Experiment) -> None:
    """What the child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's end is ours
    judge = Judge(experiment)
    with contextlib.suppress(EOFError, ConnectionError):  # it has ended
        while pipe.poll(IDLE_SECONDS):
            name, argument = pipe.recv()
            try:
                answer: Any = getattr(judge, name)(argument)
            except Exception as error:
                answer = error
            pipe.send(answer)
