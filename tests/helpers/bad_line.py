"""A TCP proxy on loopback that makes the way to a server as bad as it is told; TLS passes through.

The line may be slow (bytes a second, each connection), late (seconds before each piece), sliced
(bytes in a piece), reset (the chance of a request to have its connection cut, at some byte of it or
of its answer), and half open (the chance of it to fall silent there, without being closed).
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
    within_bytes: int = 3_000  # before so many bytes of a request and its answer have passed


class _Exchange:
    """What is known of the request that a connection carries."""

    def __init__(self) -> None:
        self.is_answered = True
        self.fate, self.left = "", 0


class BadLine:
    """Listens in a thread until the end of the block."""

    def __init__(self, port: int, weather: Weather, *, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        """What happened, by name, and how many requests there were."""
        self._weather, self._port, self._dice = weather, port, random.Random(seed)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"https://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop, self._cleared = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))

    def __enter__(self) -> BadLine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._loop.close()

    def change(self, weather: Weather) -> None:
        """Another weather from now on, also for what is under way.

        Where it leaves nothing half open, what was is closed.
        """
        self._weather = weather
        if not weather.half_open:
            self._loop.call_soon_threadsafe(self._cleared.set)

    def lead_to(self, port: int) -> None:
        """Lead to another server, from the next connection on."""
        self._port = port

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
        there, back = await asyncio.open_connection("127.0.0.1", self._port, limit=65_536)
        now = _Exchange()
        ways = [self._pass(reader, back, now, up=True), self._pass(there, writer, now, up=False)]
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            fates = {task.result() for task in done if task.exception() is None}
            if "half-open" in fates:
                await self._cleared.wait()  # silent, and open on both sides
            elif "reset" in fates:
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
        now: _Exchange,
        *,
        up: bool,
    ) -> str:
        """Pass bytes on in one direction. Returns what becomes of the connection."""
        while data := await source.read(self._weather.slice_bytes):
            weather = self._weather
            if weather.latency[1]:
                await asyncio.sleep(self._dice.uniform(*weather.latency))
            if weather.rate:
                await asyncio.sleep(len(data) / weather.rate)
            if up and now.is_answered:
                self._draw(now, weather)
            now.is_answered = not up
            if now.fate:
                data, now.left = data[: now.left], now.left - len(data)
            sink.write(data)
            await sink.drain()
            if now.fate and now.left <= 0:
                self.counts[now.fate] += 1
                return now.fate
        return ""

    def _draw(self, now: _Exchange, weather: Weather) -> None:
        """Decide what becomes of a request."""
        self.counts["requests"] += 1
        lot, now.left = self._dice.random(), self._dice.randrange(weather.within_bytes)
        now.fate = "reset" if lot < weather.resets else ""
        if weather.resets <= lot < weather.resets + weather.half_open:
            now.fate = "half-open"
