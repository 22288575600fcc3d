"""Learning rates that change with the rounds: a factor on `client_lr` or `server_lr`.

A schedule is a function from the number of a round, from 1, to a factor; every one here gives 1
at most. The rate follows from the round alone, so a run that is continued goes on as it would
have. A function of your own is as good, if the processes of an executor can import it.

    FedAvg(client_lr=0.2, client_schedule=Warmup(5, then=Cosine(rounds=100)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from annotated_types import Interval

from potluck.core.validate import check_ranges

_ROUNDS = "Give a number of rounds."


class Schedule(Protocol):
    """The factor of a round."""

    def __call__(self, round: int, /) -> float:
        """The factor in this round, from 1."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """1 in every round."""

    def __call__(self, round: int, /) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Exponential:
    """decay^(t − 1) in round t, with 0 < decay ≤ 1."""

    decay: Annotated[float, Interval(gt=0, le=1), "Use 0.99 for one per cent less each round."]

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, round: int, /) -> float:
        """decay^(t − 1)."""
        return self.decay ** (round - 1)


@dataclass(frozen=True, slots=True)
class Step:
    """Times `factor` after every `every` rounds: 1 in the first `every`, then factor, factor², …"""

    every: Annotated[int, Interval(ge=1), _ROUNDS]
    factor: Annotated[float, Interval(gt=0, le=1), "Use 0.1 for a tenth."]

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, round: int, /) -> float:
        """factor^⌊(t − 1) / every⌋."""
        return self.factor ** ((round - 1) // self.every)


@dataclass(frozen=True, slots=True)
class Linear:
    """Falls from 1 in round 1 in a straight line to `floor`, reached after `rounds` rounds."""

    rounds: Annotated[int, Interval(ge=1), _ROUNDS]
    floor: Annotated[float, Interval(ge=0, le=1), "Use 0.0 to go down to nothing."] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, round: int, /) -> float:
        """1 − (1 − floor) (t − 1) / rounds, and then the floor."""
        return 1.0 - (1.0 - self.floor) * _done(round, self.rounds)


@dataclass(frozen=True, slots=True)
class Cosine:
    """Falls from 1 in round 1 along half a cosine to `floor`, reached after `rounds` rounds."""

    rounds: Annotated[int, Interval(ge=1), _ROUNDS]
    floor: Annotated[float, Interval(ge=0, le=1), "Use 0.0 to go down to nothing."] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, round: int, /) -> float:
        """floor + (1 − floor) (1 + cos(π (t − 1) / rounds)) / 2, and then the floor."""
        cosine = math.cos(math.pi * _done(round, self.rounds))
        return self.floor + (1.0 - self.floor) * (1.0 + cosine) / 2.0


@dataclass(frozen=True, slots=True)
class Warmup:
    """t / (rounds + 1) in the first `rounds` rounds, then another schedule from its round 1."""

    rounds: Annotated[int, Interval(ge=1), _ROUNDS]
    then: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, round: int, /) -> float:
        """t / (rounds + 1) while t ≤ rounds, then `then(t − rounds)`."""
        if round <= self.rounds:
            return round / (self.rounds + 1)
        return self.then(round - self.rounds)


def _done(round: int, rounds: int) -> float:
    return min((round - 1) / rounds, 1.0)
