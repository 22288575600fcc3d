"""Places for uploads: a few devices send, the others wait for their turn, and nobody for ever."""

import asyncio

import pytest

from potluck.core import ProtocolError
from potluck.server.http.admission import Limiter


def places(capacity: int, seconds: float = 25.0, idle_seconds: float = 10.0) -> Limiter:
    return Limiter(capacity, waiting=100, seconds=seconds, idle_seconds=idle_seconds)


def test_who_comes_when_all_places_are_taken_gets_the_next_one_in_its_turn():
    async def scene() -> list[str]:
        held, came = places(2), []

        async def upload(device: str) -> None:
            await held.lease(device)
            came.append(device)

        tasks = [asyncio.create_task(upload(device)) for device in "abcd"]
        await asyncio.sleep(0)
        assert came == ["a", "b"]
        held.end("b")
        await tasks[2]
        assert came == ["a", "b", "c"]
        held.end("a")
        await tasks[3]
        return came

    assert asyncio.run(scene()) == ["a", "b", "c", "d"]


def test_a_device_has_one_place_however_often_it_reports():
    async def scene() -> None:
        held = places(2)
        for _ in range(5):
            await held.lease("a")
        await held.lease("b")

    asyncio.run(scene())


def test_who_waited_long_enough_is_told_to_come_back_and_waits_no_more():
    async def scene() -> None:
        held = places(1, seconds=0.01)
        await held.lease("a")
        with pytest.raises(ProtocolError) as refused:
            await held.lease("b")
        assert refused.value.code == "overloaded"
        held.end("a")
        await held.lease("c")  # and not b, which is gone

    asyncio.run(scene())


def test_a_device_that_went_silent_loses_its_place_and_one_that_goes_on_keeps_it():
    async def scene() -> None:
        held = places(2, idle_seconds=0.2)
        await held.lease("a")
        await held.lease("b")
        waiting = [asyncio.create_task(held.lease(device)) for device in "cd"]
        while not waiting[0].done():  # until it has the place of b
            held.renew("a")
            await asyncio.sleep(0.02)
        for _ in range(15):
            held.renew("a")
            held.renew("b")  # which has none that it could keep
            held.renew("c")
            await asyncio.sleep(0.02)
        assert not waiting[1].done()
        waiting[1].cancel()

    asyncio.run(scene())


def test_a_device_that_reports_again_while_it_waits_gets_one_place():
    async def scene() -> None:
        held = places(1)
        await held.lease("a")
        twice = [asyncio.create_task(held.lease("b")) for _ in range(2)]
        await asyncio.sleep(0)
        held.end("a")
        await asyncio.wait_for(twice[0], 5.0)
        assert not twice[1].done()  # the place is taken, and it waits for it
        held.end("b")
        await asyncio.wait_for(twice[1], 5.0)
        held.end("b")
        await held.lease("c")

    asyncio.run(scene())


def test_who_hangs_up_while_waiting_keeps_nobody_from_a_place():
    async def scene() -> None:
        held = places(1)
        await held.lease("a")
        gone = asyncio.create_task(held.lease("b"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        held.end("a")
        await held.lease("c")

    asyncio.run(scene())
