"""What a run hands out of itself: copies, so that nobody changes the run by working on them.

A round's weights are there to be subtracted from, fine-tuned and averaged, in place where that is
shorter. The run goes on from its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from potluck.core import Vector


class Kept(Mapping[int, Vector]):
    """What clients keep, by client. Every access gives a copy, so that the states of many clients
    are not copied round after round.

    Args:
        own: is not copied, and not changed by anybody.
    """

    def __init__(self, own: Mapping[int, Vector]) -> None:
        self.own = own

    def __getitem__(self, client: int) -> Vector:
        return self.own[client].copy()

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def own_states(states: Mapping[int, Vector]) -> Mapping[int, Vector]:
    """States that were handed in, as nobody else has them."""
    if isinstance(states, Kept):
        return states.own
    return {client: np.array(state) for client, state in states.items()}
