"""The weighted mean of updates as a stream: one running sum, whatever the cohort.

    sum ← 0, total ← 0
    for each update (Δ, weight) in any order:  sum ← sum + weight · Δ;  total ← total + weight
    mean = sum / total

The sum is kept in 64-bit fixed point (multiples of 2⁻³⁰), and integer addition is associative:
any order, any grouping into partial sums and any number of workers give the same bits, and two
partial sums merge exactly. A mean is off by at most 2⁻³¹ · clients / total, far below float32.

The price is a range: the largest entry of |weight · Δ|, summed over a cohort, must stay below 2³².
A sum that might leave it is refused, never wrapped.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from potluck.core.errors import DivergedError
from potluck.core.update import Vector

_SCALE = float(2**30)
_LIMIT = float(2**62)
_BLOCK = 16_384  # entries that are summed at a time, which stay in a core's caches
# Beside 1.5 · 2⁵² a float64 has no room for fractions, and its bits count in ones.
_EXACT = float(2**51)
_MAGIC = 1.5 * 2**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.int64))
_greatest, _least = np.maximum.reduce, np.minimum.reduce


class FixedPointMean:
    """A running weighted sum of vectors. Holds one sum; `add` keeps no reference."""

    scale = _SCALE
    """One, in the integers of the sum."""

    def __init__(self, dim: int, buffer: NDArray[np.int64] | None = None) -> None:
        """Start at zero. `buffer` [dim], if given, holds the sum (shared memory, say)."""
        self.sum: NDArray[np.int64] = np.empty(dim, np.int64) if buffer is None else buffer
        self._scratch = np.empty(min(dim, _BLOCK), np.float64)
        self.reset()

    @classmethod
    def of(cls, sum: NDArray[np.int64], total: float, bound: float) -> FixedPointMean:
        """The `sum`, `total` and `bound` of another one. The sum is not copied."""
        mean = cls.__new__(cls)
        mean.sum, mean.total, mean.bound = sum, total, bound
        mean._scratch = np.empty(min(len(sum), _BLOCK), np.float64)
        return mean

    def reset(self) -> None:
        """Back to zero, in place."""
        self.sum.fill(0)
        self.total = 0.0
        self.bound = 0.0  # no coordinate of the sum is larger than this

    def add(self, vector: Vector, weight: float) -> None:
        """Add `weight · vector`, with weight > 0.

        Raises:
            DivergedError: values that are not finite, or too large to be summed. The sum is then
                as it was.
        """
        if not (math.isfinite(weight) and weight > 0.0):
            raise ValueError(f"weight must be positive and finite, got weight={weight!r}.")
        # The ufuncs themselves: for small models a method's way to them takes as long.
        entry = float(max(_greatest(vector, initial=0.0), -_least(vector, initial=0.0)))
        largest = entry * (weight * _SCALE)
        if not self.has_room(largest):
            raise DivergedError(
                "an update must be finite and small enough to be summed, "
                f"got a largest entry of {entry:g} with weight={weight:g}. "
                "Lower the client learning rate."
            )
        for start in range(0, len(vector), _BLOCK):
            block = slice(start, start + _BLOCK)
            scratch = self._scratch[: len(vector[block])]
            np.multiply(vector[block], weight * _SCALE, out=scratch, dtype=np.float64)
            if largest < _EXACT:
                scratch += _MAGIC  # rounds to integers, which are then in the low bits
                whole = scratch.view(np.int64)
                whole -= _MAGIC_BITS
                self.sum[block] += whole
            else:
                np.rint(scratch, out=scratch)
                np.add(self.sum[block], scratch, out=self.sum[block], casting="unsafe")
        self.bound += largest
        self.total += weight

    def has_room(self, largest: float) -> bool:
        """Whether an entry so large, in the integers of the sum, can be added; never NaN."""
        return self.bound + largest < _LIMIT

    def merge(self, other: FixedPointMean) -> None:
        """Add another partial sum: exact, in any order."""
        if not self.bound + other.bound < _LIMIT:
            raise DivergedError(
                "updates must be small enough to be summed. Lower the client learning rate."
            )
        self.sum += other.sum
        self.bound += other.bound
        self.total += other.total

    def mean(self) -> Vector:
        """The weighted mean so far, as float32; zeros when nothing was added."""
        if self.total == 0.0:
            return np.zeros(len(self.sum), np.float32)
        return (self.sum / (_SCALE * self.total)).astype(np.float32)
