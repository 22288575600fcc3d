"""Random streams, each derived from all of (seed, purpose, round, client).

No stream depends on how many numbers another one has drawn, so cohorts, batches and initial
weights are the same on every executor, with any number of workers, and after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from potluck.core.validate import as_seed


def derive_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for one purpose ("cohort", "batches", "model", …), round and client."""
    text = f"{as_seed(seed)}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """The random stream of one purpose, round and client."""
    return np.random.Generator(np.random.PCG64(_mixed(derive_seed(seed, purpose, round, client))))


class _Mixed(ISeedSequence):
    """The state that NumPy makes of a seed, which takes it most of the time of a stream."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.SeedSequence(seed).generate_state(4, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> Any:
        """What PCG64 asks for: four words of 64 bits."""
        return self._state


_mixed: Callable[[int], Any] = lru_cache(maxsize=1024)(_Mixed)  # a client's lines may run twice
