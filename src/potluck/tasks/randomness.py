"""PyTorch's global stream, from which modules draw their first weights, kept for whoever owns it.

The stream is one for all threads. A server that evaluates in one thread, or a device that makes
its module in another, must neither draw from it nor put it back while a third, with a seed of its
own in it, draws the first weights of a run. So whoever borrows it does so alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

_alone = threading.RLock()


@contextmanager
def borrowed_randomness() -> Generator[None]:
    """Inside, the stream of the CPU may be seeded and drawn from; afterwards it is as before.

    One thread at a time, so for moments only: to make a module, or to try one. A thread may borrow
    again what it has borrowed.
    """
    with _alone, torch.random.fork_rng(devices=[]):
        yield


def _in_child() -> None:
    """A lock that another thread held when this process was forked would never be released."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)
