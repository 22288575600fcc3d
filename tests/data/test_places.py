"""Places for uploads: a few devices send, the others wait for their turn, and nobody for ever."""

import asyncio

import pytest

from potluck.core import ProtocolError
from potluck.server.http import upload_places
from potluck.server.http.upload_places import Places


def test_who_comes_when_all_places_are_taken_gets_the_next_one_in_its_turn():
    async def scene() -> list[str]:
        held, came = Places(2), []

        async def upload(device: str) -> None:
            await held.enter(device)
            came.append(device)

        tasks = [asyncio.create_task(upload(device)) for device in "abcd"]
        await asyncio.sleep(0)
        assert came == ["a", "b"]
        held.leave("b")
        await tasks[2]
        assert came == ["a", "b", "c"]
        held.leave("a")
        await tasks[3]
        return came

    assert asyncio.run(scene()) == ["a", "b", "c", "d"]


def test_a_device_has_one_place_however_often_it_reports():
    async def scene() -> None:
        held = Places(2)
        for _ in range(5):
            await held.enter("a")
        await held.enter("b")

    asyncio.run(scene())


def test_who_waited_long_enough_is_told_to_come_back_and_waits_no_more():
    async def scene() -> None:
        held = Places(1, wait_seconds=0.01)
        await held.enter("a")
        with pytest.raises(ProtocolError) as refused:
            await held.enter("b")
        assert refused.value.code == "overloaded"
        held.leave("a")
        await held.enter("c")  # and not b, which is gone

    asyncio.run(scene())


def test_a_device_that_went_silent_loses_its_place(monkeypatch):
    monkeypatch.setattr(upload_places, "IDLE_SECONDS", 0.0)

    async def scene() -> None:
        held = Places(1)
        await held.enter("a")
        await held.enter("b")

    asyncio.run(scene())


def test_who_hangs_up_while_waiting_keeps_nobody_from_a_place():
    async def scene() -> None:
        held = Places(1)
        await held.enter("a")
        gone = asyncio.create_task(held.enter("b"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        held.leave("a")
        await held.enter("c")

    asyncio.run(scene())
