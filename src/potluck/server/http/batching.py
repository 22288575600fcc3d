"""Batches of requests: those that arrive while a batch is processed make up the next one.

A thread and a transaction cost more than most requests, so a larger batch costs less per request.
A lone request starts at once, or after 2 ms, so that requests sent at the same moment can join it.
Where hundreds arrive each second the wait is 12 ms, which takes load off a full processor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

T = TypeVar("T")
R = TypeVar("R")

GATHER_SECONDS = 0.002
"""The wait of a batch for more requests: a round's devices are answered together."""
BUSY_GATHER_SECONDS = 0.012
"""The wait while more than `BUSY_RATE` requests come in a second."""
BUSY_RATE = 600.0
_RATE_SECONDS = 1.0
_MOST = 500
"""The most items in a batch."""
_MANY = 16
"""The number of items with which a batch starts at once."""


class Batches(Generic[T, R]):
    """Hands items to a function in a thread, one batch after another. Belongs to one event loop."""

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R | Exception]],
        gather_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`work` gives a result, or what to raise, for each item, in their order; `clock` in
        seconds."""
        self._work, self._clock = work, clock
        self._gather_seconds = gather_seconds
        self._pending: list[tuple[T, asyncio.Future[R]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._since, self._count, self._rate = clock(), 0, 0.0  # of this second; a second's items

    async def do(self, item: T) -> R:
        """Returns the result for an item.

        Raises:
            Exception: what the function gave or raised.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._pending:
                if self._gather_seconds and len(self._pending) < _MANY:
                    pause = BUSY_GATHER_SECONDS if self._is_busy() else self._gather_seconds
                    await asyncio.sleep(pause)
                batch, self._pending = self._pending[:_MOST], self._pending[_MOST:]
                self._note(len(batch))
                await self._do(batch)
        finally:
            self._worker = None

    def _is_busy(self) -> bool:
        return self._rate > BUSY_RATE

    def _note(self, count: int) -> None:
        self._count += count
        now = self._clock()
        if now - self._since >= _RATE_SECONDS:
            self._rate = self._count / (now - self._since)
            self._since, self._count = now, 0

    async def _do(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await run_in_threadpool(self._work, [item for item, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():  # its request is gone
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
