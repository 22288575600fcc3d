"""A server process: two sockets, one event loop, and the leader's part beside them.

Devices connect by TCP, with TLS; operators by a unix socket that its owner alone may open. The loop
ticks a few times a second, or when a report reaches the goal. It notifies waiting devices when they
may have work. Central evaluation runs beside it, so that no round waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from potluck.core import StorageError, Vector
from potluck.protocol.routes import is_loopback
from potluck.server.admin.admin_app import AdminApp
from potluck.server.console import Lines
from potluck.server.dashboard.dashboard_app import Dashboard
from potluck.server.http.authorities import all_names, host_of
from potluck.server.http.certificate import (
    certificate_fingerprint,
    check_pair,
    ensure_certificate,
)
from potluck.server.http.device_app import DeviceApp
from potluck.server.http.handlers import ServedRun
from potluck.server.http.listening import Listen, Listener, authority, listen_unix, open_listener
from potluck.server.http.notifier import Notifier
from potluck.server.http.server_connection import ServerConnection
from potluck.server.memory import GcScheduler, Trimmer, only_young_collections, share_heaps
from potluck.server.metrics import Metrics
from potluck.server.storage.state_folder import StateFolder

TICK_SECONDS = 0.2
_TRIM_SECONDS = 2.0
SWEEP_SECONDS = 1.0
_CLOSE_SECONDS = 5
TLS_BYTES = 1 << 14
"""What TLS reads of a connection at once. With asyncio's own 256 KiB each of 300 devices that poll,
as in S3, took 309 to 321 KB of memory instead of 63 to 72; in S2 that would be 245 MB more."""
_LOG = logging.getLogger("potluck.server")

Evaluate = Callable[[Vector], Mapping[str, float]]


class Server:
    """One served run. `start` binds; `run` serves until `stop`."""

    def __init__(
        self,
        served: ServedRun,
        home: StateFolder,
        listen: Listen,
        long_poll_seconds: float,
        evaluate: Evaluate | None,
        give_up: Callable[[], None] = lambda: None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Without `evaluate` nothing is evaluated here. `give_up` makes an evaluation under way
        raise at once, in any thread. `show` is called with a line for a person about each round."""
        self.served = served
        self._home = home
        self._evaluate, self._give_up = evaluate, give_up
        self._show_line = show
        self._lines = Lines(served.service, served.id, is_evaluated=evaluate is not None)
        self._notifier = Notifier()
        self._metrics = Metrics()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._accepting: list[asyncio.Task[None]] = []
        self._seen: tuple[Any, ...] = (0,)
        self._opened = ""  # the round whose opening was notified last
        certificate, private_key = _certificate(home, listen)
        self.certificate = None if certificate is None else certificate_fingerprint(certificate)
        pinned = None if listen.certificate is not None else self.certificate
        names = all_names(listen.names, listen.host, listen.certificate)
        self._socket = open_listener(listen)
        self.port: int = self._socket.getsockname()[1]
        self.address = _address(listen, self.port)
        try:
            self._admin_socket = listen_unix(home.socket)
        except BaseException:
            self._socket.close()
            raise
        devices = DeviceApp(
            served, self._notifier, self._metrics, names=names, long_poll_seconds=long_poll_seconds
        )
        self.dashboard = Dashboard(served, self._notifier, self.address)
        credential, invite = home.new_credential(), self.dashboard.invite
        admin = AdminApp(served, self._notifier, self._metrics, credential, pinned, invite)
        self._servers = [
            _uvicorn(devices.asgi(self.dashboard.paths()), certificate, private_key),
            _uvicorn(admin.asgi(), None, None),
        ]

    def serve(self) -> None:
        """Calls `run` in an event loop of its own."""
        share_heaps()
        SSLProtocol.max_size = TLS_BYTES
        sys.setswitchinterval(0.0005)
        with only_young_collections() if _owns_process() else contextlib.nullcontext():
            asyncio.run(self.run())

    async def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT."""
        self._loop = asyncio.get_running_loop()
        self.served.service.on_goal = lambda: self._soon(self._notifier.wake)
        self.served.service.on_open = lambda id: self._soon(lambda: self._notify_of(id))
        self.served.service.on_lost = self._metrics.lost.inc
        with _signals(self._loop, self._stop):
            tasks = [asyncio.create_task(server.serve(sockets=[])) for server in self._servers]
            listeners = (self._socket, self._admin_socket)
            for server, listener in zip(self._servers, listeners, strict=True):
                tasks.append(asyncio.create_task(self._accept(server, listener)))
            tasks += [
                asyncio.create_task(self._lead()),
                asyncio.create_task(self._evaluations()),
            ]
            if self._show_line is not None:
                tasks.append(asyncio.create_task(self._tell(self._show_line)))
            trimming = asyncio.create_task(self._trim())
            try:
                if self._stopping:
                    self._stop()
                await asyncio.gather(*tasks)
            finally:
                self._stop()
                for task in (*tasks, trimming):
                    task.cancel()
                await asyncio.gather(*tasks, trimming, return_exceptions=True)
                with contextlib.suppress(OSError):
                    self._home.socket.unlink()
                await asyncio.to_thread(self.served.service.close)

    def close(self) -> None:
        """Closes the sockets of a server that never ran."""
        self._socket.close()
        self._admin_socket.close()
        self._home.socket.unlink(missing_ok=True)
        self.served.service.close()

    def stop(self) -> None:
        """Makes `run` finish what is under way and return; from any thread."""
        self._stopping = True
        self._soon(self._stop)

    def _soon(self, call: Callable[[], None]) -> None:
        """Calls a function in the loop; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is over already
                self._loop.call_soon_threadsafe(call)

    def _notify_of(self, round: str) -> None:
        self._opened = round
        self._notifier.notify()

    def _stop(self) -> None:
        self._stopping = True
        self._give_up()
        self._notifier.close()
        for server in self._servers:
            server.should_exit = True
        for task in self._accepting:
            task.cancel()

    async def _accept(self, server: uvicorn.Server, listener: Listener) -> None:
        """Accepts connections until the server stops."""
        make = partial(_connection, server, listener)
        task = asyncio.create_task(listener.serve(make, server.config.ssl))
        self._accepting.append(task)
        try:
            if not self._stopping:
                await task
        except asyncio.CancelledError:
            pass
        finally:
            task.cancel()
            listener.close()

    async def _lead(self) -> None:
        """Moves rounds on, at once when there is reason to; polls and cleans up a few times a
        second.

        A round that this process opens notifies by itself; a poll finds what others did.
        """
        poll, sweep = 0.0, 0.0  # when to, again
        while not self._stopping:
            try:
                await asyncio.to_thread(self.served.service.move)
                if time.monotonic() >= poll:
                    poll = time.monotonic() + TICK_SECONDS
                    self._show(await asyncio.to_thread(self.served.service.status, self.served.id))
            except Exception as error:
                self._failed("tick", error)
            if time.monotonic() >= sweep:
                sweep = time.monotonic() + SWEEP_SECONDS
                await self._sweep()
            await self._notifier.wait_for_wake(TICK_SECONDS)

    def _show(self, status: dict[str, Any]) -> None:
        """Logs changes since the last poll, and notifies of those that nothing has notified of."""
        self._metrics.state(status)
        seen, now = self._seen, _phase(status)
        if now[:-1] != seen[:-1]:
            _LOG.info("round", extra=_log_fields(status))
        is_new = now[:-1] != seen[:-1] and (now[2] != self._opened or now[3] != "SELECTING")
        if is_new or now[-1] < seen[-1]:
            self._notifier.notify()
        self._seen = now

    async def _sweep(self) -> None:
        try:
            await asyncio.to_thread(self.served.service.sweep)
        except Exception as error:
            self._failed("sweep", error)

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.errors.inc()
        known = isinstance(error, StorageError)
        _LOG.error(what, exc_info=not known, extra={"reason": str(error)[:500]})

    async def _evaluations(self) -> None:
        while not self._stopping and self._evaluate is not None:
            try:
                if self.served.service.is_leader:
                    await asyncio.to_thread(
                        self.served.service.evaluate, self.served.id, self._evaluate
                    )
            except Exception as error:
                if not self._stopping:  # or it was given up
                    self._failed("evaluation", error)
            await self._notifier.wait(1.0)

    async def _tell(self, show: Callable[[str], None]) -> None:
        """Shows a line for each round, when it was evaluated."""
        while not self._stopping:
            try:
                for line in await asyncio.to_thread(self._lines.poll):
                    show(line)
            except StorageError as error:
                self._failed("lines", error)
            await self._notifier.wait(1.0)

    async def _trim(self) -> None:
        trimmer, scheduler = Trimmer(), GcScheduler()
        while True:
            await asyncio.sleep(_TRIM_SECONDS)
            await asyncio.to_thread(scheduler.poll)
            await asyncio.to_thread(trimmer.poll)


def _phase(status: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the state that waiting devices depend on: round, its state, and (last) a free
    slot."""
    current: dict[str, Any] = status["open"] or {}
    taken = current.get("active", 0) + current.get("reported", 0)
    return status["state"], status["version"], current.get("id"), current.get("state"), taken


def _log_fields(status: dict[str, Any]) -> dict[str, Any]:
    current: dict[str, Any] = status["open"] or {}
    names = ("kind", "number", "attempt", "state")
    told = {f"open_{name}": current.get(name) for name in names} if current else {}
    return told | {name: status[name] for name in ("state", "round", "version", "reason")}


def _certificate(home: StateFolder, listen: Listen) -> tuple[Path | None, Path | None]:
    if listen.plaintext:
        if not is_loopback(listen.host):
            raise ValueError(
                "plain HTTP is for loopback alone, "
                f"got host={listen.host}. Leave out --insecure-loopback."
            )
        return None, None
    if (listen.certificate is None) != (listen.private_key is None):
        raise ValueError("a certificate and its private key go together. Name both, or neither.")
    if listen.certificate is None:
        home.make()
        ensure_certificate(home.certificate, home.private_key)
        return home.certificate, home.private_key
    assert listen.private_key is not None
    certificate_fingerprint(listen.certificate)
    check_pair(listen.certificate, listen.private_key)
    return listen.certificate, listen.private_key


def _address(listen: Listen, port: int) -> str:
    """Returns the address for devices. A named server without TLS is behind a proxy that has it."""
    if not listen.names:
        return f"http{'s' * (not listen.plaintext)}://{authority(listen.host, port)}"
    name = listen.names[0]
    is_whole = listen.plaintext or name != host_of(name)  # with a port
    return f"https://{name if is_whole else authority(name, port)}"


def _connection(server: uvicorn.Server, listener: Listener) -> ServerConnection:
    """Makes the protocol of each of uvicorn's connections, with its listener."""
    state = server.server_state
    return ServerConnection(
        config=server.config, server_state=state, app_state={}, listener=listener
    )


def _uvicorn(app: ASGIApp, certificate: Path | None, key: Path | None) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    config.load()
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    return server


def _owns_process() -> bool:
    """Returns whether this server controls the process: its signals and garbage collection."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Any:
    if not _owns_process():
        yield
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
