"""Random streams, each derived from all of (seed, purpose, round, client).

No stream depends on how many numbers another one has drawn. So cohorts, batches and initial weights
are the same on every executor, with any number of workers, and after a restart.
"""

from __future__ import annotations

import hashlib

import numpy as np

from potluck.core.validate import as_seed


def derive_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """Returns a 63-bit seed for one purpose ("cohort", "batches", "model", …), round and client."""
    text = f"{as_seed(seed)}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """Returns the random stream of one purpose, round and client."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, round, client)))
