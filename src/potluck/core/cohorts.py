"""The choice of the clients that take part in a round.

There are three rules: a fraction C of the population, a fixed count m, or `Poisson(rate)`. The
first is the paper's: m = max(C·K, 1), so C = 0 means one client. In the last every client takes
part independently. Only that gives the amplification by sampling that differential privacy accounts
for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potluck.core.seeds import stream
from potluck.core.validate import as_count, as_integer, as_real, is_integer


@dataclass(frozen=True, slots=True)
class Poisson:
    """Selects every client with probability `rate` (0 < rate ≤ 1), independently.

    A cohort may be empty; then the round leaves the model as it is.
    """

    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", as_real("rate", self.rate))
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(
                f"a Poisson cohort needs a rate above 0 and at most 1, got rate={self.rate!r}. "
                "Give the probability that one client takes part."
            )


def cohort_size(population: int, cohort: float | int) -> int:
    """Returns the number of clients that a fraction (float) or a count (int) of the population is.

    Raises:
        ValueError: a fraction outside [0, 1], a count outside [1, population].
    """
    if is_integer(cohort):
        cohort = as_integer("cohort", cohort)
        if cohort > population:
            raise ValueError(
                f"cohort must be at most the population ({population}), got cohort={cohort}. "
                "Lower it, or partition the data among more clients."
            )
        if cohort < 1:
            raise ValueError(
                f"cohort must be at least 1 when it is a count, got cohort={cohort}. "
                "For the paper's C = 0 (one client) write 0.0."
            )
        return cohort
    cohort = as_real("cohort", cohort, "Give 0.1 or 10.")
    if not 0.0 <= cohort <= 1.0:
        raise ValueError(
            f"cohort must be a fraction from 0.0 to 1.0, got cohort={cohort!r}. "
            "For a count of clients give an integer."
        )
    return max(round(cohort * population), 1)


def sample_cohort(
    population: int, cohort: float | int | Poisson, *, seed: int, round: int
) -> NDArray[np.int64]:
    """Returns the clients of one round, as sorted indices into the population."""
    population = as_count("population", population)
    random = stream(seed, "cohort", round)
    if isinstance(cohort, Poisson):
        size = int(random.binomial(population, cohort.rate))
    else:
        size = cohort_size(population, cohort)
    # Given its size, a Poisson cohort is uniform: one draw instead of one coin per client.
    return np.sort(random.choice(population, size, replace=False, shuffle=False))
