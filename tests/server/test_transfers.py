"""Which large bodies may go on: those that move, and slow ones while nobody waits."""

from __future__ import annotations

import asyncio

import pytest

from potluck.core import ProtocolError
from potluck.server.http.admission import Limiter
from potluck.server.http.transfers import FAIR_RATE, LEAST_RATE, Transfers


def scene(act):
    """Two places, of which a and b hold one each, and c waits for one."""

    async def play():
        room, told = Transfers(Limiter(2, waiting=10, seconds=60.0)), []
        held = {}

        async def hold(name):
            try:
                async with room.of(name, 1) as held[name], held[name].moving():
                    await asyncio.Event().wait()
            except ProtocolError as error:
                told.append(f"{name} {error.code}")
                held.pop(name)

        tasks = [asyncio.create_task(hold(name)) for name in "abc"]

        async def turns():
            for _ in range(10):
                await asyncio.sleep(0)

        await turns()
        assert set(held) == {"a", "b"}
        await act(room, held, told, turns)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


def test_the_slowest_goes_first_while_others_wait():
    async def act(room, held, told, turns):
        held["a"].rate, held["b"].rate = FAIR_RATE * 0.9, FAIR_RATE * 0.8
        room._check()
        await turns()
        assert told == ["b overloaded"]
        assert set(held) == {"a", "c"}
        room._check()  # nobody waits now
        await turns()
        assert set(held) == {"a", "c"}

    scene(act)


def test_whoever_moves_at_the_fair_rate_stays():
    async def act(room, held, told, turns):
        held["a"].rate = held["b"].rate = FAIR_RATE * 1.1
        room._check()
        await turns()
        assert told == []

    scene(act)


def test_all_move_at_the_least_rate():
    async def act(room, held, told, turns):
        for each in held.values():
            each.rate = LEAST_RATE * 0.9
        room._check()
        await turns()
        assert told == ["a overloaded", "b overloaded"]
        assert set(held) == {"c"}

    scene(act)


def test_the_rate_is_that_of_the_last_seconds():
    async def act():
        room = Transfers(Limiter(2, waiting=10, seconds=60.0))
        async with room.of("a", 1) as transfer:
            for _ in range(60):
                transfer._updated -= 1.0
                transfer.num_bytes += 12_000
                transfer.update()
            assert transfer.rate == pytest.approx(12_000, rel=0.05)
            transfer._updated -= 1.0
            transfer.num_bytes += 10**9
            transfer.update()
            assert transfer.rate == 2 * FAIR_RATE  # nobody saves up
            stalled = 0
            while transfer.rate >= LEAST_RATE:
                transfer._updated -= 1.0
                transfer.update()
                stalled += 1
            assert 15 <= stalled <= 30

    asyncio.run(act())
