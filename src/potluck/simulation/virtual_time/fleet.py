"""The devices of a simulation: their speeds, bandwidths and free windows.

A device is free for training in windows that repeat every day (or every few days, in a trace). A
phone is free when it is charged, idle and on a network that costs nothing. A device whose window
ends before its work does is lost to the round. So is one that drops out for another reason. It does
so with a probability of its own, at a moment drawn uniformly from the time that its work would have
taken.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

DAY_SECONDS = 86_400.0
_SLACK = 1e-6  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A device for every client: client k runs on device k.

    Windows are in seconds from virtual time 0: window j of device k is open from `starts[k, j]`
    on, for `lengths[k, j]`, and again after every `period_seconds`. Windows may overlap; one of
    length 0 never opens, and one as long as the period is always open.
    """

    examples_per_second: NDArray[np.float64]  # [population], of local training
    uplink_bytes_per_second: NDArray[np.float64]  # [population]
    downlink_bytes_per_second: NDArray[np.float64]  # [population]
    dropout: NDArray[np.float64]  # [population], probability per assignment
    check_in_seconds: NDArray[np.float64]  # [population], how often a free one looks for work
    starts: NDArray[np.float64]  # [population, windows]
    lengths: NDArray[np.float64]  # [population, windows]
    period_seconds: float = DAY_SECONDS

    def __len__(self) -> int:
        return len(self.dropout)

    def digest(self) -> str:
        """SHA-256 over all of it."""
        sha = hashlib.sha256()
        for field in fields(self):
            value = np.ascontiguousarray(getattr(self, field.name), np.float64)
            sha.update(f"{field.name} {value.shape} ".encode())
            sha.update(value.tobytes())
        return sha.hexdigest()

    def first_free(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the first time at which each device is free, from its own of these times on.

        Args:
            times: [population], seconds; infinite ones stay so.

        Returns:
            [population]; infinite for a device that is never free.
        """
        known = np.where(np.isfinite(times), times, 0.0)
        into = np.mod(known[:, None] - self.starts, self.period_seconds)  # since a window opened
        wait = np.where(into < self.lengths, 0.0, self.period_seconds - into)
        wait = np.where(self.lengths > 0.0, wait, np.inf)
        return times + wait.min(axis=1, initial=np.inf)

    def free_until(self, device: int, time: float) -> float:
        """Returns the time at which a device that is free now stops to be; infinite if it never
        does."""
        end = time
        while end < time + self.period_seconds:
            # A window that opens at this very moment counts, however the difference is rounded.
            into = np.mod(end + _SLACK - self.starts[device], self.period_seconds)
            left = float(np.max(self.lengths[device] - into, initial=0.0))
            if left <= 0.0:
                return end
            end += left + _SLACK
        return math.inf
