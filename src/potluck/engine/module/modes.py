"""Separates a run from the PyTorch modes of its caller.

A caller that has switched gradients off, or calls from within an autocast, gets the same numbers as
any other. The executor alone decides the precision.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")


@contextmanager
def own_modes() -> Generator[None]:
    """Records gradients and casts nothing in this block, whatever the caller's modes are."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def in_own_modes(items: Generator[_Item]) -> Generator[_Item]:
    """The same items, each of them made in `own_modes`; the caller's hold in between."""
    nothing: Any = object()
    try:
        while True:
            with own_modes():
                item = next(items, nothing)
            if item is nothing:
                return
            yield item
    finally:
        with own_modes():
            items.close()
