"""Structured logs: one JSON object a line, on stderr, by the standard library's logging."""

from __future__ import annotations

import logging
import sys
import time

from potluck.core.plain_json import to_json

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """time, level, logger, event, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        told |= {name: v for name, v in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return to_json(told, default=str)


class PlainFormatter(logging.Formatter):
    """level, event and reason in words, for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        reason = getattr(record, "reason", "")
        told = f"{record.levelname.lower()}: {record.getMessage()}"
        return f"{told}: {reason}" if reason else told


class StrangersFilter(logging.Filter):
    """Limits lines that anybody may cause without a device's key to one a second, to spare the
    disk."""

    def __init__(self) -> None:
        super().__init__()
        self._logged, self._left_out = -1.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the line is shown, with the number of lines that were not since the
        last."""
        told = vars(record)
        is_refusal = record.msg == "request" and 400 <= told.get("status", 0) < 500
        is_theirs = is_refusal and told.get("device") is None
        if not is_theirs and (record.name != "uvicorn.error" or record.levelno > logging.WARNING):
            return True
        now = time.monotonic()
        if now - self._logged < 1.0:
            self._left_out += 1
            return False
        if self._left_out:
            record.left_out = self._left_out
        self._logged, self._left_out = now, 0
        return True


def log_to_stderr(level: str, *, plain: bool = False) -> None:
    """Logs everything of this level and above as JSON lines, or in words."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    handler.addFilter(StrangersFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("alembic", "sqlalchemy", "uvicorn", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
