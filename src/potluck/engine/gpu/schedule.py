"""The schedule of a chunk on a device: the clients that step together in each tick.

A device is fast with few shapes, since a graph is captured for each, and many clients at once. So
batches are filled up to a few sizes and widths (examples and symbols that count for nothing), where
model and loss allow it. The number of clients is filled up to a few counts (clients whose results
are not read). Clients are independent, so each tick may take any:

    the client with the most steps left leads
    with it go all whose next batch is filled to the same shape
    if those are few, smaller batches are filled up to it as well: few clients cost what one costs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.engine.local_run import LocalRun

_FEW = 32  # clients, below which a step takes as long as that of one
_SMALL = 32  # examples; below it every batch is filled up to the largest
_WIDTH = 16  # widths are multiples of it
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Tick(NamedTuple):
    """One step of some clients of a chunk."""

    clients: NDArray[np.int64]  # their numbers in the chunk, ascending
    rows: NDArray[np.int64]  # [clients, size]: of the packed examples; ~row where it counts nothing
    rates: NDArray[np.float32]  # [clients]
    width: int  # of sequences; 0 where there are none

    @property
    def size(self) -> int:
        return self.rows.shape[1]


def ticks(
    runs: Sequence[LocalRun],
    lengths: Sequence[NDArray[np.int64]] | None,
    widest: int,
    *,
    fills: bool,
) -> Iterator[Tick]:
    """The ticks that make all steps of all runs.

    Args:
        lengths: of the sequences of each run's rows; None where there are none.
        widest: the width of the packed sequences.
        fills: whether batches may be filled up with examples that count for nothing.
    """
    plan = _Plan(runs, lengths, widest, fills)
    if plan.is_even:
        yield from plan.together()
        return
    position = np.zeros(len(runs), np.int64)
    everybody = np.arange(len(runs))
    while True:
        left = plan.counts - position
        lead = int(left.argmax())
        if left[lead] <= 0:
            return
        now = np.minimum(position, np.maximum(plan.counts - 1, 0))
        sizes, widths = plan.sizes[everybody, now], plan.widths[everybody, now]
        size, width = int(sizes[lead]), int(widths[lead])
        alike = (left > 0) & (sizes == size) & (widths == width)
        if fills and alike.sum() < _FEW:
            smaller = np.flatnonzero((left > 0) & ~alike & (sizes <= size) & (widths <= width))
            by_need = smaller[np.argsort(-left[smaller], kind="stable")]
            alike[by_need[: _FEW - int(alike.sum())]] = True
        clients = np.flatnonzero(alike)
        yield plan.tick(clients, position[clients], size, width)
        position[clients] += 1


def count_for(clients: int) -> int:
    """Returns the count to which a step of so many clients is filled up."""
    return next((count for count in _COUNTS if count >= clients), clients)


class _Plan:
    """The shapes of all steps, as matrices [clients, steps]."""

    def __init__(
        self,
        runs: Sequence[LocalRun],
        lengths: Sequence[NDArray[np.int64]] | None,
        widest: int,
        fills: bool,
    ) -> None:
        self._runs: Sequence[LocalRun] = runs
        self.counts = np.array([len(run.steps) for run in runs])
        shape = len(runs), max(int(self.counts.max(initial=0)), 1)
        self.sizes, self.widths = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for k, run in enumerate(runs):
            known: dict[tuple[int, int], int] = {}  # every epoch has the same batches
            for s, (batch, _) in enumerate(run.steps):
                self.sizes[k, s] = batch.stop - batch.start
                if lengths is not None:
                    here = batch.start, batch.stop
                    if here not in known:
                        known[here] = int(lengths[k][batch].max(initial=1))
                    self.widths[k, s] = known[here]
        if fills:
            largest = int(self.sizes.max(initial=1))
            if largest <= _SMALL:
                self.sizes[:] = largest
            else:
                self.sizes = _rounded_up(self.sizes, largest)
        self.widths = np.minimum(-(-self.widths // _WIDTH) * _WIDTH, widest)

    @property
    def is_even(self) -> bool:
        """True if all clients make the same steps, on batches of one shape at a time."""
        first = self._runs[0]
        alike = all(
            run.steps == first.steps and len(run.rows) == len(first.rows) for run in self._runs
        )
        return alike and bool((self.widths == self.widths[0]).all())

    def together(self) -> Iterator[Tick]:
        """The ticks of clients that are even."""
        clients = np.arange(len(self._runs))
        rows = np.stack([run.rows for run in self._runs])
        for s, (batch, rate) in enumerate(self._runs[0].steps):
            mine, size = rows[:, batch], int(self.sizes[0, s])
            if mine.shape[1] < size:
                more = np.repeat(~mine[:, :1], size - mine.shape[1], axis=1)
                mine = np.concatenate([mine, more], axis=1)
            rates = np.full(len(clients), rate, np.float32)
            yield Tick(clients, mine, rates, int(self.widths[0, s]))

    def tick(
        self, clients: NDArray[np.int64], position: NDArray[np.int64], size: int, width: int
    ) -> Tick:
        rows = np.empty((len(clients), size), np.int64)
        rates = np.empty(len(clients), np.float32)
        for i, (client, s) in enumerate(zip(clients, position, strict=True)):
            run = self._runs[int(client)]
            batch, rates[i] = run.steps[int(s)]
            mine = run.rows[batch]
            rows[i, : len(mine)] = mine
            rows[i, len(mine) :] = ~mine[0]  # one of the client's own
        return Tick(clients, rows, rates, width)


def _rounded_up(sizes: NDArray[np.int64], largest: int) -> NDArray[np.int64]:
    """Rounds up to powers of two and the numbers in the middle between two, and to the largest at
    most."""
    powers = 2 ** np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    middles = powers * 3 // 4
    return np.minimum(np.where((sizes <= middles) & (powers >= 4), middles, powers), largest)
