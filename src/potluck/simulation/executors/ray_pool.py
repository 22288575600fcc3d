"""Processes of a Ray cluster that do numbered jobs, and are replaced when they are lost.

Jobs are dealt in their order, in chunks that shrink towards the end, to whichever hand is idle.
What its chunks amount to stays with a hand until no jobs are left, and is then handed over in one
piece. If a hand is lost before that, all it had done is dealt again to others, so that every
job counts once. A job that was under way in three hands that were lost is not tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from potluck.core import PotluckError, WorkerError

_ATTEMPTS = 3  # hands that one job may take with it
_STARTS = 3  # hands that may fail to start in a row
_PATIENCE_SECONDS = 120.0  # for a hand to start, when there is no other


class Dealt(NamedTuple):
    """What came of the jobs, in no particular order."""

    results: list[Any]  # of chunks
    handed_over: list[Any]  # one of every hand that did something, or more after a loss
    refused: list[int]  # jobs that took every hand with them


class _Hand:
    """One process, as it is seen from here."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.chunk: list[int] = []  # under way
        self.kept: list[int] = []  # done, and not yet handed over
        self.results: list[Any] = []  # of the chunks it keeps


class _Deal:
    """The jobs of one call, as far as they have come."""

    def __init__(
        self,
        jobs: Sequence[int],
        ask: Callable[[Any, list[int]], Any],
        hand_over: Callable[[Any], Any],
        side_by_side: int,
    ) -> None:
        self.waiting = deque(jobs)
        self.ask, self.hand_over, self.side_by_side = ask, hand_over, side_by_side
        self.busy: dict[Any, _Hand] = {}  # by the reference of their answer
        self.lost_with: Counter[int] = Counter()  # by job, the hands that were lost over it
        self.dealt = Dealt([], [], [])

    def chunk(self, num_hands: int) -> list[int]:
        """The next jobs for one hand; a job that a hand was lost over comes alone."""
        share = -(-len(self.waiting) // num_hands)
        size = max(min(self.side_by_side, share), len(self.waiting) // (4 * num_hands))
        chunk = [self.waiting.popleft()]
        while len(chunk) < size and not self.lost_with[chunk[0]] + self.lost_with[self.waiting[0]]:
            chunk.append(self.waiting.popleft())
        return chunk

    @property
    def under_way(self) -> int:
        """How many jobs are neither waiting nor done."""
        return sum(len(hand.chunk) for hand in self.busy.values())

    def answered(self, hand: _Hand, answer: Any) -> None:
        if hand.chunk:
            hand.results.append(answer)
            hand.kept += hand.chunk
            hand.chunk = []
        else:
            self.dealt.handed_over.append(answer)
            self.dealt.results.extend(hand.results)
            hand.kept, hand.results = [], []

    def lost(self, hand: _Hand) -> None:
        self.lost_with.update(hand.chunk)
        for job in reversed(hand.chunk + hand.kept):
            if self.lost_with[job] < _ATTEMPTS:
                self.waiting.appendleft(job)
            else:
                self.dealt.refused.append(job)


class Hands:
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
        self._idle: list[_Hand] = []
        self._starting: dict[Any, _Hand] = {}
        self._losses = 0
        self._failed_starts = 0  # since the last that did not fail
        for _ in range(count):
            self._add()
        self._await_first()

    @property
    def num_lost(self) -> int:
        """How many were lost so far."""
        return self._losses

    def deal(
        self,
        jobs: Sequence[int],
        ask: Callable[[Any, list[int]], Any],
        hand_over: Callable[[Any], Any],
        *,
        side_by_side: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Dealt:
        """Have every job done, and counted, once.

        Args:
            jobs: in the order in which they are dealt.
            ask: has an actor do a chunk of jobs; gives the reference of the result.
            hand_over: has an actor hand over what its chunks since the last time amount to;
                gives the reference of that.
            side_by_side: jobs that one hand does at a time, so that fewer are dealt to it only
                where there are no more for it.
            progress: is told how many jobs are done and how many there are, whenever it changes;
                after a loss fewer are done than before.

        Raises:
            WorkerError: an actor failed without being lost, or none is left and none starts.
        """
        deal = _Deal(jobs, ask, hand_over, side_by_side)
        told = -1
        while True:
            done = len(jobs) - len(deal.waiting) - deal.under_way
            if progress is not None and done != told:
                progress(told := done, len(jobs))
            self._employ(deal)
            if deal.busy:
                self._hear(deal)
            elif deal.waiting:
                self._await_first()
            else:
                return deal.dealt

    def close(self) -> None:
        """End all of them. May be called twice."""
        for hand in [*self._idle, *self._starting.values()]:
            self._end(hand)
        self._idle, self._starting = [], {}

    def _employ(self, deal: _Deal) -> None:
        """Give every idle hand something to do, if there is anything."""
        still_idle: list[_Hand] = []
        for hand in self._idle:
            if deal.waiting:
                hand.chunk = deal.chunk(len(self._idle) + len(deal.busy))
                deal.busy[deal.ask(hand.actor, hand.chunk)] = hand
            elif hand.kept:
                deal.busy[deal.hand_over(hand.actor)] = hand
            else:
                still_idle.append(hand)
        self._idle = still_idle

    def _hear(self, deal: _Deal) -> None:
        """Wait for one answer, or for a hand that has started."""
        ready = self._ray.wait([*deal.busy, *self._starting], num_returns=1)[0][0]
        if ready in self._starting:
            self._welcome(ready)
            return
        hand = deal.busy.pop(ready)
        try:
            deal.answered(hand, self._ray.get(ready))
            self._idle.append(hand)
        except self._ray.exceptions.RayTaskError as error:
            self._end(hand)
            if isinstance(error.cause, PotluckError):  # in the words of who raised it
                raise error.cause from None
            raise WorkerError(f"a worker failed: {error.cause}") from None
        except self._ray.exceptions.RayError:
            deal.lost(hand)
            self._replace(hand)

    def _await_first(self) -> None:
        """Wait until one of those that are starting has started."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not self._idle:
            left = max(0.0, until - time.monotonic())
            ready, _ = self._ray.wait([*self._starting], num_returns=1, timeout=left)
            if not ready:
                raise WorkerError(
                    f"a worker must start within {_PATIENCE_SECONDS:.0f} s, got none. Look whether "
                    "the cluster has free cores (`ray status`), or use fewer workers."
                )
            self._welcome(ready[0])

    def _welcome(self, ready: Any) -> None:
        hand = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts == _STARTS:
                self._end(hand)
                raise WorkerError(
                    f"workers must start, got {_STARTS} in a row that did not ({_reason(error)}). "
                    "What the task is made of must be importable on every machine of the cluster."
                ) from None
            self._replace(hand)
            return
        self._failed_starts = 0
        self._idle.append(hand)

    def _replace(self, hand: _Hand) -> None:
        self._end(hand)
        self._losses += 1
        self._add()

    def _add(self) -> None:
        hand = _Hand(self._start())
        self._starting[hand.actor.ready.remote()] = hand

    def _end(self, hand: _Hand) -> None:
        with contextlib.suppress(Exception):  # it may be gone, and the cluster too
            self._ray.kill(hand.actor)


def _reason(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
