"""The record of everything that a device ever sent, for its owner to read, and a limit on it.

A file for each day (UTC), one JSON object a line, written before the bytes leave:

    {"time_ms": …, "method": "POST", "path": "/v1/report", "bytes": 431, "sha256": "…",
     "message": {…}}

A message stands there whole, but for its token. An update, also one inside a report, stands there
as its length and digest. Where the owner asks for it, `updates/<SHA-256>` is that update. Each
manifest that the device works for has a line too, with the signed bytes and their signature. Files
are appended to and never changed; old ones may be deleted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from potluck.core import PotluckError
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.core.plain_json import to_json
from potluck.core.validate import as_count
from potluck.device.policy import Policy

DAY_MS = 86_400_000
_HIDDEN = ("token", "update")


class DailyLimitError(PotluckError):
    """The device may do no more for some seconds.

    That is until tomorrow, if it has done enough today, or until its hours begin.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Record:
    """The record of what was sent, in a folder.

    Args:
        limit_bytes: the most that bodies of one day may sum up to; None: that of the policy.
        policy: what else is limited in a day, and whether updates are kept.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, policy: Policy | None = None
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._policy = folder, policy or Policy()
        self._limit = self._policy.max_sent_bytes_a_day
        if limit_bytes is not None:
            self._limit = as_count("limit_bytes", limit_bytes, 0)
        self._day = ""
        self._sent = 0
        self._assignments: set[str] = set()

    def add(self, now_ms: int, method: str, path: str, body: bytes, *, is_message: bool) -> None:
        """Notes a request that is about to be sent.

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
        self._append(line)
        self._sent += len(body)

    def _append(self, line: dict[str, Any]) -> None:
        text = to_json(line, ensure_ascii=False) + "\n"
        file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    def add_manifest(
        self, now_ms: int, manifest: str, signature: str, assignment: str | None = None
    ) -> None:
        """Notes the manifest that the device is about to work for: signed bytes and signature."""
        self.sent(now_ms)
        line = {"time_ms": now_ms, "bytes": 0, "manifest": manifest, "signature": signature}
        if assignment is not None:
            self._assignments.add(assignment)
            line["assignment"] = assignment
        self._append(line)

    def keep_update(self, sha256: str, body: bytes) -> None:
        """Keeps an update that is about to be sent, if the owner asks for that."""
        if self._policy.keep_updates:
            folder = self._folder / "updates"
            folder.mkdir(mode=0o700, exist_ok=True)
            write_whole(folder / sha256, body, PRIVATE)

    def check_rounds(self, now_ms: int) -> None:
        """Refuses one more assignment beyond today's limit.

        Raises:
            DailyLimitError: it may not.
        """
        self.sent(now_ms)
        limit = self._policy.max_rounds_a_day
        if limit is not None and len(self._assignments) >= limit:
            raise DailyLimitError(
                f"at most max_rounds_a_day = {limit} assignments may be taken in a day, got "
                "as many. Wait for tomorrow, or raise it.",
                seconds_to_tomorrow(now_ms),
            )

    def check(self, now_ms: int, num_bytes: int) -> None:
        """Refuses so many bytes beyond today's limit.

        Raises:
            DailyLimitError: they may not.
        """
        sent = self.sent(now_ms)
        if self._limit is not None and sent + num_bytes > self._limit:
            raise DailyLimitError(
                f"at most {self._limit} bytes may be sent in a day, got {sent} sent and "
                f"{num_bytes} to send. Wait for tomorrow, or raise the limit.",
                seconds_to_tomorrow(now_ms),
            )

    def sent(self, now_ms: int) -> int:
        """Returns the bytes of all bodies of this day, also of an earlier process."""
        day = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC).date().isoformat()
        if day != self._day:
            self._day, self._sent, self._assignments = day, 0, set()
            if self._path().exists():
                for text in self._path().read_text(encoding="utf-8").split("\n"):
                    line = _line_of(text)
                    self._sent += int(line.get("bytes", 0))
                    self._assignments |= {line["assignment"]} if "assignment" in line else set()
        return self._sent

    def _path(self) -> Path:
        return self._folder / f"{self._day}.jsonl"


def seconds_to_tomorrow(now_ms: int) -> float:
    """Returns the seconds until the limit is counted anew."""
    return (DAY_MS - now_ms % DAY_MS) / 1000


def _line_of(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError:  # empty, or the last line of a machine that lost its power
        return {}
