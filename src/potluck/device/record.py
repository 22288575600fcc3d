"""The record of everything that a device ever sent, for its owner to read, and a limit on it.

A file for each day (UTC), one JSON object a line, written before the bytes leave:

    {"time_ms": …, "method": "POST", "path": "/v1/report", "bytes": 431, "sha256": "…",
     "message": {…}}

A message stands there whole, but for its token; an update, also one inside a report, only as its
length and digest. Files are appended to and never changed; old ones may be deleted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from potluck.core import PotluckError
from potluck.core.plain_json import to_json
from potluck.core.validate import as_count

DAY_MS = 86_400_000
_HIDDEN = ("token", "update")


class DailyLimitError(PotluckError):
    """The device has sent as much as it may in a day."""


class Record:
    """What was sent, in a folder.

    Args:
        limit_bytes: the most that bodies of one day may sum up to; None: no limit.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._limit = None if limit_bytes is None else as_count("limit_bytes", limit_bytes, 0)
        self._day = ""
        self._sent = 0

    def add(self, now_ms: int, method: str, path: str, body: bytes, *, is_message: bool) -> None:
        """Note a request that is about to be sent.

        Raises:
            DailyLimitError: it may not be sent today.
        """
        self.check(now_ms, len(body))
        line: dict[str, Any] = {
            "time_ms": now_ms,
            "method": method,
            "path": path,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        if is_message:
            message = json.loads(body)
            line["message"] = message | {key: "…" for key in _HIDDEN if key in message}
        text = to_json(line, ensure_ascii=False) + "\n"
        file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
        self._sent += len(body)

    def check(self, now_ms: int, num_bytes: int) -> None:
        """Whether so many bytes may be sent today.

        Raises:
            DailyLimitError: they may not.
        """
        sent = self.sent(now_ms)
        if self._limit is not None and sent + num_bytes > self._limit:
            raise DailyLimitError(
                f"at most {self._limit} bytes may be sent in a day, got {sent} sent and "
                f"{num_bytes} to send. Wait for tomorrow, or raise --daily-limit."
            )

    def sent(self, now_ms: int) -> int:
        """The bytes of all bodies of this day, also of an earlier process."""
        day = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC).date().isoformat()
        if day != self._day:
            self._day, self._sent = day, 0
            if self._path().exists():
                for line in self._path().read_text(encoding="utf-8").splitlines():
                    self._sent += _bytes_of(line)
        return self._sent

    def _path(self) -> Path:
        return self._folder / f"{self._day}.jsonl"


def seconds_to_tomorrow(now_ms: int) -> float:
    """Until the limit is counted anew."""
    return (DAY_MS - now_ms % DAY_MS) / 1000


def _bytes_of(line: str) -> int:
    try:
        return int(json.loads(line)["bytes"])
    except (ValueError, KeyError, TypeError):  # the last line of a machine that lost its power
        return 0
