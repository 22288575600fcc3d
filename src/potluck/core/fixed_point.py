"""The weighted mean of updates as a stream: one running sum, whatever the cohort.

    sum ← 0, total ← 0
    for each update (Δ, weight) in any order:  sum ← sum + weight · Δ;  total ← total + weight
    mean = sum / total

The sum is kept in 64-bit fixed point (multiples of 2⁻³⁰), and integer addition is associative. So
any order, any grouping into partial sums and any number of workers give the same bits. Two partial
sums merge exactly. A mean is off by at most 2⁻³¹ · clients / total, far below float32.

The range is limited: the largest entry of |weight · Δ|, summed over a cohort, must stay below 2³².
A sum that might leave it is refused, never wrapped.

Statistics of a model (running variances, counters) may be of any size, and small ones must not
lose their sign. They are the last entries of an update, and are wide: each is summed as two
integers, of multiples of 2⁻⁶ and of what those leave, in multiples of 2⁻⁴⁶. That is exact in the
same sense, and their range is 2⁵⁶.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from potluck.core.errors import DivergedError
from potluck.core.update import Vector

RANGE, WIDE_RANGE = float(2**32), float(2**56)
"""The sums of |weight · Δ| over a cohort are below these, of wide entries below the second."""
_SCALE = float(2**30)
_LIMIT = float(2**62)
_COARSE, _FINE = float(2**6), float(2**46)  # the scales of a wide entry's two integers
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

    def __init__(self, dim: int, buffer: NDArray[np.int64] | None = None, wide: int = 0) -> None:
        """Starts at zero.

        Args:
            buffer: if given, holds the sum (shared memory, say): [dim + wide].
            wide: how many of the entries, the last ones, are wide.
        """
        self.sum: NDArray[np.int64] = np.empty(dim + wide, np.int64) if buffer is None else buffer
        self.dim, self.wide = dim, wide
        self._scratch = np.empty(min(dim, _BLOCK), np.float64)
        self.reset()

    @classmethod
    def of(
        cls, sum: NDArray[np.int64], total: float, bound: float, wide: int = 0
    ) -> FixedPointMean:
        """Continues the `sum`, `total` and `bound` of another one. The sum is not copied."""
        mean = cls.__new__(cls)
        mean.sum, mean.total, mean.bound = sum, total, bound
        mean.dim, mean.wide = len(sum) - wide, wide
        mean._scratch = np.empty(min(mean.dim, _BLOCK), np.float64)
        return mean

    def reset(self) -> None:
        """Sets the sum back to zero, in place."""
        self.sum.fill(0)
        self.total = 0.0
        self.bound = 0.0  # no integer of the sum is larger than this

    def add(self, vector: Vector, weight: float) -> None:
        """Adds `weight · vector`, with weight > 0.

        Raises:
            DivergedError: values that are not finite, or too large to be summed. The sum is then
                as it was.
        """
        if not (math.isfinite(weight) and weight > 0.0):
            raise ValueError(f"weight must be positive and finite, got weight={weight!r}.")
        narrow = vector[: self.dim - self.wide] if self.wide else vector
        # The ufuncs themselves: for small models a method's way to them takes as long.
        entry = float(max(_greatest(narrow, initial=0.0), -_least(narrow, initial=0.0)))
        largest = entry * (weight * _SCALE)
        if not self.has_room(largest):
            raise DivergedError(
                "an update must be finite and small enough to be summed, "
                f"got a largest entry of {entry:g} with weight={weight:g}. "
                "Lower the client learning rate."
            )
        if self.wide:
            largest = max(largest, self._add_wide(vector[self.dim - self.wide :], weight))
        for start in range(0, len(narrow), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(narrow)))
            scratch = self._scratch[: len(narrow[block])]
            np.multiply(narrow[block], weight * _SCALE, out=scratch, dtype=np.float64)
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
        """Returns whether an entry so large, in the integers of the sum, can be added; never
        NaN."""
        return self.bound + largest < _LIMIT

    def merge(self, other: FixedPointMean) -> None:
        """Adds another partial sum: exact, in any order."""
        if not self.bound + other.bound < _LIMIT:
            raise DivergedError(
                "updates must be small enough to be summed. Lower the client learning rate."
            )
        self.sum += other.sum
        self.bound += other.bound
        self.total += other.total

    def mean(self) -> Vector:
        """Returns the weighted mean so far, as float32; zeros when nothing was added: [dim]."""
        if self.total == 0.0:
            return np.zeros(self.dim, np.float32)
        if not self.wide:
            return (self.sum / (_SCALE * self.total)).astype(np.float32)
        narrow, fine, coarse = np.split(self.sum, [self.dim - self.wide, self.dim])
        wide = coarse / (_COARSE * self.total) + fine / (_FINE * self.total)
        parts = [narrow / (_SCALE * self.total), wide]
        return np.concatenate(parts).astype(np.float32)

    def _add_wide(self, values: Vector, weight: float) -> float:
        """Adds wide entries, and returns the largest integer that this took.

        Raises:
            DivergedError: they are not finite, or too large.
        """
        weighted = values.astype(np.float64) * weight
        with np.errstate(invalid="ignore"):
            coarse = np.rint(weighted * _COARSE)
            fine = np.rint((weighted - coarse / _COARSE) * _FINE)  # the difference is exact
        largest = float(max(np.abs(coarse).max(initial=0.0), np.abs(fine).max(initial=0.0)))
        if not self.has_room(largest):
            raise DivergedError(
                "statistics must be finite and small enough to be summed, got a largest change of "
                f"{float(np.abs(values).max()):g} with weight={weight:g}. Look at what the model "
                "counts or averages in its buffers."
            )
        start = self.dim - self.wide
        self.sum[start : self.dim] += fine.astype(np.int64)
        self.sum[self.dim :] += coarse.astype(np.int64)
        return largest
