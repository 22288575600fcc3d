"""The evaluator of a served run, in a child process where PyTorch is not loaded anyway.

Beginning a run takes the model's first weights, and evaluation follows a round. Both take seconds,
and PyTorch would stay in the server for weeks: 230 MB, and the interpreter's lock while devices
wait. So a child process does both. It exits after a minute without a request, and with the server,
however that ends.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from potluck.config.experiment import Experiment
from potluck.core import Spec, Vector, WorkerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck.config.plan import Need
    from potluck.engine import Task

IDLE_SECONDS = 60
"""The time without a request after which the child exits."""


class Beginning(NamedTuple):
    """The first weights of a run, and all else that it begins with."""

    weights: Vector
    spec: Spec
    plan: dict[str, Any]


class RunEvaluator:
    """Begins and evaluates a run. Data and model are loaded at the first request."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._task: Task | None = None
        self._spec: Spec | None = None

    def begin(self, needs: tuple[Need, ...]) -> Beginning:
        """Returns the first weights, their spec, and the plan of a device's work."""
        from potluck.config.plan import plan_of, write_plan
        from potluck.engine.buffers import roles

        task = self._load()
        weights = task.initial_weights(self._experiment.run.seed)
        spec = roles(task)
        plan = write_plan(plan_of(self._experiment, task.data, needs))
        return Beginning(spec.pack(weights), spec.packed(), plan)

    def evaluate(self, weights: Vector) -> Mapping[str, float]:
        """Returns the metrics of a model, by one thread: others on this machine train meanwhile."""
        from potluck.engine import evaluate
        from potluck.engine.devices import kernel_threads

        with kernel_threads(1):
            seed = self._experiment.run.seed
            return evaluate(self._load(), self._whole(weights), seed=seed)

    def cancel(self) -> None:
        """Does nothing: an evaluation in this process cannot be cancelled."""

    def _whole(self, weights: Vector) -> Vector:
        """Returns the whole model: what travels, and the constants of the run's first model."""
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


class EvaluatorProcess:
    """A `RunEvaluator` in a child process. Asked by one thread at a time.

    A pool of the standard library's would leave semaphores behind when the server is killed, and
    Python says so on stderr, among the lines of the log.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._child: tuple[BaseProcess, Connection] | None = None
        self._is_cancelled = False

    def begin(self, needs: tuple[Need, ...]) -> Beginning:
        """Does as `RunEvaluator.begin`."""
        return self._ask("begin", needs)

    def evaluate(self, weights: Vector) -> Mapping[str, float]:
        """Does as `RunEvaluator.evaluate`."""
        return self._ask("evaluate", weights)

    def cancel(self) -> None:
        """Ends the child, and makes every request raise, now and later. In any thread."""
        self._is_cancelled = True
        if self._child is not None:
            self._child[0].kill()

    def _ask(self, name: str, argument: Any) -> Any:
        for _ in range(2):  # the child may have ended since the last question
            process, questions = self._child = self._child or self._start()
            if self._is_cancelled:  # looked at once `_child` is set, as `cancel` sets it first
                process.kill()
            try:
                questions.send((name, argument))
                is_answered, answer = questions.recv()
            except (EOFError, OSError):
                questions.close()
                process.join()
                self._child = None
                if self._is_cancelled:
                    raise WorkerError("nothing is evaluated any more: the server ends.") from None
                continue
            if not is_answered:
                raise answer
            return answer
        raise WorkerError(
            "the process that holds data and model must answer, and it ended twice "
            f"({name}). Look for a lack of memory in the kernel's log."
        )

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_answer, args=(theirs, self._experiment), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def is_evaluated(experiment: Experiment) -> bool:
    """Returns whether a server has anything to evaluate models on."""
    return experiment.task.data != "devices" or experiment.server.test is not None


def evaluated_on(experiment: Experiment) -> str:
    """Returns the data that a server evaluates models on, in words."""
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


def evaluator_of(experiment: Experiment) -> RunEvaluator | EvaluatorProcess:
    """Returns a child process, unless PyTorch is loaded in this one."""
    return (RunEvaluator if "torch" in sys.modules else EvaluatorProcess)(experiment)


def _answer(questions: Connection, experiment: Experiment) -> None:
    """Answer until a minute passes without a question, or the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    evaluator = RunEvaluator(experiment)
    while questions.poll(IDLE_SECONDS):
        try:
            name, argument = questions.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(evaluator, name)(argument)
        except Exception as error:
            answer = False, error
        questions.send(answer)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(0)
