"""Middleware that counts, times and logs requests, and closes connections of slow readers."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from potluck.server.metrics import Metrics

SEND_SECONDS = 60.0
"""The time for a piece of an answer, before the connection of a slow reader is closed."""

_LOG = logging.getLogger("potluck.server")


def measured(app: ASGIApp, metrics: Metrics) -> ASGIApp:
    """Counts, times and logs requests, and closes connections of readers that are too slow."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started, seen = time.perf_counter(), {"status": 0}
        head: list[Any] = []  # sent with what follows it: a timer for each would cost more

        async def timed(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                head.append(message)
                return
            async with asyncio.timeout(SEND_SECONDS):
                if head:
                    await send(head.pop())
                await send(message)

        try:
            await app(scope, receive, timed)
        except Exception as error:  # it has been answered, or the reader was too slow
            if not seen["status"]:
                raise
            level = logging.INFO if isinstance(error, TimeoutError) else logging.ERROR
            _LOG.log(level, "broken", exc_info=seen["status"] == 500)
        finally:
            status = seen["status"]
            path = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - started
            is_ours = path != "unknown" and status != 405  # an unknown caller may invent methods
            metrics.request(scope["method"] if is_ours else "", path, status, seconds)
            level = logging.DEBUG if status < 400 else logging.INFO
            if _LOG.isEnabledFor(level):
                told = {"method": scope["method"], "path": path, "status": status}
                device = scope.get("device") or scope.get("signer")
                told |= {"device": device, "seconds": round(seconds, 4)}
                _LOG.log(level, "request", extra=told)

    return outer
