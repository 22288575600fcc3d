"""Copies of a run's arrays for the caller, whose changes do not reach the run.

A caller may subtract from a round's weights, fine-tune or average them, also in place. The run
continues from its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from potluck.core import Vector


class Kept(Mapping[int, Vector]):
    """Client states by client. Every access gives a copy, so that the states of many clients are
    not copied round after round.

    Args:
        own: is neither copied nor changed.
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
    """Returns states that no caller can change: those of a `Kept` as they are, others copied."""
    if isinstance(states, Kept):
        return states.own
    return {client: np.array(state) for client, state in states.items()}
