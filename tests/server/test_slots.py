"""The line of those who wait: in turn, not for ever, and nobody's slot is lost."""

import asyncio

import pytest

from potluck.core import ProtocolError
from potluck.server.http.admission import Limiter


async def turns(count=3):
    """Let every task go on as far as it can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def hold(slots, told, name, until):
    try:
        async with slots:
            told.append(name)
            await until.wait()
    except ProtocolError as error:
        told.append(f"{name} {error.code}")


def test_who_came_first_is_served_first():
    async def scene():
        slots, told, over = Limiter(2, waiting=10, seconds=60.0), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(slots, told, name, over)) for name in "abcdef"]
        await turns()
        assert told == ["a", "b"]
        assert slots.waiting == 4
        over.set()
        await asyncio.gather(*tasks)
        assert told == list("abcdef")
        assert slots.waiting == 0

    asyncio.run(scene())


def test_the_rest_is_refused_and_nobody_waits_for_ever():
    async def scene():
        slots, told, over = Limiter(1, waiting=2, seconds=0.05), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(slots, told, name, over)) for name in "abcd"]
        await turns()
        assert told == ["a", "d overloaded"]
        await asyncio.gather(*tasks[1:])
        assert told == ["a", "d overloaded", "b overloaded", "c overloaded"]
        over.set()
        await tasks[0]
        await hold(slots, told, "e", over)
        assert told[-1] == "e"

    asyncio.run(scene())


def test_who_comes_later_may_wait_as_long():
    async def scene():
        slots, told, over = Limiter(1, waiting=9, seconds=0.2), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(slots, told, name, over)) for name in "ab"]
        await asyncio.sleep(0.12)
        tasks.append(asyncio.create_task(hold(slots, told, "c", over)))
        await tasks[1]
        assert told == ["a", "b overloaded"]
        over.set()
        await asyncio.gather(*tasks)
        assert told[-1] == "c"

    asyncio.run(scene())


@pytest.mark.parametrize("after_its_turn", [False, True])
def test_who_hangs_up_while_waiting_takes_no_slot(after_its_turn):
    async def scene():
        slots, told, over = Limiter(1, waiting=9, seconds=60.0), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(slots, told, name, over)) for name in "abc"]
        await turns()
        if after_its_turn:
            over.set()
            tasks[0].cancel()
            await asyncio.sleep(0)  # a leaves, and b has its turn, which it has not seen
        tasks[1].cancel()
        over.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert told == ["a", "c"]
        assert slots.waiting == 0
        await hold(slots, told, "d", over)
        assert told[-1] == "d"

    asyncio.run(scene())


@pytest.mark.parametrize("leaves_as_well", [False, True])
def test_who_hangs_up_when_its_time_is_over_takes_no_slot(leaves_as_well):
    """In one turn of the loop b's time is over, it hangs up, and perhaps a slot is free for it."""

    async def scene():
        slots, told, over = Limiter(1, waiting=9, seconds=0.05), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(slots, told, "a", over))]
        await turns()
        until = asyncio.get_running_loop().time() + 0.05
        tasks.append(asyncio.create_task(hold(slots, told, "b", over)))
        await turns()
        while asyncio.get_running_loop().time() < until + 0.05:
            pass  # its time is over before it can be told
        if leaves_as_well:
            tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        tasks.append(asyncio.create_task(hold(slots, told, "c", over)))
        await turns()
        if leaves_as_well:
            assert told == ["a", "c"]
        await hold(slots, told, "d", over)
        assert told[-1] == "d overloaded"  # one slot, as there was
        over.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert slots.waiting == 0

    asyncio.run(scene())
