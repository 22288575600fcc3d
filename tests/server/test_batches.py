"""Many requests at once: each one its own result, and larger batches when many come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from potluck.server.http import batching
from potluck.server.http.batching import GATHER_SECONDS, Batches


def test_each_item_has_its_own_result_or_its_own_error() -> None:
    def work(items: Sequence[int]) -> list[int | Exception]:
        return [2 * item if item != 3 else KeyError(item) for item in items]

    async def ask() -> list[int | BaseException]:
        made = Batches(work, GATHER_SECONDS)
        return await asyncio.gather(*(made.do(i) for i in range(20)), return_exceptions=True)

    got = asyncio.run(ask())
    assert [*got[:3], *got[4:]] == [2 * i for i in range(20) if i != 3]
    assert isinstance(got[3], KeyError)


def test_a_batch_that_fails_fails_for_all_of_it_and_not_for_the_next() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if 0 in items:
            raise OSError("the disk is full")
        return list(items)

    async def ask() -> None:
        made = Batches(work)
        got = await asyncio.gather(*map(made.do, range(3)), return_exceptions=True)
        assert all(isinstance(one, OSError) for one in got)
        assert await made.do(7) == 7

    asyncio.run(ask())


@pytest.mark.parametrize("rate", [0.0, 200.0, 700.0, 3000.0])
def test_the_rate_is_that_of_the_last_second(rate: float) -> None:
    now = 100.0
    made: Batches[int, int] = Batches(list, GATHER_SECONDS, clock=lambda: now)
    for _ in range(300):
        now += 0.01
        made._note(round(rate / 100))
    assert made._is_busy() == (rate > batching.BUSY_RATE)
    now += 60  # nobody comes
    made._note(1)
    assert not made._is_busy()


def test_where_many_come_batches_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    async def count(busy: bool) -> int:
        sizes: list[int] = []
        monkeypatch.setattr(batching, "BUSY_RATE", -1.0 if busy else float("inf"))
        monkeypatch.setattr(batching, "BUSY_GATHER_SECONDS", 0.05)
        made = Batches(lambda items: sizes.append(len(items)) or items, GATHER_SECONDS)
        asked: list[asyncio.Task[int]] = []
        for i in range(150):
            asked.append(asyncio.create_task(made.do(i)))
            await asyncio.sleep(0.002)
        assert await asyncio.gather(*asked) == list(range(150))
        assert sum(sizes) == 150
        return len(sizes)

    assert 2 * asyncio.run(count(busy=True)) < asyncio.run(count(busy=False))
