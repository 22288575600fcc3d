"""Virtual time: what the rounds of a simulation would have taken on real devices.

    open        devices check in from when they are free, each at a moment of its own within
                `pace_seconds` plus the time after which it looks for work anyway
    assigned    the first ⌈goal · over_selection⌉ to check in; each loads the model, trains, sends
                its update, and is silent from the moment at which it drops out or stops to be free
    selection   ends when the slots are taken, or `selection_seconds` after the first device
    training    ends `report_seconds` later; a slot whose device was silent for `lease_seconds` goes
                to the next one that is free
    closed      at once when the goal is reached, and at the deadline when the minimum is; otherwise
                the attempt is abandoned and the next one opens; after `attempts` the run stops

These are the rules of the server's rounds, and these names those of its settings. The updates that
arrive first are those that count, so that fast devices and devices that are free weigh more than
the others, as they do in reality.

Nothing here depends on the model's values: the timeline follows from devices, rules, sizes and seed
alone, so a run that continues counts it again from round 1 and is at the same second. Work that is
lost (a device that dropped out, or was late) costs virtual time and is not trained at all.

Differences from the server: commits take no time, and a device is told at once that its round
closed. One that finds all slots taken gets the next free one in the order of check-ins, unless it
stopped to be free. One that was lost does not check in again in the same attempt.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potluck.config.round_settings import RoundRules
from potluck.config.round_step import Counts, Phase, due
from potluck.core import AbandonedError, Poisson, sample_cohort, stream
from potluck.core.cohorts import cohort_size
from potluck.core.validate import as_count
from potluck.simulation.virtual_time.fleet import Fleet

OVERHEAD_BYTES = 4000
"""Each way, besides the model: a signed manifest, some requests, headers. A round figure."""

_REPORT, _LEASE, _CHECK_IN, _DEADLINE = range(4)  # in this order, of what happens at one moment


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTime:
    """The devices of a simulation, and the rules of its rounds.

    Args:
        fleet: one device for every client.
        rules: see `RoundRules`.
        passes: how often local training goes over a client's examples in a round: E.
    """

    fleet: Fleet
    rules: RoundRules = field(default_factory=RoundRules)
    passes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", as_count("passes", self.passes))


class Timing(NamedTuple):
    """One round on the virtual clock: its time and devices; assigned = accepted + dropped +
    late."""

    seconds: float  # at its end, since the start of the run
    accepted: NDArray[np.int64]  # sorted client numbers: the cohort that is trained
    assigned: int  # devices that were given a slot in the attempt that counted
    dropped: int  # of them, lost before the round closed
    late: int  # of them, still at work when it closed
    abandoned: int  # attempts before it
    models_sent: int  # in all attempts
    updates_received: int  # in all attempts


def timeline(
    virtual: VirtualTime,
    *,
    sizes: NDArray[np.int64],
    cohort: float | int | Poisson,
    downlink_bytes: int,
    uplink_bytes: int,
    seed: int,
) -> Iterator[Timing]:
    """The rounds of a run, from round 1, without end.

    Args:
        sizes: [population], examples of every client.
        cohort: as for `rounds`; its size is the goal.
        downlink_bytes, uplink_bytes: of the model to one device, and of its update.

    Raises:
        AbandonedError: `attempts` attempts of a round were abandoned, or no device ever comes.
        ValueError: devices, clients and cohort do not go together.
    """
    fleet, rules = virtual.fleet, virtual.rules
    if len(fleet) != len(sizes):
        raise ValueError(
            f"the fleet must have a device for every client ({len(sizes)}), got {len(fleet)}. "
            "Make it for the population of the task."
        )
    if isinstance(cohort, Poisson) and rules.selection == "open":
        raise ValueError(
            f"a Poisson cohort needs selection='sampled', got selection={rules.selection!r}: "
            "whoever comes first is no random sample. Change one of the two."
        )
    work = (
        (downlink_bytes + OVERHEAD_BYTES) / fleet.downlink_bytes_per_second
        + virtual.passes * sizes / fleet.examples_per_second
        + (uplink_bytes + OVERHEAD_BYTES) / fleet.uplink_bytes_per_second
    )
    return _timeline(fleet, rules, work, cohort, seed)


def _timeline(
    fleet: Fleet,
    rules: RoundRules,
    work: NDArray[np.float64],
    cohort: float | int | Poisson,
    seed: int,
) -> Iterator[Timing]:
    now, number = 0.0, 0
    while True:
        number += 1
        sent = received = 0
        for attempt in range(1, rules.attempts + 1):
            invited, goal, slots = _invited(len(fleet), rules, cohort, seed, number)
            phase = Phase(goal, rules.minimum_of(goal), slots, selection_deadline=None)
            if goal == 0:  # an empty Poisson cohort
                yield Timing(now, np.empty(0, np.int64), 0, 0, 0, attempt - 1, sent, received)
                break
            went = _attempt(fleet, rules, work, phase, invited, now, seed, number, attempt)
            now = went.closed
            sent += went.assigned
            received += len(went.reported)
            if not went.reason:
                yield Timing(
                    seconds=now,
                    accepted=np.sort(np.array(went.reported, np.int64)),
                    assigned=went.assigned,
                    dropped=went.dropped,
                    late=went.assigned - len(went.reported) - went.dropped,
                    abandoned=attempt - 1,
                    models_sent=sent,
                    updates_received=received,
                )
                break
            if attempt == rules.attempts:
                raise AbandonedError(
                    f"round {number} was abandoned {attempt} times in a row; the last time after "
                    f"{now / 3600:.1f} virtual hours: {went.reason}. Give the devices more time "
                    "(devices.selection_seconds, devices.report_seconds), lower run.cohort or "
                    "devices.minimum, or raise devices.attempts."
                )


def _invited(
    population: int, rules: RoundRules, cohort: float | int | Poisson, seed: int, number: int
) -> tuple[NDArray[np.int64], int, int]:
    """Returns the clients that may check in, the goal, and the number of slots."""
    if rules.selection == "sampled" or isinstance(cohort, Poisson):
        invited = sample_cohort(population, cohort, seed=seed, round=number)
        return invited, len(invited), len(invited)
    goal = cohort_size(population, cohort)
    return np.arange(population), goal, rules.slots_of(goal)


def _attempt(
    fleet: Fleet,
    rules: RoundRules,
    work: NDArray[np.float64],
    phase: Phase,
    invited: NDArray[np.int64],
    opened: float,
    seed: int,
    number: int,
    attempt: int,
) -> _Attempt:
    """Draws one attempt: check-in times, and the moments at which devices drop out."""
    population = len(fleet)
    places = stream(seed, "check-in", number, attempt).random(population)
    coins, parts = stream(seed, "drop-out", number, attempt).random((2, population))
    free = fleet.first_free(np.full(population, opened))
    wait = (rules.pace_seconds + fleet.check_in_seconds) * places
    times = fleet.first_free(free + wait)[invited]
    order = np.lexsort((invited, times))
    order = order[np.isfinite(times[order])]
    lost = np.where(coins < fleet.dropout, parts * work, np.inf)
    made = _Attempt(fleet, rules, work, phase, lost)
    made.run(opened, times[order].tolist(), invited[order].tolist())
    return made


class _Attempt:
    """One attempt at a round: its events and its counts."""

    def __init__(
        self,
        fleet: Fleet,
        rules: RoundRules,
        work: NDArray[np.float64],
        phase: Phase,
        lost: NDArray[np.float64],
    ) -> None:
        self._fleet, self._rules, self._phase = fleet, rules, phase
        self._work, self._lost = work, lost
        self._events: list[tuple[float, int, int]] = []  # time, what, device
        self._silent: list[float] = []  # since when, of the lost devices
        self._active = 0
        self.reported: list[int] = []
        self.assigned = 0
        self.closed = math.inf
        self.reason = ""  # why it was abandoned; empty if it was not

    @property
    def dropped(self) -> int:
        """The devices that were lost before it closed."""
        return sum(silent <= self.closed for silent in self._silent)

    def run(self, opened: float, times: Sequence[float], devices: Sequence[int]) -> None:
        """Runs the attempt from opening to closing; `devices` check in at these ascending
        `times`."""
        now, coming = opened, 0
        while True:
            taken = self._active + len(self.reported)
            counts = Counts(self._active, len(self.reported), taken, absent=0)
            step, reason = due(self._phase, counts, now)
            if step == "train":
                deadline = now + self._rules.report_seconds
                self._phase = self._phase._replace(report_deadline=deadline)
            elif step != "wait":
                self.closed, self.reason = now, reason if step == "abandon" else ""
                return
            upcoming = [(self._deadline(), _DEADLINE, -1)]
            if coming < len(times) and taken < self._phase.slots:
                upcoming.append((max(now, times[coming]), _CHECK_IN, devices[coming]))
            if self._events:
                upcoming.append(self._events[0])
            now, what, device = min(upcoming)
            if math.isinf(now):
                raise AbandonedError(
                    "no device that may take part is ever free, so that no round can begin. Look "
                    "at the windows of the devices."
                )
            if what == _CHECK_IN:
                self._assign(device, times[coming], now)
                coming += 1
            elif what == _DEADLINE:
                continue  # `due` handles it
            else:
                heapq.heappop(self._events)
                self._active -= 1
                if what == _REPORT:
                    self.reported.append(device)

    def _deadline(self) -> float:
        """Returns the deadline of the reports, once the devices are selected."""
        deadlines = self._phase.report_deadline, self._phase.selection_deadline
        return next((found for found in deadlines if found is not None), math.inf)

    def _assign(self, device: int, came: float, now: float) -> None:
        leaves = self._fleet.free_until(device, came)
        if leaves <= now:  # it waited for a slot, and is gone
            return
        if self.assigned == 0:
            deadline = now + self._rules.selection_seconds
            self._phase = self._phase._replace(selection_deadline=deadline)
        self.assigned += 1
        self._active += 1
        done = now + float(self._work[device])
        silent = min(leaves, now + float(self._lost[device]))
        if silent < done:
            self._silent.append(silent)
            heapq.heappush(self._events, (silent + self._rules.silence_seconds, _LEASE, device))
        else:
            heapq.heappush(self._events, (done, _REPORT, device))
