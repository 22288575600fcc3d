"""The three global generators of a process: PyTorch's, NumPy's and that of `random`.

A model may draw from any of them: its first weights, dropout, an augmentation. So all three are
seeded together, and what the caller had in them is put back.

They belong to all threads. While one thread has seeded them to draw the first weights of a run, no
other may draw from them or restore them: neither a server that evaluates, nor a device that makes
its module. So they are borrowed by one thread at a time.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

_numpy: Any = np.random  # some of whose functions NumPy's annotations leave out
_alone = threading.RLock()
_spare: list[Any] = []  # bit generators for NumPy; to make one takes longer than to seed it


@contextmanager
def kept_randomness() -> Generator[None]:
    """Keeps the three generators: they may be seeded and drawn from in this block."""
    theirs, python = _numpy.get_bit_generator(), random.getstate()
    ours: Any = _spare.pop() if _spare else np.random.MT19937(0)
    _numpy.set_bit_generator(ours)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        _numpy.set_bit_generator(theirs)
        random.setstate(python)
        _spare.append(ours)


@contextmanager
def borrowed_randomness() -> Generator[None]:
    """The same, one thread at a time: for moments only, to make a module or to try one. A thread
    may borrow again what it has borrowed."""
    with _alone, kept_randomness():
        yield


def seed_generators(seed: int) -> None:
    """Seed all three with a 63-bit seed. The generators of GPUs are left alone."""
    # Not `torch.manual_seed`, which also writes a traceback down for every kind of accelerator
    # that is absent: 0.1 ms a client, and memory that is never given back.
    torch.default_generator.manual_seed(seed)
    _numpy.seed(seed % 2**32)
    random.seed(seed)


def states() -> tuple[Any, ...]:
    """Returns the states of the three generators, which are equal if nothing was drawn in
    between."""
    return torch.get_rng_state().numpy().tobytes(), *other_states()


def other_states() -> tuple[Any, ...]:
    """Returns the states of NumPy's generator and of `random`'s."""
    return _flat(_numpy.get_bit_generator().state), random.getstate()


def _flat(state: Any) -> Any:
    if isinstance(state, dict):
        return [(key, _flat(value)) for key, value in cast("dict[Any, Any]", state).items()]
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _in_child() -> None:
    """Renews the lock: one that another thread held at the fork would never be released."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)
