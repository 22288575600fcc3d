"""One process of devices: `python load.py` reads a job as JSON, and writes what it saw as JSON.

    enrol     use a token each
    rounds    take part in rounds, as fast as the server lets them
    poll      check in at fixed times, whether or not the server keeps up
    flood     check in again as soon as answered; after a refusal, when told
    come_back be cut off by a killed server, and return as the protocol says
    slow      open sockets and send nothing, or nearly nothing
    cut       upload while connections break at random offsets

Times are Unix times, so that what several processes saw can be put together.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from wire import MOVED, Body, LoadDevice, Place, expect, trusting

KEY_BYTES = 32


def devices_of(job: dict[str, Any]) -> list[LoadDevice]:
    """The devices of a job: those of the keys from `first` on."""
    run_key, context = bytes.fromhex(job["run_key"]), trusting(job["certificate"])
    place = Place(job["host"], job["port"], job["run"], run_key, context)
    keys = Path(job["keys"]).read_bytes()
    numbers = range(job["first"], job["first"] + job["count"])
    return [LoadDevice(place, keys[KEY_BYTES * i : KEY_BYTES * (i + 1)]) for i in numbers]


async def enrol(job: dict[str, Any]) -> dict[str, Any]:
    """Use the tokens of a file, one each."""
    tokens = Path(job["tokens"]).read_text().split()[job["first"] :]
    width = asyncio.Semaphore(8)

    async def one(device: LoadDevice, token: str) -> None:
        async with width:
            expect(await device.enrol(token), 200)
            device.close()

    await asyncio.gather(*map(one, devices_of(job), tokens))
    return {"enrolled": [job["count"]]}


async def rounds(job: dict[str, Any]) -> dict[str, Any]:
    """Take part until the run is finished; `seconds` of each report, from check-in to accepted."""
    body = Body.of(Path(job["update"]).read_bytes())
    seconds: list[float] = []
    vectors = [0]

    async def live(device: LoadDevice) -> None:
        while True:
            given = await device.check_in()
            if given["type"] == "finished":
                return device.close()
            if given["type"] == "wait":
                await asyncio.sleep(min(given["retry_after_seconds"], job["longest_wait"]))
                continue
            start = time.perf_counter()
            await device.take_part(given, body)
            seconds.append(time.perf_counter() - start)
            vectors[0] += 2 * len(body.data)

    devices = devices_of(job)
    await asyncio.gather(*map(live, devices))
    return {"seconds": seconds, "vector_bytes": vectors, "bytes": MOVED}


async def poll(job: dict[str, Any]) -> dict[str, Any]:
    """Check in once within `ramp` seconds, which opens the connection, and then `rounds` times,
    each device once a `period`. Late answers count from when they were due, so a server that falls
    behind cannot hide it."""
    devices, period = devices_of(job), job["period"]
    path = "/v1/check-in"
    times = range(job["rounds"] + 1)
    heads = [[d.head("POST", path, d.check_in_body) for _ in times] for d in devices]
    gc.freeze()
    first = job["first"]
    seconds: list[float] = []
    bad: list[str] = []
    done: list[float] = []

    async def live(number: int, device: LoadDevice) -> None:
        part = (first + number) / job["population"]
        for i in times:
            after = part * job["ramp"] if i == 0 else job["ramp"] + (i - 1 + part) * period
            due = job["start"] + after
            await asyncio.sleep(due - time.time())
            try:
                answer = await device.send(heads[number][i], device.check_in_body)
            except OSError as error:
                bad.append(str(error))
                continue
            if answer.status != 200:
                bad.append(str(answer.content["code"]))
            elif i > 0:
                seconds.append(time.time() - due)
                done.append(time.time())
        device.close()

    await asyncio.gather(*(live(i, d) for i, d in enumerate(devices)))
    return {"seconds": seconds, "bad": bad, "done": done}


async def flood(job: dict[str, Any]) -> dict[str, Any]:
    """Check in, again and again, between `start` and `end`; who is refused waits as told."""
    devices = devices_of(job)
    good: list[float] = []
    bad: list[str] = []
    unexplained = [0]

    async def live(device: LoadDevice) -> None:
        await asyncio.sleep(job["start"] - time.time() + random.random())
        while time.time() < job["end"]:
            head = device.head("POST", "/v1/check-in", device.check_in_body)
            try:
                answer = await device.send(head, device.check_in_body)
            except OSError as error:
                bad.append(type(error).__name__)
                device.close()
                await asyncio.sleep(random.uniform(0, 2))
                continue
            if answer.status == 200:
                good.append(time.time())
                await asyncio.sleep(job["pause"])
                continue
            bad.append(str(answer.status))
            unexplained[0] += answer.retry_after is None
            # As a device does: at least what it was told, and longer after each try.
            await asyncio.sleep(max(answer.retry_after or 0.0, random.uniform(0, 2)))
        device.close()

    await asyncio.gather(*map(live, devices))
    return {"good": good, "bad": bad, "unexplained": unexplained}


async def come_back(job: dict[str, Any]) -> dict[str, Any]:
    """Wait in a long poll; when it breaks, go on as the protocol says, and note each arrival, and
    when each device came that was answered then."""
    arrived: list[float] = []
    returned: list[float] = []
    until = job["until"]

    async def live(number: int, device: LoadDevice) -> None:
        await asyncio.sleep(job["ramp"] * number / job["count"])
        tries, was_cut = 0, False
        while time.time() < until:
            try:
                await device.connect()
                came = time.time()
                arrived.append(came)
                head = device.head("POST", "/v1/check-in", device.check_in_body)
                answer = await asyncio.wait_for(device.send(head, device.check_in_body), 60)
            except OSError:
                device.close()
                tries, was_cut = tries + 1, True
                await asyncio.sleep(random.uniform(0, min(300.0, 2.0**tries)))
                continue
            if answer.status == 200:
                if was_cut:
                    returned.append(came)
                    break
                await asyncio.sleep(answer.content["retry_after_seconds"])
                continue
            tries += 1
            spread = random.uniform(0, min(300.0, 2.0**tries))
            await asyncio.sleep(max(answer.retry_after or 0.0, spread))
        device.close()

    await asyncio.gather(*(live(i, d) for i, d in enumerate(devices_of(job))))
    return {"arrived": arrived, "returned": returned}


async def slow(job: dict[str, Any]) -> dict[str, Any]:
    """Hold sockets until `end`: a third without TLS, a third silent after it, a third dripping."""
    place = devices_of(job)[0].place
    opened, closed = [0], [0]

    async def hold(number: int) -> None:
        context = None if number % 3 == 0 else place.context
        while time.time() < job["end"]:
            try:
                reader, writer = await asyncio.open_connection(place.host, place.port, ssl=context)
            except OSError:
                await asyncio.sleep(1.0)
                continue
            opened[0] += 1
            with contextlib.suppress(OSError):
                if number % 3 == 2:
                    writer.write(b"POST /v1/check-in HTTP/1.1\r\n")
                while time.time() < job["end"]:
                    if number % 3 == 2:
                        writer.write(b"X")
                        await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(reader.read(1024), 1.0):
                            break
            closed[0] += 1
            writer.transport.abort()

    await asyncio.gather(*(hold(i) for i in range(job["sockets"])))
    return {"opened": opened, "closed": closed}


async def cut(job: dict[str, Any]) -> dict[str, Any]:
    """One upload whose connection is broken `cuts` times at random offsets; the bytes it took."""
    device = devices_of(job)[0]
    body = Body.of(Path(job["update"]).read_bytes())
    given = await device.check_in()
    while given["type"] != "assignment":
        await asyncio.sleep(0.2)
        given = await device.check_in()
    await device.download(given)
    dice = random.Random(job["seed"])
    size = len(body.data)
    cuts = sorted(dice.randrange(1, size) for _ in range(job["cuts"]))
    sent = 0
    again: list[int] = []  # bytes that were sent before a cut, and are sent once more
    highest = 0
    stood = await device.report(given, body)
    while stood["type"] == "upload":
        start = stood["offset"]
        if start < highest:
            again.append(highest - start)
        chunk = memoryview(body.data)[start : start + stood["chunk_bytes"]]
        path = f"/v1/uploads/{stood['upload']}?offset={start}"
        head = device.head("PUT", path, bytes(chunk))
        if cuts and start <= cuts[0] < start + len(chunk):
            part = chunk[: cuts.pop(0) - start]
            wire = await device.connect()
            wire.begin().cancel()  # no answer is waited for
            await wire.write(memoryview(head))
            await wire.write(part)
            await asyncio.sleep(0.2)  # what was written is on its way
            sent += len(part)
            highest = start + len(part)
            device.close()
            stood = await device.report(given, body)
            continue
        sent += len(chunk)
        highest = max(highest, start + len(chunk))
        stood = expect(await device.call("PUT", path, bytes(chunk)), 200)
    device.close()
    return {"sent": [sent], "size": [size], "again": again, "type": [stood["type"]]}


MODES: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
    made.__name__: made for made in (enrol, rounds, poll, flood, come_back, slow, cut)
}


def main() -> None:
    job = json.load(sys.stdin)
    random.seed(job["first"] + 1)
    result = asyncio.run(MODES[job["mode"]](job))
    json.dump(result, sys.stdout, allow_nan=False)


if __name__ == "__main__":
    main()
