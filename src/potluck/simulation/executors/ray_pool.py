"""A pool of Ray actors that do numbered jobs, and are replaced when they are lost.

Jobs are scheduled in their order, in chunks that shrink towards the end, to any idle actor. An
actor keeps the sum of its chunks until no jobs are left, and then gives it in one piece. If it is
lost before that, all its jobs are scheduled again, so that every job counts once. A job that was
running in three actors that were lost is not tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from potluck.core import PotluckError, WorkerError

_ATTEMPTS = 3  # actors that may be lost over one job
_STARTS = 3  # actors that may fail to start in a row
_START_SECONDS = 120.0  # for an actor to start, when there is no other


class Completed(NamedTuple):
    """The results of the jobs, in no particular order."""

    results: list[Any]  # of chunks
    sums: list[Any]  # one of every actor that did something, or more after a loss
    refused: list[int]  # jobs over which too many actors were lost


class _Member:
    """One actor of the pool and its present jobs."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.chunk: list[int] = []  # running
        self.kept: list[int] = []  # done, and not yet in a sum that it gave
        self.results: list[Any] = []  # of the chunks it keeps


class _Schedule:
    """The jobs of one call: waiting, running and done."""

    def __init__(self, jobs: Sequence[int], side_by_side: int) -> None:
        self.waiting, self.side_by_side = deque(jobs), side_by_side
        self.busy: dict[Any, _Member] = {}  # by the reference of their answer
        self.completed = Completed([], [], [])
        self._lost_over: Counter[int] = Counter()  # by job, the actors that were lost

    def next_chunk(self, num_actors: int) -> list[int]:
        """Returns the next jobs for one actor. A job over which an actor was lost is a chunk of its
        own."""
        share = -(-len(self.waiting) // num_actors)
        size = max(min(self.side_by_side, share), len(self.waiting) // (4 * num_actors))
        chunk = [self.waiting.popleft()]
        lost = self._lost_over
        while len(chunk) < size and not lost[chunk[0]] + lost[self.waiting[0]]:
            chunk.append(self.waiting.popleft())
        return chunk

    def num_open(self) -> int:
        """The number of jobs that are not done."""
        return len(self.waiting) + sum(len(member.chunk) for member in self.busy.values())

    def note_answer(self, member: _Member, answer: Any) -> None:
        if member.chunk:
            member.results.append(answer)
            member.kept += member.chunk
            member.chunk = []
        else:
            self.completed.sums.append(answer)
            self.completed.results.extend(member.results)
            member.kept, member.results = [], []

    def note_loss(self, member: _Member) -> None:
        self._lost_over.update(member.chunk)
        for job in reversed(member.chunk + member.kept):
            if self._lost_over[job] < _ATTEMPTS:
                self.waiting.appendleft(job)
            else:
                self.completed.refused.append(job)


class ActorPool:
    """A number of actors, each of which does one thing at a time.

    Args:
        ray: the module, since the core does without it.
        start: makes an actor; its method `ready` answers when it can work.
        count: how many; lost ones are replaced as soon as the cluster has room.

    Raises:
        WorkerError: not one of them started.
    """

    def __init__(self, ray: ModuleType, start: Callable[[], Any], count: int) -> None:
        self._ray, self._start = ray, start
        self._idle: list[_Member] = []
        self._starting: dict[Any, _Member] = {}
        self.num_lost = 0
        """The number of actors that were lost so far."""
        self._failed_starts = 0  # since the last that did not fail
        for _ in range(count):
            self._add()
        self._await_first()

    def schedule(
        self,
        jobs: Sequence[int],
        ask: Callable[[Any, list[int]], Any],
        ask_sum: Callable[[Any], Any],
        *,
        side_by_side: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completed:
        """Runs every job and counts it once.

        Args:
            jobs: in the order in which they are scheduled.
            ask: runs a chunk of jobs in an actor; gives the reference of the result.
            ask_sum: has an actor give the sum of its chunks since the last time; gives the
                reference of that.
            side_by_side: jobs that one actor does at a time, so that it gets fewer only where there
                are no more for it.
            progress: is called with the number of jobs done and of all jobs, whenever it changes;
                after a loss fewer are done than before.

        Raises:
            WorkerError: an actor failed without being lost, or none is left and none starts.
        """
        schedule = _Schedule(jobs, side_by_side)
        told = -1
        while True:
            done = len(jobs) - schedule.num_open()
            if progress is not None and done != told:
                progress(told := done, len(jobs))
            for member in list(self._idle):
                if schedule.waiting:
                    member.chunk = schedule.next_chunk(len(self._idle) + len(schedule.busy))
                    schedule.busy[ask(member.actor, member.chunk)] = member
                elif member.kept:
                    schedule.busy[ask_sum(member.actor)] = member
                else:
                    continue
                self._idle.remove(member)
            if schedule.busy:
                self._await_answer(schedule)
            elif schedule.waiting:
                self._await_first()
            else:
                return schedule.completed

    def close(self) -> None:
        """Ends all of them. May be called twice."""
        for member in [*self._idle, *self._starting.values()]:
            self._end(member)
        self._idle, self._starting = [], {}

    def _await_answer(self, schedule: _Schedule) -> None:
        """Waits for one answer, or for an actor that has started."""
        ready = self._ray.wait([*schedule.busy, *self._starting], num_returns=1)[0][0]
        if ready in self._starting:
            self._note_start(ready)
            return
        member = schedule.busy.pop(ready)
        try:
            schedule.note_answer(member, self._ray.get(ready))
            self._idle.append(member)
        except self._ray.exceptions.RayTaskError as error:
            self._end(member)
            if isinstance(error.cause, PotluckError):  # as the actor raised it
                raise error.cause from None
            raise WorkerError(f"a worker failed: {error.cause}") from None
        except self._ray.exceptions.RayError:
            schedule.note_loss(member)
            self._replace(member)

    def _await_first(self) -> None:
        """Waits until one of those that are starting has started."""
        until = time.monotonic() + _START_SECONDS
        while not self._idle:
            left = max(0.0, until - time.monotonic())
            ready, _ = self._ray.wait([*self._starting], num_returns=1, timeout=left)
            if not ready:
                raise WorkerError(
                    f"a worker must start within {_START_SECONDS:.0f} s, got none. Look whether "
                    "the cluster has free cores (`ray status`), or use fewer workers."
                )
            self._note_start(ready[0])

    def _note_start(self, ready: Any) -> None:
        member = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts == _STARTS:
                self._end(member)
                raise WorkerError(
                    f"workers must start, got {_STARTS} in a row that did not ({_reason(error)}). "
                    "What the task is made of must be importable on every machine of the cluster."
                ) from None
            self._replace(member)
        else:
            self._failed_starts = 0
            self._idle.append(member)

    def _replace(self, member: _Member) -> None:
        self._end(member)
        self.num_lost += 1
        self._add()

    def _add(self) -> None:
        member = _Member(self._start())
        self._starting[member.actor.ready.remote()] = member

    def _end(self, member: _Member) -> None:
        with contextlib.suppress(Exception):  # it may be gone, and the cluster too
            self._ray.kill(member.actor)


def _reason(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
