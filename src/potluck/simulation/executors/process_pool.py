"""A pool of child processes that answer an executor's requests until it is closed.

A pool of the standard library gives each task to any free process. Here every process gets a
request in a round, since each holds a part of the round's sum.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pickle import PicklingError
from typing import Any

import torch

from potluck.core import PotluckError, WorkerError


class ProcessPool:
    """Processes of one thread each, which answer one request at a time.

    Args:
        context: forked processes share what this one holds; elsewhere than on Linux, and with
            CUDA, a fork is not safe.
        bodies: for each process, its name in messages, and what makes the object whose methods are
            called. It is made in the process, at the first request.

    Raises:
        WorkerError: a body cannot be sent to a spawned process.
    """

    def __init__(
        self,
        context: ForkContext | SpawnContext,
        bodies: Sequence[tuple[str, Callable[[], object]]],
    ) -> None:
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for name, make in bodies:
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            inherited = [] if isinstance(context, SpawnContext) else self._pipes
            arguments = (name, make, theirs, inherited)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            try:
                with warnings.catch_warnings():
                    # Python ≥ 3.12 warns of a fork beside threads; these use none of theirs.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
            except (AttributeError, PicklingError) as error:
                self.close()
                raise WorkerError(
                    "for processes that are not forked, the task must be made of named functions "
                    f"and classes of a module, got {error}. Move them into one, or use "
                    "executor='loop'."
                ) from None
            self.processes.append(process)
            theirs.close()

    def ask(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Calls a method in each of the first processes, as many as there are arguments.

        Raises:
            WorkerError: a process exited, and the pool is closed; or it was closed before.
            PotluckError: that a process raised. Another exception becomes a `WorkerError`.
        """
        if not self._pipes:
            raise WorkerError("the workers were closed. Make a new executor.")
        asked = self._pipes[: len(arguments)]
        replies: dict[Any, Any] = {}  # by pipe
        try:
            for pipe, argument in zip(asked, arguments, strict=True):
                pipe.send((method, argument))
            while len(replies) < len(asked):
                for pipe in wait([pipe for pipe in asked if pipe not in replies]):
                    assert isinstance(pipe, Connection)
                    replies[pipe] = pipe.recv()
        except (AttributeError, PicklingError) as error:  # no process has a request yet
            raise WorkerError(
                "an algorithm must be made of named functions and classes of a module to reach the "
                f"workers, got {error}. Take a schedule of potluck.schedules, or executor='loop'."
            ) from None
        except (EOFError, OSError):
            processes = self.processes
            self.close()
            codes = [process.exitcode for process in processes]
            raise WorkerError(
                f"worker processes must live as long as the run, got exit codes {codes} "
                "(-9: killed, often for want of memory). Use fewer workers, or executor='loop'."
            ) from None
        for reply in replies.values():
            if isinstance(reply, PotluckError):
                raise reply
        return [replies[pipe] for pipe in asked]

    def close(self) -> None:
        """Ends the processes. May be called twice."""
        for pipe in self._pipes:
            pipe.close()  # a process that reads the end of its pipe ends
        for process in self.processes:
            process.join(timeout=1.0)
            process.kill()
            process.join()
        self.processes, self._pipes = [], []


def has_parent() -> bool:
    """True if the process that started this one still runs."""
    parent = mp.parent_process()
    return parent is not None and parent.pid == os.getppid()


def _serve(
    name: str, make: Callable[[], object], pipe: Connection, inherited: list[Connection]
) -> None:
    """Answers requests until the pipe is closed."""
    for connection in inherited:
        connection.close()  # or this process would not notice that the parent ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)
    body: object = None
    while True:
        try:
            method, argument = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            body = body or make()
            reply = getattr(body, method)(argument)
        except PotluckError as error:
            reply = error
        except Exception as error:
            reply = WorkerError(f"{name} failed: {type(error).__name__}: {error}")
        try:
            pipe.send(reply)
        except OSError:
            return
