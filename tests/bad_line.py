"""A TCP proxy on loopback that makes the way to a server as bad as it is told; TLS passes through.

The line may be slow (bytes a second, each connection), late (seconds before each piece), sliced
(bytes in a piece), reset (the chance of a connection to be cut, at some byte), and half open (the
chance of a connection to fall silent, at some byte, without being closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from typing import NamedTuple

_RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST


class Weather(NamedTuple):
    """How bad the line is."""

    rate: float | None = None  # bytes a second, each way
    latency: tuple[float, float] = (0.0, 0.0)  # seconds, drawn for each piece that was waited for
    slice_bytes: int = 65_536
    resets: float = 0.0
    half_open: float = 0.0
    within_bytes: int = 8_000  # a reset or silence comes before so many bytes have passed


class BadLine:
    """Listens in a thread until the end of the block. `weather` may be changed meanwhile."""

    def __init__(self, port: int, weather: Weather, *, seed: int) -> None:
        self.weather = weather
        self.counts: Counter[str] = Counter()
        self._port, self._dice = port, random.Random(seed)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"https://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))

    def __enter__(self) -> BadLine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._serve(reader, writer)
            writer.transport.abort()

        server = await asyncio.start_server(accepted, sock=self._socket, limit=65_536)
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        weather, lot = self.weather, self._dice.random()
        fate = "reset" if lot < weather.resets else "passed"
        if weather.resets <= lot < weather.resets + weather.half_open:
            fate = "half-open"
        self.counts[fate] += 1
        left = [self._dice.randrange(weather.within_bytes)] if fate != "passed" else None
        there, back = await asyncio.open_connection("127.0.0.1", self._port, limit=65_536)
        ways = [self._pass(reader, back, weather, left), self._pass(there, writer, weather, left)]
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            was_cut = any(task.exception() is None and task.result() for task in done)
            if was_cut and fate == "half-open":
                await self._stop.wait()  # silent, and open on both sides
            elif was_cut:
                for end in (writer, back):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, _RESET
                    )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            back.transport.abort()

    async def _pass(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        weather: Weather,
        left: list[int] | None,
    ) -> bool:
        """Pass bytes on in one direction; whether it was to be cut off."""
        while data := await source.read(weather.slice_bytes):
            if weather.latency[1]:
                await asyncio.sleep(self._dice.uniform(*weather.latency))
            if weather.rate:
                await asyncio.sleep(len(data) / weather.rate)
            if left is not None:
                data, left[0] = data[: left[0]], left[0] - len(data)
            sink.write(data)
            await sink.drain()
            if left is not None and left[0] <= 0:
                return True
        return False
