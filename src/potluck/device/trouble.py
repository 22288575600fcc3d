"""Errors that a device waits out: shown once for each change, tried again after growing pauses.

A device ends only for errors that need a person's decision:

    its invitation    unknown, used, expired or of another run (`token`)
    an operator       revoked it (`revoked`)
    its data          not there, or they do not fit the run (DataError, TaskError)
    the command       a wrong address, name or proxy, or enrolled elsewhere (ConfigError); so is a
                      plan that this version does not know
    its folder        in use, another user's, or damaged (RunError)

All other errors may pass, and the device goes on afterwards: no network, or a full disk. The
certificate may be another: a captive portal's, or that of a server on another folder. The server
may lack the device (an older backup), refuse its clock or signature, or send a wrong answer.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable

from potluck.core import ProtocolError, RefusedError
from potluck.device.clock import Clock
from potluck.device.sent_log import DailyLimitError

MAX_BACKOFF_SECONDS = 300.0
PASSES = (RefusedError, ProtocolError, DailyLimitError, OSError, MemoryError)
"""The errors that are waited out, but for a refused invitation and a revocation."""

_CHANCE = random.SystemRandom()  # local training seeds the global generator
_LOG = logging.getLogger("potluck.device")


class Backoff:
    """Waits between tries: U(0, min(300, 2ⁿ)) seconds before try n + 1."""

    def __init__(
        self, clock: Clock, uniform: Callable[[float, float], float] = _CHANCE.uniform
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self.tries = 0

    def wait(self, at_least: float = 0.0) -> None:
        """Waits after one more try that failed."""
        self.tries += 1
        longest = min(MAX_BACKOFF_SECONDS, 2.0 ** min(self.tries, 16))
        self._clock.wait(max(self._uniform(0.0, longest), at_least))

    def reset(self) -> None:
        """Begins anew after a success."""
        self.tries = 0


class Trouble:
    """The failures of one kind of work, which may pass."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._told = ""

    def wait(self, error: Exception, at_least: float = 0.0) -> None:
        """Waits before another try."""
        told = str(error) or type(error).__name__
        kind = re.sub(r"\d+", "", told)  # as bytes and seconds change from try to try
        if kind != self._told:
            self._told = kind
            shown = told if told.isprintable() else repr(told)[1:-1]  # it may be anybody's
            _LOG.warning("trying again, after pauses that grow: %s", shown)
        self._backoff.wait(at_least)

    def over(self) -> None:
        """Notes a success: the next failure is shown again."""
        if self._told:
            _LOG.info("it works again")
        self._told = ""
        self._backoff.reset()
